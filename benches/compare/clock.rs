//! The monotonic clock in nanoseconds, the same in every process.

use rustix::time::{ClockId, clock_gettime};

/// Now.
pub(crate) fn now() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

/// A moment so many seconds from now.
pub(crate) fn after(seconds: f64) -> u64 {
    now() + (seconds * 1e9) as u64
}
