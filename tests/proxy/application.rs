//! The proxy with the application of tests/support/app.pl behind it, which takes time to listen and
//! to stop.

use std::fs;
use std::io::{Read, Write};
use std::time::Duration;

use crate::support::*;
use rustix::process::{Pid, test_kill_process};
use socket2::{SockAddr, Socket};
use tempfile::TempDir;
use tokio::time::Instant;

/// The proxy with an application behind it.
pub struct Service {
    pub proxy: Running,
    pub front: SockAddr,
    pub directory: TempDir,
}

impl Service {
    pub fn start(family: Family, options: &[&str], settings: &[&str]) -> Self {
        Self::start_as(family, options, &["perl", APP], settings, |launch| launch)
    }

    /// `program` gets the application's arguments: the target, the log, the settings.
    pub fn start_as(
        family: Family,
        options: &[&str],
        program: &[&str],
        settings: &[&str],
        launch: impl FnOnce(Launch) -> Launch,
    ) -> Self {
        let directory = TempDir::new().unwrap();
        let (target, place) = match family {
            Family::Tcp => {
                let port = free_port().to_string();
                (format!("127.0.0.1:{port}"), port)
            }
            Family::Unix => {
                let path = directory.path().join("app").to_str().unwrap().to_string();
                (path.clone(), path)
            }
        };
        let front = Endpoint::new(Family::Tcp);
        let log = directory.path().join("log");
        fs::write(&log, "").unwrap();
        let proxy = Launch::new(OURS)
            .listener(&front)
            .args(options)
            .arg(&target)
            .arg("--")
            .args(program)
            .args([&place, log.to_str().unwrap()])
            .args(settings);
        Self { proxy: launch(proxy).start(), front: front.address, directory }
    }

    pub fn connect(&self) -> Socket {
        connect(&self.front)
    }

    /// The PID of the application that answers.
    pub fn pid(&self) -> Pid {
        pid(&mut self.connect())
    }

    /// The processes between the proxy and the application.
    pub fn guards(&self) -> Vec<Pid> {
        let path = format!("/proc/{0}/task/{0}/children", self.proxy.pid());
        let children = fs::read_to_string(path).unwrap();
        let pids = children.split_whitespace().map(|pid| pid.parse().unwrap());
        pids.map(|pid| Pid::from_raw(pid).unwrap()).collect()
    }

    /// PIDs that the application has logged behind a word.
    pub fn logged_pids(&self, word: &str) -> Vec<Pid> {
        let log = fs::read_to_string(self.directory.path().join("log")).unwrap();
        let pids = log.lines().filter_map(|line| line.strip_prefix(word)?.trim().parse().ok());
        pids.map(|pid| Pid::from_raw(pid).unwrap()).collect()
    }

    pub fn wait_for_pid(&self, word: &str) -> Pid {
        let logged_pids = || self.logged_pids(word).last().copied();
        poll_until(Instant::now() + TIMEOUT, logged_pids)
            .unwrap_or_else(|| panic!("{word} is logged_pids"))
    }
}

pub fn ask(client: &mut Socket, question: &str) -> String {
    client.write_all(format!("{question}\n").as_bytes()).unwrap();
    let mut answer = Vec::new();
    let mut byte = [0];
    while client.read(&mut byte).expect("the application answers") == 1 && byte[0] != b'\n' {
        answer.push(byte[0]);
    }
    String::from_utf8(answer).unwrap()
}

pub fn pid(client: &mut Socket) -> Pid {
    let answer = ask(client, "pid");
    Pid::from_raw(answer.parse().unwrap_or_else(|_| panic!("a pid, not {answer:?}"))).unwrap()
}

pub fn is_running(pid: Pid) -> bool {
    test_kill_process(pid).is_ok()
}

/// Waits until a process has ended. Returns how long that took.
pub fn wait_for_end(pid: Pid) -> Duration {
    let start = Instant::now();
    let gone = poll_until(start + TIMEOUT, || (!is_running(pid)).then_some(()));
    gone.expect("the process ends");
    start.elapsed()
}
