//! The process between the proxy and COMMAND. It ensures that nothing COMMAND starts outlives the proxy.
//!
//! A parent-death signal reaches COMMAND itself but not its children, so a killed proxy would leave those
//! behind. The guard is this program again, under another name, with one socket to the proxy. It is
//! the subreaper of all processes that COMMAND starts (`PR_SET_CHILD_SUBREAPER`): orphans become its
//! children. So it knows which processes are left, and ends them all.
//!
//! ```text
//! proxy --socket--> guard --fork--> launch --exec--> COMMAND
//! ```
//!
//! `launch` is this program again, for the moment between fork(2) and execve(2): what happens there needs
//! no unsafe code then. It asks to be killed when the guard dies, which lasts beyond execve(2).
//!
//! [`process`](crate::backend::command::process) has the proxy's side of the socket, and the protocol.

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
use crate::runtime::event_loop;

/// Returns what this process is to run instead of the proxy, told from `argv[0]`: the guard, or the moment before
/// COMMAND. Both return one line on a failure.
pub fn helper() -> Option<fn() -> Result<(), String>> {
    match env::args_os().next()?.to_str()? {
        GUARD => Some(|| {
            guard().map_err(|error| format!("Failed to guard COMMAND: {}.", os_message(&error)))
        }),
        LAUNCH => Some(|| launch(env::args_os().skip(1)).map(|never| match never {})),
        _ => None,
    }
}

fn guard() -> io::Result<()> {
    let _ = rustix::thread::set_name(c"proxyd-guard");
    event_loop()?.block_on(async {
        // A service manager may send these to all processes of a unit, but the proxy decides when COMMAND
        // stops, and SIGUSR1 asks the proxy alone for a report. (They are caught and not ignored, because
        // COMMAND would inherit that.)
        let _terminate = signal(SignalKind::terminate())?;
        let _interrupt = signal(SignalKind::interrupt())?;
        let _hangup = signal(SignalKind::hangup())?;
        let _report = signal(SignalKind::user_defined1())?;
        let child_ended = signal(SignalKind::child())?;
        let proxy_is_gone = match Guard::start().await {
            Ok(guard) => guard.watch(child_ended).await,
            // The proxy dropped the run before it sent COMMAND, or is gone.
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => true,
            Err(error) => return Err(error),
        };
        if proxy_is_gone {
            remove_left_behind();
        }
        Ok(())
    })
}

/// The guard while COMMAND runs.
struct Guard {
    control: UnixStream,
    /// COMMAND's name, for messages.
    name: String,
    /// COMMAND's process, which leads the group.
    command: Pid,
    /// Whether COMMAND itself has exited.
    has_exited: bool,
    /// Whether no process of the group is left. Another group may have its number then.
    is_group_gone: bool,
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
        let (name, command) = (command.to_string(), Pid::from_child(&launch.spawn()?));
        let guard = Self { control, name, command, has_exited: false, is_group_gone: false };
        guard.send(Event::Started(command.as_raw_nonzero().get()));
        Ok(guard)
    }

    /// Waits until no process of COMMAND is left. Returns whether the proxy is gone, too.
    async fn watch(mut self, mut child_ended: unix::Signal) -> bool {
        let mut proxy_is_gone = false;
        // When SIGKILL is due, once SIGTERM was sent.
        let mut deadline: Option<Instant> = None;
        let mut kills = 0;
        loop {
            let was_group_gone = self.is_group_gone;
            if !self.reap() {
                break;
            }
            if self.is_group_gone && !was_group_gone {
                // The processes that are left were not in the group, and got no SIGTERM.
                deadline = Some(self.terminate(SHORT_GRACE));
            } else if self.has_exited && deadline.is_none() {
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
                // The kernel sends no SIGCHLD for a process whose parent is not the guard.
                () = sleep(POLL_INTERVAL), if deadline.is_some() => {}
            }
        }
        self.send(Event::Gone);
        proxy_is_gone
    }

    /// Reaps the children that have ended. Returns whether any child is left.
    fn reap(&mut self) -> bool {
        let has_children = loop {
            match wait(WaitOptions::NOHANG) {
                Ok(Some((pid, status))) if pid == self.command => {
                    self.has_exited = true;
                    self.send(Event::Exited(status.as_raw()));
                }
                Ok(Some(_)) => {}
                Ok(None) => break true,
                Err(_) => break false,
            }
        };
        self.is_group_gone |=
            self.has_exited && test_kill_process_group(self.command) == Err(Errno::SRCH);
        has_children
    }

    /// Asks COMMAND's processes to end, stopped ones included (SIGCONT). Returns when SIGKILL is due.
    fn terminate(&self, grace: Duration) -> Instant {
        self.signal(Signal::TERM);
        self.signal(Signal::CONT);
        Instant::now() + grace
    }

    /// Signals the group or, when it is gone, the orphans that had left it: they are the guard's children.
    fn signal(&self, signal: Signal) {
        if !self.is_group_gone {
            let _ = kill_process_group(self.command, signal);
            return;
        }
        for orphan in children() {
            let _ = kill_process(orphan, signal);
        }
    }

    /// Sends an event. The socket's buffer has room for all of them. EPIPE: the proxy is gone, which the
    /// next read shows as well.
    fn send(&self, event: Event) {
        let _ = self.control.try_write(&event.to_bytes());
    }
}

fn children() -> Vec<Pid> {
    let tasks = fs::read_dir("/proc/self/task").into_iter().flatten().flatten();
    let lists = tasks.filter_map(|task| fs::read_to_string(task.path().join("children")).ok());
    // Each number has a space behind it (proc_tid_children(5)).
    let pids: String = lists.collect();
    pids.split_whitespace().filter_map(|pid| Pid::from_raw(pid.parse().ok()?)).collect()
}

/// Becomes COMMAND. The arguments are the guard's process and COMMAND's words.
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
    // The guard may have died before the signal was set.
    if getppid() != guard.and_then(Pid::from_raw) {
        return Err(failed(Errno::SRCH.into()));
    }
    let mut command = Command::new(&program);
    command.args(args);
    restore_dispositions(&mut command);
    Err(failed(command.exec()))
}

/// The name (`argv[0]`) that makes this program the moment before COMMAND.
const LAUNCH: &str = "proxyd-launch";

/// From SIGTERM to SIGKILL when the proxy stops COMMAND.
const GRACE: Duration = Duration::from_secs(10);

/// From SIGTERM to SIGKILL when the proxy is gone, whose next instance may wait for the address, and for
/// processes that have left the group.
const SHORT_GRACE: Duration = Duration::from_secs(3);

/// How often the guard checks which processes are left.
const POLL_INTERVAL: Duration = Duration::from_millis(50);

/// Attempts to kill processes that do not end: one waits for a broken disk, or runs as another user by
/// now.
const KILLS_MAX: u32 = 100;
