//! Listeners, passed by systemd or opened in `open`, and the way a client comes in.

use std::cell::Cell;
use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{SocketType, sockopt};
use socket2::SockRef;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::task::yield_now;
use tokio::time::sleep;

use crate::counters::{GaugeGuard, ListenerCounters};
use crate::limits::descriptors::FdBudget;
use crate::limits::slot::Slot;
use crate::listen::activation::PassedFd;
use crate::listen::stored::SocketFile;
use crate::logging::{RateLimit, os_message};
use crate::socket::address::{Address, SocketLabel};
use crate::socket::file_id::FileId;
use crate::socket::sys::accept;
use crate::socket::sys::register;
use crate::socket::{Family, Keepalive, Socket, set_nodelay_or_warn, set_oobinline_or_warn};

/// How long to leave newcomers queued after accept(2) found the system short of something.
pub const ACCEPT_PAUSE: Duration = Duration::from_millis(200);

static OUT_OF_DESCRIPTORS: RateLimit = RateLimit::new(1, Duration::from_secs(60));
static AT_THE_CAP: RateLimit = RateLimit::new(1, Duration::from_secs(60));
static ACCEPT_FAILED: RateLimit = RateLimit::new(1, Duration::from_secs(60));
static REGISTER_FAILED: RateLimit = RateLimit::new(1, Duration::from_secs(60));

/// Clients accepted before open connections have their turn. Each client is a task that is ready at once.
const ACCEPTS_PER_TURN: u32 = 8;

/// A listening stream socket.
#[derive(Debug)]
pub struct Listener {
    io: AsyncFd<OwnedFd>,
    family: Family,
    identity: SocketLabel,
    info: Arc<ListenerInfo>,
    /// Whether all are accepted who had connected before the options of this socket were set: a TCP
    /// connection inherits them when its handshake is complete, not when it is accepted.
    inherits: Cell<bool>,
    keepalive: Cell<Option<Keepalive>>,
    /// Clients accepted in this turn of the event loop.
    accepted: Cell<u32>,
    /// The socket file made here.
    file: Option<SocketFile>,
}

/// An accepted connection: `S` is its descriptor, and on its event loop the registered socket.
#[derive(Debug)]
pub struct Accepted<S = OwnedFd> {
    /// The socket, non-blocking.
    pub socket: S,
    /// The socket's family.
    pub family: Family,
    /// The client's address.
    pub client: Address,
    /// The listener.
    pub listener: Arc<ListenerInfo>,
    /// What the connection takes up.
    pub slot: Slot,
}

impl Accepted {
    /// Hands the socket to the event loop of this thread.
    ///
    /// # Errors
    /// epoll_ctl(2)'s; the connection is logged and closed then.
    pub fn register(self) -> Option<Accepted<Socket>> {
        let Self { socket, family, client, listener, slot } = self;
        match Socket::register(socket, family) {
            Ok(socket) => Some(Accepted { socket, family, client, listener, slot }),
            Err(error) => {
                if let Some(suppressed) = REGISTER_FAILED.pass() {
                    let error = os_message(&error);
                    tracing::error!(
                        %client,
                        %listener,
                        "Failed to watch a connection, closing it: {error}{suppressed}"
                    );
                }
                None
            }
        }
    }
}

impl Listener {
    /// Takes a passed socket.
    ///
    /// # Errors
    /// systemd-socket-proxyd's words for what is not a listening stream socket.
    pub fn adopt(inherited: PassedFd) -> Result<Self, String> {
        let PassedFd { fd, name } = inherited;
        let usable = || -> io::Result<bool> {
            Ok(sockopt::socket_type(&fd)? == SocketType::STREAM && sockopt::socket_acceptconn(&fd)?)
        };
        if !usable().unwrap_or(false) {
            return Err("Passed in socket is not a stream socket.".into());
        }
        let adopted = Self::from_fd(fd, Some(name.clone()), None);
        adopted
            .map_err(|error| format!("Failed to use passed socket {name}: {}.", os_message(&error)))
    }

    /// Takes a listening socket; `file` goes when the listener does.
    pub fn from_fd(
        fd: OwnedFd,
        name: Option<String>,
        file: Option<SocketFile>,
    ) -> io::Result<Self> {
        // What it accepts inherits the options: once, instead of once a connection.
        let (family, address) = prepare(&fd)?;
        let identity = SocketLabel { name, address };
        Ok(Self {
            io: register(fd, Interest::READABLE)?,
            family,
            info: ListenerInfo::new(&identity),
            identity,
            inherits: Cell::new(false),
            keepalive: Cell::new(None),
            accepted: Cell::new(0),
            file,
        })
    }

    /// Has TCP clients probed from now on, as they are accepted.
    pub fn keep_alive(&self, keepalive: Keepalive) {
        if self.family == Family::Tcp {
            keepalive.set_or_warn(&self.io);
            self.keepalive.set(Some(keepalive));
        }
    }

    /// Waits for a client and accepts it, once there are descriptors for it and its backend.
    ///
    /// # Errors
    /// Only when the listener itself is broken; what passes is waited for, and said once a minute.
    pub async fn accept(&self, descriptors: &FdBudget) -> io::Result<Accepted> {
        loop {
            // Accepting alone never waits: connections that are open have their turn between.
            if self.accepted.get() >= ACCEPTS_PER_TURN {
                self.accepted.set(0);
                yield_now().await;
            }
            let mut ready = self.io.readable().await?;
            let reserved = match descriptors.try_reserve() {
                Some(reserved) => reserved,
                None if !self.has_queued() => {
                    ready.clear_ready();
                    continue;
                }
                None => {
                    self.warn_of_shortage(descriptors);
                    descriptors.reserve().await
                }
            };
            let (fd, address) = match accept(&self.io) {
                Ok((fd, address)) => (fd, Address::from_sockaddr(&address)),
                Err(error) => match Errno::from_io_error(&error) {
                    Some(Errno::AGAIN) => {
                        self.accepted.set(0);
                        self.inherits.set(true);
                        ready.clear_ready();
                        continue;
                    }
                    Some(Errno::BADF | Errno::INVAL | Errno::NOTSOCK | Errno::FAULT) => {
                        return Err(error);
                    }
                    Some(errno) if is_peer_error(errno) => continue,
                    // Out of something, or forbidden (EPERM, EACCES): that may pass.
                    _ => {
                        if let Some(suppressed) = ACCEPT_FAILED.pass() {
                            let error = os_message(&error);
                            tracing::warn!(
                                listener = %self,
                                "Failed to accept, trying again: {error}{suppressed}"
                            );
                        }
                        drop(reserved);
                        sleep(ACCEPT_PAUSE).await;
                        continue;
                    }
                },
            };
            self.accepted.set(self.accepted.get() + 1);
            if !self.inherits.get() || self.family == Family::Unix {
                set_options(&fd, self.family);
                if let Some(keepalive) = self.keepalive.get() {
                    keepalive.set_or_warn(&fd);
                }
            }
            let (family, listener) = (self.family, Arc::clone(&self.info));
            let slot = Slot::new(listener.enter(), reserved);
            return Ok(Accepted { socket: fd, family, client: address, listener, slot });
        }
    }

    /// Returns the socket, for another event loop, and its socket file, removed when that is dropped.
    pub fn into_parts(self) -> (OwnedFd, Option<SocketFile>) {
        (self.io.into_inner(), self.file)
    }

    /// Says why newcomers wait in the kernel.
    fn warn_of_shortage(&self, descriptors: &FdBudget) {
        if descriptors.at_connection_limit() {
            if let Some(suppressed) = AT_THE_CAP.pass() {
                tracing::warn!(
                    listener = %self,
                    "Hit connection limit, newcomers wait in the kernel until a connection \
                     ends.{suppressed}"
                );
            }
        } else if let Some(suppressed) = OUT_OF_DESCRIPTORS.pass() {
            tracing::warn!(
                listener = %self,
                "Out of file descriptors, newcomers wait in the kernel until a connection ends; \
                 raise LimitNOFILE=.{suppressed}"
            );
        }
    }

    /// Its name, and where it listens.
    pub fn identity(&self) -> &SocketLabel {
        &self.identity
    }

    /// Whether it takes no IPv4 clients, though it listens on an IPv6 address (`IPV6_V6ONLY` in
    /// ipv6(7)).
    pub fn is_ipv6_only(&self) -> bool {
        sockopt::ipv6_v6only(&self.io).unwrap_or(false)
    }

    /// Its socket file, device and inode.
    pub fn file(&self) -> Option<FileId> {
        self.file.as_ref().map(SocketFile::id)
    }

    /// Leaves its socket file where it is, for the next process.
    pub fn leave_file(&self) {
        self.file.iter().for_each(|file| file.set_stays(true));
    }

    /// Takes its socket file along when it is gone.
    pub fn own_file(&self) {
        self.file.iter().for_each(|file| file.set_stays(false));
    }

    /// It, as its connections know it.
    pub fn info(&self) -> &Arc<ListenerInfo> {
        &self.info
    }

    /// Whether somebody waits to be accepted at this moment.
    pub fn has_queued(&self) -> bool {
        let mut fds = [PollFd::new(&self.io, PollFlags::IN)];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        matches!(poll(&mut fds, Some(&now)), Ok(1..))
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.io.as_fd()
    }
}

impl fmt::Display for Listener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.identity.fmt(f)
    }
}

/// A way in, as the connections that came by it know it, on whatever thread.
#[derive(Debug)]
pub struct ListenerInfo {
    label: String,
    counts: Arc<ListenerCounters>,
}

impl ListenerInfo {
    /// Nobody has come in yet.
    pub fn new(identity: &SocketLabel) -> Arc<Self> {
        Self::with_counters(identity, Arc::default())
    }

    /// One whose connections are counted together with others.
    pub fn with_counters(identity: &SocketLabel, counts: Arc<ListenerCounters>) -> Arc<Self> {
        Arc::new(Self { label: identity.to_string(), counts })
    }

    /// What has happened here.
    pub fn counts(&self) -> &Arc<ListenerCounters> {
        &self.counts
    }

    /// One more has come in, and is not over.
    pub fn enter(&self) -> GaugeGuard {
        self.counts.open.take()
    }
}

impl fmt::Display for ListenerInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.label)
    }
}

/// Makes a socket that was passed or opened one of ours: its family, and its own address.
pub fn prepare(fd: &OwnedFd) -> io::Result<(Family, Address)> {
    let family = Family::of(fd)?.ok_or(Errno::AFNOSUPPORT)?;
    rustix::io::ioctl_fionbio(fd, true)?;
    set_options(fd, family);
    Ok((family, Address::from_sockaddr(&SockRef::from(fd).local_addr()?)))
}

/// What every client's socket has.
fn set_options(fd: &OwnedFd, family: Family) {
    if family == Family::Tcp {
        set_nodelay_or_warn(fd);
    }
    set_oobinline_or_warn(fd);
}

/// accept(2): errors of the new socket, which went away while it was queued. The next one may be
/// there already.
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
