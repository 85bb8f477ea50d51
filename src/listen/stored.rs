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
    /// Its socket file.
    pub file: Option<FileId>,
}

impl StoredListener {
    /// Returns the address that it listens on.
    pub fn address(&self) -> Option<Address> {
        let address = SockRef::from(&self.fd).local_addr();
        address.ok().map(|address| Address::from_sockaddr(&address))
    }

    /// Whether clients can reach it: its socket file, if it has one, is still in its place.
    pub fn is_reachable(&self) -> bool {
        self.file.is_none() || self.socket_file(true).is_some()
    }

    /// Returns the socket and its file. The file stays in its place until the listener owns it: a start
    /// that fails leaves it.
    pub fn into_parts(self) -> (OwnedFd, Option<SocketFile>) {
        let file = self.socket_file(true);
        (self.fd, file)
    }

    /// Ends the listener wherever its descriptor is kept, and removes its file.
    pub fn close(self) {
        drop(self.socket_file(false));
        let _ = SockRef::from(&self.fd).shutdown(Shutdown::Both);
    }

    /// Returns its file, if that is still in its place.
    fn socket_file(&self, stays: bool) -> Option<SocketFile> {
        let (Some(Address::Unix(Some(name))), Some(file)) = (self.address(), self.file) else {
            return None;
        };
        let found = SocketFile::at(name.path()?, stays).ok()?;
        if found.id == file {
            return Some(found);
        }
        found.set_stays(true);
        None
    }
}

/// A socket file that the proxy made. Dropping this removes the file, unless another has taken its place.
#[derive(Debug)]
pub struct SocketFile {
    path: PathBuf,
    id: FileId,
    stays: Cell<bool>,
}

impl SocketFile {
    /// Notes which file is at `path`.
    pub fn at(path: &Path, stays: bool) -> io::Result<Self> {
        Ok(Self { id: FileId::at(path)?, path: path.into(), stays: Cell::new(stays) })
    }

    pub fn id(&self) -> FileId {
        self.id
    }

    /// Decides whether the file stays when this is dropped.
    pub fn set_stays(&self, stays: bool) {
        self.stays.set(stays);
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if !self.stays.get() && FileId::at(&self.path).is_ok_and(|id| id == self.id) {
            let _ = fs::remove_file(&self.path);
        }
    }
}
