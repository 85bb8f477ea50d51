//! The identity of files and sockets.

use std::io;
use std::os::fd::AsFd;
use std::path::Path;

use rustix::fs::{Stat, fstat, lstat};
use serde::{Deserialize, Serialize};

/// The device and inode of a file (stat(2)). They stay the same wherever its descriptor is sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct FileId {
    pub device: u64,
    pub inode: u64,
}

impl FileId {
    pub fn of(fd: impl AsFd) -> io::Result<Self> {
        Ok(Self::from_stat(&fstat(fd)?))
    }

    /// Returns the identity of the file at `path`, without following a symbolic link.
    pub fn at(path: &Path) -> io::Result<Self> {
        Ok(Self::from_stat(&lstat(path)?))
    }

    pub fn from_stat(stat: &Stat) -> Self {
        Self { device: stat.st_dev, inode: stat.st_ino }
    }
}
