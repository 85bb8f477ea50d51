//! Connections that carry nothing for too long: `--connection-idle-time=`.
//!
//! A connection that delivers bytes says so by one store into memory of its own. Four times in the
//! idle time one timer an event loop looks at all of them and counts the looks since then, so that a
//! quiet connection is found between one idle time and one and a quarter, and a busy one costs
//! nothing a message.

#![forbid(unsafe_code)]

use std::cell::{Cell, OnceCell, RefCell};
use std::convert::Infallible;
use std::rc::Rc;
use std::task::Waker;
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::{Instant, sleep_until};

/// Looks in an idle time. Bytes that came just before a look make it a quarter short; so it is the
/// one after these that counts.
const LOOKS: u8 = 4;

/// tokio's timers tell no shorter times apart.
const INTERVAL_MIN: Duration = Duration::from_millis(1);

/// Looks after the connections of one event loop.
#[derive(Debug)]
pub struct Watch {
    interval: Duration,
    watched: RefCell<Vec<Rc<Pulse>>>,
    /// The first connection has come.
    begun: Notify,
}

/// A connection that is looked after until this is dropped.
#[derive(Debug)]
pub struct Watched {
    pulse: Rc<Pulse>,
    watch: Rc<Watch>,
}

#[derive(Debug)]
struct Pulse {
    /// Looks since bytes were delivered, the first that came after them included.
    missed: Cell<u8>,
    /// Where it stands among all.
    index: Cell<usize>,
    /// Whom to wake when it is quiet.
    waker: OnceCell<Waker>,
}

impl Watch {
    /// For connections that may carry nothing for `idle_time`.
    pub fn new(idle_time: Duration) -> Self {
        Self {
            interval: (idle_time / u32::from(LOOKS)).max(INTERVAL_MIN),
            watched: RefCell::default(),
            begun: Notify::default(),
        }
    }

    /// Looks after one more, from now on.
    pub fn join(self: &Rc<Self>) -> Watched {
        let mut watched = self.watched.borrow_mut();
        if watched.is_empty() {
            self.begun.notify_one();
        }
        let pulse = Rc::new(Pulse {
            missed: Cell::default(),
            index: Cell::new(watched.len()),
            waker: OnceCell::default(),
        });
        watched.push(Rc::clone(&pulse));
        Watched { pulse, watch: Rc::clone(self) }
    }

    /// Looks at all of them, for ever; to be run once.
    pub async fn look(self: Rc<Self>) -> Infallible {
        let mut next = Instant::now();
        loop {
            if self.watched.borrow().is_empty() {
                self.begun.notified().await;
            }
            // A look that comes late is not made up for: it would be too early for all.
            next = (next + self.interval).max(Instant::now());
            sleep_until(next).await;
            for pulse in self.watched.borrow().iter() {
                pulse.miss();
            }
        }
    }
}

impl Watched {
    /// Names the task that waits for it.
    pub fn wake(&self, waker: &Waker) {
        let _ = self.pulse.waker.set(waker.clone());
    }

    /// Bytes were delivered.
    pub fn beat(&self) {
        self.pulse.missed.set(0);
    }

    /// Whether nothing was delivered for the idle time.
    pub fn is_quiet(&self) -> bool {
        self.pulse.missed.get() > LOOKS
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        let index = self.pulse.index.get();
        let mut watched = self.watch.watched.borrow_mut();
        watched.swap_remove(index);
        if let Some(moved) = watched.get(index) {
            moved.index.set(index);
        }
    }
}

impl Pulse {
    fn miss(&self) {
        self.missed.set(self.missed.get().saturating_add(1));
        if self.missed.get() == LOOKS + 1
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
    use tokio::time::sleep;

    use super::*;

    const TIME: Duration = Duration::from_secs(60);

    async fn quiet(watched: &Watched) {
        poll_fn(|cx| {
            watched.wake(cx.waker());
            if watched.is_quiet() { Poll::Ready(()) } else { Poll::Pending }
        })
        .await;
    }

    async fn watching<T>(test: impl AsyncFnOnce(Rc<Watch>) -> T) -> T {
        let watch = Rc::new(Watch::new(TIME));
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
                assert!(took >= TIME && took <= TIME * 13 / 10, "{took:?}");
            }
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
    async fn who_leaves_takes_nobody_along() {
        watching(async |watch| {
            let mut all: Vec<_> = (0..10).map(|_| watch.join()).collect();
            for index in [4, 0, 7, 0, 3] {
                all.remove(index);
                for (place, pulse) in watch.watched.borrow().iter().enumerate() {
                    assert_eq!(pulse.index.get(), place);
                }
            }
            let start = Instant::now();
            for watched in &all {
                quiet(watched).await;
            }
            assert!(start.elapsed() <= TIME * 13 / 10);
            drop(all);
            assert!(watch.watched.borrow().is_empty());
            // And it begins anew.
            sleep(TIME * 3).await;
            let watched = watch.join();
            let start = Instant::now();
            quiet(&watched).await;
            assert!(start.elapsed() >= TIME && start.elapsed() <= TIME * 13 / 10);
        })
        .await;
    }
}
