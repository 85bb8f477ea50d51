//! The sockets that are passed to this process.
//!
//! systemd passes them with `LISTEN_PID`, `LISTEN_FDS` and `LISTEN_FDNAMES` (sd_listen_fds(3)).
//! `StandardInput=socket` (systemd.exec(5)) and inetd pass one socket as standard input.

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

/// A passed descriptor and its name.
#[derive(Debug)]
pub struct PassedFd {
    /// The descriptor, close-on-exec.
    pub fd: OwnedFd,
    /// `FileDescriptorName=`, or the name of the socket unit.
    pub name: String,
}

/// A socket that was passed as standard input.
#[derive(Debug)]
pub struct Stdin {
    /// The socket, named [`STDIN`].
    pub socket: PassedFd,
    /// Whether standard error was this socket, so that the client would read every message.
    pub was_stderr: bool,
}

/// Takes the sockets that systemd passed, and removes the variables from the environment.
///
/// Otherwise a child would take the sockets for its own.
///
/// # Errors
/// A line for the log on variables without sense, or on descriptors that are not open.
///
/// # Safety
/// To be called once, as the first thing in `main`: no other thread may use the environment, and
/// nothing else may own the descriptors from 3 on.
pub unsafe fn take_passed_fds() -> Result<Vec<PassedFd>, String> {
    // Read separately: names that are meant for another process must not fail the start.
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
    let passed = fds.into_iter().map(|fd| PassedFd {
        // SAFETY: listen_fds() has found it open and returns each number once. The caller promises
        // that nothing else owns it.
        fd: unsafe { OwnedFd::from_raw_fd(fd) },
        name: names.next().filter(|name| !name.is_empty()).unwrap_or("unknown").into(),
    });
    Ok(passed.collect())
}

/// Takes the stream socket on standard input, if it has an address.
///
/// Connections of clients and listeners have an address. The ends of a socketpair(2), by which many
/// programs run others, have none. /dev/null replaces standard input, and standard output and error
/// where they are the same socket.
pub fn take_stdin() -> Option<Stdin> {
    let is_stream = sockopt::socket_type(stdin()).is_ok_and(|found| found == SocketType::STREAM);
    let address = SockRef::from(&stdin()).local_addr().ok()?;
    if !is_stream || Address::from_sockaddr(&address) == Address::Unnamed {
        return None;
    }
    let stdin_id = FileId::of(stdin()).ok();
    let is_stdin = |fd: BorrowedFd<'_>| stdin_id.is_some() && FileId::of(fd).ok() == stdin_id;
    let (was_stdout, was_stderr) = (is_stdin(stdout()), is_stdin(stderr()));
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

/// Removes the descriptors that match from `passed`, and returns them.
pub fn take_matching(
    passed: &mut Vec<PassedFd>,
    matches: impl Fn(&PassedFd) -> bool,
) -> Vec<PassedFd> {
    let (matching, others) = passed.drain(..).partition(matches);
    *passed = others;
    matching
}

/// Marks every descriptor from 3 on close-on-exec, including those that this process does not know.
///
/// # Errors
/// /proc is not mounted.
pub fn set_cloexec_all() -> io::Result<()> {
    for entry in fs::read_dir("/proc/self/fd")? {
        let number = entry?.file_name();
        if let Some(fd @ 3..) = number.to_str().and_then(|number| number.parse().ok()) {
            // SAFETY: the call only sets a flag, whatever owns the descriptor. For a number that is
            // not open any more it fails with EBADF.
            let fd = unsafe { BorrowedFd::borrow_raw(fd) };
            let _ = fcntl_setfd(fd, FdFlags::CLOEXEC);
        }
    }
    Ok(())
}

/// The name of a socket that was passed as standard input.
pub const STDIN: &str = "stdin";
