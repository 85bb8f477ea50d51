//! COMMAND's life: started for the first client, ready, idle, stopped, and started again.
//!
//! One task lives it ([`Application::live`]), from top to bottom; everybody else watches the
//! [`Phase`]. A client that needs COMMAND is counted as waiting until it is ready, and that count
//! is all that starts it.

#![forbid(unsafe_code)]

use std::cell::RefCell;
use std::fmt;
use std::io;
use std::process::ExitStatus;
use std::rc::Rc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};

use crate::admission::Load;
use crate::command::CommandLine;
use crate::dial::DialError;
use crate::guard::Run;
use crate::hold::{Hold, Pauses};
use crate::idle::idle_for;
use crate::logging::{RateLimit, in_words};
use crate::ready::{Family, NotifySocket};
use crate::socket::Socket;
use crate::timespan::TimeSpan;

/// Between two attempts to start what ends before it is ready, at first and at most.
const PAUSE_FIRST: Duration = Duration::from_millis(100);
const PAUSE_MAX: Duration = Duration::from_secs(10);

/// A run of this length is no failure, however it ends.
const STEADY: Duration = Duration::from_secs(10);

/// How long somebody else has to answer at the target before COMMAND is started, and how often that
/// is looked at: its last run may be ending still, behind a proxy that was killed.
const FOREIGN_ANSWER: Duration = Duration::from_secs(1);
const FOREIGN_PAUSE: Duration = Duration::from_millis(200);

static LIFE: RateLimit = RateLimit::new(20, Duration::from_secs(10));
static FAILURES: RateLimit = RateLimit::new(10, Duration::from_secs(10));
static FOREIGN: RateLimit = RateLimit::new(1, Duration::from_secs(10));

/// Where COMMAND is in its life.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Phase {
    /// Nothing runs.
    #[default]
    Stopped,
    /// It was started and is not ready yet.
    Starting,
    /// It serves.
    Ready,
    /// It was asked to end, or has ended, and something of it is left.
    Stopping,
    /// It has ended before it was ready, or soon after, this many times in a row, and will be tried
    /// again.
    Failed(u32),
    /// Time won't mend what keeps it, or us, from the target.
    Hopeless,
}

impl Phase {
    fn is_at_rest(self) -> bool {
        matches!(self, Self::Stopped | Self::Failed(_) | Self::Hopeless)
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stopped => f.write_str("stopped"),
            Self::Starting => f.write_str("starting"),
            Self::Ready => f.write_str("running"),
            Self::Stopping => f.write_str("stopping"),
            Self::Failed(1) => f.write_str("failed"),
            Self::Failed(times) => write!(f, "failed {times} times in a row"),
            Self::Hopeless => f.write_str("can't be reached"),
        }
    }
}

/// An application that runs only while somebody uses it.
#[derive(Debug)]
pub struct Application {
    command: CommandLine,
    /// Where it says that it is ready; without it, it is when the target answers.
    notify: Option<NotifySocket>,
    stop_idle_time: TimeSpan,
    /// The soft limit on descriptors that it is given.
    descriptors: Option<u64>,
    phase: watch::Sender<Phase>,
    /// What it is that keeps clients waiting, while it is not ready.
    obstacle: RefCell<String>,
    /// Clients that need it.
    waiting: watch::Sender<usize>,
    /// Nobody is to be started, and who runs is to be stopped.
    halted: watch::Sender<bool>,
}

/// A run of COMMAND that was ready when it was given out.
#[derive(Debug)]
pub struct ReadyRun(watch::Receiver<Phase>);

impl ReadyRun {
    /// Waits for its end, or the first thought of it.
    pub async fn over(&mut self) {
        if self.0.changed().await.is_err() {
            std::future::pending().await
        }
    }
}

/// A client that waits for COMMAND.
struct Waiting<'a>(&'a Application);

impl<'a> Waiting<'a> {
    fn new(application: &'a Application) -> Self {
        application.waiting.send_modify(|waiting| *waiting += 1);
        Self(application)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.waiting.send_modify(|waiting| *waiting -= 1);
    }
}

impl Application {
    /// `notify` is where COMMAND says that it is ready; `descriptors` the soft limit on them that
    /// it is given.
    pub fn new(
        command: CommandLine,
        notify: Option<NotifySocket>,
        stop_idle_time: TimeSpan,
        descriptors: Option<u64>,
    ) -> Self {
        Self {
            command,
            notify,
            stop_idle_time,
            descriptors,
            phase: watch::Sender::default(),
            obstacle: RefCell::default(),
            waiting: watch::Sender::default(),
            halted: watch::Sender::default(),
        }
    }

    /// What it is called.
    pub fn name(&self) -> &CommandLine {
        &self.command
    }

    /// To see the phase and wait for it to change.
    pub fn watch(&self) -> watch::Receiver<Phase> {
        self.phase.subscribe()
    }

    /// What keeps clients waiting; `None` when it is not COMMAND.
    pub fn obstacle(&self) -> Option<String> {
        let obstacle = self.obstacle.borrow();
        (*self.phase.borrow() != Phase::Ready).then(|| obstacle.clone())
    }

    /// Waits until COMMAND is ready; that somebody waits is what starts it.
    ///
    /// # Errors
    /// In words, what time can't mend.
    pub async fn ready(&self) -> Result<ReadyRun, String> {
        let mut phase = self.watch();
        if *phase.borrow_and_update() == Phase::Ready {
            return Ok(ReadyRun(phase));
        }
        let _waiting = Waiting::new(self);
        loop {
            if phase.changed().await.is_err() {
                std::future::pending().await
            }
            let now = *phase.borrow_and_update();
            match now {
                Phase::Ready => return Ok(ReadyRun(phase)),
                Phase::Hopeless => return Err(self.obstacle.borrow().clone()),
                _ => {}
            }
        }
    }

    /// Stops COMMAND and waits until it is gone; starts no other until [`Application::resume`].
    pub async fn halt(&self) {
        self.halted.send_replace(true);
        let _ = self.watch().wait_for(|phase| phase.is_at_rest()).await;
    }

    /// Lets it be started again.
    pub fn resume(&self) {
        self.halted.send_replace(false);
    }

    /// Lives its life, for ever. `load` is the proxy's, for the idle time.
    pub async fn live(self: Rc<Self>, hold: Rc<Hold>, mut load: watch::Receiver<Load>) {
        let hear = async {
            match &self.notify {
                Some(notify) => notify.hear().await,
                None => std::future::pending().await,
            }
        };
        let live = async {
            let mut failures = 0;
            let mut pause = PAUSE_FIRST;
            loop {
                self.needed().await;
                let start = Instant::now();
                match self.run(&hold, &mut load).await {
                    End::Asked => {
                        (failures, pause) = (0, PAUSE_FIRST);
                        self.phase.send_replace(Phase::Stopped);
                    }
                    End::Foreign => {
                        self.phase.send_replace(Phase::Failed(failures + 1));
                        sleep(FOREIGN_PAUSE).await;
                    }
                    End::Died(status) if start.elapsed() >= STEADY || is_success(status) => {
                        (failures, pause) = (0, PAUSE_FIRST);
                        self.died(status);
                        self.phase.send_replace(Phase::Stopped);
                        sleep(pause).await;
                    }
                    end => {
                        failures += 1;
                        self.failed(&end, failures, pause);
                        sleep(pause).await;
                        pause = (pause * 2).min(PAUSE_MAX);
                    }
                }
            }
        };
        tokio::select! {
            never = hear => match never {},
            never = live => never,
        }
    }

    /// Waits until a client needs it, and it may be started.
    async fn needed(&self) {
        let (mut waiting, mut halted) = (self.waiting.subscribe(), self.halted.subscribe());
        while *waiting.borrow_and_update() == 0 || *halted.borrow_and_update() {
            tokio::select! {
                _ = waiting.changed() => {}
                _ = halted.changed() => {}
            }
        }
    }

    /// From the first thought of starting it to the moment when nothing of it is left.
    async fn run(&self, hold: &Hold, load: &mut watch::Receiver<Load>) -> End {
        self.phase.send_replace(Phase::Starting);
        let mut run = None;
        let mut halted = self.halted.subscribe();
        let end = tokio::select! {
            biased;
            _ = halted.wait_for(|halted| *halted) => End::Asked,
            () = idle_for(self.stop_idle_time, load) => {
                if let Some(suppressed) = LIFE.pass() {
                    let (name, time) = (&self.command, self.stop_idle_time);
                    tracing::info!("Stopping {name}, no connection for {time}.{suppressed}");
                }
                End::Asked
            }
            end = self.serve(hold, &mut run) => end,
        };
        if let Some(run) = run {
            self.waits_for(format!("{} is still stopping", self.command));
            self.phase.send_replace(Phase::Stopping);
            run.stop().await;
        }
        end
    }

    /// Starts it, and waits until it is ready and until it ends.
    async fn serve(&self, hold: &Hold, run: &mut Option<Run>) -> End {
        let name = &self.command;
        let error = match timeout(FOREIGN_ANSWER, hold.dialer.dial_once()).await {
            Ok(Ok(socket)) => {
                socket.close();
                return self.foreign(hold);
            }
            Ok(Err(error)) if error.is_full_backlog() => return self.foreign(hold),
            Ok(Err(error)) if !error.may_pass() => return End::Hopeless(error),
            Ok(Err(error)) => error.reason(),
            Err(_) => "no answer".into(),
        };
        if let Some(suppressed) = LIFE.pass() {
            let target = hold.dialer.target();
            tracing::info!("Starting {name} to serve {target} ({error}).{suppressed}");
        }
        self.waits_for(match &self.notify {
            Some(_) => format!("{name} has not sent READY=1"),
            None => format!("Failed to connect to remote host: {}: {error}", hold.dialer.target()),
        });
        if let Some(notify) = &self.notify {
            notify.forget();
        }
        let start = Instant::now();
        let started = match Run::start(self.notify.as_ref().map(NotifySocket::path)) {
            Ok(started) => run.insert(started),
            Err(error) => return End::Unstartable(error),
        };
        let family = match started.launch(&self.command, self.descriptors).await {
            Ok(family) => family,
            Err(error) => return End::Unstartable(error),
        };
        let reached = tokio::select! {
            biased;
            // First: if it can't listen because somebody else does, that one is not it.
            status = started.exited() => return End::BeforeReady(status),
            reached = self.is_ready(hold, family) => reached,
        };
        let reached = match reached {
            Ok(reached) => reached,
            Err(error) => return End::Hopeless(error),
        };
        if let Some(suppressed) = LIFE.pass() {
            let took = start.elapsed().as_secs_f32();
            tracing::info!("{name} is ready after {took:.2}s.{suppressed}");
        }
        self.phase.send_replace(Phase::Ready);
        if let Some(socket) = reached {
            hold.offer(socket).await;
        }
        End::Died(started.exited().await)
    }

    /// Waits until it says that it is ready, or answers, as long as somebody waits for that; then
    /// gives the connection.
    async fn is_ready(&self, hold: &Hold, family: Family) -> Result<Option<Socket>, DialError> {
        if let Some(notify) = &self.notify {
            notify.ready(family).await;
            return Ok(None);
        }
        let mut pauses = Pauses::default();
        let mut waiting = self.waiting.subscribe();
        loop {
            pauses.next().await;
            let _ = waiting.wait_for(|waiting| *waiting > 0).await;
            match hold.dialer.dial_once().await {
                Ok(socket) => return Ok(Some(socket)),
                Err(error) if !error.may_pass() => return Err(error),
                Err(error) => {
                    // Another obstacle than before may be one that the user has to remove.
                    if self.waits_for(error.to_string())
                        && let Some(suppressed) = LIFE.pass()
                    {
                        tracing::info!("{} is not ready: {error}.{suppressed}", self.command);
                    }
                }
            }
        }
    }

    fn foreign(&self, hold: &Hold) -> End {
        let (name, target) = (&self.command, hold.dialer.target());
        let failure = format!("Failed to start {name}: somebody else serves {target} already");
        if let Some(suppressed) = FOREIGN.pass() {
            tracing::error!("{failure}.{suppressed}");
        }
        self.waits_for(failure);
        End::Foreign
    }

    fn failed(&self, end: &End, times: u32, pause: Duration) {
        let name = &self.command;
        let failure = match end {
            End::Hopeless(error) => error.to_string(),
            End::Unstartable(error) => format!("Failed to start {name}: {}", in_words(error)),
            End::BeforeReady(status) => {
                let hint =
                    if is_success(*status) { "; it has to stay in the foreground" } else { "" };
                format!("{name} has ended before it was ready ({}){hint}", how(*status))
            }
            End::Died(status) => {
                format!("{name} has ended soon after it was ready ({})", how(*status))
            }
            End::Asked | End::Foreign => return,
        };
        if let Some(suppressed) = FAILURES.pass() {
            let pause = TimeSpan::new(pause);
            tracing::error!(
                "{failure}, failure {times} in a row, no other attempt for {pause}.{suppressed}"
            );
        }
        self.waits_for(failure);
        self.phase.send_replace(match end {
            End::Hopeless(_) => Phase::Hopeless,
            _ => Phase::Failed(times),
        });
    }

    fn died(&self, status: Option<ExitStatus>) {
        if let Some(suppressed) = FAILURES.pass() {
            let (name, status) = (&self.command, how(status));
            tracing::warn!(
                "{name} has ended ({status}), the next client starts it again.{suppressed}"
            );
        }
    }

    /// Notes what clients wait for; whether that is new.
    fn waits_for(&self, obstacle: String) -> bool {
        let before = self.obstacle.replace(obstacle);
        before != *self.obstacle.borrow()
    }
}

/// How a run of COMMAND came to its end.
enum End {
    /// Idle, or halted.
    Asked,
    /// The target answers without it.
    Foreign,
    /// It could not be started.
    Unstartable(io::Error),
    /// Time won't mend what keeps us from the target.
    Hopeless(DialError),
    /// By itself, and it was never ready.
    BeforeReady(Option<ExitStatus>),
    /// By itself.
    Died(Option<ExitStatus>),
}

fn is_success(status: Option<ExitStatus>) -> bool {
    status.is_some_and(|status| status.success())
}

fn how(status: Option<ExitStatus>) -> String {
    status.map_or_else(|| "its guard was killed".into(), |status| status.to_string())
}
