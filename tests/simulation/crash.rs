//! The program with `--handover=crash`, killed between any two system calls, under systemd with its
//! descriptor store. The invariants: bytes come in order and to one backend, none is lost or doubled
//! before a clean end, no end is clean after a cut, and the store has nothing left in the end.

use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use socket_proxyd::testing::{Queue, start_guard};
use socket2::{Socket, Type};
use tokio::time::Instant;

use crate::descriptors::above;
use crate::peer::{Peer, wait_for_bytes};
use crate::process::Process;
use crate::support::stream::Random;
use crate::support::{Endpoint, Family, PAIRS, poll_until};
use crate::syscalls::Faults;
use crate::systemd::Systemd;

/// Returns what simulates some lives of the program for each seed, with each pair of families in
/// turn.
pub fn simulation() -> impl FnMut(u64) {
    let routes = PAIRS.map(|families| [(); ROUTES].map(|()| Route::new(families.into())));
    move |seed| {
        let mut random = Random::new(seed);
        let pair = (seed % 4) as usize;
        let mut world = World::new(&routes[pair], PAIRS[pair].into(), &mut random);
        for _ in 0..random.choose(&[5, 20, 60]) {
            world.act(&mut random);
        }
        world.finish(&mut random);
        world.stop();
    }
}

/// A listener and the backend that it leads to. There are fewer ports than seeds, so all seeds of a
/// thread share them.
struct Route {
    listener: Endpoint,
    passed: OwnedFd,
    backend: Endpoint,
}

impl Route {
    fn new([near, far]: [Family; 2]) -> Self {
        let endpoint = |family| {
            let mut endpoint = Endpoint::new(family);
            endpoint.socket = above(&endpoint.socket).into();
            endpoint.socket.set_nonblocking(true).unwrap();
            endpoint
        };
        let listener = endpoint(near);
        Self { passed: above(&listener.socket), listener, backend: endpoint(far) }
    }

    fn has_queued(&self) -> bool {
        polls(&self.listener.socket)
    }
}

/// A client, and the backend that the proxy connected it to.
struct Connection {
    client: Peer,
    /// Without a socket until the proxy comes.
    backend: Peer,
    seeds: [u64; 2],
    has_backend: bool,
    /// Backends of connections that were not stored when the process was killed.
    abandoned: Vec<Peer>,
    /// Whether the end of a process may have cut the connection, which was not stored.
    is_unstored: bool,
    /// Whether a reset may have cut the connection.
    may_be_cut: bool,
}

struct World<'a> {
    routes: &'a [Route],
    families: [Family; 2],
    connections: Vec<Option<Connection>>,
    systemd: Systemd,
    arguments: Vec<String>,
    process: Option<Process>,
    /// Whether the store has room for what the proxy needs.
    stores: bool,
}

impl<'a> World<'a> {
    fn new(routes: &'a [Route], families: [Family; 2], random: &mut Random) -> Self {
        let max = random.choose(&[2, 3, 4, 8]);
        let mut arguments = vec!["--handover=crash".into()];
        let route = |(number, route): (usize, &Route)| format!("{number}={}", route.backend.target);
        arguments.extend(routes.iter().enumerate().map(route));
        let mut faults = Faults::new(random.next());
        faults.one_of = random.choose(&[0, 0, 5, 50]);
        let mut world = Self {
            routes,
            families,
            connections: routes.iter().map(|_| None).collect(),
            systemd: Systemd::new(max),
            arguments,
            process: None,
            stores: max >= 3,
        };
        world.start(faults);
        world
    }

    fn start(&mut self, faults: Faults) {
        let sockets = self.routes.iter().enumerate();
        let sockets = sockets.map(|(number, route)| (number.to_string(), &route.passed));
        let name = self.systemd.name.clone();
        let passed = || self.systemd.pass(sockets);
        self.process = Some(Process::start(&self.arguments, passed, &name, start_guard, faults));
    }

    fn process(&mut self) -> &mut Process {
        self.process.as_mut().unwrap()
    }

    /// Does something at random, and lets the program run a little.
    fn act(&mut self, random: &mut Random) {
        let route = random.below(ROUTES as u64) as usize;
        match random.below(60) {
            0 => self.kill(),
            1..3 => self.process().faults.kill_in = Some(random.below(80)),
            3 => self.restart(),
            4 => {
                self.settle();
                self.process().pass(Duration::from_secs(6));
            }
            5..20 => drop(self.systemd.handle(1 + random.below(4) as usize)),
            20..30 if self.connections[route].is_none() => self.connect(route, random),
            _ => {
                if let Some(connection) = &mut self.connections[route] {
                    connection.act(random);
                }
            }
        }
        self.step(random.below(4));
    }

    /// Lets the program run for some turns, or until it is killed.
    fn step(&mut self, turns: u64) {
        let queued: Vec<_> = self.routes.iter().map(Route::has_queued).collect();
        // The next process restores connections until it is ready.
        if !self.systemd.notifications.iter().any(|line| line == "READY=1") {
            for connection in self.connections.iter_mut().flatten() {
                connection.is_unstored |= connection.may_lose_a_reset();
            }
        }
        self.process().step(turns);
        if self.process().faults.is_killed {
            self.killed(&queued);
        }
        self.accept();
    }

    /// Lets the program run until it waits for its peers.
    fn settle(&mut self) {
        for _ in 0..10 {
            self.systemd.handle(usize::MAX);
            self.step(3);
        }
    }

    fn kill(&mut self) {
        let queued: Vec<_> = self.routes.iter().map(Route::has_queued).collect();
        self.killed(&queued);
    }

    /// Starts the program again after a kill. Before the last step these routes had a client that
    /// was not accepted.
    fn killed(&mut self, queued: &[bool]) {
        let faults = self.process.take().unwrap().kill();
        self.accept();
        let stores = self.stores && self.systemd.get(".sender").is_some();
        for ((route, connection), queued) in
            self.routes.iter().zip(&mut self.connections).zip(queued)
        {
            let Some(connection) = connection else { continue };
            // Between accept(2) and the record of the client lies a system call.
            let is_unstored = *queued && !route.has_queued();
            let was_accepted = !route.has_queued();
            let uses_unstored = connection.has_urgent();
            connection.is_unstored |= was_accepted && (!stores || is_unstored);
            connection.is_unstored |= connection.may_lose_a_reset();
            connection.is_unstored |= was_accepted && connection.may_lose_its_backend();
            connection.may_be_cut |= was_accepted && uses_unstored;
        }
        self.start(faults);
    }

    /// Stops the program, and starts it again.
    fn restart(&mut self) {
        self.settle();
        self.process().terminate();
        for _ in 0..1000 {
            if self.process().has_ended() {
                break;
            }
            self.systemd.handle(usize::MAX);
            self.process().pass(Duration::from_millis(10));
        }
        assert!(self.process().has_ended(), "SIGTERM does not end the process");
        let (result, faults) = self.process.take().unwrap().exit();
        result.unwrap();
        let stores = self.stores;
        for connection in self.connections.iter_mut().flatten() {
            connection.is_unstored |= !stores;
        }
        self.start(faults);
    }

    fn connect(&mut self, route: usize, random: &mut Random) {
        let address = &self.routes[route].listener.address;
        let socket = Socket::new(address.domain(), Type::STREAM, None).unwrap();
        socket.connect(address).unwrap();
        let seeds = [random.next(), random.next()];
        let [near, far] = self.families;
        self.connections[route] = Some(Connection {
            client: Peer::with_socket(near, seeds, Some(socket)),
            backend: Peer::with_socket(far, [seeds[1], seeds[0]], None),
            seeds,
            has_backend: false,
            abandoned: Vec::new(),
            is_unstored: false,
            may_be_cut: false,
        });
    }

    /// Accepts what the proxy has connected.
    fn accept(&mut self) {
        for (route, connection) in self.routes.iter().zip(&mut self.connections) {
            while let Ok((socket, _)) = route.backend.socket.accept() {
                let Some(connection) = connection else {
                    panic!("the proxy connects without a client");
                };
                connection.attach(self.families[1], socket);
            }
        }
    }

    /// Has all connections end.
    fn finish(&mut self, random: &mut Random) {
        self.process().faults.kill_in = None;
        let all = self.connections.iter_mut().flatten();
        all.for_each(|connection| connection.shut_down(random));
        let mut idle_rounds = 0;
        while idle_rounds < 10 || !self.connections.iter().flatten().all(Connection::is_over) {
            self.systemd.handle(usize::MAX);
            self.step(3);
            let all = self.connections.iter_mut().flatten();
            let has_moved = all.fold(false, |moved, it| it.receive() | moved);
            idle_rounds = if has_moved { 0 } else { idle_rounds + 1 };
            match idle_rounds {
                0..10 => {}
                10..1_000 => {
                    // The kernel's timers of TCP are real.
                    let all = self.connections.iter().flatten();
                    wait_for_bytes(all.flat_map(|it| [&it.client, &it.backend]));
                    self.process().pass(Duration::from_millis(1));
                }
                1_000..1_020 => self.process().pass(Duration::from_secs(10)),
                _ => {
                    let all = self.connections.iter_mut().flatten();
                    let has_shut_down =
                        all.fold(false, |shut_down, it| it.end_silent() | shut_down);
                    assert!(has_shut_down, "a connection does not end");
                    idle_rounds = 0;
                }
            }
        }
        self.connections.iter().flatten().for_each(Connection::check_end);
    }

    /// Stops the program, after a look into the store.
    fn stop(mut self) {
        for _ in 0..3 {
            self.settle();
            self.process().pass(Duration::from_secs(10));
        }
        let (reader, writer) = (self.systemd.get(".queue"), self.systemd.get(".sender"));
        assert!(reader.is_some() || !self.stores);
        assert_eq!(self.systemd.names().len(), if reader.is_some() { 2 } else { 0 });
        if let Some((reader, writer)) = reader.zip(writer) {
            let queue = Queue::from_ends(reader, writer).unwrap();
            // The kernel's timers of TCP are real. A client that has seen its end may still send bytes.
            let is_empty = || {
                self.settle();
                self.process().pass(Duration::from_secs(10));
                queue.payloads().unwrap().is_empty().then_some(())
            };
            let deadline = Instant::now() + Duration::from_secs(2);
            poll_until(deadline, is_empty).expect("no record is left");
        }
        drop(self.process.take().unwrap().kill());
        self.accept();
    }
}

impl Connection {
    fn act(&mut self, random: &mut Random) {
        let Self { client, backend, .. } = self;
        match random.is_one_of(2) {
            true => client.act(backend, random),
            false => backend.act(client, random),
        }
    }

    /// Takes a connection of the proxy's. One that came before was not stored, and no byte has
    /// passed there.
    fn attach(&mut self, family: Family, socket: Socket) {
        let seeds = [self.seeds[1], self.seeds[0]];
        let backend = Peer::with_socket(family, seeds, Some(socket));
        let previous = std::mem::replace(&mut self.backend, backend);
        if std::mem::replace(&mut self.has_backend, true) {
            assert_eq!(previous.received() + self.client.received(), 0, "bytes go to two backends");
            self.abandoned.push(previous);
        }
    }

    /// Whether urgent data was sent. A connection with it is no longer stored.
    fn has_urgent(&self) -> bool {
        [&self.client, &self.backend].iter().any(|peer| peer.has_sent_urgent)
    }

    /// Whether a reset may be taken for an end. The kernel reports it once, perhaps to a process that
    /// was killed before it stored what it read. After that a Unix socket shows an end, and so does
    /// a TCP socket behind two FINs.
    fn may_lose_a_reset(&self) -> bool {
        let peers = [&self.client, &self.backend];
        let has_ended = peers.iter().any(|peer| peer.has_ended);
        peers.iter().any(|peer| peer.was_reset && (has_ended || peer.family == Family::Unix))
    }

    /// Whether the backend may not be stored yet. It ends with the process then, and the next process
    /// connects to none for a client that is gone.
    fn may_lose_its_backend(&self) -> bool {
        self.client.is_gone() && self.client.received() + self.backend.received() == 0
    }

    /// Whether descriptors were passed between Unix sockets. A stored connection carries none.
    fn has_passed(&self) -> bool {
        let peers = [&self.client, &self.backend];
        peers.iter().all(|it| it.family == Family::Unix) && peers.iter().any(|it| it.has_passed())
    }

    fn shut_down(&mut self, random: &mut Random) {
        for peer in [&mut self.client, &mut self.backend] {
            if !random.is_one_of(20) {
                peer.shut_down();
            }
        }
    }

    /// Receives what there is. Returns whether something came.
    fn receive(&mut self) -> bool {
        let Self { client, backend, .. } = self;
        let mut has_moved = false;
        while client.receive(backend, 100_000) | backend.receive(client, 100_000) {
            has_moved = true;
        }
        for peer in [client, backend].into_iter().filter(|peer| peer.end.is_some()) {
            peer.shut_down();
        }
        has_moved
    }

    fn end_silent(&mut self) -> bool {
        let mut has_shut_down = false;
        for peer in [&mut self.client, &mut self.backend] {
            if !peer.is_gone() && !peer.has_ended {
                peer.shut_down();
                has_shut_down = true;
            }
        }
        has_shut_down
    }

    fn is_over(&self) -> bool {
        let is_over = |peer: &Peer| peer.is_gone() || peer.end.is_some();
        is_over(&self.client) && (!self.has_backend || is_over(&self.backend))
    }

    fn check_end(&self) {
        if self.is_unstored {
            return;
        }
        let may_be_cut = self.may_be_cut || self.has_passed();
        self.client.check_end(&self.backend, may_be_cut);
        self.backend.check_end(&self.client, may_be_cut);
    }
}

fn polls(fd: impl AsFd) -> bool {
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&now)) == Ok(1)
}

/// Connections at a time.
const ROUTES: usize = 3;
