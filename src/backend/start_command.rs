//! `--start-command=` and `--stop-command=`: a backend that is not a child of the proxy, such as a
//! container, a unit or a machine.
//!
//! Each command runs to its end, within a limit, and one runs at a time. Nothing tells the proxy
//! when the backend ends: a client that finds it gone says so.

use std::convert::Infallible;
use std::future::pending;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::yield_now;
use tokio::time::{Instant, sleep, sleep_until, timeout};

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

/// Runs the two commands.
#[derive(Debug)]
pub struct StartCommand {
    start: CommandLine,
    /// Without it the backend is never stopped.
    stop: Option<CommandLine>,
    target: Target,
    times: CommandTimes,
    /// Whether one of them runs.
    runs: watch::Sender<bool>,
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
        // Until the first look at the target.
        lifecycle.set_state(BackendState::Starting);
        Self { start, stop, target, times, runs: watch::Sender::default(), lifecycle }
    }

    /// Starts and stops the backend as clients need it, forever.
    pub async fn run(self: Arc<Self>, wait: Rc<BackendWait>, clock: IdleClock) -> Infallible {
        let (lifecycle, mut failures) = (&self.lifecycle, 0_u32);
        // A backend that runs already is stopped when it is idle, whatever has started it.
        let mut is_up = wait.check().await.is_ok();
        if !is_up {
            lifecycle.set_state(BackendState::Stopped);
        }
        let mut stop_from = Instant::now();
        loop {
            if !is_up {
                lifecycle.needed().await;
                if let Err(error) = self.bring_up(&wait).await {
                    sleep(self.record(error, &mut failures)).await;
                    continue;
                }
                failures = 0;
                clock.begin_run(self.times.min_run);
            }
            // What clients found before does not count.
            let mut lost = lifecycle.lost();
            lifecycle.set_state(BackendState::Ready);
            is_up = loop {
                tokio::select! {
                    _ = lost.changed() => {
                        lifecycle.set_wait_reason(format!("{} does not answer any more", self.target));
                        lifecycle.set_state(BackendState::Starting);
                        if wait.check().await.is_err() {
                            lifecycle.set_state(BackendState::Stopped);
                            break false;
                        }
                        lost.mark_unchanged();
                        lifecycle.set_state(BackendState::Ready);
                    }
                    () = self.stop_due(&clock, stop_from) => break self.shut_down(&wait, &clock).await,
                }
            };
            clock.end_run();
            if is_up {
                // The stop command has stopped nothing. It is due again after another
                // --stop-idle-time=, but the other alarms are not put off.
                let now = Instant::now();
                stop_from = self.times.stop_idle.after(now).max(now + STOP_AGAIN);
            }
        }
    }

    /// Logs and publishes why the backend was not started. Returns the pause before the next start.
    fn record(&self, error: StartError, failures: &mut u32) -> Duration {
        let lifecycle = &self.lifecycle;
        match error {
            StartError::Stopped => {
                lifecycle.set_state(BackendState::Stopped);
                Duration::ZERO
            }
            StartError::Failed(error) => {
                *failures = failures.saturating_add(1);
                lifecycle.record_failure(error, *failures)
            }
            StartError::Unreachable(error) => lifecycle.record_obstacle(
                BackendState::Unreachable,
                message_id::BACKEND_UNREACHABLE,
                error.to_string(),
            ),
        }
    }

    /// Ends a start command that runs, and waits for a stop command. Nothing is started again
    /// before [`Lifecycle::allow_start`].
    pub async fn stop(&self) {
        // If --stop-idle-time= and --exit-idle-time= end in the same moment, the stop command runs
        // first. In the first turn its timer wakes `run`, in the second `run` starts it.
        yield_now().await;
        yield_now().await;
        self.lifecycle.request_stop();
        let _ = self.runs.subscribe().wait_for(|runs| !*runs).await;
    }

    /// Returns how long a command that runs may still take, if one does.
    pub fn time_left(&self) -> Option<Duration> {
        self.runs.borrow().then_some(RUN_TIME + COMMAND_GRACE)
    }

    /// Waits until the stop command is due, at `from` or later.
    async fn stop_due(&self, clock: &IdleClock, from: Instant) {
        let time = if self.stop.is_some() { self.times.stop_idle } else { TimeSpan::INFINITY };
        sleep_until(from).await;
        clock.alarm(time).await;
    }

    /// Runs the start command and waits until the backend is ready, unless it is ready already.
    async fn bring_up(&self, wait: &BackendWait) -> Result<(), StartError> {
        let Self { start, target, lifecycle, .. } = self;
        lifecycle.set_wait_reason(format!("{target} does not answer"));
        lifecycle.set_state(BackendState::Starting);
        let reason = match wait.check().await {
            Ok(()) => return Ok(()),
            Err(CheckError::Permanent(error)) => return Err(StartError::Unreachable(error)),
            Err(CheckError::NotYet(reason)) => reason,
        };
        if lifecycle.is_stop_requested() {
            return Err(StartError::Stopped);
        }
        rate_limited!(
            LIFECYCLE,
            info,
            message_id = message_id::COMMAND_STARTING,
            "Running {start}, {target} does not answer yet ({reason})."
        );
        lifecycle.counters.all.inc();
        let begin = Instant::now();
        lifecycle.set_wait_reason(format!("{start} has not returned"));
        let returned = self.execute(start, lifecycle.stop_requested()).await;
        if lifecycle.is_stop_requested() {
            return Err(StartError::Stopped);
        }
        returned.map_err(StartError::Failed)?;
        let failed = |error: String| lifecycle.set_wait_reason(format!("{error}, after {start}"));
        // A successful probe leaves no connection. The second turn of the loop then connects.
        let connected = async {
            // Where only datagrams go, each session looks for itself.
            while wait.has_streams() {
                if let Some(connection) = wait.wait_until_up(failed).await? {
                    return Ok(Some(connection));
                }
            }
            wait.wait_until_probed(failed).await.map(|()| None)
        };
        match timeout(READY_TIME, connected).await {
            Ok(Ok(connection)) => connection.into_iter().for_each(|it| wait.offer(it)),
            Ok(Err(error)) => return Err(StartError::Unreachable(error)),
            Err(_) => return Err(StartError::Failed(lifecycle.wait_reason())),
        }
        lifecycle.log_ready(begin);
        Ok(())
    }

    /// Runs the stop command. Returns whether the backend still answers.
    async fn shut_down(&self, wait: &BackendWait, clock: &IdleClock) -> bool {
        let Self { stop: Some(stop), target, lifecycle, times, .. } = self else { return true };
        // The proxy exits, unless a client comes.
        if lifecycle.is_stop_requested() {
            return true;
        }
        rate_limited!(
            LIFECYCLE,
            info,
            message_id = message_id::COMMAND_STOPPING,
            "Running {stop}, no connection for {}.",
            times.stop_idle
        );
        lifecycle.set_wait_reason(format!("{stop} has not returned"));
        lifecycle.set_state(BackendState::Stopping);
        clock.request_reset();
        let result = self.execute(stop, pending()).await;
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

    /// Runs a command until it returns, or ends it when `cancelled` does.
    ///
    /// # Errors
    /// What to log, if it does not succeed in time.
    async fn execute(
        &self,
        line: &CommandLine,
        cancelled: impl Future<Output = ()>,
    ) -> Result<(), String> {
        self.runs.send_replace(true);
        let result = execute(line, &self.target, cancelled).await;
        self.runs.send_replace(false);
        result
    }
}

/// Waits until the backend does not answer any more: it may take a while to stop.
async fn gone(wait: &BackendWait) {
    while wait.answers().await.is_ok() {
        sleep(GONE_PAUSE).await;
    }
}

async fn execute(
    line: &CommandLine,
    target: &Target,
    cancelled: impl Future<Output = ()>,
) -> Result<(), String> {
    let failed = |error| format!("Failed to run {line}: {}", os_message(&error));
    let mut group = ProcessGroup::start(line, target).map_err(failed)?;
    let error = tokio::select! {
        exited = group.exited() => return match exited {
            Ok(status) if status.success() => Ok(()),
            Ok(status) => Err(format!("{line} has failed ({status})")),
            Err(error) => Err(failed(error)),
        },
        () = sleep(RUN_TIME) => {
            format!("{line} has not returned within {}", TimeSpan::new(RUN_TIME))
        }
        () = cancelled => format!("{line} was ended"),
    };
    group.terminate(COMMAND_GRACE).await;
    Err(error)
}

/// Why the backend could not be started.
enum StartError {
    /// Nothing is to be started any more.
    Stopped,
    Failed(String),
    /// The target cannot be reached because of a permanent error.
    Unreachable(ConnectError),
}

/// How long a command may run.
const RUN_TIME: Duration = Duration::from_secs(90);

/// The least pause after a stop command that failed.
const STOP_AGAIN: Duration = Duration::from_secs(1);

/// From SIGTERM to SIGKILL for a command that runs too long.
const COMMAND_GRACE: Duration = Duration::from_secs(3);

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
    use crate::backend::connect::{ConnectPermits, Connector};
    use crate::backend::prober::SharedProber;

    #[tokio::test]
    async fn no_command_runs_once_a_stop_is_requested() {
        const NEVER: TimeSpan = TimeSpan::INFINITY;
        let directory = tempfile::TempDir::new().unwrap();
        let (path, ran) = (directory.path().join("app"), directory.path().join("ran"));
        let line = CommandLine::split(&format!("touch {}", ran.display())).unwrap();
        let target = Target::parse(path.as_os_str()).unwrap();
        let permits = ConnectPermits::new(1, 1, 1);
        let connector = Connector::new(target.clone(), None, false, NEVER, None, permits);
        let wait = BackendWait::new(connector, NEVER, SharedProber::default(), None, None);
        let times = CommandTimes { freeze_idle: NEVER, stop_idle: NEVER, min_run: TimeSpan::ZERO };
        let commands = StartCommand::new(line.clone(), Some(line), target, times);
        commands.lifecycle.request_stop();
        assert!(matches!(commands.bring_up(&wait).await, Err(StartError::Stopped)));
        assert!(commands.shut_down(&wait, &IdleClock::new()).await, "nothing was stopped");
        assert!(!ran.exists());
    }

    #[tokio::test(start_paused = true)]
    async fn commands_have_a_limited_time() {
        let target = Target::parse("127.0.0.1:1".as_ref()).unwrap();
        let start = Instant::now();
        // The second one ignores SIGTERM.
        for line in ["sleep 1000", "sh -c 'trap \"\" TERM; sleep 1000 & wait; sleep 1000'"] {
            let line = CommandLine::split(line).unwrap();
            let error = execute(&line, &target, pending()).await.unwrap_err();
            assert!(error.ends_with("has not returned within 1min 30s"), "{error}");
        }
        let took = start.elapsed();
        assert!(took >= RUN_TIME * 2 && took <= (RUN_TIME + COMMAND_GRACE) * 2, "{took:?}");
    }

    #[tokio::test]
    async fn failures_are_named() {
        let target = Target::parse("/run/app".as_ref()).unwrap();
        let run =
            async |line| execute(&CommandLine::split(line).unwrap(), &target, pending()).await;
        assert_eq!(run("sh -c 'test \"$TARGET\" = /run/app'").await, Ok(()));
        assert_eq!(run("sh -c 'exit 3'").await, Err("sh has failed (exit status: 3)".into()));
    }
}
