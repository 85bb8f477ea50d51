//! `--handover=`: connections survive a restart of the proxy and its death. (In a real systemd:
//! tests/systemd/handover.rs.)

mod crash;
mod damage;
mod descriptors;
mod limits;
mod listeners;
mod restart;
#[path = "../support/mod.rs"]
mod support;

use std::fmt;
use std::process::ExitCode;

use rustix::process::Signal;
use socket_proxyd::testing::{Queue, replay};
use socket2::Socket;
use tokio::time::Instant;

use support::*;

fn main() -> ExitCode {
    let mut trials = Trials::default();
    restart::register(&mut trials);
    crash::register(&mut trials);
    listeners::register(&mut trials);
    damage::register(&mut trials);
    limits::register(&mut trials);
    descriptors::register(&mut trials);
    trials.run()
}

/// What `--handover=` says, and how the process ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Mode {
    handover: &'static str,
    end: End,
}

const MODES: [Mode; 3] = [
    Mode { handover: "restart", end: End::Stopped },
    Mode { handover: "crash", end: End::Stopped },
    Mode { handover: "crash", end: End::Killed },
];

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let end = match self.end {
            End::Stopped => "stopped",
            End::Killed => "killed",
        };
        write!(f, "{} mode, {end}", self.handover)
    }
}

/// How the process ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Stopped,
    Killed,
}

struct Proxy<'a> {
    front: &'a Endpoint,
    arguments: Vec<String>,
    systemd: FakeSystemd,
    running: Running,
}

impl<'a> Proxy<'a> {
    fn start(front: &'a Endpoint, arguments: &[&str]) -> Self {
        let arguments: Vec<_> = arguments.iter().map(ToString::to_string).collect();
        let systemd = FakeSystemd::with_fd_store(8);
        let running = launch(front, &arguments, &systemd);
        systemd.wait_for("READY=1");
        Self { front, arguments, systemd, running }
    }

    /// Ends the process and starts the next.
    fn replace(&mut self, end: End) {
        self.stop(end);
        self.running = launch(self.front, &self.arguments, &self.systemd);
        self.systemd.wait_for("READY=1");
    }

    fn stop(&mut self, end: End) {
        match end {
            End::Stopped => self.running.signal(Signal::TERM),
            End::Killed => self.running.signal(Signal::KILL),
        }
        let status = self.running.wait();
        assert_eq!(status.code().is_some(), end == End::Stopped, "{}", self.running.lines.all());
    }

    /// The number of valid records in the store. The process is stopped meanwhile, since readers of the
    /// queue share the read position.
    fn stored(&self) -> usize {
        self.running.suspend();
        let records = stored(&self.systemd);
        self.running.signal(Signal::CONT);
        records
    }

    /// Waits until the store holds this many records.
    fn wait_until_stored(&self, records: usize) {
        let mut last = 0;
        let reached = poll_until(Instant::now() + TIMEOUT, || {
            last = self.stored();
            (last == records).then_some(())
        });
        assert!(reached.is_some(), "{last} records are stored, and not {records}");
    }
}

fn launch(front: &Endpoint, arguments: &[String], systemd: &FakeSystemd) -> Running {
    let launch = Launch::new(OURS).args(["--log-level=debug"]).args(arguments).listener(front);
    launch.stored_by(systemd).start()
}

/// The number of valid records in the queue.
fn stored(systemd: &FakeSystemd) -> usize {
    let queue = queue(systemd);
    replay(&queue.payloads().unwrap(), queue.messages()).unwrap().records.len()
}

fn queue(systemd: &FakeSystemd) -> Queue {
    let [inner, sender] = ["queue", "sender"]
        .map(|end| systemd.fd_store.get(&format!("handover-of-socket-proxyd.{end}")));
    Queue::from_ends(inner, sender).unwrap()
}

/// A connection that has transferred bytes. One that is still connecting would connect again.
fn established(front: &Endpoint, backend: &Endpoint) -> (Socket, Socket) {
    let (mut client, mut served) = (front.connect(), backend.accept());
    assert_forwards(&mut client, &mut served);
    (client, served)
}
