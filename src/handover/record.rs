//! The stored form of a connection: what a message in the store says beside its descriptors.
//!
//! What the sockets themselves tell (addresses, options, bytes in their queues, FINs) is not
//! written down. A message is a head, [`HEADER_LEN`] bytes with a version and a count, and for each record
//! a form of [`RECORD_LEN`] bytes; its descriptors follow in the order of the forms. A record is whole in one
//! message, so that records never share or exchange descriptors. It is read as hostile input: what is
//! not exactly as it would have been written is [`InvalidRecord`].
//!
//! | form | |
//! |---|---|
//! | 0 to 7 | a number that tells records apart |
//! | 8 to 15 | when the connection began, CLOCK_MONOTONIC in microseconds |
//! | 16 to 31 | bytes delivered, from the client and from the backend; a listener's file |
//! | 32, 33 | bytes of the PROXY header |
//! | 34, 35 | errno of the first fault, or 0 |
//! | 36 | 0 nothing, 1 listener, 2 client, 3 pair |
//! | 37 | states of the flows, four bits each |
//! | 38 | the ends: 1, 4 reset; 2, 8 gone; 16 the fault is the backend's |
//! | 39 | what the flows hold, four bits each: 0 nothing, 1 a file of bytes, 2 a pipe |
//! | 40 to 47 | the seal: a hash of all the above, and of which descriptors it is about |
//!
//! The seal has each descriptor's inode in it, which a socket or a pipe keeps wherever it is sent: a record
//! with another's descriptors does not open.
//!
//! Numbers are in the machine's own byte order: nothing of this leaves the machine.

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{FileType, OFlags, fcntl_getfl, fstat};
use rustix::io::{Errno, ioctl_fionbio};
use rustix::net::{SocketType, sockopt};

use crate::forward::snapshot::{
    BufferedSnapshot, COPY_SIZE, EndpointSnapshot, FlowSnapshot, FlowState, Side, Snapshot,
};
use crate::socket::Family;

/// Descriptors that a message can carry (`SCM_MAX_FD` in the kernel).
pub const DESCRIPTORS_MAX: usize = 253;

/// Records that are put into one message: with these the kernel needs a KiB for it, and with one more
/// two.
pub const RECORDS_MAX: usize = 14;

/// Descriptors of a record at most: two sockets, and a pipe for each direction.
pub const FDS_PER_RECORD: usize = 6;

/// The longest message that is read.
pub const MESSAGE_MAX: usize = HEADER_LEN + 2 * RECORDS_MAX * RECORD_LEN;

const HEADER_LEN: usize = 4;
const RECORD_LEN: usize = 48;

/// Where the seal begins.
const CHECKSUM_AT: usize = 40;

/// Numbers are below this: there is always a next one.
const ID_MAX: u64 = 1 << 63;

/// Which form this is.
const VERSION: u8 = 1;

/// A connection or a listener, with descriptors that are one's own or somebody else's.
#[derive(Debug)]
pub struct Record<Fd> {
    /// Of several with the same number the last counts.
    pub id: u64,
    /// When it began, CLOCK_MONOTONIC in microseconds.
    pub start: u64,
    /// What it is.
    pub body: RecordBody<Fd>,
}

/// What was stored.
#[derive(Debug)]
pub enum RecordBody<Fd> {
    /// What had this number is not to be taken back.
    Nothing,
    /// A listening socket that was opened here, and which its file is, device and inode.
    Listener(Fd, Option<(u64, u64)>),
    /// A client without a backend yet.
    Client(Fd),
    /// A connection.
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

/// It was not written by us, or is damaged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InvalidRecord;

/// A record as it stands in a message.
#[derive(Debug)]
pub struct EncodedRecord<Fd> {
    form: [u8; RECORD_LEN],
    fds: Vec<Fd>,
}

impl<Fd> EncodedRecord<Fd> {
    /// The record's number.
    pub fn id(&self) -> u64 {
        number(&self.form, 0)
    }
}

impl<Fd: AsFd> Record<Fd> {
    /// As it goes into a message.
    pub fn encode(&self) -> EncodedRecord<BorrowedFd<'_>> {
        let mut form = [0; RECORD_LEN];
        form[..8].copy_from_slice(&self.id.to_ne_bytes());
        form[8..16].copy_from_slice(&self.start.to_ne_bytes());
        let mut fds = Vec::new();
        form[KIND] = match &self.body {
            RecordBody::Nothing => 0,
            RecordBody::Listener(fd, file) => {
                fds.push(fd.as_fd());
                let (device, inode) = file.unwrap_or_default();
                form[16..24].copy_from_slice(&device.to_ne_bytes());
                form[24..32].copy_from_slice(&inode.to_ne_bytes());
                1
            }
            RecordBody::Client(fd) => {
                fds.push(fd.as_fd());
                2
            }
            RecordBody::Forwarder(pair) => {
                pair.encode(&mut form, &mut fds);
                3
            }
        };
        let encode = encode(&form, &fds);
        form[CHECKSUM_AT..].copy_from_slice(&encode.to_ne_bytes());
        EncodedRecord { form, fds }
    }
}

impl<Fd: AsFd> Snapshot<Fd> {
    fn encode<'a>(&'a self, form: &mut [u8; RECORD_LEN], fds: &mut Vec<BorrowedFd<'a>>) {
        for (index, end) in self.endpoints.iter().enumerate() {
            fds.push(end.socket.as_fd());
            form[ENDS] |= (u8::from(end.reset) | u8::from(end.gone) << 1) << (2 * index);
        }
        for (index, flow) in self.flows.iter().enumerate() {
            form[16 + 8 * index..24 + 8 * index].copy_from_slice(&flow.delivered.to_ne_bytes());
            let state = STATES.iter().position(|state| *state == flow.state).unwrap_or_default();
            form[STATE] |= (state as u8) << (4 * index);
            let buffered = match &flow.buffered {
                BufferedSnapshot::Nothing => 0,
                BufferedSnapshot::Copied(file) => {
                    fds.push(file.as_fd());
                    1
                }
                BufferedSnapshot::Piped { read, write } => {
                    fds.extend([read.as_fd(), write.as_fd()]);
                    2
                }
            };
            form[HELD] |= buffered << (4 * index);
        }
        form[32..34].copy_from_slice(&self.preface.to_ne_bytes());
        if let Some((side, errno)) = self.fault {
            form[34..36].copy_from_slice(&(errno.raw_os_error() as u16).to_ne_bytes());
            form[ENDS] |= u8::from(side == Side::Backend) << 4;
        }
    }
}

const KIND: usize = 36;
const STATE: usize = 37;
const ENDS: usize = 38;
const HELD: usize = 39;

const STATES: [FlowState; 5] = [
    FlowState::Open,
    FlowState::Ended,
    FlowState::SourceReset,
    FlowState::SinkClosed { lost: false },
    FlowState::SinkClosed { lost: true },
];

/// One message: its bytes and its descriptors.
pub fn encode_message<Fd: AsFd>(records: &[EncodedRecord<Fd>]) -> (Vec<u8>, Vec<BorrowedFd<'_>>) {
    let mut bytes = vec![b's', b'p', VERSION, records.len() as u8];
    bytes.extend(records.iter().flat_map(|record| record.form));
    (bytes, records.iter().flat_map(|record| record.fds.iter().map(AsFd::as_fd)).collect())
}

/// The numbers of the records in a message, of whatever version; `None` if it is none of ours.
pub fn record_ids(bytes: &[u8]) -> Option<Vec<u64>> {
    let (head, forms) = bytes.split_at_checked(HEADER_LEN)?;
    let count = usize::from(head[3]);
    if head[..2] != *b"sp" || count > 2 * RECORDS_MAX || count == 0 && !forms.is_empty() {
        return None;
    }
    // In all versions each form begins with its number, and all are of one length.
    let length = forms.len() / count.max(1);
    if count > 0 && (length < 8 || forms.len() % count != 0) {
        return None;
    }
    let number = |form: &[u8]| form.first_chunk().map(|number| u64::from_ne_bytes(*number));
    let record_ids: Vec<u64> = forms.chunks(length.max(1)).map(number).collect::<Option<_>>()?;
    let mut distinct = record_ids.clone();
    distinct.sort_unstable();
    distinct.dedup();
    (distinct.len() == record_ids.len() && record_ids.iter().all(|id| *id < ID_MAX))
        .then_some(record_ids)
}

/// How many descriptors the last records of each number have that these messages speak of, and the most
/// that one message has. What is of another version is not counted.
pub fn descriptors_of(messages: &[Vec<u8>]) -> (usize, usize) {
    let (mut last, mut most) = (HashMap::new(), 0);
    for message in messages {
        let Some((head, forms)) = message.split_at_checked(HEADER_LEN) else { continue };
        if head[..3] != [b's', b'p', VERSION] {
            continue;
        }
        let mut all = 0;
        for form in forms.as_chunks::<RECORD_LEN>().0 {
            let count = descriptors(form).unwrap_or(0);
            last.insert(number(form, 0), count);
            all += count;
        }
        most = most.max(all);
    }
    (last.values().sum(), most)
}

/// The records of a message, unopened.
///
/// # Errors
/// When it is of another version, or has not exactly the descriptors that its forms speak of.
pub fn decode(
    bytes: &[u8],
    fds: Vec<OwnedFd>,
) -> Result<Vec<EncodedRecord<OwnedFd>>, InvalidRecord> {
    let (head, forms) = bytes.split_at_checked(HEADER_LEN).ok_or(InvalidRecord)?;
    let (forms, rest) = forms.as_chunks::<RECORD_LEN>();
    if head[..3] != [b's', b'p', VERSION] || usize::from(head[3]) != forms.len() || !rest.is_empty()
    {
        return Err(InvalidRecord);
    }
    let mut fds = fds.into_iter();
    let mut records = Vec::with_capacity(forms.len());
    for form in forms {
        let fds: Vec<_> = fds.by_ref().take(descriptors(form).ok_or(InvalidRecord)?).collect();
        records.push(EncodedRecord { form: *form, fds });
    }
    let last_has_all = records.iter().all(|it| descriptors(&it.form) == Some(it.fds.len()));
    if last_has_all && fds.next().is_none() { Ok(records) } else { Err(InvalidRecord) }
}

/// How many descriptors belong to a form.
fn descriptors(form: &[u8; RECORD_LEN]) -> Option<usize> {
    match form[KIND] {
        0 => Some(0),
        1 | 2 => Some(1),
        3 => {
            let [one, other] = nibbles(form[HELD]);
            // As many descriptors as their number says.
            (one <= 2 && other <= 2).then(|| 2 + usize::from(one) + usize::from(other))
        }
        _ => None,
    }
}

impl EncodedRecord<OwnedFd> {
    /// Reads it, and looks at each descriptor.
    ///
    /// # Errors
    /// When anything is not as it would have been written; its descriptors are closed.
    pub fn open(self) -> Result<Record<OwnedFd>, InvalidRecord> {
        let Self { form, fds } = self;
        if number(&form, CHECKSUM_AT) != encode(&form, &fds) {
            return Err(InvalidRecord);
        }
        let mut fds = fds.into_iter();
        let mut next = || fds.next().ok_or(InvalidRecord);
        let is_blank = |from: usize| {
            form[from..KIND].iter().chain(&form[STATE..CHECKSUM_AT]).all(|it| *it == 0)
        };
        let body = match form[KIND] {
            0 if is_blank(16) => RecordBody::Nothing,
            1 if is_blank(32) => {
                let file = (number(&form, 16), number(&form, 24));
                RecordBody::Listener(is_socket(next()?, true)?, (file != (0, 0)).then_some(file))
            }
            2 if is_blank(16) => RecordBody::Client(is_socket(next()?, false)?),
            3 => RecordBody::Forwarder(Box::new(open_pair(&form, &mut next)?)),
            _ => return Err(InvalidRecord),
        };
        let record = Record { id: number(&form, 0), start: number(&form, 8), body };
        record.are_distinct().then_some(record).ok_or(InvalidRecord)
    }
}

fn open_pair(
    form: &[u8; RECORD_LEN],
    next: &mut impl FnMut() -> Result<OwnedFd, InvalidRecord>,
) -> Result<Snapshot<OwnedFd>, InvalidRecord> {
    let ends = form[ENDS];
    let errno = u16::from_ne_bytes([form[34], form[35]]);
    let fault = match (errno, ends >> 4) {
        (0, 0) => None,
        (1..=4095, 0) => Some((Side::Client, Errno::from_raw_os_error(i32::from(errno)))),
        (1..=4095, 1) => Some((Side::Backend, Errno::from_raw_os_error(i32::from(errno)))),
        _ => return Err(InvalidRecord),
    };
    let mut end = |bits: u8| -> Result<_, InvalidRecord> {
        let socket = is_socket(next()?, false)?;
        Ok(EndpointSnapshot { socket, reset: bits & 1 != 0, gone: bits & 2 != 0 })
    };
    let endpoints = [end(ends)?, end(ends >> 2)?];
    let mut flow = |index: usize| -> Result<_, InvalidRecord> {
        let state = usize::from(nibbles(form[STATE])[index]);
        let state = *STATES.get(state).ok_or(InvalidRecord)?;
        let buffered = match nibbles(form[HELD])[index] {
            0 => BufferedSnapshot::Nothing,
            1 if state == FlowState::Open => BufferedSnapshot::Copied(is_file(next()?)?),
            2 => are_pipe(next()?, next()?)?,
            _ => return Err(InvalidRecord),
        };
        Ok(FlowSnapshot { state, delivered: number(form, 16 + 8 * index), buffered })
    };
    let flows = [flow(0)?, flow(1)?];
    Ok(Snapshot { endpoints, flows, preface: u16::from_ne_bytes([form[32], form[33]]), fault })
}

/// FNV-1a: the same in every version of this program.
fn encode<Fd: AsFd>(form: &[u8; RECORD_LEN], fds: &[Fd]) -> u64 {
    const BASIS: u64 = 0xcbf2_9ce4_8422_2325;
    const PRIME: u64 = 0x100_0000_01b3;
    let identities = fds.iter().flat_map(|fd| {
        // What can't be told apart has no inode, and is refused when it is opened.
        let (device, inode) = identity(fd).unwrap_or_default();
        [device.to_ne_bytes(), inode.to_ne_bytes()].into_iter().flatten()
    });
    let bytes = form[..CHECKSUM_AT].iter().copied().chain(identities);
    bytes.fold(BASIS, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(PRIME))
}

/// What the kernel knows it by, wherever it is sent.
pub fn identity(fd: impl AsFd) -> Option<(u64, u64)> {
    fstat(fd).ok().map(|stat| (stat.st_dev, stat.st_ino))
}

fn number(form: &[u8; RECORD_LEN], at: usize) -> u64 {
    let mut bytes = [0; 8];
    bytes.copy_from_slice(&form[at..at + 8]);
    u64::from_ne_bytes(bytes)
}

fn nibbles(byte: u8) -> [u8; 2] {
    [byte & 15, byte >> 4]
}

fn is_socket(fd: OwnedFd, listens: bool) -> Result<OwnedFd, InvalidRecord> {
    let is_one = || -> Option<bool> {
        let is_stream = sockopt::socket_type(&fd).ok()? == SocketType::STREAM && never_waits(&fd);
        let family = Family::of(&fd).ok()?;
        Some(is_stream && family.is_some() && sockopt::socket_acceptconn(&fd).ok()? == listens)
    };
    if is_one() == Some(true) { Ok(fd) } else { Err(InvalidRecord) }
}

/// Makes it one on which nobody waits in the kernel, which would hold up all connections of an event
/// loop. (systemd undoes that on a connection that it has accepted, and passes to the next process.)
fn never_waits(fd: impl AsFd) -> bool {
    ioctl_fionbio(fd, true).is_ok()
}

/// A file of bytes, of which there are not more than a flow copies at a time.
fn is_file(fd: OwnedFd) -> Result<OwnedFd, InvalidRecord> {
    let stat = fstat(&fd).map_err(|_| InvalidRecord)?;
    let is_file = FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile;
    if is_file && (1..=COPY_SIZE as i64).contains(&stat.st_size) {
        Ok(fd)
    } else {
        Err(InvalidRecord)
    }
}

fn are_pipe(read: OwnedFd, write: OwnedFd) -> Result<BufferedSnapshot<OwnedFd>, InvalidRecord> {
    let end = |fd: &OwnedFd, mode: OFlags| -> Option<(u64, u64)> {
        let stat = fstat(fd).ok()?;
        let is_pipe = FileType::from_raw_mode(stat.st_mode) == FileType::Fifo;
        let has_mode = fcntl_getfl(fd).ok()? & OFlags::RWMODE == mode;
        (is_pipe && has_mode && never_waits(fd)).then_some((stat.st_dev, stat.st_ino))
    };
    match (end(&read, OFlags::RDONLY), end(&write, OFlags::WRONLY)) {
        (Some(one), Some(other)) if one == other => Ok(BufferedSnapshot::Piped { read, write }),
        _ => Err(InvalidRecord),
    }
}

impl Record<OwnedFd> {
    /// Each socket, pipe and file of it, as the kernel tells them apart.
    pub fn identities(&self) -> Vec<(u64, u64)> {
        let mut fds = Vec::new();
        match &self.body {
            RecordBody::Nothing => {}
            RecordBody::Listener(fd, _) | RecordBody::Client(fd) => fds.push(fd),
            RecordBody::Forwarder(pair) => {
                fds.extend(pair.endpoints.iter().map(|end| &end.socket));
                fds.extend(pair.flows.iter().filter_map(|flow| match &flow.buffered {
                    BufferedSnapshot::Nothing => None,
                    BufferedSnapshot::Copied(fd) | BufferedSnapshot::Piped { read: fd, .. } => {
                        Some(fd)
                    }
                }));
            }
        }
        fds.into_iter().filter_map(identity).collect()
    }

    fn are_distinct(&self) -> bool {
        let mut identities = self.identities();
        identities.sort_unstable();
        identities.is_sorted_by(|one, other| one < other)
    }
}
