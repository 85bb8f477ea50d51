//! Holding clients until the backend is up.
//!
//! While the backend can't be reached *yet*, one prober a target tries again and again, however
//! many clients are held: 200 of them cost one connect(2) every 100 ms. When it succeeds they are
//! all let go, and one of them gets the prober's connection, so that a backend which serves only
//! once is not spent on a probe. The prober ends when nobody waits.

#![forbid(unsafe_code)]

use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::yield_now;
use tokio::time::{Instant, sleep, timeout_at};

use crate::dial::Dialer;
use crate::logging::RateLimit;
use crate::socket::Socket;
use crate::timespan::TimeSpan;

/// Between two probes, at first and at most: how late a backend may be noticed whose refusal is
/// immediate.
const PROBE_FIRST: Duration = Duration::from_millis(5);
const PROBE_MAX: Duration = Duration::from_millis(100);

/// Waits that begin one after the other need not each be said.
static HOLDING: RateLimit = RateLimit::new(3, Duration::from_secs(10));

/// Farther away than any client waits.
const FOREVER: Duration = Duration::from_secs(100 * 365 * 24 * 60 * 60);

/// The way to a backend that may not be there yet.
#[derive(Debug)]
pub struct Backend {
    /// The way to a backend that is.
    pub dialer: Dialer,
    wait: TimeSpan,
    /// Closes with the prober; nothing is ever sent, so that a failed probe wakes nobody.
    probe: RefCell<Option<watch::Receiver<()>>>,
    /// What kept the prober from the backend the last time.
    obstacle: RefCell<String>,
    /// What the prober reached, for the first to take it.
    reached: RefCell<Option<Socket>>,
}

impl Backend {
    /// `wait` is how long a client is held; with zero it is not.
    pub fn new(dialer: Dialer, wait: TimeSpan) -> Self {
        Self {
            dialer,
            wait,
            probe: RefCell::default(),
            obstacle: RefCell::default(),
            reached: RefCell::default(),
        }
    }

    /// Whether clients are held at all.
    pub fn holds(&self) -> bool {
        self.wait != TimeSpan::new(Duration::ZERO)
    }

    /// Connects, now or as soon as the backend is up.
    ///
    /// # Errors
    /// In words, what stood in the way: something that time can't mend, or the last obstacle when
    /// the time is over.
    pub async fn connect(self: &Rc<Self>) -> Result<Socket, String> {
        if !self.holds() {
            return self.dialer.dial().await.map_err(|error| error.to_string());
        }
        let deadline = Instant::now() + self.wait.finite().unwrap_or(FOREVER).min(FOREVER);
        loop {
            let mut probe = match self.current_probe() {
                Some(probe) => probe,
                None => match timeout_at(deadline, self.dialer.dial_once()).await {
                    Ok(Ok(socket)) => return Ok(socket),
                    Ok(Err(error)) if error.may_pass() => self.start_probing(error.to_string()),
                    Ok(Err(error)) => return Err(error.to_string()),
                    Err(_) => {
                        let target = self.dialer.target();
                        let obstacle = "Connection timed out, for";
                        let wait = self.wait;
                        return Err(format!(
                            "Failed to connect to remote host: {target}: {obstacle} {wait}"
                        ));
                    }
                },
            };
            if timeout_at(deadline, probe.changed()).await.is_err() {
                return Err(format!("{}, for {}", self.obstacle.borrow(), self.wait));
            }
            if let Some(socket) = self.reached.take() {
                return Ok(socket);
            }
        }
    }

    /// Starts the prober, or joins one that somebody else has started meanwhile.
    fn start_probing(self: &Rc<Self>, obstacle: String) -> watch::Receiver<()> {
        if let Some(probe) = self.current_probe() {
            return probe;
        }
        if let Some(suppressed) = HOLDING.pass() {
            let wait = self.wait;
            tracing::info!("{obstacle}, holding clients for up to {wait}.{suppressed}");
        }
        self.obstacle.replace(obstacle);
        let (sender, receiver) = watch::channel(());
        self.probe.replace(Some(receiver.clone()));
        tokio::task::spawn_local(Rc::clone(self).probe(sender));
        receiver
    }

    /// The running prober; none that has ended, however it did.
    fn current_probe(&self) -> Option<watch::Receiver<()>> {
        let probe = self.probe.borrow();
        probe.clone().filter(|probe| probe.has_changed().is_ok())
    }

    async fn probe(self: Rc<Self>, probing: watch::Sender<()>) {
        let mut pause = Duration::ZERO;
        loop {
            sleep(pause).await;
            pause = (pause * 2).clamp(PROBE_FIRST, PROBE_MAX);
            // One receiver is the one that is kept for those who come.
            if probing.receiver_count() <= 1 {
                return;
            }
            match self.dialer.dial_once().await {
                Err(error) if error.may_pass() => {
                    self.obstacle.replace(error.to_string());
                }
                // Whoever waits will meet any other error, too.
                Err(_) => return,
                Ok(socket) => {
                    self.reached.replace(Some(socket));
                    break;
                }
            }
        }
        // Lets all go. If they have left meanwhile, the connection is not kept for anybody.
        drop(probing);
        yield_now().await;
        self.reached.take();
    }
}
