//! `--connection-idle-time=`: which connections are idle and are reset. The timer is in
//! `forward::registry`, the reset in `forward::close`.
//!
//! A connection that delivers bytes stores that in a cell of its own. On each event loop one timer
//! visits all connections, four times in the idle time, and counts the visits since bytes were
//! delivered. A message costs a busy connection one store.
//!
//! Bytes count as delivered once the socket accepts them, but a slow peer may still be draining the
//! send buffer. Before a connection is declared idle, its task is woken to report the
//! unacknowledged bytes. If that number keeps shrinking, the connection is active. (The kernel
//! tells what a TCP peer has acknowledged, and whole buffers of a Unix socket.) Reports are
//! compared over four visits, from the second on: an idle connection is closed between one and a
//! quarter and one and a half times the idle time.

use std::cell::Cell;
use std::time::Duration;

/// What the sweep knows of a connection.
#[derive(Debug, Default)]
pub struct Activity {
    /// Visits since bytes were delivered.
    visits: Cell<u8>,
    /// What a delivery sets `visits` to: zero, or [`EXPIRED`] for a connection that is to end.
    after_delivery: Cell<u8>,
    /// The connection was woken to report its unacknowledged bytes.
    asked: Cell<bool>,
    /// The unacknowledged bytes of each side at the last report. 0 stays 0 until the next delivery.
    /// `u32` is enough: no socket buffer is larger.
    unacked: Cell<Option<[u32; 2]>>,
}

impl Activity {
    /// Notes that bytes were delivered.
    pub fn touch(&self) {
        self.visits.set(self.after_delivery.get());
    }

    /// Makes the connection count as idle from now on, whatever it delivers.
    pub fn expire(&self) {
        self.after_delivery.set(EXPIRED);
        self.visits.set(EXPIRED);
        self.asked.set(false);
    }

    /// Whether [`Activity::expire`] was called.
    pub fn is_expired(&self) -> bool {
        self.after_delivery.get() == EXPIRED
    }

    /// Whether the connection is idle. The top of this file says after what time.
    pub fn is_idle(&self) -> bool {
        self.visits.get() >= FIRST_REPORT + VISITS && !self.asked.get()
    }

    /// Takes the bytes that each side's socket has accepted and its peer has not, if the sweep asks
    /// for them.
    pub fn report_unacked(&self, unacked_bytes: impl FnOnce() -> [usize; 2]) {
        if !self.asked.get() {
            return;
        }
        self.asked.set(false);
        let now = unacked_bytes().map(|bytes| u32::try_from(bytes).unwrap_or(u32::MAX));
        let before = self.unacked.replace(Some(now)).unwrap_or_default();
        if now.iter().zip(before).any(|(now, before)| *now < before) {
            self.touch();
        }
    }

    /// Returns the time between two visits.
    pub fn visit_interval(idle_time: Duration) -> Duration {
        // tokio's timers tell no shorter times apart.
        (idle_time / u32::from(VISITS)).max(Duration::from_millis(1))
    }

    /// Counts a visit. Returns whether the connection's task is to be woken.
    pub fn visit(&self) -> bool {
        if self.is_expired() {
            return true;
        }
        let visits = self.visits.get().saturating_add(1);
        self.visits.set(visits);
        if visits < FIRST_REPORT {
            return false;
        }
        if visits == FIRST_REPORT {
            self.unacked.set(None);
        }
        let is_acked = self.unacked.get() == Some([0, 0]);
        self.asked.set(self.asked.get() || !is_acked);
        !is_acked || visits >= FIRST_REPORT + VISITS
    }
}

/// More visits than any idle time has.
const EXPIRED: u8 = u8::MAX;

/// Visits in an idle time.
const VISITS: u8 = 4;

/// The visit that asks for the first report. The first visit may follow a delivery at once, so the
/// second one asks.
const FIRST_REPORT: u8 = 2;

#[cfg(test)]
mod tests {
    use std::future::poll_fn;
    use std::rc::Rc;
    use std::task::Poll;

    use tokio::task::{LocalSet, spawn_local};
    use tokio::time::{Instant, advance, sleep};

    use super::*;
    use crate::forward::registry::{Registration, Registry};

    const TIME: Duration = Duration::from_secs(60);

    #[test]
    fn a_visit_wakes_a_connection_from_the_second_one_on_until_all_is_acknowledged() {
        let activity = Activity::default();
        let woken = |unacked_bytes| {
            activity.touch();
            let wakes = |_: &u8| {
                activity.visit() && {
                    activity.report_unacked(|| unacked_bytes);
                    true
                }
            };
            (1..=6).filter(wakes).collect::<Vec<u8>>()
        };
        assert_eq!(woken([9, 0]), [2, 3, 4, 5, 6]);
        assert!(activity.is_idle());
        // A report after a delivery is not compared with one before it.
        assert_eq!(woken([7, 0]), [2, 3, 4, 5, 6]);
        assert!(activity.is_idle());
        assert_eq!(woken([0, 0]), [2, 6]);
        assert!(activity.is_idle());
    }

    async fn wait_until_idle(connection: &Registration) {
        wait_until_idle_with(connection, || [7, 0]).await;
    }

    /// Waits as a connection does, and reports what `unacked_bytes` returns.
    async fn wait_until_idle_with(
        connection: &Registration,
        unacked_bytes: impl Fn() -> [usize; 2],
    ) {
        poll_fn(|cx| {
            connection.set_waker(cx.waker());
            connection.activity().report_unacked(&unacked_bytes);
            if connection.activity().is_idle() { Poll::Ready(()) } else { Poll::Pending }
        })
        .await;
    }

    async fn with_sweep<T>(test: impl AsyncFnOnce(Rc<Registry>) -> T) -> T {
        let registry = Rc::new(Registry::new(Some(TIME)));
        let set = LocalSet::new();
        set.run_until(async move {
            spawn_local(Rc::clone(&registry).sweep());
            test(registry).await
        })
        .await
    }

    #[tokio::test(start_paused = true)]
    async fn finds_idle_connections_in_time() {
        with_sweep(async |registry| {
            // It begins at any moment between two visits.
            let _other = registry.register(false);
            for late in 0..20 {
                sleep(TIME / 7 * late).await;
                let connection = registry.register(false);
                let start = Instant::now();
                wait_until_idle(&connection).await;
                let took = start.elapsed();
                let longest = TIME * 3 / 2 + Duration::from_millis(1);
                assert!(took >= TIME * 5 / 4 && took <= longest, "{took:?}");
            }
        })
        .await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_peer_that_receives_slowly_is_not_idle() {
        with_sweep(async |registry| {
            let connection = registry.register(false);
            let start = Instant::now();
            // The peer takes a byte in nine tenths of the time, and then no more.
            let unacked = || 20_usize.saturating_sub((start.elapsed().as_secs() / 54) as usize);
            wait_until_idle_with(&connection, || [0, unacked()]).await;
            let took = start.elapsed() - TIME * 18;
            assert!(took >= TIME && took <= TIME * 2, "{took:?}");
        })
        .await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_late_event_loop_closes_no_connection_early() {
        with_sweep(async |registry| {
            let connection = registry.register(false);
            let start = Instant::now();
            for _ in 0..3 {
                // The loop is held up, and then goes on without a pause.
                advance(TIME * 2 / 5).await;
                tokio::task::yield_now().await;
            }
            wait_until_idle(&connection).await;
            assert!(start.elapsed() >= TIME * 3 / 2, "{:?}", start.elapsed());
        })
        .await;
    }

    #[tokio::test(start_paused = true)]
    async fn busy_connections_are_not_idle() {
        with_sweep(async |registry| {
            let connection = registry.register(false);
            for _ in 0..50 {
                sleep(TIME * 9 / 10).await;
                assert!(!connection.activity().is_idle());
                connection.activity().touch();
            }
        })
        .await;
    }

    #[tokio::test(start_paused = true)]
    async fn the_sweep_starts_again_after_the_last_connection() {
        with_sweep(async |registry| {
            let all: Vec<_> = (0..10).map(|_| registry.register(false)).collect();
            let start = Instant::now();
            for connection in &all {
                wait_until_idle(connection).await;
            }
            assert!(start.elapsed() <= TIME * 16 / 10);
            drop(all);
            assert!(registry.is_empty());
            sleep(TIME * 3).await;
            let connection = registry.register(false);
            let start = Instant::now();
            wait_until_idle(&connection).await;
            assert!(start.elapsed() >= TIME && start.elapsed() <= TIME * 16 / 10);
        })
        .await;
    }
}
