//! Listening sockets that the previous process opened, and the socket files of `--listen=/path`.

use std::cell::Cell;
use std::fs;
use std::io;
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::net::connect_unspec;
use socket2::SockRef;

use crate::socket::address::Address;
use crate::socket::file_id::FileId;

/// A listening socket that the previous process opened.
#[derive(Debug)]
pub struct StoredListener {
    pub fd: OwnedFd,
    /// The socket file.
    pub file: Option<FileId>,
}

impl StoredListener {
    pub fn address(&self) -> Option<Address> {
        let address = SockRef::from(&self.fd).local_addr();
        address.ok().map(|address| Address::from_sockaddr(&address))
    }

    /// Returns whether clients can connect: the socket file, if any, is still at its path.
    pub fn is_reachable(&self) -> bool {
        self.file.is_none() || self.socket_file().is_some()
    }

    /// Ends the listener, although the descriptor store may keep it open, and removes its file.
    pub fn close(self) {
        if let Some(file) = self.socket_file() {
            file.unlinks_on_drop.set(true);
        }
        let _ = SockRef::from(&self.fd).shutdown(Shutdown::Both);
    }

    /// Lets a UDP socket have an address of the same port, though the store may keep this one open:
    /// shutdown(2) does not free its address.
    pub fn share_address(&self) -> io::Result<()> {
        let socket = SockRef::from(&self.fd);
        socket.set_reuse_address(true)?;
        let Some(mut peer) = socket.local_addr()?.as_socket() else { return Ok(()) };
        peer.set_port(DISCARD);
        // From now on the kernel gives it only what comes from there.
        socket.connect(&peer.into())
    }

    /// Takes [`StoredListener::share_address`] back: the process that called it has not started.
    pub fn take_address(&self) -> io::Result<()> {
        connect_unspec(&self.fd)?;
        SockRef::from(&self.fd).set_reuse_address(false)
    }

    /// Returns the socket file, if it is still at its path.
    pub fn socket_file(&self) -> Option<SocketFile> {
        SocketFile::at(self.address()?.path()?).ok().filter(|found| Some(found.id) == self.file)
    }
}

/// The port of the discard service (RFC 863), from which nothing is sent.
const DISCARD: u16 = 9;

/// A socket file of this program.
#[derive(Debug)]
pub struct SocketFile {
    path: PathBuf,
    pub id: FileId,
    /// Whether dropping this removes the file, unless another file has taken its place.
    pub unlinks_on_drop: Cell<bool>,
}

impl SocketFile {
    pub fn at(path: &Path) -> io::Result<Self> {
        Ok(Self { id: FileId::at(path)?, path: path.into(), unlinks_on_drop: Cell::new(false) })
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if self.unlinks_on_drop.get() && FileId::at(&self.path).is_ok_and(|id| id == self.id) {
            let _ = fs::remove_file(&self.path);
        }
    }
}
