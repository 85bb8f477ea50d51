//! Reads what the previous process left in the queue.

use std::collections::{HashMap, HashSet};
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use crate::handover::encoding::{FDS_PER_RECORD, Record, RecordBody, decode, record_ids};
use crate::handover::index::MessageInfo;
use crate::handover::journal::{Journal, JournalEntry};
use crate::handover::queue::Message;
use crate::handover::verify::{is_over, verified};
use crate::listen::stored::StoredListener;
use crate::socket::file_id::FileId;

/// What the previous process left.
#[derive(Debug, Default)]
pub struct Leftovers {
    /// Listening sockets that it had opened.
    pub listeners: Vec<StoredListener>,
    /// Their records. Those of listeners that this process uses are stored again.
    pub listener_entries: Vec<JournalEntry>,
    /// Clients and forwarders, and their records in the journal (crash mode).
    pub connections: Vec<(Record<OwnedFd>, Option<JournalEntry>)>,
    /// The number of records that cannot be restored.
    pub refused: usize,
}

impl Leftovers {
    /// Sorts records by what they are. With a `journal` (crash mode) they stay in it; in restart
    /// mode they stay in the queue until all of them are taken.
    pub fn new(
        records: Vec<Record<OwnedFd>>,
        refused: usize,
        journal: Option<&Arc<Journal>>,
    ) -> Self {
        let mut all = Self { refused, ..Self::default() };
        for record in records {
            let entry = journal.map(|journal| journal.entry(record.id, record.start));
            if let RecordBody::Listener(fd, file) = record.body {
                all.listeners.push(StoredListener { fd, file });
                all.listener_entries.extend(entry);
            } else {
                all.connections.push((record, entry));
            }
        }
        all
    }

    /// Returns the number of the connections' descriptors.
    pub fn descriptors(&self) -> usize {
        self.connections.iter().map(|(record, _)| record.body.fds().len()).sum()
    }
}

/// The contents of a queue.
#[derive(Debug, Default)]
pub struct Replay {
    pub messages: Vec<MessageInfo>,
    /// The live records, without those of connections that have ended.
    pub records: Vec<Record<OwnedFd>>,
    /// Their sockets, pipes and files.
    pub files: HashSet<FileId>,
    /// The number of records that cannot be restored.
    pub refused: usize,
}

/// Returns the last record of each id. Refuses a record that shares a file with another one.
///
/// The payloads decide which records are live: a record whose descriptors are missing does not
/// bring an older one back, and only the descriptors of live records are open at a time.
///
/// # Errors
/// When a message cannot be read.
pub fn replay(
    payloads: &[Vec<u8>],
    messages: impl Iterator<Item = io::Result<Message>>,
) -> io::Result<Replay> {
    let mut out = Replay::default();
    let mut last = HashMap::new();
    for (number, payload) in payloads.iter().enumerate() {
        let record_ids = record_ids(payload);
        out.refused += usize::from(record_ids.is_none());
        let record_ids = record_ids.unwrap_or_default();
        last.extend(record_ids.iter().map(|id| (*id, number)));
        // At most so many, until the message is read.
        let descriptors = record_ids.len() * FDS_PER_RECORD;
        out.messages.push(MessageInfo { record_ids, descriptors });
    }
    for (number, message) in messages.take(payloads.len()).enumerate() {
        let message = message?;
        let is_last = |id: &u64| last.get(id) == Some(&number);
        let info = &mut out.messages[number];
        if message.is_whole {
            info.descriptors = message.fds.len();
        }
        let records = decode(&message.bytes, message.fds).filter(|_| message.is_whole);
        let Some(records) = records else {
            out.refused += info.record_ids.iter().filter(|id| is_last(id)).count();
            continue;
        };
        for record in records.into_iter().filter(|record| is_last(&record.id())) {
            match verified(record) {
                Some((record, _)) if is_over(&record.body) => {}
                Some((record, files)) if out.files.is_disjoint(&files) => {
                    out.files.extend(files);
                    out.records.push(record);
                }
                _ => out.refused += 1,
            }
        }
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::os::fd::{AsFd, BorrowedFd};

    use rustix::io::Errno;
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
    use rustix::pipe::{PipeFlags, pipe_with};

    use super::*;
    use crate::forward::snapshot::{
        BufferedSnapshot, EndpointSnapshot, FlowSnapshot, FlowState, Side, Snapshot,
    };
    use crate::handover::encoding::{RECORDS_MAX, SealedRecord, encode_message};

    /// The same for the same seed; and the peers of the sockets, which say nothing.
    struct Dice(u64, Vec<OwnedFd>);

    impl Dice {
        fn below(&mut self, sides: usize) -> usize {
            self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (self.0 >> 33) as usize % sides
        }

        fn says(&mut self) -> bool {
            self.below(2) == 0
        }
    }

    fn socket(dice: &mut Dice) -> OwnedFd {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let (one, other) =
            socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None).unwrap();
        dice.1.push(other);
        one
    }

    fn record(id: u64, dice: &mut Dice) -> Record<OwnedFd> {
        let body = match dice.below(4) {
            0 => RecordBody::Client(socket(dice)),
            _ => RecordBody::Forwarder(Box::new(pair(dice))),
        };
        Record { id, start: dice.below(1000) as u64, body }
    }

    fn pair(dice: &mut Dice) -> Snapshot<OwnedFd> {
        let mut flow = || {
            let states =
                [FlowState::Ended, FlowState::SourceReset, FlowState::SinkClosed { lost: true }];
            let state = if dice.says() { FlowState::Open } else { states[dice.below(3)] };
            let buffered = match dice.below(3) {
                0 => BufferedSnapshot::Nothing,
                1 if state == FlowState::Open => {
                    let file = tempfile::tempfile().unwrap();
                    file.set_len(1 + dice.below(100) as u64).unwrap();
                    BufferedSnapshot::Copied(file.into())
                }
                _ => {
                    let (read, write) = pipe_with(PipeFlags::NONBLOCK).unwrap();
                    BufferedSnapshot::Piped { read, write }
                }
            };
            FlowSnapshot { state, delivered: dice.below(1 << 30) as u64, buffered }
        };
        let flows = [flow(), flow()];
        let mut end =
            || EndpointSnapshot { socket: socket(dice), reset: dice.says(), gone: dice.says() };
        let endpoints = [end(), end()];
        let side = if dice.says() { Side::Client } else { Side::Backend };
        let fault = dice.says().then_some((side, Errno::CONNRESET.raw_os_error()));
        Snapshot { endpoints, flows, header_len: dice.below(300) as u16, fault }
    }

    /// All that a record says, descriptors as the kernel knows them.
    fn describe(record: &Record<OwnedFd>) -> String {
        let described = match &record.body {
            RecordBody::Forwarder(pair) => {
                let flow = |it: &FlowSnapshot<OwnedFd>| (it.state, it.delivered);
                let end = |it: &EndpointSnapshot<OwnedFd>| (it.reset, it.gone);
                let flows = pair.flows.each_ref().map(flow);
                format!(
                    "{:?}",
                    (flows, pair.endpoints.each_ref().map(end), pair.header_len, pair.fault)
                )
            }
            _ => "client".into(),
        };
        format!("{} {described} {:?}", record.start, file_ids(record))
    }

    fn file_ids(record: &Record<OwnedFd>) -> Vec<FileId> {
        record.body.fds().into_iter().map(|fd| FileId::of(fd).unwrap()).collect()
    }

    fn seal(record: &Record<OwnedFd>) -> SealedRecord<BorrowedFd<'_>> {
        record.map_fds(AsFd::as_fd).seal()
    }

    fn messages(sealed: &[SealedRecord<BorrowedFd<'_>>], dice: &mut Dice) -> Vec<Message> {
        let mut messages = Vec::new();
        let mut rest = sealed;
        while !rest.is_empty() {
            let (batch, later) = rest.split_at(1 + dice.below(rest.len().min(RECORDS_MAX)));
            let (bytes, fds) = encode_message(batch);
            let fds = fds.iter().map(|fd| fd.try_clone_to_owned().unwrap()).collect();
            messages.push(Message { bytes, fds, is_whole: true });
            rest = later;
        }
        messages
    }

    fn sorted(messages: Vec<Message>) -> Replay {
        let payloads: Vec<_> = messages.iter().map(|message| message.bytes.clone()).collect();
        replay(&payloads, messages.into_iter().map(Ok)).unwrap()
    }

    #[test]
    fn what_can_not_be_read_does_not_make_older_ones_count() {
        let mut dice = Dice(4, Vec::new());
        let (first, last) = (record(7, &mut dice), record(7, &mut dice));
        let message = |record: &Record<OwnedFd>| {
            let sealed = [seal(record)];
            let (bytes, fds) = encode_message(&sealed);
            let fds = fds.iter().map(|fd| fd.try_clone_to_owned().unwrap()).collect();
            Message { bytes, fds, is_whole: true }
        };
        let spoils: [fn(&mut Message); 3] = [
            |message| message.is_whole = false,
            |message| message.fds.clear(),
            // Another version, whose forms are longer.
            |message| {
                message.bytes[2] = 9;
                message.bytes.extend([0; 16]);
            },
        ];
        for spoil in spoils {
            let mut messages = vec![message(&first), message(&last)];
            spoil(&mut messages[1]);
            let out = sorted(messages);
            assert_eq!((out.refused, out.records.len()), (1, 0));
        }
        let mut unread = message(&first);
        unread.is_whole = false;
        assert_eq!(sorted(vec![unread]).messages[0].descriptors, FDS_PER_RECORD);
    }

    #[test]
    fn listeners_do_not_count_as_connections() {
        let mut dice = Dice(5, Vec::new());
        let records = [
            RecordBody::Client(socket(&mut dice)),
            RecordBody::Listener(socket(&mut dice), None),
            RecordBody::Client(socket(&mut dice)),
        ]
        .map(|body| Record { id: 1, start: 0, body });
        let leftovers = Leftovers::new(records.into(), 0, None);
        assert_eq!((leftovers.listeners.len(), leftovers.descriptors()), (1, 2));
    }

    #[test]
    fn a_socket_belongs_to_one_record() {
        let mut dice = Dice(6, Vec::new());
        let shared = socket(&mut dice);
        let client = |id| Record { id, start: 0, body: RecordBody::Client(shared.as_fd()) }.seal();
        let out = sorted(messages(&[1, 2].map(client), &mut dice));
        assert_eq!((out.records.len(), out.refused), (1, 1));
    }

    #[test]
    fn what_was_stored_comes_back_as_it_was() {
        let mut dice = Dice(1, Vec::new());
        for _ in 0..50 {
            let records: Vec<_> = (0..20).map(|id| record(id, &mut dice)).collect();
            let sealed: Vec<_> = records.iter().map(seal).collect();
            let out = sorted(messages(&sealed, &mut dice));
            assert_eq!(out.refused, 0);
            let back: Vec<_> = out.records.iter().map(describe).collect();
            assert_eq!(back, records.iter().map(describe).collect::<Vec<_>>());
        }
    }

    #[test]
    fn the_last_of_a_number_counts_and_nothing_is_nothing() {
        let mut dice = Dice(2, Vec::new());
        let first = record(7, &mut dice);
        let last = record(7, &mut dice);
        let gone = record(8, &mut dice);
        let forgotten = Record { id: 8, start: 0, body: RecordBody::Nothing };
        let sealed = [&first, &gone, &last, &forgotten].map(seal);
        let out = sorted(messages(&sealed, &mut dice));
        assert_eq!((out.refused, out.records.len()), (0, 1));
        assert_eq!(describe(&out.records[0]), describe(&last));
    }

    #[test]
    fn whatever_was_done_to_it_a_connection_is_as_it_was_or_refused() {
        let mut dice = Dice(3, Vec::new());
        for _ in 0..1000 {
            dice.1.clear();
            let mut records: Vec<_> = (0..12).map(|id| record(id, &mut dice)).collect();
            // Some were stored twice, as they were before and as they are.
            records.extend((0..4).map(|id| record(id, &mut dice)));
            let were: BTreeMap<_, _> = records.iter().map(|it| (describe(it), it.id)).collect();
            let sealed: Vec<_> = records.iter().map(seal).collect();
            let mut messages = messages(&sealed, &mut dice);
            for _ in 0..dice.below(6) {
                damage(&mut messages, &mut dice);
            }
            let out = sorted(messages);
            let mut seen = HashSet::new();
            for record in &out.records {
                assert_eq!(were.get(&describe(record)), Some(&record.id), "it is another");
                let files: HashSet<_> = file_ids(record).into_iter().collect();
                assert!(files.into_iter().all(|it| seen.insert(it)), "it is two");
            }
        }
    }

    /// Changes messages as nothing should: bytes, descriptors, their order, their number.
    fn damage(messages: &mut Vec<Message>, dice: &mut Dice) {
        if messages.is_empty() {
            return;
        }
        let (one, other) = (dice.below(messages.len()), dice.below(messages.len()));
        let copy = |fd: &OwnedFd| fd.try_clone().unwrap();
        match dice.below(10) {
            0 => messages.swap(one, other),
            1 => drop(messages.remove(one)),
            2 => {
                let Message { bytes, fds, is_whole } = &messages[one];
                let fds = fds.iter().map(copy).collect();
                let again = Message { bytes: bytes.clone(), fds, is_whole: *is_whole };
                messages.insert(other, again);
            }
            3 => {
                let bytes = &mut messages[one].bytes;
                let at = dice.below(bytes.len());
                bytes[at] ^= 1 << dice.below(8);
            }
            4 => {
                let bytes = &mut messages[one].bytes;
                bytes.truncate(dice.below(bytes.len()) + 1);
            }
            5 => {
                let fds = &mut messages[one].fds;
                let places = usize::from(!fds.is_empty());
                fds.rotate_left(places);
            }
            6 => drop(messages[one].fds.pop()),
            8 => messages[one].is_whole = false,
            7 => {
                // Descriptors of two messages change places.
                let taken = std::mem::take(&mut messages[one].fds);
                messages[one].fds = std::mem::replace(&mut messages[other].fds, taken);
            }
            _ => {
                let fd = messages[other].fds.first().map(copy);
                if let Some((place, fd)) = messages[one].fds.last_mut().zip(fd) {
                    *place = fd;
                }
            }
        }
    }
}
