//! The machine, the kernel and the date of a run.

use std::fmt;
use std::fs;
use std::process::Command;
use std::thread;

use serde::{Deserialize, Serialize};

#[derive(Deserialize, Serialize)]
pub(crate) struct Machine {
    processor: String,
    processors: usize,
    memory_gib: u64,
    system: String,
    kernel: String,
    date: String,
}

impl Machine {
    /// Describes this machine, today.
    pub(crate) fn of_this_run() -> Self {
        let value = |path, key, separator| {
            let text = fs::read_to_string(path).unwrap_or_default();
            let line = text.lines().find(|line| line.starts_with(key));
            let value = line.and_then(|line| line.split_once(separator)).map(|(_, value)| value);
            value.unwrap_or("unknown").trim().trim_matches('"').to_string()
        };
        let memory = value("/proc/meminfo", "MemTotal", ':');
        let kibibytes = memory.trim_end_matches(" kB").parse::<f64>().unwrap_or(0.0);
        let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        let date = Command::new("date").arg("+%F").output().map(|it| it.stdout).unwrap_or_default();
        Self {
            processor: value("/proc/cpuinfo", "model name", ':'),
            processors: thread::available_parallelism().map_or(1, usize::from),
            memory_gib: (kibibytes / 1_048_576.0).round() as u64,
            system: value("/etc/os-release", "PRETTY_NAME", '='),
            kernel: kernel.trim().to_string(),
            date: String::from_utf8_lossy(&date).trim().to_string(),
        }
    }
}

impl fmt::Display for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { processor, processors, memory_gib, system, kernel, date } = self;
        write!(
            f,
            "{processor}, {processors} processors, {memory_gib} GiB; {system}, Linux {kernel}; {date}"
        )
    }
}
