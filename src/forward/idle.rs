//! Connections that carry nothing for too long: `--connection-idle-time=`.
//!
//! A connection that delivers bytes says so by one store into memory of its own. On each event loop
//! one timer looks at all connections, four times in the idle time, and counts the looks since they
//! said so: a busy one costs nothing a message.
//!
//! Delivered is what a socket took; its peer may be receiving it yet, slowly. So who has delivered
//! nothing from one look to the next is woken, and tells what is still under way; where that
//! becomes less from look to look, bytes are carried. (As far as the kernel tells: what a TCP peer
//! has acknowledged, which its window may hold up, and whole buffers of a Unix socket.) It is compared over four looks, which is the
//! idle time, from the second on: a quiet connection is found between one and a quarter and one and a
//! half.

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
    watched: Rc<Registry<Activity>>,
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
    under_way: Cell<Option<[usize; 2]>>,
    /// Whom to wake.
    waker: OnceCell<Waker>,
}

impl IdleSweeper {
    /// For connections that may carry nothing for `idle_time`.
    pub fn new(idle_time: Duration) -> Self {
        Self { idle_time, watched: Rc::default(), begun: Notify::default() }
    }

    /// How long each may carry nothing.
    pub fn idle_time(&self) -> Duration {
        self.idle_time
    }

    /// Looks after one more, from now on.
    pub fn join(self: &Rc<Self>) -> IdleGuard {
        if self.watched.is_empty() {
            self.begun.notify_one();
        }
        IdleGuard { pulse: self.watched.join(Activity::default()), watch: Rc::clone(self) }
    }

    /// Looks at all of them, for ever; to be run once.
    pub async fn look(self: Rc<Self>) -> Infallible {
        let interval = (self.idle_time / u32::from(LOOKS)).max(INTERVAL_MIN);
        loop {
            if self.watched.is_empty() {
                self.begun.notified().await;
            }
            // From now, however late this look was: the next would be too early for all.
            sleep(interval).await;
            self.watched.for_each(Activity::miss);
        }
    }
}

impl IdleGuard {
    /// Names the task that waits for it, once: a connection stays with its task.
    pub fn register(&self, waker: &Waker) {
        let _ = self.pulse.waker.set(waker.clone());
    }

    /// Bytes were delivered.
    pub fn beat(&self) {
        self.pulse.missed.set(0);
    }

    /// Whether to tell what is under way, with [`IdleGuard::tell`].
    pub fn is_asked(&self) -> bool {
        self.pulse.asked.get()
    }

    /// Bytes that each side's socket has taken and its peer has not.
    pub fn tell(&self, under_way: [usize; 2]) {
        self.pulse.asked.set(false);
        let before = self.pulse.under_way.replace(Some(under_way));
        let becomes_less =
            |before: [usize; 2]| under_way.iter().zip(before).any(|(now, before)| *now < before);
        if before.is_some_and(becomes_less) {
            self.beat();
        }
    }

    /// Whether nothing was carried for the idle time.
    pub fn is_quiet(&self) -> bool {
        self.pulse.missed.get() >= FIRST + LOOKS && !self.is_asked()
    }

    /// How long it may carry nothing.
    pub fn idle_time(&self) -> Duration {
        self.watch.idle_time()
    }
}

impl Activity {
    fn miss(&self) {
        let missed = self.missed.get().saturating_add(1);
        self.missed.set(missed);
        if missed < FIRST {
            return;
        }
        if missed == FIRST {
            self.under_way.set(None);
        }
        let is_told = self.under_way.get() == Some([0, 0]);
        if !is_told {
            self.asked.set(true);
        }
        if (!is_told || missed >= FIRST + LOOKS)
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

    async fn quiet(watched: &IdleGuard) {
        quiet_with(watched, || [7, 0]).await;
    }

    /// Waits until it is quiet, as a connection does; `under_way` is what it tells.
    async fn quiet_with(watched: &IdleGuard, under_way: impl Fn() -> [usize; 2]) {
        poll_fn(|cx| {
            watched.register(cx.waker());
            if watched.is_asked() {
                watched.tell(under_way());
            }
            if watched.is_quiet() { Poll::Ready(()) } else { Poll::Pending }
        })
        .await;
    }

    async fn watching<T>(test: impl AsyncFnOnce(Rc<IdleSweeper>) -> T) -> T {
        let watch = Rc::new(IdleSweeper::new(TIME));
        let looking = Rc::clone(&watch);
        let set = LocalSet::new();
        set.run_until(async move {
            spawn_local(looking.look());
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
                let watched = watch.join();
                let start = Instant::now();
                quiet(&watched).await;
                let took = start.elapsed();
                assert!(took >= TIME * 5 / 4 && took <= TIME * 3 / 2 + INTERVAL_MIN, "{took:?}");
            }
        })
        .await;
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_being_received_is_not_quiet() {
        watching(async |watch| {
            let watched = watch.join();
            let start = Instant::now();
            // Its peer takes a byte in nine tenths of the time, and then no more.
            let under_way = || 20_usize.saturating_sub((start.elapsed().as_secs() / 54) as usize);
            quiet_with(&watched, || [0, under_way()]).await;
            let took = start.elapsed() - TIME * 18;
            assert!(took >= TIME && took <= TIME * 2, "{took:?}");
        })
        .await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_loop_that_is_late_makes_nobody_quiet_earlier() {
        watching(async |watch| {
            let watched = watch.join();
            let start = Instant::now();
            for _ in 0..3 {
                // All is held up, and then goes on without a pause.
                advance(TIME * 2 / 5).await;
                tokio::task::yield_now().await;
            }
            quiet(&watched).await;
            assert!(start.elapsed() >= TIME * 3 / 2, "{:?}", start.elapsed());
        })
        .await;
    }

    #[tokio::test(start_paused = true)]
    async fn the_busy_are_let_alone() {
        watching(async |watch| {
            let watched = watch.join();
            for _ in 0..50 {
                sleep(TIME * 9 / 10).await;
                assert!(!watched.is_quiet());
                watched.beat();
            }
        })
        .await;
    }

    #[tokio::test(start_paused = true)]
    async fn when_all_have_left_it_begins_anew() {
        watching(async |watch| {
            let all: Vec<_> = (0..10).map(|_| watch.join()).collect();
            let start = Instant::now();
            for watched in &all {
                quiet(watched).await;
            }
            assert!(start.elapsed() <= TIME * 16 / 10);
            drop(all);
            assert!(watch.watched.is_empty());
            sleep(TIME * 3).await;
            let watched = watch.join();
            let start = Instant::now();
            quiet(&watched).await;
            assert!(start.elapsed() >= TIME && start.elapsed() <= TIME * 16 / 10);
        })
        .await;
    }
}
