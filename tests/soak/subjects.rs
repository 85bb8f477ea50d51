//! The proxy under a load, and how its process or its application is killed meanwhile.

use std::fs;
use std::process::ExitStatus;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use socket2::Socket;
use tokio::time::Instant;

use crate::application::{Service, wait_for_end};
use crate::measures::Figures;
use crate::modes::POOLED;
use crate::served;
use crate::support::stream::Random;
use crate::support::*;
use crate::traffic::{PATIENCE, Traffic};

/// What is under a load.
pub trait Subject {
    /// Kills or restarts something, if there is something. Returns whether there was.
    fn disturb(&mut self, random: &mut Random) -> bool;

    /// How long there is traffic without a break.
    fn longest_phase(&self, _: &mut Random) -> Duration {
        Duration::MAX
    }

    /// How many pipes the process keeps once it has used that many.
    fn pooled(&self) -> usize;

    /// Goes into a state in which figures can be compared. The load has ended.
    fn settle(&mut self);

    fn figures(&mut self) -> Figures;
}

/// How a process of the proxy ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// Not before the end of the mode.
    Never,
    /// By SIGTERM: `--handover=restart`.
    Stop,
    /// By SIGKILL, and sometimes by SIGTERM: `--handover=crash`.
    Kill,
}

/// Processes of the proxy, one after the other, with the same listeners.
pub struct Processes {
    pub running: Running,
    /// Pipes that a process keeps which lasts.
    pub pooled: usize,
    arguments: Vec<String>,
    listeners: Vec<(String, Socket)>,
    ending: Ending,
    systemd: FakeSystemd,
    /// Odd while a process is being killed.
    kills: Arc<AtomicU64>,
}

impl Processes {
    /// Starts the first. Each listener is passed by its name.
    pub fn start(
        arguments: Vec<String>,
        listeners: Vec<(String, Socket)>,
        ending: Ending,
        kills: Arc<AtomicU64>,
    ) -> Self {
        let systemd = FakeSystemd::with_fd_store(8);
        let running = launch(&arguments, &listeners, &systemd);
        Self { running, pooled: 0, arguments, listeners, ending, systemd, kills }
    }

    fn replace(&mut self, signal: Signal) {
        // After a restart no connection may be cut.
        let kill = u64::from(signal == Signal::KILL);
        self.kills.fetch_add(kill, SeqCst);
        self.running.signal(signal);
        let status = self.exit_status();
        let is_exit = status.code() == Some(0);
        assert_eq!(is_exit, signal == Signal::TERM, "{}", self.running.lines.all());
        self.running = launch(&self.arguments, &self.listeners, &self.systemd);
        self.kills.fetch_add(kill, SeqCst);
    }

    fn exit_status(&mut self) -> ExitStatus {
        let exited = || self.running.child.try_wait().unwrap();
        poll_until(Instant::now() + PATIENCE, exited).expect("the proxy exits")
    }
}

fn launch(arguments: &[String], listeners: &[(String, Socket)], systemd: &FakeSystemd) -> Running {
    let launch = Launch::new(OURS).args(arguments);
    let launch = listeners
        .iter()
        .fold(launch, |launch, (name, listener)| launch.named_socket(name, listener));
    let running = launch.stored_by(systemd).start();
    systemd.wait_for("READY=1");
    running
}

impl Subject for Processes {
    fn disturb(&mut self, random: &mut Random) -> bool {
        match self.ending {
            Ending::Never => return false,
            Ending::Stop => self.replace(Signal::TERM),
            Ending::Kill if random.is_one_of(4) => self.replace(Signal::TERM),
            Ending::Kill => self.replace(Signal::KILL),
        }
        true
    }

    fn pooled(&self) -> usize {
        self.pooled
    }

    /// A new process: what the one before has in its pool of pipes, and which threads it has started,
    /// depends on what it has done.
    fn settle(&mut self) {
        if self.ending != Ending::Never {
            self.replace(Signal::TERM);
        }
    }

    fn figures(&mut self) -> Figures {
        Figures::of(self.running.pid(), self.systemd.fd_store.stored().len())
    }
}

/// The proxy with COMMAND, which is killed at random moments.
pub struct OnDemand {
    service: Service,
    traffic: Arc<Traffic>,
}

impl OnDemand {
    pub fn new(service: Service, traffic: Arc<Traffic>) -> Self {
        Self { service, traffic }
    }

    /// The application that was started last, if it runs.
    fn application(&self) -> Option<Pid> {
        let pid = self.service.logged_pids("started").last().copied()?;
        // Another process may have the number of one that has ended.
        let words = fs::read(format!("/proc/{}/cmdline", pid.as_raw_pid())).ok()?;
        let directory = self.service.directory.path().to_str().unwrap();
        String::from_utf8_lossy(&words).contains(directory).then_some(pid)
    }
}

impl Subject for OnDemand {
    fn disturb(&mut self, _: &mut Random) -> bool {
        let Some(pid) = self.application() else { return false };
        self.traffic.kills.fetch_add(1, SeqCst);
        // It may have ended by itself.
        let _ = kill_process(pid, Signal::KILL);
        // Its sockets are closed before its parent is told.
        wait_for_end(pid);
        self.traffic.kills.fetch_add(1, SeqCst);
        true
    }

    /// Breaks let the application be idle.
    fn longest_phase(&self, random: &mut Random) -> Duration {
        Duration::from_millis(1000 + random.below(10_000))
    }

    fn pooled(&self) -> usize {
        POOLED
    }

    /// Waits for the end of the application, which is idle, and of its guard.
    fn settle(&mut self) {
        let ended = || (self.figures().held.children == 0).then_some(());
        poll_until(Instant::now() + PATIENCE, ended).expect("the idle application is stopped");
        served::failures(&self.service).into_iter().for_each(|it| self.traffic.failures.add(it));
    }

    fn figures(&mut self) -> Figures {
        Figures::of(self.service.proxy.pid(), 0)
    }
}
