//! Descriptors in the messages of a Unix stream socket: `SCM_RIGHTS` in unix(7).
//!
//! Kernel facts this rests on:
//!
//! - Descriptors belong to the first byte of their sendmsg(2). One receive may return the bytes of
//!   earlier messages and then bytes of a message with descriptors, together with these
//!   descriptors. It never goes on into the message after that. Further receives of the same
//!   message return bytes only.
//! - Without room for them the kernel closes descriptors, and sets MSG_CTRUNC. In a full table of
//!   descriptors it opens as many as fit, and sets MSG_CTRUNC, too.
//! - MSG_PEEK reads until the first message with descriptors, too, and opens them a second time.
//! - A send that accepts at least one byte has sent the descriptors.
//!
//! A Unix socket with SO_PASSCRED, SO_PASSSEC or SO_PASSPIDFD has other control messages, too. The
//! listener turns these options off.

use std::io::IoSlice;
use std::mem::{self, MaybeUninit};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};

use crate::socket::control;
use crate::socket::sys::last_errno;

/// Descriptors of one message at most: `SCM_MAX_FD` in the kernel.
pub const PASSED_MAX: usize = 253;

/// The longest control message that is received.
const CONTROL_MAX: usize = control::space(PASSED_MAX * size_of::<i32>());

/// The result of a receive.
#[derive(Clone, Copy, Debug)]
pub struct PassedMessage {
    /// The number of bytes; 0 is the end of the peer's bytes.
    pub bytes: usize,
    /// Descriptors were lost.
    pub is_truncated: bool,
    /// There were control messages. More bytes may be queued, though the receive was short.
    pub has_control: bool,
}

/// Receives without waiting. Adds the descriptors, close-on-exec, to `descriptors`. Without them
/// all stays unread, and descriptors count as lost.
///
/// Not inlined: other sockets need no room for control messages.
///
/// # Errors
/// Those of recvmsg(2).
#[inline(never)]
pub fn receive(
    fd: impl AsFd,
    buffer: &mut [u8],
    descriptors: Option<&mut Vec<OwnedFd>>,
) -> Result<PassedMessage, Errno> {
    // A usize has the alignment of a header.
    let mut control = [MaybeUninit::<usize>::uninit(); CONTROL_MAX / size_of::<usize>()];
    let mut iovec = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    // SAFETY: the structure consists of integers and pointers, for which all-zero is valid.
    let mut header: libc::msghdr = unsafe { mem::zeroed() };
    (header.msg_iov, header.msg_iovlen) = (&raw mut iovec, 1);
    header.msg_control = control.as_mut_ptr().cast();
    let (room, peek) = match &descriptors {
        Some(_) => (size_of_val(&control), 0),
        None => (0, libc::MSG_PEEK),
    };
    // The type of the length differs between C libraries.
    header.msg_controllen = room as _;
    let flags = libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC | peek;
    // recvmsg(3) of glibc is a cancellation point, which costs 50 instructions more.
    //
    // SAFETY: the header points to memory of the given lengths, which lives until the call returns.
    let bytes =
        unsafe { libc::syscall(libc::SYS_recvmsg, fd.as_fd().as_raw_fd(), &raw mut header, flags) };
    let bytes = usize::try_from(bytes).map_err(|_| last_errno())?;
    let is_truncated = header.msg_flags & libc::MSG_CTRUNC != 0;
    #[allow(clippy::unnecessary_cast, reason = "the type differs between C libraries")]
    let len = (header.msg_controllen as usize).min(size_of_val(&control));
    let has_control = len > 0 || is_truncated;
    let Some(descriptors) = descriptors else {
        return Ok(PassedMessage { bytes, is_truncated, has_control });
    };
    let mut at = 0;
    while at < len {
        let message = &control[at / size_of::<usize>()..];
        // SAFETY: the kernel has written a message here. It begins with its length, and what pads
        // it is not written.
        let message = unsafe {
            let written = message[0].assume_init().min(len - at);
            std::slice::from_raw_parts(message.as_ptr().cast(), written)
        };
        take_descriptors(message, descriptors);
        at += message.len().max(1).next_multiple_of(size_of::<usize>());
    }
    Ok(PassedMessage { bytes, is_truncated, has_control })
}

/// Takes the descriptors out of a control message that was just received.
fn take_descriptors(message: &[u8], descriptors: &mut Vec<OwnedFd>) {
    let Some(((libc::SOL_SOCKET, libc::SCM_RIGHTS), data, _)) = control::next(message) else {
        return;
    };
    let numbers = data.chunks_exact(size_of::<i32>()).filter_map(<[u8]>::first_chunk);
    let numbers = numbers.map(|number| i32::from_ne_bytes(*number));
    // SAFETY: the kernel has opened these descriptors for this receive. Nothing else owns them.
    descriptors.extend(numbers.map(|number| unsafe { OwnedFd::from_raw_fd(number) }));
}

/// Sends bytes, of which there is at least one, and descriptors with the first of them.
///
/// # Errors
/// Those of sendmsg(2): `ETOOMANYREFS` when the user has more descriptors in flight than
/// `RLIMIT_NOFILE` (unix(7)).
pub fn send_passed(
    fd: impl AsFd,
    bytes: &[u8],
    descriptors: &[BorrowedFd<'_>],
) -> Result<usize, Errno> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(PASSED_MAX))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !control.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(Errno::INVAL);
    }
    let bytes = &[IoSlice::new(bytes)];
    rustix::net::sendmsg(fd, bytes, &mut control, SendFlags::NOSIGNAL | SendFlags::DONTWAIT)
}
