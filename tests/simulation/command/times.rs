//! What the model asks of the times: nothing is early, and nothing is late.

use std::time::Duration;

use super::*;

impl World<'_> {
    /// Nothing is in use for so long that COMMAND is to be stopped or frozen.
    pub(super) fn check_unused(&self, time: Option<Duration>) {
        let time = time.expect("there is such a time");
        assert!(!self.clients.iter().any(|client| client.is_served), "a client is served");
        assert!(self.now + self.slack >= self.idle_since + time, "too early for the idle time");
        let is_held = |since| self.now + self.slack < since + self.times.min_run;
        let is_held = self.ready_since.is_some() && self.listens_since.is_some_and(is_held);
        assert!(!is_held, "too early for --min-run-time=");
    }

    /// A run has ended.
    pub(super) fn note_end(&mut self) {
        let before = self.ended.map_or(Some(0), |(_, failures)| failures);
        let failures = match self.ready_since {
            // Stopped.
            _ if self.ended == Some((self.now, Some(0))) => Some(0),
            Some(ready) if self.now > ready + STEADY + self.slack => Some(0),
            _ if self.listens_since.is_none_or(|since| self.now + self.slack < since + STEADY) => {
                before.map(|before| before + 1)
            }
            // Perhaps it was ready.
            _ => None,
        };
        self.ended = Some((self.now, failures));
    }

    /// Nothing is overdue.
    pub(super) fn check_times(&self) {
        if self.is_stopping {
            return;
        }
        let waiting = self.clients.iter().filter(|client| !client.is_served);
        for client in waiting {
            let since = client.since.max(self.started);
            assert!(self.now <= since + WAIT + self.slack, "a client is forgotten");
        }
        let waiting = self.clients.iter().filter(|client| !client.is_served);
        let waiting = waiting.map(|client| client.since.max(self.started)).min();
        if let (None, Some(waiting)) = (&self.application, waiting.filter(|_| !self.is_refused)) {
            let (ended, failures) = self.ended.unwrap_or((self.started, Some(0)));
            let due = (ended + failures.map_or(PAUSE_MAX, pause)).max(waiting);
            assert!(self.now <= due + self.slack, "COMMAND is not started");
        }
        if self.clients.is_empty() {
            self.check_idle_times();
        }
    }

    /// Without a client nothing lasts beyond its idle time, or beyond `--min-run-time=` if that is later.
    fn check_idle_times(&self) {
        let Times { freeze, stop, exit, min_run } = self.times;
        let is_late = |time: Option<Duration>, held_until: Duration| {
            let idle_since = self.idle_since.max(self.left_until);
            let due = time.map(|time| (idle_since + time).max(held_until));
            due.is_some_and(|due| self.now > due + self.slack)
        };
        let state = self.application.as_ref().map(|application| application.state);
        match (state, self.ready_since) {
            (None, _) => {
                let ended = self.ended.map_or(Duration::ZERO, |(ended, _)| ended);
                assert!(!is_late(exit, ended + exit.unwrap_or_default()), "no exit");
            }
            (Some(state @ (State::Ready | State::Frozen)), Some(ready)) => {
                let held_until = ready + min_run;
                assert!(
                    !is_late(stop, held_until.max(ready + stop.unwrap_or_default())),
                    "not stopped"
                );
                assert!(
                    !is_late(exit, held_until.max(ready + exit.unwrap_or_default())),
                    "no exit"
                );
                let frozen_by = held_until.max(ready + freeze.unwrap_or_default());
                assert!(state == State::Frozen || !is_late(freeze, frozen_by), "not frozen");
            }
            _ => {}
        }
    }

    /// The program has ended by itself.
    pub(super) fn check_idle_exit(&mut self) {
        let exit = self.times.exit.expect("there is an idle time");
        assert!(!self.clients.iter().any(|client| client.is_served), "a client is served");
        assert!(self.now + self.slack >= self.idle_since + exit, "too early for --exit-idle-time=");
        let (result, faults) = self.process.take().unwrap().exit();
        assert_eq!(result, Ok(()));
        assert!(self.application.is_none(), "COMMAND is left");
        self.start(faults);
    }
}

/// Returns the pause after so many failures in a row, as socket-proxyd(8) names it.
pub(super) fn pause(failures: u32) -> Duration {
    match failures {
        0 => Duration::ZERO,
        _ => Duration::from_millis(100 << (failures - 1).min(7)).min(PAUSE_MAX),
    }
}
