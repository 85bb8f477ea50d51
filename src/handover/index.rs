//! The index of the queue: its messages, and which of their records are live.
//!
//! When more than half of the records are superseded, or the queue is half full, the live ones are
//! appended again, many to a message, and the head is dropped (compaction). So the queue holds at
//! most twice the live records, and a little more. Compaction checks the index against the queue.

use std::collections::{HashMap, HashSet, VecDeque};
use std::os::fd::AsFd;
use std::time::Duration;

use rustix::io::Errno;
use rustix::process::{Resource, getrlimit};

use crate::handover::encoding::{RECORDS_MAX, SealedRecord, decode, encode_message, record_ids};
use crate::handover::queue::Queue;
use crate::logging::{RateLimit, rate_limited};

/// The messages and the records in the queue.
#[derive(Debug, Default)]
pub struct Index {
    /// The messages of the queue.
    pub messages: VecDeque<MessageInfo>,
    /// The number of the first message in the queue: so many were dropped.
    pub first: u64,
    /// The number of the message that holds the live record of each id.
    pub live: HashMap<u64, u64>,
    /// Records in the queue. A message without records counts for one.
    pub records: usize,
    /// Descriptors in the queue.
    pub descriptors: usize,
    /// The most descriptors that may be in flight: `RLIMIT_NOFILE` (unix(7)).
    pub descriptors_max: usize,
}

/// What is in a message of the queue.
#[derive(Debug)]
pub struct MessageInfo {
    pub record_ids: Vec<u64>,
    pub descriptors: usize,
}

impl Index {
    /// Creates the index of a queue with these messages, of whose records these are `live`.
    pub fn new(messages: Vec<MessageInfo>, live: &HashSet<u64>) -> Self {
        let limit = getrlimit(Resource::Nofile).current;
        let descriptors_max = limit.map_or(usize::MAX, |limit| limit as usize).max(1);
        let mut index = Self { descriptors_max, ..Self::default() };
        for message in messages {
            let number = index.next_number();
            for id in message.record_ids.iter().filter(|id| live.contains(id)) {
                index.live.insert(*id, number);
            }
            index.push(message);
        }
        index
    }

    /// Returns the number of the next message.
    pub fn next_number(&self) -> u64 {
        self.first + self.messages.len() as u64
    }

    /// Appends one message. Its records become live.
    ///
    /// # Errors
    /// Those of [`Queue::append`].
    pub fn append<Fd: AsFd>(
        &mut self,
        queue: &Queue,
        records: &[SealedRecord<Fd>],
    ) -> Result<(), Errno> {
        let (bytes, fds) = encode_message(records);
        queue.append(&bytes, &fds)?;
        let number = self.next_number();
        let record_ids: Vec<_> = records.iter().map(SealedRecord::id).collect();
        self.live.extend(record_ids.iter().map(|id| (*id, number)));
        self.push(MessageInfo { record_ids, descriptors: fds.len() });
        Ok(())
    }

    fn push(&mut self, message: MessageInfo) {
        self.records += message.record_ids.len().max(1);
        self.descriptors += message.descriptors;
        self.messages.push_back(message);
    }

    fn pop(&mut self, queue: &Queue) -> bool {
        if !queue.pop() {
            return false;
        }
        if let Some(message) = self.messages.pop_front() {
            self.first += 1;
            self.records -= message.record_ids.len().max(1);
            self.descriptors -= message.descriptors;
        }
        true
    }

    /// Returns how full the queue is, in percent of its bytes or of the descriptors that may be in
    /// flight.
    pub fn fullness(&self, queue: &Queue) -> usize {
        queue.fullness().max(self.descriptors * 100 / self.descriptors_max)
    }

    /// Whether superseded records are in the queue.
    pub fn has_superseded(&self) -> bool {
        self.records > self.live.len()
    }

    /// Whether compaction drops superseded records, or puts the live ones into fewer messages.
    pub fn is_worth_compacting(&self) -> bool {
        let messages = self.live.len().div_ceil(RECORDS_MAX) * 2 + 1;
        self.has_superseded() || self.messages.len() > messages
    }

    /// Drops superseded messages at the head. Compacts where more than half of the records are
    /// superseded.
    pub fn drop_superseded(&mut self, queue: &Queue) {
        if self.records > 2 * self.live.len() + SLACK {
            self.compact(queue);
        }
        let is_first_superseded = |index: &Self| {
            index.messages.front().is_some_and(|message| index.is_superseded(message, index.first))
        };
        while is_first_superseded(self) && self.pop(queue) {}
    }

    /// Whether all records of the message with this number are superseded.
    fn is_superseded(&self, message: &MessageInfo, number: u64) -> bool {
        !message.record_ids.iter().any(|id| self.live.get(id) == Some(&number))
    }

    /// Appends the live records of the first messages in one message, and drops those messages.
    /// Returns whether that succeeded.
    pub fn compact(&mut self, queue: &Queue) -> bool {
        let mut messages = queue.messages();
        let mut live = Vec::new();
        let mut seen = 0;
        for (number, info) in (self.first..).zip(&self.messages) {
            let records = live.len() + info.record_ids.len();
            if live.len() >= RECORDS_MAX || records > 2 * RECORDS_MAX {
                break;
            }
            let Some(Ok(message)) = messages.next() else { return false };
            if record_ids(&message.bytes).unwrap_or_default() != info.record_ids {
                rate_limited!(
                    DIFFERS,
                    error,
                    "Failed to compact the descriptor store: another process has changed it. \
                     (Restart the service to read it again.)"
                );
                return false;
            }
            match decode(&message.bytes, message.fds) {
                Some(records) if message.is_whole => {
                    let is_live = |it: &SealedRecord<_>| self.live.get(&it.id()) == Some(&number);
                    live.extend(records.into_iter().filter(is_live));
                }
                // There may be no descriptors left for a moment.
                _ if !self.is_superseded(info, number) => return false,
                _ => {}
            }
            seen += 1;
        }
        // Appended first, so that each record is in the queue at every moment.
        if !live.is_empty() && self.append(queue, &live).is_err() {
            return false;
        }
        (0..seen).all(|_| self.pop(queue))
    }
}

/// Superseded records below which compaction is not worth it.
pub const SLACK: usize = 32;

static DIFFERS: RateLimit = RateLimit::new(1, Duration::from_secs(600));

#[cfg(test)]
mod tests {
    use super::*;
    use crate::handover::encoding::{Record, RecordBody};

    fn listener() -> std::net::TcpListener {
        std::net::TcpListener::bind("127.0.0.1:0").unwrap()
    }

    #[test]
    fn a_message_that_cannot_be_read_stays_while_it_has_a_live_record() {
        let fd = listener();
        let record = Record { id: 5, start: 0, body: RecordBody::Client(&fd) }.seal();
        let (bytes, _) = encode_message(&[record]);
        for live in [[].into(), [5].into()] {
            let queue = Queue::new().unwrap();
            // Without its descriptor.
            queue.append(&bytes, &[]).unwrap();
            let message = MessageInfo { record_ids: vec![5], descriptors: 1 };
            let is_dropped = Index::new(vec![message], &live).compact(&queue);
            assert_eq!(is_dropped, live.is_empty());
            assert_eq!(queue.payloads().unwrap().is_empty(), is_dropped);
        }
    }

    #[test]
    fn compaction_is_worth_it_for_many_messages_or_a_superseded_record() {
        let ids: Vec<_> = (0..3 * RECORDS_MAX as u64).collect();
        let mut live: HashSet<_> = ids.iter().copied().collect();
        let is_worth = |in_a_message: usize, live: &HashSet<u64>| {
            let message = |ids: &[u64]| MessageInfo { record_ids: ids.to_vec(), descriptors: 0 };
            Index::new(ids.chunks(in_a_message).map(message).collect(), live).is_worth_compacting()
        };
        // Seven messages and nine, where three would do.
        assert!(!is_worth(6, &live));
        assert!(is_worth(5, &live));
        live.remove(&0);
        assert!(is_worth(RECORDS_MAX, &live));
    }

    #[test]
    fn more_superseded_records_than_live_ones_are_compacted() {
        let (fd, queue) = (listener(), Queue::new().unwrap());
        let mut index = Index::new(Vec::new(), &HashSet::new());
        let append = |index: &mut Index, id: u64| {
            let record = Record { id, start: 0, body: RecordBody::Client(&fd) }.seal();
            index.append(&queue, &[record]).unwrap();
            index.drop_superseded(&queue);
        };
        // The first stays live, so that nothing is dropped at the head.
        (1..=3).for_each(|id| append(&mut index, id));
        while index.records < 2 * 3 + SLACK {
            append(&mut index, 3);
            assert_eq!(index.first, 0);
        }
        append(&mut index, 3);
        assert!(index.first > 0);
    }

    #[test]
    fn no_message_grows_too_long_to_be_read() {
        let fd = listener();
        // Messages of one record, and a last one of so many.
        for (last, lens) in [
            (RECORDS_MAX + 1, vec![2 * RECORDS_MAX]),
            (RECORDS_MAX + 2, vec![RECORDS_MAX + 2, RECORDS_MAX - 1]),
        ] {
            let queue = Queue::new().unwrap();
            let mut index = Index::new(Vec::new(), &HashSet::new());
            let ids: Vec<_> = (0..(RECORDS_MAX - 1 + last) as u64).collect();
            let (singles, rest) = ids.split_at(RECORDS_MAX - 1);
            for message in singles.chunks(1).chain([rest]) {
                let record =
                    |id: &u64| Record { id: *id, start: 0, body: RecordBody::Client(&fd) }.seal();
                index.append(&queue, &message.iter().map(record).collect::<Vec<_>>()).unwrap();
            }
            assert!(index.compact(&queue));
            let found: Vec<_> = queue.messages().map(|it| it.unwrap().fds.len()).collect();
            assert_eq!(found, lens);
        }
    }
}
