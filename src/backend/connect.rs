//! A target to a connected socket: every address in turn, each with its own time limit.

use std::cell::RefCell;
use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use rustix::io::Errno;
use socket2::{Domain, Type};
use tokio::sync::{Semaphore, SemaphorePermit};
use tokio::task::yield_now;
use tokio::time::{Instant, sleep, timeout};

use crate::config::target::Target;
use crate::config::timespan::TimeSpan;
use crate::counters::{ConnectCounters, ConnectErrorKind};
use crate::logging::{RateLimit, os_message};
use crate::socket::address::Address;
use crate::socket::host_port::HostPort;
use crate::socket::resolve::{ResolveError, resolve};
use crate::socket::{Family, Keepalive, Socket, set_nodelay_or_warn, set_oobinline_or_warn};

/// Between two attempts while descriptors or memory are short, at first and at most.
const RETRY_FIRST: Duration = Duration::from_millis(5);
const RETRY_MAX: Duration = Duration::from_millis(100);

/// Clients that try a backend at a time whose backlog is full. The others wait in the order in which they
/// came.
const ATTEMPTS_MAX: usize = 4;

/// Attempts without a pause, for a backend that takes its clients faster than a timer ticks; then the
/// pause between two attempts, at first and at most.
const BACKLOG_TRIES: usize = 16;
const BACKLOG_RETRY_FIRST: Duration = Duration::from_millis(1);
const BACKLOG_RETRY_MAX: Duration = Duration::from_millis(20);

static LOOKUPS_BUSY: RateLimit = RateLimit::new(1, Duration::from_secs(60));
static OUT_OF_RESOURCES: RateLimit = RateLimit::new(1, Duration::from_secs(60));

/// Connects to one target, again and again. A clone shares the limit on lookups.
#[derive(Clone, Debug)]
pub struct Connector {
    target: Target,
    connect_timeout: TimeSpan,
    keepalive: Option<Keepalive>,
    lookups: Arc<Semaphore>,
    on_full_backlog: Arc<BacklogQueue>,
    counters: Arc<ConnectCounters>,
}

/// What to do about a Unix backend's full backlog.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum OnFullBacklog {
    /// Wait for the connect timeout.
    Wait,
    /// Wait for as long as the caller does.
    WaitOn,
    Fail,
}

/// The clients that wait for room in the backlog of a backend, on all event loops.
#[derive(Debug)]
struct BacklogQueue {
    attempts: Semaphore,
    waiting: AtomicUsize,
}

impl BacklogQueue {
    fn new() -> Self {
        Self { attempts: Semaphore::new(ATTEMPTS_MAX), waiting: AtomicUsize::default() }
    }

    fn is_empty(&self) -> bool {
        self.waiting.load(Ordering::Relaxed) == 0
    }

    /// Waits until it is the caller's turn to try, which lasts until the value is dropped.
    async fn turn(&self) -> BacklogTurn<'_> {
        self.waiting.fetch_add(1, Ordering::Relaxed);
        let mut turn = BacklogTurn { queue: self, _attempt: None };
        turn._attempt = self.attempts.acquire().await.ok();
        turn
    }
}

/// A place in the queue.
struct BacklogTurn<'a> {
    queue: &'a BacklogQueue,
    _attempt: Option<SemaphorePermit<'a>>,
}

impl Drop for BacklogTurn<'_> {
    fn drop(&mut self) {
        self.queue.waiting.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Why there is no connection.
#[derive(Debug)]
pub enum ConnectError {
    /// The name has no address.
    Resolve(ResolveError),
    /// None of the addresses answered: the last one that may yet, or else the last, and its error.
    Connect(Address, io::Error),
}

impl fmt::Display for ConnectError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Resolve(error) => error.fmt(f),
            Self::Connect(address, error) => {
                write!(f, "Failed to connect to remote host: {address}: {}", os_message(error))?;
                f.write_str(address.hint(error))?;
                if self.is_full_backlog() {
                    f.write_str(" (its backlog is full)")?;
                }
                Ok(())
            }
        }
    }
}

impl ConnectError {
    /// What the system says, without where.
    pub fn reason(&self) -> String {
        match self {
            Self::Resolve(error) => error.to_string(),
            Self::Connect(_, error) => os_message(error),
        }
    }

    /// Whether a Unix backend listens, and has no room for another client (EAGAIN).
    pub fn is_full_backlog(&self) -> bool {
        matches!(self, Self::Connect(_, error) if is_full_backlog(error))
    }

    /// What it is counted as.
    pub fn kind(&self) -> ConnectErrorKind {
        let Self::Connect(_, error) = self else { return ConnectErrorKind::Resolve };
        match Errno::from_io_error(error) {
            Some(Errno::CONNREFUSED) => ConnectErrorKind::Refused,
            Some(Errno::TIMEDOUT) => ConnectErrorKind::Timeout,
            Some(
                Errno::NETUNREACH
                | Errno::HOSTUNREACH
                | Errno::NETDOWN
                | Errno::HOSTDOWN
                | Errno::ADDRNOTAVAIL
                | Errno::NODEV,
            ) => ConnectErrorKind::Unreachable,
            Some(Errno::NOENT) => ConnectErrorKind::NotFound,
            Some(Errno::AGAIN) => ConnectErrorKind::Backlog,
            // The last is what RestrictAddressFamilies= says.
            Some(Errno::ACCESS | Errno::PERM | Errno::AFNOSUPPORT) => ConnectErrorKind::Denied,
            Some(Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM) => {
                ConnectErrorKind::Resources
            }
            _ => ConnectErrorKind::Other,
        }
    }

    /// Whether the backend may just not be up yet; a name that does not exist, or a sandbox's
    /// prohibition (EPERM), is not mended by time.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Resolve(error) => error.is_temporary(),
            Self::Connect(_, error) => matches!(
                Errno::from_io_error(error),
                Some(
                    Errno::CONNREFUSED
                        | Errno::NOENT
                        | Errno::AGAIN
                        | Errno::ACCESS
                        | Errno::NETUNREACH
                        | Errno::HOSTUNREACH
                        | Errno::ADDRNOTAVAIL
                        | Errno::TIMEDOUT
                        // The backend came up and went down in the middle of it; over vsock, nobody
                        // listens.
                        | Errno::CONNRESET
                        // Over vsock: that virtual machine does not run, as far as one can tell.
                        | Errno::NODEV
                )
            ),
        }
    }
}

impl Connector {
    /// `connect_timeout` is for each address; `keepalive` for TCP backends; as many lookups run at a
    /// time as there are places in `lookups`; all attempts are counted in `counters`.
    pub fn new(
        target: Target,
        connect_timeout: TimeSpan,
        keepalive: Option<Keepalive>,
        lookups: Arc<Semaphore>,
        counters: Arc<ConnectCounters>,
    ) -> Self {
        let on_full_backlog = Arc::new(BacklogQueue::new());
        Self { target, connect_timeout, keepalive, lookups, on_full_backlog, counters }
    }

    /// What has become of all attempts.
    pub fn counters(&self) -> &Arc<ConnectCounters> {
        &self.counters
    }

    /// The target, for messages.
    pub fn target(&self) -> &Target {
        &self.target
    }

    /// Looks the target up, and tries each of its addresses until one answers; a full backlog is
    /// waited for until the connect timeout is over.
    pub async fn dial(&self) -> Result<Socket, ConnectError> {
        self.connect_counted(OnFullBacklog::Wait).await
    }

    /// Dials for a caller that tries again by itself: a full backlog fails at once.
    pub async fn try_connect(&self) -> Result<Socket, ConnectError> {
        self.connect_counted(OnFullBacklog::Fail).await
    }

    /// Dials, and waits for room in the backlog for as long as the caller does.
    pub async fn connect_in_turn(&self) -> Result<Socket, ConnectError> {
        self.connect_counted(OnFullBacklog::WaitOn).await
    }

    /// Whether clients wait for room in the backlog.
    pub fn has_queue(&self) -> bool {
        !self.on_full_backlog.is_empty()
    }

    async fn connect_counted(
        &self,
        on_full_backlog: OnFullBacklog,
    ) -> Result<Socket, ConnectError> {
        let start = Instant::now();
        let connected = match &self.target {
            Target::Address(address) => self.try_address(address, on_full_backlog).await,
            // Boxed, here and below, for the sake of thousands that dial at a time.
            Target::Name(name) => Box::pin(self.connect_name(name, on_full_backlog)).await,
        };
        match &connected {
            Ok(_) => self.counters.durations.record(start.elapsed()),
            Err(error) => self.counters.fail(error.kind()),
        }
        connected
    }

    async fn connect_name(
        &self,
        name: &HostPort,
        on_full_backlog: OnFullBacklog,
    ) -> Result<Socket, ConnectError> {
        if self.lookups.available_permits() == 0 {
            if let Some(suppressed) = LOOKUPS_BUSY.pass() {
                tracing::warn!("The resolver is slow, lookups have to wait.{suppressed}");
            }
        }
        let permit = Arc::clone(&self.lookups).acquire_owned().await.ok();
        let addresses = resolve(name, permit).await.map_err(ConnectError::Resolve)?;
        let mut failed: Option<ConnectError> = None;
        for address in addresses {
            match self.try_address(&Address::Inet(address), on_full_backlog).await {
                Ok(socket) => return Ok(socket),
                Err(error) => {
                    tracing::debug!("{error}, trying the next address");
                    // An address of a family that is not to be had says nothing of the others.
                    if error.is_transient()
                        || !failed.as_ref().is_some_and(ConnectError::is_transient)
                    {
                        failed = Some(error);
                    }
                }
            }
        }
        Err(failed.expect("a name that resolves has an address"))
    }

    async fn try_address(
        &self,
        address: &Address,
        on_full_backlog: OnFullBacklog,
    ) -> Result<Socket, ConnectError> {
        // What kept us waiting says more than that time is up.
        let last_error = RefCell::new(None);
        let attempt = self.connect(address, on_full_backlog, &last_error);
        // A Unix socket connects at once or not at all.
        let waits_on =
            on_full_backlog == OnFullBacklog::WaitOn && matches!(address, Address::Unix(_));
        let connected = match self.connect_timeout.finite().filter(|_| !waits_on) {
            Some(limit) => timeout(limit, attempt).await.unwrap_or_else(|_| {
                let timed_out = || io::Error::from(Errno::TIMEDOUT);
                Err(last_error.take().unwrap_or_else(timed_out))
            }),
            None => attempt.await,
        };
        let socket = connected.map_err(|error| ConnectError::Connect(address.clone(), error))?;
        if let Some(keepalive) = self.keepalive.filter(|_| socket.family() == Family::Tcp) {
            keepalive.set_or_warn(&socket);
        }
        Ok(socket)
    }

    /// Connects to one address; waits for a Unix backend's backlog, and for descriptors and memory, and
    /// leaves a note of what it waits for.
    async fn connect(
        &self,
        address: &Address,
        on_full_backlog: OnFullBacklog,
        last_error: &RefCell<Option<io::Error>>,
    ) -> io::Result<Socket> {
        let waits = on_full_backlog != OnFullBacklog::Fail;
        if !(waits && self.has_queue()) {
            match connect_or_retry(address, last_error).await {
                Err(error) if waits && is_full_backlog(&error) => {
                    last_error.replace(Some(error));
                }
                connected => return connected,
            }
        }
        let _turn = Box::pin(self.on_full_backlog.turn()).await;
        let (mut tries, mut pause) = (0, BACKLOG_RETRY_FIRST);
        loop {
            match connect_or_retry(address, last_error).await {
                Err(error) if is_full_backlog(&error) => {
                    last_error.replace(Some(error));
                }
                connected => return connected,
            }
            if tries < BACKLOG_TRIES {
                tries += 1;
                yield_now().await;
            } else {
                Box::pin(sleep(pause)).await;
                pause = (pause * 2).min(BACKLOG_RETRY_MAX);
            }
        }
    }
}

fn is_full_backlog(error: &io::Error) -> bool {
    Errno::from_io_error(error) == Some(Errno::AGAIN)
}

/// Connects to one address, and tries again while descriptors or memory are short.
async fn connect_or_retry(
    address: &Address,
    last_error: &RefCell<Option<io::Error>>,
) -> io::Result<Socket> {
    let mut pause = RETRY_FIRST;
    loop {
        let error = match try_connect(address).await {
            Ok(socket) => return Ok(socket),
            Err(error) => error,
        };
        let is_short = matches!(
            Errno::from_io_error(&error),
            Some(Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM)
        );
        if !is_short {
            return Err(error);
        }
        if let Some(suppressed) = OUT_OF_RESOURCES.pass() {
            tracing::error!(
                "Failed to open a socket to the backend, trying again: {}{suppressed}",
                os_message(&error)
            );
        }
        last_error.replace(Some(error));
        Box::pin(sleep(pause)).await;
        pause = (pause * 2).min(RETRY_MAX);
    }
}

async fn try_connect(address: &Address) -> io::Result<Socket> {
    let (socket, in_progress) = start_connect(address)?;
    if in_progress {
        socket.connected().await?;
    }
    if let Address::Inet(target) = address {
        if matches!(socket.local_address()?, Address::Inet(local) if is_itself(*target, local)) {
            // Dropping it resets it, so that no TIME_WAIT keeps the backend from its port.
            return Err(Errno::CONNREFUSED.into());
        }
    }
    Ok(socket)
}

/// Starts to connect; whether the outcome is to be waited for.
fn start_connect(address: &Address) -> io::Result<(Socket, bool)> {
    let family = match address {
        Address::Inet(_) => Family::Tcp,
        Address::Unix(_) => Family::Unix,
        Address::Vsock { .. } => Family::Vsock,
    };
    let sockaddr = address.to_sockaddr()?;
    let domain = Domain::from(i32::from(sockaddr.family()));
    let socket = socket2::Socket::new(domain, Type::STREAM.nonblocking(), None)?;
    if family == Family::Tcp {
        set_nodelay_or_warn(&socket);
    }
    set_oobinline_or_warn(&socket);
    let in_progress = match socket.connect(&sockaddr) {
        Ok(()) => false,
        Err(error) if Errno::from_io_error(&error) == Some(Errno::INPROGRESS) => true,
        Err(error) => return Err(error),
    };
    Ok((Socket::register(socket.into(), family)?, in_progress))
}

/// When nobody listens on a port of the ephemeral range, connecting to it again and again ends in
/// getting that very port as the local one, and TCP connects it to itself. The unspecified address
/// is the loopback one to connect(2).
fn is_itself(target: SocketAddr, local: SocketAddr) -> bool {
    let (to, from) = (target.ip().to_canonical(), local.ip().to_canonical());
    target.port() == local.port() && (to == from || to.is_unspecified())
}
