//! The sockets systemd passes: `LISTEN_PID`, `LISTEN_FDS`, `LISTEN_FDNAMES` (sd_listen_fds(3)), or
//! standard input (`StandardInput=socket` in systemd.exec(5), and inetd).

use std::env;
use std::fs::{self, OpenOptions};
use std::io;
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd};

use rustix::io::{FdFlags, fcntl_dupfd_cloexec, fcntl_setfd};
use rustix::net::{SocketType, sockopt};
use rustix::stdio::{dup2_stderr, dup2_stdin, dup2_stdout, stderr, stdin, stdout};
use socket2::SockRef;

use crate::socket::address::Address;
use crate::socket::file_id::FileId;

/// A descriptor that was passed, and the name it was given.
#[derive(Debug)]
pub struct PassedFd {
    /// The descriptor, close-on-exec.
    pub fd: OwnedFd,
    /// `FileDescriptorName=`, or the name of the socket unit.
    pub name: String,
}

/// The name of a socket that was passed as standard input.
pub const STDIN: &str = "stdin";

/// A socket that was passed as standard input.
#[derive(Debug)]
pub struct Stdin {
    /// The socket, named [`STDIN`].
    pub socket: PassedFd,
    /// Standard error was the same socket: whatever is written there, a client would read.
    pub was_stderr: bool,
}

/// Removes the descriptors that match, and returns them.
pub fn take_matching(
    passed: &mut Vec<PassedFd>,
    matches: impl Fn(&PassedFd) -> bool,
) -> Vec<PassedFd> {
    let (matching, others) = passed.drain(..).partition(matches);
    *passed = others;
    matching
}

/// Takes the stream socket on standard input, if there is one with an address of its own: that of an
/// accepted connection or of a listener, while the two ends of a socketpair(2), by which many
/// programs run others, have none. In its place, and in place of standard output and error where
/// those are the same socket, comes /dev/null.
pub fn take_stdin() -> Option<Stdin> {
    let is_stream = sockopt::socket_type(stdin()).is_ok_and(|it| it == SocketType::STREAM);
    let address = SockRef::from(&stdin()).local_addr().ok();
    if !is_stream || address.is_none_or(|it| Address::from_sockaddr(&it) == Address::Unix(None)) {
        return None;
    }
    let stdin_id = FileId::of(stdin()).ok();
    let was = |fd: BorrowedFd<'_>| stdin_id.is_some() && FileId::of(fd).ok() == stdin_id;
    let (was_stdout, was_stderr) = (was(stdout()), was(stderr()));
    let fd = fcntl_dupfd_cloexec(stdin(), 3).ok()?;
    if let Ok(null) = OpenOptions::new().read(true).write(true).open("/dev/null") {
        let _ = dup2_stdin(&null);
        if was_stdout {
            let _ = dup2_stdout(&null);
        }
        if was_stderr {
            let _ = dup2_stderr(&null);
        }
    }
    Some(Stdin { socket: PassedFd { fd, name: STDIN.into() }, was_stderr })
}

/// Marks every descriptor from 3 on close-on-exec, those included that this process was given
/// without knowing of them.
///
/// # Errors
/// When /proc is not there to list them.
pub fn set_cloexec_all() -> io::Result<()> {
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
pub unsafe fn take_passed_fds() -> Result<Vec<PassedFd>, String> {
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
        .map(|fd| PassedFd {
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
