//! The sockets systemd passes: `LISTEN_PID`, `LISTEN_FDS`, `LISTEN_FDNAMES` (sd_listen_fds(3)).
//!
//! One of the two files with unsafe code (the other is `socket`).

use std::env;
use std::fs;
use std::io;
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd};

use rustix::io::{FdFlags, fcntl_setfd};

/// A descriptor that was passed, and the name it was given.
#[derive(Debug)]
pub struct Inherited {
    /// The descriptor, close-on-exec.
    pub fd: OwnedFd,
    /// `FileDescriptorName=`, or the name of the socket unit.
    pub name: String,
}

/// Marks every descriptor from 3 on close-on-exec, those included that this process was given
/// without knowing of them.
///
/// # Errors
/// When /proc is not there to list them.
pub fn hide_descriptors() -> io::Result<()> {
    for entry in fs::read_dir("/proc/self/fd")? {
        let number = entry?.file_name();
        if let Some(fd @ 3..) = number.to_str().and_then(|number| number.parse().ok()) {
            // SAFETY: whoever owns it, it is only given a flag; a number that is not open any more
            // is EBADF.
            let fd = unsafe { BorrowedFd::borrow_raw(fd) };
            let _ = fcntl_setfd(fd, FdFlags::CLOEXEC);
        }
    }
    Ok(())
}

/// Takes what was passed to this process, and takes the variables out of the environment, so that
/// no child believes the sockets to be its own.
///
/// # Errors
/// One line about variables that don't make sense, or descriptors that aren't open.
///
/// # Safety
/// To be called once, as the first thing in `main`: no other thread may use the environment, and
/// nothing else may own the descriptors from 3 on.
pub unsafe fn take_inherited() -> Result<Vec<Inherited>, String> {
    // Read apart from the descriptors: names that were meant for another process are no error.
    let names = env::var("LISTEN_FDNAMES").unwrap_or_default();
    let fds = sd_notify::listen_fds().map(Vec::from_iter);
    for name in ["LISTEN_PID", "LISTEN_PIDFDID", "LISTEN_FDS", "LISTEN_FDNAMES"] {
        #[expect(clippy::disallowed_methods, reason = "the one place where it is safe")]
        // SAFETY: the caller promises that there is no other thread.
        unsafe {
            env::remove_var(name);
        }
    }
    let fds = fds.map_err(|error| format!("Failed to receive sockets from parent: {error}."))?;
    let mut names = names.split(':');
    Ok(fds
        .into_iter()
        .map(|fd| Inherited {
            // SAFETY: listen_fds() has found it open, and the caller promises that nobody else
            // owns it; each number comes once.
            fd: unsafe { OwnedFd::from_raw_fd(fd) },
            name: match names.next() {
                None | Some("") => "unknown".into(),
                Some(name) => name.into(),
            },
        })
        .collect())
}
