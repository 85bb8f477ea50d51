//! Datagram sockets, echo backends, and the proxy between them.

use std::fmt;
use std::io;
use std::iter;
use std::mem::MaybeUninit;
use std::net::{Ipv6Addr, SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicU8, AtomicU16, Ordering};
use std::thread;
use std::time::Duration;

use rustix::net::{SocketAddrUnix, bind};
use socket2::{SockAddr, Socket, Type};
use tempfile::TempDir;
use tokio::time::Instant;

use crate::support::*;

/// The families of datagram sockets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Udp,
    Udp6,
    Unix,
}

pub const KINDS: [Kind; 3] = [Kind::Udp, Kind::Udp6, Kind::Unix];

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self:?}")
    }
}

/// A bound socket, and its name as a target is written.
pub struct Peer {
    pub socket: Socket,
    pub target: String,
    pub address: SockAddr,
    _directory: Option<TempDir>,
}

impl Peer {
    pub fn new(kind: Kind) -> Self {
        match kind {
            Kind::Udp => Self::udp("127.0.0.1:0"),
            Kind::Udp6 => Self::udp("[::1]:0"),
            Kind::Unix => {
                let directory = TempDir::new().unwrap();
                let path = directory.path().join("socket");
                let address = SockAddr::unix(&path).unwrap();
                let socket = datagram_socket(&address);
                socket.bind(&address).unwrap();
                let target = path.to_str().unwrap().into();
                Self { socket, target, address, _directory: Some(directory) }
            }
        }
    }

    pub fn udp(address: &str) -> Self {
        let address: SocketAddr = address.parse().unwrap();
        let socket = datagram_socket(&address.into());
        if address.is_ipv6() {
            socket.set_only_v6(false).unwrap();
        }
        socket.bind(&address.into()).unwrap();
        let address = socket.local_addr().unwrap();
        let target = address.as_socket().unwrap().to_string();
        Self { socket, target, address, _directory: None }
    }

    /// A UDP socket, and a TCP listener on the same address and port.
    pub fn udp_and_tcp(ip: &str) -> (Self, Endpoint) {
        loop {
            let stream = Endpoint::tcp(&format!("{ip}:0"), 64);
            // The port may be that of another test's UDP socket.
            let socket = datagram_socket(&stream.address);
            if ip.starts_with('[') {
                socket.set_only_v6(false).unwrap();
            }
            if socket.bind(&stream.address).is_ok() {
                let (target, address) = (stream.target.clone(), stream.address.clone());
                return (Self { socket, target, address, _directory: None }, stream);
            }
        }
    }

    /// Closes the socket. Returns the directory of its file.
    pub fn close(self) -> Option<TempDir> {
        if let Some(path) = self.address.as_pathname() {
            std::fs::remove_file(path).unwrap();
        }
        self._directory
    }

    /// Closes the socket, and binds another one to its address.
    pub fn restart(self) -> Self {
        let Self { socket, target, address, _directory } = self;
        drop(socket);
        if let Some(path) = address.as_pathname() {
            std::fs::remove_file(path).unwrap();
        }
        let socket = datagram_socket(&address);
        socket.bind(&address).unwrap();
        Self { socket, target, address, _directory }
    }

    pub fn port(&self) -> u16 {
        self.address.as_socket().unwrap().port()
    }

    /// A socket that is connected to this one, with a name of its own.
    pub fn client(&self) -> Socket {
        let socket = datagram_socket(&self.address);
        if self.address.is_unix() {
            bind(&socket, &SocketAddrUnix::new_unnamed()).unwrap();
        }
        socket.connect(&self.address).unwrap();
        socket
    }
}

/// An address that no other test has, with a port that is free for UDP and TCP.
pub fn unused_address() -> SocketAddr {
    static USED: AtomicU8 = AtomicU8::new(0);
    let ip = format!("127.0.1.{}", USED.fetch_add(1, Ordering::Relaxed));
    let (socket, _stream) = Peer::udp_and_tcp(&ip);
    socket.address.as_socket().unwrap()
}

/// A UDP port that is free on all addresses, and that no other test has: it is below those that
/// the kernel gives out.
pub fn unused_port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(5301);
    let is_free = |port: &u16| UdpSocket::bind((Ipv6Addr::UNSPECIFIED, *port)).is_ok();
    let mut ports = iter::repeat_with(|| NEXT.fetch_add(1, Ordering::Relaxed));
    ports.find(is_free).unwrap()
}

/// A socket of the family of an address.
pub fn datagram_socket(address: &SockAddr) -> Socket {
    let socket = Socket::new(address.domain(), Type::DGRAM, None).unwrap();
    socket.set_read_timeout(Some(TIMEOUT)).unwrap();
    socket
}

/// A client of a UDP address, from any port of the loopback.
pub fn client_of(address: SocketAddr) -> Socket {
    let socket = datagram_socket(&address.into());
    socket.connect(&address.into()).unwrap();
    socket
}

pub fn receive_from(socket: &Socket) -> io::Result<(Vec<u8>, SockAddr)> {
    let mut buffer = vec![MaybeUninit::<u8>::uninit(); 300_000];
    let (length, address) = socket.recv_from(&mut buffer)?;
    // SAFETY: the kernel has written that many.
    Ok((buffer[..length].iter().map(|byte| unsafe { byte.assume_init() }).collect(), address))
}

pub fn receive(socket: &Socket) -> Vec<u8> {
    receive_from(socket).expect("a datagram comes").0
}

/// Whether a datagram comes within a moment. For what must not come.
pub fn is_silent(socket: &Socket) -> bool {
    socket.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
    let silent = receive_from(socket).is_err();
    socket.set_read_timeout(Some(TIMEOUT)).unwrap();
    silent
}

/// Answers each datagram with itself, for as long as the test process lives.
pub fn echo(socket: &Socket) {
    answer(socket, |datagram| datagram);
}

pub fn answer(socket: &Socket, answer: impl Fn(Vec<u8>) -> Vec<u8> + Send + 'static) {
    let socket = socket.try_clone().unwrap();
    socket.set_read_timeout(None).unwrap();
    thread::spawn(move || {
        while let Ok((datagram, from)) = receive_from(&socket) {
            let _ = socket.send_to(&answer(datagram), &from);
        }
    });
}

/// Answers datagrams of which `is_answered` is true with themselves, and fast.
pub fn answer_some(socket: &Socket, is_answered: impl Fn(&[u8]) -> bool + Send + 'static) {
    let socket = UdpSocket::from(socket.try_clone().unwrap());
    socket.set_read_timeout(None).unwrap();
    thread::spawn(move || {
        let mut buffer = [0; 2048];
        while let Ok((length, from)) = socket.recv_from(&mut buffer) {
            if is_answered(&buffer[..length]) {
                let _ = socket.send_to(&buffer[..length], from);
            }
        }
    });
}

pub fn echo_peer(kind: Kind) -> Peer {
    let peer = Peer::new(kind);
    echo(&peer.socket);
    peer
}

pub fn echoes(client: &Socket, message: &[u8]) {
    client.send(message).unwrap();
    let answer = receive(client);
    assert!(answer == message, "{} bytes came back as {}", message.len(), answer.len());
}

/// The proxy, with metrics.
pub struct Proxy {
    pub running: Running,
    pub front: Peer,
    metrics: SocketAddr,
    /// The process whose network namespace it is in.
    namespace: Option<u32>,
}

impl Proxy {
    /// Passes a socket of this kind, which leads to `target`.
    pub fn start(kind: Kind, target: &str, options: &[&str]) -> Self {
        Self::start_at(Peer::new(kind), &[options, &[target]].concat(), |launch| launch)
    }

    pub fn start_at(front: Peer, words: &[&str], launch: impl FnOnce(Launch) -> Launch) -> Self {
        let first = Launch::new(OURS).socket(&front.socket).arg("--metrics=127.0.0.1:0");
        let running = launch(first).args(words).start();
        Self { metrics: metrics_address(&running), running, front, namespace: None }
    }

    /// Starts in a network namespace.
    pub fn start_in(namespace: &NetworkNamespace, front: Peer, words: &[&str]) -> Self {
        let proxy = namespace.inside(|| Self::start_at(front, words, |launch| launch));
        Self { namespace: Some(namespace.pid()), ..proxy }
    }

    pub fn client(&self) -> Socket {
        self.front.client()
    }

    fn text(&self) -> String {
        match self.namespace {
            Some(pid) => inside(pid, || scrape(self.metrics)),
            None => scrape(self.metrics),
        }
    }

    /// The sum of the series that begin with this name and have these labels.
    pub fn value(&self, name: &str, labels: &[&str]) -> u64 {
        let (text, name) = (self.text(), format!("socket_proxyd_{name}{{"));
        let lines = text.lines().filter(|line| line.starts_with(&name));
        let lines = lines.filter(|line| labels.iter().all(|label| line.contains(label)));
        lines.map(|line| line.rsplit(' ').next().unwrap().parse::<f64>().unwrap() as u64).sum()
    }

    pub fn sessions(&self) -> u64 {
        self.value("sessions_open", &[])
    }

    pub fn dropped(&self, reason: &str) -> u64 {
        self.value("datagrams_dropped_total", &[&format!("reason=\"{reason}\"")])
    }

    pub fn wait_for_dropped(&self, reason: &str, count: u64) {
        self.wait_until(&format!("{count} dropped for {reason}"), || self.dropped(reason) == count);
    }

    pub fn wait_for_sessions(&self, count: u64) {
        self.wait_until(&format!("{count} sessions"), || self.sessions() == count);
    }

    pub fn wait_until(&self, what: &str, is_so: impl Fn() -> bool) {
        let found = poll_until(Instant::now() + TIMEOUT, || is_so().then_some(()));
        assert!(found.is_some(), "not {what}: {}", self.text());
    }

    /// What was received was delivered or dropped.
    pub fn assert_adds_up(&self) {
        let adds_up = || {
            ["from_client", "from_backend"].iter().all(|direction| {
                let label = format!("direction=\"{direction}\"");
                let value = |name| self.value(name, &[&label]);
                let received = value("datagrams_received_total");
                received == value("datagrams_delivered_total") + value("datagrams_dropped_total")
            })
        };
        self.wait_until("an even balance", adds_up);
    }
}
