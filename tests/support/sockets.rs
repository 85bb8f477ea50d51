//! Sockets of either family, and backends.

use std::fmt;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener};
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use socket2::{Domain, SockAddr, Socket, Type};
use tempfile::TempDir;

use super::TIMEOUT;

/// The two families that both originals know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    Tcp,
    Unix,
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "TCP",
            Self::Unix => "Unix",
        })
    }
}

/// Each pair of a listener's and a backend's family.
pub const PAIRS: [(Family, Family); 4] = [
    (Family::Tcp, Family::Tcp),
    (Family::Tcp, Family::Unix),
    (Family::Unix, Family::Tcp),
    (Family::Unix, Family::Unix),
];

/// A listening socket, and its name as a target is written.
pub struct Endpoint {
    pub socket: Socket,
    pub target: String,
    pub address: SockAddr,
    pub _directory: Option<TempDir>,
}

impl Endpoint {
    pub fn new(family: Family) -> Self {
        Self::with_backlog(family, 4096)
    }

    pub fn with_backlog(family: Family, backlog: i32) -> Self {
        match family {
            Family::Tcp => Self::tcp("127.0.0.1:0", backlog),
            Family::Unix => {
                let directory = TempDir::new().unwrap();
                let endpoint = Self::unix(&directory.path().join("socket"), backlog);
                Self { _directory: Some(directory), ..endpoint }
            }
        }
    }

    pub fn tcp(address: &str, backlog: i32) -> Self {
        let address: SocketAddr = address.parse().unwrap();
        let socket = Socket::new(Domain::for_address(address), Type::STREAM, None).unwrap();
        if address.is_ipv6() {
            socket.set_only_v6(false).unwrap();
        }
        socket.bind(&address.into()).unwrap();
        socket.listen(backlog).unwrap();
        let address = socket.local_addr().unwrap();
        Self { socket, target: address.as_socket().unwrap().to_string(), address, _directory: None }
    }

    pub fn unix(path: &Path, backlog: i32) -> Self {
        let address = SockAddr::unix(path).unwrap();
        let socket = Socket::new(Domain::UNIX, Type::STREAM, None).unwrap();
        socket.bind(&address).unwrap();
        socket.listen(backlog).unwrap();
        Self { socket, target: path.to_str().unwrap().into(), address, _directory: None }
    }

    pub fn port(&self) -> u16 {
        self.address.as_socket().unwrap().port()
    }

    pub fn connect(&self) -> Socket {
        connect(&self.address)
    }

    pub fn try_connect(&self) -> io::Result<Socket> {
        try_connect(&self.address)
    }

    pub fn accept(&self) -> Socket {
        self.socket.set_read_timeout(Some(TIMEOUT)).unwrap();
        let (socket, _) = self.socket.accept().expect("a connection to the backend comes");
        with_timeouts(socket)
    }
}

/// A TCP address that does not answer: where the backlog is full the kernel drops a SYN.
pub struct SilentAddress {
    _listener: Socket,
    _clients: [Socket; 4],
}

impl SilentAddress {
    pub fn new(address: &SockAddr) -> Self {
        let socket = || Socket::new(address.domain(), Type::STREAM, None).unwrap();
        let listener = socket();
        listener.bind(address).unwrap();
        listener.listen(0).unwrap();
        let clients = [(); 4].map(|()| socket());
        for client in &clients {
            client.set_nonblocking(true).unwrap();
            let _ = client.connect(address);
        }
        Self { _listener: listener, _clients: clients }
    }
}

pub fn connect(address: &SockAddr) -> Socket {
    try_connect(address).expect("the listener has a backlog")
}

fn try_connect(address: &SockAddr) -> io::Result<Socket> {
    let socket = Socket::new(address.domain(), Type::STREAM, None).unwrap();
    socket.connect(address)?;
    Ok(with_timeouts(socket))
}

fn with_timeouts(socket: Socket) -> Socket {
    socket.set_read_timeout(Some(TIMEOUT)).unwrap();
    socket.set_write_timeout(Some(TIMEOUT)).unwrap();
    socket
}

/// A Unix socket's address, of whatever bytes and length: bind(2) takes a path of 108 without a NUL.
pub fn unix_address(name: &[u8]) -> SockAddr {
    // SAFETY: the address is a sockaddr_un with as many bytes of a path as there is room for.
    let address = unsafe {
        SockAddr::try_init(|storage, length| {
            let address = &mut *storage.cast::<libc::sockaddr_un>();
            address.sun_family = libc::AF_UNIX as libc::sa_family_t;
            for (to, from) in address.sun_path.iter_mut().zip(name) {
                *to = *from as libc::c_char;
            }
            *length = (size_of::<libc::sa_family_t>() + name.len()) as libc::socklen_t;
            Ok(())
        })
    };
    address.unwrap().1
}

/// Two connected sockets of a family.
pub fn socket_pair(family: Family) -> (Socket, Socket) {
    match family {
        Family::Tcp => {
            let listener = Endpoint::new(family);
            let near = listener.connect();
            near.set_tcp_nodelay(true).unwrap();
            (near, listener.accept())
        }
        Family::Unix => {
            let (near, far) = Socket::pair(Domain::UNIX, Type::STREAM, None).unwrap();
            (with_timeouts(near), with_timeouts(far))
        }
    }
}

/// Serves each connection on a thread of its own, for as long as the test process lives.
pub fn serve(endpoint: &Endpoint, handler: impl Fn(Socket) + Send + Sync + 'static) {
    serve_on(endpoint.socket.try_clone().unwrap(), handler);
}

pub fn serve_on(listener: Socket, handler: impl Fn(Socket) + Send + Sync + 'static) {
    let handler = Arc::new(handler);
    thread::spawn(move || {
        while let Ok((socket, _)) = listener.accept() {
            let handler = Arc::clone(&handler);
            thread::spawn(move || handler(with_timeouts(socket)));
        }
    });
}

/// Sends back what is received, and the end.
pub fn echo(mut socket: Socket) {
    // Clients may be silent for longer than they wait for an answer.
    socket.set_read_timeout(None).unwrap();
    let mut buffer = vec![0; 64 * 1024];
    loop {
        match socket.read(&mut buffer) {
            Ok(0) => break,
            Ok(bytes) if socket.write_all(&buffer[..bytes]).is_ok() => {}
            _ => return,
        }
    }
    let _ = socket.shutdown(Shutdown::Write);
}

pub fn echo_backend(family: Family) -> Endpoint {
    let endpoint = Endpoint::new(family);
    serve(&endpoint, echo);
    endpoint
}

/// Sends and reads back the same number of bytes.
pub fn exchange(socket: &mut Socket, message: &[u8]) -> io::Result<Vec<u8>> {
    socket.write_all(message)?;
    let mut answer = vec![0; message.len()];
    socket.read_exact(&mut answer)?;
    Ok(answer)
}

pub fn assert_echoes(socket: &mut Socket) {
    let answer = exchange(socket, b"are you there?").expect("the echo backend answers");
    assert_eq!(answer, b"are you there?");
}

pub fn assert_forwards(from: &mut Socket, to: &mut Socket) {
    from.write_all(b"are you there?").unwrap();
    let mut read = [0; 14];
    to.read_exact(&mut read).unwrap();
    assert_eq!(&read, b"are you there?");
}

/// Reads until the end: the bytes, and whether the end was a clean one.
pub fn read_all(socket: &mut Socket) -> (Vec<u8>, io::Result<()>) {
    let mut bytes = Vec::new();
    let mut buffer = vec![0; 64 * 1024];
    loop {
        match socket.read(&mut buffer) {
            Ok(0) => return (bytes, Ok(())),
            Ok(more) => bytes.extend_from_slice(&buffer[..more]),
            Err(error) if error.kind() == ErrorKind::WouldBlock => panic!("no end in {TIMEOUT:?}"),
            Err(error) => return (bytes, Err(error)),
        }
    }
}

pub fn is_reset(end: &io::Result<()>) -> bool {
    matches!(end, Err(error) if error.kind() == ErrorKind::ConnectionReset)
}

/// Makes the close of a TCP socket a reset.
pub fn reset(socket: Socket) {
    socket.set_linger(Some(Duration::ZERO)).unwrap();
}

/// SIOCOUTQ: on TCP what the peer's kernel has not got, on Unix what its program has not.
pub fn unsent(socket: &Socket) -> i32 {
    // SAFETY: the request writes one int.
    unsafe {
        let request = rustix::ioctl::Getter::<0x5411, i32>::new();
        rustix::ioctl::ioctl(socket, request).unwrap()
    }
}

/// Connects from an address of this machine.
pub fn connect_from(source: &str, to: &SockAddr) -> Socket {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    let source: SocketAddr = format!("{source}:0").parse().unwrap();
    socket.bind(&source.into()).unwrap();
    socket.set_read_timeout(Some(TIMEOUT)).unwrap();
    socket.connect(to).unwrap();
    socket
}

/// The TCP sockets of IPv4 with this local port: lines of /proc/net/tcp in words (proc_pid_net(5)).
pub fn tcp_sockets(port: u16) -> Vec<Vec<String>> {
    let local = format!(":{port:04X}");
    let table = std::fs::read_to_string("/proc/net/tcp").unwrap();
    let sockets = table.lines().map(|line| line.split_whitespace().map(String::from).collect());
    sockets.filter(|words: &Vec<String>| words[1].ends_with(&local)).collect()
}

/// Bytes that don't repeat soon, the same for the same seed.
pub fn random_bytes(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(2).wrapping_add(1);
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend(state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

/// A TCP port without a listener.
pub fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}
