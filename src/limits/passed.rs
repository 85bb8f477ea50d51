//! Room for the descriptors that Unix peers pass to each other through the proxy.
//!
//! Most are sent on in the turn in which they were received. Those that their receiver does not
//! take at once wait in the proxy. All take room until they are closed. The room is reserved beside
//! that of connections ([`descriptors`](crate::limits::descriptors)), so no new connection uses it
//! up.

use std::mem;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{SendError, Sender, channel};
use std::sync::{Arc, OnceLock};
use std::thread;

use prometheus_client::metrics::counter::Counter;
use tokio::sync::Notify;

use crate::socket::PASSED_MAX;

/// How many descriptors may be open to be passed on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PassedLimits {
    /// Of one message.
    pub message: usize,
    /// Of all messages together.
    pub all: usize,
    /// Event loops.
    pub threads: usize,
}

impl PassedLimits {
    /// Returns the limits of a process with `limit` descriptors and so many event loops: a quarter
    /// of the descriptors, and at most four of the longest messages for each event loop.
    pub fn new(limit: usize, threads: usize) -> Self {
        let (quarter, most) = (limit / 4, 4 * PASSED_MAX * threads);
        Self { message: quarter.min(PASSED_MAX), all: quarter.min(most), threads }
    }
}

/// The room, shared by its clones.
#[derive(Clone, Debug)]
pub struct PassedRoom {
    pub limits: PassedLimits,
    taken: Arc<Taken>,
    /// The thread that closes them, once it is needed.
    closer: Arc<OnceLock<Sender<Vec<OwnedFd>>>>,
    /// From so many taken on, a message more on each event loop would not leave half of the room.
    scarce_from: usize,
    /// Messages whose descriptors were closed, because their receiver is not a Unix socket.
    pub dropped: Counter,
}

/// The room that is taken.
#[derive(Debug, Default)]
struct Taken {
    descriptors: AtomicUsize,
    freed: Notify,
}

impl Taken {
    /// Closes descriptors, and returns their room.
    fn close(&self, fds: Vec<OwnedFd>) {
        let count = fds.len();
        drop(fds);
        self.descriptors.fetch_sub(count, Ordering::Relaxed);
        self.freed.notify_waiters();
    }
}

impl PassedRoom {
    pub fn new(limits: PassedLimits) -> Self {
        let PassedLimits { message, all, threads } = limits;
        let scarce_from = (all / 2 + 1).saturating_sub(message * threads);
        Self {
            limits,
            taken: Arc::default(),
            closer: Arc::default(),
            scarce_from,
            dropped: Counter::default(),
        }
    }

    /// Whether half of the room may be taken. Otherwise each event loop can receive a message
    /// without taking room for it first.
    pub fn is_scarce(&self) -> bool {
        self.taken.descriptors.load(Ordering::Relaxed) >= self.scarce_from
    }

    /// Waits until descriptors are closed, from this call on.
    pub fn freed(&self) -> impl Future<Output = ()> {
        self.taken.freed.notified()
    }

    /// Takes room for one message, if there is so much.
    pub fn take(&self) -> Option<MessageRoom<'_>> {
        let message = self.limits.message;
        let before = self.taken.descriptors.fetch_add(message, Ordering::Relaxed);
        // Otherwise dropping it returns the room.
        let room = MessageRoom(self);
        (before + message <= self.limits.all).then_some(room)
    }

    /// Counts a message whose descriptors the kernel has closed.
    pub fn drop_message(&self) {
        if self.dropped.inc() == 0 {
            tracing::warn!(
                "A Unix peer has passed descriptors, and the other side is not a Unix socket, \
                 closing them. (This is logged once.)"
            );
        }
    }

    /// Counts descriptors that were received.
    pub fn hold(&self, fds: Vec<OwnedFd>) -> PassedFds {
        self.taken.descriptors.fetch_add(fds.len(), Ordering::Relaxed);
        PassedFds { fds, room: self.clone() }
    }

    /// Closes descriptors on a thread of its own, and returns their room.
    fn close(&self, fds: Vec<OwnedFd>) {
        let unsent = match self.closer() {
            Some(closer) => closer.send(fds).err().map(|SendError(fds)| fds),
            None => Some(fds),
        };
        if let Some(fds) = unsent {
            self.taken.close(fds);
        }
    }

    /// Returns the way to the thread, which is started now if it does not run yet; `None` while the
    /// system refuses one.
    fn closer(&self) -> Option<&Sender<Vec<OwnedFd>>> {
        if self.closer.get().is_none() {
            let ((sender, receiver), taken) = (channel(), Arc::clone(&self.taken));
            let close_all = move || receiver.into_iter().for_each(|fds| taken.close(fds));
            thread::Builder::new().name("proxyd-closer".into()).spawn(close_all).ok()?;
            // A thread that loses a race ends: its channel is closed.
            let _ = self.closer.set(sender);
        }
        self.closer.get()
    }
}

/// Descriptors that a peer has passed. They take room until they are closed.
///
/// Dropping this never waits. close(2) may: a file system in user space (FUSE) answers when it
/// likes, and SO_LINGER makes a socket wait for its peer.
#[derive(Debug)]
pub struct PassedFds {
    fds: Vec<OwnedFd>,
    room: PassedRoom,
}

impl PassedFds {
    /// Returns the descriptors in their order.
    pub fn as_fds(&self) -> Vec<BorrowedFd<'_>> {
        self.fds.iter().map(AsFd::as_fd).collect()
    }
}

impl Drop for PassedFds {
    fn drop(&mut self) {
        if !self.fds.is_empty() {
            self.room.close(mem::take(&mut self.fds));
        }
    }
}

/// Room for the descriptors of one message, until this is dropped.
#[derive(Debug)]
pub struct MessageRoom<'a>(&'a PassedRoom);

impl Drop for MessageRoom<'_> {
    fn drop(&mut self) {
        let Self(room) = self;
        room.taken.descriptors.fetch_sub(room.limits.message, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quarter_of_the_descriptors_can_be_passed_on() {
        let limits = |limit, threads| {
            let PassedLimits { message, all, .. } = PassedLimits::new(limit, threads);
            (message, all)
        };
        assert_eq!(limits(64, 1), (16, 16));
        assert_eq!(limits(20_000, 1), (253, 1012));
        assert_eq!(limits(20_000, 4), (253, 4048));
    }

    #[test]
    fn what_waits_takes_room_until_it_is_sent() {
        let room = PassedRoom::new(PassedLimits { message: 16, all: 40, threads: 1 });
        assert!(!room.is_scarce());
        let first = room.take().unwrap();
        let fds = |count| (0..count).map(|_| tempfile::tempfile().unwrap().into()).collect();
        let waiting = room.hold(fds(10));
        assert_eq!(room.taken.descriptors.load(Ordering::Relaxed), 26);
        drop(first);
        assert!(room.is_scarce());
        drop(room.take().unwrap());
        let more = room.hold(fds(15));
        assert!(room.take().is_none());
        assert_eq!(room.taken.descriptors.load(Ordering::Relaxed), 25);
        drop((waiting, more));
        while room.taken.descriptors.load(Ordering::Relaxed) > 0 {
            thread::yield_now();
        }
    }
}
