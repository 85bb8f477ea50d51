//! One session, and its socket to the backend.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::epoll::EventFlags;
use rustix::io::Errno;
use rustix::net::{SocketAddrUnix, bind};
use socket2::{Domain, Socket, Type};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::task::AbortHandle;

use crate::backend::readiness::OpenConnection;
use crate::backend::source::SourceAddress;
use crate::counters::GaugeGuard;
use crate::datagram::sender::Sink;
use crate::handover::journal::JournalEntry;
use crate::limits::slot::Slot;
use crate::socket::address::{Address, canonical};
use crate::socket::mmsg::{self, LocalAddress};
use crate::socket::sys::register;

/// A client, and what has become of its datagrams.
#[derive(Debug)]
pub struct Session {
    /// The index of its listener.
    pub listener: usize,
    /// The client's address as the kernel writes it. Empty for Unix senders without a name, which
    /// share one session and get no answers.
    pub name: Box<[u8]>,
    /// The address that the client sends to, if the listener has several.
    pub local: Option<LocalAddress>,
    /// The PROXY header of each datagram, or nothing.
    pub header: Box<[u8]>,
    pub backend: SessionBackend,
    /// Counts the session as open, where that keeps the backend ready.
    pub open: Option<OpenConnection>,
    pub slot: Slot,
    /// Whether its socket is among the unfinished ones.
    pub is_unfinished: bool,
    /// Its stored form, once it is confirmed (crash mode).
    pub entry: Option<JournalEntry>,
    /// Whether the client has an IPv4 address.
    pub is_ipv4: bool,
    /// Datagrams sent to the backend, and received from it.
    pub datagrams: [u64; 2],
}

#[derive(Debug)]
pub enum SessionBackend {
    /// The session holds its datagrams.
    Waiting {
        _task: WaitingTask,
    },
    Open(BackendSocket),
    /// The backend has refused a datagram. The next one looks for it again.
    Lost,
}

/// The task that looks for a session's backend. It ends when this is dropped.
#[derive(Debug)]
pub struct WaitingTask {
    pub task: AbortHandle,
    /// Counts the session as waiting.
    pub _waiting: GaugeGuard,
}

impl Drop for WaitingTask {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Session {
    pub fn client(&self) -> Address {
        address_of(&self.name)
    }

    /// Whether answers can be sent.
    pub fn is_one_way(&self) -> bool {
        self.name.is_empty()
    }
}

/// Returns the address that the kernel wrote.
pub fn address_of(name: &[u8]) -> Address {
    match name {
        [] => Address::Unnamed,
        name => Address::from_sockaddr(&mmsg::to_sockaddr(name)),
    }
}

/// A socket that is connected to the backend.
#[derive(Debug)]
pub struct BackendSocket {
    fd: OwnedFd,
    pub address: Address,
    /// Whether the kernel sends several datagrams from one buffer (UDP_SEGMENT in udp(7)).
    pub can_segment: bool,
    /// Whether the event loop waits until the socket takes datagrams again.
    pub waits_for_room: bool,
}

impl BackendSocket {
    /// Connects a datagram socket, which waits for nothing, from the address `from` or else from
    /// one of the proxy's own. A Unix socket gets a name, so that the backend can answer, unless
    /// the client cannot be answered.
    ///
    /// # Errors
    /// Those of socket(2), bind(2) and connect(2). UDP reports a missing backend only after a
    /// datagram.
    pub fn connect(
        address: &Address,
        from: Option<&SourceAddress>,
        is_one_way: bool,
    ) -> io::Result<Self> {
        let sockaddr = SourceAddress::sockaddr(from, address)?;
        let socket = Socket::new(sockaddr.domain(), Type::DGRAM.nonblocking(), None)?;
        let is_inet = matches!(address, Address::Inet(_));
        if !is_inet && !is_one_way {
            bind(&socket, &SocketAddrUnix::new_unnamed())?;
        }
        if let Some(from) = from {
            from.bind(&socket, &sockaddr)?;
        }
        socket.connect(&sockaddr)?;
        if is_inet {
            let local = socket.local_addr().ok();
            if Some(&sockaddr) == local.as_ref() {
                // The kernel has picked the port on which no backend listens.
                return Err(Errno::CONNREFUSED.into());
            }
            if let (Some(from), Some(local)) = (from, local.and_then(|local| local.as_socket())) {
                from.check(local)?;
            }
            mmsg::set_options(&socket, sockaddr.domain() == Domain::IPV6, false);
        }
        Ok(Self::new(socket.into(), address.clone()))
    }

    pub fn new(fd: OwnedFd, address: Address) -> Self {
        let can_segment = matches!(address, Address::Inet(_));
        Self { fd, address, can_segment, waits_for_room: false }
    }

    pub fn into_fd(self) -> OwnedFd {
        self.fd
    }

    pub fn is_unix(&self) -> bool {
        !matches!(self.address, Address::Inet(_))
    }

    /// Whether the type of service is an option of IPv4.
    pub fn is_ipv4(&self) -> bool {
        is_ipv4(&self.address)
    }

    pub fn sink(&mut self, retries: bool) -> Sink<'_> {
        Sink { fd: self.fd.as_fd(), can_segment: &mut self.can_segment, retries }
    }

    /// Returns the events to wait for.
    pub fn interest(&self) -> EventFlags {
        let room = if self.waits_for_room { EventFlags::OUT } else { EventFlags::empty() };
        EventFlags::IN | EventFlags::ET | room
    }
}

/// Whether an address is one of IPv4, `::ffff:a.b.c.d` included.
pub fn is_ipv4(address: &Address) -> bool {
    matches!(address, Address::Inet(address) if canonical(*address).is_ipv4())
}

/// A [`BackendSocket`] on tokio's event loop, before the relay has it.
#[derive(Debug)]
pub struct ProbedSocket {
    pub io: AsyncFd<OwnedFd>,
    address: Address,
}

impl ProbedSocket {
    pub fn new(socket: BackendSocket) -> io::Result<Self> {
        let BackendSocket { fd, address, .. } = socket;
        Ok(Self { io: register(fd, Interest::READABLE | Interest::ERROR)?, address })
    }

    pub fn into_socket(self) -> BackendSocket {
        BackendSocket::new(self.io.into_inner(), self.address)
    }
}

impl AsFd for BackendSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
