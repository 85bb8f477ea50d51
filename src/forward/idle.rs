//! `--connection-idle-time=`: closes connections that carry nothing for too long.
//!
//! A connection that delivers bytes stores that in a cell of its own. On each event loop one timer visits all
//! connections, four times in the idle time, and counts the visits since bytes were delivered. A busy connection
//! costs nothing per message.
//!
//! Bytes count as delivered once the socket accepts them, but a slow peer may still be draining the send
//! buffer. Before a connection is declared idle, its task is woken to report the unacknowledged bytes. If
//! that number keeps shrinking, the connection is active. (The kernel tells what a TCP peer has acknowledged, and
//! whole buffers of a Unix socket.) Reports are compared over four visits, from the second on: an idle
//! connection is closed between one and a quarter and one and a half times the idle time.

use std::cell::{Cell, OnceCell};
use std::convert::Infallible;
use std::rc::Rc;
use std::task::Waker;
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::sleep;

use crate::forward::registry::{Registration, Registry};

/// Looks in an idle time.
const LOOKS: u8 = 4;

/// The look at which it is first told what is under way. At the one before, bytes may have been
/// delivered a moment ago.
const FIRST: u8 = 2;

/// tokio's timers tell no shorter times apart.
const INTERVAL_MIN: Duration = Duration::from_millis(1);

/// Looks after the connections of one event loop.
#[derive(Debug)]
pub struct IdleSweeper {
    idle_time: Duration,
    idle_guard: Rc<Registry<Activity>>,
    /// The first connection has come.
    begun: Notify,
}

/// A connection that is looked after until this is dropped.
#[derive(Debug)]
pub struct IdleGuard {
    pulse: Registration<Activity>,
    watch: Rc<IdleSweeper>,
}

#[derive(Debug, Default)]
struct Activity {
    /// Looks since bytes were delivered.
    missed: Cell<u8>,
    /// It was woken, to tell what is under way.
    asked: Cell<bool>,
    /// What was under way at the last look, to each side; once it is nothing, it stays so.
    unacked: Cell<Option<[usize; 2]>>,
    /// Whom to wake.
    waker: OnceCell<Waker>,
}

impl IdleSweeper {
    /// For connections that may carry nothing for `idle_time`.
    pub fn new(idle_time: Duration) -> Self {
        Self { idle_time, idle_guard: Rc::default(), begun: Notify::default() }
    }

    /// How long each may carry nothing.
    pub fn idle_time(&self) -> Duration {
        self.idle_time
    }

    /// Looks after one more, from now on.
    pub fn join(self: &Rc<Self>) -> IdleGuard {
        if self.idle_guard.is_empty() {
            self.begun.notify_one();
        }
        IdleGuard { pulse: self.idle_guard.join(Activity::default()), watch: Rc::clone(self) }
    }

    /// Looks at all of them, for ever; to be run once.
    pub async fn run(self: Rc<Self>) -> Infallible {
        let interval = (self.idle_time / u32::from(LOOKS)).max(INTERVAL_MIN);
        loop {
            if self.idle_guard.is_empty() {
                self.begun.notified().await;
            }
            // From now, however late this look was: the next would be too early for all.
            sleep(interval).await;
            self.idle_guard.for_each(Activity::tick);
        }
    }
}

impl IdleGuard {
    /// Names the task that waits for it, once: a connection stays with its task.
    pub fn register(&self, waker: &Waker) {
        let _ = self.pulse.waker.set(waker.clone());
    }

    /// Bytes were delivered.
    pub fn touch(&self) {
        self.pulse.missed.set(0);
    }

    /// Whether to tell what is under way, with [`IdleGuard::report_unacked`].
    pub fn is_asked(&self) -> bool {
        self.pulse.asked.get()
    }

    /// Bytes that each side's socket has taken and its peer has not.
    pub fn report_unacked(&self, unacked: [usize; 2]) {
        self.pulse.asked.set(false);
        let before = self.pulse.unacked.replace(Some(unacked));
        let becomes_less =
            |before: [usize; 2]| unacked.iter().zip(before).any(|(now, before)| *now < before);
        if before.is_some_and(becomes_less) {
            self.touch();
        }
    }

    /// Whether nothing was carried for the idle time.
    pub fn is_idle(&self) -> bool {
        self.pulse.missed.get() >= FIRST + LOOKS && !self.is_asked()
    }

    /// How long it may carry nothing.
    pub fn idle_time(&self) -> Duration {
        self.watch.idle_time()
    }
}

impl Activity {
    fn tick(&self) {
        let missed = self.missed.get().saturating_add(1);
        self.missed.set(missed);
        if missed < FIRST {
            return;
        }
        if missed == FIRST {
            self.unacked.set(None);
        }
        let is_delivered = self.unacked.get() == Some([0, 0]);
        if !is_delivered {
            self.asked.set(true);
        }
        if (!is_delivered || missed >= FIRST + LOOKS)
            && let Some(waker) = self.waker.get()
        {
            waker.wake_by_ref();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;
    use std::task::Poll;

    use tokio::task::{LocalSet, spawn_local};
    use tokio::time::{Instant, advance};

    use super::*;

    const TIME: Duration = Duration::from_secs(60);

    async fn quiet(idle_guard: &IdleGuard) {
        quiet_with(idle_guard, || [7, 0]).await;
    }

    /// Waits until it is quiet, as a connection does; `unacked` is what it tells.
    async fn quiet_with(idle_guard: &IdleGuard, unacked: impl Fn() -> [usize; 2]) {
        poll_fn(|cx| {
            idle_guard.register(cx.waker());
            if idle_guard.is_asked() {
                idle_guard.report_unacked(unacked());
            }
            if idle_guard.is_idle() { Poll::Ready(()) } else { Poll::Pending }
        })
        .await;
    }

    async fn watching<T>(test: impl AsyncFnOnce(Rc<IdleSweeper>) -> T) -> T {
        let watch = Rc::new(IdleSweeper::new(TIME));
        let looking = Rc::clone(&watch);
        let set = LocalSet::new();
        set.run_until(async move {
            spawn_local(looking.run());
            test(watch).await
        })
        .await
    }

    #[tokio::test(start_paused = true)]
    async fn the_quiet_are_found_in_time() {
        watching(async |watch| {
            // At whatever moment between two looks it begins.
            let _other = watch.join();
            for late in 0..20 {
                sleep(TIME / 7 * late).await;
                let idle_guard = watch.join();
                let start = Instant::now();
                quiet(&idle_guard).await;
                let took = start.elapsed();
                assert!(took >= TIME * 5 / 4 && took <= TIME * 3 / 2 + INTERVAL_MIN, "{took:?}");
            }
        })
        .await;
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_being_received_is_not_quiet() {
        watching(async |watch| {
            let idle_guard = watch.join();
            let start = Instant::now();
            // Its peer takes a byte in nine tenths of the time, and then no more.
            let unacked = || 20_usize.saturating_sub((start.elapsed().as_secs() / 54) as usize);
            quiet_with(&idle_guard, || [0, unacked()]).await;
            let took = start.elapsed() - TIME * 18;
            assert!(took >= TIME && took <= TIME * 2, "{took:?}");
        })
        .await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_loop_that_is_late_makes_nobody_quiet_earlier() {
        watching(async |watch| {
            let idle_guard = watch.join();
            let start = Instant::now();
            for _ in 0..3 {
                // All is held up, and then goes on without a pause.
                advance(TIME * 2 / 5).await;
                tokio::task::yield_now().await;
            }
            quiet(&idle_guard).await;
            assert!(start.elapsed() >= TIME * 3 / 2, "{:?}", start.elapsed());
        })
        .await;
    }

    #[tokio::test(start_paused = true)]
    async fn the_busy_are_let_alone() {
        watching(async |watch| {
            let idle_guard = watch.join();
            for _ in 0..50 {
                sleep(TIME * 9 / 10).await;
                assert!(!idle_guard.is_idle());
                idle_guard.touch();
            }
        })
        .await;
    }

    #[tokio::test(start_paused = true)]
    async fn when_all_have_left_it_begins_anew() {
        watching(async |watch| {
            let all: Vec<_> = (0..10).map(|_| watch.join()).collect();
            let start = Instant::now();
            for idle_guard in &all {
                quiet(idle_guard).await;
            }
            assert!(start.elapsed() <= TIME * 16 / 10);
            drop(all);
            assert!(watch.idle_guard.is_empty());
            sleep(TIME * 3).await;
            let idle_guard = watch.join();
            let start = Instant::now();
            quiet(&idle_guard).await;
            assert!(start.elapsed() >= TIME && start.elapsed() <= TIME * 16 / 10);
        })
        .await;
    }
}
