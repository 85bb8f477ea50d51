//! What a mode puts on the proxy.

use std::sync::Mutex;

use crate::stop::Stop;

pub trait Load: Send + Sync {
    fn stop(&self) -> &Stop;

    fn failures(&self) -> &Failures;

    /// Lets the proxy do its work once, and holds open what lasts over all phases.
    fn warm_up(&self);

    /// Runs until [`Stop::stop`], and until all has ended that does not last.
    fn run_phase(&self, seed: u64);

    /// Lets a process do what its later state depends on, such as the pipes of its pool. Nothing disturbs
    /// it meanwhile.
    fn run_calm_phase(&self, seed: u64);

    fn totals(&self) -> Totals;

    /// KiB that the process may keep after a burst that comes late.
    fn burst_memory(&self) -> u64 {
        0
    }
}

#[derive(Clone, Copy, Debug, Default)]
pub struct Totals {
    /// Connections, or sessions of datagrams.
    pub connections: u64,
    /// Bytes that were received and compared.
    pub bytes: u64,
    /// Connections that were cut where the mode allows it, or datagrams that were lost.
    pub cuts: u64,
}

#[derive(Default)]
pub struct Failures(Mutex<Vec<String>>);

impl Failures {
    pub fn add(&self, text: String) {
        eprintln!("FAILURE: {text}");
        self.0.lock().unwrap().push(text);
    }

    pub fn any(&self) -> bool {
        !self.0.lock().unwrap().is_empty()
    }

    pub fn all(&self) -> Vec<String> {
        self.0.lock().unwrap().clone()
    }
}
