//! How the processes of COMMAND end, and how they are frozen.
//!
//! All of this runs in the guard, except for [`kill_group`]. The processes end by SIGTERM, and by
//! SIGKILL when they take too long. COMMAND's process group comes first. Once the group is empty,
//! the processes that have moved to other groups get the same two signals.
//!
//! All processes below the guard are frozen by SIGSTOP, whatever their group, and thawed by
//! SIGCONT. A stopped process acts on SIGTERM only once it goes on, so SIGCONT precedes every
//! SIGTERM.

use std::collections::HashSet;
use std::fs;
use std::mem;
use std::time::Duration;

use rustix::io::Errno;
use rustix::process::{
    Pid, Signal, WaitOptions, getpid, kill_process, kill_process_group, test_kill_process_group,
    wait,
};
use tokio::time::{Instant, sleep};

use crate::backend::command::process_tree::ProcessTree;
use crate::logging::{RateLimit, rate_limited};

/// The processes of COMMAND: all that descend from the guard.
pub struct Processes {
    /// COMMAND's name, for messages.
    name: String,
    /// COMMAND's process, which leads the group.
    command: Pid,
    /// Whether COMMAND itself has exited.
    has_exited: bool,
    /// Whether no process of the group is left. From then on another group may have its number.
    is_group_gone: bool,
    /// When the next SIGKILL is due, once SIGTERM was sent.
    deadline: Option<Instant>,
    kills: u32,
    /// The processes that are frozen. Those that were stopped before are not among them.
    frozen: HashSet<Pid>,
}

impl Processes {
    pub fn new(name: String, command: Pid) -> Self {
        Self {
            name,
            command,
            has_exited: false,
            is_group_gone: false,
            deadline: None,
            kills: 0,
            frozen: HashSet::new(),
        }
    }

    /// Stops every process where it is, until no process runs and no further one is found: a
    /// process may fork until its own signal arrives. A process that is stopped already stays so
    /// after the thaw.
    pub async fn freeze(&mut self) {
        for _ in 0..FREEZE_PASSES_MAX {
            let mut is_done = true;
            for process in descendants() {
                if runs_on(&thread_states(process), self.frozen.contains(&process)) {
                    let _ = kill_process(process, Signal::STOP);
                    self.frozen.insert(process);
                    is_done = false;
                    // A parent that sees its child stop (WUNTRACED) would stop itself after it is
                    // thawed, as su(1) does: so the parent stops first.
                    for _ in 0..STOP_CHECKS {
                        if are_stopped(&thread_states(process)) {
                            break;
                        }
                        sleep(FREEZE_PAUSE).await;
                    }
                }
            }
            if is_done {
                return;
            }
            sleep(FREEZE_PAUSE).await;
        }
        rate_limited!(
            NOT_FROZEN,
            warn,
            "Failed to freeze all processes of {}, ignoring.",
            self.name
        );
    }

    /// Lets frozen processes go on.
    pub fn thaw(&mut self) {
        let mut frozen = mem::take(&mut self.frozen);
        if frozen.is_empty() {
            return;
        }
        // Children first: a parent that waits for stopped children would stop itself again.
        for process in descendants().into_iter().rev().filter(|process| frozen.remove(process)) {
            let _ = kill_process(process, Signal::CONT);
        }
        // While siblings end, the list of children may lack some (proc_tid_children(5)).
        let tree = ProcessTree { group: self.command, guard: getpid() };
        for process in frozen.into_iter().filter(|process| tree.has(*process)) {
            let _ = kill_process(process, Signal::CONT);
        }
    }

    /// Whether SIGTERM was sent.
    pub fn is_terminating(&self) -> bool {
        self.deadline.is_some()
    }

    /// Reaps the processes that have ended, and passes COMMAND's own status (wait(2)) to `exited`.
    /// Sends SIGTERM once COMMAND has exited, and SIGKILL when that is due. Returns whether the
    /// guard has anything left to wait for.
    pub fn reap_and_signal(&mut self, exited: impl Fn(i32)) -> bool {
        let has_children = loop {
            match wait(WaitOptions::NOHANG) {
                Ok(Some((pid, status))) if pid == self.command => {
                    self.has_exited = true;
                    exited(status.as_raw());
                }
                Ok(Some(_)) => {}
                Ok(None) => break true,
                Err(_) => break false,
            }
        };
        let was_group_gone = self.is_group_gone;
        self.is_group_gone |=
            self.has_exited && test_kill_process_group(self.command) == Err(Errno::SRCH);
        if !has_children {
            return false;
        }
        if self.is_group_gone && !was_group_gone {
            // The processes that are left were not in the group, and got no SIGTERM.
            self.deadline = None;
            self.terminate(SHORT_GRACE);
        } else if self.has_exited && self.deadline.is_none() {
            self.terminate(GRACE);
        }
        self.deadline.is_none_or(|deadline| Instant::now() < deadline) || self.kill()
    }

    /// Asks the processes to end, stopped ones included (SIGCONT). SIGKILL is due after `grace`, or
    /// earlier if it was due earlier.
    pub fn terminate(&mut self, grace: Duration) {
        self.thaw();
        let due = Instant::now() + grace;
        if let Some(deadline) = &mut self.deadline {
            *deadline = due.min(*deadline);
        } else {
            self.signal(Signal::TERM);
            self.signal(Signal::CONT);
            self.deadline = Some(due);
        }
    }

    /// Sends SIGKILL; the next one is due after [`POLL_INTERVAL`]. Turns to the processes outside
    /// the group after [`GROUP_KILLS_MAX`] calls. Returns `false` when that has not helped either.
    fn kill(&mut self) -> bool {
        if self.kills == GROUP_KILLS_MAX && !self.is_group_gone {
            // What is left is a zombie whose parent does not reap it. The parent may be outside the
            // group.
            self.is_group_gone = true;
            self.deadline = None;
            self.kills = 0;
            self.terminate(SHORT_GRACE);
            return true;
        }
        if self.kills == 0 {
            tracing::warn!("{} has not stopped in time, killing it.", self.name);
        } else if self.kills == KILLS_MAX {
            tracing::error!("Failed to kill all processes of {}, leaving them.", self.name);
            return false;
        }
        self.kills += 1;
        self.deadline = Some(Instant::now() + POLL_INTERVAL);
        self.signal(Signal::KILL);
        true
    }

    /// Signals the group or, when it is gone, the processes that had left it, and their children.
    fn signal(&self, signal: Signal) {
        if !self.is_group_gone {
            let _ = kill_process_group(self.command, signal);
            return;
        }
        for process in descendants() {
            let _ = kill_process(process, signal);
        }
    }
}

/// Returns the children of a process.
fn children_of(process: Pid) -> Vec<Pid> {
    let tasks = fs::read_dir(format!("/proc/{}/task", process.as_raw_nonzero()));
    let tasks = tasks.into_iter().flatten().flatten();
    let lists = tasks.filter_map(|task| fs::read_to_string(task.path().join("children")).ok());
    // Each number has a space behind it (proc_tid_children(5)).
    let pids: String = lists.collect();
    pids.split_whitespace().filter_map(|pid| Pid::from_raw(pid.parse().ok()?)).collect()
}

/// Returns the processes below the guard, parents before their children.
fn descendants() -> Vec<Pid> {
    let mut all = children_of(getpid());
    let mut next = 0;
    while let Some(process) = all.get(next) {
        all.extend(children_of(*process));
        next += 1;
    }
    all
}

/// Returns the state of each thread of a process: in proc_pid_stat(5), behind the name in
/// parentheses. The main thread may have ended before the others.
fn thread_states(process: Pid) -> String {
    let tasks = fs::read_dir(format!("/proc/{}/task", process.as_raw_nonzero()));
    let stats = tasks.into_iter().flatten().flatten().map(|task| task.path().join("stat"));
    let stats = stats.filter_map(|stat| fs::read_to_string(stat).ok());
    stats.filter_map(|stat| stat.rsplit_once(") ")?.1.chars().next()).collect()
}

/// Whether a process with these threads has yet to be stopped. A traced one that was not sent
/// SIGSTOP rests only while its tracer looks at it.
fn runs_on(states: &str, is_frozen: bool) -> bool {
    !are_stopped(states) || (states.contains('t') && !is_frozen)
}

/// Whether all threads are stopped, by a signal or a tracer, or have ended.
fn are_stopped(states: &str) -> bool {
    states.chars().all(|state| ['T', 't', 'Z', 'X'].contains(&state))
}

/// Kills COMMAND's process group after its guard was killed. The kernel has killed COMMAND itself
/// (PR_SET_PDEATHSIG).
pub async fn kill_group(group: Pid) {
    tracing::error!(
        "The guard of COMMAND was killed, and the proxy kills the process group of COMMAND."
    );
    for _ in 0..KILLS_MAX {
        if kill_process_group(group, Signal::KILL).is_err() {
            break;
        }
        sleep(POLL_INTERVAL).await;
    }
}

/// From SIGTERM to SIGKILL when the proxy stops COMMAND.
pub const GRACE: Duration = Duration::from_secs(10);

/// From SIGTERM to SIGKILL for processes outside the group, and for all when the proxy is gone: the
/// next proxy may wait for the address.
pub const SHORT_GRACE: Duration = Duration::from_secs(3);

/// How often to check which processes are left.
pub const POLL_INTERVAL: Duration = Duration::from_millis(50);

/// The most searches for processes that are not frozen yet, and the pause between two. A process
/// that waits for a disk (state D) stops only when the disk has answered.
const FREEZE_PASSES_MAX: u32 = 100;
const FREEZE_PAUSE: Duration = Duration::from_millis(1);

/// How often to look whether a process is stopped before its children are stopped.
const STOP_CHECKS: u32 = 10;

/// Attempts to kill the group. What is left of it then cannot be killed.
const GROUP_KILLS_MAX: u32 = 10;

/// Attempts to kill processes that do not end: one waits for a broken disk, or runs as another user
/// by now.
const KILLS_MAX: u32 = 100;

static NOT_FROZEN: RateLimit = RateLimit::new(1, Duration::from_secs(60));

#[cfg(test)]
mod tests {
    use std::os::unix::process::{CommandExt, ExitStatusExt};
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn a_traced_process_is_stopped_once() {
        // Before it was sent SIGSTOP, and after.
        for (states, expected) in [
            ("S", [true, true]),
            ("TR", [true, true]),
            ("T", [false, false]),
            ("ZT", [false, false]),
            ("t", [true, false]),
            ("Tt", [true, false]),
            ("", [false, false]),
        ] {
            assert_eq!([false, true].map(|is_frozen| runs_on(states, is_frozen)), expected);
        }
    }

    #[test]
    fn each_sigkill_counts() {
        let mut cat = Command::new("cat");
        let mut child = cat.stdin(Stdio::piped()).process_group(0).spawn().unwrap();
        let mut processes = Processes::new("cat".into(), Pid::from_child(&child));
        // One more would turn to the children of this process.
        assert!((0..GROUP_KILLS_MAX).all(|_| processes.kill()));
        assert_eq!(processes.kills, GROUP_KILLS_MAX);
        assert_eq!(child.wait().unwrap().signal(), Some(Signal::KILL.as_raw()));
    }
}
