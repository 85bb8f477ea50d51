//! The process between the proxy and COMMAND: nothing that COMMAND starts outlives the proxy.
//!
//! A parent-death signal reaches COMMAND itself and none of its children, so a killed proxy would
//! leave those behind. The guard is this program again, under another name and without anything of
//! the proxy's but one socket. It is the subreaper of all that COMMAND starts: orphans become its
//! children (`PR_SET_CHILD_SUBREAPER`), so it knows who is left, and ends them all.
//!
//! ```text
//! proxy --socket--> guard --fork--> launch --exec--> COMMAND
//! ```
//!
//! `launch` is the moment between fork and exec, in a program of its own: what is to be done there
//! needs no unsafe code then. It asks to be killed when the guard is, which lasts beyond the exec.
//!
//! The proxy's side of the socket, and what goes over it, is in [`run`](crate::backend::command::process).

use std::convert::Infallible;
use std::env;
use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::io::Errno;
use rustix::process::{
    Pid, Resource, Rlimit, Signal, WaitOptions, getpid, getppid, getrlimit, kill_process,
    kill_process_group, set_child_subreaper, set_parent_process_death_signal, setrlimit,
    test_kill_process_group, wait,
};
use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;
use tokio::signal::unix::{self, SignalKind, signal};
use tokio::time::{Instant, sleep};

use crate::backend::command::process::{Event, GUARD, THIS_PROGRAM};
use crate::backend::command::ready::remove_left_behind;
use crate::config::command::CommandLine;
use crate::logging::os_message;
use crate::runtime::dispositions::restore_dispositions;

/// The name under which this program is the moment before COMMAND.
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

/// What this program is beside the proxy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Helper {
    /// Started by the proxy.
    Guard,
    /// Started by the guard, to become COMMAND.
    Launch,
}

impl Helper {
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
    pub fn run(self) -> Result<(), String> {
        match self {
            Self::Guard => guard().map_err(|error| {
                let error = os_message(&error);
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
        // Of the proxy it asks something.
        let _question = signal(SignalKind::user_defined1())?;
        let child_ended = signal(SignalKind::child())?;
        let proxy_is_gone = match Guard::start().await {
            Ok(guard) => guard.watch(child_ended).await,
            // The proxy has changed its mind, or is gone.
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => true,
            Err(error) => return Err(error),
        };
        if proxy_is_gone {
            remove_left_behind();
        }
        Ok(())
    })
}

/// The guard, once COMMAND runs.
struct Guard {
    control: UnixStream,
    /// What COMMAND is called.
    name: String,
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
        let words = words.map(|word| OsString::from_vec(word.to_vec())).collect();
        let command = CommandLine { words };
        if let Some(limit) = std::str::from_utf8(limit).ok().and_then(|limit| limit.parse().ok()) {
            let maximum = getrlimit(Resource::Nofile).maximum;
            setrlimit(Resource::Nofile, Rlimit { current: Some(limit), maximum })?;
        }
        let mut launch = Command::new(THIS_PROGRAM);
        launch.arg0(LAUNCH).arg(getpid().to_string()).args(&command.words);
        launch.stdin(Stdio::null()).process_group(0);
        restore_dispositions(&mut launch);
        let child = launch.spawn()?;
        let (name, command) = (command.to_string(), Pid::from_child(&child));
        let this = Self { control, name, command, exited: false, group_gone: false };
        this.tell(Event::Started(command.as_raw_nonzero().get()));
        Ok(this)
    }

    /// Waits until nothing is left of what COMMAND has started; whether the proxy is gone, too.
    async fn watch(mut self, mut child_ended: unix::Signal) -> bool {
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
                // Of those who are left nobody has been asked.
                deadline = Some(self.terminate(SHORT_GRACE));
            } else if self.exited && deadline.is_none() {
                deadline = Some(self.terminate(GRACE));
            }
            if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                if kills == 0 {
                    tracing::warn!("{} has not stopped in time, killing it.", self.name);
                } else if kills == KILLS_MAX {
                    tracing::error!("Something of {} does not end, leaving it.", self.name);
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
        proxy_is_gone
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
        let interpreter = match error.kind() {
            io::ErrorKind::NotFound => " (or the interpreter in its first line)",
            _ => "",
        };
        let error = os_message(&error);
        format!("Failed to execute COMMAND {program:?}{interpreter}: {error}.")
    };
    set_parent_process_death_signal(Some(Signal::KILL)).map_err(|errno| failed(errno.into()))?;
    // The guard may have died before it could be asked for.
    if getppid() != guard.and_then(Pid::from_raw) {
        return Err(failed(Errno::SRCH.into()));
    }
    let mut command = Command::new(&program);
    command.args(args);
    restore_dispositions(&mut command);
    Err(failed(command.exec()))
}
