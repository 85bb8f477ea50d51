//! The one socket type: a connected stream of any family, non-blocking, registered once.
//!
//! splice(2) needs a descriptor and readiness, and activation hands over sockets of any family, so
//! there is one concrete type and no enum of streams.
//!
//! **A socket that is dropped without [`Socket::close`] is reset.** A connection that ends in any
//! other way than by its own ends (a signal, a panic, a failure) must not look whole to its peers.

pub mod file_id;
pub mod resolve;
pub mod host_port;
pub mod address;
#[expect(unsafe_code, reason = "system calls that the safe crates do not have")]
pub mod sys;

use std::cell::Cell;
use std::fs;
use std::future::Future;
use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::pin::pin;
use std::sync::OnceLock;
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{RecvAncillaryBuffer, RecvFlags, ReturnFlags, SendFlags, sockopt};
use socket2::SockRef;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::socket::address::Address;
use crate::socket::sys::register;

/// The families a stream socket can have here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// IPv4 or IPv6.
    Tcp,
    /// AF_UNIX.
    Unix,
    /// AF_VSOCK.
    Vsock,
}

impl Family {
    /// The family of an open socket, or `None` if it is not one of ours.
    pub fn of(fd: impl AsFd) -> io::Result<Option<Self>> {
        use rustix::net::AddressFamily;
        Ok(match sockopt::socket_domain(fd)? {
            AddressFamily::INET | AddressFamily::INET6 => Some(Self::Tcp),
            AddressFamily::UNIX => Some(Self::Unix),
            AddressFamily::VSOCK => Some(Self::Vsock),
            _ => None,
        })
    }
}

/// A connected stream socket.
#[derive(Debug)]
pub struct Socket {
    io: AsyncFd<OwnedFd>,
    family: Family,
    /// Urgent data was seen: see [`Socket::has_urgent_data`].
    urgent: Cell<bool>,
    was_reset: Cell<bool>,
    /// A stored reference keeps the connection open: closing the socket here ends nothing.
    is_shared: Cell<bool>,
    /// Whether both ends agreed that the connection is over.
    closes_cleanly: bool,
}

/// What a [`Socket::receive`] brought.
#[derive(Clone, Copy, Debug)]
pub struct Received {
    /// 0 is the end of the peer's bytes.
    pub bytes: usize,
    /// Nothing is left in the socket: the next readiness comes with an edge.
    pub drained: bool,
}

impl Socket {
    /// Takes a socket that is already non-blocking.
    pub fn register(fd: OwnedFd, family: Family) -> io::Result<Self> {
        Ok(Self {
            io: register(fd, Interest::READABLE | Interest::WRITABLE | Interest::PRIORITY)?,
            family,
            urgent: Cell::new(false),
            was_reset: Cell::new(false),
            is_shared: Cell::new(false),
            closes_cleanly: false,
        })
    }

    /// The family.
    pub fn family(&self) -> Family {
        self.family
    }

    /// Receives up to `buffer.len()` bytes; `EAGAIN` when there are none yet.
    pub fn receive(&self, buffer: &mut [u8]) -> Result<Received, Errno> {
        let send_space = buffer.len();
        let (bytes, ended_early) = if self.family == Family::Unix {
            // A Unix socket ends a receive early, with more bytes behind, where a message carried
            // descriptors or credentials. They can't be handed on, but their loss shows as CTRUNC.
            let received = rustix::net::recvmsg(
                &self.io,
                &mut [io::IoSliceMut::new(buffer)],
                &mut RecvAncillaryBuffer::default(),
                RecvFlags::empty(),
            )?;
            (received.bytes, received.flags.contains(ReturnFlags::CTRUNC))
        } else {
            (rustix::net::recv(&self.io, buffer, RecvFlags::empty())?.0, false)
        };
        let drained = bytes < send_space && !ended_early && !self.has_urgent_data();
        Ok(Received { bytes, drained })
    }

    /// Whether the peer ever sent urgent data (EPOLLPRI; tcp(7), "Sockets API").
    ///
    /// Receiving stops in front of it as if the socket were empty, and splice(2) never gets past
    /// it, not even to a FIN. So from then on a short receive says nothing, and only receiving
    /// goes. The urgent byte itself is a byte like any other ([`set_oobinline_or_warn`]).
    pub fn has_urgent_data(&self) -> bool {
        // The first look is one load; it takes the end of the stream for urgent data.
        if !self.urgent.get()
            && self.io.try_io(Interest::PRIORITY, |_| Ok(())).is_ok()
            && self.is_priority()
        {
            self.urgent.set(true);
        }
        self.urgent.get()
    }

    /// Whether a splice(2) from here that moved nothing is at the end of the peer's bytes.
    ///
    /// With the peer's FIN already there, splice(2) also returns 0 in front of urgent data. The event
    /// that tells of it may not have been fetched yet, so the kernel is asked.
    pub fn has_ended(&self) -> bool {
        if self.polls(PollFlags::PRI) {
            self.urgent.set(true);
        }
        !self.urgent.get()
    }

    fn is_priority(&self) -> bool {
        let mut cx = Context::from_waker(Waker::noop());
        let guard = pin!(self.io.ready(Interest::PRIORITY)).poll(&mut cx);
        matches!(guard, Poll::Ready(Ok(guard)) if guard.ready().is_priority())
    }

    /// Sends what the kernel takes of `bytes` at once.
    pub fn send(&self, bytes: &[u8]) -> Result<usize, Errno> {
        rustix::net::send(&self.io, bytes, SendFlags::NOSIGNAL)
    }

    /// About as many bytes as the kernel will take, when it is ready for many; otherwise `None`, and
    /// then an edge comes when it is.
    ///
    /// poll(2) says whether it is, by all the kernel's criteria, and makes it tell when it becomes so:
    /// there are edges only for somebody who found it unready. The amount is that of the memory; it
    /// may take less (tcp_notsent_lowat, a vsock peer).
    pub fn send_space(&self) -> Option<usize> {
        if !self.polls(PollFlags::OUT | PollFlags::ERR | PollFlags::HUP) {
            return None;
        }
        let Ok(memory) = sys::send_memory(&self.io) else {
            return Some(usize::MAX);
        };
        let outq_len = match self.family {
            Family::Unix => memory.allocated,
            Family::Tcp | Family::Vsock => memory.outq_len,
        };
        // The kernel counts its own headers, too.
        let send_space = memory.limit.saturating_sub(outq_len);
        Some((send_space - send_space / 8).max(1))
    }

    /// Limits the bytes that a TCP socket accepts ahead of what its peer lets it send (`TCP_NOTSENT_LOWAT` in
    /// tcp(7)). A lower limit of the system (`tcp_notsent_lowat`) stays in force.
    pub fn limit_unsent(&self, bytes: u32) {
        static SYSTEM: OnceLock<u32> = OnceLock::new();
        let system = SYSTEM.get_or_init(|| {
            let limit = fs::read_to_string("/proc/sys/net/ipv4/tcp_notsent_lowat");
            limit.ok().and_then(|limit| limit.trim().parse().ok()).unwrap_or(u32::MAX)
        });
        if *system > bytes {
            // A kernel that does not know the option accepts what tcp_wmem allows.
            let _ = SockRef::from(&self.io).set_tcp_notsent_lowat(bytes);
        }
    }

    /// Passes on the end of the other side's bytes.
    pub fn shutdown_write(&self) -> io::Result<()> {
        SockRef::from(&self.io).shutdown(Shutdown::Write)
    }

    /// Waits for an edge that says bytes, or their end, may be there.
    ///
    /// The readiness is cleared before the caller reads: whatever arrives after that makes a new
    /// edge. The end of the stream is never cleared, so a read that came short with the peer's FIN
    /// already behind it is followed by another.
    pub fn poll_readable(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.io.poll_read_ready(cx))?.clear_ready();
        self.has_urgent_data();
        Poll::Ready(Ok(()))
    }

    /// Waits for an edge that says the kernel may take bytes, or never will again.
    pub fn poll_writable(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.io.poll_write_ready(cx))?.clear_ready();
        Poll::Ready(Ok(()))
    }

    /// Waits until the peer is gone altogether: reset, or, on a Unix socket, closed.
    ///
    /// The kernel says EPOLLHUP; on TCP it also does when both directions were shut down, so this
    /// is only to be asked of a socket whose sending side is open.
    pub fn poll_hung_up(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        loop {
            let mut guard = ready!(self.io.poll_write_ready(cx))?;
            if guard.ready().is_write_closed() {
                return Poll::Ready(Ok(()));
            }
            guard.clear_ready();
        }
    }

    /// Waits for the outcome of a connect(2) that is in progress.
    pub async fn connected(&self) -> io::Result<()> {
        let mut guard = self.io.writable().await?;
        guard.retain_ready();
        // Without EPOLLERR or EPOLLHUP there is no error to ask for.
        if !guard.ready().is_write_closed() && !guard.ready().is_error() {
            return Ok(());
        }
        match SockRef::from(&self.io).take_error()? {
            Some(error) if self.family == Family::Tcp && is_after_connect(&error) => {
                self.was_reset.set(true);
                Ok(())
            }
            Some(error) => Err(error),
            None => Ok(()),
        }
    }

    /// Whether the peer's reset was taken from the socket, which will not tell it again: behind the bytes
    /// that came before it stands what looks like a FIN.
    pub fn was_reset(&self) -> bool {
        self.was_reset.get()
    }

    /// The address of this side.
    pub fn local_address(&self) -> io::Result<Address> {
        Ok(Address::from_sockaddr(&SockRef::from(&self.io).local_addr()?))
    }

    /// Bytes sent that are still on this side: on TCP those that the peer's kernel has not
    /// acknowledged, on Unix those that its program has not received.
    pub fn unacked(&self) -> usize {
        sys::outq_len(&self.io)
    }

    /// For how long a TCP socket has neither sent nor received data (`TCP_INFO` in tcp(7)).
    pub fn idle(&self) -> Option<Duration> {
        if self.family != Family::Tcp {
            return None;
        }
        sys::tcp_idle(&self.io).ok()
    }

    /// Whether bytes have come that a Unix peer, now gone, wanted delivered. What a TCP peer sent
    /// before its reset is not waited for.
    pub fn has_unread(&self) -> bool {
        has_unread(&self.io)
    }

    /// Whether an error waits on the socket: the peer reset it, or can't be reached any more.
    pub fn has_failed(&self) -> bool {
        self.polls(PollFlags::ERR)
    }

    /// Whether nothing can be sent any more.
    pub fn is_over(&self) -> bool {
        has_hung_up(&self.io)
    }

    /// Whether poll(2) tells one of these at this moment.
    fn polls(&self, events: PollFlags) -> bool {
        polls(&self.io, events)
    }

    /// The descriptor alone, for another event loop.
    pub fn release(mut self) -> io::Result<OwnedFd> {
        self.closes_cleanly = true;
        self.io.get_ref().try_clone()
    }

    /// Notes that a second reference to it exists, so that its end has to be said. If it never is, and
    /// both are closed, it is reset: nobody is to take half a transfer for a whole one.
    pub fn mark_shared(&self) {
        if !self.is_shared.replace(true) && self.family == Family::Tcp {
            self.set_reset_by_close(true);
        }
    }

    /// Ends it as closing it does, and leaves it open: everything sent is still delivered, and bytes
    /// that have come and that nobody will read make it a reset.
    pub fn shutdown_both(&self) {
        // Not FIONREAD, which counts the FIN of an MPTCP peer as a byte.
        let has_unread = || {
            let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
            rustix::net::recv(&self.io, &mut [0; 1][..], flags).is_ok_and(|(bytes, _)| bytes > 0)
        };
        if self.family == Family::Tcp && has_unread() {
            self.abort();
        } else {
            if self.is_shared.get() && self.family == Family::Tcp {
                self.set_reset_by_close(false);
            }
            // Fails only where there is nothing to end any more.
            let _ = SockRef::from(&self.io).shutdown(Shutdown::Both);
        }
    }

    /// Resets it, and leaves it open. A Unix socket knows no reset, and just ends.
    pub fn abort(&self) {
        abort(&self.io);
    }

    /// Closes without a reset: everything sent is still delivered by the kernel.
    pub fn close(mut self) {
        if self.is_shared.get() {
            self.shutdown_both();
        }
        self.closes_cleanly = true;
    }

    /// Closes the socket here without ending the connection, which a stored reference keeps open.
    pub fn detach(mut self) {
        self.mark_shared();
        self.closes_cleanly = true;
    }

    fn set_reset_by_close(&self, is_reset: bool) {
        // tcp(7): closing with a linger time of zero sends RST instead of FIN.
        let _ = sockopt::set_socket_linger(&self.io, is_reset.then_some(Duration::ZERO));
    }

    /// Closes; a TCP peer sees a reset, and bytes it has not acknowledged are lost.
    pub fn reset(self) {
        drop(self);
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        if self.closes_cleanly {
            return;
        }
        if self.is_shared.get() {
            self.abort();
        } else if self.family == Family::Tcp {
            self.set_reset_by_close(true);
        }
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.io.as_fd()
    }
}

/// Whether a TCP connection was made before it failed: a reset in answer to a SYN is `ECONNREFUSED`. The
/// backend may have sent an answer before the reset.
fn is_after_connect(error: &io::Error) -> bool {
    matches!(Errno::from_io_error(error), Some(Errno::CONNRESET | Errno::PIPE))
}

fn polls(fd: impl AsFd, events: PollFlags) -> bool {
    let mut fds = [PollFd::new(&fd, events)];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut fds, Some(&now)).is_ok() && fds[0].revents().intersects(events)
}

/// Whether nothing can be sent on a socket any more.
pub fn has_hung_up(fd: impl AsFd) -> bool {
    polls(fd, PollFlags::ERR | PollFlags::HUP)
}

/// Whether the peer has ended its bytes, received or not.
pub fn has_hung_up_reading(fd: impl AsFd) -> bool {
    polls(fd, PollFlags::RDHUP | PollFlags::HUP)
}

/// Whether bytes have come on a Unix socket that nobody has received.
pub fn has_unread(fd: impl AsFd) -> bool {
    Family::of(&fd).is_ok_and(|family| family == Some(Family::Unix))
        && rustix::io::ioctl_fionread(&fd).is_ok_and(|bytes| bytes > 0)
}

/// Makes close(2) end the connection of a detached socket again, instead of resetting it: see
/// [`Socket::leave`].
pub fn clear_linger(fd: impl AsFd) {
    let _ = sockopt::set_socket_linger(fd, None);
}

/// Ends a connection whose socket has a stored reference: on TCP by a reset.
pub fn abort(fd: impl AsFd) {
    if Family::of(&fd).is_ok_and(|family| family == Some(Family::Tcp)) {
        // connect(2), "AF_UNSPEC": dissolves the association, which TCP does by an RST.
        let _ = rustix::net::connect_unspec(&fd);
    } else {
        let _ = SockRef::from(&fd).shutdown(Shutdown::Both);
    }
}

/// Without it about 40 ms are lost to the delayed acknowledgement on some patterns of requests. An
/// accepted socket inherits it from its listener.
pub fn set_nodelay_or_warn(fd: impl AsFd) {
    if let Err(error) = sockopt::set_tcp_nodelay(fd, true) {
        tracing::debug!("Failed to set TCP_NODELAY, ignoring: {error}");
    }
}

/// Makes urgent data ordinary: out of line its byte would be lost. On TCP an accepted socket inherits
/// it from its listener; on a Unix socket it does not, and each has to be given it before it is read.
pub fn set_oobinline_or_warn(fd: impl AsFd) {
    if let Err(error) = sockopt::set_socket_oobinline(fd, true) {
        tracing::debug!("Failed to set SO_OOBINLINE, ignoring: {error}");
    }
}

/// When a TCP peer that has vanished is noticed (tcp(7)): a first probe after a time without a byte,
/// nine in all, at intervals of a ninth of it, but at least a second.
///
/// There is no TCP_USER_TIMEOUT: it would end a connection whose live reader merely stalls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Keepalive {
    first: Duration,
    interval: Duration,
}

impl Keepalive {
    /// The longest time that the kernel takes.
    pub const MAX: Duration = Duration::from_secs(32_767);

    /// Probes after `first`, in whole seconds, rounded up.
    pub fn after(first: Duration) -> Self {
        let first = Duration::from_secs(first.as_secs_f64().ceil().max(1.0) as u64).min(Self::MAX);
        // Rounded down: nine of them are no longer than `first`.
        Self { first, interval: Duration::from_secs((first.as_secs() / 9).max(1)) }
    }

    /// Sets it; an accepted socket inherits it from its listener.
    pub fn set_or_warn(self, fd: impl AsFd) {
        const PROBES: u32 = 9;
        let set = || -> Result<(), Errno> {
            sockopt::set_tcp_keepidle(&fd, self.first)?;
            sockopt::set_tcp_keepintvl(&fd, self.interval)?;
            sockopt::set_tcp_keepcnt(&fd, PROBES)?;
            sockopt::set_socket_keepalive(&fd, true)
        };
        if let Err(error) = set() {
            tracing::debug!("Failed to set SO_KEEPALIVE, ignoring: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vanished_peer_is_noticed_within_twice_the_time_or_nine_seconds() {
        for seconds in [1, 2, 8, 9, 10, 17, 18, 30, 600, 32_767] {
            let Keepalive { first, interval } = Keepalive::after(Duration::from_secs(seconds));
            assert_eq!(first.as_secs(), seconds);
            let noticed = first + interval * 9;
            assert!(noticed <= first + first.max(Duration::from_secs(9)), "{seconds}: {noticed:?}");
        }
    }
}
