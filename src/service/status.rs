//! The `STATUS=` line, at most once a second.

use std::fmt;
use std::future::pending;
use std::time::Duration;

use sd_notify::NotifyState;
use tokio::time::{Instant, sleep, sleep_until};

use crate::backend::command::Supervisor;
use crate::backend::command::state::CommandState;
use crate::limits::{ConnectionCounts, ConnectionLimit};
use crate::listen::listener::ListenerInfo;
use crate::logging::bounded_line;
use crate::logging::bytes::Bytes;
use crate::notify::Notifier;

/// Sends `STATUS=` whenever it changes, forever and at most once a second: after a change of the counts or
/// of COMMAND's state, and every few seconds while connections are open.
///
/// `bytes` returns the bytes transferred. With several listeners the status names those that have
/// connections. `restored` is the number of connections restored from the previous process.
pub async fn publish_status(
    notifier: &Notifier,
    limit: &ConnectionLimit,
    restored: usize,
    listeners: &[&ListenerInfo],
    bytes: impl Fn() -> u64,
    supervisor: Option<&Supervisor>,
) {
    if !notifier.has_manager() {
        return pending().await;
    }
    let max = limit.max().get();
    let mut sent = String::new();
    let mut next = Instant::now();
    let mut state = supervisor.map(Supervisor::watch);
    loop {
        let open = limit.counts().open;
        tokio::select! {
            () = limit.changed() => {}
            // Disabled if there is no COMMAND.
            Some(_) = async { Some(state.as_mut()?.changed().await) } => {}
            () = sleep(BYTES_INTERVAL), if open > 0 => {}
        }
        sleep_until(next).await;
        next = Instant::now() + INTERVAL;
        let command = supervisor.zip(state.as_mut()).map(|(supervisor, state)| {
            (supervisor.command.to_string(), *state.borrow_and_update())
        });
        let counts = limit.counts();
        let open = listeners.iter().map(|info| (info.to_string(), info.counts.open.taken()));
        let open = open.filter(|(_, open)| *open > 0 && listeners.len() > 1).collect();
        let status = Status { counts, max, bytes: bytes(), restored, open, command }.to_string();
        // The name of a socket may have any length and any characters.
        let status = bounded_line(&status, STATUS_MAX);
        if status != sent && notifier.send_once(&[NotifyState::Status(&status)]).is_ok() {
            sent = status;
        }
    }
}

/// `2 connections of 256, 120 served, 1.2 GiB; web (127.0.0.1:80): 2; webhook: running`.
#[derive(Default)]
struct Status {
    counts: ConnectionCounts,
    max: u32,
    bytes: u64,
    restored: usize,
    /// Open connections of each listener that has any, if there are several listeners.
    open: Vec<(String, usize)>,
    command: Option<(String, CommandState)>,
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ConnectionCounts { open, served, refused } = self.counts;
        let plural = if open == 1 { "" } else { "s" };
        write!(f, "{open} connection{plural} of {}, {served} served, ", self.max)?;
        if refused > 0 {
            write!(f, "{refused} refused, ")?;
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
        match &self.command {
            Some((name, state)) => write!(f, "; {name}: {state}"),
            None => Ok(()),
        }
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
            let counts = ConnectionCounts { open, served, refused };
            Status { counts, max: 256, bytes, ..Status::default() }.to_string()
        };
        assert_eq!(status(2, 120, 0, 1_288_490_189), "2 connections of 256, 120 served, 1.2 GiB");
        assert_eq!(status(1, 0, 3, 64), "1 connection of 256, 0 served, 3 refused, 64 bytes");
        assert_eq!(status(0, 1, 0, 1536), "0 connections of 256, 1 served, 1.5 KiB");
        let command = Some(("webhook".to_string(), CommandState::Failed(3)));
        let open = vec![("web (127.0.0.1:80)".to_string(), 2), ("api (/run/a)".to_string(), 1)];
        let status = Status { max: 1, open, command, ..Status::default() };
        assert_eq!(
            status.to_string(),
            "0 connections of 1, 0 served, 0 bytes; web (127.0.0.1:80): 2; api (/run/a): 1; \
             webhook: failed 3 times in a row"
        );
        let open = (0..10).map(|port| (format!(":{port}"), 1)).collect();
        let status = Status { max: 1, open, ..Status::default() };
        assert!(status.to_string().ends_with("; :7: 1; 2 more listeners"), "{status}");
    }
}
