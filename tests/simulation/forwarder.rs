//! The forwarder between two peers. The invariants: bytes and descriptors come in order, nothing is
//! lost before a clean end, no end is clean after a cut, and nothing waits without a reason.

use std::cell::{Cell, RefCell};
use std::mem::discriminant;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use socket_proxyd::testing::{
    self as proxy, CloseReason, Forwarder, Gauge, LoopBuffers, Outcome, PassedLimits, PassedRoom,
    PipeLimits, Progress, Queue, Record, RecordBody, Registry, Summary, encode_message, replay,
};
use tokio::task::{JoinHandle, spawn_local, yield_now};
use tokio::time::{Instant, sleep};

use crate::peer::{End, PASSED_AT_MOST, Peer, wait_for_bytes};
use crate::process::event_loop;
use crate::support::stream::Random;
use crate::support::{Family, pause};
use crate::syscalls::Faults;

/// Returns what simulates one connection for each seed.
pub fn simulation(families: [Family; 2]) -> impl FnMut(u64) {
    let runtime = event_loop();
    // What the first connection opens for all stays open.
    for family in families {
        drop(Peer::new(family, [0; 2], &mut Random::new(0)));
    }
    move |seed| {
        let mut faults = Faults::new(seed);
        faults.one_of = [5, 0, 0, 0][(seed % 4) as usize];
        // The peers' sends come short as well, which they account for.
        faults.apply(|| runtime.block_on(simulate(seed, families)));
    }
}

async fn simulate(seed: u64, families: [Family; 2]) {
    let mut random = Random::new(seed);
    let seeds = [random.next(), random.next()];
    let (client, to_client) = Peer::new(families[0], seeds, &mut random);
    let (backend, to_backend) = Peer::new(families[1], [seeds[1], seeds[0]], &mut random);
    let mut peers = [client, backend];
    let sockets = [(to_client, families[0]), (to_backend, families[1])].map(|(socket, family)| {
        let family = match family {
            Family::Tcp => proxy::Family::Tcp,
            Family::Unix => proxy::Family::Unix,
        };
        proxy::Socket::register(socket.into(), family).unwrap()
    });
    let mut middle = Middle::new(sockets, &mut random);
    act(&mut peers, &mut middle, &mut random).await;
    let passed_too_many = peers.iter().any(|peer| peer.passed_too_many);
    let was_over = middle.task.is_finished();
    let is_open = !was_over
        && !passed_too_many
        && !peers.iter().any(Peer::is_gone)
        && !peers.iter().all(|peer| peer.has_ended);
    // Why the proxy itself ends the connection.
    let expected = match random.below(16) {
        0 | 1 => {
            middle.wait_until_over().await;
            Some(CloseReason::IdleTimeout)
        }
        2 => {
            middle.reset_passive().await;
            middle.is_passive.then_some(CloseReason::NotInUse)
        }
        _ => None,
    };
    finish(&mut peers, &mut middle, &mut random).await;
    let was_cut = passed_too_many || expected.is_some() && !was_over;
    for which in 0..2 {
        let (peer, other) = pair(&mut peers, which);
        peer.check_end(other, was_cut);
    }
    let Some(summary) = (&mut middle.task).await.unwrap() else { return };
    let is_by_proxy =
        |reason: &CloseReason| matches!(reason, CloseReason::IdleTimeout | CloseReason::NotInUse);
    let reason = Some(&summary.reason).filter(|reason| is_by_proxy(reason)).map(discriminant);
    // Where a peer is gone, or both have ended, it depends on what was received.
    let is_expected = reason == expected.as_ref().map(discriminant);
    assert!(is_expected || reason.is_none() && !is_open, "{summary:?}, not {expected:?}");
    let [client, backend] = &peers;
    let (from_client, from_backend) = (summary.from_client, summary.from_backend);
    assert_eq!(middle.counters.get(), [from_client, from_backend]);
    assert!(from_client >= backend.received() && from_client <= client.sent(), "{summary:?}");
    assert!(from_backend >= client.received() && from_backend <= backend.sent(), "{summary:?}");
    if !was_cut && [client, backend].iter().all(|peer| peer.end == Some(End::Clean)) {
        let is_regular = matches!(summary.reason, CloseReason::Closed);
        assert!(is_regular || peers.iter().any(Peer::is_gone), "{summary:?}");
    }
}

/// Has the peers act, and what else comes to a connection, step by step.
async fn act(peers: &mut [Peer; 2], middle: &mut Middle, random: &mut Random) {
    let has_tcp = peers.iter().any(|peer| peer.family == Family::Tcp);
    let mut pipes = Vec::new();
    for _ in 0..random.choose(&[5, 20, 60]) {
        match random.below(20) {
            0 => middle.hand_over().await,
            // Another connection takes a pipe, or returns all.
            1 => pipes.extend(middle.shared.pipes.acquire()),
            2 => pipes.clear(),
            3 => {
                middle.request_report().await;
                let idle = middle.reported_idle.get();
                assert!(idle.is_none_or(|idle| idle.is_some() == has_tcp), "{idle:?}");
            }
            _ => {
                let which = random.below(2) as usize;
                let (peer, other) = pair(peers, which);
                peer.act(other, random);
            }
        }
        for _ in 0..random.below(4) {
            yield_now().await;
        }
    }
}

fn pair(peers: &mut [Peer; 2], which: usize) -> (&mut Peer, &Peer) {
    let [client, backend] = peers;
    if which == 0 { (client, backend) } else { (backend, client) }
}

/// Has each peer that is still there end its bytes, and receive until the end.
async fn finish(peers: &mut [Peer; 2], middle: &mut Middle, random: &mut Random) {
    peers.iter_mut().filter(|_| !random.is_one_of(20)).for_each(Peer::shut_down);
    let mut idle_rounds = 0;
    while !middle.task.is_finished() || peers.iter().any(|it| !it.is_gone() && it.end.is_none()) {
        let mut has_moved = false;
        for which in 0..2 {
            let (peer, other) = pair(peers, which);
            while peer.receive(other, 1_000_000) {
                has_moved = true;
            }
            if peer.end.is_some() {
                peer.shut_down();
            }
        }
        idle_rounds = if has_moved { 0 } else { idle_rounds + 1 };
        if idle_rounds < 4 {
            yield_now().await;
        } else if idle_rounds < REAL_ROUNDS {
            // The kernel acknowledges late, and sends again after 200 ms what the socket of a peer
            // that has closed did not acknowledge. Its clock is the real one.
            wait_for_bytes(&*peers);
            sleep(Duration::from_millis(1)).await;
        } else if idle_rounds < REAL_ROUNDS + 20 {
            sleep(Duration::from_secs(10)).await;
        } else {
            assert!(!peers.iter().all(Peer::is_gone), "the connection does not end");
            // Both have not shut down, so each waits for the other's end.
            let is_silent = |peer: &Peer| !peer.is_gone() && !peer.has_ended;
            assert!(peers.iter().all(is_silent), "an end is not passed on");
            peers.iter_mut().for_each(Peer::shut_down);
            idle_rounds = 0;
        }
    }
}

/// The forwarder, and what it shares with other connections of its event loop.
struct Middle {
    shared: Rc<LoopBuffers>,
    counters: Arc<proxy::ByteCounters>,
    registry: Rc<Registry>,
    is_passive: bool,
    /// Visits the connections of the registry.
    sweep: JoinHandle<()>,
    /// Returns `None` if the connection was over when it was handed over.
    task: JoinHandle<Option<Summary>>,
    /// The forwarder that was asked to detach.
    detached: Rc<RefCell<Option<Box<Forwarder>>>>,
    /// How long the connection was idle, as the latest report says.
    reported_idle: Rc<Cell<Option<Option<Duration>>>>,
}

impl Middle {
    fn new([client, backend]: [proxy::Socket; 2], random: &mut Random) -> Self {
        let max = random.choose(&[0, 1, 2, 8]);
        let limits = PipeLimits { max, held: random.choose(&[0, 1, 8]).min(max) };
        let all = random.choose(&[16, 24, 64]);
        let passed = PassedLimits { message: PASSED_AT_MOST, all, threads: 1 };
        let shared = Rc::new(LoopBuffers::new(limits, Gauge::default(), PassedRoom::new(passed)));
        let counters = Arc::<proxy::ByteCounters>::default();
        let (registry, sweep) = registry();
        let is_passive = random.is_one_of(2);
        let forwarder = Forwarder::new(
            client,
            backend,
            Vec::new(),
            Rc::clone(&shared),
            Arc::clone(&counters),
            Some(registry.register(is_passive)),
            None,
        );
        let detached = Rc::default();
        let reported_idle = Rc::default();
        let task = spawn(forwarder, &detached, &reported_idle);
        Self { shared, counters, registry, is_passive, sweep, task, detached, reported_idle }
    }

    /// Asks for a report, which comes at once unless the connection is over.
    async fn request_report(&self) {
        self.reported_idle.take();
        self.registry.request_reports();
        let_it_act().await;
        assert!(self.reported_idle.get().is_some() || self.task.is_finished(), "no report");
    }

    /// Waits until a connection whose peers do nothing is over: it is idle, or one has gone and the
    /// other receives nothing.
    async fn wait_until_over(&self) {
        let start = Instant::now();
        while !self.task.is_finished() {
            assert!(start.elapsed() < IDLE_TIME * 100, "the connection is idle, and open");
            sleep(IDLE_TIME / 4).await;
            // What the kernel still sends by its own clock delays the end.
            pause(Duration::from_millis(1));
        }
    }

    /// Resets a connection that is not in use.
    async fn reset_passive(&self) {
        self.registry.reset_passive();
        let_it_act().await;
        assert!(self.task.is_finished() || !self.is_passive, "a passive connection goes on");
    }

    /// Detaches the connection, stores it, and restores it.
    async fn hand_over(&mut self) {
        self.registry.detach_all().await;
        let Some(forwarder) = self.detached.take() else { return };
        let queue = Queue::new().unwrap();
        {
            let snapshot = Box::new(forwarder.snapshot().unwrap());
            let records =
                [Record { id: 1, start: 0, body: RecordBody::Forwarder(snapshot) }.seal()];
            let (bytes, descriptors) = encode_message(&records);
            queue.append(&bytes, &descriptors).unwrap();
        }
        forwarder.detach();
        self.sweep.abort();
        (self.registry, self.sweep) = registry();
        let replayed = replay(&queue.payloads().unwrap(), queue.messages()).unwrap();
        assert_eq!(replayed.refused, 0);
        self.task.abort();
        let record = replayed.records.into_iter().next();
        let Some(Record { body: RecordBody::Forwarder(snapshot), .. }) = record else {
            self.task = spawn_local(async { None });
            return;
        };
        let forwarder = Forwarder::restore(
            *snapshot,
            Rc::clone(&self.shared),
            Arc::clone(&self.counters),
            Some(self.registry.register(self.is_passive)),
            None,
        );
        self.task = spawn(forwarder.unwrap(), &self.detached, &self.reported_idle);
    }
}

impl Drop for Middle {
    fn drop(&mut self) {
        self.sweep.abort();
    }
}

/// Gives the connection all the turns that it needs for what it does at once.
async fn let_it_act() {
    for _ in 0..8 {
        yield_now().await;
    }
}

fn registry() -> (Rc<Registry>, JoinHandle<()>) {
    let registry = Rc::new(Registry::new(Some(IDLE_TIME)));
    (Rc::clone(&registry), spawn_local(registry.sweep()))
}

fn spawn(
    forwarder: Forwarder,
    detached: &Rc<RefCell<Option<Box<Forwarder>>>>,
    reported_idle: &Rc<Cell<Option<Option<Duration>>>>,
) -> JoinHandle<Option<Summary>> {
    let (detached, reported_idle) = (Rc::clone(detached), Rc::clone(reported_idle));
    spawn_local(async move {
        let report = |progress: Progress| reported_idle.set(Some(progress.idle));
        match forwarder.run(report).await.unwrap() {
            Outcome::Closed(summary) => Some(summary),
            Outcome::Detached(forwarder) => {
                *detached.borrow_mut() = Some(forwarder);
                // The caller waits for the next task instead.
                std::future::pending().await
            }
        }
    })
}

/// Longer than any seed takes by the stopped clock.
const IDLE_TIME: Duration = Duration::from_secs(24 * 3600);

/// Rounds without progress that take real time.
const REAL_ROUNDS: u32 = 1_000;
