//! A backend that the proxy starts and stops, as everything else sees it: its state, why clients
//! wait, and how many.
//!
//! A client that needs the backend counts as demand until the backend is ready. That count alone
//! starts the backend. Passive clients wait without being counted as demand.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;

use crate::backend::state::BackendState;
use crate::config::timespan::TimeSpan;
use crate::counters::CommandCounters;
use crate::logging::{RateLimit, message_id, rate_limited};
use crate::runtime::backoff::Backoff;

#[derive(Debug)]
pub struct Lifecycle {
    /// What messages and `STATUS=` call the backend.
    pub name: String,
    /// Whether the backend is COMMAND, whose end the proxy notices.
    pub is_child: bool,
    state: watch::Sender<BackendState>,
    /// Why clients wait, while the backend is not ready.
    wait_reason: watch::Sender<String>,
    /// The number of clients that wait and start the backend.
    demand: watch::Sender<usize>,
    /// The number of clients that wait, passive ones included.
    waiting: watch::Sender<usize>,
    /// Whether the backend must not be started, and COMMAND is to stop.
    stop_requested: watch::Sender<bool>,
    /// Marked by a client that found the backend gone.
    lost: watch::Sender<()>,
    pub counters: Arc<CommandCounters>,
}

impl Lifecycle {
    pub fn new(name: String, is_child: bool) -> Arc<Self> {
        Arc::new(Self {
            name,
            is_child,
            state: watch::Sender::default(),
            wait_reason: watch::Sender::default(),
            demand: watch::Sender::default(),
            waiting: watch::Sender::default(),
            stop_requested: watch::Sender::default(),
            lost: watch::Sender::default(),
            counters: Arc::default(),
        })
    }

    /// Returns a receiver of the backend's state.
    pub fn watch(&self) -> watch::Receiver<BackendState> {
        self.state.subscribe()
    }

    /// Whether clients can be served.
    pub fn is_ready(&self) -> bool {
        *self.state.borrow() == BackendState::Ready
    }

    pub fn set_state(&self, state: BackendState) {
        self.state.send_replace(state);
    }

    /// Says why clients wait from now on.
    pub fn set_wait_reason(&self, reason: String) {
        self.wait_reason.send_replace(reason);
    }

    /// Returns why clients wait; `None` if the backend is ready.
    pub fn wait_reason_unless_ready(&self) -> Option<String> {
        (*self.state.borrow() != BackendState::Ready).then(|| self.wait_reason())
    }

    pub fn wait_reason(&self) -> String {
        self.wait_reason.borrow().clone()
    }

    /// Waits until the backend is ready, and counts as demand meanwhile, which starts it. Returns a
    /// receiver of the state, which sees the next change.
    ///
    /// # Errors
    /// The message of a permanent error.
    pub async fn ready(&self) -> Result<watch::Receiver<BackendState>, String> {
        let mut state = self.watch();
        if *state.borrow_and_update() == BackendState::Ready {
            return Ok(state);
        }
        let _counted = [Counted::new(&self.waiting), Counted::new(&self.demand)];
        // The present state may be the Unreachable of an earlier run, so only changes count.
        loop {
            state.changed().await.expect("the lifecycle has the sender");
            let now = *state.borrow_and_update();
            match now {
                BackendState::Ready => return Ok(state),
                BackendState::Unreachable => return Err(self.wait_reason()),
                _ => {}
            }
        }
    }

    /// Returns a receiver of the number of clients that wait, passive ones included.
    pub fn waiting(&self) -> watch::Receiver<usize> {
        self.waiting.subscribe()
    }

    /// For a passive client: waits while the backend starts for another client. Returns a receiver
    /// of the state, which sees the next change; `None` if no other client needs the backend.
    pub async fn started(&self) -> Option<watch::Receiver<BackendState>> {
        let _counted = Counted::new(&self.waiting);
        let (mut state, mut demand) = (self.watch(), self.demand.subscribe());
        loop {
            let is_needed = *demand.borrow_and_update() > 0;
            let now = *state.borrow_and_update();
            match now {
                BackendState::Ready => return Some(state),
                BackendState::Starting => {}
                _ if is_needed => {}
                _ => return None,
            }
            tokio::select! {
                _ = state.changed() => {}
                _ = demand.changed() => {}
            }
        }
    }

    pub fn is_stop_requested(&self) -> bool {
        *self.stop_requested.borrow()
    }

    /// Waits until a client needs the backend, and the backend may be started.
    pub async fn needed(&self) {
        let (mut demand, mut stop) = (self.demand.subscribe(), self.stop_requested.subscribe());
        while *demand.borrow_and_update() == 0 || *stop.borrow_and_update() {
            tokio::select! {
                _ = demand.changed() => {}
                _ = stop.changed() => {}
            }
        }
    }

    /// Forbids starts until [`Lifecycle::allow_start`], and has COMMAND stop.
    pub fn request_stop(&self) {
        self.stop_requested.send_replace(true);
    }

    /// Waits until a stop is requested.
    pub async fn stop_requested(&self) {
        let _ = self.stop_requested.subscribe().wait_for(|stop| *stop).await;
    }

    pub fn allow_start(&self) {
        self.stop_requested.send_replace(false);
    }

    /// Notes that a client found the backend gone.
    pub fn report_lost(&self) {
        self.lost.send_replace(());
    }

    /// Returns a receiver that changes with each [`Lifecycle::report_lost`] from now on.
    pub fn lost(&self) -> watch::Receiver<()> {
        self.lost.subscribe()
    }

    /// Logs that the backend, whose start began at `begin`, is ready.
    pub fn log_ready(&self, begin: Instant) {
        rate_limited!(
            READY,
            info,
            message_id = message_id::COMMAND_READY,
            "{} is ready after {}.",
            self.name,
            TimeSpan::new(Duration::from_millis(begin.elapsed().as_millis() as u64))
        );
    }

    /// Logs a start that failed, the `failures`th in a row. Returns the pause before the next.
    pub fn record_failure(&self, error: String, failures: u32) -> Duration {
        self.counters.failed.inc();
        let pause = FAILURE_PAUSES.nth(failures - 1);
        rate_limited!(
            FAILURES,
            error,
            message_id = message_id::COMMAND_FAILED,
            "{error}. (Failure {failures} in a row, next attempt in {}.)",
            TimeSpan::new(pause)
        );
        self.set_wait_reason(error);
        self.set_state(BackendState::Failed(failures));
        pause
    }

    /// Logs why the backend cannot be started. Returns the pause before the next look.
    pub fn record_obstacle(
        &self,
        state: BackendState,
        message_id: &str,
        error: String,
    ) -> Duration {
        rate_limited!(OBSTACLES, error, message_id, "{error}.");
        self.set_wait_reason(error);
        self.set_state(state);
        CHECK_AGAIN
    }
}

/// A client that waits, counted until this is dropped.
struct Counted<'a>(&'a watch::Sender<usize>);

impl<'a> Counted<'a> {
    fn new(count: &'a watch::Sender<usize>) -> Self {
        count.send_modify(|count| *count += 1);
        Self(count)
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.send_modify(|count| *count -= 1);
    }
}

/// The pauses after failed starts in a row.
const FAILURE_PAUSES: Backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(10));

/// The pause before the next check, if another process serves the target or the target is
/// unreachable. That process may belong to COMMAND's previous run, whose guard is still ending it
/// after the proxy was killed.
const CHECK_AGAIN: Duration = Duration::from_millis(100);

static READY: RateLimit = RateLimit::new(20, Duration::from_secs(10));
static FAILURES: RateLimit = RateLimit::new(10, Duration::from_secs(10));
static OBSTACLES: RateLimit = RateLimit::new(1, Duration::from_secs(10));

#[cfg(test)]
mod tests {
    use tokio::time::timeout;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_passive_client_waits_for_a_start_or_beside_another_client() {
        const MINUTE: Duration = Duration::from_secs(60);
        let lifecycle = Lifecycle::new("app".into(), true);
        // Whether it can connect; `None` while it waits.
        let started =
            async || timeout(MINUTE, lifecycle.started()).await.ok().map(|state| state.is_some());
        for (state, alone, beside) in [
            (BackendState::Stopped, Some(false), None),
            (BackendState::Starting, None, None),
            (BackendState::Ready, Some(true), Some(true)),
            (BackendState::Frozen, Some(false), None),
            (BackendState::Stopping, Some(false), None),
            (BackendState::Failed(1), Some(false), None),
        ] {
            lifecycle.set_state(state);
            assert_eq!(started().await, alone, "{state:?}");
            let _other = Counted::new(&lifecycle.demand);
            assert_eq!(started().await, beside, "{state:?}, beside another");
        }
    }

    #[test]
    fn pauses_grow_from_100_ms_to_10_s() {
        let millis = [0, 1, 2, 6, 7, 8, u32::MAX].map(|nth| FAILURE_PAUSES.nth(nth).as_millis());
        assert_eq!(millis, [100, 200, 400, 6400, 10_000, 10_000, 10_000]);
    }
}
