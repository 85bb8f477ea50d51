//! The process between the proxy and COMMAND: nothing that COMMAND starts outlives the proxy.
//!
//! A parent-death signal reaches COMMAND itself and none of its children, so a killed proxy would
//! leave those behind. The guard is this program again, under another name and without anything of
//! the proxy's but one socket. It is the subreaper of all that COMMAND starts: orphans become its
//! children (`PR_SET_CHILD_SUBREAPER`), so it knows who is left, and ends them when the socket does.
//!
//! ```text
//! proxy --socket--> guard --fork--> launch --exec--> COMMAND
//! ```
//!
//! `launch` is the moment between fork and exec, in a program of its own: what is to be done there
//! needs no unsafe code then. It asks to be killed when the guard is, which lasts beyond the exec.
//!
//! The proxy sends the words of COMMAND, later [`STOP`], and the end of its bytes when it is gone
//! itself. The guard sends [`Event`]s.

#![forbid(unsafe_code)]

use std::convert::Infallible;
use std::env;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};
use std::time::Duration;

use rustix::io::Errno;
use rustix::process::{
    Pid, Resource, Rlimit, Signal, WaitOptions, getpid, getppid, getrlimit, kill_process,
    kill_process_group, set_child_subreaper, set_parent_process_death_signal, setrlimit,
    test_kill_process_group, wait,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::process::Child;
use tokio::signal::unix::{self, SignalKind, signal};
use tokio::time::{Instant, sleep};

use crate::activation::hide_descriptors;
use crate::command::CommandLine;
use crate::logging::in_words;
use crate::ready::Family;

/// This program, whatever has become of its file since it was started.
const THIS_PROGRAM: &str = "/proc/self/exe";

/// The names under which it is the guard, and the moment before COMMAND.
const GUARD: &str = "proxyd-guard";
const LAUNCH: &str = "proxyd-launch";

/// From SIGTERM to SIGKILL, when it is the proxy that stops COMMAND.
const GRACE: Duration = Duration::from_secs(10);

/// The same when the proxy is gone, whose next instance may be waiting for the place, and for what
/// has outlived its group.
const SHORT_GRACE: Duration = Duration::from_secs(3);

/// Between two looks at who is left, where the kernel says nothing.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// Attempts to kill what does not end, before it is given up: a process that waits for a broken
/// disk, or that has become another user's.
const KILLS_MAX: u32 = 100;

/// The byte that asks for the end of COMMAND.
const STOP: u8 = b'T';

/// What the guard tells: a letter and a number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Event {
    /// COMMAND runs; its process, which leads its group.
    Started(i32),
    /// COMMAND itself has ended, with this status (wait(2)).
    Exited(i32),
    /// Nothing is left of all it has started.
    Gone,
}

impl Event {
    const SIZE: usize = 5;

    fn to_bytes(self) -> [u8; Self::SIZE] {
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

// The proxy's side.

/// A run of COMMAND. Dropped, it is ended, after [`SHORT_GRACE`] by force.
#[derive(Debug)]
pub struct Run {
    control: UnixStream,
    guard: Child,
    /// Whether the guard knows what to start.
    launched: bool,
    group: Option<Pid>,
}

impl Run {
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
    ) -> io::Result<Family> {
        let mut words = vec![limit.map_or_else(OsString::new, |limit| limit.to_string().into())];
        words.extend(command.words.iter().cloned());
        let text = words.join(OsStr::new("\0"));
        let length = u32::try_from(text.len()).map_err(|_| Errno::TOOBIG)?;
        self.control.write_all(&length.to_le_bytes()).await?;
        self.control.write_all(text.as_bytes()).await?;
        self.launched = true;
        self.event().await?;
        let guard = self.guard.id().and_then(|pid| Pid::from_raw(pid.try_into().ok()?));
        let family = self.group.zip(guard).map(|(group, guard)| Family { group, guard });
        family.ok_or_else(|| io::Error::other("its guard has ended"))
    }

    /// Waits for the end of COMMAND itself: how it ended, or `None` when its guard did first.
    pub async fn exited(&mut self) -> Option<ExitStatus> {
        match self.event().await {
            Ok(Event::Exited(status)) => Some(ExitStatus::from_raw(status)),
            _ => None,
        }
    }

    /// Ends COMMAND: SIGTERM to its process group, and SIGKILL after 10 s; then the same for what has
    /// left the group. Waits until nothing is left.
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
        tracing::error!("The guard of COMMAND was killed, killing what it guarded.");
        for _ in 0..KILLS_MAX {
            if kill_process_group(group, Signal::KILL).is_err() {
                break;
            }
            sleep(LOOK_AGAIN).await;
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

// The guard's side.

/// What this program is beside the proxy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Started by the proxy.
    Guard,
    /// Started by the guard, to become COMMAND.
    Launch,
}

impl Role {
    /// By the name under which it was started; `None` is the proxy.
    pub fn of_this_process() -> Option<Self> {
        let name = env::args_os().next()?;
        [(GUARD, Self::Guard), (LAUNCH, Self::Launch)]
            .into_iter()
            .find_map(|(known, role)| (name == known).then_some(role))
    }

    /// Does its work, to the end.
    ///
    /// # Errors
    /// One line on what kept it from that.
    pub fn play(self) -> Result<(), String> {
        match self {
            Self::Guard => guard().map_err(|error| {
                let error = in_words(&error);
                format!("Failed to guard COMMAND: {error}.")
            }),
            Self::Launch => match launch(env::args_os().skip(1)) {
                Err(error) => Err(error),
            },
        }
    }
}

fn guard() -> io::Result<()> {
    let _ = rustix::thread::set_name(c"proxyd-guard");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        // A service manager may send these to all processes of a unit. It is the proxy that decides
        // when COMMAND ends. (Caught and not ignored: that would be inherited.)
        let _terminate = signal(SignalKind::terminate())?;
        let _interrupt = signal(SignalKind::interrupt())?;
        let _hangup = signal(SignalKind::hangup())?;
        let child_ended = signal(SignalKind::child())?;
        match Guard::start().await {
            Ok(guard) => guard.watch(child_ended).await,
            // The proxy has changed its mind, or is gone.
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {}
            Err(error) => return Err(error),
        }
        Ok(())
    })
}

/// The guard, once COMMAND runs.
struct Guard {
    control: UnixStream,
    /// COMMAND's process, which leads the group.
    command: Pid,
    /// COMMAND itself has ended.
    exited: bool,
    /// Nothing is left of its group: the number may be another's by now.
    group_gone: bool,
}

impl Guard {
    async fn start() -> io::Result<Self> {
        set_child_subreaper(Some(getpid()))?;
        let control: StdUnixStream = io::stdin().as_fd().try_clone_to_owned()?.into();
        control.set_nonblocking(true)?;
        let mut control = UnixStream::from_std(control)?;
        let length = control.read_u32_le().await?;
        let mut text = vec![0; length as usize];
        control.read_exact(&mut text).await?;
        let mut words = text.split(|&byte| byte == 0);
        let limit = words.next().unwrap_or_default();
        if let Some(limit) = std::str::from_utf8(limit).ok().and_then(|limit| limit.parse().ok()) {
            let maximum = getrlimit(Resource::Nofile).maximum;
            setrlimit(Resource::Nofile, Rlimit { current: Some(limit), maximum })?;
        }
        let child = Command::new(THIS_PROGRAM)
            .arg0(LAUNCH)
            .arg(getpid().to_string())
            .args(words.map(OsStr::from_bytes))
            .stdin(Stdio::null())
            .process_group(0)
            .spawn()?;
        let command = Pid::from_child(&child);
        let this = Self { control, command, exited: false, group_gone: false };
        this.tell(Event::Started(command.as_raw_nonzero().get()));
        Ok(this)
    }

    /// Until nothing is left of what COMMAND has started.
    async fn watch(mut self, mut child_ended: unix::Signal) {
        let mut proxy_is_gone = false;
        // When SIGKILL is due, once SIGTERM was sent.
        let mut deadline: Option<Instant> = None;
        let mut kills = 0;
        loop {
            let group_was_gone = self.group_gone;
            if !self.reap() {
                break;
            }
            if self.group_gone && !group_was_gone {
                let latest = self.terminate(SHORT_GRACE);
                deadline = Some(deadline.map_or(latest, |deadline| deadline.min(latest)));
            } else if self.exited && deadline.is_none() {
                deadline = Some(self.terminate(GRACE));
            }
            if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                if kills == KILLS_MAX {
                    tracing::error!("Something of COMMAND does not end by SIGKILL, leaving it.");
                    break;
                }
                kills += 1;
                self.signal(Signal::KILL);
            }
            let mut byte = [0];
            tokio::select! {
                _ = child_ended.recv() => {}
                read = self.control.read(&mut byte), if !proxy_is_gone => {
                    proxy_is_gone = !matches!(read, Ok(1));
                    let grace = if proxy_is_gone { SHORT_GRACE } else { GRACE };
                    deadline = Some(match deadline {
                        Some(deadline) => deadline.min(Instant::now() + grace),
                        None => self.terminate(grace),
                    });
                }
                // A process whose parent is not the guard says nothing to it when it ends.
                () = sleep(LOOK_AGAIN), if deadline.is_some() => {}
            }
        }
        self.tell(Event::Gone);
    }

    /// Takes note of who has ended; whether anybody is left.
    fn reap(&mut self) -> bool {
        let left = loop {
            match wait(WaitOptions::NOHANG) {
                Ok(Some((pid, status))) if pid == self.command => {
                    self.exited = true;
                    self.tell(Event::Exited(status.as_raw()));
                }
                Ok(Some(_)) => {}
                Ok(None) => break true,
                Err(_) => break false,
            }
        };
        self.group_gone |= self.exited && test_kill_process_group(self.command) == Err(Errno::SRCH);
        left
    }

    /// Asks them to end, also those that are stopped; when patience is over.
    fn terminate(&self, grace: Duration) -> Instant {
        self.signal(Signal::TERM);
        self.signal(Signal::CONT);
        Instant::now() + grace
    }

    /// Signals the group, or, when it is gone, those who have left it in time: orphans that are our
    /// children by now.
    fn signal(&self, signal: Signal) {
        if !self.group_gone {
            let _ = kill_process_group(self.command, signal);
            return;
        }
        for stray in children() {
            let _ = kill_process(stray, signal);
        }
    }

    /// The socket's buffer has room for all there is to tell; if nobody listens, that is seen when
    /// it is read.
    fn tell(&self, event: Event) {
        let _ = self.control.try_write(&event.to_bytes());
    }
}

fn children() -> Vec<Pid> {
    let tasks = fs::read_dir("/proc/self/task").into_iter().flatten().flatten();
    let lists = tasks.filter_map(|task| fs::read_to_string(task.path().join("children")).ok());
    lists
        .flat_map(|list| {
            let pids = list.split_whitespace().filter_map(|pid| pid.parse().ok());
            pids.filter_map(Pid::from_raw).collect::<Vec<_>>()
        })
        .collect()
}

/// Becomes COMMAND: the guard's pid, then COMMAND's words.
fn launch(mut args: impl Iterator<Item = OsString>) -> Result<Infallible, String> {
    let guard = args.next().and_then(|pid| pid.into_string().ok()?.parse().ok());
    let program = args.next().unwrap_or_default();
    let failed = |error: io::Error| {
        let error = in_words(&error);
        format!("Failed to execute COMMAND {program:?}: {error}.")
    };
    set_parent_process_death_signal(Some(Signal::KILL)).map_err(|errno| failed(errno.into()))?;
    hide_descriptors().map_err(failed)?;
    // The guard may have died before it could be asked for.
    if getppid() != guard.and_then(Pid::from_raw) {
        return Err(failed(Errno::SRCH.into()));
    }
    Err(failed(Command::new(&program).args(args).exec()))
}
