//! The socket type: a connected stream of any family, non-blocking, registered once.
//!
//! splice(2) needs a descriptor and readiness, and systemd passes sockets of any family. So there
//! is one concrete type instead of an enum of streams.
//!
//! **A socket that is dropped without [`Socket::close`] is reset.** A connection cut short by a
//! signal, a panic or an error must not look complete to its peers.

pub mod proxy_protocol;
pub mod file_id;
pub mod resolve;
pub mod host_port;
pub mod address;
mod options;
mod fd;
#[expect(unsafe_code, reason = "system calls that the safe crates do not have")]
pub mod sys;
#[expect(unsafe_code, reason = "recvmmsg(2) and sendmmsg(2)")]
pub mod mmsg;
#[expect(unsafe_code, reason = "recvmsg(2) with descriptors")]
mod passed_fds;
pub mod control;

use std::cell::Cell;
use std::fs;
use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::pin::pin;
use std::sync::OnceLock;
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;

use rustix::event::PollFlags;
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, sockopt};
use socket2::SockRef;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::socket::address::Address;
use crate::socket::passed_fds::PassedMessage;
use crate::socket::sys::register;

pub use crate::socket::fd::{
    Family, FirstByte, abort, first_byte, has_hung_up, has_hung_up_reading, has_unread, polls,
};
pub use crate::socket::options::{Keepalive, set_nodelay, set_oobinline, set_reset_on_close};
pub use crate::socket::passed_fds::{PASSED_MAX, receive as receive_passed, send_passed};
pub use crate::socket::sys::{add_no_credentials, adds_credentials};

/// A connected stream socket.
#[derive(Debug)]
pub struct Socket {
    io: AsyncFd<OwnedFd>,
    family: Family,
    /// Whether the peer ever sent urgent data, as far as it is known.
    has_urgent_data: Cell<bool>,
    /// Whether urgent data or the end of the stream was seen: no other answer comes after that.
    has_checked_priority: Cell<bool>,
    /// Whether [`Socket::connected`] took the peer's reset from the socket.
    was_reset: Cell<bool>,
    /// Whether a stored descriptor keeps the connection open when this one is closed.
    is_shared: Cell<bool>,
    /// Whether dropping the socket must not reset the connection.
    closes_cleanly: bool,
}

/// The result of [`Socket::receive`].
#[derive(Clone, Copy, Debug)]
pub struct Received {
    /// The number of bytes; 0 is the end of the peer's bytes.
    pub bytes: usize,
    /// Whether the socket is empty, so that the next readiness comes with an edge.
    pub drained: bool,
    /// Some of the descriptors that a Unix peer has passed could not be opened.
    pub lost_descriptors: bool,
}

impl Socket {
    /// Registers a socket that is already non-blocking.
    pub fn register(fd: OwnedFd, family: Family) -> io::Result<Self> {
        Ok(Self {
            io: register(fd, Interest::READABLE | Interest::WRITABLE | Interest::PRIORITY)?,
            family,
            has_urgent_data: Cell::new(false),
            has_checked_priority: Cell::new(false),
            was_reset: Cell::new(false),
            is_shared: Cell::new(false),
            closes_cleanly: false,
        })
    }

    pub fn family(&self) -> Family {
        self.family
    }

    /// Waits for the outcome of a connect(2) that is in progress.
    pub async fn connected(&self) -> io::Result<()> {
        let mut guard = self.io.writable().await?;
        guard.retain_ready();
        // Without EPOLLERR or EPOLLHUP there is no error to ask for.
        if !guard.ready().is_write_closed() && !guard.ready().is_error() {
            return Ok(());
        }
        let Some(error) = SockRef::from(&self.io).take_error()? else { return Ok(()) };
        // A reset that answers the SYN is ECONNREFUSED. Before ECONNRESET and EPIPE the connection
        // was established, and the backend may have sent an answer before the reset.
        let was_established =
            matches!(Errno::from_io_error(&error), Some(Errno::CONNRESET | Errno::PIPE));
        if self.family != Family::Tcp || !was_established {
            return Err(error);
        }
        self.was_reset.set(true);
        Ok(())
    }

    /// Returns whether [`Socket::connected`] took the peer's reset from the socket.
    ///
    /// The kernel does not report the reset again: what follows the peer's bytes looks like a FIN.
    pub fn was_reset(&self) -> bool {
        self.was_reset.get()
    }

    pub fn local_address(&self) -> io::Result<Address> {
        Ok(Address::from_sockaddr(&SockRef::from(&self.io).local_addr()?))
    }

    pub fn peer_address(&self) -> io::Result<Address> {
        Ok(Address::from_sockaddr(&SockRef::from(&self.io).peer_addr()?))
    }

    /// Waits for an edge that says that bytes, or their end, may be there.
    ///
    /// The readiness is cleared before the caller reads, so bytes that arrive later make a new
    /// edge. The end of the stream is never cleared: after a short read with the peer's FIN already
    /// behind it, the caller reads again.
    pub fn poll_readable(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.io.poll_read_ready(cx))?.clear_ready();
        self.has_urgent_data();
        Poll::Ready(Ok(()))
    }

    /// Waits for a byte to receive, or for the peer's end. The byte stays unread, and the readiness
    /// is not cleared.
    pub fn poll_first_byte(&self, cx: &mut Context<'_>) -> Poll<FirstByte> {
        loop {
            let Ok(mut guard) = ready!(self.io.poll_read_ready(cx)) else {
                return Poll::Ready(FirstByte::Never);
            };
            match first_byte(&self.io) {
                FirstByte::Missing => guard.clear_ready(),
                first => return Poll::Ready(first),
            }
        }
    }

    /// Waits for an edge that says that the kernel may accept bytes, or never will again.
    pub fn poll_writable(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.io.poll_write_ready(cx))?.clear_ready();
        Poll::Ready(Ok(()))
    }

    /// Waits until the peer is gone: reset or, on a Unix socket, closed.
    ///
    /// The sending side must be open: TCP reports EPOLLHUP also when both directions are shut down.
    pub fn poll_hung_up(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        loop {
            let mut guard = ready!(self.io.poll_write_ready(cx))?;
            if guard.ready().is_write_closed() {
                return Poll::Ready(Ok(()));
            }
            guard.clear_ready();
        }
    }

    /// Receives up to `buffer.len()` bytes; `EAGAIN` when there are none yet. Not for Unix sockets,
    /// whose peers may pass descriptors.
    pub fn receive(&self, buffer: &mut [u8]) -> Result<Received, Errno> {
        let len = buffer.len();
        let bytes = rustix::net::recv(&self.io, buffer, RecvFlags::empty())?.0;
        let drained = bytes < len && !self.has_urgent_data();
        Ok(Received { bytes, drained, lost_descriptors: false })
    }

    /// Receives from a Unix socket. Adds the descriptors that come with the bytes to `descriptors`.
    pub fn receive_passed(
        &self,
        buffer: &mut [u8],
        descriptors: &mut Vec<OwnedFd>,
    ) -> Result<Received, Errno> {
        let len = buffer.len();
        let message = passed_fds::receive(&self.io, buffer, Some(descriptors))?;
        let PassedMessage { bytes, is_truncated, has_control } = message;
        // A receive ends after a message with descriptors, even if more bytes follow.
        let drained = bytes < len && !has_control && !self.has_urgent_data();
        Ok(Received { bytes, drained, lost_descriptors: is_truncated })
    }

    /// Returns how many bytes there are on a Unix socket, up to `buffer.len()` or to the end of the
    /// first message with descriptors, and whether there is such a message. All stays unread.
    pub fn peek_passed(&self, buffer: &mut [u8]) -> Result<(usize, bool), Errno> {
        let message = passed_fds::receive(&self.io, buffer, None)?;
        Ok((message.bytes, message.is_truncated))
    }

    /// Returns whether the peer ever sent urgent data (EPOLLPRI; tcp(7), "Sockets API").
    ///
    /// Receiving stops in front of urgent data as if the socket were empty. splice(2) never gets
    /// past it, not even to a FIN. So from then on only receiving works, and a short receive says
    /// nothing. The urgent byte itself is an ordinary byte ([`set_oobinline`]).
    pub fn has_urgent_data(&self) -> bool {
        // try_io costs one load. It also succeeds at the end of the stream, so its first success is
        // checked for EPOLLPRI. After the end no urgent data comes.
        if !self.has_checked_priority.get()
            && self.io.try_io(Interest::PRIORITY, |_| Ok(())).is_ok()
        {
            self.has_checked_priority.set(true);
            self.has_urgent_data.set(self.has_urgent_data.get() || self.has_priority_event());
        }
        self.has_urgent_data.get()
    }

    /// Returns whether a splice(2) that moved nothing has reached the end of the stream.
    ///
    /// splice(2) also returns 0 in front of urgent data when the peer's FIN is already there. The
    /// event loop may not have seen that EPOLLPRI yet, so this asks poll(2).
    pub fn has_ended(&self) -> bool {
        if polls(&self.io, PollFlags::PRI) {
            self.has_urgent_data.set(true);
        }
        !self.has_urgent_data.get()
    }

    fn has_priority_event(&self) -> bool {
        let mut cx = Context::from_waker(Waker::noop());
        let guard = pin!(self.io.ready(Interest::PRIORITY)).poll(&mut cx);
        matches!(guard, Poll::Ready(Ok(guard)) if guard.ready().is_priority())
    }

    /// Sends as many of `bytes` as the kernel accepts at once.
    pub fn send(&self, bytes: &[u8]) -> Result<usize, Errno> {
        rustix::net::send(&self.io, bytes, SendFlags::NOSIGNAL)
    }

    /// Returns about how many bytes the kernel accepts; `None` if poll(2) does not report POLLOUT.
    ///
    /// poll(2) applies all of the kernel's criteria, and after a `None` an edge reports readiness:
    /// the kernel makes edges only after poll(2) found the socket not ready. The number comes from
    /// the socket's memory. The kernel may accept less (tcp_notsent_lowat, a vsock peer).
    pub fn send_space(&self) -> Option<usize> {
        if !polls(&self.io, PollFlags::OUT | PollFlags::ERR | PollFlags::HUP) {
            return None;
        }
        let Ok(memory) = sys::send_memory(&self.io) else {
            return Some(usize::MAX);
        };
        let used = match self.family {
            Family::Unix => memory.allocated,
            Family::Tcp | Family::Vsock => memory.queued,
        };
        let free = memory.limit.saturating_sub(used);
        // The kernel's own headers take a part.
        Some((free - free / 8).max(1))
    }

    /// Limits the bytes that a TCP socket accepts ahead of the peer's window (`TCP_NOTSENT_LOWAT`
    /// in tcp(7)). A lower limit of the system (`tcp_notsent_lowat`) stays in force.
    pub fn limit_unsent(&self, bytes: u32) {
        static SYSTEM: OnceLock<u32> = OnceLock::new();
        let system = SYSTEM.get_or_init(|| {
            let limit = fs::read_to_string("/proc/sys/net/ipv4/tcp_notsent_lowat");
            limit.ok().and_then(|limit| limit.trim().parse().ok()).unwrap_or(u32::MAX)
        });
        if *system > bytes {
            // A kernel without the option accepts as much as tcp_wmem allows.
            let _ = SockRef::from(&self.io).set_tcp_notsent_lowat(bytes);
        }
    }

    /// Doubles what the kernel may hold for the peer, if that is at most `bytes`, and within
    /// `net.core.wmem_max`.
    pub fn double_send_buffer(&self, bytes: usize) {
        let current = sockopt::socket_send_buffer_size(&self.io).unwrap_or(usize::MAX);
        if current <= bytes {
            // The kernel doubles the value (SO_SNDBUF in socket(7)).
            let _ = sockopt::set_socket_send_buffer_size(&self.io, current);
        }
    }

    /// Returns the bytes sent that are still on this side.
    ///
    /// On TCP the peer's kernel has not acknowledged them; on Unix the peer has not received them.
    pub fn unacked(&self) -> usize {
        sys::outq_len(&self.io)
    }

    /// Whether the kernel closes this socket with bytes that were not received.
    pub fn closes_unread(&self) -> bool {
        !self.is_shared.get() && rustix::io::ioctl_fionread(&self.io).is_ok_and(|unread| unread > 0)
    }

    /// Returns how long a TCP socket has neither sent nor received data.
    pub fn idle(&self) -> Option<Duration> {
        (self.family == Family::Tcp).then(|| sys::tcp_idle(&self.io).ok())?
    }

    /// Returns whether the peer has reset the connection or cannot be reached any more.
    pub fn has_failed(&self) -> bool {
        polls(&self.io, PollFlags::ERR)
    }

    /// Ends this side's bytes.
    pub fn shutdown_write(&self) -> io::Result<()> {
        SockRef::from(&self.io).shutdown(Shutdown::Write)
    }

    /// Ends the connection as close(2) does, but keeps the socket open.
    ///
    /// The kernel still delivers what was sent. On TCP, bytes that were not read make it a reset.
    fn shutdown_both(&self) {
        // Not FIONREAD, which counts the FIN of an MPTCP peer as a byte.
        if self.family == Family::Tcp && first_byte(&self.io) == FirstByte::There {
            return self.abort();
        }
        if self.is_shared.get() && self.family == Family::Tcp {
            set_reset_on_close(&self.io, false);
        }
        // Fails only where the connection has ended already.
        let _ = SockRef::from(&self.io).shutdown(Shutdown::Both);
    }

    /// Resets the connection, but keeps the socket open. A Unix socket has no reset, and just ends.
    fn abort(&self) {
        abort(&self.io);
    }

    /// Closes without a reset: the kernel still delivers everything that was sent.
    pub fn close(mut self) {
        if self.is_shared.get() {
            self.shutdown_both();
        }
        self.closes_cleanly = true;
    }

    /// Closes with a reset on TCP: bytes that the peer has not acknowledged are lost.
    pub fn reset(self) {
        drop(self);
    }

    /// Notes that a stored descriptor refers to the socket as well.
    ///
    /// From now on [`Socket::close`] has to end the connection explicitly. If both descriptors are
    /// closed without that, the kernel resets the connection: half a transfer must not look
    /// complete.
    pub fn mark_shared(&self) {
        if !self.is_shared.replace(true) && self.family == Family::Tcp {
            set_reset_on_close(&self.io, true);
        }
    }

    /// Closes the socket without ending the connection, which a stored descriptor keeps open.
    pub fn detach(mut self) {
        self.mark_shared();
        self.closes_cleanly = true;
    }

    /// Returns a descriptor for another thread.
    ///
    /// # Errors
    /// When there is no descriptor left. The connection is reset then.
    pub fn release(mut self) -> io::Result<OwnedFd> {
        let fd = self.io.get_ref().try_clone()?;
        self.closes_cleanly = true;
        Ok(fd)
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
            set_reset_on_close(&self.io, true);
        }
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.io.as_fd()
    }
}
