//! Waiting, for events where there are any.
//!
//! [`TIMEOUT`] only turns a hang into a failure. A [`pause`] is for what is itself a span of time: a
//! deadline to outlast, CPU to be measured over.

use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::thread;
use std::time::Duration;

use tokio::time::Instant;

/// Longer than anything takes that works.
pub const TIMEOUT: Duration = Duration::from_secs(20);

/// Polls until `look` returns something, or until the deadline. Only for what has no event: another
/// process's descriptors, CPU time or end.
pub fn poll_until<T>(deadline: Instant, mut look: impl FnMut() -> Option<T>) -> Option<T> {
    loop {
        if let Some(found) = look() {
            return Some(found);
        }
        if Instant::now() > deadline {
            return None;
        }
        pause(Duration::from_millis(2));
    }
}

#[expect(clippy::disallowed_methods, reason = "between two looks, and to measure over a time")]
pub fn pause(time: Duration) {
    thread::sleep(time);
}

static PROCESSORS: RwLock<()> = RwLock::new(());

/// For a test that measures times or counts system calls: no [`busy`] test runs beside it.
pub fn measuring() -> RwLockReadGuard<'static, ()> {
    PROCESSORS.read().unwrap_or_else(PoisonError::into_inner)
}

/// For a test that keeps all processors busy.
pub fn busy() -> RwLockWriteGuard<'static, ()> {
    PROCESSORS.write().unwrap_or_else(PoisonError::into_inner)
}
