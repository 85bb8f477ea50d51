//! A queue of messages with descriptors that outlives whoever writes it: a pair of connected
//! SOCK_SEQPACKET sockets, of which somebody else keeps a second reference.
//!
//! What was sent to one of the two stays in the other's queue until it is received, the descriptors
//! (`SCM_RIGHTS` in unix(7)) included. It is read with `MSG_PEEK`, so that reading takes nothing out.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags,
    SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType,
    bind, recvmsg, sendmsg, socketpair, sockopt,
};
use socket2::SockRef;

use crate::handover::record::{DESCRIPTORS_MAX, MESSAGE_MAX};
use crate::socket::sys::{outq_len, set_peek_offset};

/// Bytes of the queue that are asked for: some 10,000 messages. Whoever may not have them gets
/// what `net.core.wmem_max` allows.
const SIZE: usize = 16 * 1024 * 1024;

/// The two sockets.
#[derive(Debug)]
pub struct Queue {
    /// Where the messages are.
    inner: OwnedFd,
    /// Where they are sent.
    sender: OwnedFd,
    /// Bytes it may take, with what the kernel needs for each message.
    size: usize,
}

/// A message.
#[derive(Debug)]
pub struct Message {
    /// What it says.
    pub bytes: Vec<u8>,
    /// What came with it.
    pub fds: Vec<OwnedFd>,
    /// Whether that is all of both.
    pub is_whole: bool,
}

impl Queue {
    /// A new one, empty.
    ///
    /// # Errors
    /// socketpair(2)'s.
    pub fn new() -> io::Result<Self> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let (inner, sender) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
        // The kernel gives it a name that nobody else has ("autobind" in unix(7)), by which the other
        // knows it.
        bind(&inner, &SocketAddrUnix::new_unnamed())?;
        // With CAP_NET_ADMIN whatever the limit is.
        let _ = sockopt::set_socket_send_buffer_size_force(&sender, SIZE)
            .or_else(|_| sockopt::set_socket_send_buffer_size(&sender, SIZE));
        Ok(Self::from_ends(inner, sender))
    }

    /// One that exists, of which these are the two sockets.
    pub fn from_ends(inner: OwnedFd, sender: OwnedFd) -> Self {
        let size = sockopt::socket_send_buffer_size(&sender).unwrap_or(0);
        Self { inner, sender, size }
    }

    /// The same, if they are: the sender's peer has the name of the other.
    pub fn of(inner: OwnedFd, sender: OwnedFd) -> Option<Self> {
        let is_one = |fd: &OwnedFd| {
            rustix::io::ioctl_fionbio(fd, true).is_ok()
                && sockopt::socket_type(fd) == Ok(SocketType::SEQPACKET)
        };
        let name = SockRef::from(&inner).local_addr().ok()?;
        let peer = SockRef::from(&sender).peer_addr().ok()?;
        let are_two = is_one(&inner) && is_one(&sender);
        let is_named = name.as_abstract_namespace().is_some_and(|it| !it.is_empty());
        let are_connected = is_named && name == peer;
        (are_two && are_connected).then(|| Self::from_ends(inner, sender))
    }

    /// The two sockets, the one with the messages first.
    pub fn ends(&self) -> [BorrowedFd<'_>; 2] {
        [self.inner.as_fd(), self.sender.as_fd()]
    }

    /// How full it is, in percent of the bytes it may take.
    pub fn fullness(&self) -> usize {
        outq_len(&self.sender) * 100 / self.size.max(1)
    }

    /// Puts a message at its end.
    ///
    /// # Errors
    /// `EAGAIN` when it is full, `ETOOMANYREFS` when the user has more descriptors under way than
    /// `RLIMIT_NOFILE` (unix(7)).
    pub fn append(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), Errno> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
            return Err(Errno::INVAL);
        }
        sendmsg(&self.sender, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL).map(drop)
    }

    /// Reads the messages from the first on; they stay where they are.
    pub fn messages(&self) -> impl Iterator<Item = io::Result<Message>> {
        let mut offset = 0;
        std::iter::from_fn(move || {
            let mut space =
                [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
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

    /// What the messages say, without what came with them.
    ///
    /// # Errors
    /// recvmsg(2)'s.
    pub fn payloads(&self) -> io::Result<Vec<Vec<u8>>> {
        let mut payloads = Vec::new();
        let mut offset = 0;
        // Without a place for descriptors none are made.
        while let Some((bytes, ..)) = self.peek(&mut offset, &mut RecvAncillaryBuffer::default())? {
            payloads.push(bytes);
        }
        Ok(payloads)
    }

    /// The message at an offset, which is moved on behind it: what it says, or nothing if that is too
    /// long, and whether it was not.
    fn peek(
        &self,
        offset: &mut usize,
        control: &mut RecvAncillaryBuffer<'_>,
    ) -> io::Result<Option<(Vec<u8>, bool, ReturnFlags)>> {
        // Each time: of a message that is too long the next receive would give the rest.
        set_peek_offset(&self.inner, u32::try_from(*offset).map_err(|_| Errno::OVERFLOW)?)?;
        let mut bytes = vec![0; MESSAGE_MAX];
        let iov = &mut [IoSliceMut::new(&mut bytes)];
        // With MSG_TRUNC it says how long the message is, whatever the buffer took.
        let flags = RecvFlags::PEEK | RecvFlags::CMSG_CLOEXEC | RecvFlags::TRUNC;
        let received = match recvmsg(&self.inner, iov, control, flags) {
            Err(Errno::AGAIN) => return Ok(None),
            received => received?,
        };
        // The end of the other socket: it is somebody else's.
        if received.bytes == 0 {
            return Ok(None);
        }
        *offset += received.bytes;
        let is_whole = !received.flags.contains(ReturnFlags::TRUNC);
        bytes.truncate(if is_whole { received.bytes } else { 0 });
        Ok(Some((bytes, is_whole, received.flags)))
    }

    /// Takes the first message out, with its references to what came with it.
    pub fn pop(&self) -> bool {
        // Without a place for descriptors the kernel closes them.
        rustix::net::recv(&self.inner, &mut [0; 1], RecvFlags::empty()).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(queue: &Queue) -> Vec<Vec<u8>> {
        queue.messages().map(|message| message.unwrap().bytes).collect()
    }

    #[test]
    fn what_is_read_stays_and_what_is_first_goes_first() {
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
    fn only_two_ends_of_one_are_one() {
        let ends = |queue: &Queue| queue.ends().map(|fd| fd.try_clone_to_owned().unwrap());
        let (one, other) = (Queue::new().unwrap(), Queue::new().unwrap());
        one.append(b"first", &[]).unwrap();
        let [inner, sender] = ends(&one);
        assert_eq!(bytes(&Queue::of(inner, sender).unwrap()), [b"first"]);
        let [inner, sender] = ends(&one);
        assert!(Queue::of(sender, inner).is_none(), "the other way round");
        let ([inner, _], [_, sender]) = (ends(&one), ends(&other));
        assert!(Queue::of(inner, sender).is_none());
        let file = || OwnedFd::from(tempfile::tempfile().unwrap());
        assert!(Queue::of(file(), file()).is_none());
    }

    #[test]
    fn it_is_full_at_some_time() {
        let Queue { inner, sender, .. } = Queue::new().unwrap();
        sockopt::set_socket_send_buffer_size(&sender, 8192).unwrap();
        let queue = Queue::from_ends(inner, sender);
        assert!(queue.fullness() < 50);
        let full = std::iter::from_fn(|| queue.append(b"x", &[]).err()).next();
        let full = full.or_else(|| (0..100).find_map(|_| queue.append(b"x", &[]).err()));
        assert_eq!(full, Some(Errno::AGAIN));
        assert!(queue.fullness() >= 100);
    }
}
