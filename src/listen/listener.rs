//! Listeners, and the accept loop's step: how a client becomes an [`Accepted`].

use std::cell::Cell;
use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use rustix::event::PollFlags;
use rustix::io::Errno;
use rustix::net::{SocketType, sockopt};
use socket2::{SockAddr, SockRef};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::task::yield_now;
use tokio::time::sleep;

use crate::limits::descriptors::{FdBudget, FdPermit};
use crate::limits::slot::Slot;
use crate::listen::accepted::{Accepted, ListenerInfo};
use crate::listen::activation::PassedFd;
use crate::listen::stored::SocketFile;
use crate::logging::{RateLimit, message_id, os_message, rate_limited};
use crate::socket::address::{Address, SocketKind, SocketLabel};
use crate::socket::sys::{accept, accept_queue_len, register};
use crate::socket::{
    Family, Keepalive, add_no_credentials, adds_credentials, polls, set_nodelay, set_oobinline,
};

/// A listening stream socket.
#[derive(Debug)]
pub struct Listener {
    io: AsyncFd<OwnedFd>,
    family: Family,
    pub label: SocketLabel,
    pub info: Arc<ListenerInfo>,
    /// Whether accepted sockets inherit the listener's options.
    passes_options: bool,
    /// How many of the next accepted sockets may have been queued before the options were set;
    /// `None` before the first accept. A TCP connection inherits when its handshake completes.
    without_options: Cell<Option<u32>>,
    /// Whether accepted sockets inherit SO_PASSCRED or the like.
    adds_credentials: bool,
    keepalive: Cell<Option<Keepalive>>,
    /// Clients accepted since the accept loop last let other tasks run.
    accepted_since_yield: Cell<u32>,
    /// The socket file that this program created.
    file: Option<SocketFile>,
}

impl Listener {
    /// # Errors
    /// systemd-socket-proxyd's message for a socket that is not a listening stream socket.
    pub fn from_passed(passed: PassedFd) -> Result<Self, String> {
        let PassedFd { fd, name } = passed;
        let is_usable = sockopt::socket_type(&fd).is_ok_and(|found| found == SocketType::STREAM)
            && sockopt::socket_acceptconn(&fd).unwrap_or(false);
        if !is_usable {
            return Err("Passed in socket is not a stream socket.".into());
        }
        Self::from_fd(fd, Some(name.clone()), None).map_err(|error| passed_error(&name, &error))
    }

    /// Takes a listening socket and its socket file.
    pub fn from_fd(
        fd: OwnedFd,
        name: Option<String>,
        file: Option<SocketFile>,
    ) -> io::Result<Self> {
        // Accepted sockets inherit the options, which saves setting them for each connection.
        let (family, address) = configure(&fd)?;
        let passes_options = family == Family::Tcp && passes_options(&fd);
        let adds_credentials = family == Family::Unix && adds_credentials(&fd);
        let label = SocketLabel { name, kind: SocketKind::Stream, address };
        Ok(Self {
            io: register(fd, Interest::READABLE)?,
            family,
            info: ListenerInfo::new(&label),
            label,
            passes_options,
            without_options: Cell::new(None),
            adds_credentials,
            keepalive: Cell::new(None),
            accepted_since_yield: Cell::new(0),
            file,
        })
    }

    /// Sends keepalive probes to TCP clients that are accepted from now on.
    pub fn set_keepalive(&self, keepalive: Keepalive) {
        if self.family == Family::Tcp {
            keepalive.set(&self.io);
            self.keepalive.set(Some(keepalive));
        }
    }

    /// Waits for a client, and for descriptors for it and its backend, and accepts it. When no
    /// descriptors are free, calls `make_room`, which returns whether that has freed some.
    ///
    /// # Errors
    /// The listener itself is broken. Transient errors are retried and logged once a minute.
    pub async fn accept(
        &self,
        descriptors: &FdBudget,
        make_room: impl Fn() -> bool,
    ) -> io::Result<Accepted> {
        loop {
            // While clients are queued, accept(2) never returns EAGAIN, so this yields explicitly.
            if self.accepted_since_yield.get() >= ACCEPTS_PER_TURN {
                self.accepted_since_yield.set(0);
                yield_now().await;
            }
            let mut ready = self.io.readable().await?;
            let permit = match descriptors.try_reserve() {
                Some(permit) => permit,
                None if self.has_queued() && make_room() => continue,
                None if self.has_queued() => {
                    self.warn_of_shortage(descriptors);
                    descriptors.reserve().await
                }
                None => {
                    ready.clear_ready();
                    continue;
                }
            };
            let error = match accept(&self.io) {
                Ok((socket, address)) => return Ok(self.make_accepted(socket, &address, permit)),
                Err(error) => error,
            };
            match Errno::from_io_error(&error) {
                Some(Errno::AGAIN) => {
                    self.accepted_since_yield.set(0);
                    self.without_options.set(Some(0));
                    ready.clear_ready();
                }
                Some(Errno::BADF | Errno::INVAL | Errno::NOTSOCK | Errno::FAULT) => {
                    return Err(error);
                }
                Some(errno) if is_peer_error(errno) => {}
                // A lack of descriptors or memory, or a prohibition (EPERM, EACCES), may pass.
                _ => {
                    rate_limited!(
                        ACCEPT_FAILED,
                        warn,
                        listener = self,
                        "Failed to accept a client, trying again: {}.",
                        os_message(&error)
                    );
                    drop(permit);
                    sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    fn make_accepted(&self, socket: OwnedFd, address: &SockAddr, permit: FdPermit) -> Accepted {
        self.accepted_since_yield.set(self.accepted_since_yield.get() + 1);
        if !self.inherits_options() {
            set_options(&socket, self.family);
            if let Some(keepalive) = self.keepalive.get() {
                keepalive.set(&socket);
            }
        }
        if self.adds_credentials {
            add_no_credentials(&socket);
        }
        let listener = Arc::clone(&self.info);
        let slot = Slot::new(listener.count_open(), permit);
        let client = Address::from_sockaddr(address);
        Accepted { socket, family: self.family, client, listener, slot }
    }

    /// Returns whether the socket accepted last has the options of the listener.
    fn inherits_options(&self) -> bool {
        // Only the first one accepted, and what is queued then, can be older than the options.
        let left = self.without_options.get().unwrap_or_else(|| {
            accept_queue_len(&self.io).map_or(u32::MAX, |queued| queued.saturating_add(1))
        });
        self.without_options.set(Some(left.saturating_sub(1)));
        left == 0 && self.passes_options
    }

    /// Logs why clients wait in the kernel's backlog.
    fn warn_of_shortage(&self, descriptors: &FdBudget) {
        let (limit, message_id, cause, remedy) = if descriptors.is_connection_limit {
            (&AT_LIMIT, message_id::CONNECTION_LIMIT, "Hit connection limit", "")
        } else {
            let remedy = " (Raise LimitNOFILE=.)";
            (&OUT_OF_DESCRIPTORS, message_id::OUT_OF_DESCRIPTORS, "Out of file descriptors", remedy)
        };
        rate_limited!(
            limit,
            warn,
            message_id,
            listener = self,
            "{cause}, new clients wait in the kernel until a connection ends.{remedy}"
        );
    }

    /// Returns whether a client waits to be accepted.
    pub fn has_queued(&self) -> bool {
        polls(&self.io, PollFlags::IN | PollFlags::ERR | PollFlags::HUP)
    }

    /// Returns whether an IPv6 listener refuses IPv4 clients (`IPV6_V6ONLY` in ipv6(7)).
    pub fn is_ipv6_only(&self) -> bool {
        sockopt::ipv6_v6only(&self.io).unwrap_or(false)
    }

    /// Returns the socket file that this program created.
    pub fn file(&self) -> Option<&SocketFile> {
        self.file.as_ref()
    }

    /// Returns the socket, for another event loop, and its socket file. Dropping that removes the
    /// file.
    pub fn into_parts(self) -> (OwnedFd, Option<SocketFile>) {
        (self.io.into_inner(), self.file)
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.io.as_fd()
    }
}

impl fmt::Display for Listener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.label.fmt(f)
    }
}

/// Prepares a socket that was passed or opened. Returns its family and its own address.
pub fn configure(fd: &OwnedFd) -> io::Result<(Family, Address)> {
    let family = Family::of(fd)?.ok_or(Errno::AFNOSUPPORT)?;
    rustix::io::ioctl_fionbio(fd, true)?;
    set_options(fd, family);
    Ok((family, Address::from_sockaddr(&SockRef::from(fd).local_addr()?)))
}

/// Sets the options of a listener or of an accepted socket.
fn set_options(fd: &OwnedFd, family: Family) {
    if family == Family::Tcp {
        set_nodelay(fd);
    }
    set_oobinline(fd);
}

/// Returns whether TCP sockets accepted from this listener have the options that were set on it.
///
/// MPTCP refuses SO_OOBINLINE, which the sockets of its plain TCP clients can have. With
/// SO_REUSEPORT, clients of another listener may come here (`tcp_migrate_req` in Linux's
/// ip-sysctl).
fn passes_options(fd: &OwnedFd) -> bool {
    sockopt::socket_oobinline(fd).unwrap_or(false) && !sockopt::socket_reuseport(fd).unwrap_or(true)
}

pub fn passed_error(name: &str, error: &io::Error) -> String {
    format!("Failed to use passed socket {name}: {}.", os_message(error))
}

/// Returns whether an error of accept(2) concerns only the new connection, which ended while it was
/// queued. The next connection may be queued already.
pub fn is_peer_error(errno: Errno) -> bool {
    matches!(
        errno,
        Errno::CONNABORTED
            | Errno::INTR
            | Errno::PROTO
            | Errno::NOPROTOOPT
            | Errno::NETDOWN
            | Errno::NETUNREACH
            | Errno::HOSTDOWN
            | Errno::HOSTUNREACH
            | Errno::NONET
            | Errno::OPNOTSUPP
            | Errno::TIMEDOUT
    )
}

/// Clients accepted before open connections have their turn. Each client is a task that is ready at
/// once.
const ACCEPTS_PER_TURN: u32 = 8;

/// How long clients stay queued after accept(2) found a lack of descriptors or memory.
pub const ACCEPT_PAUSE: Duration = Duration::from_millis(200);

static OUT_OF_DESCRIPTORS: RateLimit = RateLimit::new(1, Duration::from_secs(60));
static AT_LIMIT: RateLimit = RateLimit::new(1, Duration::from_secs(60));
static ACCEPT_FAILED: RateLimit = RateLimit::new(1, Duration::from_secs(60));

#[cfg(test)]
mod tests {
    use std::net::{SocketAddr, TcpListener, TcpStream};

    use rustix::net::sockopt::{socket_oobinline, tcp_nodelay};
    use socket2::{Domain, Protocol, Socket, Type};

    use super::*;

    /// New clients keep the queue from ever being empty.
    #[tokio::test]
    async fn only_clients_from_before_the_options_are_given_them() {
        let socket = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = socket.local_addr().unwrap();
        let connect = || TcpStream::connect(address).unwrap();
        let _earlier = [connect(), connect()];
        let listener = Listener::from_fd(socket.into(), None, None).unwrap();
        let _later = [connect(), connect()];
        let inherits = std::array::from_fn(|_| {
            let _more = connect();
            let (accepted, _) = accept(&listener).unwrap();
            let inherits = listener.inherits_options();
            let has_options =
                tcp_nodelay(&accepted).unwrap() && socket_oobinline(&accepted).unwrap();
            assert!(has_options || !inherits, "an option is missing");
            inherits
        });
        assert_eq!(inherits, [false, false, false, false, false, true, true]);
    }

    #[tokio::test]
    async fn plain_clients_of_an_mptcp_listener_inherit_no_option() {
        let Ok(socket) = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::MPTCP)) else {
            return eprintln!("SKIPPED: an MPTCP listener: the kernel has no MPTCP");
        };
        socket.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
        socket.listen(8).unwrap();
        let address = socket.local_addr().unwrap().as_socket().unwrap();
        let listener = Listener::from_fd(socket.into(), None, None).unwrap();
        // As after the queue was found empty.
        listener.without_options.set(Some(0));
        let _client = TcpStream::connect(address).unwrap();
        let accepted = listener.accept(&FdBudget::new(8, 8), || false).await.unwrap();
        assert!(socket_oobinline(&accepted.socket).unwrap());
    }
}
