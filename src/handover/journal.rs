//! The journal of `--handover=crash`: the records of all live connections, and where each stands in the queue.
//!
//! The queue is an append-only log: each change appends a new record, and the last record of an id wins.
//! Superseded records at the head are dropped. When more than half of the records are superseded, or the
//! queue becomes full, the live ones are appended again, many to a message, and the head is dropped. So the
//! queue holds at most twice the live records, and a little more.
//!
//! The index says what is in the queue, message by message. It is compared with the queue whenever that is read.

use std::collections::{HashMap, HashSet, VecDeque};
use std::convert::Infallible;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::io::Errno;
use rustix::process::{Resource, getrlimit};
use rustix::time::{ClockId, clock_gettime};
use tokio::sync::Notify;
use tokio::task::yield_now;
use tokio::time::sleep;

use crate::forward::snapshot::{FdRef, Snapshot, SnapshotStore};
use crate::handover::queue::Queue;
use crate::handover::record::{
    EncodedRecord, FDS_PER_RECORD, RECORDS_MAX, Record, RecordBody, decode, encode_message,
    record_ids,
};
use crate::logging::RateLimit;

/// Superseded records below which compaction is not worth it.
const SLACK: usize = 32;

/// Percent of the queue's bytes, or of the descriptors that may be under way, from which on it is packed;
/// from which on nobody new is stored; and from which on only what makes room is written.
const COMPACT_AT: usize = 50;
const REFUSE_NEW_AT: usize = 75;
const REFUSE_UPDATES_AT: usize = 90;

/// How long what does not count may stay at most, but for the time it takes.
const CLEANED_AFTER: Duration = Duration::from_secs(5);

static DIFFERS: RateLimit = RateLimit::new(1, Duration::from_secs(600));
static IS_FULL: RateLimit = RateLimit::new(1, Duration::from_secs(600));

/// The queue, and what is known of it.
#[derive(Debug)]
pub struct Journal {
    queue: Queue,
    next: AtomicU64,
    index: Mutex<Index>,
    /// Something does not count any more.
    outdated: Notify,
}

#[derive(Debug, Default)]
struct Index {
    /// The messages of the queue.
    messages: VecDeque<MessageInfo>,
    /// How many messages have been taken out: the number of the first.
    taken_out: u64,
    /// The message that holds the live record of each id.
    current: HashMap<u64, u64>,
    /// Records in the queue. A message without records counts for one.
    written: usize,
    /// Descriptors in it, and how many there may be.
    descriptors: usize,
    descriptors_max: usize,
}

/// A message, as it should be.
#[derive(Debug)]
struct MessageInfo {
    /// The ids of its records.
    record_ids: Vec<u64>,
    descriptors: usize,
}

/// A record that stays in the queue for as long as this lives.
#[derive(Debug)]
pub struct JournalEntry {
    journal: Arc<Journal>,
    id: u64,
    start: u64,
    /// Whether it is to be there when this is gone.
    stays: bool,
}

impl Journal {
    /// A journal over a queue with these messages, of whose records the `current` are live.
    pub fn new(queue: Queue, messages: Vec<Vec<u64>>, current: &HashSet<u64>) -> Arc<Self> {
        let next = messages.iter().flatten().max().map_or(0, |last| last + 1);
        let limit = getrlimit(Resource::Nofile).current;
        let descriptors_max = limit.map_or(usize::MAX / 100, |limit| limit as usize).max(1);
        let mut index = Index { descriptors_max, ..Index::default() };
        for record_ids in messages {
            let number = index.next_number();
            for id in record_ids.iter().filter(|id| current.contains(id)) {
                index.current.insert(*id, number);
            }
            index.note(MessageInfo { descriptors: record_ids.len() * FDS_PER_RECORD, record_ids });
        }
        let outdated = Notify::new();
        // What did not count when it was read.
        outdated.notify_one();
        Arc::new(Self { queue, next: next.into(), index: index.into(), outdated })
    }

    /// Keeps something new, if there is room. Some is left for listeners, and for changes of what is there.
    pub fn keep<Fd: AsFd>(
        self: &Arc<Self>,
        start: u64,
        body: RecordBody<Fd>,
    ) -> Option<JournalEntry> {
        let entry = self.entry(self.next.fetch_add(1, Ordering::Relaxed), start);
        let full = if matches!(body, RecordBody::Listener(..)) {
            REFUSE_UPDATES_AT
        } else {
            REFUSE_NEW_AT
        };
        if entry.write(body, full) {
            return Some(entry.own());
        }
        if let Some(suppressed) = IS_FULL.pass() {
            tracing::warn!(
                "The store is full, new connections are served and end with the proxy; raise \
                 LimitNOFILE=, or net.core.wmem_max, which counts after a stop.{suppressed}"
            );
        }
        None
    }

    /// What has this number in the queue; it stays there until it is taken over.
    pub fn entry(self: &Arc<Self>, id: u64, start: u64) -> JournalEntry {
        JournalEntry { journal: Arc::clone(self), id, start, stays: true }
    }

    /// Writes what is to be there when the process is gone, each with when it began, in one message:
    /// at most [`RECORDS_MAX`].
    ///
    /// # Errors
    /// When there is no room; then none of them is there.
    pub fn leave<Fd: AsFd>(&self, contents: Vec<(u64, RecordBody<Fd>)>) -> Result<(), Errno> {
        let id = || self.next.fetch_add(1, Ordering::Relaxed);
        let record = |(start, body)| Record { id: id(), start, body };
        let records: Vec<_> = contents.into_iter().map(record).collect();
        let encoded: Vec<_> = records.iter().map(Record::encode).collect();
        self.lock().write(&self.queue, &encoded)
    }

    /// Takes what does not count out before long, for ever: whoever holds a second reference to a socket
    /// keeps the kernel from closing it.
    pub async fn clean(&self) -> Infallible {
        loop {
            self.outdated.notified().await;
            sleep(CLEANED_AFTER).await;
            // Once round.
            let mut left = self.lock().messages.len();
            while left > 0 {
                // Not held while others run.
                let gone = self.lock().clean(&self.queue);
                let Some(gone) = gone else {
                    // What stands in the way may pass.
                    if self.lock().is_outdated() {
                        self.outdated.notify_one();
                    }
                    break;
                };
                left = left.saturating_sub(gone);
                yield_now().await;
            }
        }
    }

    /// Takes all out.
    pub fn clear(&self) {
        let mut index = self.lock();
        while self.queue.pop() {}
        *index = Index { descriptors_max: index.descriptors_max, ..Index::default() };
    }

    /// Live records.
    pub fn live(&self) -> usize {
        self.lock().current.len()
    }

    /// After a change.
    fn maintain(&self, index: &mut Index) {
        index.tidy(&self.queue);
        if index.is_outdated() {
            self.outdated.notify_one();
        }
    }

    fn lock(&self) -> MutexGuard<'_, Index> {
        self.index.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl JournalEntry {
    /// From now on it is there for as long as this lives, and no longer.
    pub fn own(mut self) -> Self {
        self.stays = false;
        self
    }

    /// Lets it stay there.
    pub fn leave(mut self) {
        self.stays = true;
    }

    /// Writes it, unless the queue is as full as that, even when it is packed.
    fn write<Fd: AsFd>(&self, body: RecordBody<Fd>, full: usize) -> bool {
        let record = Record { id: self.id, start: self.start, body };
        let encoded = [record.encode()];
        let queue = &self.journal.queue;
        let mut index = self.journal.lock();
        let mut fullness = index.fullness(queue);
        for _ in 0..index.packs_for(fullness) {
            if !index.pack_if_worth_it(queue) {
                break;
            }
            fullness = index.fullness(queue);
        }
        let is_written = fullness < full && index.write(queue, &encoded).is_ok();
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
        self.leave();
    }
}

impl Drop for JournalEntry {
    fn drop(&mut self) {
        if !self.stays {
            let mut index = self.journal.lock();
            index.current.remove(&self.id);
            self.journal.maintain(&mut index);
        }
    }
}

impl Index {
    fn next_number(&self) -> u64 {
        self.taken_out + self.messages.len() as u64
    }

    fn write<Fd: AsFd>(
        &mut self,
        queue: &Queue,
        records: &[EncodedRecord<Fd>],
    ) -> Result<(), Errno> {
        let (bytes, fds) = encode_message(records);
        queue.append(&bytes, &fds)?;
        let number = self.next_number();
        let record_ids: Vec<_> = records.iter().map(EncodedRecord::id).collect();
        self.current.extend(record_ids.iter().map(|id| (*id, number)));
        self.note(MessageInfo { record_ids, descriptors: fds.len() });
        Ok(())
    }

    fn note(&mut self, message: MessageInfo) {
        self.written += message.record_ids.len().max(1);
        self.descriptors += message.descriptors;
        self.messages.push_back(message);
    }

    /// In percent, of bytes or of descriptors.
    fn fullness(&self, queue: &Queue) -> usize {
        queue.fullness().max(self.descriptors * 100 / self.descriptors_max)
    }

    /// How much to pack before a message is written: the more, the fuller it is, so that all of it has
    /// been gone through before it is full; then all of it, once.
    fn packs_for(&self, fullness: usize) -> usize {
        match fullness {
            0..COMPACT_AT => 0,
            COMPACT_AT..REFUSE_NEW_AT => 2,
            REFUSE_NEW_AT..REFUSE_UPDATES_AT => 4,
            _ => self.messages.len(),
        }
    }

    fn is_outdated(&self) -> bool {
        self.written > self.current.len()
    }

    /// Takes out what does not count in front, and packs a little where half does not count.
    fn tidy(&mut self, queue: &Queue) {
        if self.written > 2 * self.current.len() + SLACK {
            self.compact(queue);
        }
        while self.first_is_over() && self.pop(queue) {}
    }

    /// Packs a little if anything does not count, or stands in more messages than it has to; whether
    /// that went.
    fn pack_if_worth_it(&mut self, queue: &Queue) -> bool {
        let messages = self.current.len().div_ceil(RECORDS_MAX) * 2 + 1;
        (self.is_outdated() || self.messages.len() > messages) && self.compact(queue)
    }

    fn first_is_over(&self) -> bool {
        self.messages.front().is_some_and(|message| self.is_over(message, self.taken_out))
    }

    /// Whether nothing of the message with this number counts.
    fn is_over(&self, message: &MessageInfo, number: u64) -> bool {
        !message.record_ids.iter().any(|id| self.current.get(id) == Some(&number))
    }

    fn pop(&mut self, queue: &Queue) -> bool {
        let is_out = queue.pop();
        if is_out && let Some(message) = self.messages.pop_front() {
            self.taken_out += 1;
            self.written -= message.record_ids.len().max(1);
            self.descriptors -= message.descriptors;
        }
        is_out
    }

    /// The same as [`Index::compact`], for whoever goes through all messages: of how many it has got rid.
    fn clean(&mut self, queue: &Queue) -> Option<usize> {
        let before = self.taken_out;
        (self.is_outdated() && self.compact(queue)).then(|| (self.taken_out - before) as usize)
    }

    /// Writes what counts of the first messages anew behind the last, and takes these out; whether
    /// that went.
    fn compact(&mut self, queue: &Queue) -> bool {
        let mut messages = queue.messages();
        let mut counts = Vec::new();
        let mut seen = 0;
        while counts.len() < RECORDS_MAX
            && let Some(noted) = self.messages.get(seen)
            && counts.len() + noted.record_ids.len() <= 2 * RECORDS_MAX
        {
            let Some(Ok(message)) = messages.next() else { return false };
            let number = self.taken_out + seen as u64;
            if record_ids(&message.bytes).unwrap_or_default() != noted.record_ids {
                if let Some(suppressed) = DIFFERS.pass() {
                    tracing::error!(
                        "The store is not as it was left, and is cleaned no more; restart to have it read \
                         anew.{suppressed}"
                    );
                }
                return false;
            }
            match decode(&message.bytes, message.fds) {
                Ok(records) if message.is_whole => {
                    let is_current =
                        |it: &EncodedRecord<_>| self.current.get(&it.id()) == Some(&number);
                    counts.extend(records.into_iter().filter(is_current));
                }
                // There may be no descriptors left for a moment.
                _ if !self.is_over(noted, number) => return false,
                _ => {}
            }
            seen += 1;
        }
        // At first behind the rest, so that it is in the queue at every moment.
        if !counts.is_empty() && self.write(queue, &counts).is_err() {
            return false;
        }
        seen > 0 && (0..seen).all(|_| self.pop(queue))
    }
}

/// CLOCK_MONOTONIC in microseconds, as records have it.
pub fn monotonic_micros() -> u64 {
    let monotonic_micros = clock_gettime(ClockId::Monotonic);
    monotonic_micros.tv_sec as u64 * 1_000_000 + monotonic_micros.tv_nsec as u64 / 1000
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::os::fd::BorrowedFd;

    use super::*;
    use crate::handover::queue::Queue;
    use crate::handover::replay::replay;

    fn listener() -> OwnedFd {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        listener.into()
    }

    fn second(queue: &Queue) -> Queue {
        let [inner, sender] =
            queue.ends().map(|fd: BorrowedFd<'_>| fd.try_clone_to_owned().unwrap());
        Queue::from_ends(inner, sender)
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
            let records = journal.lock().written;
            assert!(records <= 2 * live.len() + SLACK + 1, "{records} for {}", live.len());
            if round % 20 == 0 {
                let messages = queue.payloads().unwrap();
                assert_eq!(messages.len(), journal.lock().messages.len());
                let there = read(&queue);
                assert!(live.keys().all(|id| there.contains_key(id)), "{round}");
            }
        }
        // Written by one process, read and continued by the next.
        let out = replay(&queue.payloads().unwrap(), queue.messages()).unwrap();
        let current: Vec<_> = live.keys().copied().collect();
        let next = Journal::new(second(&queue), out.messages, &current.iter().copied().collect());
        live.into_values().for_each(|(entry, _)| entry.leave());
        let entry: Vec<_> = current.iter().map(|id| next.entry(*id, 0).own()).collect();
        while next.lock().clean(&next.queue).is_some() {}
        assert_eq!(read(&queue).into_keys().collect::<Vec<_>>(), current);
        assert_eq!(next.lock().written, current.len());
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
        while journal.lock().clean(&journal.queue).is_some() {}
        assert_eq!(read(&queue).len(), 1);
    }
}
