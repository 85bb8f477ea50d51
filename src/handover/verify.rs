//! Verifies a stored record: whether it can be restored, and whether its connection has ended.

use std::collections::HashSet;
use std::os::fd::OwnedFd;

use rustix::fs::{FileType, OFlags, fcntl_getfl, fstat};
use rustix::io::{ioctl_fionbio, ioctl_fionread};
use rustix::net::{SocketType, sockopt};
use socket2::{SockAddrStorage, SockRef};

use crate::forward::snapshot::{BufferedSnapshot, COPY_SIZE, FlowState};
use crate::handover::encoding::{Record, RecordBody, SealedRecord};
use crate::socket::file_id::FileId;
use crate::socket::sys::outq_len;
use crate::socket::{Family, has_hung_up, has_unread};

/// The longest address of a client, `sockaddr_storage`.
const CLIENT_MAX: usize = size_of::<SockAddrStorage>();

/// Returns a record that is as this program writes it, and its sockets, pipes and files.
pub fn verified(record: SealedRecord<OwnedFd>) -> Option<(Record<OwnedFd>, HashSet<FileId>)> {
    let record = record.open()?;
    let mut files = Vec::new();
    match &record.body {
        RecordBody::Nothing => {}
        RecordBody::Listener(fd, _) => {
            files.push(check_datagram_socket(fd).or_else(|| check_socket(fd, true))?);
        }
        RecordBody::Client(fd) => files.push(check_socket(fd, false)?),
        RecordBody::Session(session) if session.client.len() > CLIENT_MAX => return None,
        RecordBody::Session(session) => files.push(check_datagram_socket(&session.socket)?),
        RecordBody::Forwarder(snapshot) => {
            for end in &snapshot.endpoints {
                files.push(check_socket(&end.socket, false)?);
            }
            for flow in &snapshot.flows {
                match &flow.buffered {
                    BufferedSnapshot::Nothing => {}
                    BufferedSnapshot::Copied(_) if flow.state != FlowState::Open => return None,
                    BufferedSnapshot::Copied(file) => files.push(check_file(file)?),
                    BufferedSnapshot::Piped { read, write } => files.push(check_pipe(read, write)?),
                    BufferedSnapshot::Passing(_) if flow.state != FlowState::Open => return None,
                    BufferedSnapshot::Passing(socket) => files.push(check_socket(socket, false)?),
                }
            }
            if snapshot.fault.is_some_and(|(_, errno)| !(1..4096).contains(&errno)) {
                return None;
            }
        }
    }
    let distinct: HashSet<_> = files.iter().copied().collect();
    (distinct.len() == files.len()).then_some((record, distinct))
}

/// Requires a stream socket of a known family, and makes it never block.
///
/// systemd makes a connection that it has accepted blocking again before it passes it to the next
/// process. A blocking socket would hold up all connections of an event loop.
fn check_socket(fd: &OwnedFd, listens: bool) -> Option<FileId> {
    ioctl_fionbio(fd, true).ok()?;
    let is_stream = sockopt::socket_type(fd).ok()? == SocketType::STREAM;
    let is_known = Family::of(fd).ok()?.is_some();
    let is_valid = is_stream && is_known && sockopt::socket_acceptconn(fd).ok()? == listens;
    is_valid.then(|| FileId::of(fd).ok())?
}

/// Requires a datagram socket of a known family, and makes it never block.
fn check_datagram_socket(fd: &OwnedFd) -> Option<FileId> {
    ioctl_fionbio(fd, true).ok()?;
    let is_known = matches!(Family::of(fd), Ok(Some(Family::Tcp | Family::Unix)));
    let is_datagram = sockopt::socket_type(fd).ok()? == SocketType::DGRAM;
    (is_datagram && is_known).then(|| FileId::of(fd).ok())?
}

/// Requires a file that has at most as many bytes as a flow copies at a time.
fn check_file(fd: &OwnedFd) -> Option<FileId> {
    let stat = fstat(fd).ok()?;
    let is_file = FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile;
    let has_bytes = (1..=COPY_SIZE as i64).contains(&stat.st_size);
    (is_file && has_bytes).then(|| FileId::from_stat(&stat))
}

/// Requires the two ends of one pipe, and makes them never block.
fn check_pipe(read: &OwnedFd, write: &OwnedFd) -> Option<FileId> {
    let end = |fd: &OwnedFd, mode: OFlags| -> Option<FileId> {
        ioctl_fionbio(fd, true).ok()?;
        let stat = fstat(fd).ok()?;
        let is_pipe = FileType::from_raw_mode(stat.st_mode) == FileType::Fifo;
        let has_mode = fcntl_getfl(fd).ok()? & OFlags::RWMODE == mode;
        (is_pipe && has_mode).then(|| FileId::from_stat(&stat))
    };
    let file = end(read, OFlags::RDONLY)?;
    (end(write, OFlags::WRONLY)? == file).then_some(file)
}

/// Whether the connection has ended, and its record is a leftover.
pub fn is_over(body: &RecordBody<OwnedFd>) -> bool {
    match body {
        RecordBody::Nothing => true,
        RecordBody::Listener(..) | RecordBody::Session(_) => false,
        // What a Unix client sent before it closed is still to be delivered.
        RecordBody::Client(socket) => has_hung_up(socket) && !has_unread(socket),
        RecordBody::Forwarder(snapshot) => {
            let mut sockets = snapshot.endpoints.iter().map(|end| &end.socket);
            sockets.all(|socket| has_hung_up(socket) && !is_delivering(socket))
                && snapshot.flows.iter().all(|flow| is_empty(&flow.buffered))
        }
    }
}

fn is_empty(buffered: &BufferedSnapshot<OwnedFd>) -> bool {
    match buffered {
        BufferedSnapshot::Nothing => true,
        BufferedSnapshot::Copied(_) | BufferedSnapshot::Passing(_) => false,
        BufferedSnapshot::Piped { read, .. } => ioctl_fionread(read) == Ok(0),
    }
}

/// Whether the peer's kernel has yet to acknowledge bytes. (A socket that was reset has no peer,
/// and the kernel counts more bytes than it has.)
fn is_delivering(socket: &OwnedFd) -> bool {
    SockRef::from(socket).peer_addr().is_ok() && outq_len(socket) > 0
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Write;
    use std::net::{Shutdown, TcpListener, TcpStream};
    use std::os::unix::net::UnixStream;

    use rustix::event::{PollFd, PollFlags, poll};
    use rustix::net::{AddressFamily, SocketFlags, socket, socketpair};
    use rustix::pipe::pipe;

    use super::*;
    use crate::forward::snapshot::{EndpointSnapshot, FlowSnapshot, Snapshot};
    use crate::handover::encoding::SessionRecord;

    fn accepts(body: RecordBody<OwnedFd>) -> bool {
        verified(Record { id: 1, start: 0, body }.seal()).is_some()
    }

    /// A connected Unix socket, whose peer has closed.
    fn unix(kind: SocketType) -> OwnedFd {
        socketpair(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None).unwrap().0
    }

    fn tcp_listener() -> OwnedFd {
        TcpListener::bind("127.0.0.1:0").unwrap().into()
    }

    fn session(socket: OwnedFd, client: Vec<u8>) -> RecordBody<OwnedFd> {
        RecordBody::Session(Box::new(SessionRecord {
            socket,
            listener: FileId::default(),
            client,
            local: None,
            is_answered: true,
            is_confirmed: true,
            is_stream: false,
        }))
    }

    /// A connection between two sockets, with bytes that the first flow has buffered.
    fn forwarder(
        sockets: [OwnedFd; 2],
        state: FlowState,
        buffered: BufferedSnapshot<OwnedFd>,
    ) -> Snapshot<OwnedFd> {
        let flow = |state, buffered| FlowSnapshot { state, delivered: 0, buffered };
        Snapshot {
            endpoints: sockets.map(|socket| EndpointSnapshot { socket, reset: false, gone: false }),
            flows: [flow(state, buffered), flow(FlowState::Open, BufferedSnapshot::Nothing)],
            header_len: 0,
            fault: None,
        }
    }

    fn ended_sockets() -> [OwnedFd; 2] {
        [unix(SocketType::STREAM), unix(SocketType::STREAM)]
    }

    fn accepts_buffered(state: FlowState, buffered: BufferedSnapshot<OwnedFd>) -> bool {
        accepts(RecordBody::Forwarder(Box::new(forwarder(ended_sockets(), state, buffered))))
    }

    fn file_of(len: usize) -> OwnedFd {
        let file = tempfile::tempfile().unwrap();
        file.set_len(len as u64).unwrap();
        file.into()
    }

    #[test]
    fn a_socket_of_another_kind_is_refused() {
        assert!(accepts(RecordBody::Client(unix(SocketType::STREAM))));
        for socket in [tcp_listener(), unix(SocketType::DGRAM), unix(SocketType::SEQPACKET)] {
            assert!(!accepts(RecordBody::Client(socket)));
        }
        for socket in [tcp_listener(), unix(SocketType::DGRAM)] {
            assert!(accepts(RecordBody::Listener(socket, None)));
        }
        for socket in [unix(SocketType::STREAM), unix(SocketType::SEQPACKET)] {
            assert!(!accepts(RecordBody::Listener(socket, None)));
        }
        assert!(accepts(session(unix(SocketType::DGRAM), Vec::new())));
        let other_family = socket(AddressFamily::NETLINK, SocketType::DGRAM, None).unwrap();
        for socket in [unix(SocketType::STREAM), other_family] {
            assert!(!accepts(session(socket, Vec::new())));
        }
    }

    #[test]
    fn a_session_whose_client_has_no_address_of_the_kernel_is_refused() {
        assert!(accepts(session(unix(SocketType::DGRAM), vec![1; CLIENT_MAX])));
        assert!(!accepts(session(unix(SocketType::DGRAM), vec![1; CLIENT_MAX + 1])));
    }

    #[test]
    fn buffered_bytes_that_no_flow_has_are_refused() {
        let passing = || BufferedSnapshot::Passing(unix(SocketType::STREAM));
        let copied = |len| BufferedSnapshot::Copied(file_of(len));
        assert!(accepts_buffered(FlowState::Open, passing()));
        assert!(!accepts_buffered(FlowState::Ended, passing()));
        assert!(accepts_buffered(FlowState::Open, copied(COPY_SIZE)));
        assert!(!accepts_buffered(FlowState::Ended, copied(COPY_SIZE)));
        assert!(!accepts_buffered(FlowState::Open, copied(0)));
        assert!(!accepts_buffered(FlowState::Open, copied(COPY_SIZE + 1)));
    }

    #[test]
    fn two_descriptors_that_are_no_pipe_are_refused() {
        let accepts = |read, write| {
            accepts_buffered(FlowState::Ended, BufferedSnapshot::Piped { read, write })
        };
        let ((read, write), (other_read, _other_write)) = (pipe().unwrap(), pipe().unwrap());
        let copy = |fd: &OwnedFd| fd.try_clone().unwrap();
        assert!(accepts(copy(&read), copy(&write)));
        assert!(!accepts(copy(&read), copy(&read)));
        assert!(!accepts(copy(&write), copy(&write)));
        assert!(!accepts(other_read, write));
        let file = tempfile::NamedTempFile::new().unwrap();
        let write = File::options().write(true).open(&file).unwrap();
        assert!(!accepts(File::open(&file).unwrap().into(), write.into()));
    }

    #[test]
    fn a_client_has_ended_once_all_is_read() {
        let (mut peer, client) = UnixStream::pair().unwrap();
        let body = RecordBody::Client(client.into());
        assert!(!is_over(&body));
        peer.write_all(b"1").unwrap();
        drop(peer);
        assert!(!is_over(&body));
        let RecordBody::Client(client) = &body else { unreachable!() };
        rustix::io::read(client, &mut [0; 2]).unwrap();
        assert!(is_over(&body));
    }

    #[test]
    fn a_connection_has_ended_once_all_is_delivered() {
        let is_over = |sockets, buffered| {
            is_over(&RecordBody::Forwarder(Box::new(forwarder(sockets, FlowState::Open, buffered))))
        };
        assert!(is_over(ended_sockets(), BufferedSnapshot::Nothing));
        let (_peer, open) = UnixStream::pair().unwrap();
        assert!(!is_over([unix(SocketType::STREAM), open.into()], BufferedSnapshot::Nothing));
        assert!(!is_over(ended_sockets(), BufferedSnapshot::Copied(file_of(1))));
        for (bytes, ended) in [(b"".as_slice(), true), (b"1", false)] {
            let (read, write) = pipe().unwrap();
            rustix::io::write(&write, bytes).unwrap();
            assert_eq!(is_over(ended_sockets(), BufferedSnapshot::Piped { read, write }), ended);
        }
        // Both directions have ended, and the peer does not read what the kernel still has.
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let peer = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let mut socket = listener.accept().unwrap().0;
        socket.set_nonblocking(true).unwrap();
        while socket.write(&[0; 65536]).is_ok() {}
        socket.shutdown(Shutdown::Write).unwrap();
        peer.shutdown(Shutdown::Write).unwrap();
        // The kernel reports POLLHUP whether or not it is asked for.
        poll(&mut [PollFd::new(&socket, PollFlags::empty())], None).unwrap();
        let sockets = [socket.into(), unix(SocketType::STREAM)];
        assert!(!is_over(sockets, BufferedSnapshot::Nothing));
    }
}
