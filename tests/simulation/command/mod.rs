//! The program with COMMAND under a stopped clock. Clients come and go, and the application starts
//! late, dies, or leaves a process behind, at any moment. The invariants:
//!
//! - At most one COMMAND runs at a time.
//! - Each client gets its own byte back, or is closed in time.
//! - COMMAND is neither stopped nor frozen while a client is served.
//! - Freeze, stop and exit come neither before their idle times nor late.
//! - After a failed start comes the pause that socket-proxyd(8) names.

mod times;

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::time::Duration;

use socket_proxyd::testing::{Event, FREEZE, PassedFd, STOP, THAW};
use socket2::{Socket, Type};
use tempfile::TempDir;

use self::times::pause;
use crate::application::{self, Application, State, listen, moved, own_address};
use crate::descriptors::above;
use crate::process::Process;
use crate::support::stream::Random;
use crate::support::{Endpoint, pause as pause_really};
use crate::syscalls::Faults;
use crate::systemd::Systemd;

/// Returns what simulates some runs of COMMAND for each seed.
pub fn simulation() -> impl FnMut(u64) {
    let directory = TempDir::new().unwrap();
    let front = moved(Endpoint::unix(&directory.path().join("front"), 64));
    let address = own_address();
    move |seed| {
        let mut random = Random::new(seed);
        let target = match random.below(2) {
            0 => directory.path().join("app").to_str().unwrap().to_string(),
            _ => address.clone(),
        };
        application::refuse_starts(false);
        let mut world = World::new(&front, target, &mut random);
        for _ in 0..random.choose(&[3, 8, 25]) {
            world.act(&mut random);
        }
        world.finish();
    }
}

/// A client sends its number, and expects it back.
struct Client {
    socket: Socket,
    number: u8,
    since: Duration,
    is_served: bool,
}

#[derive(Clone, Copy)]
struct Times {
    freeze: Option<Duration>,
    stop: Option<Duration>,
    exit: Option<Duration>,
    min_run: Duration,
}

struct World<'a> {
    front: &'a Endpoint,
    target: String,
    slack: Duration,
    times: Times,
    notifies: bool,
    systemd: Systemd,
    process: Option<Process>,
    /// Since the start of the seed.
    now: Duration,
    started: Duration,
    clients: Vec<Client>,
    /// Clients so far, modulo 256.
    connected: u8,
    application: Option<Application>,
    /// When the application is going to be ready.
    ready_from: Duration,
    /// When the proxy knew that it is ready, at the latest.
    ready_since: Option<Duration>,
    /// When the last client ended, or the process began.
    idle_since: Duration,
    /// Until then clients that have left may wait: their bytes are for the backend.
    left_until: Duration,
    /// When the last run ended, and its failures in a row, if they are known.
    ended: Option<(Duration, Option<u32>)>,
    is_stopping: bool,
    is_refused: bool,
    /// The application dies at once, whenever it is started.
    crashes: bool,
    /// When the application of this run began to listen: the proxy knew it then or later.
    listens_since: Option<Duration>,
    /// The application does as it should.
    is_healthy: bool,
}

impl<'a> World<'a> {
    fn new(front: &'a Endpoint, target: String, random: &mut Random) -> Self {
        // Well above the slack.
        let scale: u64 = if target.starts_with('/') { 1 } else { 5 };
        let seconds =
            |seconds: u64| Some(Duration::from_secs(seconds * scale)).filter(|it| !it.is_zero());
        let times = Times {
            freeze: seconds(random.choose(&[0, 1, 3])),
            stop: seconds(random.choose(&[0, 4, 8])),
            exit: seconds(random.choose(&[0, 5, 20])),
            min_run: seconds(random.choose(&[0, 0, 6])).unwrap_or_default(),
        };
        let mut world = Self {
            front,
            slack: if target.starts_with('/') { SLACK } else { SLACK_OF_TCP },
            target,
            times,
            notifies: random.is_one_of(2),
            systemd: Systemd::new(0),
            process: None,
            now: Duration::ZERO,
            started: Duration::ZERO,
            clients: Vec::new(),
            connected: 0,
            application: None,
            ready_from: Duration::ZERO,
            ready_since: None,
            idle_since: Duration::ZERO,
            left_until: Duration::ZERO,
            ended: None,
            is_stopping: false,
            is_refused: false,
            crashes: random.is_one_of(4),
            listens_since: None,
            is_healthy: false,
        };
        world.start(Faults::new(random.next()));
        world
    }

    fn start(&mut self, faults: Faults) {
        let option = |name: &str, time: Option<Duration>| {
            time.map(|time| format!("--{name}={}s", time.as_secs()))
        };
        let Times { freeze, stop, exit, min_run } = self.times;
        let mut arguments = vec![format!("--backend-wait={}s", WAIT.as_secs())];
        arguments.extend(option("freeze-idle-time", freeze));
        arguments.extend(option("stop-idle-time", stop));
        arguments.extend(option("exit-idle-time", exit));
        arguments.extend(option("min-run-time", Some(min_run)));
        if self.notifies {
            arguments.push("--ready=notify".into());
        }
        arguments.extend([self.target.clone(), "--".into(), "true".into()]);
        let passed = || {
            let fd = rustix::io::fcntl_dupfd_cloexec(&self.front.socket, 3).unwrap();
            vec![PassedFd { fd, name: "front".into() }]
        };
        let process =
            Process::start(&arguments, passed, &self.systemd.name, application::start, faults);
        (self.process, self.is_stopping) = (Some(process), false);
        (self.started, self.idle_since, self.ended) = (self.now, self.now, None);
    }

    fn process(&mut self) -> &mut Process {
        self.process.as_mut().unwrap()
    }

    /// Does something at random, and lets time pass.
    fn act(&mut self, random: &mut Random) {
        match random.below(20) {
            0..6 if self.clients.len() < 5 => self.connect(),
            6..11 if !self.clients.is_empty() => {
                let which = random.below(self.clients.len() as u64) as usize;
                let client = self.clients.swap_remove(which);
                if !client.is_served {
                    self.left_until = self.left_until.max(client.since + WAIT);
                }
                if random.is_one_of(3) {
                    client.socket.shutdown(Shutdown::Write).unwrap();
                }
                self.idle_since = self.now;
            }
            11..13 => self.end_application(random),
            13 => self.refuse_starts(random.is_one_of(3)),
            14 if random.is_one_of(3) => self.restart(),
            _ => {}
        }
        let time = random.choose(&[0, 0, 0, 50, 250, 1_000, 3_000, 9_000]);
        self.ready_from = self.now + Duration::from_millis(random.choose(&[0, 0, 50, 700, 12_000]));
        self.pass(Duration::from_millis(time));
    }

    /// Says whether fork(2) fails from now on. How often it does is not known.
    fn refuse_starts(&mut self, is_refused: bool) {
        application::refuse_starts(is_refused);
        if self.is_refused || is_refused {
            self.ended = Some((self.now, None));
        }
        self.is_refused = is_refused;
    }

    fn connect(&mut self) {
        let socket = Socket::new(self.front.address.domain(), Type::STREAM, None).unwrap();
        let mut socket = Socket::from(above(socket));
        socket.connect(&self.front.address).unwrap();
        socket.set_nonblocking(true).unwrap();
        self.connected = self.connected.wrapping_add(1);
        socket.write_all(&[self.connected]).unwrap();
        let client = Client { socket, number: self.connected, since: self.now, is_served: false };
        self.clients.push(client);
    }

    /// Ends the application, its guard, or what is left behind COMMAND.
    fn end_application(&mut self, random: &mut Random) {
        let Some(application) = &mut self.application else { return };
        match random.below(3) {
            0 => application.exit(libc::SIGKILL),
            _ if application.state == State::Exited => application.exit(0),
            _ if application.state != State::Launching => application.die(libc::SIGSEGV),
            _ => {}
        }
        // Before the program can start it again.
        self.attend_application();
    }

    /// Lets time pass, in which the application does what it is asked for.
    fn pass(&mut self, time: Duration) {
        let end = self.now + time;
        self.turn();
        while self.now < end {
            let step = STEP.min(end - self.now);
            self.process().pass(step);
            self.now += step;
            self.turn();
        }
    }

    /// Has all sides do what they can without time.
    fn turn(&mut self) {
        for _ in 0..2 {
            self.systemd.handle(usize::MAX);
            self.process().step(3);
            self.take_started();
            self.attend_application();
            self.attend_clients();
        }
        self.check_times();
        if self.process().has_ended() && !self.is_stopping {
            self.check_idle_exit();
        }
    }

    fn take_started(&mut self) {
        for application in Application::take_started() {
            assert!(self.application.is_none(), "COMMAND runs twice");
            if let Some((ended, Some(failures))) = self.ended {
                assert!(self.now + self.slack >= ended + pause(failures), "started too early");
            }
            assert!(!self.is_stopping, "started while the program ends");
            (self.application, self.ready_since) = (Some(application), None);
            self.listens_since = None;
        }
    }

    fn attend_application(&mut self) {
        let Some(mut application) = self.application.take() else { return };
        let requests = application.requests();
        if application.state == State::Launching && !requests.is_empty() {
            assert_eq!(requests[4..], *b"true");
            application.state = State::Starting;
            application.send(Event::Started(application::NO_PROCESS));
            if self.crashes && !self.is_healthy {
                application.die(libc::SIGSEGV);
                application.exit(0);
            }
        } else {
            requests.into_iter().for_each(|request| self.attend(&mut application, request));
        }
        let is_due = self.is_healthy || self.now >= self.ready_from;
        if application.state == State::Starting && is_due {
            application.begin_to_serve(|| listen(&self.target));
            self.listens_since = Some(self.now);
            if self.notifies {
                self.ready_since = Some(self.now);
            }
        }
        if application.state == State::Ready {
            application.serve();
        }
        if application.state == State::Gone {
            self.note_end();
        } else {
            self.application = Some(application);
        }
    }

    fn attend(&mut self, application: &mut Application, request: u8) {
        match (request, application.state) {
            (FREEZE, State::Ready) => {
                self.check_unused(self.times.freeze);
                application.state = State::Frozen;
                application.send(Event::Frozen);
            }
            (THAW, State::Frozen) => application.state = State::Ready,
            // Sent before the proxy knew.
            (FREEZE | THAW, State::Exited) | (STOP, State::Exited) => {}
            (STOP, _) => {
                if !self.is_stopping {
                    self.check_unused(self.times.stop.into_iter().chain(self.times.exit).min());
                }
                application.die(libc::SIGTERM);
                self.ended = Some((self.now, Some(0)));
            }
            (request, state) => panic!("request {request} while {state:?}"),
        }
        if request == STOP {
            application.exit(0);
        }
    }

    fn attend_clients(&mut self) {
        let before = self.clients.len();
        let mut was_served = false;
        self.clients.retain_mut(|client| {
            let mut bytes = [0; 8];
            match client.socket.read(&mut bytes) {
                Ok(0) => false,
                Ok(length) => {
                    assert_eq!(bytes[..length], [client.number], "another client's byte");
                    client.is_served = true;
                    was_served = true;
                    true
                }
                Err(error) => error.kind() == ErrorKind::WouldBlock,
            }
        });
        if was_served && self.ready_since.is_none() {
            self.ready_since = Some(self.now);
        }
        if self.clients.len() < before {
            self.idle_since = self.now;
        }
    }

    /// Sends SIGTERM, and starts the program again.
    fn restart(&mut self) {
        let faults = self.stop();
        self.start(faults);
    }

    fn stop(&mut self) -> Faults {
        self.is_stopping = true;
        self.process().terminate();
        for _ in 0..200 {
            if self.process().has_ended() {
                break;
            }
            self.pass(STEP);
        }
        assert!(self.process().has_ended(), "SIGTERM does not end the program");
        let (result, faults) = self.process.take().unwrap().exit();
        assert_eq!(result, Ok(()));
        // The guard reads the end of its socket.
        self.attend_application();
        assert!(self.application.is_none(), "COMMAND is left");
        self.clients.retain_mut(|client| match client.socket.read(&mut [0; 8]) {
            Ok(0) => false,
            Ok(_) => panic!("served by nothing"),
            // It waits in the kernel for the next process.
            Err(error) => error.kind() == ErrorKind::WouldBlock && !client.is_served,
        });
        faults
    }

    /// Waits until all clients are served, for the longest pause and a little more.
    fn serve_all(&mut self) {
        let deadline = self.now + PAUSE_MAX + self.slack * 2;
        while self.now < deadline && !self.clients.iter().all(|client| client.is_served) {
            self.pass(STEP);
            // The kernel completes connections of TCP in its own time.
            pause_really(Duration::from_millis(u64::from(!self.target.starts_with('/'))));
        }
        assert!(self.clients.iter().all(|client| client.is_served), "a client is not served");
    }

    /// Has an application that works serve all clients, and ends all.
    fn finish(mut self) {
        self.is_healthy = true;
        self.refuse_starts(false);
        let exited = self.application.as_mut().filter(|it| it.state == State::Exited);
        exited.into_iter().for_each(|it| it.exit(0));
        self.attend_application();
        self.serve_all();
        self.connect();
        self.serve_all();
        self.clients.clear();
        self.idle_since = self.now;
        self.pass(self.times.stop.unwrap_or(STEP).max(self.times.min_run) + self.slack * 2);
        drop(self.stop());
    }
}

const WAIT: Duration = Duration::from_secs(30);
const STEP: Duration = Duration::from_millis(250);

/// How much later than due the simulation sees a thing. The clock may run ahead while the kernel
/// completes a connection of TCP.
const SLACK: Duration = Duration::from_millis(600);
const SLACK_OF_TCP: Duration = Duration::from_secs(3);

/// A run that lasts so long is not a failed start.
const STEADY: Duration = Duration::from_secs(1);
const PAUSE_MAX: Duration = Duration::from_secs(10);
