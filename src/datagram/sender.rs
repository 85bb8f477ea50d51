//! Sending a run, messages that go over one socket in one call: what each error means, and what was
//! delivered.

use std::os::fd::BorrowedFd;

use rustix::io::Errno;

use crate::counters::{DatagramCounters, DropReason};
use crate::socket::mmsg::{BATCH, Outgoing, SendBuffer};

/// A socket over which runs are sent.
#[derive(Debug)]
pub struct Sink<'a> {
    pub fd: BorrowedFd<'a>,
    /// Whether the kernel sends several datagrams from one buffer (UDP_SEGMENT in udp(7)). A device
    /// without checksum offload shows only with the first such message.
    pub can_segment: &'a mut bool,
    /// Whether a datagram that meets the ECONNREFUSED of an earlier one is sent again.
    pub retries: bool,
}

/// How a run has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RunEnd {
    Done,
    /// The socket takes no more for now.
    Full(Position),
    /// Nothing listens at the peer's address.
    Refused(Position),
}

/// The first datagram of a run that was not sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Position {
    pub message: usize,
    /// Datagrams of the message that were sent.
    pub datagram: usize,
}

/// Counts datagrams of one listener in one direction: 0 from clients, 1 from backends.
#[derive(Clone, Copy, Debug)]
pub struct Tally<'a> {
    pub counters: &'a DatagramCounters,
    pub direction: usize,
}

impl Tally<'_> {
    pub fn receive(&self, datagrams: usize) {
        self.counters.received[self.direction].inc_by(datagrams as u64);
    }

    pub fn drop(&self, reason: DropReason, datagrams: usize) {
        if datagrams > 0 {
            self.counters.drop(self.direction, reason, datagrams);
        }
    }

    /// Counts messages that were sent. Returns how many datagrams they are.
    pub fn deliver<'a>(&self, messages: impl Iterator<Item = Outgoing<'a>>) -> u64 {
        let (mut datagrams, mut bytes) = (0, 0);
        for message in messages {
            datagrams += message.datagrams() as u64;
            bytes += message.len() as u64;
        }
        self.counters.delivered[self.direction].inc_by(datagrams);
        self.counters.bytes[self.direction].inc_by(bytes);
        datagrams
    }
}

/// Sends `count` messages in order, and counts what is delivered and dropped; `delivered` is
/// increased as well.
///
/// A message that is too long or that the system refuses is dropped, and the next one goes on.
pub fn send_run<'a>(
    buffer: &mut SendBuffer,
    sink: Sink<'_>,
    count: usize,
    message: impl Fn(usize) -> Outgoing<'a>,
    tally: Tally<'_>,
    delivered: &mut u64,
) -> RunEnd {
    let Sink { fd, can_segment, retries } = sink;
    let mut at = Position::default();
    // The message that has to be sent datagram by datagram, and the one that was refused once.
    let (mut split, mut refused) = (None, None);
    while at.message < count {
        let first = message(at.message);
        let splits = |message: &Outgoing<'_>| {
            message.segment.is_some() && (!*can_segment || message.has_header())
        };
        let is_split = split == Some(at.message) || splits(&first);
        let sent = if is_split {
            let left = first.datagrams() - at.datagram;
            buffer.send(fd, left, |index| first.datagram(at.datagram + index))
        } else {
            let whole = (at.message..count).take(BATCH);
            let whole = whole.take_while(|index| !splits(&message(*index))).count();
            buffer.send(fd, whole, |index| message(at.message + index))
        };
        match sent {
            Ok(sent) if is_split => {
                let datagrams = (at.datagram..at.datagram + sent).map(|it| first.datagram(it));
                *delivered += tally.deliver(datagrams);
                at.datagram += sent;
                if at.datagram == first.datagrams() {
                    at = Position { message: at.message + 1, datagram: 0 };
                }
            }
            Ok(sent) => {
                *delivered += tally.deliver((at.message..at.message + sent).map(&message));
                at.message += sent;
            }
            Err(Errno::AGAIN) => return RunEnd::Full(at),
            Err(Errno::INTR) => {}
            // ENOENT: the socket file of a Unix client is gone.
            Err(Errno::CONNREFUSED | Errno::NOTCONN | Errno::NOENT) => {
                if !retries || refused == Some(at) {
                    return RunEnd::Refused(at);
                }
                refused = Some(at);
            }
            Err(errno) if first.segment.is_some() && !is_split => {
                // EIO: a device without checksum offload. Others concern the size of the segments.
                *can_segment &= errno != Errno::IO;
                split = Some(at.message);
            }
            // Also ENOBUFS: no event says when the kernel has memory again.
            Err(errno) => {
                let is_long = errno == Errno::MSGSIZE;
                tally.drop(if is_long { DropReason::TooLong } else { DropReason::Error }, 1);
                at.datagram += 1;
                if !is_split || at.datagram == first.datagrams() {
                    at = Position { message: at.message + 1, datagram: 0 };
                }
            }
        }
    }
    RunEnd::Done
}
