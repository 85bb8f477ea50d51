//! Where lines are written: systemd's journal, or standard error.

use std::env;
use std::io::{self, Write};
use std::os::unix::net::UnixDatagram;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::fstat;
use rustix::net::{SendFlags, SocketAddrUnix, sendto};

use crate::logging::line::Format;

/// The destination of log lines.
#[derive(Debug)]
pub enum Output {
    Stderr(Format),
    /// Opened at the start, while descriptors are free.
    Journal(UnixDatagram),
}

impl Output {
    /// Chooses the journal if standard error is connected to it, or else standard error.
    pub fn detect() -> Self {
        if is_journal_stream() {
            return Self::journal().unwrap_or(Self::Stderr(Format::Prefixed));
        }
        // systemd.exec(5): SYSTEMD_EXEC_PID is the process that systemd itself started.
        let is_started = env::var("SYSTEMD_EXEC_PID") == Ok(std::process::id().to_string());
        Self::Stderr(if is_started { Format::Prefixed } else { Format::Plain })
    }

    /// Returns the journal, if there is one that accepts entries.
    pub fn journal() -> Option<Self> {
        UnixDatagram::unbound().and_then(|socket| socket.connect(JOURNAL_SOCKET)).ok()?;
        // Not connected: a journal that was restarted has a new socket at the same path.
        UnixDatagram::unbound().ok().map(Self::Journal)
    }

    pub fn format(&self) -> Format {
        match self {
            Self::Stderr(format) => *format,
            Self::Journal(_) => Format::Journal,
        }
    }

    /// Writes a line, and waits as long as its reader does.
    pub fn write(&self, line: &[u8]) -> io::Result<()> {
        match self {
            Self::Stderr(_) => io::stderr().write_all(line),
            Self::Journal(socket) => socket.send_to(line, JOURNAL_SOCKET).map(drop),
        }
    }

    /// Writes a line unless that would wait.
    pub fn try_write(&self, line: &[u8]) -> io::Result<()> {
        match self {
            Self::Stderr(_) => {
                // A pipe that poll(2) calls writable has room for a line (PIPE_BUF in pipe(7)).
                let stderr = io::stderr();
                let mut fds = [PollFd::new(&stderr, PollFlags::OUT)];
                poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 }))?;
                if !fds[0].revents().contains(PollFlags::OUT) {
                    return Err(io::ErrorKind::WouldBlock.into());
                }
                self.write(line)
            }
            Self::Journal(socket) => {
                let name = SocketAddrUnix::new(JOURNAL_SOCKET)?;
                sendto(socket, line, SendFlags::DONTWAIT | SendFlags::NOSIGNAL, &name)?;
                Ok(())
            }
        }
    }
}

/// Whether standard error is connected to the journal.
///
/// systemd.exec(5): `$JOURNAL_STREAM` names the device and inode of the stream that systemd
/// connected. After a redirection standard error is another file.
fn is_journal_stream() -> bool {
    let stderr = fstat(io::stderr()).map(|stderr| format!("{}:{}", stderr.st_dev, stderr.st_ino));
    stderr.is_ok_and(|stderr| env::var("JOURNAL_STREAM").is_ok_and(|stream| stream == stderr))
}

const JOURNAL_SOCKET: &str = "/run/systemd/journal/socket";
