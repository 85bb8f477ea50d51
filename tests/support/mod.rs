//! What the tests share: sockets of either family, backends, and the program under test.
//!
//! Tests wait for events, and [`PATIENCE`] only turns a hang into a failure. A [`pause`] is for what
//! is a span of time itself: a deadline to outlast, CPU to be measured over.
#![allow(dead_code, unreachable_pub, unused_imports, reason = "each test crate uses its own part")]

pub mod keeper;
mod trials;
pub mod urgent;

use std::collections::VecDeque;
use std::fmt;
use std::fs;
use std::io::{BufRead, BufReader, ErrorKind, IoSlice, Read, Write};
use std::net::{Shutdown, TcpListener};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::Duration;

use command_fds::{CommandFdExt, FdMapping};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use socket2::{Domain, SockAddr, Socket, Type};
use tempfile::TempDir;
use tokio::time::Instant;

pub use trials::*;

/// The program under test.
pub const OURS: &str = env!("CARGO_BIN_EXE_socket-proxyd");

/// The unit writer under test.
pub const UNIT_WRITER: &str = env!("CARGO_BIN_EXE_socket-proxyd-units");

/// The checkout.
pub const ROOT: &str = env!("CARGO_MANIFEST_DIR");

/// An application for COMMAND; says what it takes.
pub const APP: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/support/app.pl");

/// Longer than anything takes that works.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// Thousands of clients and their backends are this process's descriptors, too.
pub fn raise_descriptor_limit() {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    let raised = rustix::process::Rlimit { current: limit.maximum, ..limit };
    setrlimit(Resource::Nofile, raised).unwrap();
}

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
    _directory: Option<TempDir>,
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
                let path = directory.path().join("socket");
                let address = SockAddr::unix(&path).unwrap();
                let socket = Socket::new(Domain::UNIX, Type::STREAM, None).unwrap();
                socket.bind(&address).unwrap();
                socket.listen(backlog).unwrap();
                Self {
                    socket,
                    target: path.to_str().unwrap().into(),
                    address,
                    _directory: Some(directory),
                }
            }
        }
    }

    pub fn tcp(address: &str, backlog: i32) -> Self {
        let address: std::net::SocketAddr = address.parse().unwrap();
        let socket = Socket::new(Domain::for_address(address), Type::STREAM, None).unwrap();
        if address.is_ipv6() {
            socket.set_only_v6(false).unwrap();
        }
        socket.bind(&address.into()).unwrap();
        socket.listen(backlog).unwrap();
        let address = socket.local_addr().unwrap();
        Self { socket, target: address.as_socket().unwrap().to_string(), address, _directory: None }
    }

    pub fn port(&self) -> u16 {
        self.address.as_socket().unwrap().port()
    }

    pub fn connect(&self) -> Socket {
        connect(&self.address)
    }

    pub fn accept(&self) -> Socket {
        self.socket.set_read_timeout(Some(PATIENCE)).unwrap();
        let (socket, _) = self.socket.accept().expect("somebody connects to the backend");
        patient(socket)
    }
}

pub fn connect(address: &SockAddr) -> Socket {
    let socket = Socket::new(address.domain(), Type::STREAM, None).unwrap();
    socket.connect(address).expect("the listener has a backlog");
    patient(socket)
}

fn patient(socket: Socket) -> Socket {
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket.set_write_timeout(Some(PATIENCE)).unwrap();
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
            (patient(near), patient(far))
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
            thread::spawn(move || handler(patient(socket)));
        }
    });
}

/// A backend that sends back what it gets, and the end of it.
pub fn echo(mut socket: Socket) {
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
pub fn exchange(socket: &mut Socket, message: &[u8]) -> std::io::Result<Vec<u8>> {
    socket.write_all(message)?;
    let mut answer = vec![0; message.len()];
    socket.read_exact(&mut answer)?;
    Ok(answer)
}

pub fn echoes(socket: &mut Socket) {
    let answer = exchange(socket, b"are you there?").expect("the echo backend answers");
    assert_eq!(answer, b"are you there?");
}

/// Sends messages of one byte, each with a descriptor if asked to, until the socket fails.
pub fn flood(socket: &Socket, with_descriptors: bool) {
    let fds = [socket.as_fd()];
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    loop {
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(!with_descriptors || control.push(SendAncillaryMessage::ScmRights(&fds)));
        let byte = [IoSlice::new(b"x")];
        match rustix::net::sendmsg(socket, &byte, &mut control, SendFlags::NOSIGNAL) {
            Ok(_) | Err(rustix::io::Errno::TOOMANYREFS) => {}
            Err(_) => return,
        }
    }
}

/// Has a socket wake its reader for so many bytes only (SO_RCVLOWAT in socket(7)).
fn receive_at_least(socket: &Socket, bytes: libc::c_int) {
    // SAFETY: setsockopt(2) reads an int.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_RCVLOWAT,
            (&raw const bytes).cast(),
            size_of_val(&bytes) as libc::socklen_t,
        )
    };
    assert_eq!(result, 0);
}

/// Two connections flood, from their clients or from their backends. How long 15 answers to another
/// client took meanwhile, sorted.
pub fn beside_floods(
    front: &Endpoint,
    backend: &Endpoint,
    from_client: bool,
    with_descriptors: bool,
) -> Vec<Duration> {
    let floods: Vec<_> = (0..2).map(|_| (front.connect(), backend.accept())).collect();
    serve(backend, echo);
    let mut client = front.connect();
    echoes(&mut client);
    let mut times: Vec<Duration> = thread::scope(|scope| {
        for (near, far) in &floods {
            let (from, to) = if from_client { (near, far) } else { (far, near) };
            scope.spawn(move || flood(from, with_descriptors));
            // Only now and then: it is not to keep the others from their processors.
            receive_at_least(to, 64 * 1024);
            scope.spawn(move || read_all(&mut to.try_clone().unwrap()));
        }
        // They are under way.
        pause(Duration::from_millis(300));
        let ask = || {
            let start = Instant::now();
            echoes(&mut client);
            start.elapsed()
        };
        let times = std::iter::repeat_with(ask).take(15).collect();
        for (near, far) in &floods {
            let _ = (near.shutdown(Shutdown::Both), far.shutdown(Shutdown::Both));
        }
        times
    });
    times.sort();
    times
}

/// Reads until the end: the bytes, and whether the end was a clean one.
pub fn read_all(socket: &mut Socket) -> (Vec<u8>, std::io::Result<()>) {
    let mut bytes = Vec::new();
    let mut buffer = vec![0; 64 * 1024];
    loop {
        match socket.read(&mut buffer) {
            Ok(0) => return (bytes, Ok(())),
            Ok(more) => bytes.extend_from_slice(&buffer[..more]),
            Err(error) => return (bytes, Err(error)),
        }
    }
}

pub fn is_reset(end: &std::io::Result<()>) -> bool {
    matches!(end, Err(error) if error.kind() == ErrorKind::ConnectionReset)
}

/// Makes the close of a TCP socket a reset.
pub fn reset(socket: Socket) {
    socket.set_linger(Some(Duration::ZERO)).unwrap();
}

/// Bytes that don't repeat soon, the same for the same seed.
pub fn noise(seed: u64, length: usize) -> Vec<u8> {
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

/// A program that is started with sockets, as systemd does it.
pub struct Launch {
    program: PathBuf,
    args: Vec<String>,
    sockets: Vec<OwnedFd>,
    env: Vec<(&'static str, String)>,
    before_exec: String,
    hosts: Option<PathBuf>,
    exec: &'static str,
    signals: Vec<&'static str>,
    read_stderr: bool,
}

impl Launch {
    pub fn new(program: impl Into<PathBuf>) -> Self {
        Self {
            program: program.into(),
            args: Vec::new(),
            sockets: Vec::new(),
            env: Vec::new(),
            before_exec: "export LISTEN_PID=$$".into(),
            hosts: None,
            exec: "exec",
            signals: Vec::new(),
            read_stderr: true,
        }
    }

    pub fn arg(mut self, arg: impl ToString) -> Self {
        self.args.push(arg.to_string());
        self
    }

    pub fn args<T: ToString>(mut self, args: impl IntoIterator<Item = T>) -> Self {
        self.args.extend(args.into_iter().map(|arg| arg.to_string()));
        self
    }

    pub fn env(mut self, name: &'static str, value: impl ToString) -> Self {
        self.env.push((name, value.to_string()));
        self
    }

    /// Passes a socket on.
    pub fn socket(mut self, socket: &impl AsFd) -> Self {
        self.sockets.push(socket.as_fd().try_clone_to_owned().unwrap());
        self
    }

    pub fn listener(self, endpoint: &Endpoint) -> Self {
        self.socket(&endpoint.socket)
    }

    /// Sets both limits on descriptors.
    pub fn descriptors(mut self, limit: usize) -> Self {
        self.before_exec = format!("ulimit -n {limit} && {}", self.before_exec);
        self
    }

    /// As if systemd itself had started the program.
    pub fn under_systemd(mut self) -> Self {
        self.before_exec = format!("export SYSTEMD_EXEC_PID=$$ && {}", self.before_exec);
        self
    }

    /// Runs the program as nobody; needs root.
    pub fn unprivileged(mut self) -> Self {
        self.exec = "exec setpriv --reuid 65534 --regid 65534 --clear-groups";
        self
    }

    /// Sets the soft limit on descriptors, below the hard one.
    pub fn soft_descriptors(mut self, limit: usize) -> Self {
        self.before_exec = format!("ulimit -S -n {limit} && {}", self.before_exec);
        self
    }

    /// Passes sockets that are meant for somebody else.
    pub fn other_pid(mut self) -> Self {
        self.before_exec = "export LISTEN_PID=1".into();
        self
    }

    /// Gives the program an /etc/hosts of its own, in a mount namespace; needs root.
    pub fn hosts(mut self, hosts: PathBuf) -> Self {
        assert!(rustix::process::geteuid().is_root(), "this test needs root");
        self.hosts = Some(hosts);
        self
    }

    /// Starts the program with signals ignored or blocked: an option of env(1), such as
    /// `--ignore-signal=HUP`. Otherwise they are as by default, whatever runs the tests.
    pub fn signals(mut self, option: &'static str) -> Self {
        self.signals.push(option);
        self
    }

    /// Leaves standard error unread.
    pub fn stderr_unread(mut self) -> Self {
        self.read_stderr = false;
        self
    }

    pub fn start(self) -> Running {
        // The shell knows its pid before it becomes the program.
        let signals = format!("env --default-signal {}", self.signals.join(" "));
        let script = format!("{} && {} {signals} \"$0\" \"$@\"", self.before_exec, self.exec);
        let mut command = match &self.hosts {
            None => {
                let mut command = Command::new("/bin/sh");
                command.arg("-c").arg(script);
                command
            }
            // Together or not at all: the mount is for the namespace.
            Some(hosts) => {
                let mount = format!("mount --bind {} /etc/hosts", hosts.display());
                let mut command = Command::new("unshare");
                command.args(["--mount", "/bin/sh", "-c"]);
                command.arg(format!("{mount} && {script}"));
                command
            }
        };
        command.arg(&self.program).args(&self.args);
        for name in ["NOTIFY_SOCKET", "JOURNAL_STREAM", "SYSTEMD_EXEC_PID", "WATCHDOG_USEC"] {
            command.env_remove(name);
        }
        if !self.sockets.is_empty() {
            command.env("LISTEN_FDS", self.sockets.len().to_string());
        }
        command.envs(self.env);
        let mappings = self.sockets.into_iter().zip(3..);
        let mappings = mappings.map(|(parent_fd, child_fd)| FdMapping { parent_fd, child_fd });
        command.fd_mappings(mappings.collect()).unwrap();
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let lines = Lines::default();
        let stderr = child.stderr.take().unwrap();
        let unread = if self.read_stderr {
            lines.collect(stderr);
            None
        } else {
            Some(stderr)
        };
        Running { child, lines, unread_stderr: unread }
    }
}

/// A started program; killed when it is dropped.
pub struct Running {
    pub child: Child,
    pub lines: Lines,
    pub unread_stderr: Option<std::process::ChildStderr>,
}

impl Running {
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, signal).unwrap();
    }

    pub fn wait(&mut self) -> ExitStatus {
        let deadline = Instant::now() + PATIENCE;
        poll_until(deadline, || self.child.try_wait().unwrap()).expect("the program exits")
    }

    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// Descriptors that are open now.
    pub fn descriptors(&self) -> usize {
        fs::read_dir(format!("/proc/{}/fd", self.pid())).unwrap().count()
    }

    /// Memory in KiB.
    pub fn resident(&self) -> usize {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        line.trim().trim_end_matches(" kB").parse().unwrap()
    }

    /// Ends of pipes that are open now, those it was started with among them.
    pub fn pipes(&self) -> usize {
        let links = fs::read_dir(format!("/proc/{}/fd", self.pid())).unwrap();
        let links = links.filter_map(|link| fs::read_link(link.ok()?.path()).ok());
        links.filter(|link| link.to_string_lossy().starts_with("pipe:")).count()
    }

    /// Whether all its threads wait for something.
    pub fn is_asleep(&self) -> bool {
        let is_asleep =
            |stat: &str| stat.rsplit_once(") ").is_some_and(|(_, it)| it.starts_with('S'));
        self.tasks("stat").iter().all(|stat| is_asleep(stat))
    }

    /// The event loops that were started beside the main thread's.
    pub fn workers(&self) -> usize {
        self.tasks("comm").iter().filter(|name| *name == "proxyd-worker\n").count()
    }

    /// A file of each thread's.
    fn tasks(&self, file: &str) -> Vec<String> {
        let tasks = fs::read_dir(format!("/proc/{}/task", self.pid())).unwrap();
        // One may end in between.
        tasks.filter_map(|task| fs::read_to_string(task.ok()?.path().join(file)).ok()).collect()
    }

    /// On-CPU time of all threads so far.
    pub fn cpu(&self) -> Duration {
        let tasks = self.tasks("schedstat");
        let nanos = tasks.iter().filter_map(|text| text.split(' ').next()?.parse::<u64>().ok());
        Duration::from_nanos(nanos.sum())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs a program to its end, without sockets.
pub fn run(program: &PathBuf, args: &[&str]) -> (Option<i32>, String, String) {
    let mut running = Launch::new(program).args(args).start();
    let status = running.wait();
    let mut stdout = String::new();
    running.child.stdout.take().unwrap().read_to_string(&mut stdout).unwrap();
    (status.code(), stdout, running.lines.all())
}

/// Lines that a program has written to standard error.
#[derive(Clone, Default)]
pub struct Lines(Arc<(Mutex<Collected>, Condvar)>);

#[derive(Default)]
struct Collected {
    lines: Vec<String>,
    ended: bool,
}

impl Lines {
    pub fn collect(&self, stderr: impl Read + Send + 'static) {
        let this = self.clone();
        thread::spawn(move || {
            let (state, changed) = &*this.0;
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                state.lock().unwrap().lines.push(line);
                changed.notify_all();
            }
            state.lock().unwrap().ended = true;
            changed.notify_all();
        });
    }

    /// Waits for a line that contains `text`.
    pub fn wait_for(&self, text: &str) -> String {
        let (state, changed) = &*self.0;
        let mut state = state.lock().unwrap();
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(line) = state.lines.iter().find(|line| line.contains(text)) {
                return line.clone();
            }
            let left = deadline.saturating_duration_since(Instant::now());
            assert!(!state.ended && !left.is_zero(), "no line with {text:?} in {:?}", state.lines);
            state = changed.wait_timeout(state, left).unwrap().0;
        }
    }

    /// Everything, once the program has closed its standard error.
    pub fn all(&self) -> String {
        let (state, changed) = &*self.0;
        let state = state.lock().unwrap();
        let state = changed.wait_timeout_while(state, PATIENCE, |state| !state.ended).unwrap().0;
        state.lines.join("\n")
    }

    pub fn count(&self, text: &str) -> usize {
        self.0.0.lock().unwrap().lines.iter().filter(|line| line.contains(text)).count()
    }
}

/// Plays systemd's side of sd_notify(3).
pub struct Manager {
    socket: UnixDatagram,
    pub path: PathBuf,
    seen: VecDeque<String>,
    _directory: TempDir,
}

impl Manager {
    pub fn new() -> Self {
        let directory = TempDir::new().unwrap();
        let path = directory.path().join("notify");
        let socket = UnixDatagram::bind(&path).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        Self { socket, path, seen: VecDeque::new(), _directory: directory }
    }

    /// The next assignment, one of those that come in a message.
    pub fn next(&mut self) -> String {
        while self.seen.is_empty() {
            let mut buffer = [0; 4096];
            let bytes = self.socket.recv(&mut buffer).expect("a notification comes");
            let text = String::from_utf8(buffer[..bytes].to_vec()).unwrap();
            self.seen.extend(text.lines().map(String::from));
        }
        self.seen.pop_front().unwrap()
    }

    /// Skips assignments until one that begins so.
    pub fn wait_for(&mut self, start: &str) -> String {
        loop {
            let next = self.next();
            if next.starts_with(start) {
                return next;
            }
        }
    }
}

/// Looks again and again until `look` gives something, or the deadline is over. Only for what has
/// no event: another process's descriptors, CPU time or end.
pub fn poll_until<T>(deadline: Instant, mut look: impl FnMut() -> Option<T>) -> Option<T> {
    loop {
        if let Some(found) = look() {
            return Some(found);
        }
        if Instant::now() > deadline {
            return None;
        }
        pause(Duration::from_millis(2));
    }
}

#[expect(clippy::disallowed_methods, reason = "between two looks, and to measure over a time")]
pub fn pause(time: Duration) {
    thread::sleep(time);
}

/// A TCP port on which nobody listens now.
pub fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}
