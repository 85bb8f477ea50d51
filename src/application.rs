//! COMMAND's life: started for the first client, ready, idle, stopped, and started again.
//!
//! One task lives it ([`Application::live`]), from top to bottom; everybody else watches the
//! [`Phase`]. A client that needs COMMAND is counted as waiting until it is ready, and that count
//! is all that starts it.

#![forbid(unsafe_code)]

use std::fmt;
use std::io;
use std::process::ExitStatus;
use std::rc::Rc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};

use crate::admission::Load;
use crate::command::CommandLine;
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

/// How long a backend has to answer a probe, whether it is somebody else's or COMMAND.
const ANSWER: Duration = Duration::from_secs(1);

static LIFE: RateLimit = RateLimit::new(20, Duration::from_secs(10));
static FAILURES: RateLimit = RateLimit::new(10, Duration::from_secs(10));

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
    /// It has ended before it was ready, this many times in a row, and will be tried again.
    Failed(u32),
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stopped => f.write_str("stopped"),
            Self::Starting => f.write_str("starting"),
            Self::Ready => f.write_str("running"),
            Self::Stopping => f.write_str("stopping"),
            Self::Failed(1) => f.write_str("failed to start"),
            Self::Failed(times) => write!(f, "failed to start {times} times in a row"),
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

    /// Waits until COMMAND is ready; that somebody waits is what starts it.
    pub async fn ready(&self) -> ReadyRun {
        let mut phase = self.watch();
        if *phase.borrow_and_update() != Phase::Ready {
            let _waiting = Waiting::new(self);
            if phase.wait_for(|phase| *phase == Phase::Ready).await.is_err() {
                std::future::pending().await
            }
        }
        ReadyRun(phase)
    }

    /// Stops COMMAND and waits until it is gone; starts no other until [`Application::resume`].
    pub async fn halt(&self) {
        self.halted.send_replace(true);
        let at_rest = |phase: &Phase| matches!(phase, Phase::Stopped | Phase::Failed(_));
        let _ = self.watch().wait_for(at_rest).await;
    }

    /// Lets it be started again.
    pub fn resume(&self) {
        self.halted.send_replace(false);
    }

    /// Lives its life, for ever. `load` is the proxy's, for the idle time.
    pub async fn live(self: Rc<Self>, hold: Rc<Hold>, mut load: watch::Receiver<Load>) {
        let mut failures = 0;
        let mut pause = PAUSE_FIRST;
        loop {
            self.needed().await;
            match self.run(&hold, &mut load).await {
                End::BeforeReady(why) => {
                    failures += 1;
                    self.failed(&hold, &why, failures, pause);
                    sleep(pause).await;
                    pause = (pause * 2).min(PAUSE_MAX);
                }
                end => {
                    if let End::Died(status) = end {
                        self.died(status);
                    }
                    (failures, pause) = (0, PAUSE_FIRST);
                    self.phase.send_replace(Phase::Stopped);
                }
            }
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
            self.phase.send_replace(Phase::Stopping);
            run.stop().await;
        }
        end
    }

    /// Starts it, and waits until it is ready and until it ends.
    async fn serve(&self, hold: &Hold, run: &mut Option<Run>) -> End {
        let obstacle = match timeout(ANSWER, hold.dialer.dial_once()).await {
            Ok(Ok(socket)) => {
                socket.close();
                return End::BeforeReady(Why::Foreign);
            }
            Ok(Err(error)) if error.is_full_backlog() => return End::BeforeReady(Why::Foreign),
            Ok(Err(error)) => error.to_string(),
            Err(_) => hold.obstacle(),
        };
        if let Some(suppressed) = LIFE.pass() {
            tracing::info!("{obstacle}, starting {}.{suppressed}", self.command);
        }
        hold.set_obstacle(obstacle);
        let start = Instant::now();
        if let Some(notify) = &self.notify {
            notify.forget();
        }
        let started = match Run::start(self.notify.as_ref().map(NotifySocket::path)) {
            Ok(started) => run.insert(started),
            Err(error) => return End::BeforeReady(Why::Error(error)),
        };
        let family = match started.launch(&self.command, self.descriptors).await {
            Ok(family) => family,
            Err(error) => return End::BeforeReady(Why::Error(error)),
        };
        let reached = tokio::select! {
            biased;
            // First: if it can't listen because somebody else does, that one is not it.
            status = started.exited() => return End::BeforeReady(Why::Exited(status)),
            reached = self.is_ready(hold, family) => reached,
        };
        if let Some(suppressed) = LIFE.pass() {
            let took = start.elapsed().as_secs_f32();
            tracing::info!("{} is ready after {took:.2}s.{suppressed}", self.command);
        }
        self.phase.send_replace(Phase::Ready);
        if let Some(socket) = reached {
            hold.offer(socket).await;
        }
        End::Died(started.exited().await)
    }

    /// Waits until it says that it is ready, or answers, as long as somebody waits for that; then
    /// gives the connection.
    async fn is_ready(&self, hold: &Hold, family: Family) -> Option<Socket> {
        if let Some(notify) = &self.notify {
            notify.ready(family).await;
            return None;
        }
        let mut pauses = Pauses::default();
        let mut waiting = self.waiting.subscribe();
        loop {
            pauses.next().await;
            let _ = waiting.wait_for(|waiting| *waiting > 0).await;
            match timeout(ANSWER, hold.dialer.dial_once()).await {
                Ok(Ok(socket)) => return Some(socket),
                Ok(Err(error)) => hold.set_obstacle(error.to_string()),
                Err(_) => {}
            }
        }
    }

    fn failed(&self, hold: &Hold, why: &Why, times: u32, pause: Duration) {
        let name = &self.command;
        let failure = match why {
            Why::Foreign => {
                let target = hold.dialer.target();
                format!("Failed to start {name}: somebody else serves {target} already")
            }
            Why::Error(error) => format!("Failed to start {name}: {}", in_words(error)),
            Why::Exited(status) => {
                format!("{name} has ended before it was ready ({})", in_status(*status))
            }
        };
        if let Some(suppressed) = FAILURES.pass() {
            let pause = TimeSpan::new(pause);
            tracing::error!(
                "{failure}, failure {times} in a row, next attempt in {pause} at the earliest.{suppressed}"
            );
        }
        hold.set_obstacle(failure);
        self.phase.send_replace(Phase::Failed(times));
    }

    fn died(&self, status: Option<ExitStatus>) {
        if let Some(suppressed) = FAILURES.pass() {
            let (name, status) = (&self.command, in_status(status));
            tracing::warn!(
                "{name} has ended ({status}), the next client starts it again.{suppressed}"
            );
        }
    }
}

/// How a run of COMMAND came to its end.
enum End {
    /// Idle, or halted.
    Asked,
    /// It was never ready.
    BeforeReady(Why),
    /// By itself.
    Died(Option<ExitStatus>),
}

/// Why it was never ready.
enum Why {
    /// The target answers without it.
    Foreign,
    /// It could not be started.
    Error(io::Error),
    /// It ended.
    Exited(Option<ExitStatus>),
}

fn in_status(status: Option<ExitStatus>) -> String {
    status.map_or_else(|| "its guard was killed".into(), |status| status.to_string())
}
