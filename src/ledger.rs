//! What is stored of the connections that live, and where in the queue it stands.
//!
//! The queue is a log: what changes is written anew, and the last parcel of a number counts. What
//! stands in front of it and does not count any more is taken out; when more than half of it does
//! not count, what does is written anew behind the rest, a few parcels at each change. So the queue
//! holds at most twice what lives, and no change costs more than two messages read and one written.

#![forbid(unsafe_code)]

use std::collections::{HashMap, VecDeque};
use std::convert::Infallible;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::io::Errno;
use rustix::time::{ClockId, clock_gettime};
use tokio::sync::Notify;
use tokio::task::yield_now;
use tokio::time::sleep;

use crate::logging::RateLimit;
use crate::parcel::{Content, PARCELS_MAX, Parcel, Sealed, pack, unpack};
use crate::queue::Queue;

/// Parcels that don't count before it is worth looking.
const SLACK: usize = 32;

/// How long what does not count may stay at most, but for the time it takes.
const CLEANED_AFTER: Duration = Duration::from_secs(5);

static FULL: RateLimit = RateLimit::new(1, Duration::from_secs(600));

/// The queue, and what is known of it.
#[derive(Debug)]
pub struct Ledger {
    queue: Queue,
    next: AtomicU64,
    book: Mutex<Book>,
    /// Something does not count any more.
    outdated: Notify,
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
        let outdated = Notify::new();
        // What did not count when it was read.
        outdated.notify_one();
        Arc::new(Self { queue, next: next.into(), book: book.into(), outdated })
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

    /// Takes what does not count out before long, for ever: whoever holds a second reference to a socket
    /// keeps the kernel from closing it.
    pub async fn clean(&self) -> Infallible {
        loop {
            self.outdated.notified().await;
            sleep(CLEANED_AFTER).await;
            let mut left = self.lock().messages.len();
            while left > 0 {
                left = left.saturating_sub(self.lock().clean(&self.queue));
                yield_now().await;
            }
        }
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
            if book.written > book.current.len() {
                self.ledger.outdated.notify_one();
            }
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

    /// The same at leisure, for whoever goes through all messages: of how many it has got rid.
    fn clean(&mut self, queue: &Queue) -> usize {
        let before = self.taken_out;
        if self.written == self.current.len() || !self.pack(queue) {
            return usize::MAX;
        }
        (self.taken_out - before) as usize
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

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::os::fd::BorrowedFd;

    use super::*;
    use crate::queue::Queue;
    use crate::recovery::sort_out;

    fn listener() -> OwnedFd {
        std::net::TcpListener::bind("127.0.0.1:0").unwrap().into()
    }

    fn second(queue: &Queue) -> Queue {
        let [inner, sender] =
            queue.ends().map(|fd: BorrowedFd<'_>| fd.try_clone_to_owned().unwrap());
        Queue::from_ends(inner, sender)
    }

    /// Each parcel that counts, and when it began.
    fn read(queue: &Queue) -> BTreeMap<u64, u64> {
        let out = sort_out(queue.messages());
        assert_eq!(out.refused, 0);
        out.parcels.iter().map(|parcel| (parcel.id, parcel.start)).collect()
    }

    #[test]
    fn what_lives_is_in_the_queue_at_every_moment_and_little_else() {
        let queue = Queue::new().unwrap();
        let ledger = Ledger::new(second(&queue), Vec::new(), &[]);
        let mut live: BTreeMap<u64, (Kept, OwnedFd)> = BTreeMap::new();
        let mut dice = 1_u64;
        let mut below = |sides: usize| {
            dice = dice.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (dice >> 33) as usize % sides
        };
        let mut grows = true;
        for round in 0..6000_u64 {
            // It swells and shrinks, a few hundred at most.
            if live.len() > 200 || live.is_empty() {
                grows = !grows;
            }
            let one = live.keys().nth(below(live.len().max(1))).copied();
            match (below(10), one) {
                (0..6, one) if grows || one.is_none() => {
                    let fd = listener();
                    let kept = ledger.keep(round, Content::Listener(&fd)).unwrap();
                    live.insert(kept.id, (kept, fd));
                }
                (6..8, Some(one)) => {
                    let (kept, fd) = &live[&one];
                    assert!(kept.store(Content::Listener(fd)));
                }
                (8, Some(one)) => {
                    let (kept, _) = live.remove(&one).unwrap();
                    assert!(kept.forget());
                }
                (_, Some(one)) => drop(live.remove(&one)),
                (_, None) => {}
            }
            let parcels = ledger.lock().written;
            assert!(parcels <= 2 * live.len() + SLACK + 1, "{parcels} for {}", live.len());
            if round % 20 == 0 {
                let messages: Vec<_> = queue.messages().collect();
                assert_eq!(messages.len(), ledger.lock().messages.len());
                let there = read(&queue);
                assert!(live.keys().all(|id| there.contains_key(id)), "{round}");
            }
        }
        // Written by one process, read and continued by the next.
        let out = sort_out(queue.messages());
        let current: Vec<_> = live.keys().copied().collect();
        let next = Ledger::new(second(&queue), out.messages, &current);
        live.into_values().for_each(|(kept, _)| kept.leave());
        let kept: Vec<_> = current.iter().map(|id| next.kept(*id, 0)).collect();
        while next.lock().clean(&next.queue) != usize::MAX {}
        assert_eq!(read(&queue).into_keys().collect::<Vec<_>>(), current);
        assert_eq!(next.lock().written, current.len());
        drop(kept);
        assert_eq!(queue.messages().count(), 0);
        assert!(next.is_empty());
    }

    #[test]
    fn what_is_forgotten_does_not_come_back() {
        let queue = Queue::new().unwrap();
        let ledger = Ledger::new(second(&queue), Vec::new(), &[]);
        let fds: Vec<_> = (0..3).map(|_| listener()).collect();
        let keep = |fd| ledger.keep(0, Content::Listener(fd)).unwrap();
        let [first, middle, _last] = [&fds[0], &fds[1], &fds[2]].map(keep);
        let id = middle.id;
        // Behind one that lives, where it can't be taken out.
        assert!(middle.forget());
        assert!(!read(&queue).contains_key(&id));
        drop(first);
        assert!(!read(&queue).contains_key(&id));
        while ledger.lock().clean(&ledger.queue) != usize::MAX {}
        assert_eq!(read(&queue).len(), 1);
    }
}
