//! How many descriptors there are, and who may have them.
//!
//! Nobody is accepted before the backend's descriptor is in sight: a client that waits in the
//! kernel's backlog loses nothing, one that was accepted and dropped does. So `RLIMIT_NOFILE` is
//! divided once, at start, and what a connection may take is counted.

#![forbid(unsafe_code)]

use std::io;
use std::sync::Arc;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// A client's and its backend's.
const PER_CONNECTION: u32 = 2;

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

/// What start-up opens at most, beside the listeners: counted only when descriptors are few.
const OPEN_AT_START: usize = 64;

/// The descriptors a process may have, divided among their uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Division {
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
pub struct Uses {
    /// Looking names up.
    pub lookups: bool,
    /// COMMAND.
    pub command: bool,
    /// Event loops beside the main thread's.
    pub threads: usize,
}

impl Division {
    /// Divides `limit` descriptors of which `open` are taken. Connections come first, up to
    /// `connections_max` and the one that is accepted to be refused; pipes get what is left, and at
    /// least a small part.
    pub fn new(limit: usize, open: usize, connections_max: usize, uses: Uses) -> Self {
        let for_command = if uses.command { FOR_COMMAND } else { 0 };
        let for_threads = uses.threads * PER_THREAD;
        let free = limit.saturating_sub(open + RESERVE + for_command + for_threads);
        let lookups = if uses.lookups { (free / 32).clamp(1, LOOKUPS_MAX) } else { 0 };
        let free = free.saturating_sub(lookups * PER_LOOKUP);
        let for_connections =
            connections_max.saturating_add(1).saturating_mul(PER_CONNECTION as usize);
        let pipes = (free.saturating_sub(for_connections) / 2).max(free / 16).min(PIPES_MAX);
        Self {
            connections: free.saturating_sub(pipes * 2) / PER_CONNECTION as usize,
            lookups,
            pipes,
            inherited: None,
        }
    }

    /// Divides what this process has, after raising its soft limit to the hard one.
    ///
    /// # Errors
    /// When there is not room for a single connection.
    pub fn of_this_process(connections_max: u32, uses: Uses) -> Result<Self, String> {
        let inherited = getrlimit(Resource::Nofile).current;
        let limit = raise_limit();
        let connections_max = connections_max as usize;
        let beside = OPEN_AT_START
            + RESERVE
            + FOR_COMMAND
            + uses.threads * PER_THREAD
            + LOOKUPS_MAX * PER_LOOKUP
            + PIPES_MAX * 2;
        let plenty = connections_max.saturating_mul(PER_CONNECTION as usize).saturating_add(beside);
        let open =
            if limit >= plenty { OPEN_AT_START } else { open_now().unwrap_or(OPEN_AT_START) };
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

/// The descriptors that connections may take, counted.
#[derive(Debug)]
pub struct Descriptors {
    places: Arc<Semaphore>,
    /// There may be more of them: the cap on connections is what they stand for.
    capped: bool,
}

/// A connection's two descriptors, given back when it is dropped.
#[derive(Debug)]
pub struct Reserved(#[expect(dead_code, reason = "held, not read")] OwnedSemaphorePermit);

impl Descriptors {
    /// Room for this many connections.
    pub fn new(connections: usize) -> Self {
        let places = Semaphore::new(connections.min(Semaphore::MAX_PERMITS)).into();
        Self { places, capped: false }
    }

    /// The same, and for no more than `max`: who comes above that waits in the kernel.
    pub fn capped(connections: usize, max: usize) -> Self {
        Self { capped: max <= connections, ..Self::new(connections.min(max)) }
    }

    /// Whether it is the cap that is met when there are none left.
    pub fn are_capped(&self) -> bool {
        self.capped
    }

    /// Two descriptors, if there are any left.
    pub fn try_reserve(&self) -> Option<Reserved> {
        Arc::clone(&self.places).try_acquire_owned().ok().map(Reserved)
    }

    /// Waits for two descriptors.
    pub async fn reserve(&self) -> Reserved {
        let reserved = Arc::clone(&self.places).acquire_owned().await;
        Reserved(reserved.expect("the semaphore is never closed"))
    }
}

/// Raises the soft limit to the hard one and says what it is now.
fn raise_limit() -> usize {
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
                        let uses = Uses { lookups, command: lookups, threads: 3 };
                        let it = Division::new(limit, open, connections_max, uses);
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
        let uses = Uses { lookups: false, command: false, threads: 0 };
        let small = Division::new(40, 10, 256, uses);
        assert_eq!((small.connections, small.pipes), (11, 1));
        let roomy = Division::new(20_000, 16, 4096, uses);
        assert!(roomy.connections >= 4096);
        assert_eq!(roomy.pipes, PIPES_MAX);
    }
}
