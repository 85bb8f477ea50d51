//! What the proxy holds: memory, descriptors, threads, pipes and children.

use std::fmt::Write;
use std::fs;
use std::time::Duration;

use crate::load::Totals;

/// Figures of a process at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Figures {
    /// Memory of its own that is resident, in KiB.
    pub memory: u64,
    pub held: Held,
}

/// What must be the same in the same state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Held {
    pub descriptors: usize,
    pub sockets: usize,
    /// Ends of pipes, the inherited ones included.
    pub pipes: usize,
    /// Files that peers pass.
    pub passed: usize,
    /// Without the one that closes descriptors, which starts when it is first needed.
    pub threads: usize,
    pub children: usize,
    /// Descriptors that systemd stores.
    pub stored: usize,
}

impl Figures {
    pub fn of(pid: u32, stored: usize) -> Self {
        let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap();
        let memory = rollup.lines().find_map(|line| line.strip_prefix("Anonymous:")).unwrap();
        let memory = memory.trim().trim_end_matches(" kB").parse().unwrap();
        let entries = |name: &str| fs::read_dir(format!("/proc/{pid}/{name}")).unwrap();
        // A descriptor may be closed in between.
        let links = entries("fd").filter_map(|link| fs::read_link(link.ok()?.path()).ok());
        let links: Vec<_> = links.map(|link| link.to_string_lossy().into_owned()).collect();
        let count = |start: &str| links.iter().filter(|link| link.starts_with(start)).count();
        let children = |task: fs::DirEntry| fs::read_to_string(task.path().join("children")).ok();
        let children = entries("task").filter_map(|task| children(task.ok()?));
        let held = Held {
            descriptors: links.len(),
            sockets: count("socket:"),
            pipes: count("pipe:"),
            passed: count("/memfd:passed"),
            threads: entries("task").filter(|task| !is_closer(task)).count(),
            children: children.map(|line| line.split_whitespace().count()).sum(),
            stored,
        };
        Self { memory, held }
    }
}

fn is_closer(task: &std::io::Result<fs::DirEntry>) -> bool {
    let name = task.as_ref().map(|task| fs::read_to_string(task.path().join("comm")));
    name.is_ok_and(|name| name.is_ok_and(|name| name == "proxyd-closer\n"))
}

/// A mode's line of the table.
pub struct Row {
    pub mode: &'static str,
    pub totals: Totals,
    /// Kills and restarts.
    pub disturbances: u64,
    pub first: Figures,
    pub last: Figures,
    /// Between the two figures.
    pub between: Duration,
    pub whole: Duration,
}

impl Row {
    /// KiB of memory that the mode gains in an hour. A page more says nothing after seconds.
    fn growth(&self) -> String {
        if self.between < Duration::from_secs(60) {
            return "-".into();
        }
        let grown = self.last.memory as f64 - self.first.memory as f64;
        format!("{:+.0}", grown / (self.between.as_secs_f64() / 3600.0))
    }
}

/// The figures as Markdown, and what they mean.
pub fn table(rows: &[Row]) -> String {
    let mut text = String::from(
        "| mode | minutes | connections | GiB checked | kills, restarts | cuts allowed | \
         memory, KiB | KiB per hour | descriptors | threads | pipe ends | children |\n\
         |---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|\n",
    );
    for row in rows {
        let (Totals { connections, bytes, cuts }, first, last) = (row.totals, row.first, row.last);
        let change = |first: usize, last: usize| format!("{first} → {last}");
        writeln!(
            text,
            "| {} | {:.1} | {connections} | {:.2} | {} | {cuts} | {} → {} | {} | {} | {} | {} | {} |",
            row.mode,
            row.whole.as_secs_f64() / 60.0,
            bytes as f64 / f64::from(1 << 30),
            row.disturbances,
            first.memory,
            last.memory,
            row.growth(),
            change(first.held.descriptors, last.held.descriptors),
            change(first.held.threads, last.held.threads),
            change(first.held.pipes, last.held.pipes),
            change(first.held.children, last.held.children),
        )
        .unwrap();
    }
    text.push_str(
        "\nA cut is one that the mode allows. Of datagrams it is a question that had no answer within \
         200 ms, and was asked again. Figures on both sides of an arrow are those after the first minute \
         (or tenth) and at the end.\n",
    );
    text
}
