//! The journal: the records in the queue, and which of them are live. With `--handover=restart` it
//! is written when the process stops. With `--handover=crash` it is current at every moment.
//!
//! The queue is an append-only log: each change appends a new record, and the last record of an id
//! wins. Superseded records at the head are dropped. Compaction drops the others: the [`Index`]
//! tells it what is in the queue.

use std::collections::HashSet;
use std::convert::Infallible;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rustix::io::Errno;
use tokio::sync::Notify;
use tokio::task::yield_now;
use tokio::time::sleep;

use crate::forward::snapshot::{FdRef, Snapshot, SnapshotStore};
use crate::handover::encoding::{Record, RecordBody};
use crate::handover::index::{Index, MessageInfo};
use crate::handover::queue::Queue;
use crate::logging::{RateLimit, rate_limited};
use crate::runtime::lock;
use crate::socket::sys::monotonic;

/// The queue, and the index of what is in it.
#[derive(Debug)]
pub struct Journal {
    queue: Queue,
    next_id: AtomicU64,
    index: Mutex<Index>,
    /// A record was superseded and is still in the queue.
    superseded: Notify,
}

/// A record in the queue. An owned entry drops its record when it is dropped.
#[derive(Debug)]
pub struct JournalEntry {
    journal: Arc<Journal>,
    id: u64,
    start: u64,
    /// The record stays when this is dropped.
    stays: bool,
}

impl Journal {
    /// Creates a journal over a queue with these messages, of whose records these are `live`.
    pub fn new(queue: Queue, messages: Vec<MessageInfo>, live: &HashSet<u64>) -> Arc<Self> {
        let ids = messages.iter().flat_map(|message| &message.record_ids);
        let next_id = ids.max().map_or(0, |last| last + 1);
        let index = Index::new(messages, live);
        let superseded = Notify::new();
        // The messages may have superseded records.
        superseded.notify_one();
        Arc::new(Self { queue, next_id: next_id.into(), index: index.into(), superseded })
    }

    /// Appends a record with a new id, if there is room. Connections leave some room for listeners,
    /// and for changes of what is in the journal.
    pub fn keep<Fd: AsFd>(
        self: &Arc<Self>,
        start: u64,
        body: RecordBody<Fd>,
    ) -> Option<JournalEntry> {
        let entry = self.entry(self.next_id.fetch_add(1, Ordering::Relaxed), start);
        let is_listener = matches!(body, RecordBody::Listener(..));
        let limit_percent = if is_listener { REFUSE_UPDATES_AT } else { REFUSE_NEW_AT };
        if entry.write(body, limit_percent) {
            return Some(entry.own());
        }
        rate_limited!(
            IS_FULL,
            warn,
            "Failed to store a connection: the descriptor store is full. (It would end with the \
             proxy. Raise LimitNOFILE=, or net.core.wmem_max, which takes effect after a stop.)"
        );
        None
    }

    /// Returns the entry of a stored record. Dropping it leaves the record, unless it was owned.
    pub fn entry(self: &Arc<Self>, id: u64, start: u64) -> JournalEntry {
        JournalEntry { journal: Arc::clone(self), id, start, stays: true }
    }

    /// Appends records in one message, each with the start of its connection: at most
    /// [`RECORDS_MAX`](crate::handover::encoding::RECORDS_MAX). They stay when the process is
    /// gone.
    ///
    /// # Errors
    /// When there is no room; then none of them is in the queue.
    pub fn append<Fd: AsFd>(&self, contents: Vec<(u64, RecordBody<Fd>)>) -> Result<(), Errno> {
        let id = || self.next_id.fetch_add(1, Ordering::Relaxed);
        let record = |(start, body)| Record { id: id(), start, body }.seal();
        let records: Vec<_> = contents.into_iter().map(record).collect();
        lock(&self.index).append(&self.queue, &records)
    }

    /// Drops each superseded record within a few seconds, forever: a second reference to a socket
    /// keeps the kernel from closing it.
    pub async fn clean(&self) -> Infallible {
        loop {
            self.superseded.notified().await;
            sleep(CLEANED_AFTER).await;
            // One round over the messages of this moment. The lock is released after each step.
            let end = lock(&self.index).next_number();
            while self.clean_step(end) {
                yield_now().await;
            }
            if lock(&self.index).has_superseded() {
                self.superseded.notify_one();
            }
        }
    }

    fn clean_step(&self, end: u64) -> bool {
        let mut index = lock(&self.index);
        index.has_superseded() && index.first < end && index.compact(&self.queue)
    }

    /// Drops everything.
    pub fn clear(&self) {
        let mut index = lock(&self.index);
        while self.queue.pop() {}
        *index = Index::new(Vec::new(), &HashSet::new());
    }

    /// Returns the number of live records.
    pub fn live(&self) -> usize {
        lock(&self.index).live.len()
    }

    /// Drops superseded records at the head, and has `clean` drop those that are left.
    fn maintain(&self, index: &mut Index) {
        index.drop_superseded(&self.queue);
        if index.has_superseded() {
            self.superseded.notify_one();
        }
    }
}

impl JournalEntry {
    /// Ties the record to this entry: dropping the entry drops the record.
    pub fn own(mut self) -> Self {
        self.stays = false;
        self
    }

    /// Lets the record stay.
    pub fn detach(mut self) {
        self.stays = true;
    }

    /// Appends the record, unless the queue is `limit_percent` full even after compaction.
    fn write<Fd: AsFd>(&self, body: RecordBody<Fd>, limit_percent: usize) -> bool {
        let record = Record { id: self.id, start: self.start, body }.seal();
        let queue = &self.journal.queue;
        let mut index = lock(&self.journal.index);
        for _ in 0..COMPACT_STEPS {
            let is_due = index.fullness(queue) >= COMPACT_AT && index.is_worth_compacting();
            if !is_due || !index.compact(queue) {
                break;
            }
        }
        let is_written =
            index.fullness(queue) < limit_percent && index.append(queue, &[record]).is_ok();
        self.journal.maintain(&mut index);
        is_written
    }
}

impl SnapshotStore for JournalEntry {
    fn update(&self, snapshot: Snapshot<FdRef<'_>>) -> bool {
        self.write(RecordBody::Forwarder(Box::new(snapshot)), REFUSE_UPDATES_AT)
    }

    fn forget(self: Box<Self>) -> bool {
        // A superseding record without content: the sockets may be in the queue for some time.
        self.own().write(RecordBody::<OwnedFd>::Nothing, usize::MAX)
    }

    fn detach(self: Box<Self>) {
        (*self).detach();
    }
}

impl Drop for JournalEntry {
    fn drop(&mut self) {
        if !self.stays {
            let mut index = lock(&self.journal.index);
            index.live.remove(&self.id);
            self.journal.maintain(&mut index);
        }
    }
}

/// Returns CLOCK_MONOTONIC in microseconds, as records have it.
pub fn monotonic_micros() -> u64 {
    monotonic().as_micros() as u64
}

/// From this fullness on, in percent, each append compacts first.
const COMPACT_AT: usize = 50;

/// From this fullness on no new connection is stored.
const REFUSE_NEW_AT: usize = 75;

/// From this fullness on only records without content are appended, which make room.
const REFUSE_UPDATES_AT: usize = 90;

/// Compactions before an append: enough to compact the whole queue before it fills.
const COMPACT_STEPS: usize = 4;

/// The delay before superseded records are dropped.
const CLEANED_AFTER: Duration = Duration::from_secs(5);

static IS_FULL: RateLimit = RateLimit::new(1, Duration::from_secs(600));

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::os::fd::BorrowedFd;

    use rustix::net::sockopt::set_socket_send_buffer_size;

    use super::*;
    use crate::handover::encoding::RECORDS_MAX;
    use crate::handover::index::SLACK;
    use crate::handover::replay::replay;

    fn listener() -> OwnedFd {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        listener.into()
    }

    fn second(queue: &Queue) -> Queue {
        let [inner, sender] =
            queue.ends().map(|fd: BorrowedFd<'_>| fd.try_clone_to_owned().unwrap());
        Queue::from_ends(inner, sender).unwrap()
    }

    /// Each live record, and when its connection began.
    fn read(queue: &Queue) -> BTreeMap<u64, u64> {
        let out = replay(&queue.payloads().unwrap(), queue.messages()).unwrap();
        assert_eq!(out.refused, 0);
        out.records.iter().map(|record| (record.id, record.start)).collect()
    }

    #[test]
    fn what_lives_is_in_the_queue_at_every_moment_and_little_else() {
        let queue = Queue::new().unwrap();
        let journal = Journal::new(second(&queue), Vec::new(), &HashSet::new());
        let mut live: BTreeMap<u64, (JournalEntry, OwnedFd)> = BTreeMap::new();
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
                    let entry = journal.keep(round, RecordBody::Listener(&fd, None)).unwrap();
                    live.insert(entry.id, (entry, fd));
                }
                (6..8, Some(one)) => {
                    let (entry, fd) = &live[&one];
                    assert!(entry.write(RecordBody::Listener(fd, None), REFUSE_UPDATES_AT));
                }
                (8, Some(one)) => {
                    let (entry, _) = live.remove(&one).unwrap();
                    assert!(Box::new(entry).forget());
                }
                (_, Some(one)) => drop(live.remove(&one)),
                (_, None) => {}
            }
            let records = lock(&journal.index).records;
            assert!(records <= 2 * live.len() + SLACK + 1, "{records} for {}", live.len());
            if round % 20 == 0 {
                let messages = queue.payloads().unwrap();
                assert_eq!(messages.len(), lock(&journal.index).messages.len());
                let there = read(&queue);
                assert!(live.keys().all(|id| there.contains_key(id)), "{round}");
            }
        }
        // Written by one process, read and continued by the next.
        let out = replay(&queue.payloads().unwrap(), queue.messages()).unwrap();
        let current: Vec<_> = live.keys().copied().collect();
        let next = Journal::new(second(&queue), out.messages, &current.iter().copied().collect());
        assert_eq!(lock(&next.index).descriptors, lock(&journal.index).descriptors);
        live.into_values().for_each(|(entry, _)| entry.detach());
        let entry: Vec<_> = current.iter().map(|id| next.entry(*id, 0).own()).collect();
        while next.clean_step(u64::MAX) {}
        assert_eq!(read(&queue).into_keys().collect::<Vec<_>>(), current);
        assert_eq!(lock(&next.index).records, current.len());
        drop(entry);
        assert!(queue.payloads().unwrap().is_empty());
        assert_eq!(next.live(), 0);
    }

    #[test]
    fn what_is_forgotten_does_not_come_back() {
        let queue = Queue::new().unwrap();
        let journal = Journal::new(second(&queue), Vec::new(), &HashSet::new());
        let fds: Vec<_> = (0..3).map(|_| listener()).collect();
        let keep = |fd| journal.keep(0, RecordBody::Listener(fd, None)).unwrap();
        let [first, middle, _last] = [&fds[0], &fds[1], &fds[2]].map(keep);
        let id = middle.id;
        // Behind one that lives, where it can't be taken out.
        assert!(Box::new(middle).forget());
        assert!(!read(&queue).contains_key(&id));
        drop(first);
        assert!(!read(&queue).contains_key(&id));
        let first = lock(&journal.index).first;
        assert!(!journal.clean_step(first), "the round is over");
        while journal.clean_step(u64::MAX) {}
        assert_eq!(read(&queue).len(), 1);
    }

    #[test]
    fn a_record_that_changes_often_is_written_beside_full_messages() {
        let queue = Queue::new().unwrap();
        set_socket_send_buffer_size(queue.ends()[1], 32 * 1024).unwrap();
        let journal = Journal::new(second(&queue), Vec::new(), &HashSet::new());
        // Without descriptors: those in flight are limited for all tests together.
        let body = || RecordBody::<OwnedFd>::Nothing;
        while lock(&journal.index).fullness(&journal.queue) < COMPACT_AT {
            journal.append((0..RECORDS_MAX).map(|_| (0, body())).collect()).unwrap();
        }
        let entry = journal.entry(0, 0);
        assert!((0..200).all(|_| entry.write(body(), REFUSE_NEW_AT)));
    }

    #[test]
    fn a_queue_that_fills_has_many_records_in_a_message() {
        let queue = Queue::new().unwrap();
        set_socket_send_buffer_size(queue.ends()[1], 32 * 1024).unwrap();
        let journal = Journal::new(second(&queue), Vec::new(), &HashSet::new());
        let fd = listener();
        let keep = || journal.keep(0, RecordBody::Client(&fd));
        let mut entries: Vec<_> = std::iter::from_fn(keep).collect();
        assert_eq!(journal.live(), entries.len());
        let messages = queue.payloads().unwrap().len();
        assert!(entries.len() > 4 * messages, "{} in {messages} messages", entries.len());
        // There is room for listeners, and for changes of what is stored.
        let listener = journal.keep(0, RecordBody::Listener(&fd, None));
        assert!(listener.is_some());
        for entry in &entries {
            assert!(entry.write(RecordBody::Client(&fd), REFUSE_UPDATES_AT));
        }
        assert!(Box::new(entries.pop().unwrap()).forget());
        entries.truncate(entries.len() / 2);
        assert!(keep().is_some());
    }

    #[test]
    fn descriptors_in_flight_limit_what_is_stored() {
        let journal = Journal::new(Queue::new().unwrap(), Vec::new(), &HashSet::new());
        lock(&journal.index).descriptors_max = 40;
        let fd = listener();
        let keep = || journal.keep(0, RecordBody::Client(&fd));
        let entries: Vec<_> = std::iter::from_fn(keep).collect();
        assert_eq!(entries.len(), 40 * REFUSE_NEW_AT / 100);
        journal.clear();
        assert_eq!(journal.live(), 0);
        assert!(keep().is_some());
    }
}
