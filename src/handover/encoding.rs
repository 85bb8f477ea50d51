//! The bytes of a record: a message in the queue, besides its descriptors. What is stored of a
//! connection is a [`Snapshot`] (`forward::snapshot`).
//!
//! What the sockets themselves tell (addresses, options, bytes in their queues, FINs) is not
//! written down. A message is a header of [`HEADER_LEN`] bytes, with a version and a count, and a
//! [`Form`] for each record. Its descriptors follow in the order of the forms. A record is whole in
//! one message, so records never share or exchange descriptors.
//!
//! Records are read as hostile input: what is not exactly as this program writes it is refused. The
//! checksum covers each descriptor's inode, which a socket or a pipe keeps wherever it is sent. So
//! a record with the descriptors of another does not open.

use std::collections::HashMap;
use std::hash::Hasher;
use std::mem::offset_of;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use fnv::FnvHasher;
use rustix::fs::{FileType, OFlags, fcntl_getfl, fstat};
use rustix::io::{Errno, ioctl_fionbio};
use rustix::net::{SocketType, sockopt};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::forward::snapshot::{
    BufferedSnapshot, COPY_SIZE, EndpointSnapshot, FlowSnapshot, FlowState, SIDES, Side, Snapshot,
};
use crate::limits::descriptors::FOR_HANDOVER;
use crate::socket::Family;
use crate::socket::file_id::FileId;

/// Descriptors that a message can carry (`SCM_MAX_FD` in the kernel).
pub const DESCRIPTORS_MAX: usize = 253;

/// Records written into one message. 14 fit into 1 KiB of kernel memory, 15 would take 2 KiB.
pub const RECORDS_MAX: usize = 14;

/// Descriptors of a record at most: two sockets, and a pipe for each direction.
pub const FDS_PER_RECORD: usize = 6;

const _: () = assert!(FOR_HANDOVER >= 2 * RECORDS_MAX + FDS_PER_RECORD);

/// The length of the longest message that is read.
pub const MESSAGE_MAX: usize = HEADER_LEN + 2 * RECORDS_MAX * size_of::<Form>();

const HEADER_LEN: usize = 4;

const VERSION: u8 = 1;

/// Ids stay below this, so `id + 1` never overflows.
const ID_MAX: u64 = 1 << 63;

/// A connection or a listener, with its descriptors, owned or borrowed.
#[derive(Debug)]
pub struct Record<Fd> {
    /// Of several records with one id the last counts.
    pub id: u64,
    /// When the connection began, CLOCK_MONOTONIC in microseconds.
    pub start: u64,
    pub body: RecordBody<Fd>,
}

/// What was stored.
#[derive(Debug)]
pub enum RecordBody<Fd> {
    /// The record with this id is not to be restored.
    Nothing,
    /// A listening socket that the proxy opened, and its socket file.
    Listener(Fd, Option<FileId>),
    /// A client without a backend yet.
    Client(Fd),
    Forwarder(Box<Snapshot<Fd>>),
}

impl<Fd> RecordBody<Fd> {
    /// Returns the number of its descriptors.
    pub fn fds(&self) -> usize {
        match self {
            Self::Nothing => 0,
            Self::Listener(..) | Self::Client(_) => 1,
            Self::Forwarder(snapshot) => snapshot.fds(),
        }
    }
}

/// A record as it stands in a message.
#[derive(Debug)]
pub struct EncodedRecord<Fd> {
    form: Form,
    fds: Vec<Fd>,
}

/// The bytes of a record, in the machine's own byte order: nothing of this leaves the machine.
#[derive(Clone, Copy, Debug, Default, PartialEq, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
struct Form {
    id: u64,
    start: u64,
    /// Bytes delivered from the client and from the backend; of a listener, its file's device and
    /// inode.
    delivered: [u64; 2],
    /// Length of the PROXY header in bytes.
    header_len: u16,
    /// The first fault, or 0.
    errno: u16,
    kind: u8,
    /// Indexes into [`STATES`], four bits for each flow.
    states: u8,
    /// The client: 1 reset, 2 gone. The backend: 4 reset, 8 gone. 16: the fault is the backend's.
    ends: u8,
    /// Descriptors of what is buffered, four bits for each flow: none, a file, the ends of a pipe.
    buffered: u8,
    /// [`Form::checksum_with`] of all the above and of the descriptors.
    checksum: u64,
}

/// Kinds of forms.
const NOTHING: u8 = 0;
const LISTENER: u8 = 1;
const CLIENT: u8 = 2;
const FORWARDER: u8 = 3;

const STATES: [FlowState; 5] = [
    FlowState::Open,
    FlowState::Ended,
    FlowState::SourceReset,
    FlowState::SinkClosed { lost: false },
    FlowState::SinkClosed { lost: true },
];

impl<Fd> EncodedRecord<Fd> {
    pub fn id(&self) -> u64 {
        self.form.id
    }
}

impl<Fd: AsFd> Record<Fd> {
    /// Encodes the record for a message.
    pub fn encode(&self) -> EncodedRecord<BorrowedFd<'_>> {
        let mut fds = Vec::new();
        let body = match &self.body {
            RecordBody::Nothing => Form::default(),
            RecordBody::Listener(fd, file) => {
                fds.push(fd.as_fd());
                let FileId { device, inode } = file.unwrap_or_default();
                Form { kind: LISTENER, delivered: [device, inode], ..Form::default() }
            }
            RecordBody::Client(fd) => {
                fds.push(fd.as_fd());
                Form { kind: CLIENT, ..Form::default() }
            }
            RecordBody::Forwarder(snapshot) => snapshot.encode(&mut fds),
        };
        let mut form = Form { id: self.id, start: self.start, ..body };
        form.checksum = form.checksum_with(&fds);
        EncodedRecord { form, fds }
    }
}

impl<Fd: AsFd> Snapshot<Fd> {
    fn encode<'a>(&'a self, fds: &mut Vec<BorrowedFd<'a>>) -> Form {
        let delivered = self.flows.each_ref().map(|flow| flow.delivered);
        let mut form =
            Form { kind: FORWARDER, delivered, header_len: self.header_len, ..Form::default() };
        for (index, end) in self.endpoints.iter().enumerate() {
            fds.push(end.socket.as_fd());
            form.ends |= (u8::from(end.reset) | u8::from(end.gone) << 1) << (2 * index);
        }
        for (index, flow) in self.flows.iter().enumerate() {
            let state = STATES.iter().position(|state| *state == flow.state).unwrap_or_default();
            form.states |= (state as u8) << (4 * index);
            let before = fds.len();
            match &flow.buffered {
                BufferedSnapshot::Nothing => {}
                BufferedSnapshot::Copied(file) => fds.push(file.as_fd()),
                BufferedSnapshot::Piped { read, write } => {
                    fds.extend([read.as_fd(), write.as_fd()]);
                }
            }
            form.buffered |= ((fds.len() - before) as u8) << (4 * index);
        }
        if let Some((side, errno)) = self.fault {
            form.errno = errno.raw_os_error() as u16;
            form.ends |= u8::from(side == Side::Backend) << 4;
        }
        form
    }
}

/// Returns the bytes and the descriptors of one message.
pub fn encode_message<Fd: AsFd>(records: &[EncodedRecord<Fd>]) -> (Vec<u8>, Vec<BorrowedFd<'_>>) {
    let mut bytes = vec![b's', b'p', VERSION, records.len() as u8];
    bytes.extend(records.iter().flat_map(|record| record.form.as_bytes()));
    (bytes, records.iter().flat_map(|record| record.fds.iter().map(AsFd::as_fd)).collect())
}

/// Returns the ids of the records in a message of any version, or `None` if it is not a message of
/// this program.
///
/// In all versions each form begins with its id, and all forms of a message have one length.
pub fn record_ids(bytes: &[u8]) -> Option<Vec<u64>> {
    let (header, forms) = bytes.split_at_checked(HEADER_LEN)?;
    let count = usize::from(header[3]);
    if header[..2] != *b"sp" || count > 2 * RECORDS_MAX {
        return None;
    }
    if count == 0 {
        return forms.is_empty().then(Vec::new);
    }
    if forms.len() % count != 0 || forms.is_empty() {
        return None;
    }
    let id = |form: &[u8]| u64::read_from_prefix(form).ok().map(|(id, _)| id);
    let ids: Vec<u64> = forms.chunks(forms.len() / count).map(id).collect::<Option<_>>()?;
    let mut distinct = ids.clone();
    distinct.sort_unstable();
    distinct.dedup();
    (distinct.len() == ids.len() && ids.iter().all(|id| *id < ID_MAX)).then_some(ids)
}

/// Returns the number of descriptors of the last records of each id, and the largest number in one
/// message. Messages of another version are not counted.
pub fn descriptors_of(messages: &[Vec<u8>]) -> (usize, usize) {
    let (mut last, mut most) = (HashMap::new(), 0);
    for message in messages {
        let mut all = 0;
        for form in forms(message).unwrap_or_default() {
            let count = form.descriptors().unwrap_or(0);
            last.insert(form.id, count);
            all += count;
        }
        most = most.max(all);
    }
    (last.values().sum(), most)
}

/// Returns the records of a message, not opened yet, or `None` if the message is of another
/// version, or does not have exactly the descriptors of its forms.
pub fn decode(bytes: &[u8], fds: Vec<OwnedFd>) -> Option<Vec<EncodedRecord<OwnedFd>>> {
    let mut fds = fds.into_iter();
    let mut records = Vec::new();
    for form in forms(bytes)? {
        let count = form.descriptors()?;
        let fds: Vec<_> = fds.by_ref().take(count).collect();
        if fds.len() < count {
            return None;
        }
        records.push(EncodedRecord { form, fds });
    }
    fds.next().is_none().then_some(records)
}

/// Returns the forms of a message of this version.
fn forms(message: &[u8]) -> Option<Vec<Form>> {
    let (header, forms) = message.split_at_checked(HEADER_LEN)?;
    if header[..3] != [b's', b'p', VERSION]
        || forms.len() != usize::from(header[3]) * size_of::<Form>()
    {
        return None;
    }
    forms.chunks(size_of::<Form>()).map(|form| Form::read_from_bytes(form).ok()).collect()
}

impl Form {
    /// Returns the number of descriptors that belong to the form.
    fn descriptors(&self) -> Option<usize> {
        match self.kind {
            NOTHING => Some(0),
            LISTENER | CLIENT => Some(1),
            FORWARDER => {
                let [there, back] = nibbles(self.buffered);
                (there <= 2 && back <= 2).then(|| 2 + usize::from(there) + usize::from(back))
            }
            _ => None,
        }
    }

    /// FNV-1a, the same in every version of this program.
    fn checksum_with<Fd: AsFd>(&self, fds: &[Fd]) -> u64 {
        let mut hasher = FnvHasher::default();
        hasher.write(&self.as_bytes()[..offset_of!(Self, checksum)]);
        for fd in fds {
            // A descriptor without an inode is refused when the record is opened.
            let FileId { device, inode } = FileId::of(fd).unwrap_or_default();
            hasher.write(&device.to_ne_bytes());
            hasher.write(&inode.to_ne_bytes());
        }
        hasher.finish()
    }

    /// Opens the form of a connection.
    fn snapshot(&self, mut fds: impl Iterator<Item = OwnedFd>) -> Option<Snapshot<OwnedFd>> {
        let fault = match (self.errno, self.ends >> 4) {
            (0, 0) => None,
            (1..=4095, side @ (0 | 1)) => {
                let errno = Errno::from_raw_os_error(i32::from(self.errno));
                Some((SIDES[usize::from(side)], errno))
            }
            _ => return None,
        };
        let mut endpoint = |bits: u8| {
            let socket = checked_socket(fds.next()?, false)?;
            Some(EndpointSnapshot { socket, reset: bits & 1 != 0, gone: bits & 2 != 0 })
        };
        let endpoints = [endpoint(self.ends)?, endpoint(self.ends >> 2)?];
        let mut flow = |index: usize| {
            let state = *STATES.get(usize::from(nibbles(self.states)[index]))?;
            let buffered = match nibbles(self.buffered)[index] {
                0 => BufferedSnapshot::Nothing,
                1 if state == FlowState::Open => {
                    BufferedSnapshot::Copied(checked_file(fds.next()?)?)
                }
                2 => checked_pipe(fds.next()?, fds.next()?)?,
                _ => return None,
            };
            Some(FlowSnapshot { state, delivered: self.delivered[index], buffered })
        };
        let flows = [flow(0)?, flow(1)?];
        Some(Snapshot { endpoints, flows, header_len: self.header_len, fault })
    }
}

impl EncodedRecord<OwnedFd> {
    /// Verifies the record and each of its descriptors. Returns `None` if anything is not as this
    /// program writes it. Its descriptors are closed then.
    pub fn open(self) -> Option<Record<OwnedFd>> {
        let Self { form, fds } = self;
        if form.checksum != form.checksum_with(&fds) {
            return None;
        }
        let mut fds = fds.into_iter();
        let Form { id, start, delivered, kind, checksum, .. } = form;
        let blank = Form { id, start, kind, checksum, ..Form::default() };
        let body = match kind {
            NOTHING if form == blank => RecordBody::Nothing,
            LISTENER if form == (Form { delivered, ..blank }) => {
                let [device, inode] = delivered;
                let file = Some(FileId { device, inode }).filter(|it| *it != FileId::default());
                RecordBody::Listener(checked_socket(fds.next()?, true)?, file)
            }
            CLIENT if form == blank => RecordBody::Client(checked_socket(fds.next()?, false)?),
            FORWARDER => RecordBody::Forwarder(Box::new(form.snapshot(fds)?)),
            _ => return None,
        };
        let record = Record { id, start, body };
        let mut ids = record.file_ids();
        ids.sort_unstable();
        ids.is_sorted_by(|one, other| one < other).then_some(record)
    }
}

impl Record<OwnedFd> {
    /// Returns the ids of its sockets, pipes and files.
    pub fn file_ids(&self) -> Vec<FileId> {
        let mut fds = Vec::new();
        match &self.body {
            RecordBody::Nothing => {}
            RecordBody::Listener(fd, _) | RecordBody::Client(fd) => fds.push(fd),
            RecordBody::Forwarder(snapshot) => {
                fds.extend(snapshot.endpoints.iter().map(|end| &end.socket));
                fds.extend(snapshot.flows.iter().filter_map(|flow| match &flow.buffered {
                    BufferedSnapshot::Nothing => None,
                    BufferedSnapshot::Copied(fd) | BufferedSnapshot::Piped { read: fd, .. } => {
                        Some(fd)
                    }
                }));
            }
        }
        fds.into_iter().filter_map(|fd| FileId::of(fd).ok()).collect()
    }
}

fn nibbles(byte: u8) -> [u8; 2] {
    [byte & 15, byte >> 4]
}

/// Returns a stream socket of a known family that never blocks.
///
/// systemd makes a connection that it has accepted blocking again before it passes it to the next
/// process. A blocking socket would hold up all connections of an event loop.
fn checked_socket(fd: OwnedFd, listens: bool) -> Option<OwnedFd> {
    ioctl_fionbio(&fd, true).ok()?;
    let is_stream = sockopt::socket_type(&fd).ok()? == SocketType::STREAM;
    let is_known = Family::of(&fd).ok()?.is_some();
    (is_stream && is_known && sockopt::socket_acceptconn(&fd).ok()? == listens).then_some(fd)
}

/// Returns a file that has at most as many bytes as a flow copies at a time.
fn checked_file(fd: OwnedFd) -> Option<OwnedFd> {
    let stat = fstat(&fd).ok()?;
    let is_file = FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile;
    let has_bytes = (1..=COPY_SIZE as i64).contains(&stat.st_size);
    (is_file && has_bytes).then_some(fd)
}

/// Returns the two ends of one pipe.
fn checked_pipe(read: OwnedFd, write: OwnedFd) -> Option<BufferedSnapshot<OwnedFd>> {
    let end = |fd: &OwnedFd, mode: OFlags| -> Option<FileId> {
        ioctl_fionbio(fd, true).ok()?;
        let stat = fstat(fd).ok()?;
        let is_pipe = FileType::from_raw_mode(stat.st_mode) == FileType::Fifo;
        let has_mode = fcntl_getfl(fd).ok()? & OFlags::RWMODE == mode;
        (is_pipe && has_mode).then(|| FileId::from_stat(&stat))
    };
    let is_pair = end(&read, OFlags::RDONLY)? == end(&write, OFlags::WRONLY)?;
    is_pair.then_some(BufferedSnapshot::Piped { read, write })
}
