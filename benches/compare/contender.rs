//! The programs that are compared, and how each is started between a front and a target.

use std::fs;
use std::io::Read;
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::AtomicBool;

use command_fds::{CommandFdExt, FdMapping};
use socket2::{SockAddr, Socket, Type};
use tempfile::TempDir;

use crate::addresses::{Family, free_address, listener, written};
use crate::clock;
use crate::datagrams;
use crate::fake_systemd::FakeSystemd;
use crate::load::{Load, Role};
use crate::peers::{self, HAPROXY, NGINX, SOCAT, newest, with_version};
use crate::scrapers::Scrapers;
use crate::splice_loop;

/// How a contender gets its listening socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// There is no proxy.
    Direct,
    /// Passed on descriptor 3, as systemd does it; these words, and the target.
    Activated(Vec<String>),
    /// It opens its own.
    Haproxy,
    /// nginx, which passes a half-close on only when it is told to.
    Nginx {
        half_close: bool,
    },
    Socat,
    /// [`splice_loop`].
    SpliceLoop,
}

/// One that takes part.
#[derive(Clone, Debug)]
pub(crate) struct Contender {
    pub(crate) name: String,
    pub(crate) kind: Kind,
    /// The rows it takes part in; none is all.
    pub(crate) rows: &'static [&'static str],
    /// What follows the target.
    command: Vec<String>,
}

/// Where a second thread has something to do.
const THREADED: &[&str] = &["bulk-up", "bulk-down", "64B-100", "64B-1000", "short"];

/// Where many connections are looked after, and where they come and go.
const WATCHED: &[&str] = &["64B-4000", "short"];

/// What it costs to be stored: where connections come and go, in small messages, in bulk, at rest.
const STORED: &[&str] = &["bulk-up", "bulk-down", "64B-100", "short", "idle-100"];

/// What scrapers cost, the worst there are: in small messages, in bulk, where connections come and go.
const SCRAPED: &[&str] = &["bulk-up", "64B-100", "short"];

/// Stands for an address that is not known yet.
const METRICS: &str = "--metrics=";

/// Where a connection's end is a large part of it.
const ENDING: &[&str] = &["short"];

/// Where the floor is measured.
const ONE_STREAM: &[&str] = &["bulk-1-up", "bulk-1-down"];

/// The contender that is this project's program, with default options.
pub(crate) const OURS: &str = "socket-proxyd";

/// The contender that is no proxy: the least that carries a stream.
pub(crate) const FLOOR: &str = "splice loop";

/// Returns the programs that are installed, ours first.
pub(crate) fn installed(peers: &[(String, Vec<String>)]) -> Vec<Contender> {
    let new =
        |name: &str, kind| Contender { name: name.into(), kind, rows: &[], command: Vec::new() };
    let ours = env!("CARGO_BIN_EXE_socket-proxyd");
    let with = |words: &str, option: &str, rows| Contender {
        rows,
        ..new(
            &format!("socket-proxyd ({words})"),
            Kind::Activated(vec![ours.into(), option.into()]),
        )
    };
    let mut all = vec![
        new(OURS, Kind::Activated(vec![ours.into()])),
        with("2 threads", "--threads=2", THREADED),
        with("idle time", "--connection-idle-time=1s", WATCHED),
        with("restart", "--handover=restart", STORED),
        with("crash", "--handover=crash", STORED),
        with("scraped", METRICS, SCRAPED),
        new("direct", Kind::Direct),
    ];
    let old = "/lib/systemd/systemd-socket-proxyd";
    let old = Path::new(old).exists().then(|| vec![old.into()]);
    for words in newest().into_iter().chain(old) {
        all.push(new(&with_version("systemd", &words, "--version"), Kind::Activated(words)));
    }
    let is_installed = |path: &str| Path::new(path).exists();
    let versioned = |name, path: &str, flag| with_version(name, &[path.into()], flag);
    if is_installed(HAPROXY) {
        all.push(new(&versioned("HAProxy", HAPROXY, "-v"), Kind::Haproxy));
    }
    if is_installed(NGINX) && is_installed("/usr/lib/nginx/modules/ngx_stream_module.so") {
        let name = versioned("nginx", NGINX, "-v");
        all.push(new(&name, Kind::Nginx { half_close: false }));
        let faithful = Kind::Nginx { half_close: true };
        all.push(Contender { rows: ENDING, ..new(&format!("{name} (half-close)"), faithful) });
    }
    if is_installed(SOCAT) {
        all.push(new(&versioned("socat", SOCAT, "-V"), Kind::Socat));
    }
    all.push(Contender { rows: ONE_STREAM, ..new(FLOOR, Kind::SpliceLoop) });
    for (name, words) in peers {
        all.push(new(name, Kind::Activated(words.clone())));
    }
    all
}

/// A contender at work; ended when it is dropped.
pub(crate) struct Running {
    /// Where clients connect.
    pub(crate) front: SockAddr,
    /// `None` when there is no proxy.
    pub(crate) process: Option<Child>,
    /// When it was executed, where that is known.
    pub(crate) executed: Option<u64>,
    _systemd: Option<FakeSystemd>,
    scrapers: Option<Scrapers>,
    _directory: TempDir,
}

impl Running {
    pub(crate) fn pid(&self) -> Option<u32> {
        self.process.as_ref().map(Child::id)
    }

    /// What went wrong beside the connections.
    pub(crate) fn failures(&self) -> u64 {
        self.scrapers.as_ref().map_or(0, Scrapers::failures)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(process) = &mut self.process {
            // HAProxy and nginx end their workers when they are asked.
            let pid = rustix::process::Pid::from_child(process);
            let signal = rustix::process::Signal::TERM;
            let _ = rustix::process::kill_process(pid, signal);
            let deadline = clock::after(2.0);
            while process.try_wait().is_ok_and(|status| status.is_none()) {
                if clock::now() > deadline {
                    let _ = process.kill();
                }
                std::thread::yield_now();
            }
        }
    }
}

/// The user a contender runs as.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum User {
    #[default]
    Ourselves,
    Nobody,
}

impl Contender {
    /// Returns one that starts an application of this program at `target`, and has this option.
    pub(crate) fn with_application(&self, option: &str, family: Family, target: &SockAddr) -> Self {
        let mut contender = self.clone();
        if let Kind::Activated(words) = &mut contender.kind {
            words.push(option.into());
        }
        let name = if family == Family::Udp { DATAGRAM_APPLICATION } else { APPLICATION };
        contender.command =
            ["--", &this_program(), name, &written(target)].map(String::from).into();
        contender
    }

    /// Returns the words of the target and what follows it.
    fn after(&self, target: &SockAddr) -> Vec<String> {
        [vec![written(target)], self.command.clone()].concat()
    }

    /// Starts it between a front of a family and a target.
    ///
    /// `queue` is called when the front can be connected to: for an activated one before it starts.
    pub(crate) fn start(
        &self,
        front: Family,
        target: &SockAddr,
        user: User,
        queue: impl FnOnce(&SockAddr),
    ) -> Running {
        let directory = TempDir::new().expect("a directory");
        let path = directory.path();
        let words = match &self.kind {
            Kind::Direct => {
                queue(target);
                return Running {
                    front: target.clone(),
                    process: None,
                    executed: None,
                    _systemd: None,
                    scrapers: None,
                    _directory: directory,
                };
            }
            Kind::Activated(words) => {
                let (socket, front) = listener(front, path);
                queue(&front);
                let mut words = words.clone();
                let metrics = words.iter_mut().find(|word| *word == METRICS).map(|word| {
                    let address = free_address(Family::Tcp, path);
                    word.push_str(&written(&address));
                    address.as_socket().expect("a TCP address")
                });
                let is_stored = words.iter().any(|word| word.starts_with("--handover="));
                let systemd = is_stored.then(|| FakeSystemd::with_fd_store(8));
                let notify = systemd.as_ref().map(|systemd| &*systemd.path);
                let (process, executed) =
                    activate(&words, &self.after(target), &socket, user, notify);
                return Running {
                    front,
                    process: Some(process),
                    executed,
                    scrapers: metrics.map(Scrapers::start),
                    _systemd: systemd,
                    _directory: directory,
                };
            }
            Kind::Haproxy => peers::haproxy(front, target, path),
            Kind::Nginx { half_close } => peers::nginx(front, target, path, *half_close),
            Kind::Socat => peers::socat(front, target, path),
            Kind::SpliceLoop => {
                let front = free_address(front, path);
                let words = [written(&front), written(target)];
                ([vec![this_program(), SPLICE_LOOP.into()], words.to_vec()].concat(), front)
            }
        };
        let ((words, front), front_family) = (words, front);
        let mut command = Command::new(&words[0]);
        command.args(&words[1..]).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let mut process = command.spawn().expect("an installed program");
        let deadline = clock::after(10.0);
        while !is_open(front_family, &front) {
            let ended = process.try_wait().expect("a child");
            assert!(ended.is_none() && clock::now() < deadline, "{}: {words:?}", self.name);
            std::thread::yield_now();
        }
        queue(&front);
        Running {
            front,
            process: Some(process),
            executed: None,
            _systemd: None,
            scrapers: None,
            _directory: directory,
        }
    }
}

/// Whether a program has opened its socket. A UDP socket shows in the kernel's table only.
fn is_open(family: Family, front: &SockAddr) -> bool {
    match (family, front.as_socket()) {
        (Family::Udp, Some(address)) => {
            let table = fs::read_to_string("/proc/net/udp").unwrap_or_default();
            table.contains(&format!(":{:04X} 00000000:0000", address.port()))
        }
        _ => Socket::new(front.domain(), Type::STREAM, None)
            .is_ok_and(|socket| socket.connect(front).is_ok()),
    }
}

/// This program under another name: sets `LISTEN_PID` and becomes the contender.
const LAUNCHER: &str = "bench-launcher";

fn activate(
    words: &[String],
    last_words: &[String],
    socket: &Socket,
    user: User,
    notify: Option<&Path>,
) -> (Child, Option<u64>) {
    let mut command = Command::new("/proc/self/exe");
    match notify {
        Some(path) => command.env("NOTIFY_SOCKET", path),
        None => command.env_remove("NOTIFY_SOCKET"),
    };
    command.arg0(LAUNCHER);
    if user == User::Nobody {
        let nobody = ["--reuid", "65534", "--regid", "65534", "--clear-groups"];
        command.arg("setpriv").args(nobody);
    }
    command.args(words).arg("--connections-max=16384").args(last_words);
    command.env("LISTEN_FDS", "1").stdin(Stdio::null()).stdout(Stdio::piped());
    command.stderr(Stdio::null());
    let parent_fd = socket.as_fd().try_clone_to_owned().expect("a descriptor");
    command.fd_mappings(vec![FdMapping { parent_fd, child_fd: 3 }]).expect("one mapping");
    let mut process = command.spawn().expect("this program");
    let mut moment = [0; 8];
    let told = process.stdout.take().expect("a pipe").read_exact(&mut moment);
    (process, told.is_ok().then(|| u64::from_le_bytes(moment)))
}

/// The launcher's side; `None` if this is not it.
pub(crate) fn launch() -> Option<std::io::Error> {
    let mut args = std::env::args_os();
    if args.next()? != LAUNCHER {
        return None;
    }
    let mut command = Command::new(args.next()?);
    command.args(args).env("LISTEN_PID", std::process::id().to_string());
    // The pipe is not the contender's.
    let moment = rustix::io::dup(std::io::stdout()).and_then(|pipe| {
        rustix::io::fcntl_setfd(&pipe, rustix::io::FdFlags::CLOEXEC)?;
        Ok(pipe)
    });
    command.stdout(Stdio::null());
    if let Ok(pipe) = moment {
        let _ = rustix::io::write(pipe, &clock::now().to_le_bytes());
    }
    Some(command.exec())
}

/// This program's first argument, where it is COMMAND.
const APPLICATION: &str = "bench-application";
const DATAGRAM_APPLICATION: &str = "bench-datagram-application";

/// This program's first argument, where it is the splice loop.
const SPLICE_LOOP: &str = "bench-splice-loop";

fn this_program() -> String {
    std::env::current_exe().expect("this program").display().to_string()
}

/// Runs until the process is ended, if this is COMMAND or the floor. Its arguments are addresses.
pub(crate) fn serve_as_command() {
    let words: Vec<_> = std::env::args().skip(1).collect();
    match words.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [DATAGRAM_APPLICATION, address] => {
            let socket = UdpSocket::bind(address).expect("a free address");
            datagrams::echo(&socket, &AtomicBool::new(false));
        }
        [APPLICATION, address] => echo(&read_address(address)),
        [SPLICE_LOOP, front, target] => {
            let ended = splice_loop::serve(&read_address(front), &read_address(target));
            ended.expect("a listener");
        }
        _ => {}
    }
}

fn read_address(text: &str) -> SockAddr {
    match text.parse::<SocketAddr>() {
        Ok(address) => address.into(),
        Err(_) => SockAddr::unix(text).expect("a short path"),
    }
}

fn echo(address: &SockAddr) {
    if let Some(path) = address.as_pathname() {
        let _ = fs::remove_file(path);
    }
    let socket = Socket::new(address.domain(), Type::STREAM, None).expect("a socket");
    socket.set_reuse_address(true).expect("a socket");
    socket.bind(address).expect("a free address");
    socket.listen(128).expect("a listener");
    let mut load = Load::new(64);
    load.listen(socket, Role::Echo);
    load.run_until(&AtomicBool::new(false));
}
