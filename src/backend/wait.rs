//! `--backend-wait=`: clients wait until their backend can be reached.
//!
//! While a backend cannot be reached *yet* (`ConnectError::is_transient`), a single prober tries
//! again and again, however many clients wait: 200 clients cost one connect(2) every 100 ms. When a
//! probe succeeds, all clients go on. One of them gets the prober's connection, so that a backend
//! that serves only one connection does not spend it on a probe. The prober ends when no client
//! waits, passive ones aside.
//!
//! A client's own attempt that takes long starts the prober beside it, and a client that succeeds
//! ends the prober. The others then connect to the address that has answered.
//!
//! With `--ready=http:` or `--ready=exec:` a client connects only while the backend is ready
//! ([`Readiness`]). Otherwise the prober probes until it is, and hands no connection on.
//!
//! With `--source=client` it hands none on either: its connection comes from the proxy's own
//! address. Each family of clients has a [`BackendWait`] and a prober of its own, since a backend
//! may answer at an address of one family only. Whether it is ready concerns all: a client that
//! cannot connect has the backend looked at again only if the proxy cannot reach it, either.
//!
//! With several event loops there is still one prober for each target. It runs on the loop that
//! started it, and the clients of all loops wait for it ([`SharedProber`]).

use std::cell::Cell;
use std::future::pending;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Notify, Semaphore, watch};
use tokio::task::yield_now;
use tokio::time::{Instant, sleep, timeout};

use crate::backend::attempts::{connect_once, connect_when_up};
use crate::backend::connect::{Connector, OnFullBacklog};
use crate::backend::connect_error::{CheckError, ConnectError};
use crate::backend::prober::{ProberRun, SharedProber, closed};
use crate::backend::readiness::{OpenConnection, Readiness};
use crate::backend::source::SourceAddress;
use crate::config::timespan::TimeSpan;
use crate::counters::ConnectErrorKind;
use crate::logging::{RateLimit, rate_limited};
use crate::runtime::backoff::Backoff;
use crate::socket::Socket;

/// The wait for one backend, for the clients of one event loop.
#[derive(Debug)]
pub struct BackendWait {
    pub connector: Connector,
    /// `--backend-wait=`. With zero clients do not wait, and there is no COMMAND.
    pub wait: TimeSpan,
    prober: SharedProber,
    /// Without it a backend that accepts connections is ready.
    readiness: Option<Arc<Readiness>>,
    /// What sessions of datagrams notify when they find the backend up; `None` if connections lead
    /// to the backend as well, which show that themselves.
    datagrams_only: Option<Arc<Notify>>,
    /// Turns of the clients that go on after the wait.
    turns: Semaphore,
}

impl BackendWait {
    pub fn new(
        connector: Connector,
        wait: TimeSpan,
        prober: SharedProber,
        readiness: Option<Arc<Readiness>>,
        datagrams_only: Option<Arc<Notify>>,
    ) -> Self {
        let turns = Semaphore::new(RELEASES_PER_TURN);
        Self { connector, wait, prober, readiness, datagrams_only, turns }
    }

    /// Whether connections lead to the backend, by which it can be asked.
    pub fn has_streams(&self) -> bool {
        self.datagrams_only.is_none()
    }

    /// Connects, now or as soon as the backend can be reached, however long that takes.
    ///
    /// # Errors
    /// Permanent errors.
    pub async fn connect(
        self: &Rc<Self>,
        from: Option<&SourceAddress>,
    ) -> Result<Socket, ConnectError> {
        let mut pauses = SOURCE_PAUSES;
        loop {
            if let Some(socket) = self.take_connection() {
                return Ok(socket);
            }
            let prober = self.prober.state().running();
            if let Some(ProberRun { wanted, .. }) = prober {
                closed(wanted).await;
            } else if let Some(readiness) = self.unready() {
                let error = readiness.describe("no answer yet");
                closed(self.start_prober(Some(error))).await;
            } else if let Some(connected) = Box::pin(self.attempt(from)).await {
                return connected;
            } else if from.is_some() {
                // The prober may connect where the client's address cannot.
                Box::pin(sleep(pauses.next())).await;
            }
            self.take_turn().await;
        }
    }

    /// Connects for a passive client, which waits only while the prober runs for others.
    ///
    /// # Errors
    /// Permanent errors, and `None` if the backend cannot be reached for now.
    pub async fn connect_passively(
        &self,
        from: Option<&SourceAddress>,
    ) -> Result<Socket, Option<ConnectError>> {
        loop {
            // A passive client may cause a probe, but does not start the prober.
            let is_ready = match self.unready() {
                Some(readiness) => readiness.ask().await,
                None => true,
            };
            if is_ready {
                match self.connector.connect(from, OnFullBacklog::Wait).await {
                    Err(error) if error.is_transient() => {
                        self.reset_if_lost(from).await;
                    }
                    connected => return connected.map_err(Some),
                }
            }
            let ProberRun { ended, .. } = self.prober.state().running().ok_or(None)?;
            closed(ended).await;
        }
    }

    /// Makes a client's own attempt. Returns `None` if the caller is to try again: the attempt
    /// failed for now and the prober has ended, or the backend is not ready any more.
    async fn attempt(
        self: &Rc<Self>,
        from: Option<&SourceAddress>,
    ) -> Option<Result<Socket, ConnectError>> {
        tokio::select! {
            biased;
            connected = self.connect_in_turn(from) => {
                match &connected {
                    // The attempt took long, and the backend may have been restarted.
                    Ok(_) if self.unready().is_some() => return None,
                    Ok(socket) => self.prober.state().end(socket),
                    // That says nothing about the backend.
                    Err(ConnectError::Family(..)) => {}
                    Err(error) if error.is_transient() => {
                        if self.readiness.is_some() {
                            Box::pin(self.reset_if_lost(from)).await;
                        }
                        closed(self.start_prober(Some(error.to_string()))).await;
                        return None;
                    }
                    Err(_) => self.reset_readiness(),
                }
                Some(connected)
            }
            socket = self.probe_beside(from) => Some(Ok(socket)),
        }
    }

    /// Has the prober run beside a client's own attempt that takes long, until the backend answers.
    ///
    /// One client gets the prober's connection. The others connect to the address that answered:
    /// their own attempts may hang at another one.
    async fn probe_beside(self: &Rc<Self>, from: Option<&SourceAddress>) -> Socket {
        if self.connector.is_instant() {
            return pending().await;
        }
        let mut pause = ATTEMPT_HANGS;
        loop {
            sleep(pause).await;
            closed(self.start_prober(None)).await;
            self.take_turn().await;
            if let Some(socket) = self.take_connection() {
                return socket;
            }
            if let Some(socket) = self.connect_to_answered(from).await {
                return socket;
            }
            pause = PROBE_AGAIN;
        }
    }

    /// Connects to the address that has answered. The client's own attempt uses the descriptor that
    /// is reserved for it, so this needs a permit.
    async fn connect_to_answered(&self, from: Option<&SourceAddress>) -> Option<Socket> {
        let _permit = self.connector.permits.beside.acquire().await;
        let address = self.prober.state().answered.clone().filter(|_| self.unready().is_none())?;
        let start = Instant::now();
        let connected = self.connector.try_address(&address, from, OnFullBacklog::Fail).await;
        self.connector.count(start, &connected);
        if connected.is_err() {
            // The others need not try it, too.
            self.prober.state().answered.take_if(|answered| *answered == address);
        }
        connected.ok()
    }

    /// Lets clients go on after a wait in small numbers, so that open connections have their turn
    /// between.
    pub async fn take_turn(&self) {
        let _turn = self.turns.acquire().await;
        yield_now().await;
    }

    /// Connects, or waits for room in a full backlog. A full backlog does not start the prober: its
    /// success would let all clients go on, though there is room for one.
    async fn connect_in_turn(&self, from: Option<&SourceAddress>) -> Result<Socket, ConnectError> {
        if !self.connector.has_queue() {
            match self.connector.connect(from, OnFullBacklog::Fail).await {
                Err(error) if error.is_full_backlog() => {
                    self.log_waiting(&error.to_string());
                    self.prober.state().last_error = Some(error.to_string());
                }
                connected => return connected,
            }
        }
        self.connector.connect(from, OnFullBacklog::WaitForever).await
    }

    /// Returns why the backend could not be reached in time: the prober's last error, or else a
    /// timeout of the client's own attempt, which this counts.
    pub fn record_timeout(&self) -> String {
        let last_error = self.prober.state().last_error.clone();
        last_error.unwrap_or_else(|| {
            self.connector.counters.fail(ConnectErrorKind::Timeout);
            let target = &self.connector.target;
            format!("Failed to connect to remote host: {target}: Connection timed out")
        })
    }

    /// Counts a connection to the backend until the result is dropped.
    pub fn count_open(&self) -> Option<OpenConnection> {
        self.readiness.as_ref().map(Readiness::count_open)
    }

    /// Makes the next client cause a probe.
    pub fn reset_readiness(&self) {
        if let Some(readiness) = &self.readiness {
            readiness.reset();
        }
    }

    /// Returns the readiness of a backend that is not ready.
    fn unready(&self) -> Option<&Arc<Readiness>> {
        self.readiness.as_ref().filter(|readiness| !readiness.is_ready())
    }

    /// Takes the connection on offer, if the backend is ready.
    fn take_connection(&self) -> Option<Socket> {
        self.prober.take_connection().filter(|_| self.unready().is_none())
    }

    /// Offers a fresh connection to the first caller of [`BackendWait::connect`], on any event
    /// loop. After a moment the connection is reset. If the backend is to see the client's address,
    /// the connection is closed.
    pub fn offer(&self, socket: Socket) {
        match self.connector.shows_clients() {
            true => self.prober.close_answered(socket),
            false => self.prober.offer(socket),
        }
    }

    /// Starts the prober, unless another client has started it meanwhile. `last_error` is `None`
    /// while the client's own attempt is in progress.
    fn start_prober(self: &Rc<Self>, last_error: Option<String>) -> watch::Receiver<()> {
        let mut state = self.prober.state();
        if let Some(ProberRun { wanted, .. }) = state.running() {
            return wanted;
        }
        // For an unready backend the first failed probe logs this: it may well succeed.
        if self.unready().is_none() {
            self.log_waiting(&match &last_error {
                Some(error) => error.clone(),
                None => format!("Connecting to {} takes long", self.connector.target),
            });
        }
        let ((wanted_sender, wanted), (ended_sender, ended)) =
            (watch::channel(()), watch::channel(()));
        state.run = Some(ProberRun { wanted: wanted.clone(), ended });
        state.last_error = last_error;
        state.answered = None;
        let task = Rc::clone(self).probe(wanted_sender, ended_sender);
        state.task = Some(tokio::task::spawn_local(task).abort_handle());
        wanted
    }

    fn log_waiting(&self, last_error: &str) {
        rate_limited!(WAITING, info, "{last_error}, holding clients for up to {}.", self.wait);
    }

    /// Looks whether the backend can serve clients: whether it accepts connections, and what a
    /// probe says.
    pub async fn check(&self) -> Result<(), CheckError> {
        if self.has_streams() || self.readiness.is_none() {
            self.answers().await?;
        }
        match &self.readiness {
            Some(readiness) => readiness.probe_once().await,
            None => Ok(()),
        }
    }

    /// Looks whether the backend accepts connections.
    pub async fn answers(&self) -> Result<(), CheckError> {
        if !self.has_streams() {
            return Err(CheckError::NotYet("only datagrams go there".into()));
        }
        let connector = self.connector.of_any_family();
        match timeout(CHECK_TIMEOUT, connect_once(&connector)).await {
            Ok(Ok(socket)) => {
                socket.close();
                Ok(())
            }
            Ok(Err(error)) if error.is_full_backlog() => Ok(()),
            Ok(Err(error)) if !error.is_transient() => Err(CheckError::Permanent(error)),
            Ok(Err(error)) => Err(CheckError::NotYet(error.reason())),
            Err(_) => Err(CheckError::NotYet("no answer".into())),
        }
    }

    /// Looks whether a connect that failed for now means that the backend is gone. If so, the next
    /// client causes a probe. The address `from` or its family may be all that the backend lacks.
    async fn reset_if_lost(&self, from: Option<&SourceAddress>) -> bool {
        let is_lost = from.is_none() || self.answers().await.is_err();
        if is_lost {
            self.reset_readiness();
        }
        is_lost
    }

    /// Connects to a backend that was ready. Returns `None` if it cannot be reached any more. Tries
    /// again while only this client cannot reach it.
    ///
    /// # Errors
    /// Permanent errors.
    pub async fn connect_if_up(
        self: &Rc<Self>,
        from: Option<&SourceAddress>,
    ) -> Result<Option<Socket>, ConnectError> {
        let mut pauses = SOURCE_PAUSES;
        loop {
            if let Some(socket) = self.take_connection() {
                return Ok(Some(socket));
            }
            if self.unready().is_some() {
                return Ok(None);
            }
            tokio::select! {
                biased;
                connected = self.connect_in_turn(from) => match connected {
                    Err(error) if error.is_transient() => {
                        if Box::pin(self.reset_if_lost(from)).await {
                            return Ok(None);
                        }
                    }
                    connected => return connected.map(Some),
                },
                socket = self.probe_beside(from) => return Ok(Some(socket)),
            }
            Box::pin(sleep(pauses.next())).await;
        }
    }

    /// Waits until the backend can serve clients. Returns the connection that showed it, unless a
    /// probe did. Passes each error that means "not yet" to `failed`.
    ///
    /// # Errors
    /// A permanent error.
    pub async fn wait_until_up(
        &self,
        failed: impl Fn(String),
    ) -> Result<Option<Socket>, ConnectError> {
        if let Some(readiness) = self.unready() {
            return readiness.wait_until_ready(failed).await.map(|()| None);
        }
        if let Some(found_up) = &self.datagrams_only {
            found_up.notified().await;
            return Ok(None);
        }
        let failed = |error: &ConnectError| {
            // The addresses of one family do not tell whether the backend is gone.
            if !self.connector.has_family() {
                self.reset_readiness();
            }
            failed(error.to_string());
        };
        connect_when_up(&self.connector, failed).await.map(Some)
    }

    /// Waits until a probe of `--ready=` succeeds, if there is one. Passes what each failed probe
    /// says to `failed`.
    ///
    /// # Errors
    /// A permanent error.
    pub async fn wait_until_probed(&self, failed: impl Fn(String)) -> Result<(), ConnectError> {
        match self.unready() {
            Some(readiness) => readiness.wait_until_ready(failed).await,
            None => Ok(()),
        }
    }

    /// The prober: tries until the backend can serve clients, or no client waits that is not
    /// passive. Dropping the senders at the end wakes all clients.
    async fn probe(self: Rc<Self>, wanted: watch::Sender<()>, _ended: watch::Sender<()>) {
        let is_logged = Cell::new(self.unready().is_none());
        let failed = |error: String| {
            if !is_logged.replace(true) {
                self.log_waiting(&error);
            }
            self.prober.state().last_error = Some(error);
        };
        let no_client_waits = async {
            // One receiver is the one in the shared state.
            while wanted.receiver_count() > 1 {
                sleep(CLIENTS_CHECK).await;
            }
        };
        tokio::select! {
            up = self.wait_until_up(failed) => match (up, &self.readiness) {
                (Ok(Some(connection)), _) => self.offer(connection),
                // Counted as ready, so that each waiting client meets the permanent error itself.
                (Err(_), Some(readiness)) => readiness.set_ready(),
                _ => {}
            },
            () = no_client_waits => {}
        }
        self.prober.state().last_error = None;
    }
}

/// How long to look whether the backend answers.
const CHECK_TIMEOUT: Duration = Duration::from_secs(1);

/// How long a client's own attempt takes before the prober starts beside it.
const ATTEMPT_HANGS: Duration = Duration::from_millis(500);

/// The pause before the prober starts again beside the same attempt.
const PROBE_AGAIN: Duration = Duration::from_millis(5);

/// The pauses of a client that cannot connect to a backend that answers others.
const SOURCE_PAUSES: Backoff = Backoff::new(Duration::from_millis(5), Duration::from_secs(1));

/// How often the prober looks whether a client waits.
const CLIENTS_CHECK: Duration = Duration::from_millis(100);

/// Clients that go on after a wait before the event loop looks at its other connections.
const RELEASES_PER_TURN: usize = 8;

/// Waits often begin in quick succession.
static WAITING: RateLimit = RateLimit::new(3, Duration::from_secs(10));
