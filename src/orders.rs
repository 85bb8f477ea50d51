//! Leaving an event loop: its connections are told to.

#![forbid(unsafe_code)]

use std::cell::{Cell, OnceCell};
use std::future::poll_fn;
use std::rc::Rc;
use std::task::{Poll, Waker};

use tokio::sync::Notify;

use crate::roster::{Member, Roster};

/// The connections of one event loop.
#[derive(Debug, Default)]
pub struct Leave {
    told: Cell<bool>,
    staying: Rc<Roster<OnceCell<Waker>>>,
    last_left: Notify,
}

/// A connection that stays until it is told to leave, or this is dropped.
#[derive(Debug)]
pub struct Stay {
    member: Option<Member<OnceCell<Waker>>>,
    leave: Rc<Leave>,
}

impl Leave {
    /// One more.
    pub fn join(self: &Rc<Self>) -> Stay {
        Stay { member: Some(self.staying.join(OnceCell::new())), leave: Rc::clone(self) }
    }

    /// Tells all to leave, and waits until they have.
    pub async fn tell(&self) {
        self.told.set(true);
        self.staying.for_each(|waker| {
            if let Some(waker) = waker.get() {
                waker.wake_by_ref();
            }
        });
        while !self.staying.is_empty() {
            self.last_left.notified().await;
        }
    }
}

impl Stay {
    /// Names the task that is to be woken, once: a connection stays with its task.
    pub fn register(&self, waker: &Waker) {
        if let Some(member) = &self.member {
            let _ = member.set(waker.clone());
        }
    }

    /// Whether it is to leave.
    pub fn is_told(&self) -> bool {
        self.leave.told.get()
    }
}

/// Waits until it is to leave, in the task that is named by that; for ever if it never is.
pub async fn told(stay: Option<&Stay>) {
    poll_fn(|cx| {
        let Some(stay) = stay else { return Poll::Pending };
        stay.register(cx.waker());
        if stay.is_told() { Poll::Ready(()) } else { Poll::Pending }
    })
    .await;
}

impl Drop for Stay {
    fn drop(&mut self) {
        self.member = None;
        if self.leave.staying.is_empty() {
            self.leave.last_left.notify_one();
        }
    }
}
