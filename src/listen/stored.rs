//! Listening sockets that the previous process opened, and the socket files of `--listen=/path`.

use std::cell::Cell;
use std::fs;
use std::io;
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use socket2::SockRef;

use crate::socket::address::Address;

/// A listening socket that the process before this one had opened.
#[derive(Debug)]
pub struct StoredListener {
    /// The socket.
    pub fd: OwnedFd,
    /// Its file, device and inode.
    pub file: Option<(u64, u64)>,
}

impl StoredListener {
    /// Where it listens.
    pub fn address(&self) -> Option<Address> {
        let address = SockRef::from(&self.fd).local_addr();
        address.ok().map(|address| Address::from_sockaddr(&address))
    }

    /// Its file, if that is still there.
    fn socket_file(&self) -> Option<SocketFile> {
        let (Some(Address::Unix(Some(name))), Some(file)) = (self.address(), self.file) else {
            return None;
        };
        let path = name.path()?;
        (identity(path).ok()? == file).then(|| SocketFile::of(path).ok()).flatten()
    }

    /// Whether clients find it.
    pub fn is_there(&self) -> bool {
        let file = self.socket_file().inspect(|file| file.set_stays(true));
        self.file.is_none() || file.is_some()
    }

    /// Returns the socket and its file, which stays in its place until the listener owns it: a start that
    /// fails leaves it.
    pub fn into_parts(self) -> (OwnedFd, Option<SocketFile>) {
        let file = self.socket_file().inspect(|file| file.set_stays(true));
        (self.fd, file)
    }

    /// Listens no more, wherever else it is kept, and takes its file along.
    pub fn end(self) {
        drop(self.socket_file());
        let _ = SockRef::from(&self.fd).shutdown(Shutdown::Both);
    }
}

/// A socket file made here: removed at the end, unless somebody has put another in its place.
#[derive(Debug)]
pub struct SocketFile {
    path: PathBuf,
    identity: (u64, u64),
    stays: Cell<bool>,
}

impl SocketFile {
    /// Notes which file it is.
    pub fn of(path: &Path) -> io::Result<Self> {
        Ok(Self { identity: identity(path)?, path: path.into(), stays: Cell::new(false) })
    }
}

impl SocketFile {
    /// Its device and inode.
    pub fn identity(&self) -> (u64, u64) {
        self.identity
    }

    /// Decides whether the file stays when this is dropped.
    pub fn set_stays(&self, stays: bool) {
        self.stays.set(stays);
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if !self.stays.get() && identity(&self.path).is_ok_and(|identity| identity == self.identity)
        {
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    let metadata = fs::symlink_metadata(path)?;
    Ok((metadata.dev(), metadata.ino()))
}
