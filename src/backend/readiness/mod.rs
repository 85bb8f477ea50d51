//! `--ready=http:PATH` and `--ready=exec:LINE`: whether a backend that accepts connections can also
//! serve them.
//!
//! A backend is not ready at the start. A probe that succeeds makes it ready. It is no longer ready
//! after a connect that fails, after the end of COMMAND, and after [`UNUSED_MAX`] without an open
//! connection: it may have been restarted.

mod exec;
pub mod http;

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
use crate::runtime::lock;
use crate::socket::address::Address;
use crate::socket::proxy_protocol::ProxyProtocol;

/// The state of one backend, common to all event loops, and its probe.
#[derive(Debug)]
pub struct Readiness {
    probe: Probe,
    connector: Connector,
    state: Mutex<State>,
    /// No probe begins before this. Locked while a probe runs: there is one at a time.
    next_probe: tokio::sync::Mutex<Option<Instant>>,
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
            next_probe: tokio::sync::Mutex::default(),
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

    /// Makes the next client cause a probe.
    pub fn reset(&self) {
        lock(&self.state).ready = None;
    }

    /// Counts a connection until the result is dropped.
    pub fn count_open(self: &Arc<Self>) -> OpenConnection {
        lock(&self.state).open += 1;
        OpenConnection(Arc::clone(self))
    }

    /// Probes until the backend is ready. Passes what each failed probe says to `failed`.
    ///
    /// # Errors
    /// A permanent error.
    pub async fn wait_until_ready(&self, failed: impl Fn(String)) -> Result<(), ConnectError> {
        let mut next_probe = self.next_probe.lock().await;
        while !self.is_ready() {
            if let Some(next_probe) = *next_probe {
                sleep_until(next_probe).await;
            }
            *next_probe = Some(Instant::now() + PROBE_INTERVAL);
            match self.probe_once().await {
                Ok(()) => {}
                Err(CheckError::Permanent(error)) => return Err(error),
                Err(CheckError::NotYet(error)) => failed(error),
            }
        }
        Ok(())
    }

    /// Returns whether the backend is ready, by a probe if one is due. Clients that wait for this
    /// probe cause none of their own.
    pub async fn ask(&self) -> bool {
        let mut next_probe = self.next_probe.lock().await;
        if !self.is_ready() && next_probe.is_none_or(|next| next <= Instant::now()) {
            let _ = self.probe_once().await;
            *next_probe = Some(Instant::now() + PROBE_INTERVAL);
        }
        self.is_ready()
    }

    /// Probes once.
    pub async fn probe_once(&self) -> Result<(), CheckError> {
        let probed = timeout(PROBE_TIME, self.probe()).await.unwrap_or_else(|_| {
            let no_answer = format!("no answer within {}", TimeSpan::new(PROBE_TIME));
            Err(CheckError::NotYet(self.describe(&no_answer)))
        });
        match &probed {
            Ok(()) => self.set_ready(),
            Err(_) => drop(self.connector.counters.probe_failures.inc()),
        }
        probed
    }

    async fn probe(&self) -> Result<(), CheckError> {
        let target = &self.connector.target;
        let answer = match &self.probe {
            Probe::Http(path, header) => {
                let socket = connect_once(&self.connector).await?;
                http::probe(socket, header, target, path).await
            }
            Probe::Exec(line) => exec::probe(line, target).await,
        };
        answer.map_err(|answer| CheckError::NotYet(self.describe(&answer)))
    }

    /// Returns the message for what a probe says.
    pub fn describe(&self, answer: &str) -> String {
        let target = &self.connector.target;
        match &self.probe {
            Probe::Http(path, _) => format!("{target} is not ready: GET {path}: {answer}"),
            Probe::Exec(line) => format!("{target} is not ready: {line}: {answer}"),
        }
    }
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
    use tokio::time::advance;

    use super::*;
    use crate::backend::connect::ConnectPermits;
    use crate::config::target::Target;

    fn readiness(mode: &str) -> Option<Arc<Readiness>> {
        let target = Target::parse("/run/app".as_ref()).unwrap();
        let permits = ConnectPermits::new(1, 1, 1);
        let connector = Connector::new(target, None, false, TimeSpan::INFINITY, None, permits);
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
        let connections = [readiness.count_open(), readiness.count_open()];
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
        let connection = readiness.count_open();
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
