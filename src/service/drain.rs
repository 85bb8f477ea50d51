//! `--drain-time=`: open connections get time to end before the process exits. New ones are not
//! accepted any more.

use std::time::Duration;

use sd_notify::NotifyState;
use tokio::time::{Instant, sleep, sleep_until};

use crate::config::timespan::TimeSpan;
use crate::limits::client_limits::ClientLimits;
use crate::notify::Notifier;
use crate::service::status::draining;

/// Waits until the last connection has ended, or `time` has passed. Meanwhile systemd is asked to
/// wait.
pub async fn drain(time: TimeSpan, limits: &ClientLimits, notifier: &Notifier) {
    let ClientLimits { limit, clock, .. } = limits;
    if time.is_zero() || !clock.has_connections() {
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
            let status = draining(open, left);
            let extension = NotifyState::ExtendTimeoutUsec(EXTENSION.as_micros() as u32);
            notifier.send(&[extension, NotifyState::Status(&status)]).await;
            sleep(INTERVAL).await;
        }
    };
    tokio::select! {
        biased;
        () = clock.unused() => tracing::info!("All connections have ended."),
        () = sleep_until(deadline) => {
            let open = limit.counts().open;
            tracing::info!(
                "The drain time of {time} is over, connections are still open: {open}. (Raise \
                 --drain-time=.)"
            );
        }
        () = extend => {}
    }
}

/// The pause between two messages to systemd.
const INTERVAL: Duration = Duration::from_secs(1);

/// How long systemd waits for the next message, or for COMMAND to stop.
const EXTENSION: Duration = Duration::from_secs(30);
