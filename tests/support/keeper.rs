//! Plays systemd's side of the file descriptor store.

use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::thread;

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use tempfile::TempDir;

use crate::support::{Launch, PATIENCE};

/// Keeps what it is given, as `FileDescriptorStoreMax=` allows, and notes what else is said.
pub struct Keeper {
    path: PathBuf,
    stored: Arc<Mutex<Vec<(String, OwnedFd)>>>,
    said: Receiver<String>,
    _directory: TempDir,
}

impl Keeper {
    pub fn new(max: usize) -> Self {
        let directory = TempDir::new().unwrap();
        let path = directory.path().join("notify");
        let socket = UnixDatagram::bind(&path).unwrap();
        let (tell, said) = channel();
        let stored = Arc::new(Mutex::new(Vec::new()));
        let store = Arc::clone(&stored);
        thread::spawn(move || {
            loop {
                let mut bytes = vec![0; 4096];
                let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
                let mut control = RecvAncillaryBuffer::new(&mut space);
                let iov = &mut [IoSliceMut::new(&mut bytes)];
                let received = recvmsg(&socket, iov, &mut control, RecvFlags::CMSG_CLOEXEC);
                let received = received.unwrap().bytes;
                let text = std::str::from_utf8(&bytes[..received]).unwrap();
                let fds = control.drain().filter_map(|message| match message {
                    RecvAncillaryMessage::ScmRights(fds) => Some(fds),
                    _ => None,
                });
                let fds = fds.flatten();
                let name = text.lines().find_map(|line| line.strip_prefix("FDNAME="));
                let mut store = store.lock().unwrap();
                if text.contains("FDSTORE=1") {
                    let room = max - store.len();
                    store.extend(fds.take(room).map(|fd| (name.unwrap().to_string(), fd)));
                } else if text.contains("FDSTOREREMOVE=1") {
                    store.retain(|(stored, _)| Some(&**stored) != name);
                } else {
                    drop(fds);
                }
                drop(store);
                // In a test that has ended nobody listens any more.
                if text.lines().any(|line| tell.send(line.to_string()).is_err()) {
                    return;
                }
            }
        });
        Self { path, stored, said, _directory: directory }
    }

    /// Starts a program as the service manager does: what is stored comes behind its own sockets, which
    /// are `listeners`.
    pub fn launch(&self, launch: Launch, listeners: usize) -> Launch {
        let stored = self.stored.lock().unwrap();
        let names = (0..listeners).map(|_| "front").chain(stored.iter().map(|(name, _)| &**name));
        let names = names.collect::<Vec<_>>().join(":");
        let launch = launch.env("NOTIFY_SOCKET", self.path.display()).env("LISTEN_FDNAMES", names);
        stored.iter().fold(launch, |launch, (_, fd)| launch.socket(fd))
    }

    /// Stores something by another way.
    pub fn put(&self, name: &str, fd: impl AsFd) {
        let fd = fd.as_fd().try_clone_to_owned().unwrap();
        self.stored.lock().unwrap().push((name.into(), fd));
    }

    /// Takes everything out.
    pub fn clear(&self) {
        self.stored.lock().unwrap().clear();
    }

    /// What is stored at this moment.
    pub fn names(&self) -> Vec<String> {
        let mut names: Vec<_> =
            self.stored.lock().unwrap().iter().map(|(name, _)| name.clone()).collect();
        names.sort();
        names
    }

    /// A second reference to what is stored under a name.
    pub fn get(&self, name: &str) -> OwnedFd {
        let stored = self.stored.lock().unwrap();
        let (_, fd) = stored.iter().find(|(stored, _)| stored == name).expect("it is stored");
        fd.try_clone().unwrap()
    }

    /// Skips what is said until something that begins so.
    pub fn wait_for(&self, start: &str) -> String {
        loop {
            let said = self.said.recv_timeout(PATIENCE).unwrap_or_else(|_| panic!("no {start}"));
            if said.starts_with(start) {
                return said;
            }
        }
    }
}
