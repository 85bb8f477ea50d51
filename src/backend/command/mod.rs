//! COMMAND's supervisor: starts it for the first client, waits until it is ready, stops it when idle, and
//! starts it again.
//!
//! One task runs the supervisor ([`Supervisor::run`]) from top to bottom; everything else watches the
//! [`CommandState`]. A client that needs COMMAND counts as waiting until COMMAND is ready, and that count is
//! all that starts it.

pub mod guard;
pub mod process;
pub mod ready;
pub mod state;

use std::convert::Infallible;
use std::mem;
use std::process::ExitStatus;
use std::rc::Rc;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};

use crate::backend::command::process::CommandProcess;
use crate::backend::command::ready::{NotifyPlace, NotifySocket, ProcessTree};
use crate::backend::command::state::CommandState;
use crate::backend::connect::ConnectError;
use crate::backend::wait::{BackendWait, Backoff};
use crate::config::command::CommandLine;
use crate::config::target::Target;
use crate::config::timespan::TimeSpan;
use crate::counters::CommandCounters;
use crate::limits::ConnectionWatch;
use crate::limits::idle::wait_idle;
use crate::logging::{RateLimit, os_message};
use crate::socket::Socket;

/// Between two attempts to start what fails, at first and at most.
const PAUSE_FIRST: Duration = Duration::from_millis(100);
const PAUSE_MAX: Duration = Duration::from_secs(10);
const DOUBLINGS_MAX: u32 = 7;

/// A run that has been ready for this long is no failure to start, however it ends.
const STEADY: Duration = Duration::from_secs(1);

/// Before COMMAND is started nobody else may answer at the target. Who does not answer within this
/// time, listens for nobody.
const FOREIGN_ANSWER: Duration = Duration::from_secs(1);

/// Between two looks whether somebody else still serves the target, or whether it still can't be
/// reached. It may be COMMAND's last run, ending behind a proxy that was killed.
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// COMMAND runs and is not ready: after this long that is said.
const SLOW: Duration = Duration::from_secs(10);

static LIFE: RateLimit = RateLimit::new(20, Duration::from_secs(10));
static FAILURES: RateLimit = RateLimit::new(10, Duration::from_secs(10));
static STANDING: RateLimit = RateLimit::new(1, Duration::from_secs(10));

/// Starts and stops COMMAND.
#[derive(Debug)]
pub struct Supervisor {
    command: CommandLine,
    /// What it has to serve.
    target: Target,
    /// Where it says that it is ready; without it, it is when the target answers.
    notify: Option<NotifyPlace>,
    stop_idle_time: TimeSpan,
    /// The soft limit on descriptors that it is given.
    descriptors: Option<u64>,
    state: watch::Sender<CommandState>,
    /// What it is that keeps clients waiting, while it is not ready.
    last_error: Mutex<String>,
    /// Clients that need it.
    waiting: watch::Sender<usize>,
    /// Nobody is to be started, and who runs is to be stopped.
    stopped: watch::Sender<bool>,
    starts: Arc<CommandCounters>,
}

/// A run of COMMAND that was ready when it was given out.
#[derive(Debug)]
pub struct ReadyGuard(watch::Receiver<CommandState>);

impl ReadyGuard {
    /// Waits until COMMAND is not ready any more: it has ended, or is about to be stopped.
    pub async fn ended(&mut self) {
        if self.0.changed().await.is_err() {
            std::future::pending().await
        }
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

impl Supervisor {
    /// `target` is what COMMAND has to serve; `notify` where it says that it is ready; `descriptors`
    /// the soft limit on them that it is given.
    pub fn new(
        command: CommandLine,
        target: Target,
        notify: Option<NotifyPlace>,
        stop_idle_time: TimeSpan,
        descriptors: Option<u64>,
    ) -> Self {
        Self {
            command,
            target,
            notify,
            stop_idle_time,
            descriptors,
            state: watch::Sender::default(),
            last_error: Mutex::default(),
            waiting: watch::Sender::default(),
            stopped: watch::Sender::default(),
            starts: Arc::default(),
        }
    }

    /// What it is called.
    pub fn name(&self) -> &CommandLine {
        &self.command
    }

    /// To see the phase and wait for it to change.
    pub fn watch(&self) -> watch::Receiver<CommandState> {
        self.state.subscribe()
    }

    /// How often it was started.
    pub fn starts(&self) -> &Arc<CommandCounters> {
        &self.starts
    }

    /// What keeps clients waiting; `None` when it is not COMMAND.
    pub fn last_error(&self) -> Option<String> {
        (*self.state.borrow() != CommandState::Ready).then(|| self.current_error())
    }

    /// Waits until COMMAND is ready; that somebody waits is what starts it.
    ///
    /// # Errors
    /// In words, what time can't mend.
    pub async fn ready(&self) -> Result<ReadyGuard, String> {
        let mut state = self.watch();
        if *state.borrow_and_update() == CommandState::Ready {
            return Ok(ReadyGuard(state));
        }
        let _waiting = Waiting::new(self);
        loop {
            if state.changed().await.is_err() {
                std::future::pending().await
            }
            let now = *state.borrow_and_update();
            match now {
                CommandState::Ready => return Ok(ReadyGuard(state)),
                CommandState::Unreachable => return Err(self.current_error()),
                _ => {}
            }
        }
    }

    /// Stops COMMAND and waits until it is gone; starts no other until [`Supervisor::allow_start`].
    pub async fn stop(&self) {
        self.stopped.send_replace(true);
        let _ = self.watch().wait_for(|state| state.is_inactive()).await;
    }

    /// Lets it be started again.
    pub fn allow_start(&self) {
        self.stopped.send_replace(false);
    }

    /// Lives its life, for ever. `occupancy` is the proxy's, for the idle time.
    pub async fn run(
        self: Arc<Self>,
        wait: Rc<BackendWait>,
        mut occupancy: ConnectionWatch,
    ) -> Infallible {
        let mut failures = 0;
        loop {
            self.wait_until_needed().await;
            let end = self.run_once(&wait, &mut occupancy).await;
            let pause = self.record_exit(end, &mut failures);
            sleep(pause).await;
        }
    }

    /// Waits until a client needs it, and it may be started.
    async fn wait_until_needed(&self) {
        let (mut waiting, mut stopped) = (self.waiting.subscribe(), self.stopped.subscribe());
        while *waiting.borrow_and_update() == 0 || *stopped.borrow_and_update() {
            tokio::select! {
                _ = waiting.changed() => {}
                _ = stopped.changed() => {}
            }
        }
    }

    /// From the decision to start it to the moment when nothing of it is left.
    async fn run_once(&self, wait: &BackendWait, occupancy: &mut ConnectionWatch) -> RunResult {
        self.state.send_replace(CommandState::Starting);
        let mut stopped = self.stopped.subscribe();
        let reason = tokio::select! {
            biased;
            _ = stopped.wait_for(|stopped| *stopped) => return RunResult::Asked,
            () = wait_idle(self.stop_idle_time, occupancy) => return RunResult::Idle,
            reason = self.check_target_free(wait) => match reason {
                Ok(reason) => reason,
                Err(end) => return end,
            },
        };
        if let Some(suppressed) = LIFE.pass() {
            let (name, target) = (&self.command, &self.target);
            tracing::info!("Starting {name}, {target} does not answer yet ({reason}).{suppressed}");
        }
        // Not earlier: what is left of it when the proxy is killed is removed by the guard.
        let notify = match self.notify.as_ref().map(NotifyPlace::open).transpose() {
            Ok(notify) => notify,
            Err(error) => return RunResult::Failed(error),
        };
        let receive_loop = async {
            match &notify {
                Some(notify) => notify.receive_loop().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            end = self.run_once_with(notify.as_ref(), wait, occupancy) => end,
            never = receive_loop => match never {},
        }
    }

    /// A run that says on a socket that it is ready, if there is one.
    async fn run_once_with(
        &self,
        notify: Option<&NotifySocket>,
        wait: &BackendWait,
        occupancy: &mut ConnectionWatch,
    ) -> RunResult {
        let mut run = None;
        let mut stopped = self.stopped.subscribe();
        let end = tokio::select! {
            biased;
            _ = stopped.wait_for(|stopped| *stopped) => RunResult::Asked,
            () = wait_idle(self.stop_idle_time, occupancy) => RunResult::Idle,
            end = self.serve(notify, wait, &mut run) => end,
        };
        if let Some(run) = run {
            let name = &self.command;
            match end {
                RunResult::Asked => tracing::info!("Stopping {name}."),
                RunResult::Idle => {
                    if let Some(suppressed) = LIFE.pass() {
                        let time = self.stop_idle_time;
                        tracing::info!("Stopping {name}, no connection for {time}.{suppressed}");
                    }
                }
                _ => {}
            }
            self.set_last_error(format!("{name} is still stopping"));
            self.state.send_replace(CommandState::Stopping);
            run.stop().await;
        }
        end
    }

    /// Starts it, and waits until it is ready and until it ends.
    async fn serve(
        &self,
        notify: Option<&NotifySocket>,
        wait: &BackendWait,
        run: &mut Option<CommandProcess>,
    ) -> RunResult {
        let name = &self.command;
        self.starts.all.add_one();
        let start = Instant::now();
        let failed =
            |error| RunResult::Failed(format!("Failed to start {name}: {}", os_message(&error)));
        let started = match CommandProcess::start(notify.map(NotifySocket::path)) {
            Ok(started) => run.insert(started),
            Err(error) => return failed(error),
        };
        let tree = match started.launch(&self.command, self.descriptors).await {
            Ok(tree) => tree,
            Err(error) => return failed(error),
        };
        let reached = tokio::select! {
            biased;
            // First: if it can't listen because somebody else does, that one is not it.
            status = started.exited() => {
                return self.early_exit("before", status);
            }
            reached = self.wait_until_ready(notify, wait, tree) => reached,
            never = self.warn_if_slow() => match never {},
        };
        let reached = match reached {
            Ok(reached) => reached,
            Err(error) => return RunResult::Unreachable(error),
        };
        if let Some(suppressed) = LIFE.pass() {
            let took = Duration::from_millis(start.elapsed().as_millis() as u64);
            tracing::info!("{name} is ready after {}.{suppressed}", TimeSpan::new(took));
        }
        let ready = Instant::now();
        // First, so that it is there for whoever wakes up first.
        if let Some(socket) = reached {
            wait.offer(socket);
        }
        self.state.send_replace(CommandState::Ready);
        let status = started.exited().await;
        if ready.elapsed() < STEADY {
            return self.early_exit("as soon as", status);
        }
        RunResult::Died(status)
    }

    fn early_exit(&self, when: &str, status: Option<ExitStatus>) -> RunResult {
        let (name, status_text) = (&self.command, describe_status(status));
        let hint = match status {
            Some(status) if status.success() => "; it has to stay in the foreground",
            _ => "",
        };
        RunResult::Failed(format!("{name} has ended {when} it was ready ({status_text}){hint}"))
    }

    /// Makes sure that it has the target for itself: why nobody answers there.
    async fn check_target_free(&self, wait: &BackendWait) -> Result<String, RunResult> {
        let target = &self.target;
        self.set_last_error(format!("Failed to connect to remote host: {target}: no answer"));
        match timeout(FOREIGN_ANSWER, wait.connector.try_connect()).await {
            Ok(Ok(socket)) => {
                socket.close();
                Err(RunResult::Foreign)
            }
            Ok(Err(error)) if error.is_full_backlog() => Err(RunResult::Foreign),
            Ok(Err(error)) if !error.is_transient() => Err(RunResult::Unreachable(error)),
            Ok(Err(error)) => Ok(error.reason()),
            Err(_) => Ok("no answer".into()),
        }
    }

    /// Waits until it says that it is ready, or answers, as long as somebody waits for that; then
    /// gives the connection.
    async fn wait_until_ready(
        &self,
        notify: Option<&NotifySocket>,
        wait: &BackendWait,
        tree: ProcessTree,
    ) -> Result<Option<Socket>, ConnectError> {
        let name = &self.command;
        if let Some(notify) = notify {
            self.set_last_error(format!("{name} runs, but has not sent READY=1"));
            notify.ready(tree).await;
            return Ok(None);
        }
        let mut pauses = Backoff::default();
        let mut waiting = self.waiting.subscribe();
        loop {
            pauses.next().await;
            let _ = waiting.wait_for(|waiting| *waiting > 0).await;
            match wait.connector.try_connect().await {
                Ok(socket) => return Ok(Some(socket)),
                Err(error) if !error.is_transient() => return Err(error),
                Err(error) => self.set_last_error(format!("{error} ({name} runs)")),
            }
        }
    }

    /// Says once what it is that clients wait for.
    async fn warn_if_slow(&self) -> Infallible {
        sleep(SLOW).await;
        if let Some(suppressed) = LIFE.pass() {
            let last_error = self.current_error();
            tracing::warn!(
                "{} is not ready after {}: {last_error}.{suppressed}",
                self.command,
                TimeSpan::new(SLOW)
            );
        }
        std::future::pending().await
    }

    /// Logs and publishes how a run has ended; how long to wait before the next.
    fn record_exit(&self, end: RunResult, failures: &mut u32) -> Duration {
        let name = &self.command;
        let before = mem::take(failures);
        let (failure, state, pause) = match end {
            RunResult::Asked | RunResult::Idle => {
                self.state.send_replace(CommandState::Stopped);
                return Duration::ZERO;
            }
            RunResult::Died(status) => {
                if let Some(suppressed) = FAILURES.pass() {
                    let status = describe_status(status);
                    tracing::warn!(
                        "{name} has ended ({status}), the next client starts it again.{suppressed}"
                    );
                }
                self.state.send_replace(CommandState::Stopped);
                return Duration::ZERO;
            }
            RunResult::Failed(failure) => {
                self.starts.failed.add_one();
                *failures = before.saturating_add(1);
                let pause = PAUSE_FIRST * 2_u32.pow(before.min(DOUBLINGS_MAX));
                (failure, CommandState::Failed(*failures), pause.min(PAUSE_MAX))
            }
            RunResult::Foreign => {
                let target = &self.target;
                let failure =
                    format!("Failed to start {name}: somebody else serves {target} already");
                (failure, CommandState::AddressInUse, LOOK_AGAIN)
            }
            RunResult::Unreachable(error) => {
                (error.to_string(), CommandState::Unreachable, LOOK_AGAIN)
            }
        };
        match state {
            CommandState::Failed(times) => {
                if let Some(suppressed) = FAILURES.pass() {
                    let pause = TimeSpan::new(pause);
                    tracing::error!(
                        "{failure}; failure {times} in a row, next attempt in {pause}.{suppressed}"
                    );
                }
            }
            _ => {
                if let Some(suppressed) = STANDING.pass() {
                    tracing::error!("{failure}.{suppressed}");
                }
            }
        }
        self.set_last_error(failure);
        self.state.send_replace(state);
        pause
    }

    fn current_error(&self) -> String {
        self.last_error.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set_last_error(&self, last_error: String) {
        *self.last_error.lock().unwrap_or_else(PoisonError::into_inner) = last_error;
    }
}

/// How a run of COMMAND came to its end.
enum RunResult {
    /// Halted.
    Asked,
    /// Nobody used it.
    Idle,
    /// The target answers without it.
    Foreign,
    /// Time won't mend what keeps us from the target.
    Unreachable(ConnectError),
    /// It was never ready, or only for a moment.
    Failed(String),
    /// By itself, after it had served.
    Died(Option<ExitStatus>),
}

fn describe_status(status: Option<ExitStatus>) -> String {
    status.map_or_else(|| "its guard was killed".into(), |status| status.to_string())
}
