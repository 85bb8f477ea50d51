//! The bytes of a message in the queue. What is stored of a connection is a [`Snapshot`]
//! (`forward::snapshot`), and with it the id and the start of the connection ([`Record`]). A client
//! without a backend, a session of datagrams and a listener are stored here, too ([`RecordBody`]).
//!
//! What the sockets themselves tell (addresses, options, bytes in their queues, FINs) is not
//! written down. A message is a header of [`HEADER_LEN`] bytes, with a version and a count, and the
//! *form* of each record: the bytes of a [`SealedRecord`] without descriptors, in the wire format
//! of `postcard`, padded with zeros to the longest of the message. The descriptors are beside the
//! bytes, in the order of the forms. A record is whole in one message, so records never share or
//! exchange descriptors.
//!
//! Messages are read as hostile input: what is not exactly as this program writes it is refused.
//! The checksum covers each descriptor's inode, which a socket or a pipe keeps wherever it is sent.
//! So a record with the descriptors of another does not open.

use std::collections::{HashMap, HashSet};
use std::hash::{Hash, Hasher};
use std::net::IpAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::slice::ChunksExact;

use fnv::FnvHasher;
use serde::{Deserialize, Serialize};

use crate::forward::snapshot::Snapshot;
use crate::limits::descriptors::FOR_HANDOVER;
use crate::socket::file_id::FileId;

/// Records written into one message. With the header and the kernel's own 320 bytes, 14 forms of 50
/// bytes fit into 1 KiB of kernel memory. Most have some 40 bytes.
pub const RECORDS_MAX: usize = 14;

/// Descriptors of a record at most: two sockets, and a pipe for each direction.
pub const FDS_PER_RECORD: usize = 6;

// While it restores, the next process holds the descriptors of one message and of one more record.
const _: () = assert!(FOR_HANDOVER >= 2 * RECORDS_MAX + FDS_PER_RECORD);

/// The length of the longest message that is read: compaction writes up to twice as many records.
pub const MESSAGE_MAX: usize = HEADER_LEN + 2 * RECORDS_MAX * FORM_MAX;

const HEADER_LEN: usize = 4;

/// The length of the longest form: a session whose client has the longest Unix name. That of a
/// connection has at most 67 bytes.
const FORM_MAX: usize = 185;

/// Raised with every change of a record, of a snapshot, or of a type in them: the bytes follow the
/// order of the declarations.
const VERSION: u8 = 4;

/// Ids stay below this, so `id + 1` never overflows.
const ID_MAX: u64 = 1 << 63;

/// A connection or a listener, with its descriptors, owned or borrowed.
#[derive(Debug, Serialize, Deserialize)]
pub struct Record<Fd> {
    /// Of several records with one id the last wins.
    #[serde(with = "postcard::fixint::le")]
    pub id: u64,
    /// When the connection began, CLOCK_MONOTONIC in microseconds.
    pub start: u64,
    pub body: RecordBody<Fd>,
}

/// What was stored.
#[derive(Debug, Serialize, Deserialize)]
pub enum RecordBody<Fd> {
    /// The record with this id is not to be restored.
    Nothing,
    /// A listening socket that the proxy opened, and its socket file.
    Listener(Fd, Option<FileId>),
    /// A client without a backend yet.
    Client(Fd),
    Forwarder(Box<Snapshot<Fd>>),
    Session(Box<SessionRecord<Fd>>),
}

/// A session of datagrams.
#[derive(Debug, Serialize, Deserialize)]
pub struct SessionRecord<Fd> {
    /// The socket to the backend.
    pub socket: Fd,
    /// The listener. It is the same socket in the next process.
    pub listener: FileId,
    /// The client's address as the kernel writes it.
    pub client: Vec<u8>,
    /// The address that the client sends to, and its interface, if the listener has several.
    pub local: Option<(IpAddr, u32)>,
    /// The backend has sent, the client has sent after that, and both go on.
    pub is_answered: bool,
    pub is_confirmed: bool,
    pub is_stream: bool,
}

impl<Fd> SessionRecord<Fd> {
    /// Returns the record with the result of `map` in place of its descriptor.
    pub fn map_fd<'a, T>(&'a self, map: impl FnOnce(&'a Fd) -> T) -> SessionRecord<T> {
        SessionRecord {
            socket: map(&self.socket),
            listener: self.listener,
            client: self.client.clone(),
            local: self.local,
            is_answered: self.is_answered,
            is_confirmed: self.is_confirmed,
            is_stream: self.is_stream,
        }
    }
}

impl<Fd> RecordBody<Fd> {
    /// Returns its descriptors in the order in which a message has them.
    pub fn fds(&self) -> Vec<&Fd> {
        let mut fds = Vec::new();
        self.map_fds(|fd| fds.push(fd));
        fds
    }

    /// Returns the body with the results of `map` in place of its descriptors.
    fn map_fds<'a, T>(&'a self, mut map: impl FnMut(&'a Fd) -> T) -> RecordBody<T> {
        match self {
            Self::Nothing => RecordBody::Nothing,
            Self::Listener(fd, file) => RecordBody::Listener(map(fd), *file),
            Self::Client(fd) => RecordBody::Client(map(fd)),
            Self::Forwarder(snapshot) => RecordBody::Forwarder(Box::new(snapshot.map_fds(map))),
            Self::Session(session) => RecordBody::Session(Box::new(session.map_fd(map))),
        }
    }
}

impl<Fd> Record<Fd> {
    /// Returns the record with the results of `map` in place of its descriptors.
    pub fn map_fds<'a, T>(&'a self, map: impl FnMut(&'a Fd) -> T) -> Record<T> {
        Record { id: self.id, start: self.start, body: self.body.map_fds(map) }
    }
}

impl<Fd: AsFd> Record<Fd> {
    /// Adds the checksum, for a message.
    pub fn seal(self) -> SealedRecord<Fd> {
        SealedRecord { checksum: self.checksum(), record: self }
    }

    /// Returns FNV-1a of the bytes and of each descriptor's inode.
    fn checksum(&self) -> [u8; 8] {
        let (mut hasher, mut fds) = (FnvHasher::default(), Vec::new());
        hasher.write(&to_bytes(&self.map_fds(|fd| fds.push(fd))));
        for fd in fds {
            // A descriptor without an inode is refused when the record is restored.
            FileId::of(fd).unwrap_or_default().hash(&mut hasher);
        }
        hasher.finish().to_ne_bytes()
    }
}

/// A record as it stands in a message, not verified.
#[derive(Debug, Serialize, Deserialize)]
pub struct SealedRecord<Fd> {
    record: Record<Fd>,
    checksum: [u8; 8],
}

impl<Fd> SealedRecord<Fd> {
    pub fn id(&self) -> u64 {
        self.record.id
    }

    /// Returns the record, whether or not it has its checksum.
    #[cfg(any(test, fuzzing))]
    pub fn unverified(&self) -> &Record<Fd> {
        &self.record
    }

    fn map_fds<'a, T>(&'a self, map: impl FnMut(&'a Fd) -> T) -> SealedRecord<T> {
        SealedRecord { record: self.record.map_fds(map), checksum: self.checksum }
    }
}

impl SealedRecord<OwnedFd> {
    /// Returns the record if it has its checksum, or else closes its descriptors.
    pub fn open(self) -> Option<Record<OwnedFd>> {
        (self.checksum == self.record.checksum()).then_some(self.record)
    }
}

/// Returns the bytes and the descriptors of one message.
pub fn encode_message<Fd: AsFd>(records: &[SealedRecord<Fd>]) -> (Vec<u8>, Vec<BorrowedFd<'_>>) {
    let (mut forms, mut fds) = (Vec::new(), Vec::new());
    for record in records {
        forms.push(to_bytes(&record.map_fds(|fd| fds.push(fd.as_fd()))));
    }
    let form_len = forms.iter().map(Vec::len).max().unwrap_or(0);
    let mut bytes = vec![b's', b'p', VERSION, records.len() as u8];
    for mut form in forms {
        form.resize(form_len, 0);
        bytes.extend(form);
    }
    (bytes, fds)
}

/// Returns the records of a message, not opened yet, or `None` if the message is not as this
/// version writes it, or does not have exactly the descriptors of its records.
pub fn decode(message: &[u8], fds: Vec<OwnedFd>) -> Option<Vec<SealedRecord<OwnedFd>>> {
    let forms = parse(message)?;
    if fds.len() != forms.iter().map(|form| form.record.body.fds().len()).sum() {
        return None;
    }
    let mut fds = fds.into_iter();
    let mut next_fd = |_| fds.next().expect("there are as many as in the forms");
    let records: Vec<_> = forms.iter().map(|form| form.map_fds(&mut next_fd)).collect();
    // postcard also reads numbers with needless bytes, and ignores what is in place of the zeros.
    (encode_message(&records).0 == message).then_some(records)
}

/// Returns the number of descriptors of the last records of each id, and the largest number in one
/// message. Messages of another version are not counted.
pub fn descriptors_of(messages: &[Vec<u8>]) -> (usize, usize) {
    let (mut last, mut most) = (HashMap::new(), 0);
    for message in messages {
        let mut all = 0;
        for form in parse(message).unwrap_or_default() {
            let count = form.record.body.fds().len();
            last.insert(form.id(), count);
            all += count;
        }
        most = most.max(all);
    }
    (last.values().sum(), most)
}

/// Returns the ids of the records in a message of any version, or `None` if it is not a message of
/// this program.
pub fn record_ids(message: &[u8]) -> Option<Vec<u64>> {
    let (_, forms) = split(message)?;
    let id = |form: &[u8]| form.first_chunk().map(|id| u64::from_le_bytes(*id));
    let ids: Vec<_> = forms.map(id).collect::<Option<_>>()?;
    let distinct: HashSet<_> = ids.iter().filter(|id| **id < ID_MAX).collect();
    (distinct.len() == ids.len()).then_some(ids)
}

/// Returns the forms of a message of this version.
fn parse(message: &[u8]) -> Option<Vec<SealedRecord<()>>> {
    let (VERSION, forms) = split(message)? else { return None };
    forms.map(|form| postcard::take_from_bytes(form).ok().map(|(record, _)| record)).collect()
}

/// Returns the version of a message, and the bytes of each form.
///
/// In all versions a form begins with its id, and the forms of a message are equally long.
fn split(message: &[u8]) -> Option<(u8, ChunksExact<'_, u8>)> {
    let (&[b's', b'p', version, count], forms) = message.split_first_chunk()? else { return None };
    let count = usize::from(count);
    let is_whole = (1..=2 * RECORDS_MAX).contains(&count) && forms.len() % count == 0;
    (is_whole && !forms.is_empty()).then(|| (version, forms.chunks_exact(forms.len() / count)))
}

fn to_bytes(value: &impl Serialize) -> Vec<u8> {
    let bytes = Vec::with_capacity(FORM_MAX);
    postcard::to_extend(value, bytes).expect("all types have a form, and a vector grows")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::forward::snapshot::{
        BufferedSnapshot, EndpointSnapshot, FlowSnapshot, FlowState, Side,
    };

    fn file() -> OwnedFd {
        tempfile::tempfile().unwrap().into()
    }

    /// A connection whose flows have moved so many bytes, with pipes that are files here.
    fn forwarder(start: u64, delivered: u64) -> Record<OwnedFd> {
        let end = || EndpointSnapshot { socket: file(), reset: false, gone: false };
        let flow = || {
            let buffered = BufferedSnapshot::Piped { read: file(), write: file() };
            FlowSnapshot { state: FlowState::Open, delivered, buffered }
        };
        let (endpoints, flows) = ([end(), end()], [flow(), flow()]);
        let snapshot = Snapshot { endpoints, flows, header_len: 107, fault: None };
        Record { id: ID_MAX - 1, start, body: RecordBody::Forwarder(Box::new(snapshot)) }
    }

    fn client(id: u64, start: u64) -> Record<OwnedFd> {
        Record { id, start, body: RecordBody::Client(file()) }
    }

    fn message(records: impl IntoIterator<Item = Record<OwnedFd>>) -> (Vec<u8>, Vec<OwnedFd>) {
        let sealed: Vec<_> = records.into_iter().map(Record::seal).collect();
        let (bytes, fds) = encode_message(&sealed);
        (bytes, fds.into_iter().map(|fd| fd.try_clone_to_owned().unwrap()).collect())
    }

    fn opens(bytes: &[u8], fds: &[OwnedFd]) -> bool {
        let fds = fds.iter().map(|fd| fd.try_clone().unwrap()).collect();
        let records = decode(bytes, fds);
        records.is_some_and(|records| records.into_iter().all(|record| record.open().is_some()))
    }

    #[test]
    fn each_bit_and_each_descriptor_counts() {
        let (bytes, fds) = message([forwarder(1 << 40, 1 << 20), client(3, 300), client(4, 5)]);
        assert!(opens(&bytes, &fds));
        for bit in 0..8 * bytes.len() {
            let mut bytes = bytes.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(!opens(&bytes, &fds), "bit {bit}");
        }
        for len in 0..bytes.len() {
            assert!(!opens(&bytes[..len], &fds), "{len} bytes");
        }
        for index in 0..fds.len() {
            let mut fds: Vec<_> = fds.iter().map(|fd| fd.try_clone().unwrap()).collect();
            fds[index] = file();
            assert!(!opens(&bytes, &fds), "descriptor {index}");
            fds.remove(index);
            assert!(!opens(&bytes, &fds), "without descriptor {index}");
        }
    }

    #[test]
    fn a_number_has_one_form() {
        let (mut bytes, fds) = message([client(3, 5)]);
        assert!(opens(&bytes, &fds));
        let start = HEADER_LEN + 8;
        assert_eq!(bytes[start], 5);
        bytes.splice(start..=start, [0x85, 0]);
        assert_eq!(parse(&bytes).unwrap()[0].record.start, 5);
        assert!(!opens(&bytes, &fds));
    }

    #[test]
    fn a_message_of_version_1_has_ids_and_no_records() {
        let form = |id: u64| [&id.to_le_bytes()[..], &[7; 40]].concat();
        let bytes = [&b"sp\x01\x02"[..], &form(11), &form(12)].concat();
        assert_eq!(record_ids(&bytes), Some(vec![11, 12]));
        assert!(decode(&bytes, Vec::new()).is_none());
        assert_eq!(descriptors_of(&[bytes]), (0, 0));
    }

    #[test]
    fn the_longest_message_can_be_read_and_a_usual_one_takes_1_kib() {
        let micros_of_10_years = 10 * 366 * 86_400 * 1_000_000;
        let usual = || forwarder(micros_of_10_years, 1 << 40);
        let (bytes, fds) = message((0..RECORDS_MAX).map(|_| usual()));
        // The kernel adds 320 bytes (struct skb_shared_info).
        assert!(bytes.len() <= 1024 - 320, "{} bytes", bytes.len());
        assert!(fds.len() <= crate::socket::PASSED_MAX);

        let mut longest = forwarder(u64::MAX, u64::MAX);
        if let RecordBody::Forwarder(snapshot) = &mut longest.body {
            snapshot.header_len = u16::MAX;
            snapshot.fault = Some((Side::Backend, i32::MIN));
            for flow in &mut snapshot.flows {
                flow.state = FlowState::SinkClosed { lost: true };
            }
        }
        let (bytes, fds) = message([longest]);
        assert!(opens(&bytes, &fds));
        assert_eq!(bytes.len(), HEADER_LEN + 67);
        let file_id = FileId { device: u64::MAX, inode: u64::MAX };
        let listener = RecordBody::Listener(file(), Some(file_id));
        let (bytes, _) = message([Record { id: 0, start: u64::MAX, body: listener }]);
        assert!(bytes.len() <= HEADER_LEN + FORM_MAX);
        let session = |id| {
            let session = SessionRecord {
                socket: file(),
                listener: file_id,
                client: vec![7; 111],
                local: Some(([u16::MAX; 8].into(), u32::MAX)),
                is_answered: true,
                is_confirmed: true,
                is_stream: true,
            };
            Record { id, start: u64::MAX, body: RecordBody::Session(Box::new(session)) }
        };
        let (bytes, fds) = message([session(0)]);
        assert!(opens(&bytes, &fds));
        assert_eq!(bytes.len(), HEADER_LEN + FORM_MAX);
        let (bytes, _) = message((0..2 * RECORDS_MAX as u64).map(session));
        assert_eq!(bytes.len(), MESSAGE_MAX);
    }

    #[test]
    fn descriptors_of_superseded_records_count_only_in_their_message() {
        let three = [client(1, 0), client(2, 0), client(3, 0)];
        let messages = [message(three).0, message([forwarder(0, 0), client(1, 0)]).0];
        // Six descriptors of the forwarder, and three clients.
        assert_eq!(descriptors_of(&messages), (9, 7));
    }

    #[test]
    fn an_id_is_less_than_its_limit() {
        assert!(record_ids(&message([client(ID_MAX - 1, 0)]).0).is_some());
        assert!(record_ids(&message([client(ID_MAX, 0)]).0).is_none());
    }

    #[test]
    fn no_bytes_are_too_strange_to_be_read() {
        let (valid, _) = message([forwarder(1 << 40, 1 << 20), client(3, 300)]);
        let mut dice = 1_u64;
        for _ in 0..20_000 {
            let mut bytes = valid.clone();
            for _ in 0..4 {
                dice = dice.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                let index = HEADER_LEN + (dice >> 33) as usize % (bytes.len() - HEADER_LEN);
                bytes[index] = (dice >> 56) as u8;
            }
            record_ids(&bytes);
            let (descriptors, _) = descriptors_of(std::slice::from_ref(&bytes));
            assert!(descriptors <= 2 * FDS_PER_RECORD);
            assert!(decode(&bytes, Vec::new()).is_none_or(|records| {
                records.into_iter().all(|record| record.open().is_none())
            }));
        }
    }
}
