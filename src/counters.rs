//! What is counted, where it happens, for whoever looks later: `STATUS=` and `--metrics=`.
//!
//! Counting is a relaxed atomic or two, and never waits. What many threads would count at once, bytes,
//! each event loop counts for itself; who looks adds up. Nothing here is ever reset.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// What comes and goes: connections on an event loop, those included that are on their way there, or
/// from a listener; pipes.
#[derive(Clone, Debug, Default)]
pub struct Gauge(Arc<AtomicUsize>);

/// One of it, until this is dropped.
#[derive(Debug)]
pub struct GaugeGuard(Arc<AtomicUsize>);

impl Gauge {
    /// How many there are.
    pub fn taken(&self) -> usize {
        self.0.load(Ordering::Relaxed)
    }

    /// One more.
    pub fn take(&self) -> GaugeGuard {
        self.0.fetch_add(1, Ordering::Relaxed);
        GaugeGuard(Arc::clone(&self.0))
    }
}

impl Drop for GaugeGuard {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Events so far, counted by any thread.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// How many there were.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    /// One more.
    pub fn add_one(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

/// What happens at one way in.
#[derive(Debug, Default)]
pub struct ListenerCounters {
    /// Connections that are not over.
    pub open: Gauge,
    /// Those of them that are waiting until their backend is up.
    pub waiting: Gauge,
    /// Connections that were admitted.
    pub admitted: Counter,
    /// Those that were closed at the cap.
    pub refused: Counter,
    /// Those that got no backend.
    pub failed: Counter,
}

/// Bytes delivered between the clients of one backend and it, counted by one thread and read by any.
/// They have their cache lines for themselves: another thread's count is not to take them away.
#[derive(Debug, Default)]
#[repr(align(128))]
pub struct ByteCounters([AtomicU64; 2]);

impl ByteCounters {
    /// So far: from clients, and from the backend.
    pub fn get(&self) -> [u64; 2] {
        self.0.each_ref().map(|bytes| bytes.load(Ordering::Relaxed))
    }

    /// From the client (0) or the backend (1). A load and a store: nobody else stores.
    pub fn add(&self, side: usize, bytes: u64) {
        let count = &self.0[side];
        count.store(count.load(Ordering::Relaxed) + bytes, Ordering::Relaxed);
    }
}

/// What one event loop counts.
#[derive(Clone, Debug)]
pub struct LoopCounters {
    /// For each backend, and behind them for connections to what is no backend any more.
    pub carried: Vec<Arc<ByteCounters>>,
    /// Pipes in existence.
    pub pipes: Gauge,
}

impl LoopCounters {
    /// For this many backends.
    pub fn new(backends: usize) -> Self {
        let carried = (0..=backends).map(|_| Arc::default()).collect();
        Self { carried, pipes: Gauge::default() }
    }
}

/// What all event loops have counted, those included that have ended.
#[derive(Debug, Default)]
pub struct Loops(Mutex<Vec<LoopCounters>>);

impl Loops {
    /// One more.
    pub fn add(&self, backends: usize) -> LoopCounters {
        let counts = LoopCounters::new(backends);
        self.lock().push(counts.clone());
        counts
    }

    /// Bytes delivered so far, for each backend and the rest, as [`ByteCounters::get`] has them.
    pub fn carried(&self) -> Vec<[u64; 2]> {
        let mut sums = Vec::new();
        for counts in &*self.lock() {
            sums.resize(counts.carried.len(), [0, 0]);
            for (sum, carried) in sums.iter_mut().zip(&counts.carried) {
                let bytes = carried.get();
                *sum = [sum[0] + bytes[0], sum[1] + bytes[1]];
            }
        }
        sums
    }

    /// Pipes in existence.
    pub fn pipes(&self) -> usize {
        self.lock().iter().map(|counts| counts.pipes.taken()).sum()
    }

    fn lock(&self) -> MutexGuard<'_, Vec<LoopCounters>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// COMMAND's starts.
#[derive(Debug, Default)]
pub struct CommandCounters {
    /// All of them.
    pub all: Counter,
    /// Those after which it ended before it was ready, or as soon as it was.
    pub failed: Counter,
}

/// Attempts to reach one backend.
#[derive(Debug, Default)]
pub struct ConnectCounters {
    /// How long those took that reached it.
    pub latency: Histogram,
    failed: [Counter; ConnectErrorKind::ALL.len()],
}

impl ConnectCounters {
    /// Counts one that did not.
    pub fn fail(&self, kind: ConnectErrorKind) {
        self.failed[kind as usize].add_one();
    }

    /// How many did not, by why.
    pub fn failed(&self) -> impl Iterator<Item = (ConnectErrorKind, u64)> {
        ConnectErrorKind::ALL.into_iter().zip(self.failed.iter().map(Counter::get))
    }
}

/// Why a backend was not reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConnectErrorKind {
    /// Nobody listens (ECONNREFUSED).
    Refused,
    /// No answer within the connect timeout.
    Timeout,
    /// There is no way there.
    Unreachable,
    /// There is no such socket file.
    NotFound,
    /// A Unix socket's backlog is full.
    Backlog,
    /// Permissions, a firewall or a sandbox forbid it.
    Denied,
    /// It has no address.
    Resolve,
    /// We are out of descriptors or memory.
    Resources,
    /// Anything else.
    Other,
}

impl ConnectErrorKind {
    const ALL: [Self; 9] = [
        Self::Refused,
        Self::Timeout,
        Self::Unreachable,
        Self::NotFound,
        Self::Backlog,
        Self::Denied,
        Self::Resolve,
        Self::Resources,
        Self::Other,
    ];

    /// In one word.
    pub fn name(self) -> &'static str {
        match self {
            Self::Refused => "refused",
            Self::Timeout => "timeout",
            Self::Unreachable => "unreachable",
            Self::NotFound => "not_found",
            Self::Backlog => "backlog",
            Self::Denied => "denied",
            Self::Resolve => "resolve",
            Self::Resources => "resources",
            Self::Other => "other",
        }
    }
}

/// How long something took: how often, by upper bounds.
#[derive(Debug, Default)]
pub struct Histogram {
    /// Within each bound and above the one before, and above all.
    counts: [Counter; Self::BOUNDS.len() + 1],
    /// Nanoseconds in all.
    sum: AtomicU64,
}

impl Histogram {
    /// In microseconds: from a Unix socket of this machine to the connect timeout.
    pub const BOUNDS: [u64; 13] = [
        25, 50, 100, 250, 1_000, 5_000, 10_000, 50_000, 100_000, 500_000, 1_000_000, 5_000_000,
        10_000_000,
    ];

    /// Counts one.
    pub fn record(&self, time: Duration) {
        let within = |bound: &u64| time <= Duration::from_micros(*bound);
        let index = Self::BOUNDS.iter().position(within).unwrap_or(Self::BOUNDS.len());
        self.counts[index].add_one();
        self.sum.fetch_add(time.as_nanos() as u64, Ordering::Relaxed);
    }

    /// How many were within each bound, how many there were, and how long they took in all.
    pub fn get(&self) -> ([u64; Self::BOUNDS.len()], u64, Duration) {
        let sum = Duration::from_nanos(self.sum.load(Ordering::Relaxed));
        let mut total = 0;
        let mut up_to = |count: &Counter| {
            total += count.get();
            total
        };
        let within = std::array::from_fn(|index| up_to(&self.counts[index]));
        (within, up_to(&self.counts[Self::BOUNDS.len()]), sum)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seats_are_given_back() {
        let seats = Gauge::default();
        let (first, second) = (seats.take(), seats.take());
        assert_eq!(seats.taken(), 2);
        drop((first, second));
        assert_eq!(seats.taken(), 0);
    }

    #[test]
    fn loops_are_added_up() {
        let loops = Loops::default();
        let (first, second) = (loops.add(1), loops.add(1));
        first.carried[0].add(0, 5);
        second.carried[0].add(0, 7);
        second.carried[1].add(1, 1);
        let _pipes = (first.pipes.take(), second.pipes.take());
        assert_eq!(loops.carried(), [[12, 0], [0, 1]]);
        assert_eq!(loops.pipes(), 2);
    }

    #[test]
    fn each_bound_holds_what_is_below_it() {
        let histogram = Histogram::default();
        for micros in [25, 26, 10_000_000, 10_000_001] {
            histogram.record(Duration::from_micros(micros));
        }
        let (within, count, sum) = histogram.get();
        assert_eq!((within[0], within[1], within[12], count), (1, 2, 3, 4));
        assert_eq!(sum, Duration::from_micros(20_000_052));
    }

    #[test]
    fn each_failure_is_counted_as_itself() {
        let counters = ConnectCounters::default();
        for kind in ConnectErrorKind::ALL {
            (0..=kind as usize).for_each(|_| counters.fail(kind));
        }
        for (index, (kind, count)) in counters.failed().enumerate() {
            assert_eq!((kind as usize, count), (index, index as u64 + 1));
        }
    }
}
