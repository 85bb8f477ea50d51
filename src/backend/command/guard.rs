//! The process between the proxy and COMMAND. It ensures that nothing COMMAND starts outlives the
//! proxy.
//!
//! A parent-death signal reaches COMMAND itself but not its children, so a killed proxy would leave
//! those behind. The guard is this program again, under another name, with one socket to the proxy.
//! It is the subreaper of all processes that COMMAND starts (`PR_SET_CHILD_SUBREAPER`): orphans
//! become its children. So it knows which processes are left, and ends them all (`terminate`).
//!
//! ```text
//! proxy --socket--> guard --fork--> launch --exec--> COMMAND
//! ```
//!
//! `launch` is this program again, for the moment between fork(2) and execve(2): what happens there
//! needs no unsafe code then. It asks to be killed when the guard dies, which lasts beyond
//! execve(2).
//!
//! [`guard_client`](crate::backend::command::guard_client) has the proxy's side of the socket, and
//! the protocol.

use std::convert::Infallible;
use std::env;
use std::ffi::OsString;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use rustix::io::Errno;
use rustix::process::{
    Pid, Signal, getpid, getppid, set_child_subreaper, set_parent_process_death_signal,
};
use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;
use tokio::signal::unix::{self, SignalKind, signal};
use tokio::time::sleep;

use crate::backend::command::guard_client::{Event, FREEZE, GUARD, STOP, THAW, THIS_PROGRAM};
use crate::backend::command::notify_socket::remove_left_behind;
use crate::backend::command::terminate::{GRACE, POLL_INTERVAL, Processes, SHORT_GRACE};
use crate::config::command::CommandLine;
use crate::logging::os_message;
use crate::runtime::dispositions::restore_dispositions;
use crate::runtime::event_loop;

/// Returns what this process is to run instead of the proxy, if `argv[0]` names that: the guard, or
/// the moment before COMMAND. Both return one line on a failure.
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
        // A service manager may send these to all processes of a unit, but the proxy decides when
        // COMMAND stops, and SIGUSR1 asks the proxy alone for a report. (They are caught and not
        // ignored, because COMMAND would inherit that.)
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
    processes: Processes,
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
        let words = text.split(|&byte| byte == 0);
        let words = words.map(|word| OsString::from_vec(word.to_vec())).collect();
        let command = CommandLine { words };
        let mut launch = Command::new(THIS_PROGRAM);
        launch.arg0(LAUNCH).arg(getpid().to_string()).args(&command.words);
        launch.stdin(Stdio::null()).process_group(0);
        restore_dispositions(&mut launch);
        let pid = Pid::from_child(&launch.spawn()?);
        let guard = Self { control, processes: Processes::new(command.to_string(), pid) };
        send(&guard.control, Event::Started(pid.as_raw_nonzero().get()));
        Ok(guard)
    }

    /// Waits until no process of COMMAND is left. Returns whether the proxy is gone, too.
    async fn watch(mut self, mut child_ended: unix::Signal) -> bool {
        let mut proxy_is_gone = false;
        while self.processes.reap_and_signal(|status| send(&self.control, Event::Exited(status))) {
            let mut byte = [0];
            tokio::select! {
                _ = child_ended.recv() => {}
                read = self.control.read(&mut byte), if !proxy_is_gone => match (read, byte[0]) {
                    (Ok(1), FREEZE) => {
                        self.processes.freeze().await;
                        send(&self.control, Event::Frozen);
                    }
                    (Ok(1), THAW) => self.processes.thaw(),
                    (Ok(1), STOP) => self.processes.terminate(GRACE),
                    _ => {
                        proxy_is_gone = true;
                        self.processes.terminate(SHORT_GRACE);
                    }
                },
                // The kernel sends no SIGCHLD for a process whose parent is not the guard.
                () = sleep(POLL_INTERVAL), if self.processes.is_terminating() => {}
            }
        }
        proxy_is_gone
    }
}

/// Sends an event. The socket's buffer has room for all of them. EPIPE: the proxy is gone, which
/// the next read shows as well.
fn send(control: &UnixStream, event: Event) {
    let _ = control.try_write(&event.to_bytes());
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

/// `argv[0]` of the process that becomes COMMAND.
const LAUNCH: &str = "proxyd-launch";
