//! `--drain-time=`: open connections may end before the process does. New ones are not accepted any more.

use std::time::Duration;

use sd_notify::NotifyState;
use tokio::time::{Instant, sleep, sleep_until};

use crate::config::timespan::TimeSpan;
use crate::limits::ConnectionLimit;
use crate::notify::Notifier;

/// Waits until the last connection has ended, or `time` has passed. Meanwhile systemd is asked to wait.
pub async fn drain(time: TimeSpan, limit: &ConnectionLimit, notifier: &Notifier) {
    let mut watch = limit.watch();
    if time.is_zero() || watch.is_empty() {
        return;
    }
    let open = limit.counts().open;
    let most = if time.finite().is_some() { format!(" up to {time}") } else { String::new() };
    tracing::info!(
        "Stopping, waiting{most} for open connections to end: {open}. (A second signal resets them.)"
    );
    let deadline = time.deadline();
    let extend = async {
        loop {
            let open = limit.counts().open;
            let left = time.finite().map(|_| deadline.saturating_duration_since(Instant::now()));
            let status = status(open, left);
            let extension = NotifyState::ExtendTimeoutUsec(EXTENSION.as_micros() as u32);
            notifier.send(&[extension, NotifyState::Status(&status)]).await;
            sleep(INTERVAL).await;
        }
    };
    tokio::select! {
        biased;
        () = watch.wait_empty() => tracing::info!("All connections have ended."),
        () = sleep_until(deadline) => {}
        () = extend => {}
    }
}

/// Returns `Draining, 3 connections are left, for up to 27s`.
fn status(open: u32, left: Option<Duration>) -> String {
    let (plural, are) = if open == 1 { ("", "is") } else { ("s", "are") };
    let status = format!("Draining, {open} connection{plural} {are} left");
    let Some(left) = left else { return status };
    // Rounded up: the first status shows all of --drain-time=, and none shows zero.
    let seconds = left.as_millis().div_ceil(1000) as u64;
    format!("{status}, for up to {}", TimeSpan::new(Duration::from_secs(seconds)))
}

/// The pause between two messages to systemd.
const INTERVAL: Duration = Duration::from_secs(1);

/// How long systemd waits for the next message, or for COMMAND to stop.
const EXTENSION: Duration = Duration::from_secs(30);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn status_counts_down() {
        let status = |open, millis: Option<u64>| status(open, millis.map(Duration::from_millis));
        assert_eq!(status(3, Some(27_000)), "Draining, 3 connections are left, for up to 27s");
        assert_eq!(status(1, Some(26_001)), "Draining, 1 connection is left, for up to 27s");
        assert_eq!(status(1, None), "Draining, 1 connection is left");
    }
}
