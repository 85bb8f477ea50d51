//! The connection limit, and the count that everything else watches.
//!
//! A [`Permit`] lives from accept to close, so connections whose backend is not connected yet count. Dropping it
//! costs a few atomic operations. A [`ConnectionWatch`] is woken when the first connection comes and when
//! the last one ends; the `STATUS=` line is woken at each change.

pub mod slot;
pub mod descriptors;
pub mod idle;

use std::num::NonZeroU32;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use tokio::sync::{Notify, watch};

/// Connections now and so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ConnectionCounts {
    /// Open or being dialled.
    pub open: u32,
    /// Over.
    pub served: u64,
    /// Closed at the cap.
    pub refused: u64,
}

/// The cap on connections.
#[derive(Clone, Debug)]
pub struct ConnectionLimit(Arc<Counts>);

#[derive(Debug)]
struct Counts {
    max: NonZeroU32,
    open: AtomicU32,
    served: AtomicU64,
    refused: AtomicU64,
    /// Marked after `open` has come from zero or gone to it.
    crossed_zero: watch::Sender<()>,
    /// After any change; for one to wait for.
    changed: Notify,
}

/// One connection's place under the cap.
#[derive(Debug)]
pub struct Permit(Arc<Counts>);

impl ConnectionLimit {
    /// Admits at most `max` connections at a time.
    pub fn new(max: NonZeroU32) -> Self {
        Self(Arc::new(Counts {
            max,
            open: AtomicU32::default(),
            served: AtomicU64::default(),
            refused: AtomicU64::default(),
            crossed_zero: watch::Sender::default(),
            changed: Notify::default(),
        }))
    }

    /// A place for a newcomer, or `None` at the cap.
    pub fn admit(&self) -> Option<Permit> {
        let Self(counts) = self;
        let room = |open: u32| (open < counts.max.get()).then_some(open + 1);
        let admitted = counts.open.fetch_update(Ordering::AcqRel, Ordering::Acquire, room);
        match admitted {
            Ok(before) => {
                if before == 0 {
                    counts.crossed_zero.send_replace(());
                }
            }
            Err(_) => {
                counts.refused.fetch_add(1, Ordering::Relaxed);
            }
        }
        counts.changed.notify_one();
        admitted.is_ok().then(|| Permit(Arc::clone(counts)))
    }

    /// A place for somebody who had one in the process before this, whatever the cap is now.
    pub fn acquire_unchecked(&self) -> Permit {
        let Self(counts) = self;
        if counts.open.fetch_add(1, Ordering::AcqRel) == 0 {
            counts.crossed_zero.send_replace(());
        }
        counts.changed.notify_one();
        Permit(Arc::clone(counts))
    }

    /// The cap.
    pub fn max(&self) -> NonZeroU32 {
        self.0.max
    }

    /// The load at this moment.
    pub fn load(&self) -> ConnectionCounts {
        ConnectionCounts {
            open: self.0.open.load(Ordering::Acquire),
            served: self.0.served.load(Ordering::Relaxed),
            refused: self.0.refused.load(Ordering::Relaxed),
        }
    }

    /// Waits for a change of the load since the last call; only one may wait.
    pub async fn changed(&self) {
        self.0.changed.notified().await;
    }

    /// To wait for the first connection and the last.
    pub fn watch(&self) -> ConnectionWatch {
        ConnectionWatch {
            counts: Arc::clone(&self.0),
            crossed_zero: self.0.crossed_zero.subscribe(),
        }
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        let Self(counts) = self;
        counts.served.fetch_add(1, Ordering::Relaxed);
        if counts.open.fetch_sub(1, Ordering::AcqRel) == 1 {
            counts.crossed_zero.send_replace(());
        }
        counts.changed.notify_one();
    }
}

/// Whether there are connections, for somebody who waits for that.
#[derive(Debug)]
pub struct ConnectionWatch {
    counts: Arc<Counts>,
    crossed_zero: watch::Receiver<()>,
}

impl ConnectionWatch {
    /// Whether there is no connection.
    pub fn is_empty(&self) -> bool {
        self.counts.open.load(Ordering::Acquire) == 0
    }

    /// Waits until there is no connection.
    pub async fn wait_empty(&mut self) {
        loop {
            // Before the look, so that no turn after it goes unseen.
            self.crossed_zero.mark_unchanged();
            if self.is_empty() {
                return;
            }
            self.turn().await;
        }
    }

    /// Waits until the first connection has come or the last has gone, since this was last asked;
    /// one that came and went in between counts.
    pub async fn turn(&mut self) {
        // The sender is there for as long as this is.
        let _ = self.crossed_zero.changed().await;
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::timeout;

    use super::*;

    #[test]
    fn the_cap_is_exact() {
        let limit = ConnectionLimit::new(NonZeroU32::new(2).unwrap());
        let first = limit.admit().unwrap();
        let _second = limit.admit().unwrap();
        assert!(limit.admit().is_none());
        drop(first);
        let _third = limit.admit().unwrap();
        assert!(limit.admit().is_none());
        assert_eq!(limit.load(), ConnectionCounts { open: 2, served: 1, refused: 2 });
    }

    #[tokio::test(start_paused = true)]
    async fn the_first_and_the_last_connection_are_told() {
        let limit = ConnectionLimit::new(NonZeroU32::new(2).unwrap());
        let mut watch = limit.watch();
        let first = limit.admit();
        watch.turn().await;
        let second = limit.admit();
        drop(first);
        let told = timeout(Duration::from_secs(60), watch.turn()).await;
        assert!(told.is_err(), "one of two has left");
        drop(second);
        watch.turn().await;
        watch.wait_empty().await;
    }
}
