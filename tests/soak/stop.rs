//! The end of a phase, for which the threads of a load wait.

use std::sync::{Condvar, Mutex};
use std::time::Duration;

#[derive(Default)]
pub struct Stop {
    is_stopped: Mutex<bool>,
    changed: Condvar,
}

impl Stop {
    /// Lets a phase begin.
    pub fn reset(&self) {
        *self.is_stopped.lock().unwrap() = false;
    }

    /// Ends a phase: each connection ends as its script says, and no further one begins.
    pub fn stop(&self) {
        *self.is_stopped.lock().unwrap() = true;
        self.changed.notify_all();
    }

    /// Ends the phase when what is returned is dropped, also by a panic: scoped threads are waited for.
    pub fn at_end(&self) -> StopAtEnd<'_> {
        StopAtEnd(self)
    }

    pub fn is_stopped(&self) -> bool {
        *self.is_stopped.lock().unwrap()
    }

    /// Waits for the end of the phase, at most for `time`. Returns whether it came.
    pub fn wait(&self, time: Duration) -> bool {
        let is_stopped = self.is_stopped.lock().unwrap();
        let wait = self.changed.wait_timeout_while(is_stopped, time, |is_stopped| !*is_stopped);
        *wait.unwrap().0
    }
}

pub struct StopAtEnd<'a>(&'a Stop);

impl Drop for StopAtEnd<'_> {
    fn drop(&mut self) {
        self.0.stop();
    }
}
