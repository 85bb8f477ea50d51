//! systemd's file descriptor store (`FDSTORE=1` in sd_notify(3)): what it keeps while there is no
//! process, and gives to the next one beside the sockets.
//!
//! systemd compares each descriptor that it is given with every other it has, so there are only
//! two: the ends of one [`Queue`], under names of their own.

use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::RecvFlags;
use rustix::pipe::{PipeFlags, pipe_with};
use sd_notify::NotifyState;
use tokio::io::Interest;
use tokio::time::timeout;

use crate::handover::queue::Queue;
use crate::listen::activation::{PassedFd, take_matching};
use crate::notify::Notifier;
use crate::socket::sys::register;

/// Names that no socket unit has: systemd's default is the unit's own.
const QUEUE: &str = "handover-of-socket-proxyd.queue";
const SENDER: &str = "handover-of-socket-proxyd.sender";
const PROBE: &str = "handover-of-socket-proxyd.probe";

/// How long systemd has to answer.
const ANSWER: Duration = Duration::from_secs(5);

/// What came back from the store.
#[derive(Debug, Default)]
pub struct StoredFds {
    stored: Vec<PassedFd>,
}

impl StoredFds {
    /// Takes what has one of our names out of what was passed.
    pub fn take(inherited: &mut Vec<PassedFd>) -> Self {
        let is_ours = |it: &PassedFd| [QUEUE, SENDER, PROBE].contains(&&*it.name);
        Self { stored: take_matching(inherited, is_ours) }
    }

    /// Whether there was nothing.
    pub fn is_empty(&self) -> bool {
        self.stored.is_empty()
    }

    /// The queue that was kept. Whatever is not one is closed, and systemd is told to do the same.
    pub async fn into_queue(mut self, notifier: &Notifier) -> Option<Queue> {
        // Left by a process that did not come to take it out.
        if !take_matching(&mut self.stored, |it| it.name == PROBE).is_empty() {
            remove(PROBE, notifier).await;
        }
        let mut take = |name| {
            let index = self.stored.iter().position(|it| it.name == name)?;
            Some(self.stored.remove(index).fd)
        };
        let ends = take(QUEUE).zip(take(SENDER));
        let queue = ends.and_then(|(inner, sender)| Queue::of(inner, sender));
        if queue.is_some() && self.stored.is_empty() {
            return queue;
        }
        tracing::warn!("The store is damaged, closing it, and the connections in it.");
        self.discard(notifier).await;
        // Under the names of what was closed it stood as well.
        match queue {
            Some(queue) => keep(&queue, notifier).await.is_ok().then_some(queue),
            None => None,
        }
    }

    /// Closes all of it, here and in the store.
    pub async fn discard(self, notifier: &Notifier) {
        // What is in the queue now, and not when systemd comes to it: listeners would be in the way.
        for queue in self.stored.iter().filter(|it| it.name == QUEUE) {
            while rustix::net::recv(&queue.fd, &mut [0; 1], RecvFlags::DONTWAIT)
                .is_ok_and(|it| it.1 > 0)
            {}
        }
        for name in [QUEUE, SENDER, PROBE] {
            remove(name, notifier).await;
        }
    }
}

/// Has systemd close what it keeps under this name.
pub async fn remove(name: &str, notifier: &Notifier) {
    let name = format!("FDNAME={name}");
    let states = [NotifyState::Custom("FDSTOREREMOVE=1"), NotifyState::Custom(&name)];
    notifier.send(&states).await;
}

/// Has systemd keep a queue.
///
/// # Errors
/// Why it does not, in words.
pub async fn keep(queue: &Queue, notifier: &Notifier) -> Result<(), &'static str> {
    if !notifier.has_manager() {
        return Err("there is no NOTIFY_SOCKET; set Type=notify and FileDescriptorStoreMax=4");
    }
    // It never says whether it keeps what it is given, and closes what it does not. It keeps as many
    // as there is room for, in the order in which they come; so where it keeps the third, it has kept
    // the two before it.
    let flags = PipeFlags::CLOEXEC | PipeFlags::NONBLOCK;
    let failed = |_| "there are no descriptors left";
    let (probe, entry) = pipe_with(flags).map_err(failed)?;
    let [inner, sender] = queue.ends();
    for (name, fd) in [(QUEUE, inner), (SENDER, sender), (PROBE, entry.as_fd())] {
        put(name, fd, notifier).await;
    }
    drop(entry);
    let (answer, asked) = pipe_with(flags).map_err(failed)?;
    // It closes this when it has come to it (BARRIER=1 in sd_notify(3)).
    notifier.send_with(&[NotifyState::Custom("BARRIER=1")], &[asked.as_fd()]).await;
    drop(asked);
    let answer = register(answer, Interest::READABLE).map_err(|_| "it can't be waited for")?;
    let answers = timeout(ANSWER, answer.readable()).await.is_ok();
    let is_kept = rustix::io::read(&probe, &mut [0; 1]) == Err(Errno::AGAIN);
    remove(PROBE, notifier).await;
    if answers && is_kept {
        return Ok(());
    }
    // As it comes to it, or where only one of them was kept.
    remove(QUEUE, notifier).await;
    remove(SENDER, notifier).await;
    Err(if answers {
        "systemd does not keep what it is given; set FileDescriptorStoreMax=4"
    } else {
        "systemd has not answered within 5 seconds; see NotifyAccess= and restart to try again"
    })
}

async fn put(name: &str, fd: BorrowedFd<'_>, notifier: &Notifier) {
    let name = format!("FDNAME={name}");
    let states = ["FDSTORE=1", "FDPOLL=0", &name].map(NotifyState::Custom);
    notifier.send_with(&states, &[fd]).await;
}
