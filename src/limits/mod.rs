//! The connection limit, and the counts of connections.
//!
//! A [`ConnectionPermit`] is part of a [`Slot`](slot::Slot), from accept to close. So a connection
//! counts while its backend is still being connected. Dropping a permit costs a few atomic
//! operations. Every change wakes the `STATUS=` line.

pub mod client_limits;
pub mod slot;
pub mod idle_clock;
pub mod source;
pub mod passed;
pub mod descriptors;

use std::num::NonZeroU32;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use tokio::sync::Notify;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ConnectionCounts {
    /// Connections that are open, or whose backend is being connected.
    pub open: u32,
    /// Connections that have ended, which `STATUS=` calls served.
    pub served: u64,
}

/// The limit on open connections (`--connections-max=`).
#[derive(Clone, Debug)]
pub struct ConnectionLimit(Arc<LimitState>);

#[derive(Debug)]
struct LimitState {
    max: NonZeroU32,
    open: AtomicU32,
    served: AtomicU64,
    /// Notified at each change, for a single waiter.
    changed: Notify,
}

impl ConnectionLimit {
    pub fn new(max: NonZeroU32) -> Self {
        Self(Arc::new(LimitState {
            max,
            open: AtomicU32::default(),
            served: AtomicU64::default(),
            changed: Notify::default(),
        }))
    }

    /// Admits a connection, or returns `None` at the limit.
    pub fn try_acquire(&self) -> Option<ConnectionPermit> {
        let Self(shared) = self;
        let below_max = |open: u32| (open < shared.max.get()).then_some(open + 1);
        let admitted = shared.open.fetch_update(Ordering::AcqRel, Ordering::Acquire, below_max);
        shared.changed.notify_one();
        admitted.is_ok().then(|| ConnectionPermit(Arc::clone(shared)))
    }

    /// Admits a connection of the previous process, whatever the limit is now.
    pub fn acquire_unchecked(&self) -> ConnectionPermit {
        let Self(shared) = self;
        shared.open.fetch_add(1, Ordering::AcqRel);
        shared.changed.notify_one();
        ConnectionPermit(Arc::clone(shared))
    }

    pub fn max(&self) -> NonZeroU32 {
        self.0.max
    }

    pub fn counts(&self) -> ConnectionCounts {
        ConnectionCounts {
            open: self.0.open.load(Ordering::Acquire),
            served: self.0.served.load(Ordering::Relaxed),
        }
    }

    /// Wakes [`ConnectionLimit::changed`]: a client was refused, which `STATUS=` shows.
    pub fn notify(&self) {
        self.0.changed.notify_one();
    }

    /// Waits until the counts have changed since the last call. Supports one waiter.
    pub async fn changed(&self) {
        self.0.changed.notified().await;
    }
}

/// One connection, counted until this is dropped.
#[derive(Debug)]
pub struct ConnectionPermit(Arc<LimitState>);

impl Drop for ConnectionPermit {
    fn drop(&mut self) {
        let Self(shared) = self;
        shared.served.fetch_add(1, Ordering::Relaxed);
        shared.open.fetch_sub(1, Ordering::AcqRel);
        shared.changed.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_is_exact() {
        let limit = ConnectionLimit::new(NonZeroU32::new(2).unwrap());
        let first = limit.try_acquire().unwrap();
        let _second = limit.try_acquire().unwrap();
        assert!(limit.try_acquire().is_none());
        drop(first);
        let _third = limit.try_acquire().unwrap();
        assert!(limit.try_acquire().is_none());
        assert_eq!(limit.counts(), ConnectionCounts { open: 2, served: 1 });
    }
}
