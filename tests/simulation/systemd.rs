//! systemd, as far as a service with a file descriptor store sees it.

use std::collections::HashSet;
use std::ffi::OsString;
use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::fstat;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use socket_proxyd::testing::PassedFd;

use crate::descriptors::above;

pub struct Systemd {
    socket: OwnedFd,
    /// For NOTIFY_SOCKET.
    pub name: OsString,
    /// `FileDescriptorStoreMax=`.
    max: usize,
    /// The latest first, as systemd passes them on.
    stored: Vec<Stored>,
    /// All assignments since the start of the process.
    pub notifications: Vec<String>,
}

struct Stored {
    name: String,
    fd: OwnedFd,
    /// Without `FDPOLL=0` systemd removes it once its peer has hung up.
    is_polled: bool,
}

impl Systemd {
    pub fn new(max: usize) -> Self {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = format!("simulation-{}-{number}", std::process::id());
        let address = SocketAddr::from_abstract_name(&name).unwrap();
        let socket = UnixDatagram::bind_addr(&address).unwrap();
        socket.set_nonblocking(true).unwrap();
        let (socket, name) = (above(socket), format!("@{name}").into());
        Self { socket, name, max, stored: Vec::new(), notifications: Vec::new() }
    }

    /// Handles messages that are there, at most so many. Returns whether there was one.
    pub fn handle(&mut self, most: usize) -> bool {
        self.stored.retain(|stored| !stored.is_polled || !has_hung_up(&stored.fd));
        (0..most).take_while(|_| self.handle_one()).count() > 0
    }

    fn handle_one(&mut self) -> bool {
        let mut bytes = [0; 4096];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let iov = &mut [IoSliceMut::new(&mut bytes)];
        let Ok(received) = recvmsg(&self.socket, iov, &mut control, RecvFlags::CMSG_CLOEXEC) else {
            return false;
        };
        let text = std::str::from_utf8(&bytes[..received.bytes]).unwrap();
        let name = text.lines().find_map(|line| line.strip_prefix("FDNAME="));
        let fds = control.drain().filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(fds) => Some(fds),
            _ => None,
        });
        let fds: Vec<_> = fds.flatten().collect();
        if text.contains("FDSTORE=1\n") {
            let is_polled = !text.contains("FDPOLL=0\n");
            for fd in fds {
                let name = name.unwrap_or("stored").into();
                self.store(Stored { name, fd: above(fd), is_polled });
            }
        } else if text.contains("FDSTOREREMOVE=1\n") {
            self.stored.retain(|stored| Some(&*stored.name) != name);
        }
        self.notifications.extend(text.lines().map(String::from));
        true
    }

    /// As service_add_fd_store() of systemd: a file that is stored already is not stored again.
    fn store(&mut self, new: Stored) {
        let inode = |fd: &OwnedFd| fstat(fd).map(|stat| (stat.st_dev, stat.st_ino)).unwrap();
        // The two ends of a pipe have one inode, but the proxy never stores both.
        let is_stored = self.stored.iter().any(|stored| inode(&stored.fd) == inode(&new.fd));
        if !is_stored && self.stored.len() < self.max {
            self.stored.insert(0, new);
        }
    }

    /// Another reference to what is stored under a name.
    pub fn get(&self, name: &str) -> Option<OwnedFd> {
        let stored = self.stored.iter().find(|stored| stored.name.ends_with(name))?;
        Some(stored.fd.try_clone().unwrap())
    }

    /// The names of what is stored.
    pub fn names(&self) -> HashSet<&str> {
        self.stored.iter().map(|stored| &*stored.name).collect()
    }

    /// Handles what the previous process has sent, and passes sockets and the store to the next.
    pub fn pass<'a>(
        &mut self,
        sockets: impl Iterator<Item = (String, &'a OwnedFd)>,
    ) -> Vec<PassedFd> {
        self.handle(usize::MAX);
        self.notifications.clear();
        let passed = |name: &str, fd: &OwnedFd| {
            let fd = rustix::io::fcntl_dupfd_cloexec(fd.as_fd(), 3).unwrap();
            PassedFd { fd, name: name.into() }
        };
        let stored = self.stored.iter().map(|stored| passed(&stored.name, &stored.fd));
        sockets.map(|(name, fd)| passed(&name, fd)).chain(stored).collect()
    }
}

fn has_hung_up(fd: &OwnedFd) -> bool {
    let mut fds = [PollFd::new(fd, PollFlags::empty())];
    poll(&mut fds, Some(&Timespec::default())).is_ok_and(|found| found > 0)
}
