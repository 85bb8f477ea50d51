//! COMMAND and its guard, as the proxy sees them: a socket to the guard, the target's address, and an
//! end.

use std::cell::{Cell, RefCell};
use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::rc::Rc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::task::{Context, Poll, Waker};

use socket_proxyd::testing::{Event, GuardProcess};
use socket2::{Domain, Socket, Type};

use crate::descriptors::above;
use crate::support::Endpoint;

/// What the application does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// The guard waits for COMMAND's words.
    Launching,
    Starting,
    /// The application listens, and serves.
    Ready,
    Frozen,
    /// COMMAND has exited, and another process of it is left.
    Exited,
    /// The guard has exited.
    Gone,
}

/// One run of COMMAND.
pub struct Application {
    control: Option<UnixStream>,
    exit: Rc<Exit>,
    notify: Option<PathBuf>,
    pub state: State,
    listener: Option<Endpoint>,
    connections: Vec<Socket>,
}

/// The end of a guard, as wait(2) reports it.
#[derive(Debug, Default)]
struct Exit {
    status: Cell<Option<ExitStatus>>,
    waker: RefCell<Option<Waker>>,
}

#[derive(Debug)]
struct SimulatedGuard(Rc<Exit>);

impl GuardProcess for SimulatedGuard {
    /// The simulation itself, so that its notifications are those of COMMAND.
    fn id(&self) -> Option<u32> {
        Some(std::process::id())
    }

    fn poll_exit(&mut self, cx: &mut Context<'_>) -> Poll<std::io::Result<ExitStatus>> {
        *self.0.waker.borrow_mut() = Some(cx.waker().clone());
        self.0.status.get().map_or(Poll::Pending, |status| Poll::Ready(Ok(status)))
    }
}

thread_local! {
    static STARTED: RefCell<Vec<Application>> = const { RefCell::new(Vec::new()) };
    static IS_REFUSED: Cell<bool> = const { Cell::new(false) };
}

/// Starts a guard that [`Application::take_started`] returns.
pub fn start(control: OwnedFd, notify: Option<&Path>) -> std::io::Result<Box<dyn GuardProcess>> {
    if IS_REFUSED.get() {
        return Err(ErrorKind::WouldBlock.into());
    }
    let exit = Rc::<Exit>::default();
    let control = UnixStream::from(above(control));
    control.set_nonblocking(true)?;
    let application = Application {
        control: Some(control),
        exit: Rc::clone(&exit),
        notify: notify.map(PathBuf::from),
        state: State::Launching,
        listener: None,
        connections: Vec::new(),
    };
    STARTED.with_borrow_mut(|started| started.push(application));
    Ok(Box::new(SimulatedGuard(exit)))
}

/// Says whether fork(2) fails from now on.
pub fn refuse_starts(is_refused: bool) {
    IS_REFUSED.set(is_refused);
}

impl Application {
    pub fn take_started() -> Vec<Self> {
        STARTED.take()
    }

    /// Reads what the proxy asks for: the length of COMMAND's words and the words, or single bytes.
    /// The guard exits when the proxy has closed its socket.
    pub fn requests(&mut self) -> Vec<u8> {
        let (Some(control), mut bytes) = (&mut self.control, [0; 4096]) else { return Vec::new() };
        match control.read(&mut bytes) {
            Ok(0) => self.exit(0),
            Ok(length) => return bytes[..length].to_vec(),
            Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
        }
        Vec::new()
    }

    pub fn send(&mut self, event: Event) {
        if let Some(control) = &mut self.control {
            // EPIPE: the proxy is gone.
            let _ = control.write_all(&event.to_bytes());
        }
    }

    /// Listens, and says so.
    pub fn begin_to_serve(&mut self, listen: impl FnOnce() -> Endpoint) {
        self.state = State::Ready;
        self.listener = Some(listen());
        if let Some(path) = &self.notify {
            UnixDatagram::unbound().unwrap().send_to(b"READY=1", path).unwrap();
        }
    }

    /// Accepts, and sends back what came.
    pub fn serve(&mut self) {
        let Some(listener) = &self.listener else { return };
        while let Ok((socket, _)) = listener.socket.accept() {
            let socket = Socket::from(above(socket));
            socket.set_nonblocking(true).unwrap();
            self.connections.push(socket);
        }
        self.connections.retain_mut(|socket| {
            let mut bytes = [0; 64];
            match socket.read(&mut bytes) {
                Ok(0) => false,
                Ok(length) => socket.write_all(&bytes[..length]).is_ok(),
                Err(error) => error.kind() == ErrorKind::WouldBlock,
            }
        });
    }

    /// COMMAND itself exits with a signal. The guard waits for a process that is left.
    pub fn die(&mut self, signal: i32) {
        self.end_service();
        self.state = State::Exited;
        self.send(Event::Exited(signal));
    }

    /// The guard exits by itself, with 0, or by a signal.
    pub fn exit(&mut self, signal: i32) {
        self.end_service();
        self.control = None;
        self.state = State::Gone;
        self.exit.status.set(Some(ExitStatus::from_raw(signal)));
        self.exit.waker.take().into_iter().for_each(Waker::wake);
        // As the guard does for a proxy that was killed.
        if let Some(path) = self.notify.take().filter(|_| signal != 0) {
            let _ = fs::remove_file(path);
        }
    }

    fn end_service(&mut self) {
        self.listener = None;
        self.connections.clear();
    }
}

/// Listens at a target.
pub fn listen(target: &str) -> Endpoint {
    moved(match target.strip_prefix('/') {
        Some(_) => {
            let path = PathBuf::from(target);
            let _ = fs::remove_file(&path);
            Endpoint::unix(&path, 64)
        }
        None => {
            let address: SocketAddr = target.parse().unwrap();
            let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
            // Connections of the previous run are in TIME_WAIT.
            socket.set_reuse_address(true).unwrap();
            socket.bind(&address.into()).unwrap();
            socket.listen(64).unwrap();
            Endpoint { socket, target: target.into(), address: address.into(), _directory: None }
        }
    })
}

/// Returns an address that nothing else binds: other sockets connect from 127.0.0.1.
pub fn own_address() -> String {
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    let (process, number) = (std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
    format!("127.{}.{}.{}:2000", 1 + process / 256 % 250, process % 256, number % 256)
}

/// Moves a socket out of the way of the proxy's descriptors.
pub fn moved(mut endpoint: Endpoint) -> Endpoint {
    endpoint.socket = above(&endpoint.socket).into();
    endpoint.socket.set_nonblocking(true).unwrap();
    endpoint
}

/// A number that no process has: what the proxy sends to its group reaches nothing.
pub const NO_PROCESS: i32 = i32::MAX;
