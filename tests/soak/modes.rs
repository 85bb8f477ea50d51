//! The modes, and the course of each: a phase of traffic, figures, a longer phase, figures.

use std::env;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use tokio::time::Instant;

use crate::application::Service;
use crate::datagrams::Sessions;
use crate::load::Load;
use crate::measures::{Figures, Held, Row};
use crate::scraper::{self, Scraped};
use crate::script::Kind;
use crate::served;
use crate::subjects::{Ending, OnDemand, Processes, Subject};
use crate::support::stream::Random;
use crate::support::*;
use crate::traffic::{Cuts, LASTING_OF_EACH, PATIENCE, Route, Traffic};

/// How long each mode has traffic, and the seed of everything random.
#[derive(Clone, Copy, Debug)]
pub struct Course {
    pub time: Duration,
    pub seed: u64,
}

impl Course {
    /// From SOAK_SECONDS and SOAK_SEED. Without them it is short, and of a new seed.
    pub fn from_env() -> Self {
        let number = |name: &str| env::var(name).ok().map(|it| it.parse::<u64>().unwrap());
        let time = number("SOAK_SECONDS").unwrap_or(SHORT);
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
        let seed = number("SOAK_SEED").unwrap_or(now.as_nanos() as u64 % 1_000_000_000);
        Self { time: Duration::from_secs(time), seed }
    }

    /// The first phase: a minute, or a tenth of a shorter time.
    fn first(self) -> Duration {
        Duration::from_secs(60).min(self.time / 10)
    }
}

const CONNECTIONS: [Kind; 7] = [
    Kind::Short,
    Kind::Short,
    Kind::Exchange,
    Kind::Bulk,
    Kind::HalfClose,
    Kind::Reset,
    Kind::Urgent,
];

pub fn plain(course: Course) -> Row {
    connections("plain", course, &[], Ending::Never)
}

pub fn threads(course: Course) -> Row {
    connections("--threads=3", course, &["--threads=3"], Ending::Never)
}

pub fn restart(course: Course) -> Row {
    connections("--handover=restart", course, &["--handover=restart"], Ending::Stop)
}

/// One process, so that its memory is compared.
pub fn crash_without_kills(course: Course) -> Row {
    connections("--handover=crash, not killed", course, &["--handover=crash"], Ending::Never)
}

pub fn crash(course: Course) -> Row {
    connections("--handover=crash", course, &["--handover=crash"], Ending::Kill)
}

/// With a scraper.
pub fn metrics(course: Course) -> Row {
    let options = ["--metrics=127.0.0.1:0", "--threads=2"];
    let mut setup = Setup::new(course, &options, Ending::Never, &PAIRS, &CONNECTIONS);
    setup.processes.pooled = POOLED_OF_MANY;
    let address = metrics_address(&setup.processes.running);
    let load = Scraped { traffic: &setup.traffic, address };
    let row = run("--metrics=, scraped", course, &load, &mut setup.processes);
    assert_eq!(scraper::open_connections(address), LASTING_OF_EACH * PAIRS.len());
    row
}

/// Between Unix sockets, with descriptors in a third of the connections.
pub fn descriptors(course: Course) -> Row {
    let kinds: Vec<_> = CONNECTIONS.into_iter().chain([Kind::Passing; 4]).collect();
    let unix = [(Family::Unix, Family::Unix)];
    let mut setup = Setup::new(course, &[], Ending::Never, &unix, &kinds);
    run("descriptors passed", course, &*setup.traffic, &mut setup.processes)
}

pub fn descriptors_and_restarts(course: Course) -> Row {
    let kinds: Vec<_> = CONNECTIONS.into_iter().chain([Kind::Passing; 4]).collect();
    let unix = [(Family::Unix, Family::Unix)];
    let mut setup = Setup::new(course, &["--handover=restart"], Ending::Stop, &unix, &kinds);
    run("descriptors passed, --handover=restart", course, &*setup.traffic, &mut setup.processes)
}

/// COMMAND, which is killed, and stops when it is idle.
pub fn on_demand(course: Course) -> Row {
    let program = env::current_exe().unwrap();
    let program = [program.to_str().unwrap(), served::WORD];
    let options = ["--stop-idle-time=200ms", "--connections-max=2000"];
    let service = Service::start_as(Family::Tcp, &options, &program, &[], |launch| launch);
    let families = (Family::Tcp, Family::Tcp);
    let route = Route { front: service.front.clone(), families };
    let traffic = Traffic::new(course.seed, vec![route], &CONNECTIONS, Cuts::Application);
    let traffic = Arc::new(traffic);
    let mut subject = OnDemand::new(service, Arc::clone(&traffic));
    run("COMMAND, killed and idle", course, &*traffic, &mut subject)
}

/// UDP and Unix.
pub fn datagrams(course: Course) -> Row {
    sessions("datagrams", course, &[], Ending::Never)
}

pub fn datagrams_and_kills(course: Course) -> Row {
    let options = ["--handover=crash"];
    sessions("datagrams, --handover=crash", course, &options, Ending::Kill)
}

fn sessions(mode: &'static str, course: Course, options: &[&str], ending: Ending) -> Row {
    let sessions = Sessions::new(course.seed);
    let words = ["--session-idle-time=2s", "--connections-max=2000"];
    let arguments = words.iter().chain(options).map(ToString::to_string);
    let arguments = arguments.chain(sessions.targets()).collect();
    let mut processes = Processes::start(arguments, sessions.listeners(), ending, Arc::default());
    run(mode, course, &sessions, &mut processes)
}

/// Connections of all families, through one proxy.
fn connections(mode: &'static str, course: Course, options: &[&str], ending: Ending) -> Row {
    let mut setup = Setup::new(course, options, ending, &PAIRS, &CONNECTIONS);
    setup.processes.pooled = match ending {
        Ending::Never if options.is_empty() => POOLED,
        Ending::Never if options == ["--threads=3"] => POOLED_OF_MANY,
        // A stored connection has pipes of its own, and the next process begins without a pool.
        _ => 0,
    };
    run(mode, course, &*setup.traffic, &mut setup.processes)
}

/// A proxy between listeners and backends of this process.
struct Setup {
    traffic: Arc<Traffic>,
    processes: Processes,
    _endpoints: Vec<Endpoint>,
}

impl Setup {
    fn new(
        course: Course,
        options: &[&str],
        ending: Ending,
        pairs: &[(Family, Family)],
        kinds: &[Kind],
    ) -> Self {
        let mut arguments = vec!["--connections-max=2000".to_string()];
        arguments.extend(options.iter().map(ToString::to_string));
        let (mut routes, mut listeners, mut endpoints) = (Vec::new(), Vec::new(), Vec::new());
        for (number, families) in pairs.iter().enumerate() {
            let (front, backend) = (Endpoint::new(families.0), Endpoint::new(families.1));
            arguments.push(format!("front{number}={}", backend.target));
            listeners.push((format!("front{number}"), front.socket.try_clone().unwrap()));
            routes.push(Route { front: front.address.clone(), families: *families });
            endpoints.extend([front, backend]);
        }
        let cuts = if ending == Ending::Kill { Cuts::Crash } else { Cuts::Never };
        let traffic = Arc::new(Traffic::new(course.seed, routes, kinds, cuts));
        for backend in endpoints.iter().skip(1).step_by(2) {
            traffic.serve(backend.socket.try_clone().unwrap());
        }
        let kills = Arc::clone(&traffic.kills);
        let processes = Processes::start(arguments, listeners, ending, kills);
        Self { traffic, processes, _endpoints: endpoints }
    }
}

/// Two phases, with figures after each.
fn run(mode: &'static str, course: Course, load: &dyn Load, subject: &mut dyn Subject) -> Row {
    let mut random = Random::new(course.seed);
    let start = Instant::now();
    load.warm_up();
    subject.settle();
    let empty = subject.figures().held;
    let pipes = empty.pipes + 2 * subject.pooled();
    let mut disturbances = phases(load, subject, &mut random, course.first(), pipes);
    assert_no_failures(mode, course, load);
    let first = settled(subject, |held| held.sockets == empty.sockets && held.passed == 0);
    assert_eq!(first.held.sockets, empty.sockets, "{mode}, {course:?}: {first:?}, {empty:?}");
    let first_at = Instant::now();
    disturbances += phases(load, subject, &mut random, course.time - course.first(), pipes);
    assert_no_failures(mode, course, load);
    let last = settled(subject, |held| *held == first.held);
    assert_eq!(last.held, first.held, "{mode}, {course:?}");
    if course.time >= COMPARABLE {
        let grown = last.memory.saturating_sub(first.memory);
        let margin = MARGIN + load.burst_memory();
        assert!(grown <= margin, "{mode}, {course:?}: {grown} KiB more than at first");
    }
    let (between, whole) = (first_at.elapsed(), start.elapsed());
    Row { mode, totals: load.totals(), disturbances, first, last, between, whole }
}

fn assert_no_failures(mode: &str, course: Course, load: &dyn Load) {
    let failures = load.failures().all();
    assert!(failures.is_empty(), "{mode}, {course:?}: {failures:#?}");
}

/// Traffic and disturbances for this time. Then a state in which figures can be compared: the process has
/// had as many pipes open as its pool keeps. Returns how many disturbances there were.
fn phases(
    load: &dyn Load,
    subject: &mut dyn Subject,
    random: &mut Random,
    time: Duration,
    pipes: usize,
) -> u64 {
    let mut disturbances = 0;
    let longest_pause = (time.as_millis() as u64 / 4).clamp(1, 2000);
    let end = Instant::now() + time;
    while Instant::now() < end && !load.failures().any() {
        let phase = subject.longest_phase(random).min(end.duration_since(Instant::now()));
        let end = Instant::now() + phase;
        load.stop().reset();
        thread::scope(|scope| {
            let _end = load.stop().at_end();
            let seed = random.next();
            scope.spawn(move || load.run_phase(seed));
            while Instant::now() < end && !load.failures().any() {
                let pause = Duration::from_millis(50 + random.below(longest_pause));
                load.stop().wait(pause.min(end.duration_since(Instant::now())));
                disturbances += u64::from(subject.disturb(random));
            }
        });
        subject.settle();
    }
    if load.failures().any() {
        return disturbances;
    }
    load.stop().reset();
    thread::scope(|scope| {
        let _end = load.stop().at_end();
        let seed = random.next();
        scope.spawn(move || load.run_calm_phase(seed));
        let is_full = || {
            let is_full = subject.figures().held.pipes >= pipes;
            (is_full || load.failures().any()).then_some(())
        };
        let full = poll_until(Instant::now() + PATIENCE, is_full);
        assert!(full.is_some(), "{pipes} ends of pipes, not {:?}", subject.figures());
    });
    subject.settle();
    disturbances
}

/// The figures once they are as expected, or else the last of them.
fn settled(subject: &mut dyn Subject, is_settled: impl Fn(&Held) -> bool) -> Figures {
    let wait = |subject: &mut dyn Subject| {
        let mut last = subject.figures();
        poll_until(Instant::now() + PATIENCE, || {
            last = subject.figures();
            is_settled(&last.held).then_some(())
        });
        last
    };
    wait(subject);
    // Sessions have ended by now: a next process restores none of them.
    subject.settle();
    wait(subject)
}

/// Pipes that a process keeps, with one event loop: one more than it may hold for slow receivers.
pub const POOLED: usize = 17;

/// With two or three event loops: nine or six pipes each.
const POOLED_OF_MANY: usize = 18;

/// Seconds of each mode in `cargo test`.
const SHORT: u64 = 2;

/// From this time on the first figures are those of a process that has done everything once.
const COMPARABLE: Duration = Duration::from_secs(120);

/// KiB that a process may have more at the end.
const MARGIN: u64 = 1024;
