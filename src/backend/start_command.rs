//! `--start-command=` and `--stop-command=`: a backend that is not a child of the proxy, such as a
//! container, a unit or a machine.
//!
//! Both commands return. They run one at a time, each for a limited time. Nothing tells the proxy
//! when the backend ends: a client that finds it gone says so.

use std::convert::Infallible;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, sleep, timeout};

use crate::backend::connect_error::{CheckError, ConnectError};
use crate::backend::lifecycle::Lifecycle;
use crate::backend::process_group::ProcessGroup;
use crate::backend::state::BackendState;
use crate::backend::wait::BackendWait;
use crate::config::CommandTimes;
use crate::config::command::CommandLine;
use crate::config::target::Target;
use crate::config::timespan::TimeSpan;
use crate::limits::idle_clock::IdleClock;
use crate::logging::{RateLimit, message_id, os_message, rate_limited};

/// Runs the commands.
#[derive(Debug)]
pub struct StartCommand {
    start: CommandLine,
    /// Without it the backend is never stopped.
    stop: Option<CommandLine>,
    target: Target,
    times: CommandTimes,
    pub lifecycle: Arc<Lifecycle>,
}

impl StartCommand {
    pub fn new(
        start: CommandLine,
        stop: Option<CommandLine>,
        target: Target,
        times: CommandTimes,
    ) -> Self {
        let lifecycle = Lifecycle::new(target.to_string(), false);
        Self { start, stop, target, times, lifecycle }
    }

    /// Starts and stops the backend as clients need it, forever.
    pub async fn run(self: Arc<Self>, wait: Rc<BackendWait>, clock: IdleClock) -> Infallible {
        let (lifecycle, mut failures) = (&self.lifecycle, 0_u32);
        // A backend that runs already is stopped when it is idle, whatever has started it.
        let mut is_up = wait.check().await.is_ok();
        loop {
            if !is_up {
                lifecycle.needed().await;
                let pause = match self.bring_up(&wait).await {
                    Ok(()) => {
                        failures = 0;
                        Duration::ZERO
                    }
                    Err(StartError::Failed(error)) => {
                        failures = failures.saturating_add(1);
                        lifecycle.fail(error, failures)
                    }
                    Err(StartError::Unreachable(error)) => lifecycle.obstruct(
                        BackendState::Unreachable,
                        message_id::BACKEND_UNREACHABLE,
                        error.to_string(),
                    ),
                };
                if !pause.is_zero() {
                    sleep(pause).await;
                    continue;
                }
            }
            clock.begin_run(self.times.min_run);
            lifecycle.set_state(BackendState::Ready);
            is_up = tokio::select! {
                () = lifecycle.lost() => {
                    lifecycle.set_error(format!("{} does not answer any more", self.target));
                    lifecycle.set_state(BackendState::Stopped);
                    wait.check().await.is_ok()
                }
                () = clock.alarm(self.stop_idle_time()) => self.shut_down(&wait, &clock).await,
            };
            clock.end_run();
        }
    }

    fn stop_idle_time(&self) -> TimeSpan {
        if self.stop.is_some() { self.times.stop_idle } else { TimeSpan::INFINITY }
    }

    /// Runs the start command and waits until the backend is ready, unless it is ready already.
    async fn bring_up(&self, wait: &BackendWait) -> Result<(), StartError> {
        let Self { start, target, lifecycle, .. } = self;
        lifecycle.set_error(format!("{target} does not answer"));
        lifecycle.set_state(BackendState::Starting);
        let reason = match wait.check().await {
            Ok(()) => return Ok(()),
            Err(CheckError::Permanent(error)) => return Err(StartError::Unreachable(error)),
            Err(CheckError::NotYet(reason)) => reason,
        };
        rate_limited!(
            LIFECYCLE,
            info,
            message_id = message_id::COMMAND_STARTING,
            "Running {start}, {target} does not answer yet ({reason})."
        );
        lifecycle.counters.all.inc();
        let begin = Instant::now();
        lifecycle.set_error(format!("{start} has not returned"));
        self.execute(start).await.map_err(StartError::Failed)?;
        let failed = |error: String| lifecycle.set_error(format!("{error}, after {start}"));
        match timeout(READY_TIME, wait.wait_until_up(failed)).await {
            Ok(Ok(Some(connection))) => wait.offer(connection),
            Ok(Ok(None)) => {}
            Ok(Err(error)) => return Err(StartError::Unreachable(error)),
            Err(_) => return Err(StartError::Failed(lifecycle.current_error())),
        }
        rate_limited!(
            LIFECYCLE,
            info,
            message_id = message_id::COMMAND_READY,
            "{target} is ready after {}.",
            TimeSpan::new(Duration::from_millis(begin.elapsed().as_millis() as u64))
        );
        Ok(())
    }

    /// Runs the stop command. Returns whether the backend still answers.
    async fn shut_down(&self, wait: &BackendWait, clock: &IdleClock) -> bool {
        let Self { stop: Some(stop), target, lifecycle, times, .. } = self else { return true };
        rate_limited!(
            LIFECYCLE,
            info,
            message_id = message_id::COMMAND_STOPPING,
            "Running {stop}, no connection for {}.",
            times.stop_idle
        );
        lifecycle.set_error(format!("{stop} has not returned"));
        lifecycle.set_state(BackendState::Stopping);
        clock.expire();
        let result = self.execute(stop).await;
        wait.reset_readiness();
        let is_up = match &result {
            Ok(()) => timeout(GONE_TIME, gone(wait)).await.is_err(),
            Err(_) => wait.check().await.is_ok(),
        };
        if result.is_ok() && !is_up {
            lifecycle.counters.stops.inc();
        } else {
            lifecycle.counters.stop_failures.inc();
            let error = result.err().unwrap_or_else(|| format!("{stop} has stopped nothing"));
            let answer = if is_up { "still answers" } else { "does not answer" };
            rate_limited!(
                FAILURES,
                error,
                message_id = message_id::COMMAND_FAILED,
                "{error}. ({target} {answer}.)"
            );
        }
        lifecycle.set_state(BackendState::Stopped);
        is_up
    }

    /// Runs a command until it returns.
    ///
    /// # Errors
    /// What to log, if it does not succeed in time.
    async fn execute(&self, line: &CommandLine) -> Result<(), String> {
        execute(line, &self.target).await
    }
}

/// Waits until the backend does not answer any more: it may take a while to stop.
async fn gone(wait: &BackendWait) {
    while wait.answers().await.is_ok() {
        sleep(GONE_PAUSE).await;
    }
}

async fn execute(line: &CommandLine, target: &Target) -> Result<(), String> {
    let failed = |error| format!("Failed to run {line}: {}", os_message(&error));
    let mut group = ProcessGroup::start(line, target).map_err(failed)?;
    match timeout(RUN_TIME, group.exited()).await {
        Ok(Ok(status)) if status.success() => Ok(()),
        Ok(Ok(status)) => Err(format!("{line} has failed ({status})")),
        Ok(Err(error)) => Err(failed(error)),
        Err(_) => {
            group.terminate(GRACE).await;
            Err(format!("{line} has not returned within {}", TimeSpan::new(RUN_TIME)))
        }
    }
}

/// Why the backend could not be started.
enum StartError {
    Failed(String),
    /// The target cannot be reached because of a permanent error.
    Unreachable(ConnectError),
}

/// How long a command may run.
const RUN_TIME: Duration = Duration::from_secs(90);

/// From SIGTERM to SIGKILL for a command that runs too long.
const GRACE: Duration = Duration::from_secs(3);

/// How long the backend may answer after the stop command has succeeded.
const GONE_TIME: Duration = Duration::from_secs(10);
const GONE_PAUSE: Duration = Duration::from_millis(100);

/// How long the backend may take to be ready after the start command before that is run again: a
/// magic packet may be lost.
const READY_TIME: Duration = Duration::from_secs(30);

static LIFECYCLE: RateLimit = RateLimit::new(20, Duration::from_secs(10));
static FAILURES: RateLimit = RateLimit::new(10, Duration::from_secs(10));

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn commands_have_a_limited_time() {
        let target = Target::parse("127.0.0.1:1".as_ref()).unwrap();
        let start = Instant::now();
        // The second one ignores SIGTERM.
        for line in ["sleep 1000", "sh -c 'trap \"\" TERM; sleep 1000 & wait; sleep 1000'"] {
            let line = CommandLine::split(line).unwrap();
            let error = execute(&line, &target).await.unwrap_err();
            assert!(error.ends_with("has not returned within 1min 30s"), "{error}");
        }
        let took = start.elapsed();
        assert!(took >= RUN_TIME * 2 && took <= (RUN_TIME + GRACE) * 2, "{took:?}");
    }

    #[tokio::test]
    async fn failures_are_named() {
        let target = Target::parse("/run/app".as_ref()).unwrap();
        let run = async |line| execute(&CommandLine::split(line).unwrap(), &target).await;
        assert_eq!(run("sh -c 'test \"$TARGET\" = /run/app'").await, Ok(()));
        assert_eq!(run("sh -c 'exit 3'").await, Err("sh has failed (exit status: 3)".into()));
    }
}
