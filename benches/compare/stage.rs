//! How a sample of each row is taken.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use serde::{Deserialize, Serialize};
use socket2::SockAddr;
use tempfile::TempDir;

use crate::addresses::{Family, free_address, listener};
use crate::clock;
use crate::contender::{Contender, Running, User};
use crate::load::{Load, Role, Stats};
use crate::process::{Holdings, cpu, holdings, is_frozen, tree};
use crate::rows::{Row, Work};

/// Connections of small messages beside bulk.
const MESSAGES_BESIDE: usize = 4;

/// What one round of a contender came to.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
pub(crate) struct Sample {
    /// Units of work a second.
    pub(crate) rate: f64,
    /// The proxy's CPU seconds per unit.
    pub(crate) cost: Option<f64>,
    /// Seconds to an answer: the median, one in a hundred, one in a thousand.
    pub(crate) latency: Option<[f64; 3]>,
    pub(crate) failures: u64,
    /// Of the proxy, for each connection.
    pub(crate) held: Option<Holdings>,
}

/// How long things take.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Effort {
    /// Seconds of work in a sample.
    pub(crate) seconds: f64,
    /// Starts in a sample of activation, and clients in one of an application on demand.
    pub(crate) starts: usize,
    /// What large numbers of connections are divided by.
    pub(crate) divisor: usize,
}

impl Row {
    /// One sample.
    pub(crate) fn sample(
        &self,
        contender: &Contender,
        pair: (Family, Family),
        effort: Effort,
    ) -> Sample {
        let divide = |connections: usize| {
            if connections > 100 { connections / effort.divisor } else { connections }
        };
        let stage = Stage::new(pair, self.user);
        match self.work {
            Work::BulkUp(connections) => {
                stage.bulk(contender, divide(connections), Role::Source, Role::Sink, effort)
            }
            Work::BulkDown(connections) => {
                stage.bulk(contender, divide(connections), Role::Sink, Role::Source, effort)
            }
            Work::RoundTrips(size, connections) => {
                stage.round_trips(contender, size, divide(connections), effort)
            }
            Work::Beside(connections) => stage.beside(contender, connections, effort),
            Work::BesideStalled(connections) => {
                stage.beside_stalled(contender, divide(connections), effort)
            }
            Work::Short => stage.short(contender, effort),
            Work::Idle(connections) => stage.idle(contender, divide(connections)),
            Work::Activation => stage.activation(contender, effort),
            Work::ColdStart => {
                let has_ended = |proxy| tree(proxy).len() == 1;
                stage.on_demand(contender, "--stop-idle-time=20ms", has_ended, effort)
            }
            Work::Thaw => stage.on_demand(contender, "--freeze-idle-time=20ms", is_frozen, effort),
            Work::Datagrams(size, sessions) => {
                stage.datagrams(contender, size, divide(sessions), effort)
            }
            Work::DatagramsUp(segments) => stage.datagrams_up(contender, segments, effort),
            Work::DatagramColdStart => stage.datagram_cold_start(contender, effort),
        }
    }
}

/// Between a front and a backend.
pub(crate) struct Stage {
    front: Family,
    pub(crate) back: Family,
    user: User,
    directory: TempDir,
}

impl Stage {
    fn new((front, back): (Family, Family), user: User) -> Self {
        let directory = TempDir::new().expect("a directory");
        if user == User::Nobody {
            open_to_all(directory.path());
        }
        Self { front, back, user, directory }
    }

    /// A load whose backend has this role, and where that is.
    fn backend(&self, message: usize, role: Role) -> (Load, SockAddr) {
        let (socket, address) = listener(self.back, self.directory.path());
        if let Some(path) = address.as_pathname() {
            open_to_all(path);
        }
        let mut load = Load::new(message);
        load.listen(socket, role);
        (load, address)
    }

    pub(crate) fn start(&self, contender: &Contender, target: &SockAddr) -> Running {
        contender.start(self.front, target, self.user, |_| ())
    }

    fn bulk(
        &self,
        contender: &Contender,
        connections: usize,
        client: Role,
        backend: Role,
        effort: Effort,
    ) -> Sample {
        let (mut backends, target) = self.backend(0, backend);
        let running = self.start(contender, &target);
        let mut clients = Load::new(0);
        let connected =
            (0..connections).filter(|_| clients.connect(&running.front, client)).count();
        let missing = (connections - connected) as u64;
        let sink = if backend == Role::Sink { &backends } else { &clients };
        let bytes = Arc::clone(&sink.stats.bytes);
        let over = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| backends.run_until(&over));
            let sample = measure(&mut clients, &running, missing, effort.seconds, |_| {
                bytes.swap(0, Ordering::Relaxed) as f64 / 1e9
            });
            over.store(true, Ordering::Relaxed);
            sample
        })
    }

    /// Small messages on connections of their own, while the backend sends bulk on others: a backend's
    /// connection sends when its client has asked for bulk.
    fn beside(&self, contender: &Contender, bulk: usize, effort: Effort) -> Sample {
        let (mut backends, target) = self.backend(64, Role::Ask);
        let running = self.start(contender, &target);
        let (mut sinks, mut pings) = (Load::new(64), Load::new(64));
        let connected = |load: &mut Load, count: usize, role| {
            count - (0..count).filter(|_| load.connect(&running.front, role)).count()
        };
        let missing = connected(&mut sinks, bulk, Role::AskForBulk)
            + connected(&mut pings, MESSAGES_BESIDE, Role::Ping);
        let bytes = Arc::clone(&sinks.stats.bytes);
        let over = AtomicBool::new(false);
        let mut sample = thread::scope(|scope| {
            scope.spawn(|| backends.run_until(&over));
            scope.spawn(|| sinks.run_until(&over));
            let sample = measure(&mut pings, &running, missing as u64, effort.seconds, |_| {
                bytes.swap(0, Ordering::Relaxed) as f64 / 1e9
            });
            over.store(true, Ordering::Relaxed);
            sample
        });
        sample.failures += sinks.stats.failures;
        sample
    }

    fn beside_stalled(&self, contender: &Contender, stalled: usize, effort: Effort) -> Sample {
        let (mut backends, target) = self.backend(0, Role::Stalled);
        let running = self.start(contender, &target);
        let mut clients = Load::new(0);
        let mut missing = stalled
            - (0..stalled).filter(|_| clients.connect(&running.front, Role::Source)).count();
        // Until nothing moves any more.
        let accepted = |backends: &Load| backends.connections() >= stalled;
        let deadline = clock::after(10.0);
        while clock::now() < deadline && (!accepted(&backends) || clients.moved(0.3)) {
            backends.run(clock::after(0.01), |_| false);
        }
        backends.set_role(Role::Sink);
        missing += usize::from(!clients.connect(&running.front, Role::Source));
        let bytes = Arc::clone(&backends.stats.bytes);
        let over = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| backends.run_until(&over));
            let sample = measure(&mut clients, &running, missing as u64, effort.seconds, |_| {
                bytes.swap(0, Ordering::Relaxed) as f64 / 1e9
            });
            over.store(true, Ordering::Relaxed);
            sample
        })
    }

    fn round_trips(
        &self,
        contender: &Contender,
        size: usize,
        connections: usize,
        effort: Effort,
    ) -> Sample {
        let (mut load, target) = self.backend(size, Role::Echo);
        let running = self.start(contender, &target);
        let connected = (0..connections).filter(|_| load.connect(&running.front, Role::Ping));
        let missing = (connections - connected.count()) as u64;
        measure(&mut load, &running, missing, effort.seconds, |stats| stats.done as f64)
    }

    fn short(&self, contender: &Contender, effort: Effort) -> Sample {
        let (mut load, target) = self.backend(64, Role::Echo);
        let running = self.start(contender, &target);
        load.short(&running.front, 16);
        // connect(2) gets slow when the 14,000 even ports to one address are in TIME_WAIT.
        let seconds = effort.seconds.min(0.3);
        measure(&mut load, &running, 0, seconds, |stats| stats.done as f64)
    }

    fn idle(&self, contender: &Contender, connections: usize) -> Sample {
        let (mut load, target) = self.backend(64, Role::Echo);
        let running = self.start(contender, &target);
        let pid = running.pid().expect("a proxy");
        // The backend accepts between two steps: a step fits into its backlog, so the kernel drops no
        // SYN, which the proxy would send again a second later.
        const STEP: usize = 1000;
        let connect = |load: &mut Load, count: usize| {
            load.reset();
            let mut connected = 0;
            for first in (0..count).step_by(STEP) {
                let step = first..count.min(first + STEP);
                connected += step.filter(|_| load.connect(&running.front, Role::Once)).count();
                let enough = connected as u64;
                load.run(clock::after(20.0), |stats| stats.done + stats.failures >= enough);
            }
        };
        // The first one makes what the program makes only once.
        connect(&mut load, 1);
        let before = holdings(pid);
        let start = clock::now();
        connect(&mut load, connections);
        let seconds = (clock::now() - start) as f64 / 1e9;
        let after = holdings(pid);
        // Where some have failed, the others hold what is held.
        let served = load.clients().saturating_sub(1).max(1);
        let each = |after: usize, before: usize| after.saturating_sub(before) / served;
        Sample {
            rate: connections as f64 / seconds,
            failures: (connections + 1).saturating_sub(load.clients()) as u64,
            held: Some(Holdings {
                descriptors: each(after.descriptors, before.descriptors),
                resident: each(after.resident, before.resident),
                pipes: each(after.pipes, before.pipes),
            }),
            ..Sample::default()
        }
    }

    fn activation(&self, contender: &Contender, effort: Effort) -> Sample {
        let mut times = Vec::new();
        let mut failures = 0;
        for _ in 0..effort.starts {
            let stage = Self::new((self.front, self.back), self.user);
            let (mut load, target) = stage.backend(64, Role::Echo);
            let running = contender.start(stage.front, &target, stage.user, |front| {
                load.connect(front, Role::Once);
            });
            load.run(clock::after(5.0), |stats| stats.done + stats.failures > 0);
            match running.executed {
                Some(executed) if load.stats.done > 0 => times.push(clock::now() - executed),
                _ => failures += 1,
            }
        }
        durations(times, failures)
    }

    /// Each client but the first comes when the application rests.
    fn on_demand(
        &self,
        contender: &Contender,
        option: &str,
        rests: impl Fn(u32) -> bool,
        effort: Effort,
    ) -> Sample {
        let target = free_address(self.back, self.directory.path());
        let contender = contender.with_application(option, self.back, &target);
        let running = self.start(&contender, &target);
        let proxy = running.pid().expect("a process");
        let (mut times, mut failures) = (Vec::new(), 0);
        for client in 0..=effort.starts {
            let mut load = Load::new(64);
            let begin = clock::now();
            load.connect(&running.front, Role::Once);
            load.run(clock::after(10.0), |stats| stats.done + stats.failures > 0);
            match load.stats.done {
                0 => failures += 1,
                _ if client == 0 => {}
                _ => times.push(clock::now() - begin),
            }
            drop(load);
            let deadline = clock::after(10.0);
            while !rests(proxy) && clock::now() < deadline {
                Load::new(0).run(clock::after(0.001), |_| false);
            }
        }
        durations(times, failures)
    }
}

/// The proxy's CPU time, and the time, from a moment on.
pub(crate) struct Meter<'a> {
    running: &'a Running,
    before: Option<f64>,
    start: u64,
}

impl<'a> Meter<'a> {
    pub(crate) fn start(running: &'a Running) -> Self {
        Self { running, before: running.pid().map(cpu), start: clock::now() }
    }

    /// Returns what so much work since then came to.
    pub(crate) fn sample(self, amount: f64, failures: u64) -> Sample {
        let took = (clock::now() - self.start) as f64 / 1e9;
        let used = self.before.zip(self.running.pid().map(cpu));
        let used = used.map(|(before, after)| after - before);
        Sample {
            rate: amount / took,
            cost: used.filter(|_| amount > 0.0).map(|used| used / amount),
            failures: failures + self.running.failures(),
            ..Sample::default()
        }
    }
}

pub(crate) fn latency(stats: &Stats) -> Option<[f64; 3]> {
    let latency = &stats.latency;
    let at = |quantile| latency.value_at_quantile(quantile) as f64 / 1e9;
    (!latency.is_empty()).then(|| [at(0.5), at(0.99), at(0.999)])
}

/// Returns the sample of durations in nanoseconds.
pub(crate) fn durations(mut times: Vec<u64>, failures: u64) -> Sample {
    times.sort_unstable();
    let at = |share: f64| {
        let index = (times.len() as f64 * share) as usize;
        times.get(index.min(times.len().saturating_sub(1))).map_or(0.0, |it| *it as f64 / 1e9)
    };
    Sample {
        rate: times.len() as f64,
        cost: Some(at(0.5)),
        latency: Some([at(0.5), at(0.99), at(0.999)]),
        failures,
        ..Sample::default()
    }
}

/// Runs a load for a while after it has got going, and takes the proxy's CPU for that time.
fn measure(
    load: &mut Load,
    running: &Running,
    missing: u64,
    seconds: f64,
    amount: impl Fn(&Stats) -> f64,
) -> Sample {
    load.run(clock::after(seconds * 0.3), |_| false);
    let early = load.stats.failures;
    load.reset();
    // What has come so far is not counted.
    amount(&load.stats);
    let meter = Meter::start(running);
    load.run(clock::after(seconds), |_| false);
    let sample = meter.sample(amount(&load.stats), load.stats.failures + early + missing);
    Sample { latency: latency(&load.stats), ..sample }
}

fn open_to_all(path: &Path) {
    use std::os::unix::fs::PermissionsExt;
    let _ = std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o777));
}
