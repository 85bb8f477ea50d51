//! What is stored of the connections that live, and where in the queue it stands.
//!
//! The queue is a log: what changes is written anew, and the last parcel of a number counts. What
//! stands in front of it and does not count any more is taken out; when more than half of it does
//! not count, what does is written anew behind the rest, a few parcels at each change. So the queue
//! holds at most twice what lives, and no change costs more than two messages read and one written.

#![forbid(unsafe_code)]

use std::collections::{HashMap, VecDeque};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::io::Errno;
use rustix::time::{ClockId, clock_gettime};

use crate::logging::RateLimit;
use crate::parcel::{Content, PARCELS_MAX, Parcel, Sealed, pack, unpack};
use crate::queue::Queue;

/// Parcels that don't count before it is worth looking.
const SLACK: usize = 32;

static FULL: RateLimit = RateLimit::new(1, std::time::Duration::from_secs(600));

/// The queue, and what is known of it.
#[derive(Debug)]
pub struct Ledger {
    queue: Queue,
    next: AtomicU64,
    book: Mutex<Book>,
}

#[derive(Debug, Default)]
struct Book {
    /// The numbers of the parcels in each message of the queue.
    messages: VecDeque<Vec<u64>>,
    /// How many messages have been taken out: the number of the first.
    taken_out: u64,
    /// The number of the message that counts, for each parcel that does.
    current: HashMap<u64, u64>,
    /// Parcels in the queue.
    written: usize,
}

/// A parcel that is kept for as long as this lives.
#[derive(Debug)]
pub struct Kept {
    ledger: Arc<Ledger>,
    id: u64,
    start: u64,
    /// Whether it is to be there when this is gone.
    stays: bool,
}

impl Ledger {
    /// For a queue with these messages in it, of whose parcels the `current` count.
    pub fn new(queue: Queue, messages: Vec<Vec<u64>>, current: &[u64]) -> Arc<Self> {
        let next = messages.iter().flatten().max().map_or(0, |last| last + 1);
        let mut book = Book::default();
        for ids in messages {
            let number = book.next_number();
            for id in ids.iter().filter(|id| current.contains(id)) {
                book.current.insert(*id, number);
            }
            book.written += ids.len();
            book.messages.push_back(ids);
        }
        Arc::new(Self { queue, next: next.into(), book: book.into() })
    }

    /// Keeps something new, if there is room.
    pub fn keep<Fd: AsFd>(self: &Arc<Self>, start: u64, content: Content<Fd>) -> Option<Kept> {
        let kept = self.kept(self.next.fetch_add(1, Ordering::Relaxed), start);
        // What is left is for changes of what is there.
        if self.queue.has_room() && kept.store(content) {
            return Some(kept);
        }
        if let Some(suppressed) = FULL.pass() {
            tracing::warn!(
                "The store is full, new connections would not survive the proxy; raise \
                 net.core.wmem_max or LimitNOFILE=.{suppressed}"
            );
        }
        None
    }

    /// What has this number in the queue.
    pub fn kept(self: &Arc<Self>, id: u64, start: u64) -> Kept {
        Kept { ledger: Arc::clone(self), id, start, stays: false }
    }

    /// Writes what is to be there when the process is gone, each with when it began, in one message:
    /// at most [`PARCELS_MAX`].
    ///
    /// # Errors
    /// When there is no room; then none of them is there.
    pub fn leave<Fd: AsFd>(&self, contents: Vec<(u64, Content<Fd>)>) -> Result<(), Errno> {
        let id = || self.next.fetch_add(1, Ordering::Relaxed);
        let parcel = |(start, content)| Parcel { id: id(), start, content };
        let parcels: Vec<_> = contents.into_iter().map(parcel).collect();
        let sealed: Vec<_> = parcels.iter().map(Parcel::seal).collect();
        self.lock().write(&self.queue, &sealed)
    }

    /// Takes all out.
    pub fn clear(&self) {
        let mut book = self.lock();
        while self.queue.drop_first() {}
        *book = Book::default();
    }

    /// Parcels that count.
    pub fn len(&self) -> usize {
        self.lock().current.len()
    }

    /// Whether nothing counts.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn lock(&self) -> MutexGuard<'_, Book> {
        self.book.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Kept {
    /// Stores how it stands now; whether that went.
    pub fn store<Fd: AsFd>(&self, content: Content<Fd>) -> bool {
        let parcel = Parcel { id: self.id, start: self.start, content };
        let sealed = [parcel.seal()];
        let queue = &self.ledger.queue;
        let mut book = self.ledger.lock();
        let mut written = book.write(queue, &sealed);
        while written.is_err() && book.is_worth_packing() && book.pack(queue) {
            written = book.write(queue, &sealed);
        }
        book.tidy(queue);
        written.is_ok()
    }

    /// Has it not taken back, although its sockets may be in the queue for some time; whether that went.
    pub fn forget(self) -> bool {
        self.store(Content::<OwnedFd>::Nothing)
    }

    /// Lets it stay there.
    pub fn leave(mut self) {
        self.stays = true;
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        if !self.stays {
            let mut book = self.ledger.lock();
            book.current.remove(&self.id);
            book.tidy(&self.ledger.queue);
        }
    }
}

impl Book {
    fn next_number(&self) -> u64 {
        self.taken_out + self.messages.len() as u64
    }

    fn write<Fd: AsFd>(&mut self, queue: &Queue, parcels: &[Sealed<Fd>]) -> Result<(), Errno> {
        let (bytes, fds) = pack(parcels);
        queue.append(&bytes, &fds)?;
        let number = self.next_number();
        let ids: Vec<_> = parcels.iter().map(Sealed::id).collect();
        self.current.extend(ids.iter().map(|id| (*id, number)));
        self.written += ids.len();
        self.messages.push_back(ids);
        Ok(())
    }

    fn is_worth_packing(&self) -> bool {
        self.written > 2 * self.current.len()
    }

    /// Takes out what does not count in front, and packs a little where that is worth it.
    fn tidy(&mut self, queue: &Queue) {
        if self.written > 2 * self.current.len() + SLACK {
            self.pack(queue);
        }
        while self.first_is_over() && self.drop_first(queue) {}
    }

    fn first_is_over(&self) -> bool {
        let is_current = |id| self.current.get(id) == Some(&self.taken_out);
        self.messages.front().is_some_and(|ids| !ids.iter().any(is_current))
    }

    fn drop_first(&mut self, queue: &Queue) -> bool {
        let is_out = queue.drop_first();
        if is_out && let Some(ids) = self.messages.pop_front() {
            self.taken_out += 1;
            self.written -= ids.len();
        }
        is_out
    }

    /// Writes what counts of the first messages anew behind the last, and takes these out; whether
    /// that went.
    fn pack(&mut self, queue: &Queue) -> bool {
        let mut messages = queue.messages();
        let mut counts = Vec::new();
        let mut seen = 0;
        while counts.len() < PARCELS_MAX
            && let Some(ids) = self.messages.get(seen)
            && counts.len() + ids.len() <= 2 * PARCELS_MAX
        {
            let Some(message) = messages.next().filter(|message| message.is_whole) else {
                return false;
            };
            let number = self.taken_out + seen as u64;
            // What can't be read counts for nothing.
            let parcels = unpack(&message.bytes, message.fds).unwrap_or_default();
            let is_current = |it: &Sealed<_>| self.current.get(&it.id()) == Some(&number);
            counts.extend(parcels.into_iter().filter(is_current));
            seen += 1;
        }
        // At first behind the rest, so that it is in the queue at every moment.
        if !counts.is_empty() && self.write(queue, &counts).is_err() {
            return false;
        }
        (0..seen).all(|_| self.drop_first(queue))
    }
}

/// Now, as parcels have it.
pub fn now() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000 + now.tv_nsec as u64 / 1000
}
