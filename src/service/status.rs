//! The texts of `STATUS=` (sd_notify(3)), and the one that changes while the proxy serves.

use std::fmt;
use std::future::pending;
use std::time::Duration;

use sd_notify::NotifyState;
use tokio::time::{Instant, sleep, sleep_until};

use crate::backend::lifecycle::Lifecycle;
use crate::backend::state::BackendState;
use crate::config::timespan::TimeSpan;
use crate::limits::{ConnectionCounts, ConnectionLimit};
use crate::listen::accepted::ListenerInfo;
use crate::logging::bounded_line;
use crate::logging::bytes::Bytes;
use crate::notify::Notifier;

/// The status from readiness to the first change. systemd-socket-proxyd has the same words, also
/// those of [`SHUTTING_DOWN`].
pub const PROCESSING: &str = "Processing requests...";

/// While COMMAND stops and open connections are reset.
pub const SHUTTING_DOWN: &str = "Shutting down...";

/// While connections are drained: `Draining, 3 connections are left, for up to 27s`.
pub fn draining(open: u32, left: Option<Duration>) -> String {
    let (plural, are) = if open == 1 { ("", "is") } else { ("s", "are") };
    let status = format!("Draining, {open} connection{plural} {are} left");
    let Some(left) = left else { return status };
    // Rounded up: the first status shows all of --drain-time=, and none shows zero.
    let seconds = left.as_millis().div_ceil(1000) as u64;
    format!("{status}, for up to {}", TimeSpan::new(Duration::from_secs(seconds)))
}

/// After connections were stored for the next process.
pub fn handed_over(stored: usize) -> String {
    format!("Left open connections with systemd: {stored}.")
}

/// Sends `STATUS=` whenever its text has changed, at most once a second, forever. Looks at it when
/// the counts or COMMAND's state change, every few seconds while connections are open, and when
/// COMMAND's age shows another value.
///
/// `bytes` returns the bytes transferred. With several listeners the status names those that have
/// connections. `restored` is the number of connections restored from the previous process.
pub async fn publish_status(
    notifier: &Notifier,
    limit: &ConnectionLimit,
    restored: usize,
    listeners: &[&ListenerInfo],
    bytes: impl Fn() -> u64,
    lifecycle: Option<&Lifecycle>,
) {
    if !notifier.has_manager() {
        return pending().await;
    }
    let max = limit.max().get();
    let (mut sent, mut is_unsent) = (String::new(), false);
    let mut next = Instant::now();
    let mut state = lifecycle.map(Lifecycle::watch);
    // The backend's state and number of starts, and when they last changed.
    let mut backend: Option<((BackendState, u64), Instant)> = None;
    loop {
        let open = limit.counts().open;
        let running = backend.filter(|((state, _), _)| *state == BackendState::Ready);
        let next_age = running.map(|(_, since)| Age::new(since.elapsed()).next);
        tokio::select! {
            () = limit.changed() => {}
            // Disabled if there is no COMMAND.
            Some(_) = async { Some(state.as_mut()?.changed().await) } => {}
            () = sleep(BYTES_INTERVAL), if open > 0 || is_unsent => {}
            () = sleep(next_age.unwrap_or_default()), if next_age.is_some() => {}
        }
        sleep_until(next).await;
        next = Instant::now() + INTERVAL;
        if let (Some(lifecycle), Some(state)) = (lifecycle, &mut state) {
            let now = (*state.borrow_and_update(), lifecycle.counters.all.get());
            if backend.is_none_or(|(before, _)| before != now) {
                backend = Some((now, Instant::now()));
            }
        }
        let counts = limit.counts();
        let failed = listeners.iter().map(|info| info.counts.failed.get()).sum();
        let refused = listeners.iter().map(|info| info.counts.refused()).sum();
        let waiting = listeners.iter().map(|info| info.counts.waiting.taken()).sum();
        let open = listeners.iter().map(|info| (info.to_string(), info.counts.open.taken()));
        let open = open.filter(|(_, open)| *open > 0 && listeners.len() > 1).collect();
        let command = lifecycle.zip(backend);
        let command = command.map(|(it, ((state, _), since))| (&it.name, state, since.elapsed()));
        let status = {
            let bytes = bytes();
            Status { counts, waiting, failed, refused, max, bytes, restored, open, command }
                .to_string()
        };
        // The name of a socket may have any length and any characters.
        let status = bounded_line(&status, STATUS_MAX);
        // systemd's queue may be full.
        is_unsent = status != sent && notifier.send_once(&[NotifyState::Status(&status)]).is_err();
        if !is_unsent {
            sent = status;
        }
    }
}

/// `2 of 256 connections, 120 served, 1.2 GiB; web (127.0.0.1:80): 2; webhook running for 3min`.
#[derive(Default)]
struct Status<'a> {
    counts: ConnectionCounts,
    /// Connections that wait for their backend.
    waiting: usize,
    /// Connections that have ended because there was no backend.
    failed: u64,
    /// Connections closed at a limit.
    refused: u64,
    max: u32,
    bytes: u64,
    restored: usize,
    /// Open connections of each listener that has any, if there are several listeners.
    open: Vec<(String, usize)>,
    /// COMMAND's name, its state, and for how long.
    command: Option<(&'a String, BackendState, Duration)>,
}

impl fmt::Display for Status<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ConnectionCounts { open, served } = self.counts;
        write!(f, "{open} of {} connections, ", self.max)?;
        if self.waiting > 0 {
            write!(f, "{} waiting, ", self.waiting)?;
        }
        // A failed connection may not have ended yet.
        write!(f, "{} served, ", served.saturating_sub(self.failed))?;
        if self.failed > 0 {
            write!(f, "{} failed, ", self.failed)?;
        }
        if self.refused > 0 {
            write!(f, "{} refused, ", self.refused)?;
        }
        write!(f, "{}", Bytes(self.bytes))?;
        if self.restored > 0 {
            write!(f, "; {} recovered", self.restored)?;
        }
        for (listener, open) in self.open.iter().take(LISTENERS_MAX) {
            write!(f, "; {listener}: {open}")?;
        }
        if self.open.len() > LISTENERS_MAX {
            write!(f, "; {} more listeners", self.open.len() - LISTENERS_MAX)?;
        }
        let Some((name, state, time)) = &self.command else { return Ok(()) };
        write!(f, "; {name} {state}")?;
        match Age::new(*time).shown {
            age if *state == BackendState::Ready && !age.is_zero() => write!(f, " for {age}"),
            _ => Ok(()),
        }
    }
}

/// For how long COMMAND has been running. From one minute on it is shown in one unit, so that
/// `STATUS=` is sent seldom.
struct Age {
    shown: TimeSpan,
    /// The time until another age is shown.
    next: Duration,
}

impl Age {
    fn new(time: Duration) -> Self {
        let seconds = time.as_secs();
        let unit = match seconds {
            0..3600 => 60,
            3600..86_400 => 3600,
            _ => 86_400,
        };
        let shown = Duration::from_secs(seconds / unit * unit);
        Self { shown: TimeSpan::new(shown), next: shown + Duration::from_secs(unit) - time }
    }
}

/// The pause between two `STATUS=` messages.
const INTERVAL: Duration = Duration::from_secs(1);

/// How often the bytes are read while no connection opens or closes.
const BYTES_INTERVAL: Duration = Duration::from_secs(5);

/// Listeners that `STATUS=` names, so that it stays readable.
const LISTENERS_MAX: usize = 8;

/// Bytes of `STATUS=`. systemd accepts no message above 4096.
const STATUS_MAX: usize = 2048;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn status_shows_counts_bytes_listeners_and_command() {
        let status = |open, served, refused, bytes| {
            let counts = ConnectionCounts { open, served };
            Status { counts, refused, max: 256, bytes, ..Status::default() }.to_string()
        };
        let counts = ConnectionCounts { open: 3, served: 5 };
        let held = Status { counts, waiting: 2, failed: 4, max: 256, ..Status::default() };
        let text = "3 of 256 connections, 2 waiting, 1 served, 4 failed, 0 bytes";
        assert_eq!(held.to_string(), text);
        assert_eq!(status(2, 120, 0, 1_288_490_189), "2 of 256 connections, 120 served, 1.2 GiB");
        assert_eq!(status(1, 0, 3, 64), "1 of 256 connections, 0 served, 3 refused, 64 bytes");
        assert_eq!(status(0, 1, 0, 1536), "0 of 256 connections, 1 served, 1.5 KiB");
        let name = "webhook".to_string();
        let command = Some((&name, BackendState::Failed(3), Duration::from_secs(60)));
        let open = vec![("web (127.0.0.1:80)".to_string(), 2), ("api (/run/a)".to_string(), 1)];
        let status = Status { max: 1, open, command, ..Status::default() };
        assert_eq!(
            status.to_string(),
            "0 of 1 connections, 0 served, 0 bytes; web (127.0.0.1:80): 2; api (/run/a): 1; \
             webhook failed 3 times in a row"
        );
        let open = (0..10).map(|port| (format!(":{port}"), 1)).collect();
        let status = Status { max: 1, open, ..Status::default() };
        assert!(status.to_string().ends_with("; :7: 1; 2 more listeners"), "{status}");
    }

    #[test]
    fn status_shows_for_how_long_command_runs() {
        for (seconds, shown, next) in [
            (0, "running", 60),
            (59, "running", 1),
            (200, "running for 3min", 40),
            (3700, "running for 1h", 3500),
            (90_000, "running for 1d", 82_800),
        ] {
            let time = Duration::from_secs(seconds);
            let name = "python3".to_string();
            let command = Some((&name, BackendState::Ready, time));
            let status = Status { command, ..Status::default() }.to_string();
            assert!(status.ends_with(&format!("; python3 {shown}")), "{status}");
            assert_eq!(Age::new(time).next, Duration::from_secs(next));
        }
    }

    #[test]
    fn draining_counts_down() {
        let status = |open, millis: Option<u64>| draining(open, millis.map(Duration::from_millis));
        assert_eq!(status(3, Some(27_000)), "Draining, 3 connections are left, for up to 27s");
        assert_eq!(status(1, Some(26_001)), "Draining, 1 connection is left, for up to 27s");
        assert_eq!(status(1, None), "Draining, 1 connection is left");
    }
}
