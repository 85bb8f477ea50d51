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
use tokio::time::{Instant, sleep, timeout_at};

use crate::dial::Dialer;
use crate::socket::Socket;
use crate::timespan::TimeSpan;

/// Between two probes, at first and at most: how late a backend may be noticed whose refusal is
/// immediate.
const PROBE_FIRST: Duration = Duration::from_millis(5);
const PROBE_MAX: Duration = Duration::from_millis(100);

/// Farther away than any client waits.
const FOREVER: Duration = Duration::from_secs(100 * 365 * 24 * 60 * 60);

/// The way to a backend that may not be there yet.
#[derive(Debug)]
pub struct Backend {
    /// The way to a backend that is.
    pub dialer: Dialer,
    wait: TimeSpan,
    /// While a prober runs: what kept it from the backend the last time. It closes with the prober.
    probe: RefCell<Option<watch::Receiver<String>>>,
    /// What the prober reached.
    reached: RefCell<Option<Socket>>,
}

impl Backend {
    /// `wait` is how long a client is held; with zero it is not.
    pub fn new(dialer: Dialer, wait: TimeSpan) -> Self {
        Self { dialer, wait, probe: RefCell::default(), reached: RefCell::default() }
    }

    /// Connects, now or as soon as the backend is up.
    ///
    /// # Errors
    /// In words, what stood in the way: something that time can't mend, or the last obstacle when
    /// the time is over.
    pub async fn connect(self: &Rc<Self>) -> Result<Socket, String> {
        if self.wait == TimeSpan::new(Duration::ZERO) {
            return self.dialer.dial().await.map_err(|error| error.to_string());
        }
        let deadline = Instant::now() + self.wait.finite().unwrap_or(FOREVER).min(FOREVER);
        loop {
            let probe = self.probe.borrow().clone();
            let probe = match probe {
                Some(probe) => probe,
                None => match timeout_at(deadline, self.dialer.dial_once()).await {
                    Ok(Ok(socket)) => return Ok(socket),
                    Ok(Err(error)) if error.may_pass() => self.start_probing(&error.to_string()),
                    Ok(Err(error)) => return Err(error.to_string()),
                    Err(_) => return Err(format!("Failed to connect within {}.", self.wait)),
                },
            };
            let mut ended = probe.clone();
            let wait = async { while ended.changed().await.is_ok() {} };
            if timeout_at(deadline, wait).await.is_err() {
                let obstacle = probe.borrow();
                return Err(format!("{}, for {}", *obstacle, self.wait));
            }
            if let Some(socket) = self.reached.take() {
                return Ok(socket);
            }
        }
    }

    /// Starts the prober, or joins one that somebody else has started meanwhile.
    fn start_probing(self: &Rc<Self>, obstacle: &str) -> watch::Receiver<String> {
        let mut probe = self.probe.borrow_mut();
        if let Some(probe) = &*probe {
            return probe.clone();
        }
        tracing::info!("{obstacle}, holding clients for up to {}.", self.wait);
        let (sender, receiver) = watch::channel(obstacle.to_string());
        *probe = Some(receiver.clone());
        tokio::task::spawn_local(Rc::clone(self).probe(sender));
        receiver
    }

    async fn probe(self: Rc<Self>, obstacle: watch::Sender<String>) {
        let mut pause = Duration::ZERO;
        loop {
            sleep(pause).await;
            pause = (pause * 2).clamp(PROBE_FIRST, PROBE_MAX);
            // One receiver is the backend's own.
            if obstacle.receiver_count() <= 1 {
                break;
            }
            match self.dialer.dial_once().await {
                Err(error) if error.may_pass() => {
                    obstacle.send_replace(error.to_string());
                }
                // Whoever waits will meet any other error, too.
                Err(_) => break,
                Ok(socket) => {
                    if obstacle.receiver_count() > 1 {
                        self.reached.replace(Some(socket));
                    }
                    break;
                }
            }
        }
        self.probe.take();
    }
}
