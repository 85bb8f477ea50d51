//! The state of a socket, asked by descriptor: an event loop need not know the socket.

use std::io;
use std::net::Shutdown;
use std::os::fd::AsFd;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, sockopt};
use socket2::SockRef;

/// The families of the stream sockets that are proxied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// AF_INET or AF_INET6.
    Tcp,
    Unix,
    Vsock,
}

impl Family {
    /// Returns the family of an open socket, or `None` for any other family.
    pub fn of(fd: impl AsFd) -> io::Result<Option<Self>> {
        Ok(match sockopt::socket_domain(fd)? {
            AddressFamily::INET | AddressFamily::INET6 => Some(Self::Tcp),
            AddressFamily::UNIX => Some(Self::Unix),
            AddressFamily::VSOCK => Some(Self::Vsock),
            _ => None,
        })
    }
}

/// Returns whether poll(2) reports one of `events` now.
pub fn polls(fd: impl AsFd, events: PollFlags) -> bool {
    let mut fds = [PollFd::new(&fd, events)];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut fds, Some(&now)).is_ok() && fds[0].revents().intersects(events)
}

/// Returns whether a socket has failed, or both of its directions are shut down.
pub fn has_hung_up(fd: impl AsFd) -> bool {
    polls(fd, PollFlags::ERR | PollFlags::HUP)
}

/// Returns whether the peer has sent its FIN, even if bytes before it were not received.
pub fn has_hung_up_reading(fd: impl AsFd) -> bool {
    polls(fd, PollFlags::RDHUP | PollFlags::HUP)
}

/// Returns whether a Unix socket has bytes to receive, perhaps the last of a peer that is gone.
///
/// Always false on TCP: what a TCP peer sent before its reset is not waited for.
pub fn has_unread(fd: impl AsFd) -> bool {
    Family::of(&fd).is_ok_and(|family| family == Some(Family::Unix))
        && rustix::io::ioctl_fionread(&fd).is_ok_and(|bytes| bytes > 0)
}

/// Whether a peer has sent a byte that was not received.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FirstByte {
    There,
    Missing,
    /// The peer has ended the connection, or it has failed.
    Never,
}

/// Looks for a byte to receive, which stays unread. (Without a buffer for them, descriptors of a
/// Unix peer stay queued as well.)
pub fn first_byte(fd: impl AsFd) -> FirstByte {
    let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
    match rustix::net::recv(&fd, &mut [0; 1], flags) {
        Ok((_, 1..)) => FirstByte::There,
        Err(Errno::AGAIN | Errno::INTR) => FirstByte::Missing,
        Ok(_) | Err(_) => FirstByte::Never,
    }
}

/// Ends a connection although other descriptors refer to its socket: on TCP by a reset.
pub fn abort(fd: impl AsFd) {
    if Family::of(&fd).is_ok_and(|family| family == Some(Family::Tcp)) {
        // connect(2), "AF_UNSPEC": dissolves the association. TCP sends a RST for that.
        let _ = rustix::net::connect_unspec(&fd);
    } else {
        let _ = SockRef::from(&fd).shutdown(Shutdown::Both);
    }
}
