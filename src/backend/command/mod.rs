//! COMMAND's supervisor: starts COMMAND for the first client, stops it when it is idle, and starts
//! it again.
//!
//! One task runs the supervisor ([`Supervisor::run`]) from top to bottom. Everything else watches
//! the [`CommandState`]. A client that needs COMMAND counts as waiting until COMMAND is ready. That
//! count alone starts COMMAND.

pub mod guard_process;
pub mod process;
pub mod process_tree;
mod terminate;
pub mod ready;
pub mod run_result;
pub mod state;

use std::convert::Infallible;
use std::future::pending;
use std::io;
use std::mem;
use std::process::ExitStatus;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};

use crate::backend::command::process::CommandProcess;
use crate::backend::command::process_tree::ProcessTree;
use crate::backend::command::ready::{NotifyPlace, NotifySocket};
use crate::backend::command::run_result::{RunResult, describe_status};
use crate::backend::command::state::CommandState;
use crate::backend::connect::OnFullBacklog;
use crate::backend::wait::BackendWait;
use crate::config::command::CommandLine;
use crate::config::target::Target;
use crate::config::timespan::TimeSpan;
use crate::config::values::ReadyMode;
use crate::config::{CommandConfig, CommandTimes};
use crate::counters::CommandCounters;
use crate::limits::idle_clock::IdleClock;
use crate::logging::message_id;
use crate::logging::{RateLimit, os_message, rate_limited};
use crate::socket::Socket;

/// Starts and stops COMMAND.
#[derive(Debug)]
pub struct Supervisor {
    pub command: CommandLine,
    /// The target that COMMAND serves.
    target: Target,
    /// Where COMMAND sends `READY=1`.
    notify: Option<NotifyPlace>,
    times: CommandTimes,
    fd_limit: Option<u64>,
    state: watch::Sender<CommandState>,
    /// Why clients wait, while COMMAND is not ready.
    last_error: watch::Sender<String>,
    /// The number of clients that wait for COMMAND.
    waiting: watch::Sender<usize>,
    /// Whether COMMAND is to stop and must not be started.
    stop_requested: watch::Sender<bool>,
    pub starts: Arc<CommandCounters>,
}

impl Supervisor {
    /// `fd_limit` is COMMAND's soft limit on descriptors.
    ///
    /// # Errors
    /// One line if `--ready=notify` has no directory for its socket.
    pub fn new(
        config: CommandConfig,
        ready: &ReadyMode,
        target: Target,
        fd_limit: Option<u64>,
    ) -> Result<Self, String> {
        Ok(Self {
            command: config.line,
            target,
            notify: match ready {
                ReadyMode::Notify => Some(NotifyPlace::find()?),
                _ => None,
            },
            times: config.times,
            fd_limit,
            state: watch::Sender::default(),
            last_error: watch::Sender::default(),
            waiting: watch::Sender::default(),
            stop_requested: watch::Sender::default(),
            starts: Arc::default(),
        })
    }

    /// Returns a receiver of COMMAND's state.
    pub fn watch(&self) -> watch::Receiver<CommandState> {
        self.state.subscribe()
    }

    /// Returns why clients wait, or `None` if COMMAND is ready.
    pub fn last_error(&self) -> Option<String> {
        (*self.state.borrow() != CommandState::Ready).then(|| self.current_error())
    }

    /// Waits until COMMAND is ready. Waiting starts COMMAND. The state that is returned changes
    /// when COMMAND is not ready any more: it has exited, or is about to be stopped.
    ///
    /// # Errors
    /// The message of a permanent error.
    pub async fn ready(&self) -> Result<watch::Receiver<CommandState>, String> {
        let mut state = self.watch();
        if *state.borrow_and_update() == CommandState::Ready {
            return Ok(state);
        }
        let _waiting = Waiting::new(self);
        // The present state may be the Unreachable of an earlier run, so only changes count.
        loop {
            state.changed().await.expect("the supervisor has the sender");
            let now = *state.borrow_and_update();
            match now {
                CommandState::Ready => return Ok(state),
                CommandState::Unreachable => return Err(self.current_error()),
                _ => {}
            }
        }
    }

    /// Stops COMMAND, and waits until no process of it is left. COMMAND does not start again before
    /// [`Supervisor::allow_start`].
    pub async fn stop(&self) {
        self.stop_requested.send_replace(true);
        let _ = self.watch().wait_for(|state| state.is_inactive()).await;
    }

    pub fn allow_start(&self) {
        self.stop_requested.send_replace(false);
    }

    /// Starts and stops COMMAND as clients need it, forever.
    pub async fn run(self: Arc<Self>, wait: Rc<BackendWait>, clock: IdleClock) -> Infallible {
        let mut failures = 0;
        loop {
            self.wait_until_needed().await;
            let result = self.run_once(&wait, &clock).await;
            sleep(self.record_exit(result, &mut failures)).await;
        }
    }

    /// Waits until a client waits, and COMMAND may be started.
    async fn wait_until_needed(&self) {
        let (mut waiting, mut stop) = (self.waiting.subscribe(), self.stop_requested.subscribe());
        while *waiting.borrow_and_update() == 0 || *stop.borrow_and_update() {
            tokio::select! {
                _ = waiting.changed() => {}
                _ = stop.changed() => {}
            }
        }
    }

    /// Runs COMMAND once: from the decision to start it until no process of it is left.
    async fn run_once(&self, wait: &BackendWait, clock: &IdleClock) -> RunResult {
        self.state.send_replace(CommandState::Starting);
        // Both outlive `serve`: COMMAND needs its notification socket until it is stopped.
        let (mut notify, mut process) = (None, None);
        let mut stop = self.stop_requested.subscribe();
        let result = tokio::select! {
            biased;
            _ = stop.wait_for(|stop| *stop) => RunResult::StopRequested,
            () = clock.alarm(self.times.stop_idle) => RunResult::Idle,
            result = self.serve(wait, clock, &mut notify, &mut process) => {
                result.map_or_else(|result| result, RunResult::Exited)
            }
        };
        clock.end_run();
        if let Some(process) = process {
            let (name, time) = (&self.command, self.times.stop_idle);
            match result {
                RunResult::StopRequested => {
                    tracing::info!(message_id = message_id::COMMAND_STOPPING, "Stopping {name}.")
                }
                RunResult::Idle => {
                    rate_limited!(
                        LIFECYCLE,
                        info,
                        message_id = message_id::COMMAND_STOPPING,
                        "Stopping {name}, no connection for {time}."
                    );
                }
                _ => {}
            }
            self.last_error.send_replace(format!("{name} is still stopping"));
            self.state.send_replace(CommandState::Stopping);
            clock.expire();
            process.stop().await;
        }
        wait.reset_readiness();
        result
    }

    /// Starts COMMAND, and waits until it is ready and until it exits. Returns the status of a
    /// COMMAND that has served.
    async fn serve(
        &self,
        wait: &BackendWait,
        clock: &IdleClock,
        notify: &mut Option<NotifySocket>,
        process: &mut Option<CommandProcess>,
    ) -> Result<Option<ExitStatus>, RunResult> {
        let (name, target) = (&self.command, &self.target);
        let reason = self.check_target_free(wait).await?;
        rate_limited!(
            LIFECYCLE,
            info,
            message_id = message_id::COMMAND_STARTING,
            "Starting {name}, {target} does not answer yet ({reason})."
        );
        self.starts.all.inc();
        // Opened when the guard is about to start: it removes the file if the proxy is killed.
        if let Some(place) = &self.notify {
            *notify = Some(place.open().map_err(RunResult::Failed)?);
        }
        let start = Instant::now();
        let failed = |error: io::Error| {
            RunResult::Failed(format!("Failed to start {name}: {}", os_message(&error)))
        };
        let started =
            CommandProcess::start(notify.as_ref().map(NotifySocket::path)).map_err(failed)?;
        let process = process.insert(started);
        let tree = process.launch(name, self.fd_limit).await.map_err(failed)?;
        let connection = tokio::select! {
            biased;
            // Polled first: if COMMAND exits because its address is in use, a connect would reach
            // the other process.
            status = process.exited() => return Err(RunResult::early_exit(name, "before", status)),
            connected = self.wait_until_ready(notify.as_mut(), wait, tree) => connected?,
            never = self.warn_if_slow() => match never {},
        };
        rate_limited!(
            LIFECYCLE,
            info,
            message_id = message_id::COMMAND_READY,
            "{name} is ready after {}.",
            TimeSpan::new(Duration::from_millis(start.elapsed().as_millis() as u64))
        );
        let ready = Instant::now();
        // Offered before the state changes, so that the first client that wakes up finds it.
        if let Some(connection) = connection {
            wait.offer(connection);
        }
        clock.begin_run(self.times.min_run);
        self.state.send_replace(CommandState::Ready);
        let status = self.freeze_when_idle(process, clock).await;
        if ready.elapsed() < STEADY {
            return Err(RunResult::early_exit(name, "as soon as", status));
        }
        Ok(status)
    }

    /// Freezes COMMAND whenever it is idle, and thaws it for the next use, until it exits. Returns
    /// its status.
    async fn freeze_when_idle(
        &self,
        process: &mut CommandProcess,
        clock: &IdleClock,
    ) -> Option<ExitStatus> {
        loop {
            tokio::select! {
                status = process.exited() => return status,
                () = clock.alarm(self.times.freeze_idle) => {}
            }
            let (name, time) = (&self.command, self.times.freeze_idle);
            let message_id = message_id::COMMAND_FROZEN;
            rate_limited!(
                LIFECYCLE,
                info,
                message_id,
                "Freezing {name}, no connection for {time}."
            );
            // From now on clients wait.
            self.last_error.send_replace(format!("{name} is frozen"));
            self.state.send_replace(CommandState::Frozen);
            clock.expire();
            if let Err(status) = process.freeze().await {
                return status;
            }
            tokio::select! {
                status = process.exited() => return status,
                () = clock.used() => {}
            }
            let message_id = message_id::COMMAND_THAWED;
            rate_limited!(LIFECYCLE, info, message_id, "Thawing {name} for a client.");
            process.thaw().await;
            self.starts.thaws.inc();
            self.state.send_replace(CommandState::Ready);
        }
    }

    /// Checks that no other process serves the target. Returns why the target does not answer.
    async fn check_target_free(&self, wait: &BackendWait) -> Result<String, RunResult> {
        let target = &self.target;
        self.last_error
            .send_replace(format!("Failed to connect to remote host: {target}: no answer"));
        let connecting = wait.connector.connect(OnFullBacklog::Fail);
        match timeout(CHECK_TIMEOUT, connecting).await {
            Ok(Ok(socket)) => {
                socket.close();
                Err(RunResult::AddressInUse)
            }
            Ok(Err(error)) if error.is_full_backlog() => Err(RunResult::AddressInUse),
            Ok(Err(error)) if !error.is_transient() => Err(RunResult::Unreachable(error)),
            Ok(Err(error)) => Ok(error.reason()),
            Err(_) => Ok("no answer".into()),
        }
    }

    /// Waits until COMMAND sends `READY=1`, or else until the target can serve clients. Returns the
    /// connection that showed it, if there is one. The target is tried only while a client waits.
    async fn wait_until_ready(
        &self,
        notify: Option<&mut NotifySocket>,
        wait: &BackendWait,
        tree: ProcessTree,
    ) -> Result<Option<Socket>, RunResult> {
        let name = &self.command;
        if let Some(notify) = notify {
            self.last_error.send_replace(format!("{name} runs, but has not sent READY=1"));
            notify.ready(tree).await;
            return Ok(None);
        }
        let failed = |error: String| {
            self.last_error.send_replace(format!("{error}, but {name} runs"));
        };
        let mut waiting = self.waiting.subscribe();
        loop {
            let _ = waiting.wait_for(|waiting| *waiting > 0).await;
            tokio::select! {
                up = wait.wait_until_up(failed) => return up.map_err(RunResult::Unreachable),
                _ = waiting.wait_for(|waiting| *waiting == 0) => {}
            }
        }
    }

    /// Logs once, after a while, why COMMAND is not ready.
    async fn warn_if_slow(&self) -> Infallible {
        sleep(SLOW).await;
        rate_limited!(
            LIFECYCLE,
            warn,
            message_id = message_id::COMMAND_FAILED,
            "{} is not ready after {}: {}.",
            self.command,
            TimeSpan::new(SLOW),
            self.current_error()
        );
        pending().await
    }

    /// Logs and publishes how a run ended. Returns the pause before the next start.
    fn record_exit(&self, result: RunResult, failures: &mut u32) -> Duration {
        let (name, target) = (&self.command, &self.target);
        let before = mem::take(failures);
        let (state, pause) = match result {
            RunResult::StopRequested | RunResult::Idle => (CommandState::Stopped, Duration::ZERO),
            RunResult::Exited(status) => {
                rate_limited!(
                    FAILURES,
                    warn,
                    message_id = message_id::COMMAND_FAILED,
                    "{name} has ended ({}). The next client starts it again.",
                    describe_status(status)
                );
                (CommandState::Stopped, Duration::ZERO)
            }
            RunResult::Failed(error) => {
                self.starts.failed.inc();
                *failures = before.saturating_add(1);
                let pause = pause_after(before);
                rate_limited!(
                    FAILURES,
                    error,
                    message_id = message_id::COMMAND_FAILED,
                    "{error}. (Failure {failures} in a row, next attempt in {}.)",
                    TimeSpan::new(pause)
                );
                self.last_error.send_replace(error);
                (CommandState::Failed(*failures), pause)
            }
            RunResult::AddressInUse => {
                let error =
                    format!("Failed to start {name}: another process serves {target} already");
                self.log_obstacle(message_id::COMMAND_FAILED, error);
                (CommandState::AddressInUse, CHECK_AGAIN)
            }
            RunResult::Unreachable(error) => {
                self.log_obstacle(message_id::BACKEND_UNREACHABLE, error.to_string());
                (CommandState::Unreachable, CHECK_AGAIN)
            }
        };
        self.state.send_replace(state);
        pause
    }

    fn log_obstacle(&self, message_id: &str, error: String) {
        rate_limited!(OBSTACLES, error, message_id, "{error}.");
        self.last_error.send_replace(error);
    }

    fn current_error(&self) -> String {
        self.last_error.borrow().clone()
    }
}

/// A client that waits for COMMAND.
struct Waiting<'a>(&'a Supervisor);

impl<'a> Waiting<'a> {
    fn new(supervisor: &'a Supervisor) -> Self {
        supervisor.waiting.send_modify(|waiting| *waiting += 1);
        Self(supervisor)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.waiting.send_modify(|waiting| *waiting -= 1);
    }
}

/// Returns the pause after a failed start, which `before` others have preceded.
fn pause_after(before: u32) -> Duration {
    (PAUSE_FIRST * 2_u32.pow(before.min(DOUBLINGS_MAX))).min(PAUSE_MAX)
}

/// The pause after the first failed start. It doubles with each further one.
const PAUSE_FIRST: Duration = Duration::from_millis(100);

/// The longest pause after a failed start.
const PAUSE_MAX: Duration = Duration::from_secs(10);

/// After so many doublings the pause is above its maximum. Further ones would overflow.
const DOUBLINGS_MAX: u32 = 7;

/// A run that was ready for this long is not a failed start, however it ends.
const STEADY: Duration = Duration::from_secs(1);

/// How long to check that no other process serves the target.
const CHECK_TIMEOUT: Duration = Duration::from_secs(1);

/// The pause before the next check, if another process serves the target or the target is
/// unreachable. That process may be COMMAND's last run, which stops after its proxy was killed.
const CHECK_AGAIN: Duration = Duration::from_millis(100);

/// How long COMMAND may run without being ready before that is logged.
const SLOW: Duration = Duration::from_secs(10);

static LIFECYCLE: RateLimit = RateLimit::new(20, Duration::from_secs(10));
static FAILURES: RateLimit = RateLimit::new(10, Duration::from_secs(10));
static OBSTACLES: RateLimit = RateLimit::new(1, Duration::from_secs(10));

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_from_100_ms_to_10_s() {
        let millis = [0, 1, 2, 6, 7, 8, u32::MAX].map(|before| pause_after(before).as_millis());
        assert_eq!(millis, [100, 200, 400, 6400, 10_000, 10_000, 10_000]);
    }
}
