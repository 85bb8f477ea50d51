//! Schedules that a seed decides: what two peers do to a forwarder, step by step, against a model.
//!
//! Each simulation takes `SEEDS` seeds, 2,000 by default; `make sim` takes a million. A failure
//! prints its seed, and `SEED=` replays that one alone.

mod dice;
mod forwarder;
mod peer;
mod seeds;
mod stream;
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
