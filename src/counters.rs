//! The counters behind `STATUS=` and `--metrics=`.
//!
//! Counting costs a relaxed atomic operation or two and never waits. Each event loop counts bytes
//! for itself, and a reader adds the loops up. No counter is ever reset.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use prometheus_client::metrics::counter::Counter;

use crate::runtime::lock;

/// The number of objects that exist, shared by its clones.
#[derive(Clone, Debug, Default)]
pub struct Gauge(Arc<AtomicUsize>);

/// An object that a [`Gauge`] counts until this is dropped.
#[derive(Debug)]
pub struct GaugeGuard(Arc<AtomicUsize>);

impl Gauge {
    pub fn taken(&self) -> usize {
        self.0.load(Ordering::Relaxed)
    }

    /// Counts an object.
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

/// Connections of one listener.
#[derive(Debug, Default)]
pub struct ListenerCounters {
    /// Open connections.
    pub open: Gauge,
    /// Open connections that wait until their backend is up.
    pub waiting: Gauge,
    /// Connections admitted.
    pub admitted: Counter,
    /// Connections closed at a limit, for each [`RefusalReason`].
    pub refused: [Counter; RefusalReason::NAMES.len()],
    /// Connections closed because no backend was reached.
    pub failed: Counter,
    /// Those of a datagram socket, whose sessions count as connections.
    pub datagrams: DatagramCounters,
}

impl ListenerCounters {
    /// Counts a connection closed at a limit.
    pub fn refuse(&self, reason: RefusalReason) {
        self.refused[reason as usize].inc();
    }

    /// Returns the number of connections closed at a limit.
    pub fn refused(&self) -> u64 {
        self.refused.iter().map(Counter::get).sum()
    }
}

/// Why a connection was closed before it was served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RefusalReason {
    /// `--connections-max=` is reached.
    Limit,
    /// `--connections-max-per-source=` is reached.
    Source,
    /// The client is passive, and the backend is not ready.
    Passive,
}

impl RefusalReason {
    /// The names of all reasons, in their order.
    pub const NAMES: [&str; 3] = ["limit", "source", "passive"];
}

/// Datagrams of one listener. The arrays are indexed by direction: 0 from clients, 1 from backends.
///
/// What was received was delivered, was dropped, or is held.
#[derive(Debug, Default)]
pub struct DatagramCounters {
    pub received: [Counter; 2],
    pub delivered: [Counter; 2],
    /// Bytes delivered.
    pub bytes: [Counter; 2],
    /// Sessions that gave way at the connection limit.
    pub evicted: Counter,
    dropped: [[Counter; DropReason::NAMES.len()]; 2],
}

impl DatagramCounters {
    pub fn drop(&self, direction: usize, reason: DropReason, datagrams: usize) {
        self.dropped[direction][reason as usize].inc_by(datagrams as u64);
    }

    /// Returns the number of datagrams dropped in a direction, for the name of each reason.
    pub fn dropped(&self, direction: usize) -> impl Iterator<Item = (&'static str, u64)> {
        DropReason::NAMES.into_iter().zip(self.dropped[direction].iter().map(Counter::get))
    }
}

/// Why a datagram was dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DropReason {
    /// A source that has no answer: port 0, multicast, broadcast.
    Source,
    /// Longer than the buffer for it.
    Truncated,
    /// `--connections-max=` or the limit on descriptors is reached.
    Limit,
    /// `--connections-max-per-source=` is reached.
    SourceLimit,
    /// The client is passive, and the backend is not ready.
    Passive,
    /// A newer one took its place, while the session waited for its backend.
    Held,
    /// No backend was reached, or the client is gone.
    Unreachable,
    /// The queue of the receiver is full.
    Full,
    /// Longer than the receiver or the path takes.
    TooLong,
    /// A new client, while the proxy is stopping.
    Draining,
    /// Any other error of the system.
    Error,
}

impl DropReason {
    /// The names of all reasons, in their order.
    const NAMES: [&str; 11] = [
        "source",
        "truncated",
        "limit",
        "source_limit",
        "passive",
        "held",
        "unreachable",
        "full",
        "too_long",
        "draining",
        "error",
    ];
}

/// Bytes delivered between one backend and its clients, counted by one thread and read by any.
///
/// The alignment keeps counters of other threads out of its cache lines.
#[derive(Debug, Default)]
#[repr(align(128))]
pub struct ByteCounters([AtomicU64; 2]);

impl ByteCounters {
    /// Returns the bytes from clients and from the backend.
    pub fn get(&self) -> [u64; 2] {
        self.0.each_ref().map(|bytes| bytes.load(Ordering::Relaxed))
    }

    /// Adds bytes from the client (side 0) or from the backend (side 1).
    pub fn add(&self, side: usize, bytes: u64) {
        // Not fetch_add: no other thread stores.
        let count = &self.0[side];
        count.store(count.load(Ordering::Relaxed) + bytes, Ordering::Relaxed);
    }
}

/// Counters of one event loop.
#[derive(Clone, Debug)]
pub struct LoopCounters {
    /// One for each backend, and a last one for backends that are no longer configured.
    pub bytes: Vec<Arc<ByteCounters>>,
    /// Open pipes.
    pub pipes: Gauge,
}

/// Counters of all event loops, those that have ended included.
#[derive(Debug, Default)]
pub struct Loops(Mutex<Vec<LoopCounters>>);

impl Loops {
    /// Returns counters for a new event loop.
    pub fn add(&self, backends: usize) -> LoopCounters {
        let bytes = (0..=backends).map(|_| Arc::default()).collect();
        let counters = LoopCounters { bytes, pipes: Gauge::default() };
        lock(&self.0).push(counters.clone());
        counters
    }

    /// Returns the bytes delivered, in the order of [`LoopCounters::bytes`].
    pub fn delivered(&self) -> Vec<[u64; 2]> {
        let mut sums = Vec::new();
        for counters in &*lock(&self.0) {
            sums.resize(counters.bytes.len(), [0, 0]);
            for (sum, bytes) in sums.iter_mut().zip(&counters.bytes) {
                let bytes = bytes.get();
                *sum = [sum[0] + bytes[0], sum[1] + bytes[1]];
            }
        }
        sums
    }

    /// Returns the number of open pipes.
    pub fn pipes(&self) -> usize {
        lock(&self.0).iter().map(|counters| counters.pipes.taken()).sum()
    }
}

/// Starts of COMMAND.
#[derive(Debug, Default)]
pub struct CommandCounters {
    pub all: Counter,
    /// Starts that failed: COMMAND exited before it was ready, or within a second after.
    pub failed: Counter,
    /// Times that a frozen COMMAND was thawed.
    pub thaws: Counter,
    /// Stops of an idle backend.
    pub stops: Counter,
    /// Stop commands that failed.
    pub stop_failures: Counter,
}

/// Attempts to connect to one backend.
#[derive(Debug, Default)]
pub struct ConnectCounters {
    /// How long the successful attempts took.
    pub durations: Histogram,
    /// Probes of `--ready=` that found the backend not ready.
    pub probe_failures: Counter,
    errors: [Counter; ConnectErrorKind::NAMES.len()],
}

impl ConnectCounters {
    /// Counts a failed attempt.
    pub fn fail(&self, kind: ConnectErrorKind) {
        self.errors[kind as usize].inc();
    }

    /// Returns the number of failed attempts for the name of each kind.
    pub fn errors(&self) -> impl Iterator<Item = (&'static str, u64)> {
        ConnectErrorKind::NAMES.into_iter().zip(self.errors.iter().map(Counter::get))
    }
}

/// Why an attempt to connect failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConnectErrorKind {
    /// ECONNREFUSED: nothing listens.
    Refused,
    /// The connect timeout passed without an answer.
    Timeout,
    /// No route leads to the backend.
    Unreachable,
    /// The socket file does not exist.
    NotFound,
    /// The backlog of a Unix socket is full.
    Backlog,
    /// Permissions, a firewall or a sandbox forbid the connection.
    Denied,
    /// The name has no address.
    Resolve,
    /// The proxy is out of descriptors or memory.
    Resources,
    Other,
}

impl ConnectErrorKind {
    /// The names of all kinds, in their order.
    const NAMES: [&str; 9] = [
        "refused",
        "timeout",
        "unreachable",
        "not_found",
        "backlog",
        "denied",
        "resolve",
        "resources",
        "other",
    ];
}

/// Durations, counted in buckets.
#[derive(Debug, Default)]
pub struct Histogram {
    /// One count for each bound, and a last one for what is longer.
    counts: [Counter; Self::BOUNDS.len() + 1],
    /// The sum in nanoseconds.
    sum: AtomicU64,
}

impl Histogram {
    /// Upper bounds in microseconds, from a Unix socket on this machine to the connect timeout.
    const BOUNDS: [u64; 13] = [
        25, 50, 100, 250, 1_000, 5_000, 10_000, 50_000, 100_000, 500_000, 1_000_000, 5_000_000,
        10_000_000,
    ];

    pub fn record(&self, time: Duration) {
        let within = |bound: &u64| time <= Duration::from_micros(*bound);
        let index = Self::BOUNDS.iter().position(within).unwrap_or(Self::BOUNDS.len());
        self.counts[index].inc();
        self.sum.fetch_add(time.as_nanos() as u64, Ordering::Relaxed);
    }

    /// Returns the upper bound in seconds and the count of each bucket.
    pub fn buckets(&self) -> impl Iterator<Item = (f64, u64)> {
        let bounds = Self::BOUNDS.iter().map(|micros| *micros as f64 / 1e6);
        bounds.chain([f64::INFINITY]).zip(self.counts.iter().map(Counter::get))
    }

    /// Returns the sum of all durations.
    pub fn sum(&self) -> Duration {
        Duration::from_nanos(self.sum.load(Ordering::Relaxed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guard_counts_until_it_is_dropped() {
        let gauge = Gauge::default();
        let (first, second) = (gauge.take(), gauge.take());
        assert_eq!(gauge.taken(), 2);
        drop((first, second));
        assert_eq!(gauge.taken(), 0);
    }

    #[test]
    fn loops_are_added_up() {
        let loops = Loops::default();
        let (first, second) = (loops.add(1), loops.add(1));
        first.bytes[0].add(0, 5);
        second.bytes[0].add(0, 7);
        second.bytes[1].add(1, 1);
        let _pipes = (first.pipes.take(), second.pipes.take());
        assert_eq!(loops.delivered(), [[12, 0], [0, 1]]);
        assert_eq!(loops.pipes(), 2);
    }

    #[test]
    fn each_duration_is_in_the_bucket_of_the_least_bound_above() {
        let histogram = Histogram::default();
        for micros in [25, 26, 10_000_000, 10_000_001] {
            histogram.record(Duration::from_micros(micros));
        }
        let buckets: Vec<_> = histogram.buckets().filter(|(_, count)| *count > 0).collect();
        assert_eq!(buckets, [(2.5e-5, 1), (5e-5, 1), (10.0, 1), (f64::INFINITY, 1)]);
        assert_eq!(histogram.sum(), Duration::from_micros(20_000_052));
    }

    #[test]
    fn each_failure_is_counted_under_its_name() {
        let counters = ConnectCounters::default();
        let kinds = [
            (ConnectErrorKind::Refused, "refused"),
            (ConnectErrorKind::Timeout, "timeout"),
            (ConnectErrorKind::Unreachable, "unreachable"),
            (ConnectErrorKind::NotFound, "not_found"),
            (ConnectErrorKind::Backlog, "backlog"),
            (ConnectErrorKind::Denied, "denied"),
            (ConnectErrorKind::Resolve, "resolve"),
            (ConnectErrorKind::Resources, "resources"),
            (ConnectErrorKind::Other, "other"),
        ];
        for (index, (kind, _)) in kinds.iter().enumerate() {
            (0..=index).for_each(|_| counters.fail(*kind));
        }
        assert!(counters.errors().eq(kinds.map(|(_, name)| name).into_iter().zip(1..)));
    }
}
