//! The connections of one event loop: each can be asked to detach, to report its progress or, if it
//! is passive, to end, and is visited by the idle sweep.

use std::cell::{Cell, OnceCell, RefCell};
use std::future::poll_fn;
use std::rc::Rc;
use std::task::{Poll, Waker};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::sleep;

use crate::forward::idle::Activity;

/// The connections of one event loop, and what they are asked for.
#[derive(Debug, Default)]
pub struct Registry {
    /// `--connection-idle-time=`.
    idle_time: Option<Duration>,
    entries: RefCell<Vec<Rc<Entry>>>,
    detach: Cell<bool>,
    /// The number of requests for reports so far.
    reports: Cell<u32>,
    /// The first connection was registered.
    occupied: Notify,
    /// The last connection was deregistered.
    vacated: Notify,
}

/// A connection's entry. The connection is deregistered when this is dropped.
#[derive(Debug)]
pub struct Registration {
    entry: Rc<Entry>,
    registry: Rc<Registry>,
}

#[derive(Debug)]
struct Entry {
    /// Its index among the entries.
    index: Cell<usize>,
    /// The connection's task.
    waker: OnceCell<Waker>,
    /// The number of requests when it last reported.
    reported: Cell<u32>,
    /// Whether the connection does not count as in use.
    is_passive: bool,
    activity: Activity,
}

impl Registry {
    /// Creates a registry of connections that end when they are idle for `idle_time`.
    pub fn new(idle_time: Option<Duration>) -> Self {
        Self { idle_time, ..Self::default() }
    }

    /// Returns how long a connection may be idle.
    pub fn idle_time(&self) -> Option<Duration> {
        self.idle_time
    }

    /// Registers a connection. One that `is_passive` does not count as in use.
    pub fn register(self: &Rc<Self>, is_passive: bool) -> Registration {
        let mut entries = self.entries.borrow_mut();
        if entries.is_empty() {
            self.occupied.notify_one();
        }
        let entry = Rc::new(Entry {
            index: Cell::new(entries.len()),
            waker: OnceCell::new(),
            reported: self.reports.clone(),
            is_passive,
            activity: Activity::default(),
        });
        entries.push(Rc::clone(&entry));
        Registration { entry, registry: Rc::clone(self) }
    }

    /// Asks all connections to detach, and waits until the last one is deregistered.
    pub async fn detach_all(&self) {
        self.detach.set(true);
        self.wake_if(|_| true);
        while !self.is_empty() {
            self.vacated.notified().await;
        }
    }

    /// Asks all connections to report their progress.
    pub fn request_reports(&self) {
        self.reports.set(self.reports.get().wrapping_add(1));
        self.wake_if(|_| true);
    }

    /// Asks the passive connections to end by a reset.
    pub fn reset_passive(&self) {
        self.wake_if(|entry| {
            if entry.is_passive {
                entry.activity.expire();
            }
            entry.is_passive
        });
    }

    /// Visits the connections for as long as the event loop lives. Those that are idle are woken,
    /// and close.
    pub async fn sweep(self: Rc<Self>) {
        let Some(idle_time) = self.idle_time else { return };
        loop {
            if self.is_empty() {
                self.occupied.notified().await;
            }
            // From now on, however late this visit was: the next one would be too early for all.
            sleep(Activity::visit_interval(idle_time)).await;
            self.wake_if(|entry| entry.activity.visit());
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.entries.borrow().is_empty()
    }

    /// Visits all connections, and wakes those for which `visit` returns `true`.
    fn wake_if(&self, visit: impl Fn(&Entry) -> bool) {
        for entry in &*self.entries.borrow() {
            if let (true, Some(waker)) = (visit(entry), entry.waker.get()) {
                waker.wake_by_ref();
            }
        }
    }
}

impl Registration {
    /// Stores the waker. Later calls change nothing: a connection stays with its task.
    pub fn set_waker(&self, waker: &Waker) {
        let _ = self.entry.waker.set(waker.clone());
    }

    pub fn idle_time(&self) -> Option<Duration> {
        self.registry.idle_time
    }

    pub fn is_detach_requested(&self) -> bool {
        self.registry.detach.get()
    }

    /// Whether the connection is asked to detach or to report.
    pub fn has_request(&self) -> bool {
        self.is_detach_requested() || self.is_report_requested()
    }

    /// Calls `report` once for each request.
    pub fn report_if_requested(&self, report: impl FnOnce()) {
        if self.is_report_requested() {
            self.entry.reported.set(self.registry.reports.get());
            report();
        }
    }

    /// Waits until the connection is asked to detach or, if it is passive, to end. Meanwhile it
    /// reports on request.
    pub async fn end_requested(&self, report: impl Fn()) -> EndRequest {
        poll_fn(|cx| {
            self.set_waker(cx.waker());
            self.report_if_requested(&report);
            if self.is_detach_requested() {
                Poll::Ready(EndRequest::Detach)
            } else if self.entry.activity.is_expired() {
                Poll::Ready(EndRequest::End)
            } else {
                Poll::Pending
            }
        })
        .await
    }

    pub(super) fn activity(&self) -> &Activity {
        &self.entry.activity
    }

    fn is_report_requested(&self) -> bool {
        self.entry.reported.get() != self.registry.reports.get()
    }
}

/// How a connection is asked to end on this event loop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EndRequest {
    Detach,
    /// To end by a reset.
    End,
}

impl Drop for Registration {
    /// Moves the last entry into the place of this one.
    fn drop(&mut self) {
        let index = self.entry.index.get();
        let mut entries = self.registry.entries.borrow_mut();
        entries.swap_remove(index);
        if let Some(moved) = entries.get(index) {
            moved.index.set(index);
        }
        if entries.is_empty() {
            self.registry.vacated.notify_one();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn deregistering_removes_only_that_entry() {
        let registry = Rc::new(Registry::default());
        let mut all: Vec<_> = (0..10).map(|_| registry.register(false)).collect();
        for index in [4, 0, 7, 0, 3] {
            drop(all.remove(index));
            let entries = registry.entries.borrow();
            assert_eq!(entries.len(), all.len());
            for registration in &all {
                let index = registration.entry.index.get();
                assert!(Rc::ptr_eq(&entries[index], &registration.entry));
            }
        }
        drop(all);
        assert!(registry.is_empty());
    }
}
