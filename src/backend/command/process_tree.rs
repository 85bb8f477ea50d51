//! Which processes are COMMAND's, as far as /proc tells: their notifications count, and a thaw
//! continues them.

use std::fs;
use std::iter;
use std::os::unix::fs::MetadataExt;

use rustix::process::{Pid, Uid};

/// COMMAND's processes.
///
/// A control group would not do: outside of a unit COMMAND shares its control group with the whole
/// session.
#[derive(Clone, Copy, Debug)]
pub struct ProcessTree {
    /// COMMAND's process group.
    pub group: Pid,
    /// The subreaper above COMMAND. Every process that COMMAND starts descends from it, in whatever
    /// session.
    pub guard: Pid,
}

impl ProcessTree {
    /// Whether COMMAND or the guard runs as this user.
    pub fn has_user(self, user: Uid) -> bool {
        [self.group, self.guard].into_iter().any(|process| {
            let directory = fs::metadata(format!("/proc/{}", process.as_raw_nonzero()));
            directory.is_ok_and(|directory| directory.uid() == user.as_raw())
        })
    }

    /// Whether a process that has ended may have been COMMAND's: it was of the same user. Nothing
    /// else is known of a process that was reaped.
    pub fn may_have_had(self, process: Pid, user: Uid) -> bool {
        proc_stat(process).is_none() && self.has_user(user)
    }

    /// Whether the process is in the group or descends from the guard.
    pub fn has(self, process: Pid) -> bool {
        proc_stat(process).is_some_and(|[_, group]| group == Some(self.group))
            || iter::successors(Some(process), |process| proc_stat(*process)?[0])
                .take(ANCESTORS_MAX)
                .any(|ancestor| ancestor == self.guard)
    }
}

/// Returns parent and group of a process: the fourth and the fifth field of proc_pid_stat(5). The
/// second is a name in parentheses, of any characters. `None` in the array is a process outside of
/// this PID namespace.
fn proc_stat(process: Pid) -> Option<[Option<Pid>; 2]> {
    let stat = fs::read_to_string(format!("/proc/{}/stat", process.as_raw_nonzero())).ok()?;
    let (_, fields) = stat.rsplit_once(')')?;
    let mut pids = fields.split_whitespace().skip(1).map(|pid| Pid::from_raw(pid.parse().ok()?));
    Some([pids.next()?, pids.next()?])
}

/// The ancestors of a process that are looked up. Real chains are shorter.
pub const ANCESTORS_MAX: usize = 64;

#[cfg(test)]
mod tests {
    use std::os::unix::process::CommandExt;
    use std::process::{Child, Command, Stdio};

    use super::*;

    #[test]
    fn tree_has_the_group_and_what_descends_from_the_guard() {
        let start = || -> Child {
            Command::new("cat").stdin(Stdio::piped()).process_group(0).spawn().unwrap()
        };
        let mut children = [start(), start()];
        let us = rustix::process::getpid();
        let [first, second] = [&children[0], &children[1]].map(Pid::from_child);
        assert!(ProcessTree { group: second, guard: us }.has(first), "our child");
        assert!(!ProcessTree { group: second, guard: second }.has(first), "not its sibling's");
        assert!(!ProcessTree { group: first, guard: first }.has(us), "not its parent");
        assert!(ProcessTree { group: first, guard: second }.has(first), "of the group");
        for child in &mut children {
            drop(child.stdin.take());
            child.wait().unwrap();
        }
        assert!(!ProcessTree { group: second, guard: us }.has(first), "gone");
    }
}
