//! RLIMIT_NOFILE, divided among its uses, and the descriptors of connections.
//!
//! The accept loop accepts a client only when a descriptor for the backend is free as well. A
//! client in the kernel's backlog loses nothing by waiting; a client that is accepted and closed
//! does. So the limit is divided once, at the start, and the descriptors of connections are
//! counted.

use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::sync::{Semaphore, SemaphorePermit};

use crate::config::Config;
use crate::config::target::Target;
use crate::config::values::ReadyMode;
use crate::limits::passed::PassedLimits;

/// The descriptors that a process may have, divided among their uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FdPlan {
    /// Connections at a time.
    pub connections: usize,
    /// Name lookups at a time; 0 when no target needs them.
    pub lookups: usize,
    /// Addresses of backends that are tried on their own, at a time.
    pub watch_places: usize,
    /// Connects beside a client's own attempt, at a time.
    pub beside_places: usize,
    /// Pipes at a time.
    pub pipes: usize,
    /// Those that Unix peers pass to each other.
    pub passed: PassedLimits,
    /// The soft limit at the start, for COMMAND: select(2) breaks above 1024.
    pub inherited: Option<u64>,
}

impl FdPlan {
    /// Divides the descriptors of this process, after raising its soft limit to the hard limit.
    /// `is_journaled` tells whether connections are stored from accept on, `passes` whether Unix
    /// peers may pass descriptors to each other. The `restored` descriptors are open already, and
    /// count as those of connections.
    ///
    /// # Errors
    /// A line for the log when there is no room for a single connection.
    pub fn of_this_process(
        config: &Config,
        is_journaled: bool,
        passes: bool,
        restored: usize,
    ) -> Result<Self, String> {
        let inherited = getrlimit(Resource::Nofile).current;
        let limit = raise_limit();
        let open = open_fds().saturating_sub(restored);
        let plan = Self { inherited, ..Self::new(limit, open, config, is_journaled, passes) };
        if plan.connections == 0 {
            return Err(format!(
                "RLIMIT_NOFILE={limit} leaves no room for a connection; raise LimitNOFILE= \
                 (ulimit -n)."
            ));
        }
        Ok(plan)
    }

    /// Divides `limit` descriptors, of which `open` are taken.
    ///
    /// Connections come first: `--connections-max=`, and one more that is accepted to be refused.
    /// Pipes get the rest, but at least a small part.
    fn new(limit: usize, open: usize, config: &Config, is_journaled: bool, passes: bool) -> Self {
        let (per_connection, for_store) = match config.handover {
            _ if is_journaled => (PER_STORED_CONNECTION, FOR_STORE),
            Some(_) => (PER_CONNECTION, FOR_HANDOVER),
            None => (PER_CONNECTION, 0),
        };
        let for_command = if config.starts_backend() { FOR_COMMAND } else { 0 };
        let for_probes = match config.ready {
            ReadyMode::Connect | ReadyMode::Notify => 0,
            ReadyMode::Http(_) | ReadyMode::Exec(_) => config.targets.iter().count() * PER_PROBE,
        };
        let for_metrics = if config.args.metrics.is_some() { FOR_METRICS } else { 0 };
        let passed = PassedLimits::new(limit, config.args.threads.get());
        let for_passed = if passes { passed.all } else { 0 };
        let for_threads = (config.args.threads.get() - 1) * PER_THREAD;
        let needs_lookups = config.targets.iter().any(|target| matches!(target, Target::Name(_)));
        let connections_max = config.args.connections_max.get() as usize;
        let [watch_places, beside_places] =
            if config.backend_wait.is_zero() { [0, 0] } else { [WATCH_PLACES, BESIDE_PLACES] };
        let reserved = RESERVE
            + (watch_places + beside_places + for_command + for_probes + for_threads)
            + (for_store + for_metrics + for_passed);
        let free = limit.saturating_sub(open + reserved);
        let lookups = if needs_lookups { (free / 32).clamp(1, LOOKUPS_MAX) } else { 0 };
        let free = free.saturating_sub(lookups * PER_LOOKUP);
        let for_connections = connections_max.saturating_add(1).saturating_mul(per_connection);
        let pipes = (free.saturating_sub(for_connections) / 2).max(free / 16).min(PIPES_MAX);
        let connections = free.saturating_sub(pipes * 2) / per_connection;
        Self { connections, lookups, watch_places, beside_places, pipes, passed, inherited: None }
    }
}

/// Returns how many more descriptors this process may open, after raising its soft limit.
///
/// The result leaves enough for one connection and for short-lived descriptors.
pub fn spare_fds() -> usize {
    raise_limit().saturating_sub(open_fds() + RESERVE + PER_STORED_CONNECTION)
}

/// Raises the soft limit to the hard limit, and returns the soft limit.
pub fn raise_limit() -> usize {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit { current: limit.maximum, maximum: limit.maximum };
    let limit = match setrlimit(Resource::Nofile, raised) {
        Ok(()) => limit.maximum,
        Err(error) => {
            tracing::debug!("Failed to raise RLIMIT_NOFILE, ignoring: {error}.");
            limit.current
        }
    };
    limit.map_or(usize::MAX, |limit| limit as usize)
}

fn open_fds() -> usize {
    fs::read_dir("/proc/self/fd").map_or(OPEN_WITHOUT_PROC, Iterator::count)
}

/// The descriptors for connections, counted in connections.
#[derive(Debug)]
pub struct FdBudget {
    shared: Arc<BudgetState>,
    /// Whether an empty budget means the connection limit, not a lack of descriptors.
    pub is_connection_limit: bool,
}

#[derive(Debug)]
struct BudgetState {
    free: Semaphore,
    /// Permits issued beyond the limit. That many returns do not free a permit.
    overdrawn: AtomicUsize,
}

impl FdBudget {
    /// Holds permits for the smaller of `connections`, for which there are descriptors, and `max`.
    pub fn new(connections: usize, max: usize) -> Self {
        let free = Semaphore::new(connections.min(max).min(Semaphore::MAX_PERMITS));
        let shared = Arc::new(BudgetState { free, overdrawn: AtomicUsize::default() });
        Self { shared, is_connection_limit: max <= connections }
    }

    pub fn try_reserve(&self) -> Option<FdPermit> {
        self.shared.free.try_acquire().ok().map(|permit| self.own(permit))
    }

    /// Waits until descriptors for a connection are free, and reserves them.
    pub async fn reserve(&self) -> FdPermit {
        let permit = self.shared.free.acquire().await;
        self.own(permit.expect("the semaphore is never closed"))
    }

    /// Counts a connection whose descriptors are open already.
    pub fn reserve_unchecked(&self) -> FdPermit {
        self.try_reserve().unwrap_or_else(|| {
            self.shared.overdrawn.fetch_add(1, Ordering::AcqRel);
            FdPermit(Arc::clone(&self.shared))
        })
    }

    fn own(&self, permit: SemaphorePermit<'_>) -> FdPermit {
        permit.forget();
        FdPermit(Arc::clone(&self.shared))
    }
}

/// The descriptors of one connection, returned to the budget on drop.
#[derive(Debug)]
pub struct FdPermit(Arc<BudgetState>);

impl Drop for FdPermit {
    fn drop(&mut self) {
        let Self(shared) = self;
        let repay = |overdrawn: usize| overdrawn.checked_sub(1);
        if shared.overdrawn.fetch_update(Ordering::AcqRel, Ordering::Acquire, repay).is_err() {
            shared.free.add_permits(1);
        }
    }
}

/// Requests for metrics that are open at a time.
pub const SCRAPERS_MAX: usize = 256;

/// The sockets of the client and of the backend.
const PER_CONNECTION: usize = 2;

/// Both sockets, and a pipe for each direction.
const PER_STORED_CONNECTION: usize = 6;

/// Descriptors that are open for a moment while the store is read.
const FOR_STORE: usize = 200;

/// Descriptors that connections leave free with `--handover=restart`. The next process has the same
/// limit. While it restores connections, it also holds a message (28), and one more connection (6).
pub const FOR_HANDOVER: usize = 34;

/// Sockets to two name servers, a file such as /etc/hosts, and one for the name service modules.
const PER_LOOKUP: usize = 4;

/// Each lookup is a thread, too.
const LOOKUPS_MAX: usize = 256;

const PIPES_MAX: usize = 512;

/// The notification socket, the journal's socket, a client that is accepted to be refused, and
/// three to spare.
const RESERVE: usize = 6;

/// Sockets of addresses that are tried on their own, and of connects beside a client's own attempt.
/// Other attempts use the descriptors that are reserved for their clients.
const WATCH_PLACES: usize = 4;
const BESIDE_PLACES: usize = 8;

/// The sockets to COMMAND's guard and from it, and the descriptors that are open during its start.
const FOR_COMMAND: usize = 12;

/// A socket to the backend, or a command and what is open during its start.
const PER_PROBE: usize = 6;

/// epoll and its duplicate, an eventfd, and the thread's end of the signals.
const PER_THREAD: usize = 4;

/// [`SCRAPERS_MAX`] requests, those that give way while others are accepted (8), and their event
/// loop.
const FOR_METRICS: usize = SCRAPERS_MAX + 8 + PER_THREAD;

/// An estimate for a process without /proc.
const OPEN_WITHOUT_PROC: usize = 64;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::parser::Request;

    fn config(args: &[&str]) -> Config {
        let args = ["socket-proxyd"].iter().chain(args).map(Into::into);
        match Config::parse(args) {
            Ok(Request::Run(config)) => config,
            Ok(Request::Print(text)) | Err(text) => panic!("{text}"),
        }
    }

    #[test]
    fn connections_come_first_and_the_sum_fits_the_limit() {
        for limit in [0, 20, 40, 64, 256, 1024, 20_000, 524_288] {
            for open in [8, 16, 64] {
                for connections_max in [1, 256, 4096, u32::MAX as usize] {
                    for (args, for_others) in [
                        (&["--metrics=127.0.0.1:1", "127.0.0.1:2"][..], 0),
                        (&["name:2", "--", "/bin/sh"], FOR_COMMAND),
                        (&["--backend-wait=1", "--ready=http:/", "127.0.0.1:2"], PER_PROBE),
                    ] {
                        let connections = format!("--connections-max={connections_max}");
                        let config = config(&[&["--threads=4", &*connections], args].concat());
                        let passes = for_others == 0;
                        let plan = FdPlan::new(limit, open, &config, false, passes);
                        let for_passed = if passes { plan.passed.all } else { 0 };
                        let beside = 3 * PER_THREAD + for_others + for_passed;
                        let sum = plan.connections * 2
                            + plan.pipes * 2
                            + plan.lookups * PER_LOOKUP
                            + plan.watch_places
                            + plan.beside_places
                            + beside;
                        if plan.pipes > 1.max(limit / 16) {
                            assert!(plan.connections > connections_max, "{plan:?}");
                        }
                        if plan.connections > 0 {
                            assert!(sum + open + RESERVE <= limit, "{limit} {open} {plan:?}");
                        }
                    }
                }
            }
        }
        let plan = |limit, open, connections_max: &str, is_journaled| {
            FdPlan::new(
                limit,
                open,
                &config(&[connections_max, "127.0.0.1:2"]),
                is_journaled,
                false,
            )
        };
        let small = plan(40, 10, "--connections-max=256", false);
        assert_eq!((small.connections, small.pipes), (11, 1));
        let roomy = plan(20_000, 16, "--connections-max=4096", false);
        assert!(roomy.connections >= 4096);
        assert_eq!(roomy.pipes, PIPES_MAX);
        let lookups = |limit| FdPlan::new(limit, 16, &config(&["name:2"]), false, false).lookups;
        assert_eq!([40, 1024, 20_000, 524_288].map(lookups), [1, 31, LOOKUPS_MAX, LOOKUPS_MAX]);
        let journaled = plan(20_000, 16, "--connections-max=3000", true);
        assert!(journaled.connections > 3000);
        assert!(journaled.connections * 6 + journaled.pipes * 2 < 20_000);
    }

    #[test]
    fn unchecked_connections_end_before_new_ones_are_admitted() {
        let budget = FdBudget::new(100, 2);
        let restored = [(); 3].map(|()| budget.reserve_unchecked());
        assert!(budget.try_reserve().is_none());
        let [first, second, _third] = restored;
        drop(first);
        assert!(budget.try_reserve().is_none());
        drop(second);
        let _new = budget.try_reserve().unwrap();
        assert!(budget.try_reserve().is_none());
    }
}
