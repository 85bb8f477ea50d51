//! Programs that the proxy starts, each in a process group of its own.

use std::io;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitStatus, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, kill_process_group, waitid};
use tokio::process::Child;
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::timeout;

use crate::config::command::CommandLine;
use crate::config::target::Target;
use crate::runtime::dispositions::restore_dispositions;

/// A running program, which leads its group. Dropping it kills the group, unless
/// [`ProcessGroup::exited`] has returned.
#[derive(Debug)]
pub struct ProcessGroup(Child);

impl ProcessGroup {
    /// Starts a program with the environment of COMMAND and `$TARGET`.
    ///
    /// # Errors
    /// Those of fork(2) and execve(2).
    pub fn start(line: &CommandLine, target: &Target) -> io::Result<Self> {
        let mut command = Command::new(&line.words[0]);
        command.args(&line.words[1..]).stdin(Stdio::null());
        isolate(&mut command);
        command.env("TARGET", target.to_os_string());
        tokio::process::Command::from(command).spawn().map(Self)
    }

    /// Asks the group to end. Kills what is left of it once the program itself has ended, or after
    /// `grace`.
    pub async fn terminate(self, grace: Duration) {
        self.signal(Signal::TERM);
        let _ = timeout(grace, self.ended()).await;
        // Dropping `self` kills the group.
    }

    /// Waits until the program itself has ended, kills what is left of the group, and returns the
    /// program's status.
    pub async fn exited_alone(mut self) -> io::Result<ExitStatus> {
        self.ended().await?;
        self.signal(Signal::KILL);
        self.exited().await
    }

    /// Waits until the program itself has ended, and leaves it unreaped: until then no other group
    /// can have its number.
    async fn ended(&self) -> io::Result<()> {
        let mut child_ended = signal(SignalKind::child())?;
        while self.group().is_some_and(|pid| matches!(waitid(WaitId::Pid(pid), ENDED), Ok(None))) {
            child_ended.recv().await;
        }
        Ok(())
    }

    fn signal(&self, signal: Signal) {
        // ESRCH: the group has ended.
        let _ = self.group().map(|group| kill_process_group(group, signal));
    }

    /// Returns the group, unless the program was reaped: another group may have its number then.
    fn group(&self) -> Option<Pid> {
        self.0.id().and_then(|pid| Pid::from_raw(pid.try_into().ok()?))
    }

    /// Waits until the program itself exits.
    pub async fn exited(&mut self) -> io::Result<ExitStatus> {
        self.0.wait().await
    }
}

impl Drop for ProcessGroup {
    fn drop(&mut self) {
        self.signal(Signal::KILL);
    }
}

/// Gives a program a process group of its own, so that the signals of a terminal reach the proxy
/// alone. Removes the variables that systemd has set for the proxy.
pub fn isolate(command: &mut Command) {
    command.process_group(0);
    for name in SYSTEMD_VARIABLES {
        command.env_remove(name);
    }
    restore_dispositions(command);
}

/// Asks whether a process has ended, without reaping it.
const ENDED: WaitIdOptions =
    WaitIdOptions::EXITED.union(WaitIdOptions::NOWAIT).union(WaitIdOptions::NOHANG);

/// What systemd set for the proxy and not for its children.
const SYSTEMD_VARIABLES: [&str; 7] = [
    "LISTEN_PID",
    "LISTEN_PIDFDID",
    "LISTEN_FDS",
    "LISTEN_FDNAMES",
    "NOTIFY_SOCKET",
    "WATCHDOG_PID",
    "WATCHDOG_USEC",
];
