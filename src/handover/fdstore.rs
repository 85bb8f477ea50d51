//! systemd's file descriptor store (`FDSTORE=1` in sd_notify(3)): systemd keeps these descriptors
//! while the service does not run, and passes them to the next process beside the sockets.
//!
//! systemd compares each new descriptor with every stored one, so the proxy stores only two: the
//! ends of one [`Queue`], under names of their own.

use std::os::fd::AsFd;
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::RecvFlags;
use rustix::pipe::{PipeFlags, pipe_with};
use sd_notify::NotifyState;
use tokio::io::Interest;
use tokio::time::timeout;

use crate::handover::queue::Queue;
use crate::listen::activation::{PassedFd, take_matching};
use crate::logging::message_id;
use crate::notify::Notifier;
use crate::socket::sys::register;

/// Names that no socket unit has: by default a socket has the name of its unit.
const READER: &str = "handover-of-socket-proxyd.queue";
const WRITER: &str = "handover-of-socket-proxyd.sender";
const PROBE: &str = "handover-of-socket-proxyd.probe";

/// How long systemd may take to answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

/// Takes the descriptors of the store out of all that systemd passed, by their names.
pub fn take_stored(passed: &mut Vec<PassedFd>) -> Vec<PassedFd> {
    take_matching(passed, |it| [READER, WRITER, PROBE].contains(&&*it.name))
}

/// Returns the stored queue. What is not part of one is closed, and systemd closes it too.
pub async fn stored_queue(mut stored: Vec<PassedFd>, notifier: &Notifier) -> Option<Queue> {
    // A process that was killed while keep() ran left the probe.
    if !take_matching(&mut stored, |it| it.name == PROBE).is_empty() {
        remove(PROBE, notifier).await;
    }
    let mut take = |name| {
        let index = stored.iter().position(|it| it.name == name)?;
        Some(stored.remove(index).fd)
    };
    let ends = take(READER).zip(take(WRITER));
    let queue = ends.and_then(|(reader, writer)| Queue::from_ends(reader, writer));
    if queue.is_some() && stored.is_empty() {
        return queue;
    }
    tracing::warn!(
        message_id = message_id::HANDOVER_LOST,
        "Failed to read the descriptor store: it is damaged. (The connections in it are closed.)"
    );
    discard(stored, notifier).await;
    // discard() removed the queue too: it has the same names.
    let queue = queue?;
    keep(&queue, notifier).await.is_ok().then_some(queue)
}

/// Closes the descriptors of the store, here and in the store.
pub async fn discard(stored: Vec<PassedFd>, notifier: &Notifier) {
    // The contents are closed now, and not when systemd gets to it: stored listeners would still
    // hold their addresses.
    for queue in stored.iter().filter(|it| it.name == READER) {
        while let Ok((_, 1..)) = rustix::net::recv(&queue.fd, &mut [0; 1], RecvFlags::DONTWAIT) {}
    }
    for name in [READER, WRITER, PROBE] {
        remove(name, notifier).await;
    }
}

/// Removes the descriptors of this name from the store.
pub async fn remove(name: &str, notifier: &Notifier) {
    let name = format!("FDNAME={name}");
    let states = [NotifyState::Custom("FDSTOREREMOVE=1"), NotifyState::Custom(&name)];
    notifier.send(&states).await;
}

/// Stores a queue.
///
/// # Errors
/// Why systemd does not keep it.
pub async fn keep(queue: &Queue, notifier: &Notifier) -> Result<(), &'static str> {
    if !notifier.has_manager() {
        return Err("there is no NOTIFY_SOCKET. (Set Type=notify and FileDescriptorStoreMax=4.)");
    }
    // systemd never says whether it keeps a descriptor. It keeps as many as FileDescriptorStoreMax=
    // allows, in the order in which they come, and closes the others. So where it keeps the third,
    // the probe, it has kept the two before.
    let flags = PipeFlags::CLOEXEC | PipeFlags::NONBLOCK;
    let failed = |_| "there are no file descriptors left. (Raise LimitNOFILE=.)";
    let (probe, entry) = pipe_with(flags).map_err(failed)?;
    let [reader, writer] = queue.ends();
    for (name, fd) in [(READER, reader), (WRITER, writer), (PROBE, entry.as_fd())] {
        let name = format!("FDNAME={name}");
        let states = ["FDSTORE=1", "FDPOLL=0", &name].map(NotifyState::Custom);
        notifier.send_with(&states, &[fd]).await;
    }
    drop(entry);
    let (answer, asked) = pipe_with(flags).map_err(failed)?;
    // systemd closes this when it has handled the messages before (BARRIER=1 in sd_notify(3)).
    notifier.send_with(&[NotifyState::Custom("BARRIER=1")], &[asked.as_fd()]).await;
    drop(asked);
    let answer = register(answer, Interest::READABLE)
        .map_err(|_| "there is no way to wait for the answer.")?;
    let answers = timeout(ANSWER_TIMEOUT, answer.readable()).await.is_ok();
    let is_kept = rustix::io::read(&probe, &mut [0; 1]) == Err(Errno::AGAIN);
    remove(PROBE, notifier).await;
    if answers && is_kept {
        return Ok(());
    }
    // systemd may have kept one of them, or may still be reading the messages.
    remove(READER, notifier).await;
    remove(WRITER, notifier).await;
    Err(if answers {
        "systemd keeps no descriptors. (Set FileDescriptorStoreMax=4.)"
    } else {
        "systemd has not answered within 5 seconds. (See NotifyAccess=, and restart the service.)"
    })
}

#[cfg(test)]
mod tests {
    use std::os::fd::BorrowedFd;

    use super::*;

    #[tokio::test]
    async fn what_is_discarded_is_closed_at_once() {
        let notifier = Notifier::none();
        let stored = |name: &str, fd: BorrowedFd<'_>| PassedFd {
            fd: fd.try_clone_to_owned().unwrap(),
            name: name.into(),
        };
        let queue = Queue::new().unwrap();
        (0..3).for_each(|_| queue.append(b"x", &[]).unwrap());
        let [reader, writer] = queue.ends();
        discard(vec![stored(READER, reader), stored(WRITER, writer)], &notifier).await;
        assert!(queue.payloads().unwrap().is_empty());
        // A reader alone, as a kill during keep() may leave it. (A wrong loop never ends here.)
        let alone = vec![stored(READER, reader)];
        drop(queue);
        discard(alone, &notifier).await;
    }
}
