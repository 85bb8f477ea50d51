//! One suite for every program that does this job: ours and the originals, side by side.
//!
//! Each case runs against ours, against the installed systemd-socket-proxyd, and against the newest
//! one where tests/root has put it. A case that an original fails says so, with the words in which
//! it fails. A case that passes there after all, or fails otherwise, fails the suite.
//!
//! `PROXY_UNDER_TEST=/path/to/program` runs the cases against that program alone.

mod activation;
mod backend_wait;
mod cli;
mod forwarding;
mod limits;
mod logging;
mod notify;
mod proxy_protocol;
mod stop;
#[path = "../support/mod.rs"]
mod support;
mod targets;

use std::env;
use std::fs::{self, Permissions};
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::panic::{self, AssertUnwindSafe};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::{Arc, Condvar, Mutex};

use libtest_mimic::Failed;
use socket2::Socket;
use support::*;
use tempfile::TempDir;

const INSTALLED_ORIGINAL: &str = "/lib/systemd/systemd-socket-proxyd";

/// A program under test.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Subject {
    Ours,
    /// The same, with three event loops.
    Threads,
    /// The installed one, of this version of systemd.
    Installed(u32),
    /// The newest one, of this version.
    Newest(u32),
    /// `$PROXY_UNDER_TEST`, expected to pass everything.
    Named,
}

impl Subject {
    fn name(self) -> String {
        match self {
            Self::Ours => "ours".into(),
            Self::Threads => "ours-3-threads".into(),
            Self::Installed(version) | Self::Newest(version) => format!("systemd-{version}"),
            Self::Named => "named".into(),
        }
    }

    /// An original's.
    const fn version(self) -> Option<u32> {
        match self {
            Self::Installed(version) | Self::Newest(version) => Some(version),
            Self::Ours | Self::Threads | Self::Named => None,
        }
    }

    /// The program; `directory` is for one that is made here.
    fn path(self, directory: &Path) -> Option<PathBuf> {
        let path: PathBuf = match self {
            Self::Ours => OURS.into(),
            Self::Threads => {
                // A copy, which other users reach wherever the original is.
                let (path, copy) = (directory.join("three-threads"), directory.join("program"));
                fs::copy(OURS, &copy).unwrap();
                let copy = copy.display();
                let script = format!("#!/bin/sh\nexec {copy} --threads=3 \"$@\"\n");
                fs::write(&path, script).unwrap();
                fs::set_permissions(&path, Permissions::from_mode(0o755)).unwrap();
                path
            }
            Self::Installed(_) => INSTALLED_ORIGINAL.into(),
            Self::Newest(_) => NEWEST_ORIGINAL.into(),
            Self::Named => env::var_os("PROXY_UNDER_TEST")?.into(),
        };
        path.exists().then_some(path)
    }
}

/// The originals that are there. The newest one may also be the installed one.
fn originals(trials: &mut Trials) -> Vec<Subject> {
    let mut find = |path, original: fn(u32) -> Subject| {
        let version = version(path);
        if version.is_none() {
            trials.skip(&format!("all cases of {path}"), path);
        }
        version.map(original)
    };
    let installed = find(INSTALLED_ORIGINAL, Subject::Installed);
    let newest = find(NEWEST_ORIGINAL, Subject::Newest);
    let newest = newest.filter(|it| it.version() != installed.and_then(Subject::version));
    installed.into_iter().chain(newest).collect()
}

/// The version of an original, from "systemd 252 (252.39-1)".
fn version(path: &str) -> Option<u32> {
    let output = Command::new(path).arg("--version").output().ok()?;
    std::str::from_utf8(&output.stdout).ok()?.split(' ').nth(1)?.parse().ok()
}

/// What a case expects of the originals.
#[derive(Clone, Copy)]
enum Expected {
    /// Every program passes.
    Shared,
    /// Originals before this version fail, with these words in the failure.
    FailsBefore(u32, &'static str),
    /// Only ours has what the case is about; the originals fail, with these words.
    OnlyOurs(&'static str),
    /// The originals are not asked: whether they pass depends on how busy the machine is.
    OursAlone,
}

type Test = dyn Fn(&Path) + Send + Sync;

struct Case {
    name: String,
    expected: Expected,
    needs_root: bool,
    test: Arc<Test>,
}

#[derive(Default)]
struct Cases(Vec<Case>);

impl Cases {
    fn add(
        &mut self,
        name: impl Into<String>,
        expected: Expected,
        test: impl Fn(&Path) + Send + Sync + 'static,
    ) {
        let test = Arc::new(test);
        self.0.push(Case { name: name.into(), expected, needs_root: false, test });
    }

    fn add_as_root(&mut self, name: &str, expected: Expected, test: fn(&Path)) {
        self.add(name, expected, test);
        self.0.last_mut().unwrap().needs_root = true;
    }
}

fn main() -> ExitCode {
    let mut cases = Cases::default();
    cli::register(&mut cases);
    activation::register(&mut cases);
    notify::register(&mut cases);
    stop::register(&mut cases);
    logging::register(&mut cases);
    targets::register(&mut cases);
    proxy_protocol::register(&mut cases);
    forwarding::register(&mut cases);
    limits::register(&mut cases);
    backend_wait::register(&mut cases);

    panic::set_hook(Box::new(|_| {}));
    raise_descriptor_limit();
    let directory = TempDir::new().unwrap();
    // Some cases run as another user.
    fs::set_permissions(directory.path(), Permissions::from_mode(0o755)).unwrap();
    let is_root = rustix::process::geteuid().is_root();
    let mut trials = Trials::default();
    let subjects = match Subject::Named.path(directory.path()) {
        Some(_) => vec![Subject::Named],
        None => [vec![Subject::Ours, Subject::Threads], originals(&mut trials)].concat(),
    };
    for subject in subjects {
        let Some(path) = subject.path(directory.path()) else { continue };
        for case in &cases.0 {
            if subject.version().is_some() && matches!(case.expected, Expected::OursAlone) {
                continue;
            }
            let name = format!("{}: {}", subject.name(), case.name);
            if case.needs_root && !is_root {
                trials.skip(&name, "root");
                continue;
            }
            let (path, expected, test) = (path.clone(), case.expected, Arc::clone(&case.test));
            trials.add_fallible(name, move || {
                let _turn = matches!(subject, Subject::Newest(_)).then(Turn::take);
                judge(subject, &path, expected, &*test)
            });
        }
    }
    // Most cases wait.
    trials.run_on(4)
}

/// A turn of the newest original: beside more than one other case, that of systemd 262 sometimes loses bytes
/// that it carries alone.
struct Turn;

static TURNS: (Mutex<usize>, Condvar) = (Mutex::new(2), Condvar::new());

impl Turn {
    fn take() -> Self {
        let free = TURNS.0.lock().unwrap();
        *TURNS.1.wait_while(free, |free| *free == 0).unwrap() -= 1;
        Self
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        *TURNS.0.lock().unwrap() += 1;
        TURNS.1.notify_one();
    }
}

fn judge(subject: Subject, path: &Path, expected: Expected, test: &Test) -> Result<(), Failed> {
    let failure = panic::catch_unwind(AssertUnwindSafe(|| test(path))).err().map(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        text.or_else(|| panic.downcast_ref::<&str>().map(|text| text.to_string()))
            .unwrap_or_default()
    });
    let expected = match expected {
        Expected::FailsBefore(first, words) if subject.version().is_some_and(|it| it < first) => {
            Some(words)
        }
        Expected::OnlyOurs(words) if subject.version().is_some() => Some(words),
        _ => None,
    };
    match (failure, expected) {
        (None, None) => Ok(()),
        (Some(failure), Some(words)) if failure.contains(words) => Ok(()),
        (Some(failure), None) => Err(failure.into()),
        (Some(failure), Some(words)) => {
            Err(format!("expected to fail here with {words:?}, but failed with: {failure}").into())
        }
        (None, Some(words)) => {
            Err(format!("expected to fail here with {words:?}, but passed; mend the table").into())
        }
    }
}

fn echoes_after(client: &mut Socket, sent: &[u8]) {
    let mut answer = vec![0; sent.len()];
    client.read_exact(&mut answer).expect("the echo backend answers");
    assert_eq!(answer, sent);
}

/// Waits until a client is accepted and, since there is no backend, closed.
fn front_is_served(front: &Endpoint) -> bool {
    read_all(&mut front.connect()).0.is_empty()
}

/// A name that no other test uses.
fn unique_name() -> String {
    format!("{}-{}", std::process::id(), free_port())
}
