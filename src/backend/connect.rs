//! From a target to a connected socket: each address in turn, each with its own time limit.

use std::cell::RefCell;
use std::fs;
use std::io;
use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use rustix::io::Errno;
use socket2::{Domain, Type};
use tokio::sync::Semaphore;
use tokio::task::{JoinSet, yield_now};
use tokio::time::{Instant, sleep, timeout};

use crate::backend::connect_error::{ConnectError, errno_kind};
use crate::backend::source::{ClientSources, IpFamily, SourceAddress};
use crate::config::target::Target;
use crate::config::timespan::TimeSpan;
use crate::counters::{ConnectCounters, ConnectErrorKind};
use crate::logging::{RateLimit, os_message, rate_limited};
use crate::runtime::backoff::Backoff;
use crate::socket::address::Address;
use crate::socket::host_port::HostPort;
use crate::socket::resolve::resolve;
use crate::socket::{Family, Keepalive, Socket, set_nodelay, set_oobinline};

/// Connects to one target. Clones share the limit on lookups and the queue for a full backlog.
#[derive(Clone, Debug)]
pub struct Connector {
    pub target: Target,
    /// The family of the clients whose address the backend sees. Other addresses of the target do
    /// not count.
    family: Option<IpFamily>,
    /// With `--source=client`.
    sources: Option<ClientSources>,
    /// Whether the name of the target may exist only while the backend runs.
    name_may_appear: bool,
    connect_timeout: TimeSpan,
    keepalive: Option<Keepalive>,
    pub permits: ConnectPermits,
    /// Turns to try a backend whose backlog is full. The other clients, of all event loops, wait in
    /// the order in which they came.
    backlog_turns: Arc<Semaphore>,
    /// Counts every attempt.
    pub counters: Arc<ConnectCounters>,
}

/// What the connectors of all targets share. Each permit stands for descriptors that are reserved.
#[derive(Clone, Debug)]
pub struct ConnectPermits {
    lookups: Arc<Semaphore>,
    lookups_max: usize,
    /// For addresses that are [watched](crate::backend::attempts).
    pub watched: Arc<Semaphore>,
    /// For a second connect while a client's own takes long.
    pub beside: Arc<Semaphore>,
}

impl ConnectPermits {
    pub fn new(lookups: usize, watched: usize, beside: usize) -> Self {
        let permits = |max| Arc::new(Semaphore::new(max));
        Self {
            lookups: permits(lookups),
            lookups_max: lookups,
            watched: permits(watched),
            beside: permits(beside),
        }
    }

    fn has_spare_lookups(&self) -> bool {
        self.lookups.available_permits() > self.lookups_max / 2
    }
}

/// What to do while the backlog of a Unix backend is full.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnFullBacklog {
    /// Fails at once. The caller tries again.
    Fail,
    /// Waits for room, up to the connect timeout.
    Wait,
    /// Waits until the caller gives up.
    WaitForever,
}

impl Connector {
    /// `connect_timeout` applies to each address, `keepalive` to TCP backends.
    pub fn new(
        target: Target,
        sources: Option<ClientSources>,
        name_may_appear: bool,
        connect_timeout: TimeSpan,
        keepalive: Option<Keepalive>,
        permits: ConnectPermits,
    ) -> Self {
        Self {
            target,
            family: None,
            sources,
            name_may_appear,
            connect_timeout,
            keepalive,
            permits,
            backlog_turns: Arc::new(Semaphore::new(BACKLOG_TURNS)),
            counters: Arc::default(),
        }
    }

    /// Returns the connectors for clients of IPv4 and IPv6, if the backend is to see their
    /// addresses. They share everything else.
    pub fn by_family(&self) -> Option<[Self; 2]> {
        let connector = |family| Self { family: Some(family), ..self.clone() };
        self.sources.map(|_| [IpFamily::V4, IpFamily::V6].map(connector))
    }

    /// Whether this is the connector for clients of one family.
    pub fn has_family(&self) -> bool {
        self.family.is_some()
    }

    /// Returns the connector for the proxy itself.
    pub fn of_any_family(&self) -> Self {
        Self { family: None, ..self.clone() }
    }

    /// Whether the backend sees the addresses of clients.
    pub fn shows_clients(&self) -> bool {
        self.sources.is_some() && self.target.has_ip()
    }

    /// Returns the address from which to connect for a client, unless that is the proxy's own.
    pub fn source_of(&self, client: &Address) -> Option<SourceAddress> {
        self.sources?.of(client)
    }

    /// Checks that a target that is an address can see clients of the connector's family. For a
    /// name, each lookup does.
    pub fn check_family(&self) -> Result<(), ConnectError> {
        match (&self.target, self.family) {
            (Target::Address(address), Some(family)) if !family.has(address) => {
                Err(ConnectError::Family(self.target.clone(), family))
            }
            _ => Ok(()),
        }
    }

    /// Returns the addresses to which clients of the connector's family can come.
    fn of_family(&self, mut addresses: Vec<Address>) -> Result<Vec<Address>, ConnectError> {
        let Some(family) = self.family else { return Ok(addresses) };
        addresses.retain(|address| family.has(address));
        match addresses.is_empty() {
            true => Err(ConnectError::Family(self.target.clone(), family)),
            false => Ok(addresses),
        }
    }

    /// Whether connect(2) does not wait for the backend: TARGET is a Unix socket.
    pub fn is_instant(&self) -> bool {
        matches!(&self.target, Target::Address(Address::Path(_) | Address::Abstract(_)))
    }

    /// Whether clients wait for room in the backlog.
    pub fn has_queue(&self) -> bool {
        self.backlog_turns.available_permits() < BACKLOG_TURNS
    }

    /// Looks the target up, and tries each of its addresses until one accepts. Connects from the
    /// address `from`, or else from the proxy's own.
    pub async fn connect(
        &self,
        from: Option<&SourceAddress>,
        on_full_backlog: OnFullBacklog,
    ) -> Result<Socket, ConnectError> {
        let start = Instant::now();
        let connected = match &self.target {
            Target::Address(address) => self.try_address(address, from, on_full_backlog).await,
            // Boxed, here and below: thousands of clients may connect at a time.
            Target::Name(name) => {
                let try_name = async {
                    self.try_each(&self.look_up(name).await?, from, on_full_backlog).await
                };
                Box::pin(try_name).await
            }
        };
        self.count(start, &connected);
        connected
    }

    /// Counts an attempt that has begun at `start`.
    pub fn count(&self, start: Instant, connected: &Result<Socket, ConnectError>) {
        match connected {
            Ok(_) => self.counters.durations.record(start.elapsed()),
            Err(error) => self.counters.fail(error.kind()),
        }
    }

    /// Returns the addresses of the target. A lookup that takes longer than [`LOOKUP_HANGS`] gets
    /// another beside it, while half of the permits are free. The first answer counts: a resolver
    /// that has lost a packet sends it again only after seconds.
    pub async fn addresses(&self) -> Result<Vec<Address>, ConnectError> {
        let name = match &self.target {
            Target::Address(address) => return Ok(vec![address.clone()]),
            Target::Name(name) => name,
        };
        let mut lookups = JoinSet::new();
        loop {
            let (connector, name) = (self.clone(), name.clone());
            lookups.spawn_local(async move { connector.look_up(&name).await });
            loop {
                match timeout(LOOKUP_HANGS, lookups.join_next()).await {
                    Ok(Some(Ok(Err(error)))) if error.is_transient() && !lookups.is_empty() => {}
                    Ok(Some(Ok(addresses))) => return addresses,
                    Ok(_) => break,
                    Err(_) if self.permits.has_spare_lookups() => break,
                    Err(_) => {}
                }
            }
        }
    }

    async fn look_up(&self, name: &HostPort) -> Result<Vec<Address>, ConnectError> {
        if self.permits.lookups.available_permits() == 0 {
            rate_limited!(
                LOOKUPS_BUSY,
                warn,
                "The resolver is slow, and further lookups wait for it."
            );
        }
        let permit = Arc::clone(&self.permits.lookups).acquire_owned().await.ok();
        let addresses = resolve(name, permit, self.name_may_appear).await;
        let addresses = addresses.map_err(ConnectError::Resolve)?;
        self.of_family(addresses.into_iter().map(Address::Inet).collect())
    }

    /// Tries each of `addresses`, which are not empty, until one accepts.
    pub async fn try_each(
        &self,
        addresses: &[Address],
        from: Option<&SourceAddress>,
        on_full_backlog: OnFullBacklog,
    ) -> Result<Socket, ConnectError> {
        let mut failed: Option<ConnectError> = None;
        for address in addresses {
            match self.try_address(address, from, on_full_backlog).await {
                Ok(socket) => return Ok(socket),
                Err(error) => {
                    tracing::debug!("{error}, trying the next address.");
                    // A permanent error, as of a family that this host lacks, must not hide a
                    // transient error of another address.
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

    pub async fn try_address(
        &self,
        address: &Address,
        from: Option<&SourceAddress>,
        on_full_backlog: OnFullBacklog,
    ) -> Result<Socket, ConnectError> {
        // The last error that caused a retry says more than ETIMEDOUT.
        let last_error = RefCell::new(None);
        let attempt = self.connect_when_possible(address, from, on_full_backlog, &last_error);
        // connect(2) on a Unix socket does not wait. Only a full backlog takes longer, or a
        // shortage of descriptors or memory.
        let is_unix = matches!(address, Address::Path(_) | Address::Abstract(_));
        let has_no_timeout = is_unix && on_full_backlog == OnFullBacklog::WaitForever;
        let connected = match self.connect_timeout.finite().filter(|_| !has_no_timeout) {
            Some(limit) => timeout(limit, attempt).await.unwrap_or_else(|_| {
                Err(last_error.take().unwrap_or_else(|| Errno::TIMEDOUT.into()))
            }),
            None => attempt.await,
        };
        let socket = connected.map_err(|error| ConnectError::Connect(address.clone(), error))?;
        if let Some(keepalive) = self.keepalive.filter(|_| socket.family() == Family::Tcp) {
            keepalive.set(&socket);
        }
        Ok(socket)
    }

    /// Connects to one address. Retries while the backlog is full, except with `Fail`, and while
    /// descriptors or memory are short. `last_error` receives the error that caused the retry.
    async fn connect_when_possible(
        &self,
        address: &Address,
        from: Option<&SourceAddress>,
        on_full_backlog: OnFullBacklog,
        last_error: &RefCell<Option<io::Error>>,
    ) -> io::Result<Socket> {
        let waits = on_full_backlog != OnFullBacklog::Fail;
        let wait_for_turn = async || Box::pin(self.backlog_turns.acquire()).await.ok();
        let mut turn = if waits && self.has_queue() { wait_for_turn().await } else { None };
        let (mut tries, mut backlog_pauses) = (0, BACKLOG_PAUSES);
        let mut resource_pauses = RESOURCE_PAUSES;
        loop {
            match try_connect(address, from).await {
                Err(error) if errno_kind(&error) == ConnectErrorKind::Resources => {
                    rate_limited!(
                        OUT_OF_RESOURCES,
                        error,
                        "Failed to open a socket to the backend, trying again: {}.",
                        os_message(&error)
                    );
                    last_error.replace(Some(error));
                    Box::pin(sleep(resource_pauses.next())).await;
                }
                Err(error) if waits && errno_kind(&error) == ConnectErrorKind::Backlog => {
                    last_error.replace(Some(error));
                    resource_pauses = RESOURCE_PAUSES;
                    if turn.is_none() {
                        turn = wait_for_turn().await;
                    } else if tries < BACKLOG_TRIES {
                        tries += 1;
                        yield_now().await;
                    } else {
                        Box::pin(sleep(backlog_pauses.next())).await;
                    }
                }
                connected => return connected,
            }
        }
    }
}

/// Connects to one address, from the address `from` or else from one of the proxy's own.
pub async fn try_connect(address: &Address, from: Option<&SourceAddress>) -> io::Result<Socket> {
    let (socket, in_progress) = start_connect(address, from)?;
    if in_progress {
        socket.connected().await?;
    }
    if let Address::Inet(target) = address {
        if from.is_none() && !may_be_ephemeral(target.port()) {
            return Ok(socket);
        }
        let target = from.map_or(*target, |_| SourceAddress::destination(*target));
        let Address::Inet(local) = socket.local_address()? else { return Ok(socket) };
        if is_self_connect(target, local) {
            // Dropping the socket resets it, so that no TIME_WAIT blocks the backend's port.
            return Err(Errno::CONNREFUSED.into());
        }
        if let Some(from) = from {
            from.check(local)?;
        }
    }
    Ok(socket)
}

/// Starts to connect. Returns the socket, and whether connect(2) is still in progress.
fn start_connect(address: &Address, from: Option<&SourceAddress>) -> io::Result<(Socket, bool)> {
    let family = match address {
        Address::Inet(_) => Family::Tcp,
        Address::Path(_) | Address::Abstract(_) | Address::Unnamed => Family::Unix,
        Address::Vsock { .. } => Family::Vsock,
    };
    let sockaddr = SourceAddress::sockaddr(from, address)?;
    let domain = Domain::from(i32::from(sockaddr.family()));
    let socket = socket2::Socket::new(domain, Type::STREAM.nonblocking(), None)?;
    if family == Family::Tcp {
        set_nodelay(&socket);
    }
    set_oobinline(&socket);
    if let Some(from) = from {
        from.bind(&socket, &sockaddr)?;
    }
    let in_progress = match socket.connect(&sockaddr) {
        Ok(()) => false,
        Err(error) if Errno::from_io_error(&error) == Some(Errno::INPROGRESS) => true,
        Err(error) => return Err(error),
    };
    Ok((Socket::register(socket.into(), family)?, in_progress))
}

/// Whether TCP connected a socket to itself.
///
/// Repeated attempts may end this way if the target is an ephemeral port on which nothing listens:
/// the kernel picks that port as the local one. To connect(2) the unspecified address is the
/// loopback address.
fn is_self_connect(target: SocketAddr, local: SocketAddr) -> bool {
    let (to, from) = (target.ip().to_canonical(), local.ip().to_canonical());
    target.port() == local.port() && (to == from || to.is_unspecified())
}

/// Whether connect(2) may pick this port for a socket that has none.
///
/// True for the first connect: the client for which the process was started does not wait until a
/// file is read.
fn may_be_ephemeral(port: u16) -> bool {
    static HAS_CONNECTED: AtomicBool = AtomicBool::new(false);
    if !HAS_CONNECTED.load(Relaxed) {
        HAS_CONNECTED.store(true, Relaxed);
        return true;
    }
    LOCAL_PORTS.contains(&port)
}

/// The ports that connect(2) picks (`ip_local_port_range` in ip(7)), as they were at the second
/// connect.
static LOCAL_PORTS: LazyLock<RangeInclusive<u16>> = LazyLock::new(|| {
    let range = fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").unwrap_or_default();
    let mut ports = range.split_whitespace().filter_map(|port| port.parse().ok());
    ports.next().unwrap_or(0)..=ports.next().unwrap_or(u16::MAX)
});

/// The pauses between attempts while descriptors or memory are short.
const RESOURCE_PAUSES: Backoff = Backoff::new(Duration::from_millis(5), Duration::from_millis(100));

/// How long a lookup takes before another one may start beside it.
const LOOKUP_HANGS: Duration = Duration::from_secs(1);

/// Clients that try a backend with a full backlog at a time.
const BACKLOG_TURNS: usize = 4;

/// Attempts without a pause, for a backend that accepts faster than a timer ticks.
const BACKLOG_TRIES: usize = 16;

/// The pauses between attempts after those.
const BACKLOG_PAUSES: Backoff = Backoff::new(Duration::from_millis(1), Duration::from_millis(20));

static LOOKUPS_BUSY: RateLimit = RateLimit::new(1, Duration::from_secs(60));
static OUT_OF_RESOURCES: RateLimit = RateLimit::new(1, Duration::from_secs(60));
