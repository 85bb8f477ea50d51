//! A table of descriptors for each thread, so that a seed can be held to what it leaves open. In it
//! the numbers below [`ABOVE`] are those of the program.

use std::fs;
use std::os::fd::{AsFd, OwnedFd, RawFd};
use std::sync::OnceLock;

use rustix::io::fcntl_dupfd_cloexec;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Where the simulation's own descriptors begin.
pub const ABOVE: RawFd = 1024;

/// Opens what all threads share. To be called before the first of them starts.
pub fn prepare() {
    let maximum = getrlimit(Resource::Nofile).maximum;
    setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }).unwrap();
    // The pipe behind tokio's signal handlers.
    drop(tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap());
    let last = (0..ABOVE).rfind(|fd| is_open(*fd)).unwrap();
    FIRST.set(last + 1).unwrap();
}

/// The first number that threads do not share.
pub fn first() -> RawFd {
    *FIRST.get().expect("prepare() was called")
}

/// Gives the calling thread a table of its own.
pub fn own_table() {
    // SAFETY: what the thread owns so far it never uses.
    let result = unsafe {
        let (first, last) = (first() as u32, u32::MAX);
        libc::syscall(libc::SYS_close_range, first, last, libc::CLOSE_RANGE_UNSHARE)
    };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
}

/// Moves a descriptor of the simulation's out of the way of the program's.
pub fn above(fd: impl AsFd) -> OwnedFd {
    fcntl_dupfd_cloexec(fd, ABOVE).unwrap()
}

pub fn is_open(fd: RawFd) -> bool {
    // SAFETY: the call only looks.
    unsafe { libc::fcntl(fd, libc::F_GETFD) >= 0 }
}

/// The open descriptors of the thread, and what they refer to.
pub fn open() -> Vec<String> {
    let entries = fs::read_dir("/proc/thread-self/fd").unwrap().map(|entry| entry.unwrap().path());
    let describe = |path: std::path::PathBuf| {
        let target = fs::read_link(&path).ok()?;
        Some(format!("{} -> {}", path.display(), target.display()))
    };
    let mut open: Vec<_> = entries.filter_map(describe).collect();
    // The directory itself.
    open.retain(|entry| !entry.ends_with("/fd"));
    open.sort();
    open
}

static FIRST: OnceLock<RawFd> = OnceLock::new();
