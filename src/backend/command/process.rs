//! A run of COMMAND, as the proxy sees it: started, ended, gone.
//!
//! The proxy's side of the socket to the [`guard`](crate::backend::command::guard): the words of COMMAND go out, later
//! [`STOP`], and the end of the bytes when the proxy is gone itself; [`Event`]s come in.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Command, ExitStatus};
use std::time::Duration;

use rustix::io::Errno;
use rustix::process::{Pid, Signal, kill_process_group};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::process::Child;
use tokio::time::sleep;

use crate::backend::command::ready::ProcessTree;
use crate::config::command::CommandLine;
use crate::runtime::dispositions::restore_dispositions;

/// This program, whatever has become of its file since it was started.
pub const THIS_PROGRAM: &str = "/proc/self/exe";

/// The name under which it is the guard.
pub const GUARD: &str = "proxyd-guard";

/// Attempts to kill what a killed guard has left, and the time between them.
const KILLS_MAX: u32 = 100;
const KILL_AGAIN: Duration = Duration::from_millis(50);

/// The byte that asks for the end of COMMAND.
pub const STOP: u8 = b'T';

/// What the guard tells: a letter and a number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// COMMAND runs; its process, which leads its group.
    Started(i32),
    /// COMMAND itself has ended, with this status (wait(2)).
    Exited(i32),
    /// Nothing is left of all it has started.
    Gone,
}

impl Event {
    const SIZE: usize = 5;

    pub fn to_bytes(self) -> [u8; Self::SIZE] {
        let (letter, number) = match self {
            Self::Started(pid) => (b'S', pid),
            Self::Exited(status) => (b'X', status),
            Self::Gone => (b'G', 0),
        };
        let [a, b, c, d] = number.to_le_bytes();
        [letter, a, b, c, d]
    }

    fn from_bytes([letter, number @ ..]: [u8; Self::SIZE]) -> io::Result<Self> {
        let number = i32::from_le_bytes(number);
        match letter {
            b'S' => Ok(Self::Started(number)),
            b'X' => Ok(Self::Exited(number)),
            b'G' => Ok(Self::Gone),
            _ => Err(io::ErrorKind::InvalidData.into()),
        }
    }
}

/// A run of COMMAND. Dropped, it is ended as if the proxy had been killed.
#[derive(Debug)]
pub struct CommandProcess {
    control: UnixStream,
    guard: Child,
    /// Whether the guard knows what to start.
    launched: bool,
    group: Option<Pid>,
}

impl CommandProcess {
    /// Starts a guard, in a process group of its own, so that a terminal's signals reach the proxy
    /// alone. It inherits standard output and error, and no other descriptor.
    ///
    /// # Errors
    /// fork(2)'s and execve(2)'s.
    pub fn start(notify: Option<&Path>) -> io::Result<Self> {
        let (control, theirs) = StdUnixStream::pair()?;
        control.set_nonblocking(true)?;
        let mut command = Command::new(THIS_PROGRAM);
        command.arg0(GUARD).stdin(OwnedFd::from(theirs)).process_group(0);
        for name in [
            "LISTEN_PID",
            "LISTEN_PIDFDID",
            "LISTEN_FDS",
            "LISTEN_FDNAMES",
            "NOTIFY_SOCKET",
            "WATCHDOG_PID",
            "WATCHDOG_USEC",
        ] {
            command.env_remove(name);
        }
        if let Some(path) = notify {
            command.env("NOTIFY_SOCKET", path);
        }
        restore_dispositions(&mut command);
        let guard = tokio::process::Command::from(command).spawn()?;
        Ok(Self { control: UnixStream::from_std(control)?, guard, launched: false, group: None })
    }

    /// Has the guard start COMMAND, with this soft limit on descriptors, and says who will speak
    /// for it.
    ///
    /// # Errors
    /// When the guard fails; it has said why.
    pub async fn launch(
        &mut self,
        command: &CommandLine,
        limit: Option<u64>,
    ) -> io::Result<ProcessTree> {
        let mut words = vec![limit.map_or_else(OsString::new, |limit| limit.to_string().into())];
        words.extend(command.words.iter().cloned());
        let text = words.join(OsStr::new("\0"));
        let length = u32::try_from(text.len()).map_err(|_| Errno::TOOBIG)?;
        self.control.write_all(&length.to_le_bytes()).await?;
        self.control.write_all(text.as_bytes()).await?;
        self.launched = true;
        self.event().await?;
        let guard = self.guard.id().and_then(|pid| Pid::from_raw(pid.try_into().ok()?));
        let tree = self.group.zip(guard).map(|(group, guard)| ProcessTree { group, guard });
        tree.ok_or_else(|| io::Error::other("its guard has ended"))
    }

    /// Waits for the end of COMMAND itself: how it ended, or `None` when its guard did first.
    pub async fn exited(&mut self) -> Option<ExitStatus> {
        match self.event().await {
            Ok(Event::Exited(status)) => Some(ExitStatus::from_raw(status)),
            _ => None,
        }
    }

    /// Ends COMMAND: SIGTERM to its process group, and SIGKILL after 10 s; then the same for what has
    /// left the group, with 3 s in between. Waits until nothing is left.
    pub async fn stop(mut self) {
        if self.launched {
            // A guard that has ended is seen below.
            let _ = self.control.write_all(&[STOP]).await;
            let gone = loop {
                match self.event().await {
                    Ok(Event::Gone) => break true,
                    Ok(_) => {}
                    Err(_) => break false,
                }
            };
            if !gone {
                self.kill().await;
            }
        }
        drop(self.control);
        let _ = self.guard.wait().await;
    }

    /// Without its guard COMMAND is killed by the kernel, and what it started by us.
    async fn kill(&mut self) {
        let Some(group) = self.group else { return };
        tracing::error!("The guard of COMMAND was killed, killing COMMAND's process group.");
        for _ in 0..KILLS_MAX {
            if kill_process_group(group, Signal::KILL).is_err() {
                break;
            }
            sleep(KILL_AGAIN).await;
        }
    }

    /// The next event. It may be dropped while it waits: the guard sends an event at once, and so
    /// it is received.
    async fn event(&mut self) -> io::Result<Event> {
        let mut bytes = [0; Event::SIZE];
        self.control.read_exact(&mut bytes).await?;
        let event = Event::from_bytes(bytes)?;
        if let Event::Started(pid) = event {
            self.group = Pid::from_raw(pid);
        }
        Ok(event)
    }
}
