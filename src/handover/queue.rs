//! A queue of messages with descriptors that outlives its writer: a pair of connected
//! SOCK_SEQPACKET sockets, of which systemd keeps a second reference.
//!
//! What is sent to one of the two stays in the other's receive queue until it is received, the
//! descriptors (`SCM_RIGHTS` in unix(7)) included. Messages are read with `MSG_PEEK`, so that
//! reading takes nothing out.

use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags,
    SocketAddrUnix, SocketFlags, SocketType, bind, recvmsg, socketpair, sockopt,
};
use socket2::SockRef;

use crate::handover::encoding::MESSAGE_MAX;
use crate::socket::sys::{outq_len, set_peek_offset};
use crate::socket::{PASSED_MAX, send_passed};

/// The size in bytes to ask for: some 10,000 messages. Without privileges the kernel grants what
/// `net.core.wmem_max` allows.
const SIZE: usize = 16 * 1024 * 1024;

/// The two sockets.
#[derive(Debug)]
pub struct Queue {
    /// The messages are in its receive queue.
    reader: OwnedFd,
    writer: OwnedFd,
    /// The size in bytes, the kernel's overhead for each message included.
    size: usize,
}

/// A message.
#[derive(Debug)]
pub struct Message {
    pub bytes: Vec<u8>,
    pub fds: Vec<OwnedFd>,
    /// Neither the bytes nor the descriptors were truncated.
    pub is_whole: bool,
}

impl Queue {
    /// Creates an empty queue.
    ///
    /// # Errors
    /// socketpair(2)'s.
    pub fn new() -> io::Result<Self> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let (reader, writer) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
        // The kernel gives the socket a unique name ("autobind" in unix(7)), by which from_ends()
        // tells that the two belong together.
        bind(&reader, &SocketAddrUnix::new_unnamed())?;
        // With CAP_NET_ADMIN the limit does not apply.
        let _ = sockopt::set_socket_send_buffer_size_force(&writer, SIZE)
            .or_else(|_| sockopt::set_socket_send_buffer_size(&writer, SIZE));
        Ok(Self::from_ends_unchecked(reader, writer))
    }

    /// Wraps the two sockets of a queue.
    fn from_ends_unchecked(reader: OwnedFd, writer: OwnedFd) -> Self {
        let size = sockopt::socket_send_buffer_size(&writer).unwrap_or(0);
        Self { reader, writer, size }
    }

    /// Wraps two sockets if they are those of a queue: the writer's peer has the name of the
    /// reader.
    pub fn from_ends(reader: OwnedFd, writer: OwnedFd) -> Option<Self> {
        let is_seqpacket = |fd: &OwnedFd| {
            rustix::io::ioctl_fionbio(fd, true).is_ok()
                && sockopt::socket_type(fd) == Ok(SocketType::SEQPACKET)
        };
        let name = SockRef::from(&reader).local_addr().ok()?;
        let peer = SockRef::from(&writer).peer_addr().ok()?;
        let is_named = name.as_abstract_namespace().is_some_and(|it| !it.is_empty());
        let is_pair = is_seqpacket(&reader) && is_seqpacket(&writer) && is_named && name == peer;
        is_pair.then(|| Self::from_ends_unchecked(reader, writer))
    }

    /// Returns the reader and the writer.
    pub fn ends(&self) -> [BorrowedFd<'_>; 2] {
        [self.reader.as_fd(), self.writer.as_fd()]
    }

    /// Returns how full the queue is, in percent of its size.
    pub fn fullness(&self) -> usize {
        outq_len(&self.writer) * 100 / self.size.max(1)
    }

    /// Appends a message.
    ///
    /// # Errors
    /// `EAGAIN` when the queue is full, `ETOOMANYREFS` when the user has more descriptors in flight
    /// than `RLIMIT_NOFILE` (unix(7)).
    pub fn append(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), Errno> {
        send_passed(&self.writer, bytes, fds).map(drop)
    }

    /// Reads the messages from the first on. They stay in the queue.
    pub fn messages(&self) -> impl Iterator<Item = io::Result<Message>> {
        let mut offset = 0;
        std::iter::from_fn(move || {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(PASSED_MAX))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let (bytes, is_whole, flags) = match self.peek(&mut offset, &mut control).transpose()? {
                Ok(read) => read,
                Err(error) => return Some(Err(error)),
            };
            let rights = control.drain().filter_map(|message| match message {
                RecvAncillaryMessage::ScmRights(fds) => Some(fds),
                _ => None,
            });
            let fds = rights.flatten().collect();
            let is_whole = is_whole && !flags.contains(ReturnFlags::CTRUNC);
            Some(Ok(Message { bytes, fds, is_whole }))
        })
    }

    /// Returns the bytes of all messages, without opening their descriptors.
    ///
    /// # Errors
    /// recvmsg(2)'s.
    pub fn payloads(&self) -> io::Result<Vec<Vec<u8>>> {
        let mut payloads = Vec::new();
        let mut offset = 0;
        // Without a buffer for descriptors the kernel opens none.
        while let Some((bytes, ..)) = self.peek(&mut offset, &mut RecvAncillaryBuffer::default())? {
            payloads.push(bytes);
        }
        Ok(payloads)
    }

    /// Reads the message at `offset`, and moves `offset` behind it. Returns its bytes, or none if
    /// there are more than [`MESSAGE_MAX`], and whether it is whole.
    fn peek(
        &self,
        offset: &mut usize,
        control: &mut RecvAncillaryBuffer<'_>,
    ) -> io::Result<Option<(Vec<u8>, bool, ReturnFlags)>> {
        // Set each time: after a message that is too long the next receive would return its rest.
        set_peek_offset(&self.reader, u32::try_from(*offset).map_err(|_| Errno::OVERFLOW)?)?;
        let mut bytes = vec![0; MESSAGE_MAX];
        let iov = &mut [IoSliceMut::new(&mut bytes)];
        // With MSG_TRUNC the kernel returns the message's length, however small the buffer.
        let flags = RecvFlags::PEEK | RecvFlags::CMSG_CLOEXEC | RecvFlags::TRUNC;
        let received = match recvmsg(&self.reader, iov, control, flags) {
            Err(Errno::AGAIN) => return Ok(None),
            received => received?,
        };
        // The end of the stream: the writer is closed, so the sockets are not those of a queue.
        if received.bytes == 0 {
            return Ok(None);
        }
        *offset += received.bytes;
        let is_whole = !received.flags.contains(ReturnFlags::TRUNC);
        bytes.truncate(if is_whole { received.bytes } else { 0 });
        Ok(Some((bytes, is_whole, received.flags)))
    }

    /// Drops the first message and its descriptors. Returns whether there was one.
    pub fn pop(&self) -> bool {
        // Without a buffer for descriptors the kernel closes them.
        rustix::net::recv(&self.reader, &mut [0; 1], RecvFlags::empty()).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(queue: &Queue) -> Vec<Vec<u8>> {
        queue.messages().map(|message| message.unwrap().bytes).collect()
    }

    #[test]
    fn reading_takes_no_message_out_and_pop_takes_the_first() {
        let queue = Queue::new().unwrap();
        for text in ["a", "bcd", "ef"] {
            queue.append(text.as_bytes(), &queue.ends()).unwrap();
        }
        for _ in 0..3 {
            assert_eq!(bytes(&queue), [&b"a"[..], b"bcd", b"ef"]);
        }
        let too_long = vec![b'x'; 3 * MESSAGE_MAX];
        queue.append(&too_long, &[]).unwrap();
        queue.append(b"h", &[]).unwrap();
        let rest: Vec<_> = queue
            .messages()
            .skip(3)
            .map(|it| it.unwrap())
            .map(|it| (it.bytes.len(), it.is_whole))
            .collect();
        assert_eq!(rest, [(0, false), (1, true)]);
        assert_eq!(queue.payloads().unwrap()[2..], [&b"ef"[..], b"", b"h"]);
        assert_eq!(queue.messages().next().unwrap().unwrap().fds.len(), 2);
        assert!(queue.pop());
        queue.append(b"g", &[]).unwrap();
        assert_eq!(bytes(&queue), [&b"bcd"[..], b"ef", b"", b"h", b"g"]);
        while queue.pop() {}
        assert!(bytes(&queue).is_empty());
    }

    #[test]
    fn two_sockets_are_a_queue_only_if_they_are_a_pair() {
        let ends = |queue: &Queue| queue.ends().map(|fd| fd.try_clone_to_owned().unwrap());
        let (one, other) = (Queue::new().unwrap(), Queue::new().unwrap());
        one.append(b"first", &[]).unwrap();
        let [reader, writer] = ends(&one);
        assert_eq!(bytes(&Queue::from_ends(reader, writer).unwrap()), [b"first"]);
        let [reader, writer] = ends(&one);
        assert!(Queue::from_ends(writer, reader).is_none(), "the other way round");
        let flags = SocketFlags::CLOEXEC;
        let (reader, writer) =
            socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None).unwrap();
        bind(&reader, &SocketAddrUnix::new_unnamed()).unwrap();
        assert!(Queue::from_ends(reader, writer).is_none(), "a stream");
        let ([reader, _], [_, writer]) = (ends(&one), ends(&other));
        assert!(Queue::from_ends(reader, writer).is_none());
        let file = || OwnedFd::from(tempfile::tempfile().unwrap());
        assert!(Queue::from_ends(file(), file()).is_none());
    }

    #[test]
    fn a_full_queue_refuses_a_message() {
        let Queue { reader, writer, .. } = Queue::new().unwrap();
        sockopt::set_socket_send_buffer_size(&writer, 8192).unwrap();
        let queue = Queue::from_ends_unchecked(reader, writer);
        assert!(queue.fullness() < 50);
        let full = std::iter::from_fn(|| queue.append(b"x", &[]).err()).next();
        let full = full.or_else(|| (0..100).find_map(|_| queue.append(b"x", &[]).err()));
        assert_eq!(full, Some(Errno::AGAIN));
        assert!(queue.fullness() >= 100);
    }
}
