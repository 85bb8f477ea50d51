//! What a program has used, it and its children: proc(5).

use std::fs;
use std::os::fd::AsFd;

use serde::{Deserialize, Serialize};

/// The process and all that descend from it.
pub(crate) fn tree(pid: u32) -> Vec<u32> {
    let mut pids = vec![pid];
    let mut at = 0;
    while at < pids.len() {
        let tasks = fs::read_dir(format!("/proc/{}/task", pids[at]));
        for task in tasks.into_iter().flatten().flatten() {
            let children = fs::read_to_string(task.path().join("children")).unwrap_or_default();
            pids.extend(children.split_whitespace().filter_map(|pid| pid.parse::<u32>().ok()));
        }
        at += 1;
    }
    pids
}

/// Whether a process that descends from this one is stopped.
pub(crate) fn is_frozen(pid: u32) -> bool {
    tree(pid).into_iter().any(|pid| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        stat.rsplit_once(") ").is_some_and(|(_, fields)| fields.starts_with('T'))
    })
}

/// On-CPU time so far, in seconds: exact for the living, in clock ticks for children that have
/// ended.
pub(crate) fn cpu(pid: u32) -> f64 {
    tree(pid).into_iter().map(|pid| alive(pid) + ended(pid)).sum()
}

fn alive(pid: u32) -> f64 {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let nanos = tasks.filter_map(|task| {
        let text = fs::read_to_string(task.path().join("schedstat")).ok()?;
        text.split(' ').next()?.parse::<u64>().ok()
    });
    nanos.sum::<u64>() as f64 / 1e9
}

/// cutime and cstime.
fn ended(pid: u32) -> f64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let Some((_, fields)) = stat.rsplit_once(')') else { return 0.0 };
    let ticks = fields.split_whitespace().skip(13).take(2).filter_map(|it| it.parse::<u64>().ok());
    ticks.sum::<u64>() as f64 / rustix::param::clock_ticks_per_second() as f64
}

/// What it holds: descriptors, resident memory in bytes, and the memory its pipes may take.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize)]
pub(crate) struct Holdings {
    pub(crate) descriptors: usize,
    pub(crate) resident: usize,
    pub(crate) pipes: usize,
}

/// Looks at a process and its children.
pub(crate) fn holdings(pid: u32) -> Holdings {
    let mut all = Holdings::default();
    for pid in tree(pid) {
        let mut pipes = 0;
        for fd in fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten() {
            all.descriptors += 1;
            let is_pipe = fs::read_link(fd.path())
                .is_ok_and(|link| link.to_string_lossy().starts_with("pipe:"));
            // Opened to read only: opening the other end, too, would count it twice.
            if is_pipe {
                let size = |pipe: fs::File| rustix::pipe::fcntl_getpipe_size(pipe.as_fd()).ok();
                pipes += fs::File::open(fd.path()).ok().and_then(size).unwrap_or(0);
            }
        }
        all.pipes += pipes / 2;
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        let rss = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kilobytes = rss.and_then(|rss| rss.split_whitespace().next()?.parse::<usize>().ok());
        all.resident += kilobytes.unwrap_or(0) * 1024;
    }
    all
}
