//! The load: clients and backends in one epoll loop, on one thread; for bulk, where that thread would
//! be what is measured, in two.
//!
//! It has to be cheap, so that what is measured is the proxy: no allocation and no lock per message,
//! one receive and one send on either side. Every answer is compared with what was sent; of bulk
//! the ends of one piece in sixteen are, and the rest is counted (on TCP without being copied).

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use rustix::buffer::spare_capacity;
use rustix::event::{Timespec, epoll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, SocketFlags};
use socket2::{Domain, SockAddr, Socket, Type};

use crate::clock;
use hdrhistogram::Histogram;

/// What bulk is made of: the byte at each offset is known.
const PERIOD: usize = 4096;
/// What no message begins with.
const ASK_FOR_BULK: &[u8] = &[0xff];

/// Bytes a send or receive of bulk.
const PIECE: usize = 256 * 1024;

/// What a connection does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    /// A backend that sends back what it gets, and closes when the client does.
    Echo,
    /// Sends and sends.
    Source,
    /// Receives and receives.
    Sink,
    /// Receives nothing.
    Stalled,
    /// A backend that is an [`Role::Echo`], or a [`Role::Source`] for an [`Role::AskForBulk`], by the first
    /// byte.
    Ask,
    /// A client that asks for bulk, and is a [`Role::Sink`] then.
    AskForBulk,
    /// A client that sends a message when it has the answer to the last.
    Ping,
    /// A client that sends one message and then is idle.
    Once,
    /// A client that connects, sends a message, and closes when it has the answer; then the next.
    Short,
}

/// What came of it since the last reset.
#[derive(Clone, Debug)]
pub(crate) struct Stats {
    /// Answers, or connections served.
    pub(crate) done: u64,
    /// Bytes that arrived at a sink; also for the thread of the other end.
    pub(crate) bytes: Arc<AtomicU64>,
    /// Connections that ended early, wrong answers, connects that failed.
    pub(crate) failures: u64,
    /// From a message to its answer, in nanoseconds.
    pub(crate) latency: Histogram<u64>,
}

impl Stats {
    pub(crate) fn new() -> Self {
        let latency = Histogram::new_with_bounds(1_000, 100_000_000_000, 3).expect("valid bounds");
        Self { done: 0, bytes: Arc::default(), failures: 0, latency }
    }
}

struct Connection {
    socket: OwnedFd,
    role: Role,
    /// Ours to count: a backend's connection fails with its client's.
    is_client: bool,
    connecting: bool,
    is_tcp: bool,
    /// Bytes of the answer, or of bulk, so far.
    offset: usize,
    receives: usize,
    sent_at: u64,
    /// What has to be sent yet, of a message that did not fit into the socket at once.
    unsent: Vec<u8>,
}

/// Clients, backends, and the loop that serves them.
pub(crate) struct Load {
    epoll: OwnedFd,
    listener: Option<(Socket, Role)>,
    connections: Vec<Option<Connection>>,
    free: Vec<usize>,
    message: Vec<u8>,
    pattern: Vec<u8>,
    buffer: Vec<u8>,
    /// Where short connections go.
    front: Option<SockAddr>,
    pub(crate) stats: Stats,
}

/// The listener's number among the connections.
const LISTENER: u64 = u64::MAX;

impl Load {
    /// `message` is the size of a request and its answer.
    pub(crate) fn new(message: usize) -> Self {
        let byte = |at: usize| (at % PERIOD).wrapping_mul(2_654_435_761) as u32;
        Self {
            epoll: epoll::create(epoll::CreateFlags::CLOEXEC).expect("an epoll"),
            listener: None,
            connections: Vec::new(),
            free: Vec::new(),
            message: (0..message).map(|at| (byte(at) >> 24) as u8).collect(),
            pattern: (0..PIECE + PERIOD).map(|at| (byte(at) >> 24) as u8).collect(),
            buffer: vec![0; PIECE.max(message + 1)],
            front: None,
            stats: Stats::new(),
        }
    }

    /// Serves a listening socket: each connection on it gets this role.
    pub(crate) fn listen(&mut self, listener: Socket, role: Role) {
        listener.set_nonblocking(true).expect("a socket");
        let data = epoll::EventData::new_u64(LISTENER);
        epoll::add(&self.epoll, &listener, data, epoll::EventFlags::IN).expect("room");
        self.listener = Some((listener, role));
    }

    /// Connects a client and starts it; false where that fails.
    pub(crate) fn connect(&mut self, to: &SockAddr, role: Role) -> bool {
        let Ok(socket) = Socket::new(to.domain(), Type::STREAM, None) else {
            return false;
        };
        if socket.connect(to).is_err() || socket.set_nonblocking(true).is_err() {
            return false;
        }
        let is_tcp = to.domain() != Domain::UNIX;
        if is_tcp {
            let _ = socket.set_tcp_nodelay(true);
        }
        let number = self.add(socket.into(), role, true, is_tcp, false);
        if matches!(role, Role::Ping | Role::Once) {
            self.ask(number);
        }
        let Some(connection) = &mut self.connections[number] else { return true };
        if role == Role::AskForBulk {
            connection.role = Role::Sink;
            return rustix::net::send(&connection.socket, ASK_FOR_BULK, SendFlags::NOSIGNAL)
                == Ok(1);
        }
        true
    }

    /// What connections get from now on that are accepted.
    pub(crate) fn set_role(&mut self, role: Role) {
        if let Some(listener) = &mut self.listener {
            listener.1 = role;
        }
    }

    /// Open connections.
    pub(crate) fn connections(&self) -> usize {
        self.connections.iter().flatten().count()
    }

    /// Runs for so many seconds; whether a source has sent anything.
    pub(crate) fn moved(&mut self, seconds: f64) -> bool {
        let sent =
            |load: &Self| load.connections.iter().flatten().map(|it| it.offset).sum::<usize>();
        let before = sent(self);
        self.run(clock::after(seconds), |_| false);
        sent(self) > before
    }

    /// Keeps this many short connections going.
    pub(crate) fn short(&mut self, to: &SockAddr, concurrent: usize) {
        self.front = Some(to.clone());
        for _ in 0..concurrent {
            self.open_short();
        }
    }

    /// Idle clients that are connected.
    pub(crate) fn clients(&self) -> usize {
        let roles = self.connections.iter().flatten().map(|connection| connection.role);
        roles.filter(|role| *role == Role::Once).count()
    }

    /// Forgets what was counted.
    pub(crate) fn reset(&mut self) {
        self.stats.done = 0;
        self.stats.bytes.store(0, Ordering::Relaxed);
        self.stats.failures = 0;
        self.stats.latency.clear();
    }

    /// Serves until a moment of [`clock::now`], or until `enough`.
    pub(crate) fn run(&mut self, until: u64, enough: impl Fn(&Stats) -> bool) {
        let mut events: Vec<epoll::Event> = Vec::with_capacity(256);
        while clock::now() < until && !enough(&self.stats) {
            events.clear();
            let most = Timespec { tv_sec: 0, tv_nsec: 10_000_000 };
            match epoll::wait(&self.epoll, spare_capacity(&mut events), Some(&most)) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(errno) => panic!("epoll_wait: {errno}"),
            }
            for event in &events {
                match event.data.u64() {
                    LISTENER => self.accept(),
                    number => self.handle(number as usize),
                }
            }
        }
    }

    /// Serves on a thread of its own until that is over.
    pub(crate) fn run_until(&mut self, over: &AtomicBool) {
        while !over.load(Ordering::Relaxed) {
            self.run(clock::after(0.05), |_| over.load(Ordering::Relaxed));
        }
    }

    fn add(
        &mut self,
        socket: OwnedFd,
        role: Role,
        is_client: bool,
        is_tcp: bool,
        connecting: bool,
    ) -> usize {
        let connection = Connection {
            socket,
            role,
            is_client,
            connecting,
            is_tcp,
            offset: 0,
            receives: 0,
            sent_at: clock::now(),
            unsent: Vec::new(),
        };
        let number = self.free.pop().unwrap_or_else(|| {
            self.connections.push(None);
            self.connections.len() - 1
        });
        let interest = match role {
            _ if connecting => epoll::EventFlags::OUT,
            Role::Source => epoll::EventFlags::OUT,
            Role::Stalled => epoll::EventFlags::empty(),
            _ => epoll::EventFlags::IN,
        };
        let data = epoll::EventData::new_u64(number as u64);
        epoll::add(&self.epoll, &connection.socket, data, interest).expect("room");
        self.connections[number] = Some(connection);
        number
    }

    fn accept(&mut self) {
        let Some((listener, role)) = &self.listener else { return };
        let role = *role;
        let is_tcp = listener.domain().is_ok_and(|domain| domain != Domain::UNIX);
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let mut accepted = Vec::new();
        while let Ok(socket) = rustix::net::accept_with(listener, flags) {
            accepted.push(socket);
        }
        for socket in accepted {
            if is_tcp {
                let _ = rustix::net::sockopt::set_tcp_nodelay(&socket, true);
            }
            self.add(socket, role, false, is_tcp, false);
        }
    }

    fn open_short(&mut self) {
        let Some(to) = self.front.clone() else { return };
        let is_tcp = to.domain() != Domain::UNIX;
        let socket = Socket::new(to.domain(), Type::STREAM.nonblocking(), None);
        let Ok(socket) = socket else {
            self.stats.failures += 1;
            return;
        };
        if is_tcp {
            let _ = socket.set_tcp_nodelay(true);
        }
        let in_progress =
            |error: &std::io::Error| Errno::from_io_error(error) == Some(Errno::INPROGRESS);
        if socket.connect(&to).is_err_and(|error| !in_progress(&error)) {
            self.stats.failures += 1;
            return;
        }
        self.add(socket.into(), Role::Short, true, is_tcp, true);
    }

    fn ask(&mut self, number: usize) {
        let Some(connection) = &mut self.connections[number] else { return };
        connection.offset = 0;
        connection.sent_at = clock::now();
        match rustix::net::send(&connection.socket, &self.message, SendFlags::NOSIGNAL) {
            Ok(sent) if sent == self.message.len() => {}
            Ok(sent) => {
                connection.unsent = self.message[sent..].to_vec();
                self.watch(number, epoll::EventFlags::OUT);
            }
            Err(_) => self.fail(number),
        }
    }

    fn watch(&self, number: usize, interest: epoll::EventFlags) {
        if let Some(connection) = &self.connections[number] {
            let data = epoll::EventData::new_u64(number as u64);
            let _ = epoll::modify(&self.epoll, &connection.socket, data, interest);
        }
    }

    /// Sends the rest of a message; nothing is received meanwhile.
    fn send_rest(&mut self, number: usize) {
        let Some(connection) = &mut self.connections[number] else { return };
        match rustix::net::send(&connection.socket, &connection.unsent, SendFlags::NOSIGNAL) {
            Ok(sent) => {
                connection.unsent.drain(..sent);
                if connection.unsent.is_empty() {
                    self.watch(number, epoll::EventFlags::IN);
                }
            }
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(_) => self.fail(number),
        }
    }

    fn fail(&mut self, number: usize) {
        let Some(failed) = self.remove(number) else { return };
        if failed.is_client {
            self.stats.failures += 1;
        }
        if failed.role == Role::Short {
            self.open_short();
        }
    }

    fn remove(&mut self, number: usize) -> Option<Connection> {
        let removed = self.connections[number].take()?;
        self.free.push(number);
        Some(removed)
    }

    fn handle(&mut self, number: usize) {
        let Some(connection) = &mut self.connections[number] else { return };
        if !connection.unsent.is_empty() {
            return self.send_rest(number);
        }
        match connection.role {
            Role::Echo => self.echo(number),
            Role::Source => self.send_bulk(number),
            Role::Sink => self.take_bulk(number),
            Role::Ask => self.decide(number),
            // Only its end is an event that comes.
            Role::Stalled | Role::AskForBulk => {
                self.remove(number);
            }
            Role::Short if connection.connecting => {
                connection.connecting = false;
                self.watch(number, epoll::EventFlags::IN);
                self.ask(number);
            }
            Role::Short | Role::Ping | Role::Once => self.take_answer(number),
        }
    }

    /// By its first byte.
    fn decide(&mut self, number: usize) {
        let Some(connection) = &mut self.connections[number] else { return };
        let mut first = [0];
        match rustix::net::recv(&connection.socket, &mut first[..], RecvFlags::PEEK) {
            Ok((1, _)) if first == *ASK_FOR_BULK => {
                connection.role = Role::Source;
                self.watch(number, epoll::EventFlags::OUT);
            }
            Ok((1, _)) => connection.role = Role::Echo,
            Err(Errno::AGAIN | Errno::INTR) => {}
            _ => {
                self.remove(number);
            }
        }
    }

    fn echo(&mut self, number: usize) {
        let Some(connection) = &mut self.connections[number] else { return };
        let buffer = &mut self.buffer[..];
        match rustix::net::recv(&connection.socket, buffer, RecvFlags::empty()) {
            Ok((bytes, _)) if bytes > 0 => {
                let answer = &self.buffer[..bytes];
                match rustix::net::send(&connection.socket, answer, SendFlags::NOSIGNAL) {
                    Ok(sent) if sent == bytes => {}
                    Err(errno) if errno != Errno::AGAIN => self.fail(number),
                    sent => {
                        connection.unsent = answer[sent.unwrap_or(0)..].to_vec();
                        self.watch(number, epoll::EventFlags::OUT);
                    }
                }
            }
            Err(Errno::AGAIN | Errno::INTR) => {}
            // The client has ended it, or the proxy has: the client knows.
            _ => {
                self.remove(number);
            }
        }
    }

    fn take_answer(&mut self, number: usize) {
        let Some(connection) = &mut self.connections[number] else { return };
        let left = self.message.len() - connection.offset;
        // Room for one more: an answer that is too long is wrong.
        let buffer = &mut self.buffer[..left + 1];
        let received = match rustix::net::recv(&connection.socket, buffer, RecvFlags::empty()) {
            Ok((bytes, _)) => bytes,
            Err(Errno::AGAIN | Errno::INTR) => return,
            Err(_) => return self.fail(number),
        };
        let expected = self.message[connection.offset..].get(..received);
        if received == 0 || expected != Some(&self.buffer[..received]) {
            return self.fail(number);
        }
        connection.offset += received;
        if connection.offset < self.message.len() {
            return;
        }
        self.stats.done += 1;
        self.stats.latency.saturating_record(clock::now() - connection.sent_at);
        match connection.role {
            Role::Ping => self.ask(number),
            Role::Short => {
                self.remove(number);
                self.open_short();
            }
            _ => {}
        }
    }

    fn send_bulk(&mut self, number: usize) {
        let Some(connection) = &mut self.connections[number] else { return };
        let start = connection.offset % PERIOD;
        let piece = &self.pattern[start..start + PIECE];
        match rustix::net::send(&connection.socket, piece, SendFlags::NOSIGNAL) {
            Ok(bytes) => connection.offset += bytes,
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(_) => self.fail(number),
        }
    }

    fn take_bulk(&mut self, number: usize) {
        let Some(connection) = &mut self.connections[number] else { return };
        connection.receives += 1;
        let looks = connection.receives % 16 == 0 || !connection.is_tcp;
        let flags = if looks { RecvFlags::empty() } else { RecvFlags::TRUNC };
        let received = match rustix::net::recv(&connection.socket, &mut self.buffer[..], flags) {
            Ok((_, bytes)) if bytes > 0 => bytes,
            Err(Errno::AGAIN | Errno::INTR) => return,
            _ => return self.fail(number),
        };
        if looks {
            let start = connection.offset % PERIOD;
            let (got, edge) = (&self.buffer[..received], received.min(64));
            let expected = &self.pattern[start..start + received];
            if got[..edge] != expected[..edge]
                || got[received - edge..] != expected[received - edge..]
            {
                return self.fail(number);
            }
        }
        connection.offset += received;
        self.stats.bytes.fetch_add(received as u64, Ordering::Relaxed);
    }
}
