//! The service manager's side of sd_notify(3) and of the file descriptor store.

use std::collections::VecDeque;
use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;
use std::time::Duration;

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use socket2::SockRef;
use tempfile::TempDir;
use tokio::time::Instant;

/// Longer than the next notification takes.
const TIMEOUT: Duration = Duration::from_secs(20);

pub struct FakeSystemd {
    /// For NOTIFY_SOCKET.
    pub path: PathBuf,
    pub fd_store: FdStore,
    socket: UnixDatagram,
    notifications: Mutex<Notifications>,
    _directory: TempDir,
}

enum Notifications {
    /// Read when a test asks for them, so that the socket's queue can be full.
    Queued(VecDeque<String>),
    /// Read at once.
    Read(Receiver<String>),
}

impl FakeSystemd {
    /// Reads notifications when a test asks for them, and stores nothing.
    pub fn new() -> Self {
        Self::start(FdStore::default(), |_| Notifications::Queued(VecDeque::new()))
    }

    /// Reads notifications at once, and stores as many descriptors as `FileDescriptorStoreMax=` allows.
    pub fn with_fd_store(max: usize) -> Self {
        let store = FdStore { max, stored: Arc::default() };
        Self::start(store.clone(), |socket| {
            let (notifications, read) = channel();
            let socket = socket.try_clone().unwrap();
            thread::spawn(move || receive_all(&socket, &store, &notifications));
            Notifications::Read(read)
        })
    }

    fn start(fd_store: FdStore, read: impl FnOnce(&UnixDatagram) -> Notifications) -> Self {
        let directory = TempDir::new().unwrap();
        let path = directory.path().join("notify");
        let socket = UnixDatagram::bind(&path).unwrap();
        let notifications = Mutex::new(read(&socket));
        Self { path, fd_store, socket, notifications, _directory: directory }
    }

    /// The next assignment. A message may have several.
    pub fn next(&self) -> String {
        match &mut *self.notifications.lock().unwrap() {
            Notifications::Read(read) => read.recv_timeout(TIMEOUT).expect("a notification comes"),
            Notifications::Queued(queued) => {
                self.socket.set_read_timeout(Some(TIMEOUT)).unwrap();
                while queued.is_empty() {
                    let mut bytes = [0; 4096];
                    let length = self.socket.recv(&mut bytes).expect("a notification comes");
                    let text = std::str::from_utf8(&bytes[..length]).unwrap();
                    queued.extend(text.lines().map(String::from));
                }
                queued.pop_front().unwrap()
            }
        }
    }

    /// Skips assignments until one that begins so.
    pub fn wait_for(&self, start: &str) -> String {
        // Other notifications may go on coming.
        let deadline = Instant::now() + 3 * TIMEOUT;
        loop {
            let next = self.next();
            if next.starts_with(start) {
                return next;
            }
            assert!(Instant::now() < deadline, "{start} does not come");
        }
    }
}

impl Drop for FakeSystemd {
    fn drop(&mut self) {
        // Ends the thread.
        let _ = SockRef::from(&self.socket).shutdown(Shutdown::Both);
    }
}

fn receive_all(socket: &UnixDatagram, store: &FdStore, notifications: &Sender<String>) {
    let mut bytes = [0; 4096];
    loop {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let iov = &mut [IoSliceMut::new(&mut bytes)];
        let length = match recvmsg(socket, iov, &mut control, RecvFlags::CMSG_CLOEXEC) {
            Ok(received) if received.bytes > 0 => received.bytes,
            _ => return,
        };
        let text = std::str::from_utf8(&bytes[..length]).unwrap();
        let fds = control.drain().filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(fds) => Some(fds),
            _ => None,
        });
        store.receive(text, fds.flatten());
        for line in text.lines() {
            // The test may have ended.
            let _ = notifications.send(line.to_string());
        }
    }
}

type Stored = Vec<(String, OwnedFd)>;

#[derive(Clone, Default)]
pub struct FdStore {
    max: usize,
    stored: Arc<Mutex<Stored>>,
}

impl FdStore {
    /// Stores what comes with FDSTORE=1. What comes with anything else is closed, which answers a
    /// BARRIER=1.
    fn receive(&self, text: &str, fds: impl Iterator<Item = OwnedFd>) {
        let name = text.lines().find_map(|line| line.strip_prefix("FDNAME="));
        let mut stored = self.stored();
        if text.contains("FDSTORE=1") {
            let room = self.max - stored.len();
            stored.extend(fds.take(room).map(|fd| (name.unwrap().to_string(), fd)));
        } else if text.contains("FDSTOREREMOVE=1") {
            stored.retain(|(stored, _)| Some(&**stored) != name);
        } else {
            drop(fds);
        }
    }

    pub fn stored(&self) -> MutexGuard<'_, Stored> {
        self.stored.lock().unwrap()
    }

    /// Stores a descriptor that the program did not send.
    pub fn put(&self, name: &str, fd: impl AsFd) {
        let fd = fd.as_fd().try_clone_to_owned().unwrap();
        self.stored().push((name.into(), fd));
    }

    pub fn clear(&self) {
        self.stored().clear();
    }

    /// The names of what is stored, sorted.
    pub fn names(&self) -> Vec<String> {
        let mut names: Vec<_> = self.stored().iter().map(|(name, _)| name.clone()).collect();
        names.sort();
        names
    }

    /// Another reference to what is stored under a name.
    pub fn get(&self, name: &str) -> OwnedFd {
        let stored = self.stored();
        let (_, fd) = stored.iter().find(|(stored, _)| stored == name).expect("it is stored");
        fd.try_clone().unwrap()
    }
}
