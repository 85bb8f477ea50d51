//! The idle clock: for how long nothing has been in use.
//!
//! A connection is *in use* from accept to close. The clock runs while nothing is in use: from the
//! start of the process, from COMMAND's readiness, or from the end of the last use.
//! `--stop-idle-time=` and `--exit-idle-time=` are alarms on this one clock, and no alarm sets it
//! back.

use std::future::pending;

use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};

use crate::config::timespan::TimeSpan;

/// The clock. Clones share it.
#[derive(Clone, Debug)]
pub struct IdleClock(watch::Sender<Reading>);

#[derive(Debug)]
struct Reading {
    /// Connections in use.
    in_use: usize,
    /// Since when nothing is in use, if nothing is.
    idle_since: Instant,
}

impl IdleClock {
    /// Creates a clock that runs from now on.
    pub fn new() -> Self {
        Self(watch::Sender::new(Reading { in_use: 0, idle_since: Instant::now() }))
    }

    /// Stops the clock until the guard is dropped.
    pub fn begin_use(&self) -> InUse {
        self.0.send_if_modified(|reading| {
            reading.in_use += 1;
            reading.in_use == 1
        });
        InUse(self.0.clone())
    }

    pub fn is_in_use(&self) -> bool {
        self.0.borrow().in_use > 0
    }

    /// Waits until something is in use.
    pub async fn used(&self) {
        let _ = self.0.subscribe().wait_for(|reading| reading.in_use > 0).await;
    }

    /// Waits until nothing is in use.
    pub async fn unused(&self) {
        let _ = self.0.subscribe().wait_for(|reading| reading.in_use == 0).await;
    }

    /// Waits until nothing has been in use for `time`.
    pub async fn alarm(&self, time: TimeSpan) {
        if time.finite().is_none() {
            return pending().await;
        }
        let mut changes = self.0.subscribe();
        loop {
            let due = changes.borrow_and_update().due(time);
            let due = async {
                match due {
                    Some(due) => sleep_until(due).await,
                    None => pending().await,
                }
            };
            tokio::select! {
                biased;
                // Polled first: a timer that expires in the same moment must not cut off a
                // connection that was just admitted.
                _ = changes.changed() => {}
                () = due => return,
            }
        }
    }
}

impl Reading {
    /// Returns when an alarm is due, if nothing is in use.
    fn due(&self, time: TimeSpan) -> Option<Instant> {
        (self.in_use == 0).then(|| time.after(self.idle_since))
    }
}

/// One use, until this is dropped.
#[derive(Debug)]
pub struct InUse(watch::Sender<Reading>);

impl Drop for InUse {
    fn drop(&mut self) {
        self.0.send_if_modified(|reading| {
            reading.in_use -= 1;
            reading.idle_since = Instant::now();
            reading.in_use == 0
        });
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::{advance, timeout};

    use super::*;

    const MINUTE: Duration = Duration::from_secs(60);

    #[tokio::test(start_paused = true)]
    async fn the_first_and_the_last_use_are_noticed() {
        let clock = IdleClock::new();
        let first = clock.begin_use();
        clock.used().await;
        let second = clock.begin_use();
        drop(first);
        assert!(timeout(MINUTE, clock.unused()).await.is_err(), "one of two uses goes on");
        drop(second);
        clock.unused().await;
        assert!(!clock.is_in_use());
    }

    #[tokio::test(start_paused = true)]
    async fn time_counts_from_the_end_of_the_last_use() {
        let clock = IdleClock::new();
        let start = Instant::now();
        let uses = async {
            advance(MINUTE / 2).await;
            let in_use = clock.begin_use();
            advance(MINUTE * 5).await;
            drop(in_use);
        };
        let ((), ()) = tokio::join!(clock.alarm(TimeSpan::new(MINUTE)), uses);
        let idle = start.elapsed();
        assert!(idle >= MINUTE * 13 / 2 && idle < MINUTE * 7, "{idle:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_use_that_begins_as_the_timer_expires_is_not_cut_off() {
        for _ in 0..100 {
            let clock = IdleClock::new();
            let mut alarm = std::pin::pin!(clock.alarm(TimeSpan::new(MINUTE)));
            assert!(timeout(MINUTE / 2, &mut alarm).await.is_err());
            let in_use = clock.begin_use();
            advance(MINUTE).await;
            assert!(timeout(MINUTE, &mut alarm).await.is_err());
            drop(in_use);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn time_counts_from_the_start() {
        let start = Instant::now();
        IdleClock::new().alarm(TimeSpan::new(MINUTE)).await;
        assert!(start.elapsed() >= MINUTE);
    }

    #[tokio::test(start_paused = true)]
    async fn an_alarm_sets_no_other_back() {
        let (clock, start) = (IdleClock::new(), Instant::now());
        clock.alarm(TimeSpan::new(MINUTE)).await;
        clock.alarm(TimeSpan::new(MINUTE * 2)).await;
        let idle = start.elapsed();
        assert!(idle >= MINUTE * 2 && idle < MINUTE * 3, "{idle:?}");
    }
}
