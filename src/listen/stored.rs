//! Listening sockets that the previous process opened, and the socket files of `--listen=/path`.

use std::cell::Cell;
use std::fs;
use std::io;
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

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

    /// Returns the socket and its file. A start that fails leaves the file at its path.
    pub fn into_parts(self) -> (OwnedFd, Option<SocketFile>) {
        let file = self.socket_file();
        (self.fd, file)
    }

    /// Ends the listener, although the descriptor store may keep it open, and removes its file.
    pub fn close(self) {
        if let Some(file) = self.socket_file() {
            file.unlink_on_drop(true);
        }
        let _ = SockRef::from(&self.fd).shutdown(Shutdown::Both);
    }

    /// Returns the socket file, if it is still at its path.
    fn socket_file(&self) -> Option<SocketFile> {
        SocketFile::at(self.address()?.path()?).ok().filter(|found| Some(found.id) == self.file)
    }
}

/// A socket file of this program.
///
/// [`SocketFile::unlink_on_drop`] decides whether dropping this removes the file. A file that has
/// taken its place stays.
#[derive(Debug)]
pub struct SocketFile {
    path: PathBuf,
    pub id: FileId,
    unlinks: Cell<bool>,
}

impl SocketFile {
    pub fn at(path: &Path) -> io::Result<Self> {
        Ok(Self { id: FileId::at(path)?, path: path.into(), unlinks: Cell::new(false) })
    }

    pub fn unlink_on_drop(&self, unlinks: bool) {
        self.unlinks.set(unlinks);
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if self.unlinks.get() && FileId::at(&self.path).is_ok_and(|id| id == self.id) {
            let _ = fs::remove_file(&self.path);
        }
    }
}
