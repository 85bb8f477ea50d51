//! RLIMIT_NOFILE, divided among its uses, and the descriptors that connections may take.
//!
//! A client is accepted only once there is a descriptor for its backend as well. A client that waits in the
//! kernel's backlog loses nothing; one that was accepted and dropped does. So the limit is divided once, at
//! start, and what connections take is counted.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::sync::{Semaphore, SemaphorePermit};

/// A client's and its backend's.
const PER_CONNECTION: usize = 2;

/// The same with a pipe of its own for each direction.
const PER_CONNECTION_WITH_PIPES: usize = 6;

/// For looking through the store.
const FOR_STORE: usize = 200;

/// What a lookup opens while it runs: sockets to two name servers, a file of the system's, and one
/// more for the name service modules.
const PER_LOOKUP: usize = 4;

/// Lookups at a time when descriptors abound. Each is a thread, too.
const LOOKUPS_MAX: usize = 256;

/// Pipes when descriptors abound.
const PIPES_MAX: usize = 512;

/// For the notification socket, the journal's, and the moment in which a newcomer is refused.
const RESERVE: usize = 6;

/// For COMMAND: the sockets to its guard and from it, and what starting it opens for a moment.
const FOR_COMMAND: usize = 12;

/// For an event loop of another thread: epoll, its wake-up, its end of the signals.
const PER_THREAD: usize = 4;

/// Requests for metrics that are open at a time.
pub const SCRAPERS_MAX: usize = 256;

/// For these requests, for those that give way while others are accepted, and for their event loop.
const FOR_METRICS: usize = SCRAPERS_MAX + 8 + PER_THREAD;

/// What start-up opens at most, beside the listeners: counted only when descriptors are few.
const OPEN_AT_START: usize = 64;

/// The descriptors a process may have, divided among their uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FdPlan {
    /// Connections at a time.
    pub connections: usize,
    /// Name lookups at a time; 0 when the target needs none.
    pub lookups: usize,
    /// Pipes at a time.
    pub pipes: usize,
    /// The soft limit as it was found, for COMMAND: above 1024, select(2) breaks.
    pub inherited: Option<u64>,
}

/// What a process needs descriptors for, beside its connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FdNeeds {
    /// Looking names up.
    pub lookups: bool,
    /// COMMAND.
    pub command: bool,
    /// Event loops beside the main thread's.
    pub threads: usize,
    /// Metrics.
    pub metrics: bool,
    /// Connections that are stored at every moment.
    pub is_journaled: bool,
    /// Descriptors of connections that are there already, and are counted as such.
    pub restored: usize,
}

impl FdNeeds {
    /// Descriptors for a connection, and for the store.
    fn is_journaled(self) -> (usize, usize) {
        if self.is_journaled { (PER_CONNECTION_WITH_PIPES, FOR_STORE) } else { (PER_CONNECTION, 0) }
    }
}

impl FdPlan {
    /// Divides `limit` descriptors of which `open` are taken. Connections come first, up to
    /// `connections_max` and the one that is accepted to be refused; pipes get what is left, and at
    /// least a small part.
    pub fn new(limit: usize, open: usize, connections_max: usize, uses: FdNeeds) -> Self {
        let for_command = if uses.command { FOR_COMMAND } else { 0 };
        let for_threads = uses.threads * PER_THREAD;
        let (per_connection, for_store) = uses.is_journaled();
        let for_metrics = if uses.metrics { FOR_METRICS } else { 0 };
        let beside = RESERVE + for_command + for_threads + for_store + for_metrics;
        let free = limit.saturating_sub(open + beside);
        let lookups = if uses.lookups { (free / 32).clamp(1, LOOKUPS_MAX) } else { 0 };
        let free = free.saturating_sub(lookups * PER_LOOKUP);
        let for_connections = connections_max.saturating_add(1).saturating_mul(per_connection);
        let pipes = (free.saturating_sub(for_connections) / 2).max(free / 16).min(PIPES_MAX);
        Self {
            connections: free.saturating_sub(pipes * 2) / per_connection,
            lookups,
            pipes,
            inherited: None,
        }
    }

    /// Divides what this process has, after raising its soft limit to the hard one.
    ///
    /// # Errors
    /// When there is not room for a single connection.
    pub fn of_this_process(connections_max: u32, uses: FdNeeds) -> Result<Self, String> {
        let inherited = getrlimit(Resource::Nofile).current;
        let limit = raise_limit();
        let connections_max = connections_max as usize;
        let (per_connection, for_store) = uses.is_journaled();
        let beside = OPEN_AT_START
            + for_store
            + RESERVE
            + FOR_COMMAND
            + FOR_METRICS
            + uses.threads * PER_THREAD
            + LOOKUPS_MAX * PER_LOOKUP
            + PIPES_MAX * 2;
        let plenty = connections_max.saturating_mul(per_connection).saturating_add(beside);
        let open =
            if limit >= plenty { OPEN_AT_START } else { open_now().unwrap_or(OPEN_AT_START) };
        let open = open.saturating_sub(uses.restored);
        let division = Self { inherited, ..Self::new(limit, open, connections_max, uses) };
        if division.connections == 0 {
            return Err(format!(
                "RLIMIT_NOFILE={limit} leaves no room for a connection; raise LimitNOFILE= \
                 (ulimit -n)."
            ));
        }
        Ok(division)
    }
}

/// Returns how many descriptors this process may open beside those that it has, after raising its soft limit
/// to the hard one. Enough is left for a connection and for what is opened for a moment.
pub fn spare_fds() -> usize {
    let open = open_now().unwrap_or(OPEN_AT_START);
    raise_limit().saturating_sub(open + RESERVE + PER_CONNECTION_WITH_PIPES)
}

/// The descriptors that connections may take, counted.
#[derive(Debug)]
pub struct FdBudget {
    places: Arc<Places>,
    /// There may be more of them: the cap on connections is what they stand for.
    capped: bool,
}

#[derive(Debug)]
struct Places {
    free: Semaphore,
    /// Taken although there were none: as many are not free again when they are given back.
    overdrawn: AtomicUsize,
}

/// A connection's descriptors, given back when it is dropped.
#[derive(Debug)]
pub struct FdPermit(Arc<Places>);

impl FdBudget {
    /// Room for this many connections.
    pub fn new(connections: usize) -> Self {
        let free = Semaphore::new(connections.min(Semaphore::MAX_PERMITS));
        Self { places: Arc::new(Places { free, overdrawn: AtomicUsize::default() }), capped: false }
    }

    /// The same, and for no more than `max`: who comes above that waits in the kernel.
    pub fn capped(connections: usize, max: usize) -> Self {
        Self { capped: max <= connections, ..Self::new(connections.min(max)) }
    }

    /// Whether it is the cap that is met when there are none left.
    pub fn at_connection_limit(&self) -> bool {
        self.capped
    }

    /// A connection's, if there are any left.
    pub fn try_reserve(&self) -> Option<FdPermit> {
        self.places.free.try_acquire().ok().map(|permit| self.reserved(permit))
    }

    /// Waits for them.
    pub async fn reserve(&self) -> FdPermit {
        let permit = self.places.free.acquire().await;
        self.reserved(permit.expect("the semaphore is never closed"))
    }

    /// The same for somebody who has them already.
    pub fn reserve_unchecked(&self) -> FdPermit {
        self.try_reserve().unwrap_or_else(|| {
            self.places.overdrawn.fetch_add(1, Ordering::AcqRel);
            FdPermit(Arc::clone(&self.places))
        })
    }

    fn reserved(&self, permit: SemaphorePermit<'_>) -> FdPermit {
        permit.forget();
        FdPermit(Arc::clone(&self.places))
    }
}

impl Drop for FdPermit {
    fn drop(&mut self) {
        let Self(places) = self;
        let pay = |overdrawn: usize| overdrawn.checked_sub(1);
        if places.overdrawn.fetch_update(Ordering::AcqRel, Ordering::Acquire, pay).is_err() {
            places.free.add_permits(1);
        }
    }
}

/// Raises the soft limit to the hard one and says what it is now.
pub fn raise_limit() -> usize {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit { current: limit.maximum, maximum: limit.maximum };
    let limit = match setrlimit(Resource::Nofile, raised) {
        Ok(()) => limit.maximum,
        Err(error) => {
            tracing::debug!("Failed to raise RLIMIT_NOFILE, ignoring: {error}");
            limit.current
        }
    };
    limit.map_or(usize::MAX, |limit| limit as usize)
}

fn open_now() -> io::Result<usize> {
    Ok(std::fs::read_dir("/proc/self/fd")?.count())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_come_first_and_the_sum_fits() {
        for limit in [0, 20, 40, 64, 256, 1024, 20_000, 524_288] {
            for open in [8, 16, 64] {
                for connections_max in [1, 256, 4096, u32::MAX as usize] {
                    for lookups in [false, true] {
                        let uses = FdNeeds {
                            lookups,
                            command: lookups,
                            threads: 3,
                            metrics: !lookups,
                            is_journaled: false,
                            restored: 0,
                        };
                        let it = FdPlan::new(limit, open, connections_max, uses);
                        let beside =
                            uses.threads * PER_THREAD + if lookups { FOR_COMMAND } else { 0 };
                        let sum =
                            it.connections * 2 + it.pipes * 2 + it.lookups * PER_LOOKUP + beside;
                        if it.pipes > 1.max(limit / 16) {
                            assert!(it.connections > connections_max, "nobody is refused");
                        }
                        if it.connections > 0 {
                            assert!(sum + open + RESERVE <= limit, "{limit} {open} {it:?}");
                        }
                    }
                }
            }
        }
        let uses = FdNeeds {
            lookups: false,
            command: false,
            threads: 0,
            metrics: false,
            is_journaled: false,
            restored: 0,
        };
        let small = FdPlan::new(40, 10, 256, uses);
        assert_eq!((small.connections, small.pipes), (11, 1));
        let roomy = FdPlan::new(20_000, 16, 4096, uses);
        assert!(roomy.connections >= 4096);
        assert_eq!(roomy.pipes, PIPES_MAX);
        let is_journaled = FdPlan::new(20_000, 16, 3000, FdNeeds { is_journaled: true, ..uses });
        assert!(
            is_journaled.connections > 3000
                && is_journaled.connections * 6 + is_journaled.pipes * 2 < 20_000
        );
    }

    #[test]
    fn who_is_there_already_goes_before_others_come() {
        let descriptors = FdBudget::capped(100, 2);
        let there = [(); 3].map(|()| descriptors.reserve_unchecked());
        assert!(descriptors.try_reserve().is_none());
        let [first, second, _third] = there;
        drop(first);
        assert!(descriptors.try_reserve().is_none());
        drop(second);
        let _newcomer = descriptors.try_reserve().unwrap();
        assert!(descriptors.try_reserve().is_none());
    }
}
