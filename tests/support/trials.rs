//! Tests with a name for each combination, so that one can be run alone.

use std::env;
use std::fs;
use std::path::Path;
use std::process::ExitCode;

use libtest_mimic::{Arguments, Failed, Trial};

#[derive(Default)]
pub struct Trials(Vec<Trial>);

impl Trials {
    pub fn add(&mut self, name: impl Into<String>, test: impl FnOnce() + Send + 'static) {
        self.add_fallible(name, move || {
            test();
            Ok(())
        });
    }

    pub fn add_fallible(
        &mut self,
        name: impl Into<String>,
        test: impl FnOnce() -> Result<(), Failed> + Send + 'static,
    ) {
        self.0.push(Trial::test(name, test));
    }

    /// Adds a test that stands for tests that can't run. It is ignored, and fails in CI.
    pub fn skip(&mut self, tests: &str, missing: &str) {
        eprintln!("SKIPPED: {tests}: needs {missing}; `make test` has it");
        let failure = format!("needs {missing}");
        let trial = Trial::test(tests, move || Err(failure.into()));
        self.0.push(trial.with_ignored_flag(env::var_os("CI").is_none()));
    }

    pub fn names(&self) -> Vec<String> {
        self.0.iter().map(|trial| trial.name().into()).collect()
    }

    pub fn len(&self) -> usize {
        self.0.len()
    }

    pub fn run(self) -> ExitCode {
        libtest_mimic::run(&Arguments::from_args(), self.0).exit_code()
    }

    /// Runs on so many threads, unless the command line says how many.
    pub fn run_on(self, threads: usize) -> ExitCode {
        let mut arguments = Arguments::from_args();
        arguments.test_threads = arguments.test_threads.or(Some(threads));
        libtest_mimic::run(&arguments, self.0).exit_code()
    }
}

/// Says that a test is skipped because something is missing; fails in CI.
pub fn skip(test: &str, missing: &str) {
    eprintln!("SKIPPED: {test}: needs {missing}");
    assert!(env::var_os("CI").is_none(), "{test}: needs {missing}");
}

/// Whether the kernel is older than this version.
pub fn linux_is_before(version: (u32, u32)) -> bool {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let mut numbers = release.split(['.', '-']).map(|number| number.parse().unwrap());
    (numbers.next().unwrap(), numbers.next().unwrap()) < version
}

/// Whether the tests run as root; otherwise says that `test` is skipped.
pub fn is_root_for(test: &str) -> bool {
    let is_root = rustix::process::geteuid().is_root();
    if !is_root {
        skip(test, "root");
    }
    is_root
}

/// Whether all of these files are there; otherwise says that `test` is skipped.
pub fn are_installed_for(test: &str, files: &[&str]) -> bool {
    let missing = files.iter().find(|file| !Path::new(file).exists());
    missing.iter().for_each(|file| skip(test, file));
    missing.is_none()
}
