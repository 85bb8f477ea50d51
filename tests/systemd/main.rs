//! A real systemd in a container: units written for systemd-socket-proxyd, `--handover=`, the shipped
//! units, `--source=`, the manuals' examples, the README, the recipes and the packages.
//!
//! Needs root, systemd-nspawn and the packages that tests/root installs. What is missing is named, and in
//! CI it is a failure.

mod container;
mod drop_in;
mod handover;
mod manuals;
mod markdown;
mod package;
mod readme;
mod recipes;
mod source;
#[path = "../support/mod.rs"]
mod support;
mod units;

use std::process::ExitCode;

use container::{Container, Suite};
use support::*;

/// Where Debian has systemd-socket-proxyd. In the container it is ours.
const IN_ITS_PLACE: &str = "/usr/lib/systemd/systemd-socket-proxyd";

fn main() -> ExitCode {
    let mut trials = Trials::default();
    let suites = [
        Suite::new(boot),
        // Writes units of the shipped units' names.
        Suite::new(manuals::boot),
        // Units of the same names.
        Suite::new(readme::boot),
        // The shipped units, with other applications.
        Suite::new(source::boot),
        // Another root, a small Debian.
        Suite::new(package::boot),
    ];
    let [shared, manuals, documents, source, package] = &suites;
    drop_in::register(shared, &mut trials);
    handover::register(shared, &mut trials);
    units::register(shared, &mut trials);
    manuals::register(manuals, &mut trials);
    readme::register(documents, &mut trials);
    source::register(source, &mut trials);
    // The recipes name tests of those above.
    recipes::register(documents, &mut trials);
    package::register(package, &mut trials);
    let status = container::run(trials);
    suites.iter().for_each(|suite| suite.end());
    status
}

fn boot() -> Container {
    let mut files = Container::files();
    files.push((OURS.into(), IN_ITS_PLACE.into()));
    let can_run_units = units::missing().is_none();
    if can_run_units {
        files.extend(units::files());
    }
    let container = Container::boot(&files);
    if can_run_units {
        units::prepare(&container);
    }
    container
}
