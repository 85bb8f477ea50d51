//! `--handover=`: connections that outlive the process.
//!
//! With `restart` each connection is detached when the process is stopped: its sockets and its
//! buffered bytes go into the [`Queue`] that systemd keeps, and the next process takes them from
//! there before it accepts clients. With `crash` a connection is in the queue from accept on, and
//! none of its bytes is ever in the memory of the process, unless the queue is full or a socket
//! cannot be spliced. A [`Journal`] keeps the queue current.

pub mod replay;
mod verify;
mod detached;
pub mod journal;
mod index;
mod fdstore;
pub mod queue;
pub mod encoding;

use std::collections::HashSet;
use std::future::pending;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use rustix::net::{SocketType, sockopt};
use tokio::time::Instant;

use crate::config::values::HandoverMode;
use crate::handover::encoding::{RECORDS_MAX, RecordBody, SessionRecord, descriptors_of};
use crate::handover::journal::{Journal, JournalEntry, monotonic_micros};
use crate::handover::queue::Queue;
use crate::handover::replay::{Leftovers, Replay, replay};
use crate::limits::descriptors::{raise_limit, spare_fds};
use crate::listen::activation::{PassedFd, take_matching};
use crate::logging::os_message;
use crate::notify::Notifier;
use crate::socket::file_id::FileId;

pub use detached::{Detached, DetachedState};

/// How this process stores connections: in the queue, which is in systemd's file descriptor store,
/// through the journal.
#[derive(Debug)]
pub struct Handover {
    mode: HandoverMode,
    journal: Arc<Journal>,
    /// Descriptors that the next process can open, if it has the same limit.
    fds_max: usize,
    /// Descriptors that this process stored, and the most of one message (restart mode). Event
    /// loops store one after the other.
    stored_fds: AtomicUsize,
    largest_message: AtomicUsize,
    lost: AtomicUsize,
}

impl Handover {
    /// Reads what the previous process stored, and opens the store for this one. Without a store,
    /// logs why and returns `None`. If the proxy `opens` its listeners itself, systemd passes none.
    ///
    /// # Errors
    /// One line when the stored connections cannot be read. They stay stored.
    pub async fn open(
        mode: Option<HandoverMode>,
        opens: bool,
        passed: &mut Vec<PassedFd>,
        notifier: &Notifier,
    ) -> Result<(Option<Arc<Self>>, Leftovers), String> {
        let stored = fdstore::take_stored(passed);
        let Some(mode) = mode else {
            if !stored.is_empty() {
                tracing::info!("Closing the stored connections, because --handover= is never.");
                fdstore::discard(stored, notifier).await;
            }
            return Ok((None, Leftovers::default()));
        };
        close_unknown_fds(passed, opens, notifier).await;
        let queue = match open_queue(stored, notifier).await {
            Ok(queue) => queue,
            Err(error) => {
                tracing::warn!("Failed to use the descriptor store, ignoring --handover=: {error}");
                return Ok((None, Leftovers::default()));
            }
        };
        let fds_max = spare_fds();
        let Replay { messages, records, files, refused } = read(&queue, fds_max)?;
        // With Accept=yes a connection may be both passed and stored.
        passed.retain(|it| !FileId::of(&it.fd).is_ok_and(|id| files.contains(&id)));
        let current: HashSet<_> = records.iter().map(|record| record.id).collect();
        let journal = Journal::new(queue, messages, &current);
        let crash_journal = (mode == HandoverMode::Crash).then_some(&journal);
        let leftovers = Leftovers::new(records, refused, crash_journal);
        let handover = Self {
            mode,
            journal,
            fds_max,
            stored_fds: AtomicUsize::default(),
            largest_message: AtomicUsize::default(),
            lost: AtomicUsize::default(),
        };
        Ok((Some(Arc::new(handover)), leftovers))
    }

    /// Whether connections are stored from accept on.
    pub fn is_crash_mode(&self) -> bool {
        self.mode == HandoverMode::Crash
    }

    /// Empties the store in restart mode: a second reference would keep peers from seeing the end
    /// of their connections.
    pub fn discard_replayed(&self) {
        if self.mode == HandoverMode::Restart {
            self.journal.clear();
        }
    }

    /// Drops superseded records, for as long as the process lives. (In restart mode there are
    /// none.)
    pub async fn clean(&self) {
        if self.is_crash_mode() {
            self.journal.clean().await;
        }
        pending().await
    }

    /// Keeps a client in the store from now on (crash mode).
    pub fn keep_client(&self, client: impl AsFd) -> Option<JournalEntry> {
        self.keep(RecordBody::Client(client))
    }

    /// Keeps a session in the store from now on (crash mode). It has begun at `start`.
    pub fn keep_session<Fd: AsFd>(
        &self,
        start: Instant,
        session: SessionRecord<Fd>,
    ) -> Option<JournalEntry> {
        let (start, body) = (micros_at(start), RecordBody::Session(Box::new(session)));
        self.is_crash_mode().then(|| self.journal.keep(start, body)).flatten()
    }

    /// Keeps a socket that the proxy opened in the store from now on (crash mode).
    pub fn keep_listener(
        &self,
        socket: BorrowedFd<'_>,
        file: Option<FileId>,
    ) -> Option<JournalEntry> {
        self.keep(RecordBody::Listener(socket, file))
    }

    fn keep<Fd: AsFd>(&self, body: RecordBody<Fd>) -> Option<JournalEntry> {
        self.is_crash_mode().then(|| self.journal.keep(monotonic_micros(), body)).flatten()
    }

    /// Returns a guard for a thread with connections. In crash mode a panic ends the process at
    /// once: unwinding would end all connections of the thread, and the next process restores them.
    pub fn abort_on_panic(&self) -> Option<AbortOnPanic> {
        self.is_crash_mode().then_some(AbortOnPanic)
    }

    /// Stores detached connections. Those that cannot be stored are reset.
    ///
    /// Buffered bytes need descriptors of their own. So the connections may have more descriptors
    /// than the next process can open. Those that it could not open are not stored.
    pub fn store(&self, mut detached: Vec<Detached>) {
        while !detached.is_empty() {
            let (mut bodies, mut fds, mut failure) = (Vec::new(), 0, None);
            for connection in detached.iter().rev().take(RECORDS_MAX) {
                match connection.body() {
                    Ok(body) if self.has_room(fds + body.fds().len()) => {
                        fds += body.fds().len();
                        bodies.push((micros_at(connection.start), body));
                    }
                    Ok(_) => break,
                    // Out of descriptors: storing the others first frees theirs.
                    Err(error) => {
                        failure = Some(error);
                        break;
                    }
                }
            }
            let count = bodies.len();
            if count == 0 {
                if let Some(error) = failure {
                    tracing::error!("Failed to store a connection: {}.", os_message(&error));
                }
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

    /// Whether the next process can open all that is stored, `fds` more descriptors, and once more
    /// those of the largest message.
    fn has_room(&self, fds: usize) -> bool {
        let largest = self.largest_message.load(Ordering::Relaxed).max(fds);
        self.stored_fds.load(Ordering::Relaxed) + fds + largest <= self.fds_max
    }

    /// Stores a socket that the proxy opened. Returns whether there was room.
    pub fn store_listener(&self, socket: BorrowedFd<'_>, file: Option<FileId>) -> bool {
        let body = RecordBody::Listener(socket, file);
        let is_stored = self.journal.append(vec![(monotonic_micros(), body)]).is_ok();
        self.stored_fds.fetch_add(usize::from(is_stored), Ordering::Relaxed);
        is_stored
    }

    /// Returns the number of connections and listeners that are stored, and of connections that
    /// could not be.
    pub fn stored_and_lost(&self) -> [usize; 2] {
        [self.journal.live(), self.lost.load(Ordering::Relaxed)]
    }
}

/// Returns a moment as records have it.
fn micros_at(start: Instant) -> u64 {
    monotonic_micros().saturating_sub(start.elapsed().as_micros() as u64)
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

/// Returns the stored queue, or stores a new one.
async fn open_queue(stored: Vec<PassedFd>, notifier: &Notifier) -> Result<Queue, String> {
    if !stored.is_empty() {
        if let Some(queue) = fdstore::stored_queue(stored, notifier).await {
            return Ok(queue);
        }
    }
    let queue = Queue::new().map_err(|error| os_message(&error))?;
    fdstore::keep(&queue, notifier).await?;
    Ok(queue)
}

/// Reads the connections in the queue, which stays as it is.
///
/// # Errors
/// When they have more descriptors than the process can open, `fds_max`, or when a message cannot
/// be read.
fn read(queue: &Queue, fds_max: usize) -> Result<Replay, String> {
    let failed = |error| {
        let error = os_message(&error);
        format!("Failed to read the descriptor store, leaving it as it is: {error}.")
    };
    let payloads = queue.payloads().map_err(failed)?;
    let (descriptors, largest_message) = descriptors_of(&payloads);
    // A message may also have descriptors of superseded records, which are open for a moment.
    if fds_max < descriptors + largest_message {
        return Err(format!(
            "Failed to restore connections, which stay stored: RLIMIT_NOFILE={} leaves no room for \
             their {descriptors} file descriptors. (Raise LimitNOFILE=.)",
            raise_limit()
        ));
    }
    replay(&payloads, queue.messages()).map_err(failed)
}

/// Closes descriptors that are neither ours nor listening sockets, here and in the store. A process
/// that neither `opens` listeners nor is passed any keeps what it was passed: its one connection
/// (Accept=yes).
async fn close_unknown_fds(passed: &mut Vec<PassedFd>, opens: bool, notifier: &Notifier) {
    let is_listener = |it: &PassedFd| match sockopt::socket_type(&it.fd) {
        Ok(SocketType::STREAM) => sockopt::socket_acceptconn(&it.fd).unwrap_or(false),
        kind => kind == Ok(SocketType::DGRAM),
    };
    if !opens && !passed.iter().any(is_listener) {
        return;
    }
    let unknown = take_matching(passed, |it| !is_listener(it));
    if unknown.is_empty() {
        return;
    }
    let names: Vec<_> = unknown.iter().map(|it| &*it.name).collect();
    tracing::warn!(
        "Closing passed or stored descriptors that are not listening sockets: {}.",
        names.join(", ")
    );
    for unknown_fd in &unknown {
        fdstore::remove(&unknown_fd.name, notifier).await;
    }
}

#[cfg(test)]
mod tests {
    use std::env;
    use std::net::TcpListener;
    use std::os::fd::OwnedFd;
    use std::os::unix::net::UnixStream;
    use std::os::unix::process::ExitStatusExt;
    use std::process::Command;
    use std::time::Duration;

    use rustix::process::{Resource, Rlimit, Signal, setrlimit};

    use super::*;
    use crate::counters::Gauge;
    use crate::limits::descriptors::FdBudget;
    use crate::limits::slot::Slot;

    fn handover(mode: HandoverMode, fds_max: usize) -> Handover {
        of_queue(mode, fds_max, Queue::new().unwrap())
    }

    fn of_queue(mode: HandoverMode, fds_max: usize, queue: Queue) -> Handover {
        Handover {
            mode,
            journal: Journal::new(queue, Vec::new(), &HashSet::new()),
            fds_max,
            stored_fds: AtomicUsize::default(),
            largest_message: AtomicUsize::default(),
            lost: AtomicUsize::default(),
        }
    }

    fn socket() -> OwnedFd {
        UnixStream::pair().unwrap().0.into()
    }

    #[test]
    fn room_is_for_all_that_is_stored_and_a_message_twice() {
        let mut handover = handover(HandoverMode::Restart, 10);
        assert!(handover.has_room(5));
        assert!(!handover.has_room(6));
        handover.stored_fds = 2.into();
        handover.largest_message = 5.into();
        assert!(handover.has_room(3));
        assert!(!handover.has_room(4));
    }

    #[test]
    fn no_more_is_stored_than_the_next_process_can_open() {
        let (handover, budget) = (handover(HandoverMode::Restart, 10), FdBudget::new(0, 0));
        let detached = |_| {
            let session = SessionRecord {
                socket: socket(),
                listener: FileId::default(),
                client: Vec::new(),
                local: None,
                is_answered: true,
                is_confirmed: true,
                is_stream: false,
            };
            let slot = Slot::new(Gauge::default().take(), budget.reserve_unchecked());
            Detached { start: Instant::now(), state: DetachedState::Session(session), _slot: slot }
        };
        handover.store((0..20).map(detached).collect());
        // Five, and once more as many.
        assert_eq!(handover.stored_and_lost(), [5, 15]);
    }

    #[test]
    fn what_the_process_cannot_open_stays_stored() {
        let (queue, socket) = (Queue::new().unwrap(), socket());
        let records = [1, 2, 3].map(|id| {
            let body = RecordBody::Client(&socket);
            encoding::Record { id, start: 0, body }.seal()
        });
        let (bytes, fds) = encoding::encode_message(&records);
        queue.append(&bytes, &fds).unwrap();
        // Three descriptors, and once more those of the message.
        assert!(read(&queue, 5).is_err());
        assert!(read(&queue, 6).is_ok());
    }

    #[test]
    fn a_record_has_the_moment_at_which_its_connection_began() {
        let start = Instant::now() - Duration::from_secs(1);
        // The order of the two clocks decides on which side of the true moment each is.
        let earliest = monotonic_micros() - start.elapsed().as_micros() as u64;
        let begin = Instant::now();
        let stored = micros_at(start);
        let took = begin.elapsed().as_micros() as u64;
        let elapsed = start.elapsed().as_micros() as u64;
        let latest = monotonic_micros() - elapsed;
        assert!(stored <= latest + 1 && stored + took + 1 >= earliest);
    }

    #[test]
    fn a_panic_of_a_thread_with_connections_ends_the_process() {
        const VARIABLE: &str = "SOCKET_PROXYD_TEST_PANICS";
        const NAME: &str = "handover::tests::a_panic_of_a_thread_with_connections_ends_the_process";
        if env::var_os(VARIABLE).is_some() {
            // Without a core file.
            let none = Rlimit { current: Some(0), maximum: Some(0) };
            setrlimit(Resource::Core, none).unwrap();
            let _abort = handover(HandoverMode::Crash, 10).abort_on_panic();
            panic!("on purpose");
        }
        let mut again = Command::new(env::current_exe().unwrap());
        let ended = again.args(["--exact", NAME]).env(VARIABLE, "").output().unwrap();
        assert_eq!(ended.status.signal(), Some(Signal::ABORT.as_raw()), "{ended:?}");
    }

    #[test]
    fn nothing_is_lost_before_it_is_stored() {
        assert_eq!(handover(HandoverMode::Crash, 10).stored_and_lost(), [0, 0]);
    }

    #[tokio::test(start_paused = true)]
    async fn superseded_records_are_dropped_in_time() {
        let (queue, socket) = (Queue::new().unwrap(), socket());
        let [reader, writer] = queue.ends().map(|end| end.try_clone_to_owned().unwrap());
        let copy = Queue::from_ends(reader, writer).unwrap();
        let handover = of_queue(HandoverMode::Crash, 10, copy);
        let _first = handover.keep_client(&socket).unwrap();
        // Behind one that lives, where it cannot be taken out.
        drop(handover.keep_client(&socket).unwrap());
        assert_eq!(queue.payloads().unwrap().len(), 2);
        let cleaned = tokio::time::timeout(Duration::from_secs(60), handover.clean());
        assert!(cleaned.await.is_err(), "it goes on");
        assert_eq!(queue.payloads().unwrap().len(), 1);
    }

    #[tokio::test]
    async fn descriptors_that_are_no_listeners_are_closed() {
        let notifier = Notifier::none();
        let passed = |fd, name: &str| PassedFd { fd, name: name.into() };
        let listener = || OwnedFd::from(TcpListener::bind("127.0.0.1:0").unwrap());
        for (has_listener, opens, left) in
            [(true, false, 1), (true, true, 1), (false, true, 0), (false, false, 1)]
        {
            let mut all = vec![passed(socket(), "connection")];
            all.extend(has_listener.then(|| passed(listener(), "listener")));
            close_unknown_fds(&mut all, opens, &notifier).await;
            assert_eq!(all.len(), left, "{has_listener} {opens}");
            assert!(!has_listener || all[0].name == "listener");
        }
    }
}
