//! The life of a connection: dial, header, forward, outcome.

pub mod worker;

use std::cell::RefCell;
use std::fmt;
use std::future::poll_fn;
use std::io;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use crate::backend::Backend;
use crate::backend::command::Supervisor;
use crate::backend::connect::Connector;
use crate::backend::wait::{BackendWait, SharedProbe};
use crate::config::timespan::TimeSpan;
use crate::counters::{ByteCounters, LoopCounters, Loops};
use crate::forward::control::{Control, ControlHandle};
use crate::forward::flow::LoopBuffers;
use crate::forward::idle::{IdleGuard, IdleSweeper};
use crate::forward::pipe::Limits;
use crate::forward::snapshot::{Side, Snapshot, SnapshotStore};
use crate::forward::{CloseReason, Forwarder, Outcome, Progress};
use crate::handover::journal::JournalEntry;
use crate::handover::{Detached, Handover};
use crate::limits::slot::Slot;
use crate::listen::listener::{Accepted, ListenerInfo};
use crate::logging::bytes::Bytes;
use crate::logging::{RateLimit, os_message};
use crate::proxy_protocol::ProxyProtocol;
use crate::socket::Socket;
use crate::socket::address::Address;

static UNREACHABLE: RateLimit = RateLimit::new(10, Duration::from_secs(10));
static QUIET: RateLimit = RateLimit::new(10, Duration::from_secs(10));

/// What all connections have in common, on whatever event loop.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The backends.
    pub backends: Vec<BackendSetup>,
    /// How long a client waits for its backend; zero means no wait.
    pub backend_wait: TimeSpan,
    /// COMMAND's supervisor.
    pub application: Option<Arc<Supervisor>>,
    /// The PROXY header that the backends expect.
    pub proxy_protocol: Option<ProxyProtocol>,
    /// `--connection-idle-time=`.
    pub connection_idle_time: TimeSpan,
    /// Pipes for each event loop.
    pub pipes: Limits,
    /// Where connections are stored, with `--handover=`.
    pub handover: Option<Arc<Handover>>,
    /// Counters of all event loops.
    pub loops: Arc<Loops>,
}

/// How one backend is reached.
#[derive(Clone, Debug)]
pub struct BackendSetup {
    /// Connects to a backend that is up.
    pub connector: Connector,
    /// The prober of `--backend-wait=`, common to all event loops.
    pub probing: SharedProbe,
}

/// What the connections of one event loop have in common.
#[derive(Debug)]
pub struct LoopContext {
    /// The backends.
    pub backends: Vec<Backend>,
    /// The PROXY header that the backends expect.
    pub proxy_protocol: Option<ProxyProtocol>,
    /// The forwarder's buffer and pipes.
    pub shared: Rc<LoopBuffers>,
    /// Byte counters, one per backend; the last one is for backends that are no longer configured.
    pub carried: Vec<Arc<ByteCounters>>,
    /// Closes idle connections, with `--connection-idle-time=`.
    pub watch: Option<Rc<IdleSweeper>>,
    /// Asks the connections to detach or to report.
    pub orders: Rc<Control>,
    /// Detached connections that are not stored yet.
    pub left: RefCell<Vec<Detached>>,
}

impl LoopContext {
    /// The plan, for one event loop.
    pub fn new(plan: &Settings) -> Self {
        let LoopCounters { carried, pipes } = plan.loops.add(plan.backends.len());
        let wait = plan.backend_wait;
        let backend = |BackendSetup { connector, probing }: &BackendSetup| {
            let backend_wait = Rc::new(BackendWait::new(connector.clone(), wait, probing.clone()));
            Backend::new(backend_wait, wait, plan.application.clone())
        };
        Self {
            backends: plan.backends.iter().map(backend).collect(),
            proxy_protocol: plan.proxy_protocol,
            shared: Rc::new(LoopBuffers::new(plan.pipes, pipes)),
            carried,
            watch: plan.connection_idle_time.finite().map(|time| Rc::new(IdleSweeper::new(time))),
            orders: Rc::default(),
            left: RefCell::default(),
        }
    }

    /// Where to count the bytes between clients and a backend; `None` is one that the plan does not know.
    fn carried(&self, backend: Option<usize>) -> Arc<ByteCounters> {
        Arc::clone(&self.carried[backend.unwrap_or(self.backends.len())])
    }

    fn idle_guard(&self) -> Option<IdleGuard> {
        self.watch.as_ref().map(IdleSweeper::join)
    }
}

/// A connection that the previous process stored.
#[derive(Debug)]
pub struct Restored {
    /// What it consists of.
    pub snapshot: Box<Snapshot<OwnedFd>>,
    /// The client's address.
    pub client: Address,
    /// The listener, as far as it still exists.
    pub listener: Arc<ListenerInfo>,
    /// The backend's address, whatever the targets are by now.
    pub backend: Address,
    /// The index of the backend that its listener leads to by now, if there is one.
    pub known_backend: Option<usize>,
    /// When the connection was accepted.
    pub start: Instant,
    /// What it takes up.
    pub slot: Slot,
    /// Its stored form (crash mode only).
    pub journal: Option<JournalEntry>,
}

/// Serves a client until the connection is over, and logs how it was.
///
/// Dropped before that, it resets both sides.
pub fn serve(
    accepted: Accepted<Socket>,
    backend: usize,
    entry: Option<JournalEntry>,
    context: Rc<LoopContext>,
) -> impl Future<Output = ()> {
    let start = Instant::now();
    let Accepted { socket, client: address, listener: entrance, slot, .. } = accepted;
    if entry.is_some() {
        socket.mark_shared();
    }
    // Before the task is polled for the first time, however late that is.
    let control = context.orders.join();
    // An async fn would keep its arguments twice, in each of thousands of connections.
    async move {
        let setup = &context.backends[backend];
        let carried = context.carried(Some(backend));
        let log = LogContext { start, address, entrance };
        // Boxed: what dialling needs is gone when the connection stands, which may be for days.
        let backend = match Box::pin(reach(&socket, setup, &control, &log)).await {
            ConnectOutcome::Backend(backend) => backend,
            ConnectOutcome::Failed(error) => {
                log.entrance.counts().failed.add_one();
                if let Some(suppressed) = UNREACHABLE.pass() {
                    tracing::warn!(
                        client = %log.address,
                        listener = %log.entrance,
                        backend = %setup.target(),
                        "{error}{suppressed}"
                    );
                }
                socket.close();
                return log.end("Connection closed, there is no backend", setup.target(), [0, 0]);
            }
            ConnectOutcome::ClientGone => {
                return log.end("Connection closed, the client has left", setup.target(), [0, 0]);
            }
            ConnectOutcome::Detach => match entry {
                Some(entry) => {
                    entry.leave();
                    return socket.leave();
                }
                None => {
                    let detached = Detached::client(start, socket, slot);
                    return context.left.borrow_mut().push(detached);
                }
            },
        };
        tracing::debug!(client = %log.address, listener = %log.entrance, "Connection established");
        let answer = |progress| log.report(progress, setup.target());
        let pair = pair(socket, backend, &log.address, entry, carried, &context);
        let outcome = pair.run(Some(&control), answer).await;
        log.finish(outcome, setup.target(), slot, &context);
    }
}

/// Goes on with a connection that was stored, until it is over.
pub fn resume(restored: Restored, context: Rc<LoopContext>) -> impl Future<Output = ()> {
    let Restored { snapshot, client, listener, backend, known_backend, start, slot, journal } =
        restored;
    let control = context.orders.join();
    async move {
        let log = LogContext { start, address: client, entrance: listener };
        let journal = journal.map(|entry| Box::new(entry.own()) as Box<dyn SnapshotStore>);
        let (shared, carried) = (Rc::clone(&context.shared), context.carried(known_backend));
        let pair =
            match Forwarder::restore(*snapshot, shared, carried, context.idle_guard(), journal) {
                Ok(pair) => pair,
                Err(error) => {
                    let error = os_message(&error);
                    return tracing::error!(
                        client = %log.address,
                        listener = %log.entrance,
                        "Failed to take a stored connection back, closing it: {error}"
                    );
                }
            };
        let outcome = pair.run(Some(&control), |progress| log.report(progress, &backend)).await;
        log.finish(outcome, &backend, slot, &context);
    }
}

/// Joins client and backend, the header in front.
fn pair(
    socket: Socket,
    backend: Socket,
    address: &Address,
    entry: Option<JournalEntry>,
    carried: Arc<ByteCounters>,
    context: &LoopContext,
) -> Forwarder {
    let header = match context.proxy_protocol {
        Some(version) => {
            let reached = socket.local_address();
            version.header(address, &reached.unwrap_or(Address::Unix(None)))
        }
        None => Vec::new(),
    };
    let shared = Rc::clone(&context.shared);
    let mut pair = Forwarder::new(socket, backend, header, shared, carried, context.idle_guard());
    if let Some(entry) = entry {
        pair.set_journal(Box::new(entry));
    }
    pair
}

/// What log lines of a connection have in common.
struct LogContext {
    start: Instant,
    address: Address,
    entrance: Arc<ListenerInfo>,
}

impl LogContext {
    /// Logs how it was, or keeps what is left of it.
    fn finish(
        self,
        outcome: io::Result<Outcome>,
        backend: &dyn fmt::Display,
        slot: Slot,
        context: &LoopContext,
    ) {
        let closed = match outcome {
            Ok(Outcome::Closed(closed)) => closed,
            Ok(Outcome::Left(pair)) => {
                if let Err(pair) = pair.detach_stored() {
                    let detached = Detached::forwarder(self.start, pair, slot);
                    context.left.borrow_mut().push(detached);
                }
                return;
            }
            Err(_) => return,
        };
        drop(slot);
        if closed.end == CloseReason::Quiet
            && let Some(watch) = &context.watch
            && let Some(suppressed) = QUIET.pass()
        {
            tracing::info!(
                client = %self.address,
                listener = %self.entrance,
                %backend,
                "Connection carried nothing for {}, closing it.{suppressed}",
                TimeSpan::new(watch.idle_time())
            );
        }
        self.end(&outcome_of(closed.end), backend, [closed.from_client, closed.from_backend]);
    }

    /// Logs how it is.
    fn report(&self, progress: Progress, backend: &dyn fmt::Display) {
        let Progress { from_client, from_backend, idle } = progress;
        let [there, back] = [from_client, from_backend].map(Bytes);
        let idle = idle.map(|idle| format!(", idle for {}", in_units(idle))).unwrap_or_default();
        self.log_progress(&format!("{there} to the backend, {back} back{idle}"), backend);
    }

    fn log_progress(&self, what: &str, backend: &dyn fmt::Display) {
        let age = in_units(self.start.elapsed());
        tracing::info!(
            client = %self.address,
            listener = %self.entrance,
            %backend,
            "Connection of {age}: {what}."
        );
    }

    fn end(&self, outcome: &str, backend: &dyn fmt::Display, [to, from]: [u64; 2]) {
        tracing::debug!(
            client = %self.address,
            listener = %self.entrance,
            %backend,
            bytes_from_client = to,
            bytes_from_backend = from,
            duration_usec = self.start.elapsed().as_micros() as u64,
            "{outcome}"
        );
    }
}

/// `1d 2h`, `3min 4s`: the two largest units.
fn in_units(time: Duration) -> String {
    let seconds = time.as_secs();
    let [days, hours, minutes] = [seconds / 86_400, seconds / 3600 % 24, seconds / 60 % 60];
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds}s"),
        (0, 0, _) => format!("{minutes}min {}s", seconds % 60),
        (0, ..) => format!("{hours}h {minutes}min"),
        _ => format!("{days}d {hours}h"),
    }
}

/// What came of connecting to the backend.
enum ConnectOutcome {
    Backend(Socket),
    Failed(String),
    ClientGone,
    Detach,
}

/// Connects to the backend, unless the client leaves first.
async fn reach(
    client: &Socket,
    backend: &Backend,
    control: &ControlHandle,
    log: &LogContext,
) -> ConnectOutcome {
    let answer = || log.log_progress("There is no backend yet", backend.target());
    tokio::select! {
        biased;
        () = control.detach_requested(answer) => ConnectOutcome::Detach,
        connected = backend.connect(&log.entrance.counts().waiting) => connected.map_or_else(ConnectOutcome::Failed, ConnectOutcome::Backend),
        () = client_gone(client) => ConnectOutcome::ClientGone,
    }
}

/// Waits until the client of a dial has gone: reset, or a Unix client that closed. A FIN says only that it
/// waits for its answer, and a Unix client may have closed after it sent all it had to say: the backend
/// gets its bytes.
async fn client_gone(client: &Socket) {
    let gone = poll_fn(|cx| client.poll_hung_up(cx)).await.is_ok();
    if !gone || client.has_unread() {
        std::future::pending().await
    }
}

fn outcome_of(end: CloseReason) -> String {
    let (side, errno) = match end {
        CloseReason::Closed => return "Connection closed".into(),
        CloseReason::Quiet => return "Connection closed, it was idle".into(),
        CloseReason::Fault(Side::Client, errno) => ("client", errno),
        CloseReason::Fault(Side::Backend, errno) => ("backend", errno),
    };
    let words = os_message(&errno.into());
    format!("Connection ended by the {side}: {words}")
}
