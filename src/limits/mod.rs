//! The connection limit, and the counts of connections.
//!
//! A [`Permit`] is part of a [`Slot`](slot::Slot), from accept to close. So a connection counts
//! while its backend is still being connected. Dropping a permit costs a few atomic operations. The
//! first and the last connection wake each [`ConnectionWatch`]. Every change wakes the `STATUS=`
//! line.

pub mod slot;
pub mod descriptors;

use std::future::pending;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use tokio::sync::{Notify, watch};
use tokio::time::sleep;

use crate::config::timespan::TimeSpan;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ConnectionCounts {
    /// Connections that are open, or whose backend is being connected.
    pub open: u32,
    /// Connections that have ended, which `STATUS=` calls served.
    pub served: u64,
    /// Connections closed at the connection limit.
    pub refused: u64,
}

/// The limit on open connections (`--connections-max=`).
#[derive(Clone, Debug)]
pub struct ConnectionLimit(Arc<LimitState>);

#[derive(Debug)]
struct LimitState {
    max: NonZeroU32,
    open: AtomicU32,
    served: AtomicU64,
    refused: AtomicU64,
    /// Sent to when `open` leaves zero or returns to zero.
    crossed_zero: watch::Sender<()>,
    /// Notified at each change, for a single waiter.
    changed: Notify,
}

impl ConnectionLimit {
    pub fn new(max: NonZeroU32) -> Self {
        Self(Arc::new(LimitState {
            max,
            open: AtomicU32::default(),
            served: AtomicU64::default(),
            refused: AtomicU64::default(),
            crossed_zero: watch::Sender::default(),
            changed: Notify::default(),
        }))
    }

    /// Admits a connection, or counts a refusal and returns `None` at the limit.
    pub fn try_acquire(&self) -> Option<Permit> {
        let Self(shared) = self;
        let below_max = |open: u32| (open < shared.max.get()).then_some(open + 1);
        let admitted = shared.open.fetch_update(Ordering::AcqRel, Ordering::Acquire, below_max);
        if admitted.is_err() {
            shared.refused.fetch_add(1, Ordering::Relaxed);
        }
        shared.notify(admitted == Ok(0));
        admitted.is_ok().then(|| Permit(Arc::clone(shared)))
    }

    /// Admits a connection of the previous process, whatever the limit is now.
    pub fn acquire_unchecked(&self) -> Permit {
        let Self(shared) = self;
        let before = shared.open.fetch_add(1, Ordering::AcqRel);
        shared.notify(before == 0);
        Permit(Arc::clone(shared))
    }

    pub fn max(&self) -> NonZeroU32 {
        self.0.max
    }

    pub fn counts(&self) -> ConnectionCounts {
        ConnectionCounts {
            open: self.0.open.load(Ordering::Acquire),
            served: self.0.served.load(Ordering::Relaxed),
            refused: self.0.refused.load(Ordering::Relaxed),
        }
    }

    /// Waits until the counts have changed since the last call. Supports one waiter.
    pub async fn changed(&self) {
        self.0.changed.notified().await;
    }

    pub fn watch(&self) -> ConnectionWatch {
        let shared = Arc::clone(&self.0);
        ConnectionWatch { crossed_zero: shared.crossed_zero.subscribe(), shared }
    }
}

impl LimitState {
    fn notify(&self, crossed_zero: bool) {
        if crossed_zero {
            self.crossed_zero.send_replace(());
        }
        self.changed.notify_one();
    }
}

/// One connection, counted until this is dropped.
#[derive(Debug)]
pub struct Permit(Arc<LimitState>);

impl Drop for Permit {
    fn drop(&mut self) {
        let Self(shared) = self;
        shared.served.fetch_add(1, Ordering::Relaxed);
        let before = shared.open.fetch_sub(1, Ordering::AcqRel);
        shared.notify(before == 1);
    }
}

/// Waits for the first connection and for the end of the last one.
#[derive(Debug)]
pub struct ConnectionWatch {
    shared: Arc<LimitState>,
    crossed_zero: watch::Receiver<()>,
}

impl ConnectionWatch {
    /// Returns whether no connection is open.
    pub fn is_empty(&self) -> bool {
        self.shared.open.load(Ordering::Acquire) == 0
    }

    /// Waits until no connection is open.
    pub async fn wait_empty(&mut self) {
        loop {
            // Marked before `is_empty`: a change after the check then wakes this task.
            self.crossed_zero.mark_unchanged();
            if self.is_empty() {
                return;
            }
            self.changed().await;
        }
    }

    /// Waits until the first connection has come or the last one has ended since the last call.
    ///
    /// A connection that came and ended in between counts.
    pub async fn changed(&mut self) {
        // Never an error: `shared` keeps the sender alive.
        let _ = self.crossed_zero.changed().await;
    }

    /// Waits until no connection has been open for `span`.
    ///
    /// The time counts from the call or from the end of the last connection.
    pub async fn wait_idle(&mut self, span: TimeSpan) {
        let Some(span) = span.finite() else { return pending().await };
        loop {
            self.wait_empty().await;
            tokio::select! {
                biased;
                // Polled first: a timer that expires in the same moment must not cut off a
                // connection that was just admitted.
                () = self.changed() => {}
                () = sleep(span) => return,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::{Instant, advance, timeout};

    use super::*;

    const MINUTE: Duration = Duration::from_secs(60);

    #[test]
    fn the_limit_is_exact() {
        let limit = ConnectionLimit::new(NonZeroU32::new(2).unwrap());
        let first = limit.try_acquire().unwrap();
        let _second = limit.try_acquire().unwrap();
        assert!(limit.try_acquire().is_none());
        drop(first);
        let _third = limit.try_acquire().unwrap();
        assert!(limit.try_acquire().is_none());
        assert_eq!(limit.counts(), ConnectionCounts { open: 2, served: 1, refused: 2 });
    }

    #[tokio::test(start_paused = true)]
    async fn the_first_and_the_last_connection_wake_the_watch() {
        let limit = ConnectionLimit::new(NonZeroU32::new(2).unwrap());
        let mut watch = limit.watch();
        let first = limit.try_acquire();
        watch.changed().await;
        let second = limit.try_acquire();
        drop(first);
        let woken = timeout(Duration::from_secs(60), watch.changed()).await;
        assert!(woken.is_err(), "one of two connections is still open");
        drop(second);
        watch.changed().await;
        watch.wait_empty().await;
    }

    #[tokio::test(start_paused = true)]
    async fn idle_time_counts_from_the_end_of_the_last_connection() {
        let limit = ConnectionLimit::new(NonZeroU32::MIN);
        let mut watch = limit.watch();
        let start = Instant::now();
        let connections = async {
            advance(MINUTE / 2).await;
            let permit = limit.try_acquire();
            advance(MINUTE * 5).await;
            drop(permit);
        };
        let ((), ()) = tokio::join!(watch.wait_idle(TimeSpan::new(MINUTE)), connections);
        let idle = start.elapsed();
        assert!(idle >= MINUTE * 13 / 2 && idle < MINUTE * 7, "{idle:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_admitted_as_the_timer_expires_is_not_cut_off() {
        for _ in 0..100 {
            let limit = ConnectionLimit::new(NonZeroU32::MIN);
            let mut watch = limit.watch();
            let mut idle = std::pin::pin!(watch.wait_idle(TimeSpan::new(MINUTE)));
            assert!(timeout(MINUTE / 2, &mut idle).await.is_err());
            let permit = limit.try_acquire();
            advance(MINUTE).await;
            assert!(timeout(MINUTE, &mut idle).await.is_err());
            drop(permit);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn idle_time_counts_from_the_start() {
        let limit = ConnectionLimit::new(NonZeroU32::MIN);
        let start = Instant::now();
        limit.watch().wait_idle(TimeSpan::new(MINUTE)).await;
        assert!(start.elapsed() >= MINUTE);
    }
}
