//! `--handover=`: connections that outlive the process.
//!
//! With `restart` each connection is detached when the process is stopped: its sockets and its buffered
//! bytes go into the [`Queue`] that systemd keeps, and the next process takes them from there before it accepts
//! anything. With `crash` a connection is in the queue from accept on, and none of its bytes is ever in the
//! memory of the process; a [`Journal`] keeps the queue current.

pub mod replay;
pub mod journal;
mod fdstore;
pub mod record;
pub mod queue;

use std::collections::HashSet;
use std::convert::Infallible;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use rustix::net::{SocketType, sockopt};
use tokio::time::Instant;

use crate::config::values::HandoverMode;
use crate::forward::Forwarder;
use crate::forward::snapshot::FdRef;
use crate::handover::fdstore::StoredFds;
use crate::handover::journal::{Journal, JournalEntry, monotonic_micros};
use crate::handover::queue::Queue;
use crate::handover::record::{RECORDS_MAX, Record, RecordBody, descriptors_of};
use crate::handover::replay::{Leftovers, Replay, recover, replay};
use crate::limits::descriptors::{raise_limit, spare_fds};
use crate::limits::slot::Slot;
use crate::listen::activation::{PassedFd, take_matching};
use crate::listen::listener::Listener;
use crate::logging::os_message;
use crate::notify::Notifier;
use crate::socket::Socket;
use crate::socket::file_id::FileId;

/// The store, as the connections of this process use it.
#[derive(Debug)]
pub struct Handover {
    mode: HandoverMode,
    journal: Arc<Journal>,
    /// Descriptors that the next process can take back, if it has the same limit.
    fds_max: usize,
    /// Descriptors stored by this process, and the most of one message (restart mode). Event loops store one
    /// after the other.
    stored_fds: AtomicUsize,
    largest_message: AtomicUsize,
    detach_is_requested: AtomicBool,
    lost: AtomicUsize,
}

impl Handover {
    /// Takes what was stored, and makes a store for what is to be. Without one it says so, once. A process
    /// that `opens` its sockets itself is passed none.
    ///
    /// # Errors
    /// One line when what was stored can't be read; then it is still there.
    pub async fn open(
        mode: Option<HandoverMode>,
        opens: bool,
        inherited: &mut Vec<PassedFd>,
        notifier: &Notifier,
    ) -> Result<(Option<Arc<Self>>, Leftovers), String> {
        let nothing = Ok((None, Leftovers::default()));
        let returned = StoredFds::take(inherited);
        let Some(mode) = mode else {
            if !returned.is_empty() {
                tracing::info!("Closing what was stored, since --handover=never.");
                returned.discard(notifier).await;
            }
            return nothing;
        };
        close_unknown_fds(inherited, opens, notifier).await;
        let queue = if returned.is_empty() { None } else { returned.into_queue(notifier).await };
        let queue = match queue {
            Some(queue) => queue,
            None => match new_queue(notifier).await {
                Ok(queue) => queue,
                Err(error) => {
                    tracing::warn!(
                        "--handover= without a store, connections end with the process: {error}."
                    );
                    return nothing;
                }
            },
        };
        let failed = |error| {
            let error = os_message(&error);
            format!("Failed to read the store, which is left as it is: {error}.")
        };
        let payloads = queue.payloads().map_err(failed)?;
        let (descriptors, at_a_time) = descriptors_of(&payloads);
        // A message may also have what does not count any more.
        let spare = spare_fds();
        if spare < descriptors + at_a_time {
            return Err(format!(
                "RLIMIT_NOFILE={} leaves no room for the stored connections, which have \
                 {descriptors} file descriptors and stay stored; raise LimitNOFILE=.",
                raise_limit()
            ));
        }
        let sorted = replay(&payloads, queue.messages()).map_err(failed)?;
        let Replay { messages, records, refused } = sorted;
        // A connection that systemd passes (Accept=yes) and has stored as well is one.
        let stored: HashSet<_> = records.iter().flat_map(Record::file_ids).collect();
        inherited.retain(|it| !FileId::of(&it.fd).is_ok_and(|id| stored.contains(&id)));
        let current: HashSet<_> = records.iter().map(|record| record.id).collect();
        let journal = Journal::new(queue, messages, &current);
        let kept_in = (mode == HandoverMode::Crash).then_some(&journal);
        let restored = Leftovers { refused, ..recover(records, kept_in) };
        let handover = Self {
            mode,
            journal,
            fds_max: spare,
            stored_fds: AtomicUsize::default(),
            largest_message: AtomicUsize::default(),
            detach_is_requested: AtomicBool::default(),
            lost: AtomicUsize::default(),
        };
        Ok((Some(Arc::new(handover)), restored))
    }

    /// Whether connections are stored from accept on.
    pub fn is_crash_mode(&self) -> bool {
        self.mode == HandoverMode::Crash
    }

    /// All that was stored is this process's again.
    pub fn discard_replayed(&self) {
        if self.mode == HandoverMode::Restart {
            // A second reference would keep peers from seeing the end of their connections.
            self.journal.clear();
        }
    }

    /// Keeps the store clean, for ever.
    pub async fn clean(&self) -> Infallible {
        if self.is_crash_mode() {
            return self.journal.clean().await;
        }
        // In restart mode the store is empty while the process runs.
        std::future::pending().await
    }

    /// Keeps a client, from now on and whatever ends the process, if that is asked for.
    pub fn keep_client(&self, client: impl AsFd) -> Option<JournalEntry> {
        self.keep(RecordBody::Client(client))
    }

    /// The same for a socket that was opened here.
    pub fn keep_listener(&self, listener: &Listener) -> Option<JournalEntry> {
        self.keep(RecordBody::Listener(listener.as_fd(), listener.file()))
    }

    fn keep<Fd: AsFd>(&self, body: RecordBody<Fd>) -> Option<JournalEntry> {
        self.is_crash_mode().then(|| self.journal.keep(monotonic_micros(), body)).flatten()
    }

    /// To be buffered where a panic would end all connections of a thread in order: then the process is
    /// ended at once instead, if they outlive that.
    pub fn abort_on_panic(&self) -> Option<AbortOnPanic> {
        self.is_crash_mode().then_some(AbortOnPanic)
    }

    /// Has each other thread store its connections when it ends.
    pub fn request_detach(&self) {
        self.detach_is_requested.store(true, Ordering::Release);
    }

    /// Whether they are to.
    pub fn is_detach_requested(&self) -> bool {
        self.detach_is_requested.load(Ordering::Acquire)
    }

    /// Stores detached connections. Those that cannot be stored are reset.
    ///
    /// Buffered bytes need descriptors of their own, so there may be more of them than this process could
    /// have open: what the next process could not open is not stored.
    pub fn store(&self, mut detached: Vec<Detached>) {
        while !detached.is_empty() {
            let (mut bodies, mut fds) = (Vec::new(), 0);
            for one in detached.iter().rev().take(RECORDS_MAX) {
                match one.body() {
                    Ok((age, body)) if self.has_room(fds + body.fds()) => {
                        fds += body.fds();
                        bodies.push((start_of(age), body));
                    }
                    Ok(_) => break,
                    // Out of descriptors: storing the others first frees theirs.
                    Err(_) if !bodies.is_empty() => break,
                    Err(error) => {
                        tracing::error!("Failed to store a connection: {}", os_message(&error));
                        break;
                    }
                }
            }
            let count = bodies.len();
            if count == 0 {
                detached.pop();
                self.lost.fetch_add(1, Ordering::Relaxed);
                continue;
            }
            let is_stored = self.journal.append(bodies).is_ok();
            let batch = detached.split_off(detached.len() - count);
            if is_stored {
                self.stored_fds.fetch_add(fds, Ordering::Relaxed);
                self.largest_message.fetch_max(fds, Ordering::Relaxed);
                batch.into_iter().for_each(Detached::release);
            } else {
                self.lost.fetch_add(count, Ordering::Relaxed);
            }
        }
    }

    /// Whether the next process can open so many descriptors more, and those of a whole message at once.
    fn has_room(&self, fds: usize) -> bool {
        let largest = self.largest_message.load(Ordering::Relaxed).max(fds);
        self.stored_fds.load(Ordering::Relaxed) + fds + largest <= self.fds_max
    }

    /// The same for a socket that was opened here; whether it is stored.
    pub fn store_listener(&self, listener: &Listener) -> bool {
        let body = RecordBody::Listener(listener.as_fd(), listener.file());
        let is_stored = self.journal.append(vec![(monotonic_micros(), body)]).is_ok();
        self.stored_fds.fetch_add(usize::from(is_stored), Ordering::Relaxed);
        is_stored
    }

    /// What the next process will find, connections and listeners, and connections that it will not.
    pub fn stored_and_lost(&self) -> [usize; 2] {
        [self.journal.live(), self.lost.load(Ordering::Relaxed)]
    }
}

/// A connection that has been taken off its event loop and is to be stored. Dropping it resets both
/// sides.
#[derive(Debug)]
pub struct Detached {
    start: Instant,
    state: DetachedState,
    _slot: Slot,
}

#[derive(Debug)]
enum DetachedState {
    /// A client that still waits for its backend.
    Client(Socket),
    Forwarder(Box<Forwarder>),
}

impl Detached {
    /// A client without a backend, accepted at `start`.
    pub fn client(start: Instant, socket: Socket, slot: Slot) -> Self {
        Self { start, state: DetachedState::Client(socket), _slot: slot }
    }

    /// A connection with its buffered bytes, accepted at `start`.
    pub fn forwarder(start: Instant, forwarder: Box<Forwarder>, slot: Slot) -> Self {
        Self { start, state: DetachedState::Forwarder(forwarder), _slot: slot }
    }

    /// Returns the connection's age, and what is to be stored of it.
    fn body(&self) -> io::Result<(Duration, RecordBody<FdRef<'_>>)> {
        let body = match &self.state {
            DetachedState::Client(socket) => RecordBody::Client(FdRef::Borrowed(socket.as_fd())),
            DetachedState::Forwarder(it) => RecordBody::Forwarder(Box::new(it.snapshot()?)),
        };
        Ok((self.start.elapsed(), body))
    }

    /// Closes the sockets here: the stored ones keep the connection open.
    fn release(self) {
        match self.state {
            DetachedState::Client(socket) => socket.detach(),
            DetachedState::Forwarder(forwarder) => forwarder.detach(),
        }
    }
}

/// Ends the process when it is dropped by a panic.
#[derive(Debug)]
pub struct AbortOnPanic;

impl Drop for AbortOnPanic {
    fn drop(&mut self) {
        if std::thread::panicking() {
            std::process::abort();
        }
    }
}

async fn new_queue(notifier: &Notifier) -> Result<Queue, String> {
    let queue = Queue::new().map_err(|error| os_message(&error))?;
    fdstore::keep(&queue, notifier).await?;
    Ok(queue)
}

/// What can't come from a socket unit, beside the sockets that do: somebody else's descriptors in the
/// store. A connection is the only one, or is somebody else's as well.
async fn close_unknown_fds(inherited: &mut Vec<PassedFd>, opens: bool, notifier: &Notifier) {
    let is_listener = |it: &PassedFd| {
        sockopt::socket_type(&it.fd).is_ok_and(|it| it == SocketType::STREAM)
            && sockopt::socket_acceptconn(&it.fd).unwrap_or(false)
    };
    if !opens && !inherited.iter().any(is_listener) {
        return;
    }
    let unknown = take_matching(inherited, |it| !is_listener(it));
    if unknown.is_empty() {
        return;
    }
    let names: Vec<_> = unknown.iter().map(|it| &*it.name).collect();
    tracing::warn!(
        "Got what is no listening socket passed in or stored, closing it: {}.",
        names.join(", ")
    );
    for unknown_fd in &unknown {
        fdstore::remove(&unknown_fd.name, notifier).await;
    }
}

fn start_of(age: Duration) -> u64 {
    monotonic_micros().saturating_sub(age.as_micros() as u64)
}
