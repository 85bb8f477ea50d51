//! One run of COMMAND, as the proxy sees it, through the guard's socket.
//!
//! The proxy sends COMMAND's words to the [guard process](crate::backend::command::guard),
//! and later [`FREEZE`], [`THAW`] and [`STOP`]. The guard sends [`Event`]s, and exits when no
//! process of COMMAND is left. When the proxy is gone, the guard reads the end of the stream.

use std::ffi::OsStr;
use std::fmt;
use std::future::poll_fn;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::pin::pin;
use std::process::{Command, ExitStatus};
use std::task::{Context, Poll};

use rustix::io::Errno;
use rustix::process::{Pid, Resource, Rlimit, getrlimit, prlimit};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::process::Child;

use crate::backend::command::process_tree::ProcessTree;
use crate::backend::command::terminate::kill_group;
use crate::backend::process_group::isolate;
use crate::config::command::CommandLine;

/// One run of COMMAND. Dropping it ends COMMAND as if the proxy had been killed.
#[derive(Debug)]
pub struct CommandProcess {
    control: UnixStream,
    guard: Box<dyn GuardProcess>,
    /// Whether the guard has COMMAND's words.
    is_launched: bool,
    group: Option<Pid>,
}

/// A guard that was started.
pub trait GuardProcess: fmt::Debug {
    /// Returns the process ID, or `None` once it was reaped.
    fn id(&self) -> Option<u32>;

    /// Waits until it exits.
    fn poll_exit(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<ExitStatus>>;
}

impl GuardProcess for Child {
    fn id(&self) -> Option<u32> {
        Self::id(self)
    }

    fn poll_exit(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<ExitStatus>> {
        pin!(self.wait()).poll(cx)
    }
}

/// Starts a guard with this socket to the proxy, and with this `$NOTIFY_SOCKET`: [`start_guard`]
/// or, in a simulation, another function.
pub type StartGuard = fn(OwnedFd, Option<&Path>) -> io::Result<Box<dyn GuardProcess>>;

/// Starts a guard, in a process group of its own: signals of a terminal reach the proxy alone. The
/// guard inherits standard output, standard error, and no other descriptor.
///
/// # Errors
/// Those of fork(2) and execve(2).
pub fn start_guard(control: OwnedFd, notify: Option<&Path>) -> io::Result<Box<dyn GuardProcess>> {
    let mut command = Command::new(THIS_PROGRAM);
    command.arg0(GUARD).stdin(control);
    isolate(&mut command);
    command.envs(notify.map(|path| ("NOTIFY_SOCKET", path)));
    Ok(Box::new(tokio::process::Command::from(command).spawn()?))
}

impl CommandProcess {
    /// Starts a guard.
    ///
    /// # Errors
    /// socketpair(2)'s, and those of `start_guard`.
    pub fn start(start_guard: StartGuard, notify: Option<&Path>) -> io::Result<Self> {
        let (control, guard_side) = StdUnixStream::pair()?;
        control.set_nonblocking(true)?;
        let guard = start_guard(guard_side.into(), notify)?;
        Ok(Self { control: UnixStream::from_std(control)?, guard, is_launched: false, group: None })
    }

    /// Asks the guard to start COMMAND with this soft limit on descriptors. Returns COMMAND's
    /// processes.
    ///
    /// # Errors
    /// A failure of the guard, which has logged the reason.
    pub async fn launch(
        &mut self,
        command: &CommandLine,
        fd_limit: Option<u64>,
    ) -> io::Result<ProcessTree> {
        let guard = self.guard.id().and_then(|pid| Pid::from_raw(pid.try_into().ok()?));
        if let (Some(_), Some(limit)) = (guard, fd_limit) {
            // The hard limit may have been lowered since the start.
            let maximum = getrlimit(Resource::Nofile).maximum;
            let current = Some(maximum.map_or(limit, |maximum| limit.min(maximum)));
            prlimit(guard, Resource::Nofile, Rlimit { current, maximum })?;
        }
        let text = command.words.join(OsStr::new("\0"));
        let length = u32::try_from(text.len()).map_err(|_| Errno::TOOBIG)?;
        self.control.write_all(&length.to_le_bytes()).await?;
        self.control.write_all(text.as_bytes()).await?;
        self.is_launched = true;
        self.event().await?;
        let tree = self.group.zip(guard).map(|(group, guard)| ProcessTree { group, guard });
        tree.ok_or_else(|| io::Error::other("its guard has ended"))
    }

    /// Waits until COMMAND itself exits. Returns its status, or `None` if the guard ended first.
    pub async fn exited(&mut self) -> Option<ExitStatus> {
        match self.event().await {
            Ok(Event::Exited(status)) => Some(ExitStatus::from_raw(status)),
            _ => None,
        }
    }

    /// Asks the guard to stop COMMAND's processes where they are (SIGSTOP), and waits for that.
    ///
    /// # Errors
    /// The status of a COMMAND that has exited, as from [`CommandProcess::exited`].
    pub async fn freeze(&mut self) -> Result<(), Option<ExitStatus>> {
        // EPIPE: the guard has ended, which the read below shows as well.
        let _ = self.control.write_all(&[FREEZE]).await;
        match self.event().await {
            Ok(Event::Frozen) => Ok(()),
            Ok(Event::Exited(status)) => Err(Some(ExitStatus::from_raw(status))),
            _ => Err(None),
        }
    }

    /// Asks the guard to let COMMAND's processes go on.
    pub async fn thaw(&mut self) {
        let _ = self.control.write_all(&[THAW]).await;
    }

    /// Asks the guard to stop COMMAND, and waits until none of its processes is left.
    pub async fn stop(mut self) {
        if self.is_launched {
            // EPIPE: the guard has ended, which the read below shows as well.
            let _ = self.control.write_all(&[STOP]).await;
            while self.event().await.is_ok() {}
        }
        drop(self.control);
        let has_stopped =
            poll_fn(|cx| self.guard.poll_exit(cx)).await.is_ok_and(|status| status.success());
        if let (false, Some(group)) = (has_stopped, self.group) {
            kill_group(group).await;
        }
    }

    /// Waits for the next event, and notes COMMAND's process group. Cancelling loses nothing: the
    /// guard writes an event by one write(2), so a read gets the whole of it.
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

/// A message of the guard: a letter and a number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// COMMAND runs as this process, which leads its group.
    Started(i32),
    /// COMMAND itself has exited with this status (wait(2)).
    Exited(i32),
    /// The processes of COMMAND are stopped.
    Frozen,
}

impl Event {
    const SIZE: usize = 5;

    pub fn to_bytes(self) -> [u8; Self::SIZE] {
        let (letter, number) = match self {
            Self::Started(pid) => (b'S', pid),
            Self::Exited(status) => (b'X', status),
            Self::Frozen => (b'F', 0),
        };
        let [a, b, c, d] = number.to_le_bytes();
        [letter, a, b, c, d]
    }

    fn from_bytes([letter, number @ ..]: [u8; Self::SIZE]) -> io::Result<Self> {
        let number = i32::from_le_bytes(number);
        match letter {
            b'S' => Ok(Self::Started(number)),
            b'X' => Ok(Self::Exited(number)),
            b'F' => Ok(Self::Frozen),
            _ => Err(io::ErrorKind::InvalidData.into()),
        }
    }
}

/// The running program, even if its file was replaced since the start.
pub const THIS_PROGRAM: &str = "/proc/self/exe";

/// `argv[0]` of the guard.
pub const GUARD: &str = "proxyd-guard";

/// The bytes that ask the guard to freeze COMMAND, to thaw it, and to stop it.
pub const FREEZE: u8 = b'F';
pub const THAW: u8 = b'C';
pub const STOP: u8 = b'T';
