//! Network namespaces.

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::process::{Child, Command, Stdio};
use std::thread;

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use tokio::time::Instant;

use super::{TIMEOUT, poll_until};

/// A network namespace and the process that keeps it, which ends when this is dropped. Needs root.
pub struct NetworkNamespace {
    pub process: Child,
}

impl NetworkNamespace {
    pub fn new() -> Self {
        Self::start(&["cat"])
    }

    /// Starts a command in a network namespace of its own.
    pub fn start(words: &[&str]) -> Self {
        let mut command = Command::new("unshare");
        command.arg("--net").args(words).stdin(Stdio::piped()).stdout(Stdio::piped());
        let process = command.spawn().unwrap();
        let network = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/net")).ok();
        let has_moved = || {
            let its = network(&process.id().to_string());
            (its.is_some() && its != network("self")).then_some(())
        };
        poll_until(Instant::now() + TIMEOUT, has_moved).expect("unshare(1) makes a namespace");
        Self { process }
    }

    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    /// Runs a command in the namespace.
    pub fn run(&self, words: &str) {
        let mut command = Command::new("nsenter");
        command.args(["--net", "--target", &self.pid().to_string()]).args(words.split(' '));
        assert!(command.status().unwrap().success(), "{words}");
    }

    /// Runs `work` on a thread in the namespace.
    pub fn inside<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        inside(self.pid(), work)
    }
}

impl Drop for NetworkNamespace {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Runs `work` on a thread in the network namespace of a process.
pub fn inside<T: Send>(pid: u32, work: impl FnOnce() -> T + Send) -> T {
    let namespace = File::open(format!("/proc/{pid}/ns/net")).unwrap();
    thread::scope(|scope| {
        let work = scope.spawn(|| {
            let network = Some(LinkNameSpaceType::Network);
            move_into_link_name_space(namespace.as_fd(), network).unwrap();
            work()
        });
        work.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}
