//! COMMAND's supervisor: starts COMMAND for the first client, stops it when it is idle, and starts
//! it again.
//!
//! One task runs the supervisor ([`Supervisor::run`]) from top to bottom. Everything else sees the
//! [`Lifecycle`].

pub mod guard;
pub mod guard_client;
pub mod process_tree;
mod terminate;
pub mod notify_socket;
pub mod run_result;

use std::convert::Infallible;
use std::future::pending;
use std::io;
use std::mem;
use std::process::ExitStatus;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, sleep};

use crate::backend::command::guard_client::{CommandProcess, StartGuard};
use crate::backend::command::notify_socket::{NotifyDirectory, NotifySocket};
use crate::backend::command::run_result::{RunResult, describe_status};
use crate::backend::connect_error::CheckError;
use crate::backend::lifecycle::Lifecycle;
use crate::backend::state::BackendState;
use crate::backend::wait::BackendWait;
use crate::config::CommandTimes;
use crate::config::command::CommandLine;
use crate::config::target::Target;
use crate::config::timespan::TimeSpan;
use crate::config::values::{BusyMode, ReadyMode};
use crate::limits::idle_clock::IdleClock;
use crate::logging::{RateLimit, message_id, os_message, rate_limited};
use crate::socket::Socket;

/// Starts and stops COMMAND.
#[derive(Debug)]
pub struct Supervisor {
    pub command: CommandLine,
    /// The target that COMMAND serves.
    target: Target,
    /// Where COMMAND sends notifications, if it may.
    notify: Option<NotifyDirectory>,
    notifies_ready: bool,
    notifies_busy: bool,
    times: CommandTimes,
    fd_limit: Option<u64>,
    start_guard: StartGuard,
    pub lifecycle: Arc<Lifecycle>,
}

impl Supervisor {
    /// `fd_limit` is COMMAND's soft limit on descriptors.
    ///
    /// # Errors
    /// One line if there is no directory for COMMAND's notification socket.
    pub fn new(
        command: CommandLine,
        ready: &ReadyMode,
        busy: BusyMode,
        times: CommandTimes,
        target: Target,
        fd_limit: Option<u64>,
        start_guard: StartGuard,
    ) -> Result<Self, String> {
        let (notifies_ready, notifies_busy) =
            (*ready == ReadyMode::Notify, busy == BusyMode::Notify);
        let notifies = notifies_ready || notifies_busy;
        Ok(Self {
            lifecycle: Lifecycle::new(command.to_string(), true),
            command,
            target,
            notify: notifies.then(NotifyDirectory::find).transpose()?,
            notifies_ready,
            notifies_busy,
            times,
            fd_limit,
            start_guard,
        })
    }

    /// Stops COMMAND, and waits until no process of it is left. COMMAND does not start again before
    /// [`Lifecycle::allow_start`].
    pub async fn stop(&self) {
        self.lifecycle.request_stop();
        let _ = self.lifecycle.watch().wait_for(|state| state.is_inactive()).await;
    }

    /// Starts and stops COMMAND as clients need it, forever.
    pub async fn run(self: Arc<Self>, wait: Rc<BackendWait>, clock: IdleClock) -> Infallible {
        let mut failures = 0;
        loop {
            self.lifecycle.needed().await;
            let result = self.run_once(&wait, &clock).await;
            sleep(self.record_exit(result, &mut failures)).await;
        }
    }

    /// Runs COMMAND once: from the decision to start it until no process of it is left.
    async fn run_once(&self, wait: &BackendWait, clock: &IdleClock) -> RunResult {
        self.lifecycle.set_state(BackendState::Starting);
        // `serve` fills both in. They outlive it: COMMAND needs its notification socket until it is
        // stopped.
        let (mut notify, mut process) = (None, None);
        let result = tokio::select! {
            biased;
            () = self.lifecycle.stop_requested() => RunResult::StopRequested,
            () = clock.alarm(self.times.stop_idle) => RunResult::Idle,
            result = self.serve(wait, clock, &mut notify, &mut process) => {
                result.unwrap_or_else(|early| early)
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
            self.lifecycle.set_wait_reason(format!("{name} is still stopping"));
            self.lifecycle.set_state(BackendState::Stopping);
            if !matches!(result, RunResult::Failed(_)) {
                clock.request_reset();
            }
            process.stop().await;
        }
        wait.reset_readiness();
        result
    }

    /// Starts COMMAND, and waits until it is ready and until it exits.
    ///
    /// # Errors
    /// How the run ended, if COMMAND was not ready or only for a moment.
    async fn serve(
        &self,
        wait: &BackendWait,
        clock: &IdleClock,
        notify: &mut Option<NotifySocket>,
        process: &mut Option<CommandProcess>,
    ) -> Result<RunResult, RunResult> {
        let (name, target) = (&self.command, &self.target);
        let reason = self.check_target_free(wait).await?;
        rate_limited!(
            LIFECYCLE,
            info,
            message_id = message_id::COMMAND_STARTING,
            "Starting {name}, {target} does not answer yet ({reason})."
        );
        self.lifecycle.counters.all.inc();
        let start = Instant::now();
        let process = self.launch(clock, notify, process).await?;
        let notify = notify.as_ref().filter(|_| self.notifies_ready);
        let connection = tokio::select! {
            biased;
            // Polled first: if COMMAND exits because its address is in use, a connect would reach
            // the other process.
            status = process.exited() => return Err(RunResult::early_exit(name, "before", status)),
            connected = self.wait_until_ready(notify, wait) => connected?,
            never = self.warn_if_slow() => match never {},
        };
        self.lifecycle.log_ready(start);
        let ready = Instant::now();
        // Offered before the state changes, so that the first client that wakes up finds it.
        if let Some(connection) = connection {
            wait.offer(connection);
        }
        clock.begin_run(self.times.min_run);
        self.lifecycle.set_state(BackendState::Ready);
        let status = self.freeze_when_idle(process, clock).await;
        if ready.elapsed() < STEADY {
            return Err(RunResult::early_exit(name, "as soon as", status));
        }
        Ok(RunResult::Exited(status))
    }

    /// Starts the guard and COMMAND, with the notification socket of this run.
    async fn launch<'a>(
        &self,
        clock: &IdleClock,
        notify: &mut Option<NotifySocket>,
        process: &'a mut Option<CommandProcess>,
    ) -> Result<&'a mut CommandProcess, RunResult> {
        let name = &self.command;
        let failed = |error: io::Error| {
            RunResult::Failed(format!("Failed to start {name}: {}", os_message(&error)))
        };
        // The guard removes the file if the proxy is killed, so the socket is opened only now.
        if let Some(directory) = &self.notify {
            *notify = Some(directory.open().map_err(RunResult::Failed)?);
        }
        let started =
            CommandProcess::start(self.start_guard, notify.as_ref().map(NotifySocket::path));
        let process = process.insert(started.map_err(failed)?);
        let tree = process.launch(name, self.fd_limit).await.map_err(failed)?;
        if let Some(notify) = notify {
            notify.listen(tree, self.notifies_busy.then(|| clock.clone()));
        }
        Ok(process)
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
            self.lifecycle.set_wait_reason(format!("{name} is frozen"));
            self.lifecycle.set_state(BackendState::Frozen);
            clock.request_reset();
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
            self.lifecycle.counters.thaws.inc();
            self.lifecycle.set_state(BackendState::Ready);
        }
    }

    /// Checks that no other process serves the target. Returns why the target does not answer.
    async fn check_target_free(&self, wait: &BackendWait) -> Result<String, RunResult> {
        let target = &self.target;
        self.lifecycle
            .set_wait_reason(format!("Failed to connect to remote host: {target}: no answer"));
        match wait.answers().await {
            Ok(()) => Err(RunResult::AddressInUse),
            Err(CheckError::Permanent(error)) => Err(RunResult::Unreachable(error)),
            Err(CheckError::NotYet(reason)) => Ok(reason),
        }
    }

    /// Waits until COMMAND sends `READY=1`, or else until the target can serve clients. Returns the
    /// connection that showed it, if there is one.
    ///
    /// The target is tried only while a client waits: otherwise the connection would be wasted.
    async fn wait_until_ready(
        &self,
        notify: Option<&NotifySocket>,
        wait: &BackendWait,
    ) -> Result<Option<Socket>, RunResult> {
        let name = &self.command;
        if let Some(notify) = notify {
            self.lifecycle.set_wait_reason(format!("{name} runs, but has not sent READY=1"));
            notify.ready().await;
            return Ok(None);
        }
        let failed = |error: String| {
            self.lifecycle.set_wait_reason(format!("{error}, but {name} runs"));
        };
        let mut waiting = self.lifecycle.waiting();
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
            self.lifecycle.wait_reason()
        );
        pending().await
    }

    /// Logs and publishes how a run ended. Returns the pause before the next start.
    fn record_exit(&self, result: RunResult, failures: &mut u32) -> Duration {
        let (name, target, lifecycle) = (&self.command, &self.target, &self.lifecycle);
        let before = mem::take(failures);
        match result {
            RunResult::StopRequested => {}
            RunResult::Idle => drop(lifecycle.counters.stops.inc()),
            RunResult::Exited(status) => rate_limited!(
                ENDS,
                warn,
                message_id = message_id::COMMAND_FAILED,
                "{name} has ended ({}). The next client starts it again.",
                describe_status(status)
            ),
            RunResult::Failed(error) => {
                *failures = before.saturating_add(1);
                return lifecycle.record_failure(error, *failures);
            }
            RunResult::AddressInUse => {
                let error =
                    format!("Failed to start {name}: another process serves {target} already");
                let message_id = message_id::COMMAND_FAILED;
                return lifecycle.record_obstacle(BackendState::AddressInUse, message_id, error);
            }
            RunResult::Unreachable(error) => {
                let (message_id, error) = (message_id::BACKEND_UNREACHABLE, error.to_string());
                return lifecycle.record_obstacle(BackendState::Unreachable, message_id, error);
            }
        }
        lifecycle.set_state(BackendState::Stopped);
        Duration::ZERO
    }
}

/// A run that was ready for this long is not a failed start, however it ends.
const STEADY: Duration = Duration::from_secs(1);

/// How long COMMAND may run without being ready before that is logged.
const SLOW: Duration = Duration::from_secs(10);

static LIFECYCLE: RateLimit = RateLimit::new(20, Duration::from_secs(10));
static ENDS: RateLimit = RateLimit::new(10, Duration::from_secs(10));

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use tempfile::TempDir;
    use tokio::time::timeout;

    use super::*;
    use crate::backend::command::guard_client::start_guard;
    use crate::backend::connect::{ConnectPermits, Connector};
    use crate::backend::prober::SharedProber;

    #[tokio::test(start_paused = true)]
    async fn the_target_is_tried_only_while_a_client_waits() {
        const NEVER: TimeSpan = TimeSpan::INFINITY;
        let directory = TempDir::new().unwrap();
        let path = directory.path().join("app");
        let _application = UnixListener::bind(&path).unwrap();
        let target = Target::parse(path.as_os_str()).unwrap();
        let permits = ConnectPermits::new(1, 1, 1);
        let connector = Connector::new(target.clone(), None, false, NEVER, None, permits);
        let wait = BackendWait::new(connector, NEVER, SharedProber::default(), None, None);
        let times = CommandTimes { freeze_idle: NEVER, stop_idle: NEVER, min_run: TimeSpan::ZERO };
        let (command, ready) = (CommandLine::split("app").unwrap(), ReadyMode::Connect);
        let supervisor =
            Supervisor::new(command, &ready, BusyMode::No, times, target, None, start_guard)
                .unwrap();
        let unwanted = supervisor.wait_until_ready(None, &wait);
        assert!(timeout(Duration::from_secs(60), unwanted).await.is_err(), "no client waits");
        tokio::select! {
            up = supervisor.wait_until_ready(None, &wait) => assert!(matches!(up, Ok(Some(_)))),
            _ = supervisor.lifecycle.ready() => unreachable!("nothing sets the state"),
        }
    }
}
