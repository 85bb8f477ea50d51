//! `--backend-wait=`: holds clients until the backend can be reached.
//!
//! While the backend cannot be reached *yet*, one prober for each target tries again and again, however many
//! clients wait: 200 of them cost one connect(2) every 100 ms. When it succeeds, all clients go on, and one
//! of them gets the prober's connection, so that a backend that serves only once is not spent on a probe. The
//! prober ends when no client waits. With several event loops there is still one prober: it runs on the
//! loop that started it, and all loops wait for it ([`SharedProbe`]).

use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Semaphore, watch};
use tokio::task::yield_now;
use tokio::time::sleep;

use crate::backend::connect::{ConnectError, Connector};
use crate::config::timespan::TimeSpan;
use crate::counters::ConnectErrorKind;
use crate::logging::RateLimit;
use crate::socket::{Family, Socket};

/// Between two probes, at first and at most: how late a backend may be noticed whose refusal is
/// immediate.
const PROBE_FIRST: Duration = Duration::from_millis(5);
const PROBE_MAX: Duration = Duration::from_millis(100);

/// How long somebody has to take the prober's connection.
const OFFER: Duration = Duration::from_millis(100);

/// Held clients that go on before the event loop looks at its other connections.
const RELEASES_PER_TURN: usize = 8;

/// Waits that begin one after the other need not each be said.
static WAITING: RateLimit = RateLimit::new(3, Duration::from_secs(10));

/// The pauses between probes, the first of them none.
#[derive(Debug, Default)]
pub struct Backoff(Duration);

impl Backoff {
    /// Waits for the moment of the next probe.
    pub async fn next(&mut self) {
        sleep(self.0).await;
        self.0 = (self.0 * 2).clamp(PROBE_FIRST, PROBE_MAX);
    }
}

/// What all event loops know of the prober.
#[derive(Clone, Debug, Default)]
pub struct SharedProbe(Arc<Mutex<ProbeState>>);

#[derive(Debug, Default)]
struct ProbeState {
    /// Closes with the prober; nothing is ever sent, so that a failed probe wakes nobody.
    ended: Option<watch::Receiver<()>>,
    /// What stands between the clients and the backend, as far as it is known.
    last_error: Option<String>,
    /// A connection that a probe has made, for the first to take it.
    connection: Option<(OwnedFd, Family)>,
    /// Which of all these it is.
    generation: u64,
}

impl SharedProbe {
    fn lock(&self) -> MutexGuard<'_, ProbeState> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The running prober; none that has ended, however it did.
    fn current(&self) -> Option<watch::Receiver<()>> {
        self.lock().current()
    }

    fn set_last_error(&self, last_error: Option<String>) {
        self.lock().last_error = last_error;
    }

    /// The connection that was offered, if the backend has not left it meanwhile.
    fn take_connection(&self) -> Option<Socket> {
        let (fd, family) = self.lock().connection.take()?;
        Socket::register(fd, family).ok().filter(|socket| !socket.has_hung_up())
    }
}

impl ProbeState {
    fn current(&self) -> Option<watch::Receiver<()>> {
        self.ended.clone().filter(|ended| ended.has_changed().is_ok())
    }
}

/// Where the clients of one event loop are held.
#[derive(Debug)]
pub struct BackendWait {
    /// The way to a backend that is up.
    pub connector: Connector,
    wait: TimeSpan,
    probe: SharedProbe,
    turns: Semaphore,
}

impl BackendWait {
    /// `wait` is how long clients are held, for messages.
    pub fn new(connector: Connector, wait: TimeSpan, probe: SharedProbe) -> Self {
        Self { connector, wait, probe, turns: Semaphore::new(RELEASES_PER_TURN) }
    }

    /// Connects, now or as soon as the backend is up, however long that takes.
    ///
    /// # Errors
    /// What time can't mend.
    pub async fn connect(self: &Rc<Self>) -> Result<Socket, ConnectError> {
        loop {
            if let Some(socket) = self.probe.take_connection() {
                return Ok(socket);
            }
            let mut probe = match self.probe.current() {
                Some(probe) => probe,
                None => match self.connect_in_turn().await {
                    Err(error) if error.is_transient() => self.start_probing(error.to_string()),
                    connected => return connected,
                },
            };
            let _ = probe.changed().await;
            self.take_turn().await;
        }
    }

    /// Lets the clients that were held go on in small numbers, so that open connections have their turn
    /// between.
    pub async fn take_turn(&self) {
        let _turn = self.turns.acquire().await;
        yield_now().await;
    }

    /// Dials once, or, where the backend's backlog is full, when there is room. (A probe that succeeds would
    /// let all clients go at once, for one place.)
    async fn connect_in_turn(&self) -> Result<Socket, ConnectError> {
        if !self.connector.has_queue() {
            match self.connector.try_connect().await {
                Err(error) if error.is_full_backlog() => {
                    self.log_waiting(&error.to_string());
                    self.probe.set_last_error(Some(error.to_string()));
                }
                connected => return connected,
            }
        }
        self.connector.connect_in_turn().await
    }

    /// What stands between a client and the backend when its time is over: if that is not known, its own
    /// attempt, which ends with that.
    pub fn timeout_error(&self) -> String {
        let last_error = self.probe.lock().last_error.clone();
        last_error.unwrap_or_else(|| {
            self.connector.counters().fail(ConnectErrorKind::Timeout);
            let target = self.connector.target();
            format!("Failed to connect to remote host: {target}: Connection timed out")
        })
    }

    /// Gives a fresh connection to whoever calls [`BackendWait::connect`] first, on any event loop; after a
    /// moment, to nobody.
    pub fn offer(&self, socket: Socket) {
        let family = socket.family();
        let connection = socket.release().ok().map(|fd| (fd, family));
        let mut probe = self.probe.lock();
        probe.last_error = None;
        probe.connection = connection;
        probe.generation += 1;
        let (offer, probe) = (probe.generation, self.probe.clone());
        tokio::task::spawn_local(async move {
            sleep(OFFER).await;
            if probe.lock().generation == offer {
                drop(probe.take_connection());
            }
        });
    }

    /// Starts the prober, or joins one that somebody else has started meanwhile.
    fn start_probing(self: &Rc<Self>, last_error: String) -> watch::Receiver<()> {
        let mut probe = self.probe.lock();
        if let Some(ended) = probe.current() {
            return ended;
        }
        self.log_waiting(&last_error);
        let (sender, receiver) = watch::channel(());
        probe.ended = Some(receiver.clone());
        probe.last_error = Some(last_error);
        tokio::task::spawn_local(Rc::clone(self).probe(sender));
        receiver
    }

    fn log_waiting(&self, last_error: &str) {
        if let Some(suppressed) = WAITING.pass() {
            let wait = self.wait;
            tracing::info!("{last_error}, holding clients for up to {wait}.{suppressed}");
        }
    }

    async fn probe(self: Rc<Self>, probe: watch::Sender<()>) {
        let mut pauses = Backoff::default();
        loop {
            pauses.next().await;
            // One receiver is the one that is kept for those who come.
            if probe.receiver_count() <= 1 {
                break;
            }
            match self.connector.try_connect().await {
                Err(error) if error.is_transient() => {
                    self.probe.set_last_error(Some(error.to_string()));
                }
                // Whoever waits will meet any other error, too.
                Err(_) => break,
                Ok(socket) => {
                    self.offer(socket);
                    // Lets all go.
                    return drop(probe);
                }
            }
        }
        self.probe.set_last_error(None);
    }
}
