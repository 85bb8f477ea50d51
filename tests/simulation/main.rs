//! Schedules that a seed decides: what two peers do to a forwarder, step by step, against a model.
//!
//! Each pair of families takes `SEEDS` seeds, 2,000 by default and 250,000 in `make sim`. A failure
//! prints its seed, and `SEED=` replays that one alone.

mod forwarder;
mod peer;
mod seeds;
#[path = "../support/mod.rs"]
mod support;

use std::process::ExitCode;

use support::*;

fn main() -> ExitCode {
    let mut trials = Trials::default();
    for (near, far) in PAIRS {
        trials.add(format!("forwarder, {near} to {far}"), move || {
            seeds::run(|seed| forwarder::simulate(seed, [near, far]));
        });
    }
    // Each keeps all processors busy.
    trials.run_on(1)
}
