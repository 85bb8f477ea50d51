//! A peer of the forwarder: what it has sent and received, and what it may still see.

use std::io::{ErrorKind, Read};
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, ioctl_fionread};
use socket2::Socket;

use crate::descriptors::above;
use crate::support::descriptors::{files, inodes, pass, receive_passed};
use crate::support::stream::{Random, Stream};
use crate::support::{Endpoint, Family, socket_pair, unsent};

/// How a peer saw the other's bytes end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    Clean,
    Reset,
}

/// One peer, and the model of what the other peer is to see of it.
pub struct Peer {
    pub family: Family,
    socket: Option<Socket>,
    /// Where it goes on sending.
    stream: Stream,
    /// Where it goes on receiving, in the other peer's stream.
    expected: Stream,
    /// Its FIN is behind them.
    pub has_ended: bool,
    /// Of the bytes sent, those that the other peer must get though the connection was cut.
    pub safe: u64,
    /// Descriptors passed: the place of the byte that each went with, and its inode.
    passed: Vec<(u64, u64)>,
    pub has_sent_urgent: bool,
    /// More descriptors went with one byte than the proxy passes on.
    pub passed_too_many: bool,
    /// Whether this peer has reset the connection, or closed it with bytes unread.
    pub was_reset: bool,
    /// Sending has failed.
    is_refused: bool,
    received_descriptors: usize,
    pub end: Option<End>,
}

impl Peer {
    /// Returns a peer, and the proxy's socket to it. The seeds are those of the bytes it sends and
    /// of those it receives.
    pub fn new(family: Family, seeds: [u64; 2], random: &mut Random) -> (Self, Socket) {
        let (socket, inner) = match family {
            Family::Tcp => LISTENER.with(|listener| (listener.connect(), listener.accept())),
            Family::Unix => socket_pair(family),
        };
        inner.set_nonblocking(true).unwrap();
        // As the listener and the connector set it.
        inner.set_out_of_band_inline(true).unwrap();
        let size = random.choose(&[0, 0, 16 * 1024, 128 * 1024]);
        if size > 0 {
            socket.set_send_buffer_size(size).unwrap();
            inner.set_send_buffer_size(size).unwrap();
        }
        (Self::with_socket(family, seeds, Some(socket)), inner)
    }

    /// Returns a peer with a socket that is connected, or with none.
    pub fn with_socket(family: Family, [own, other]: [u64; 2], socket: Option<Socket>) -> Self {
        // Out of the way of the proxy's own descriptors.
        let socket = socket.map(|socket| Socket::from(above(socket)));
        socket.iter().for_each(|socket| socket.set_nonblocking(true).unwrap());
        Self {
            family,
            socket,
            stream: Stream::new(own),
            expected: Stream::new(other),
            has_ended: false,
            safe: 0,
            passed: Vec::new(),
            has_sent_urgent: false,
            passed_too_many: false,
            was_reset: false,
            is_refused: false,
            received_descriptors: 0,
            end: None,
        }
    }

    /// Whether its socket is closed.
    pub fn is_gone(&self) -> bool {
        self.socket.is_none()
    }

    pub fn has_passed(&self) -> bool {
        !self.passed.is_empty()
    }

    /// Bytes that its kernel has accepted.
    pub fn sent(&self) -> u64 {
        self.stream.position()
    }

    pub fn received(&self) -> u64 {
        self.expected.position()
    }

    /// Does something at random with the socket.
    pub fn act(&mut self, other: &Self, random: &mut Random) {
        match random.below(100) {
            0..35 => {
                let length = random.choose(&[1, 64, 5_000, 64 * 1024, 300_000]);
                self.send(1 + random.below(length) as usize);
            }
            35..75 => {
                let most = random.choose(&[1, 100, 10_000, 1_000_000]);
                self.receive(other, most);
            }
            75..80 if self.family == Family::Tcp => self.send_urgent(),
            75..83 if self.family == Family::Unix => {
                let count = if random.is_one_of(40) { 17 } else { 1 + random.below(4) as usize };
                self.pass(1 + random.below(3_000) as usize, count);
            }
            90..93 => self.shut_down(),
            93 => self.close(),
            94 if self.family == Family::Tcp => self.reset(),
            _ => {}
        }
    }

    fn send(&mut self, length: usize) {
        self.send_with(|socket, bytes| socket.send(bytes), length);
    }

    fn send_urgent(&mut self) {
        self.has_sent_urgent = true;
        self.send_with(|socket, bytes| socket.send_out_of_band(bytes), 1);
    }

    fn pass(&mut self, length: usize, count: usize) {
        let (files, place) = (files(count), self.sent());
        self.send_with(|socket, bytes| pass(socket, bytes, &files).map_err(Into::into), length);
        if self.sent() > place {
            self.passed.extend(inodes(&files).into_iter().map(|inode| (place, inode)));
            self.passed_too_many |= count > PASSED_AT_MOST;
        }
    }

    fn send_with(
        &mut self,
        send: impl FnOnce(&Socket, &[u8]) -> std::io::Result<usize>,
        length: usize,
    ) {
        let Some(socket) = &self.socket else { return };
        if self.has_ended || self.is_refused {
            return;
        }
        let mut bytes = vec![0; length];
        self.stream.clone().fill(&mut bytes);
        match send(socket, &bytes) {
            Ok(sent) => self.stream.skip(sent as u64),
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => {
                assert!(matches!(
                    Errno::from_io_error(&error),
                    Some(Errno::PIPE | Errno::CONNRESET)
                ));
                self.is_refused = true;
            }
        }
    }

    /// Receives once, and checks it against what the other peer has sent. Returns whether something
    /// came.
    pub fn receive(&mut self, other: &Self, most: usize) -> bool {
        let Some(socket) = self.socket.as_mut().filter(|_| self.end.is_none()) else {
            return false;
        };
        let received = match self.family {
            Family::Tcp => {
                let mut bytes = vec![0; most];
                let result = socket.read(&mut bytes);
                result.map(|length| {
                    bytes.truncate(length);
                    (bytes, Vec::new())
                })
            }
            Family::Unix => receive_passed(&*socket, most).map_err(Into::into),
        };
        match received {
            // The kernel reports a reset once, here to a send.
            Ok((bytes, _)) if bytes.is_empty() && self.is_refused => self.end = Some(End::Reset),
            Ok((bytes, _)) if bytes.is_empty() => self.end = Some(End::Clean),
            Ok((bytes, descriptors)) => self.check(other, &bytes, &descriptors),
            Err(error) if error.kind() == ErrorKind::WouldBlock => return false,
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{error}");
                self.end = Some(End::Reset);
            }
        }
        true
    }

    fn check(&mut self, other: &Self, bytes: &[u8], descriptors: &[OwnedFd]) {
        self.expected.check(bytes).unwrap();
        let received = self.received();
        assert!(received <= other.sent(), "{received} of {} bytes", other.sent());
        let passed = &other.passed[self.received_descriptors..];
        let came = inodes(descriptors);
        let expected: Vec<u64> = passed.iter().take(came.len()).map(|(_, inode)| *inode).collect();
        assert_eq!(came, expected, "other descriptors than were passed");
        self.received_descriptors += came.len();
        if self.family == Family::Unix && other.family == Family::Unix {
            let late = other.passed.get(self.received_descriptors);
            assert!(late.is_none_or(|(place, _)| *place >= received), "without its descriptor");
        }
    }

    pub fn shut_down(&mut self) {
        if let Some(socket) = self.socket.as_ref().filter(|_| !self.has_ended) {
            // Fails once the proxy has reset the socket.
            self.has_ended = socket.shutdown(Shutdown::Write).is_ok();
        }
    }

    fn close(&mut self) {
        let Some(socket) = self.socket.take() else { return };
        // The kernel makes it a reset if something is unread.
        let is_clean = ioctl_fionread(&socket).is_ok_and(|unread| unread == 0);
        self.has_ended |= is_clean && !self.is_refused;
        self.was_reset = !is_clean;
        self.safe = self.acknowledged(&socket);
    }

    fn reset(&mut self) {
        let Some(socket) = self.socket.take() else { return };
        self.safe = self.acknowledged(&socket);
        self.was_reset = true;
        socket.set_linger(Some(Duration::ZERO)).unwrap();
    }

    /// Returns how many of the bytes sent have reached the proxy's kernel.
    fn acknowledged(&self, socket: &Socket) -> u64 {
        match self.family {
            Family::Tcp => self.sent().saturating_sub(unsent(socket) as u64),
            Family::Unix => self.sent(),
        }
    }

    /// Checks what this peer has seen of the other, after both are done.
    pub fn check_end(&self, other: &Self, was_cut: bool) {
        let Some(end) = self.end else { return };
        let (received, sent) = (self.received(), other.sent());
        match end {
            // A Unix socket shows a cut as an end.
            End::Clean if self.family == Family::Tcp || !other.is_gone() && !was_cut => {
                assert!(other.has_ended, "a clean end, and the other peer has not ended");
                assert_eq!(received, sent, "a clean end, and bytes are missing");
            }
            End::Clean => {}
            End::Reset => assert!(other.is_gone() || was_cut, "reset, and the other peer is there"),
        }
        if !was_cut && !self.is_gone() {
            assert!(received >= other.safe, "{received} bytes, and {} had come", other.safe);
        }
    }
}

impl AsFd for Peer {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.socket.as_ref().expect("the peer is not gone").as_fd()
    }
}

/// Waits up to a millisecond until a peer has something to receive.
pub fn wait_for_bytes<'a>(peers: impl IntoIterator<Item = &'a Peer>) {
    let waiting = peers.into_iter().filter(|peer| !peer.is_gone() && peer.end.is_none());
    let mut waiting: Vec<_> = waiting.map(|peer| PollFd::new(peer, PollFlags::IN)).collect();
    let millisecond = Timespec { tv_sec: 0, tv_nsec: 1_000_000 };
    poll(&mut waiting, Some(&millisecond)).unwrap();
}

thread_local! {
    /// One for all seeds of a thread: there are fewer ports than seeds.
    static LISTENER: Endpoint = Endpoint::new(Family::Tcp);
}

/// The proxy's limit on the descriptors of a message.
pub const PASSED_AT_MOST: usize = 16;
