//! The last connections: nobody is let in any more, and those that are open get `--drain-time=`.

use std::fmt;
use std::time::Duration;

use sd_notify::NotifyState;
use tokio::time::{Instant, sleep, sleep_until};

use crate::config::timespan::TimeSpan;
use crate::limits::ConnectionLimit;
use crate::notify::Notifier;

/// Between two messages to systemd.
const INTERVAL: Duration = Duration::from_secs(1);

/// What systemd is asked for in each of them: it waits for the next one, or for the end of COMMAND.
const EXTENSION: Duration = Duration::from_secs(30);

/// Waits until the last connection has ended, or `time` is over, and has systemd wait meanwhile.
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
    let tell = async {
        loop {
            let open = limit.counts().open;
            let left = time.finite().map(|_| deadline.saturating_duration_since(Instant::now()));
            let status = Status { open, left }.to_string();
            let extension = NotifyState::ExtendTimeoutUsec(EXTENSION.as_micros() as u32);
            notifier.send(&[extension, NotifyState::Status(&status)]).await;
            sleep(INTERVAL).await;
        }
    };
    tokio::select! {
        biased;
        () = watch.wait_empty() => tracing::info!("All connections have ended."),
        () = sleep_until(deadline) => {}
        () = tell => {}
    }
}

/// `Draining, 3 connections are left, for up to 27s`.
struct Status {
    open: u32,
    left: Option<Duration>,
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let open = self.open;
        let (plural, are) = if open == 1 { ("", "is") } else { ("s", "are") };
        write!(f, "Draining, {open} connection{plural} {are} left")?;
        match self.left {
            // Rounded up, so that it begins with what was asked for and does not end with nothing.
            Some(left) => {
                let seconds = left.as_millis().div_ceil(1000) as u64;
                write!(f, ", for up to {}", TimeSpan::new(Duration::from_secs(seconds)))
            }
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn status_counts_down() {
        let status = |open, millis: Option<u64>| {
            Status { open, left: millis.map(Duration::from_millis) }.to_string()
        };
        assert_eq!(status(3, Some(27_000)), "Draining, 3 connections are left, for up to 27s");
        assert_eq!(status(1, Some(26_001)), "Draining, 1 connection is left, for up to 27s");
        assert_eq!(status(1, None), "Draining, 1 connection is left");
    }
}
