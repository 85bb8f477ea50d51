//! What the connections of one event loop are asked for: to detach, or to report their progress.

use std::cell::{Cell, OnceCell};
use std::future::poll_fn;
use std::rc::Rc;
use std::task::{Poll, Waker};

use tokio::sync::Notify;

use crate::forward::registry::{Registration, Registry};

/// The connections of one event loop, and what they were told.
#[derive(Debug, Default)]
pub struct Control {
    leave: Cell<bool>,
    /// How often they were asked how they are.
    asked: Cell<u32>,
    present: Rc<Registry<OnceCell<Waker>>>,
    last_left: Notify,
}

/// A connection that is there until it is told to leave, or this is dropped.
#[derive(Debug)]
pub struct ControlHandle {
    waker: Option<Registration<OnceCell<Waker>>>,
    orders: Rc<Control>,
    /// The last question that it has answered.
    answered: Cell<u32>,
}

impl Control {
    /// One more.
    pub fn join(self: &Rc<Self>) -> ControlHandle {
        let waker = Some(self.present.join(OnceCell::new()));
        ControlHandle { waker, orders: Rc::clone(self), answered: self.asked.clone() }
    }

    /// Tells all to leave, and waits until they have.
    pub async fn leave(&self) {
        self.leave.set(true);
        self.wake_all();
        while !self.present.is_empty() {
            self.last_left.notified().await;
        }
    }

    /// Asks all how they are.
    pub fn ask(&self) {
        self.asked.set(self.asked.get().wrapping_add(1));
        self.wake_all();
    }

    fn wake_all(&self) {
        self.present.for_each(|waker| {
            if let Some(waker) = waker.get() {
                waker.wake_by_ref();
            }
        });
    }
}

impl ControlHandle {
    /// Names the task that is to be woken, once: a connection stays with its task.
    pub fn register(&self, waker: &Waker) {
        if let Some(named) = &self.waker {
            let _ = named.set(waker.clone());
        }
    }

    /// Whether it is to leave.
    pub fn is_to_leave(&self) -> bool {
        self.orders.leave.get()
    }

    /// Whether it is asked how it is.
    pub fn is_asked(&self) -> bool {
        self.answered.get() != self.orders.asked.get()
    }

    /// Answers if it is asked, once each time.
    pub fn answer(&self, answer: impl FnOnce()) {
        if self.is_asked() {
            self.answered.set(self.orders.asked.get());
            answer();
        }
    }

    /// Waits until it is to leave, and answers meanwhile, in the task that is named by that.
    pub async fn detach_requested(&self, answer: impl Fn()) {
        poll_fn(|cx| {
            self.register(cx.waker());
            self.answer(&answer);
            if self.is_to_leave() { Poll::Ready(()) } else { Poll::Pending }
        })
        .await;
    }
}

impl Drop for ControlHandle {
    fn drop(&mut self) {
        self.waker = None;
        if self.orders.present.is_empty() {
            self.orders.last_left.notify_one();
        }
    }
}
