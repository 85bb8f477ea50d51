//! Programs that the proxy starts, each in a process group of its own.

use std::io;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitStatus, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process_group};
use tokio::process::Child;
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
        command.env("TARGET", target.to_string());
        tokio::process::Command::from(command).spawn().map(Self)
    }

    /// Asks the group to end, and kills it after `grace`.
    pub async fn terminate(mut self, grace: Duration) {
        let group = self.group();
        let _ = group.map(|group| kill_process_group(group, Signal::TERM));
        let _ = timeout(grace, self.0.wait()).await;
        // What is left of the group when the program itself has ended.
        let _ = group.map(|group| kill_process_group(group, Signal::KILL));
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
        // ESRCH: the group has ended.
        let _ = self.group().map(|group| kill_process_group(group, Signal::KILL));
    }
}

/// Gives a program a group of its own, and takes from it what systemd set for the proxy: signals of
/// a terminal reach the proxy alone.
pub fn isolate(command: &mut Command) {
    command.process_group(0);
    for name in SYSTEMD_VARIABLES {
        command.env_remove(name);
    }
    restore_dispositions(command);
}

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
