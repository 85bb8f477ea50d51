//! `--ready=http:PATH` and `--ready=exec:LINE`: whether a backend that accepts connections can also
//! serve them.
//!
//! A backend is not ready at the start. A probe that succeeds makes it ready. A connect that fails,
//! the end of COMMAND, and [`UNUSED_MAX`] without an open connection end that: the backend may have
//! been restarted.

mod exec;
mod http;

use std::sync::{Arc, Mutex};
use std::time::Duration;

use hyper::Uri;
use tokio::time::{Instant, sleep_until, timeout};

use crate::backend::attempts::connect_once;
use crate::backend::connect::Connector;
use crate::backend::connect_error::{CheckError, ConnectError};
use crate::config::command::CommandLine;
use crate::config::timespan::TimeSpan;
use crate::config::values::ReadyMode;
use crate::proxy_protocol::ProxyProtocol;
use crate::runtime::lock;
use crate::socket::address::Address;

/// The state of one backend, common to all event loops, and its probe.
#[derive(Debug)]
pub struct Readiness {
    probe: Probe,
    connector: Connector,
    state: Mutex<State>,
    /// When the last probe began, or ended. Locked while a probe runs: there is one at a time.
    last_probe: tokio::sync::Mutex<Option<Instant>>,
}

/// What to ask the backend.
#[derive(Clone, Debug)]
enum Probe {
    /// A path, with these bytes ahead of the request.
    Http(Uri, Vec<u8>),
    Exec(CommandLine),
}

#[derive(Debug, Default)]
struct State {
    /// When a probe last succeeded, or the last connection ended since; `None`: not ready.
    ready: Option<Instant>,
    /// Open connections.
    open: usize,
}

impl Readiness {
    /// Returns `None` for a mode that has no probe.
    pub fn new(
        mode: &ReadyMode,
        proxy_protocol: Option<ProxyProtocol>,
        connector: &Connector,
    ) -> Option<Arc<Self>> {
        let probe = match mode {
            ReadyMode::Connect | ReadyMode::Notify => return None,
            ReadyMode::Http(path) => {
                let unknown = Address::Unnamed;
                let header = proxy_protocol.map(|version| version.header(&unknown, &unknown));
                Probe::Http(path.clone(), header.unwrap_or_default())
            }
            ReadyMode::Exec(line) => Probe::Exec(line.clone()),
        };
        Some(Arc::new(Self {
            probe,
            connector: connector.clone(),
            state: Mutex::default(),
            last_probe: tokio::sync::Mutex::default(),
        }))
    }

    pub fn is_ready(&self) -> bool {
        let state = lock(&self.state);
        let is_recent = |since: Instant| state.open > 0 || since.elapsed() < UNUSED_MAX;
        state.ready.is_some_and(is_recent)
    }

    /// Lets clients connect.
    pub fn set_ready(&self) {
        lock(&self.state).ready = Some(Instant::now());
    }

    /// Has the next client cause a probe.
    pub fn reset(&self) {
        lock(&self.state).ready = None;
    }

    /// Counts a connection until the result is dropped.
    pub fn open(self: &Arc<Self>) -> OpenConnection {
        lock(&self.state).open += 1;
        OpenConnection(Arc::clone(self))
    }

    /// Probes until the backend is ready. Passes what each failed probe says to `failed`.
    ///
    /// # Errors
    /// A permanent error.
    pub async fn wait_until_ready(&self, failed: impl Fn(String)) -> Result<(), ConnectError> {
        let mut last_probe = self.last_probe.lock().await;
        while !self.is_ready() {
            if let Some(last_probe) = *last_probe {
                sleep_until(last_probe + PROBE_INTERVAL).await;
            }
            *last_probe = Some(Instant::now());
            match self.probe_once().await {
                Ok(()) => {}
                Err(CheckError::Permanent(error)) => return Err(error),
                Err(CheckError::NotYet(error)) => failed(error),
            }
        }
        Ok(())
    }

    /// Returns whether the backend is ready, by a probe if the last one is over for a while.
    pub async fn ask(&self) -> bool {
        let mut last_probe = self.last_probe.lock().await;
        if !self.is_ready() && last_probe.is_none_or(|last| last.elapsed() >= PROBE_INTERVAL) {
            let _ = self.probe_once().await;
            *last_probe = Some(Instant::now());
        }
        self.is_ready()
    }

    /// Probes once.
    pub async fn probe_once(&self) -> Result<(), CheckError> {
        let no_answer = format!("no answer within {}", TimeSpan::new(PROBE_TIME));
        let no_answer = Err(ProbeError::Answer(no_answer));
        let error = match timeout(PROBE_TIME, self.probe()).await.unwrap_or(no_answer) {
            Ok(()) => {
                self.set_ready();
                return Ok(());
            }
            Err(ProbeError::Connect(error)) if !error.is_transient() => {
                CheckError::Permanent(error)
            }
            Err(ProbeError::Connect(error)) => CheckError::NotYet(error.to_string()),
            Err(ProbeError::Answer(answer)) => CheckError::NotYet(self.describe(&answer)),
        };
        self.connector.counters.probe_failures.inc();
        Err(error)
    }

    /// Returns the message for what a probe says.
    pub fn describe(&self, answer: &str) -> String {
        let target = &self.connector.target;
        match &self.probe {
            Probe::Http(path, _) => format!("{target} is not ready: GET {path}: {answer}"),
            Probe::Exec(line) => format!("{target} is not ready: {line}: {answer}"),
        }
    }

    async fn probe(&self) -> Result<(), ProbeError> {
        let target = &self.connector.target;
        let answer = match &self.probe {
            Probe::Http(path, header) => {
                let connected = connect_once(&self.connector).await;
                http::probe(connected.map_err(ProbeError::Connect)?, header, target, path).await
            }
            Probe::Exec(line) => exec::probe(line, target).await,
        };
        answer.map_err(ProbeError::Answer)
    }
}

/// Why a probe failed.
enum ProbeError {
    Connect(ConnectError),
    /// What the backend or the command says.
    Answer(String),
}

/// A connection to the backend, counted until this is dropped.
#[derive(Debug)]
pub struct OpenConnection(Arc<Readiness>);

impl Drop for OpenConnection {
    fn drop(&mut self) {
        let mut state = lock(&self.0.state);
        state.open -= 1;
        state.ready = state.ready.map(|_| Instant::now());
    }
}

/// From the start of a probe to the start of the next.
const PROBE_INTERVAL: Duration = Duration::from_millis(200);

/// The time of a probe.
const PROBE_TIME: Duration = Duration::from_secs(2);

/// How long a backend stays ready without an open connection.
const UNUSED_MAX: Duration = Duration::from_secs(10);

#[cfg(test)]
mod tests {
    use tokio::sync::Semaphore;
    use tokio::time::advance;

    use super::*;
    use crate::config::target::Target;

    fn readiness(mode: &str) -> Option<Arc<Readiness>> {
        let target = Target::parse("/run/app".as_ref()).unwrap();
        let [lookups, watched, beside] = [1; 3].map(|max| Arc::new(Semaphore::new(max)));
        let connector =
            Connector::new(target, false, TimeSpan::INFINITY, None, lookups, [watched, beside]);
        Readiness::new(&mode.parse().unwrap(), None, &connector)
    }

    #[tokio::test(start_paused = true)]
    async fn backend_is_ready_for_ten_seconds_without_a_connection() {
        let readiness = readiness("http:/").unwrap();
        assert!(!readiness.is_ready(), "at the start");
        readiness.set_ready();
        advance(UNUSED_MAX - Duration::from_millis(1)).await;
        assert!(readiness.is_ready());
        advance(Duration::from_millis(1)).await;
        assert!(!readiness.is_ready());

        readiness.set_ready();
        let connections = [readiness.open(), readiness.open()];
        advance(UNUSED_MAX * 2).await;
        assert!(readiness.is_ready(), "in use");
        let [first, second] = connections;
        drop(first);
        advance(UNUSED_MAX).await;
        assert!(readiness.is_ready(), "still in use");
        drop(second);
        advance(UNUSED_MAX - Duration::from_millis(1)).await;
        assert!(readiness.is_ready());
        advance(Duration::from_millis(1)).await;
        assert!(!readiness.is_ready());
    }

    #[tokio::test(start_paused = true)]
    async fn backend_that_failed_stays_unready_when_its_connections_end() {
        let readiness = readiness("http:/").unwrap();
        readiness.set_ready();
        let connection = readiness.open();
        readiness.reset();
        assert!(!readiness.is_ready());
        drop(connection);
        assert!(!readiness.is_ready());
    }

    #[test]
    fn other_modes_have_no_probe() {
        assert!(readiness("connect").is_none() && readiness("notify").is_none());
    }
}
