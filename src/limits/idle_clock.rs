//! The idle clock: for how long nothing has been in use.
//!
//! A connection is *in use* from accept to close, or with `--wake-on=data` from its first byte on,
//! unless its client is passive (`--passive-from=`). The clock runs while nothing is in use: from
//! the start of the process, from COMMAND's readiness, or from the end of the last use.
//! `--freeze-idle-time=`, `--stop-idle-time=` and `--exit-idle-time=` are alarms on this one clock,
//! and no alarm sets it back. `--min-run-time=` holds all of them back.

use std::future::pending;
use std::sync::Arc;

use tokio::sync::{Notify, watch};
use tokio::time::{Instant, sleep_until};

use crate::config::timespan::TimeSpan;

/// The clock. Clones share it.
#[derive(Clone, Debug)]
pub struct IdleClock(Arc<ClockState>);

#[derive(Debug)]
struct ClockState {
    reading: watch::Sender<Reading>,
    /// Notified when connections that are not in use are to be reset.
    reset: Notify,
}

#[derive(Debug)]
struct Reading {
    /// Connections in use.
    connections: usize,
    /// 1 while COMMAND says that it is busy.
    busy: usize,
    /// When the last use ended. Means nothing while something is in use.
    idle_since: Instant,
    /// No alarm is due before this, while COMMAND runs.
    held_until: Option<Instant>,
}

impl IdleClock {
    /// Creates a clock that runs from now on.
    pub fn new() -> Self {
        let reading =
            Reading { connections: 0, busy: 0, idle_since: Instant::now(), held_until: None };
        Self(Arc::new(ClockState {
            reading: watch::Sender::new(reading),
            reset: Notify::default(),
        }))
    }

    /// Stops the clock for a connection until the guard is dropped.
    pub fn begin_use(&self) -> InUse {
        self.begin(|reading| &mut reading.connections)
    }

    /// Stops the clock for work without a connection until the guard is dropped.
    pub fn begin_work(&self) -> InUse {
        self.begin(|reading| &mut reading.busy)
    }

    fn begin(&self, count: fn(&mut Reading) -> &mut usize) -> InUse {
        self.0.reading.send_if_modified(|reading| {
            let was_idle = reading.is_idle();
            *count(reading) += 1;
            was_idle
        });
        InUse { clock: Arc::clone(&self.0), count }
    }

    pub fn is_in_use(&self) -> bool {
        !self.0.reading.borrow().is_idle()
    }

    /// Whether a connection is in use.
    pub fn has_connections(&self) -> bool {
        self.0.reading.borrow().connections > 0
    }

    /// Starts the clock again, because COMMAND is ready, and holds the alarms back for
    /// `min_run_time` from now on.
    pub fn begin_run(&self, min_run_time: TimeSpan) {
        self.0.reading.send_modify(|reading| {
            reading.idle_since = Instant::now();
            reading.held_until = Some(min_run_time.deadline());
        });
    }

    /// Holds the alarms back no longer, because COMMAND has ended.
    pub fn end_run(&self) {
        self.0.reading.send_modify(|reading| reading.held_until = None);
    }

    /// Asks for a reset of the connections that are not in use: COMMAND is frozen or stopped.
    pub fn request_reset(&self) {
        self.0.reset.notify_one();
    }

    /// Waits until [`IdleClock::request_reset`] was called since the last call. Supports one
    /// waiter.
    pub async fn reset_requested(&self) {
        self.0.reset.notified().await;
    }

    /// Waits until something is in use.
    pub async fn used(&self) {
        let _ = self.0.reading.subscribe().wait_for(|reading| !reading.is_idle()).await;
    }

    /// Waits until no connection is in use.
    pub async fn unused(&self) {
        let _ = self.0.reading.subscribe().wait_for(|reading| reading.connections == 0).await;
    }

    /// Waits until nothing has been in use for `time`.
    pub async fn alarm(&self, time: TimeSpan) {
        if time.finite().is_none() {
            return pending().await;
        }
        let mut changes = self.0.reading.subscribe();
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
    fn is_idle(&self) -> bool {
        self.connections == 0 && self.busy == 0
    }

    /// Returns when an alarm is due, if nothing is in use.
    fn due(&self, time: TimeSpan) -> Option<Instant> {
        let due = time.after(self.idle_since);
        self.is_idle().then(|| self.held_until.map_or(due, |until| due.max(until)))
    }
}

/// One use, until this is dropped.
#[derive(Debug)]
pub struct InUse {
    clock: Arc<ClockState>,
    count: fn(&mut Reading) -> &mut usize,
}

impl Drop for InUse {
    fn drop(&mut self) {
        self.clock.reading.send_if_modified(|reading| {
            *(self.count)(reading) -= 1;
            if reading.is_idle() {
                reading.idle_since = Instant::now();
            }
            // Wakes the waiters at the end of the last connection, even while COMMAND is busy: a
            // drain waits for that.
            reading.connections == 0
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

    /// Each pair of alarms, with and without a minimum run time: freeze and stop, freeze and exit,
    /// stop and exit (in either order). Times are in minutes.
    #[tokio::test(start_paused = true)]
    async fn alarms_do_not_move_each_other() {
        // The two times, the minimum run time, when COMMAND is ready, when a use begins and ends,
        // and when the two alarms are due.
        for ([first, second], min_run, ready, [begin, end], due) in [
            ([1, 3], None, None, [0, 0], [1, 3]),
            ([3, 1], None, None, [0, 0], [3, 1]),
            ([2, 2], None, None, [0, 0], [2, 2]),
            ([1, 3], Some(0), Some(2), [0, 0], [1, 5]),
            ([1, 3], Some(2), Some(0), [0, 0], [2, 3]),
            ([3, 1], Some(2), Some(0), [0, 0], [3, 2]),
            ([1, 3], Some(5), Some(0), [0, 0], [5, 5]),
            ([1, 3], None, None, [2, 4], [5, 7]),
            ([1, 3], Some(10), Some(0), [2, 4], [10, 10]),
            ([1, 3], Some(6), Some(0), [2, 4], [6, 7]),
            ([1, 3], Some(6), Some(3), [2, 4], [9, 9]),
        ] {
            let (clock, start) = (IdleClock::new(), Instant::now());
            let at = |minutes: u32| start + MINUTE * minutes;
            let run = async {
                if let Some((min_run, ready)) = min_run.zip(ready) {
                    sleep_until(at(ready)).await;
                    clock.begin_run(TimeSpan::new(MINUTE * min_run));
                }
            };
            let uses = async {
                if begin != end {
                    sleep_until(at(begin)).await;
                    let in_use = clock.begin_use();
                    sleep_until(at(end)).await;
                    drop(in_use);
                }
            };
            let alarm = async |minutes: u32| loop {
                clock.alarm(TimeSpan::new(MINUTE * minutes)).await;
                // An alarm before the use would be one of an earlier idle time.
                if begin == end || start.elapsed() >= MINUTE * end {
                    return start.elapsed();
                }
                clock.used().await;
            };
            let (first_due, second_due, (), ()) =
                tokio::join!(alarm(first), alarm(second), run, uses);
            for (found, due) in [first_due, second_due].into_iter().zip(due) {
                let late = found.checked_sub(MINUTE * due);
                let is_exact = late.is_some_and(|late| late < Duration::from_secs(1));
                assert!(is_exact, "{first} {second} {min_run:?} {ready:?}: {found:?}, not {due}");
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn end_of_a_run_releases_the_alarms() {
        let (clock, start) = (IdleClock::new(), Instant::now());
        clock.begin_run(TimeSpan::INFINITY);
        let alarm = clock.alarm(TimeSpan::new(MINUTE));
        assert!(timeout(MINUTE * 5, alarm).await.is_err());
        clock.end_run();
        clock.alarm(TimeSpan::new(MINUTE)).await;
        assert!(start.elapsed() < MINUTE * 6);
    }
}
