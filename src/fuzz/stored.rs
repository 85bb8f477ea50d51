//! Stored records and whole stored queues.

use std::collections::HashSet;
use std::fs::File;
use std::io::Write;
use std::net::{TcpListener, UdpSocket};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixDatagram, UnixStream};

use crate::datagram::begin::{KEY_MAX, session_key};
use crate::datagram::session::address_of;
use crate::forward::snapshot::BufferedSnapshot;
use crate::handover::encoding::{
    RECORDS_MAX, Record, RecordBody, SealedRecord, decode, descriptors_of, encode_message,
    record_ids,
};
use crate::handover::queue::Queue;
use crate::handover::replay::replay;
use crate::socket::PASSED_MAX;
use crate::socket::file_id::FileId;
use crate::socket::mmsg::LocalAddress;

/// What is decoded is encoded as the same bytes. With its checksum each record opens, and with one
/// more bit changed it does not.
pub fn stored_message(bytes: &[u8]) {
    let ids = record_ids(bytes);
    let Some(records) = with_files(bytes) else { return };
    let found: Vec<_> = records.iter().map(SealedRecord::id).collect();
    assert!((1..=2 * RECORDS_MAX).contains(&found.len()));
    assert!(ids.is_none_or(|ids| ids == found));
    assert_eq!(encode_message(&records).0, bytes);
    let records: Vec<_> = records.iter().map(|it| copy(it.unverified()).seal()).collect();
    let (mut sealed, fds) = encode_message(&records);
    let copies = || fds.iter().map(|fd| fd.try_clone_to_owned().unwrap()).collect::<Vec<_>>();
    let opened = |bytes: &[u8]| {
        let records = decode(bytes, copies()).unwrap_or_default().into_iter();
        records.filter_map(SealedRecord::open).map(|record| text(&record)).collect::<Vec<_>>()
    };
    let expected: Vec<_> = records.iter().map(unsealed_text).collect();
    assert_eq!(opened(&sealed), expected);
    let bit = bytes.iter().fold(0_usize, |sum, byte| sum.rotate_left(7) ^ usize::from(*byte));
    let bit = bit % (8 * sealed.len());
    sealed[bit / 8] ^= 1 << (bit % 8);
    assert!(opened(&sealed).len() < expected.len(), "bit {bit}");
    let mut more = copies();
    more.push(file());
    assert!(decode(bytes, more).is_none());
}

/// A queue yields only records that are as they were sealed, with descriptors of their kinds, and
/// no file twice. A message begins at each `sp`. The first byte says which are sealed and which
/// descriptors are of another kind.
pub fn stored_queue(bytes: &[u8]) {
    let Some((&flags, bytes)) = bytes.split_first() else { return };
    let queue = Queue::new().unwrap();
    let (mut number, mut sealed) = (0, HashSet::new());
    let mut rest = bytes;
    while !rest.is_empty() && number < 8 {
        let next = rest[1..].windows(2).position(|it| it == b"sp").map_or(rest.len(), |at| at + 1);
        let (message, behind) = rest.split_at(next);
        rest = behind;
        let (is_sealed, is_wrong) = (flags >> number & 1 == 0, flags == 0x80);
        number += 1;
        let records = with_files(message).filter(|_| is_sealed);
        let records = records.map(|records| {
            let records = records.iter().map(|it| fitted(it.unverified(), is_wrong).seal());
            records.collect::<Vec<_>>()
        });
        match &records {
            Some(records) => {
                let (bytes, fds) = encode_message(records);
                if fds.len() <= PASSED_MAX && queue.append(&bytes, &fds).is_ok() && !is_wrong {
                    sealed.extend(records.iter().map(unsealed_text));
                }
            }
            None => drop(queue.append(message, &[])),
        }
    }
    let payloads = queue.payloads().unwrap();
    let replayed = replay(&payloads, queue.messages()).unwrap();
    assert_eq!(replayed.messages.len(), payloads.len());
    let (mut ids, mut files) = (HashSet::new(), HashSet::new());
    for record in &replayed.records {
        assert!(sealed.contains(&text(record)), "{record:?}");
        assert!(ids.insert(record.id), "{record:?}");
        let own: HashSet<_> = record.body.fds().iter().map(|fd| FileId::of(fd).unwrap()).collect();
        assert!(own.iter().all(|file| files.insert(*file)), "{record:?}");
        if let RecordBody::Session(session) = &record.body {
            let local = session.local.map(|(ip, interface)| LocalAddress { ip, interface });
            session_key(&mut [0; KEY_MAX], 0, &session.client, local);
            address_of(&session.client);
        }
    }
    assert_eq!(files, replayed.files);
}

/// Decodes a message, with a file for each descriptor.
fn with_files(bytes: &[u8]) -> Option<Vec<SealedRecord<OwnedFd>>> {
    let (_, count) = descriptors_of(&[bytes.to_vec()]);
    decode(bytes, (0..count).map(|_| file()).collect())
}

/// Returns the record with copies of its descriptors.
fn copy(record: &Record<OwnedFd>) -> Record<OwnedFd> {
    record.map_fds(|fd| fd.try_clone().unwrap())
}

fn text<Fd>(record: &Record<Fd>) -> String {
    format!("{:?}", record.map_fds(|_| ()))
}

fn unsealed_text<Fd: AsFd>(record: &SealedRecord<Fd>) -> String {
    text(record.unverified())
}

/// Returns the record with descriptors of the kinds that it has, or all of another kind.
fn fitted(record: &Record<OwnedFd>, is_wrong: bool) -> Record<OwnedFd> {
    let mut kinds = match &record.body {
        RecordBody::Nothing => vec![],
        RecordBody::Listener(..) => vec![FdKind::Listener],
        RecordBody::Client(_) => vec![FdKind::Stream],
        RecordBody::Session(_) => vec![FdKind::Datagram],
        RecordBody::Forwarder(snapshot) => {
            let buffered = snapshot.flows.iter().flat_map(|flow| match &flow.buffered {
                BufferedSnapshot::Nothing => vec![],
                BufferedSnapshot::Copied(_) => vec![FdKind::File],
                BufferedSnapshot::Piped { .. } => vec![FdKind::Pipe, FdKind::PipeWriter],
                BufferedSnapshot::Passing(_) => vec![FdKind::Stream],
            });
            [FdKind::Stream, FdKind::Stream].into_iter().chain(buffered).collect()
        }
    };
    if is_wrong {
        kinds.fill(FdKind::Null);
    }
    let mut kinds = kinds.into_iter();
    let turn = (record.start % 4) as usize;
    let mut at = turn..;
    DESCRIPTORS.with(|all| record.map_fds(|_| all.copy(kinds.next().unwrap(), at.next().unwrap())))
}

#[derive(Clone, Copy)]
enum FdKind {
    Listener,
    Stream,
    Datagram,
    File,
    Pipe,
    PipeWriter,
    Null,
}

/// Descriptors of each kind. Some have one file.
struct Descriptors {
    listeners: [OwnedFd; 2],
    streams: [[OwnedFd; 2]; 2],
    datagrams: [OwnedFd; 2],
    file: OwnedFd,
    pipe: (OwnedFd, OwnedFd),
    null: OwnedFd,
}

thread_local! {
    static DESCRIPTORS: Descriptors = Descriptors::new();
}

impl Descriptors {
    fn new() -> Self {
        let stream = || UnixStream::pair().map(|(one, other)| [one.into(), other.into()]).unwrap();
        let listener = || OwnedFd::from(TcpListener::bind("127.0.0.1:0").unwrap());
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"bytes").unwrap();
        let pipe = rustix::pipe::pipe().unwrap();
        Self {
            listeners: [listener(), listener()],
            streams: [stream(), stream()],
            datagrams: [
                UdpSocket::bind("127.0.0.1:0").unwrap().into(),
                UnixDatagram::unbound().unwrap().into(),
            ],
            file: file.into(),
            pipe,
            null: File::open("/dev/null").unwrap().into(),
        }
    }

    fn copy(&self, kind: FdKind, at: usize) -> OwnedFd {
        let fd = match kind {
            FdKind::Listener => &self.listeners[at % 2],
            FdKind::Stream => &self.streams[at / 2 % 2][at % 2],
            FdKind::Datagram => &self.datagrams[at % 2],
            FdKind::File => &self.file,
            FdKind::Pipe => &self.pipe.0,
            FdKind::PipeWriter => &self.pipe.1,
            FdKind::Null => &self.null,
        };
        fd.try_clone().unwrap()
    }
}

fn file() -> OwnedFd {
    DESCRIPTORS.with(|all| all.copy(FdKind::Null, 0))
}
