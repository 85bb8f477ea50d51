//! Schedules that a seed decides, step by step, against a model. Two peers act on a forwarder. Peers,
//! kills and systemd act on the program with `--handover=crash`. Clients and an application act on
//! the program with COMMAND.
//!
//! Each simulation takes `SEEDS` seeds, 2,000 by default and 170,000 in `make sim`. A failure prints
//! its seed, and `SEED=` replays that one alone.

mod application;
mod command;
mod crash;
mod descriptors;
#[cfg(target_arch = "x86_64")]
mod dispatch;
mod forwarder;
mod peer;
mod process;
mod seeds;
#[path = "../support/mod.rs"]
mod support;
mod syscalls;
mod systemd;

use std::process::ExitCode;

use support::*;

fn main() -> ExitCode {
    descriptors::prepare();
    let mut trials = Trials::default();
    for (near, far) in PAIRS {
        trials.add(format!("forwarder, {near} to {far}"), move || {
            seeds::run(|| forwarder::simulation([near, far]));
        });
    }
    if cfg!(target_arch = "x86_64") {
        trials.add("crash", || seeds::run(crash::simulation));
    } else {
        println!("skipped: crash, which kills by Syscall User Dispatch");
    }
    trials.add("COMMAND", || seeds::run(command::simulation));
    // One at a time: each runs on all processors.
    trials.run_on(1)
}
