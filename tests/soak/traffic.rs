//! Mixed traffic over connections: clients, backends, and what may go wrong with them.

use std::collections::HashSet;
use std::io::Read;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use socket2::{SockAddr, Socket};
use tokio::time::Instant;

use crate::ends::{Fault, Receiver, Sender};
use crate::load::{Failures, Load, Totals};
use crate::script::{Kind, Script, Side};
use crate::stop::Stop;
use crate::support::stream::Random;
use crate::support::*;

/// A listener of the proxy, with the families of its clients and its backend.
pub struct Route {
    pub front: SockAddr,
    pub families: (Family, Family),
}

/// Which connections may be cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cuts {
    Never,
    /// By the death of the proxy: those with urgent data, and those that no backend serves yet. (A kill
    /// within some microseconds after accept(2) cuts a connection.)
    Crash,
    /// By the death of the application: all.
    Application,
}

pub struct Traffic {
    pub stop: Stop,
    pub failures: Failures,
    pub cuts: Cuts,
    /// Odd while a process is being killed.
    pub kills: Arc<AtomicU64>,
    seed: u64,
    routes: Vec<Route>,
    /// Besides [`Kind::Slow`] and [`Kind::Idle`], which have clients of their own.
    kinds: Vec<Kind>,
    /// Seeds of connections whose header has not reached the backend. `None`: the backend is another process.
    expected: Option<Mutex<HashSet<u64>>>,
    served: AtomicUsize,
    lasting: Mutex<Vec<Lasting>>,
    connections: AtomicU64,
    bytes: AtomicU64,
    allowed_cuts: AtomicU64,
}

/// A connection that lasts over all phases.
struct Lasting {
    socket: Socket,
    script: Script,
    position: u64,
}

impl Traffic {
    pub fn new(seed: u64, routes: Vec<Route>, kinds: &[Kind], cuts: Cuts) -> Self {
        Self {
            stop: Stop::default(),
            failures: Failures::default(),
            cuts,
            kills: Arc::default(),
            seed,
            routes,
            kinds: kinds.into(),
            expected: (cuts != Cuts::Application).then(Mutex::default),
            served: AtomicUsize::new(0),
            lasting: Mutex::default(),
            connections: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
            allowed_cuts: AtomicU64::new(0),
        }
    }

    /// A backend's half, for as long as the process lives.
    pub fn serve(self: &Arc<Self>, listener: Socket) {
        let this = Arc::clone(self);
        // On a Unix socket urgent data is not sent.
        let _ = listener.set_out_of_band_inline(true);
        serve_on(listener, move |socket| {
            this.served.fetch_add(1, Relaxed);
            this.serve_one(&socket);
            drop(socket);
            this.served.fetch_sub(1, Relaxed);
        });
    }

    fn serve_one(&self, socket: &Socket) {
        let kills = self.kills.load(Relaxed);
        prepare(socket);
        let mut header = [0; Script::HEADER];
        if (&*socket).read_exact(&mut header).is_err() {
            // A probe, or a client that has reset its connection. Of any other, the client sees the cut.
            return;
        }
        let Some(script) = Script::parse(&header) else {
            return self.failures.add(format!("the backend gets the header {header:x?}"));
        };
        let expected = self.expected.as_ref().map(|expected| expected.lock().unwrap());
        if expected.is_some_and(|mut expected| !expected.remove(&script.seed)) {
            return self.failures.add(format!("the backend gets {script:?} twice"));
        }
        let (result, received) = script.play(Side::Backend, socket, &self.stop);
        self.bytes.fetch_add(received, Relaxed);
        self.judge(script, "backend", kills, result);
    }

    fn judge(&self, script: Script, side: &str, kills: u64, result: Result<(), Fault>) {
        let killed = kills % 2 == 1 || kills != self.kills.load(Relaxed);
        match result {
            Ok(()) => {}
            Err(Fault::Cut(_)) if killed && self.may_cut(script, side) => {
                self.allowed_cuts.fetch_add(1, Relaxed);
            }
            Err(fault) => {
                let text = format!("{side} of {script:?}: {fault}, killed meanwhile: {killed}");
                self.failures.add(text);
            }
        }
    }

    fn may_cut(&self, script: Script, side: &str) -> bool {
        match self.cuts {
            Cuts::Never => false,
            Cuts::Application => true,
            Cuts::Crash => script.kind == Kind::Urgent || side == "unserved client",
        }
    }

    /// A request and its answer on each lasting connection.
    pub fn exchange_on_lasting(&self) {
        for lasting in &mut *self.lasting.lock().unwrap() {
            let (mut sent, mut received) = lasting.script.streams(Side::Client);
            sent.skip(lasting.position);
            received.skip(lasting.position);
            let mut out = Sender { socket: &lasting.socket, stream: sent };
            let mut input = Receiver { socket: &lasting.socket, stream: received };
            let result = out.send(64).and_then(|()| input.receive(64));
            lasting.position += 64;
            self.bytes.fetch_add(64, Relaxed);
            self.judge(lasting.script, "client", self.kills.load(Relaxed), result);
        }
    }

    /// Connects and sends the header.
    fn begin(&self, route: &Route, kind: Kind, seed: u64) -> (Option<Socket>, Script) {
        let is_tcp = route.families == (Family::Tcp, Family::Tcp);
        let script = Script { kind, seed, is_tcp };
        if let Some(expected) = &self.expected {
            expected.lock().unwrap().insert(seed);
        }
        let socket = connect(&route.front);
        prepare(&socket);
        self.connections.fetch_add(1, Relaxed);
        let sent = std::io::Write::write_all(&mut &socket, &script.header());
        (sent.is_ok().then_some(socket), script)
    }

    /// One client after the other, until the phase ends.
    fn run_clients(&self, kinds: &[Kind], seed: u64) {
        let mut random = Random::new(seed);
        while !self.stop.is_stopped() && !self.failures.any() {
            let route = &self.routes[random.below(self.routes.len() as u64) as usize];
            let kind = kinds[random.below(kinds.len() as u64) as usize];
            if kind.fits(route.families) {
                self.run_client(route, kind, random.next());
            }
        }
    }

    /// Waits until the backend serves only what lasts.
    fn drain(&self) {
        let lasting = self.lasting.lock().unwrap().len();
        if self.expected.is_some() && !self.failures.any() {
            let drained = || (self.served.load(Relaxed) == lasting).then_some(());
            if poll_until(Instant::now() + PATIENCE, drained).is_none() {
                let served = self.served.load(Relaxed);
                self.failures.add(format!("{served} are served at the end, not {lasting}"));
            }
        }
    }

    fn run_client(&self, route: &Route, kind: Kind, seed: u64) {
        let kills = self.kills.load(Relaxed);
        let (socket, script) = self.begin(route, kind, seed);
        let result = match &socket {
            Some(socket) => {
                let (result, received) = script.play(Side::Client, socket, &self.stop);
                self.bytes.fetch_add(received, Relaxed);
                result
            }
            None => Err(Fault::Cut("write the header".into())),
        };
        drop(socket);
        let expected = self.expected.as_ref().map(|expected| expected.lock().unwrap());
        let is_unserved = expected.is_some_and(|expected| expected.contains(&seed));
        // The header of a reset connection may come later, or never.
        if is_unserved && result.is_ok() && kind != Kind::Reset {
            self.failures.add(format!("{script:?} ended well and was not served"));
        }
        self.judge(script, if is_unserved { "unserved client" } else { "client" }, kills, result);
    }
}

impl Load for Traffic {
    fn stop(&self) -> &Stop {
        &self.stop
    }

    fn failures(&self) -> &Failures {
        &self.failures
    }

    fn warm_up(&self) {
        let mut random = Random::new(!self.seed);
        for route in &self.routes {
            self.run_client(route, Kind::Short, random.next());
            // Connections that last end with an application that is killed.
            let lasting = if self.cuts == Cuts::Application { 0 } else { LASTING_OF_EACH };
            for _ in 0..lasting {
                let (socket, script) = self.begin(route, Kind::Lasting, random.next());
                let socket = socket.expect("the header is sent");
                self.lasting.lock().unwrap().push(Lasting { socket, script, position: 0 });
            }
        }
        self.exchange_on_lasting();
    }

    fn run_phase(&self, seed: u64) {
        let mut random = Random::new(self.seed ^ seed);
        thread::scope(|scope| {
            let kinds = [(&self.kinds[..], 6), (&[Kind::Slow], 2), (&[Kind::Idle], 4)];
            for (kinds, clients) in kinds {
                for _ in 0..clients {
                    let seed = random.next();
                    scope.spawn(move || self.run_clients(kinds, seed));
                }
            }
            scope.spawn(|| {
                while !self.stop.wait(Duration::from_millis(20)) && !self.failures.any() {
                    self.exchange_on_lasting();
                }
            });
        });
        self.drain();
    }

    /// The pool keeps as many pipes as it may, once that many have been filled at a time.
    fn run_calm_phase(&self, seed: u64) {
        let mut random = Random::new(self.seed ^ seed);
        let routes: Vec<_> = self.routes.iter().filter(|it| it.families.1 == Family::Tcp).collect();
        thread::scope(|scope| {
            for route in routes.iter().cycle().take(if routes.is_empty() { 0 } else { STALLED }) {
                let seed = random.next();
                scope.spawn(move || self.run_client(route, Kind::Stalled, seed));
            }
            // On each event loop.
            for _ in 0..routes.len() * 3 {
                let seed = random.next();
                scope.spawn(move || self.run_clients(&[Kind::Bulk], seed));
            }
        });
        self.drain();
    }

    fn totals(&self) -> Totals {
        Totals {
            connections: self.connections.load(Relaxed),
            bytes: self.bytes.load(Relaxed),
            cuts: self.allowed_cuts.load(Relaxed),
        }
    }
}

fn prepare(socket: &Socket) {
    let _ = socket.set_tcp_nodelay(true);
    let _ = socket.set_out_of_band_inline(true);
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket.set_write_timeout(Some(PATIENCE)).unwrap();
}

/// Longer than a restart, a start of the application after failures, and a busy machine take.
pub const PATIENCE: Duration = Duration::from_secs(60);

pub const LASTING_OF_EACH: usize = 4;

/// More than the proxy has pipes for slow receivers.
const STALLED: usize = 24;
