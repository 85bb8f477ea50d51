//! The `STATUS=` line, at most once a second.

use std::fmt;
use std::time::Duration;

use sd_notify::NotifyState;
use tokio::sync::watch;
use tokio::time::{Instant, sleep};

use crate::backend::command::Supervisor;
use crate::backend::command::state::CommandState;
use crate::limits::{ConnectionCounts, ConnectionLimit};
use crate::listen::listener::ListenerInfo;
use crate::logging::bounded_line;
use crate::logging::bytes::Bytes;
use crate::notify::Notifier;

/// Between two `STATUS=` messages.
const STATUS_INTERVAL: Duration = Duration::from_secs(1);

/// Between two looks at the bytes while connections stay as they are.
const BYTES_INTERVAL: Duration = Duration::from_secs(5);

/// Listeners that `STATUS=` names: it is to be read.
const ENTRANCES_MAX: usize = 8;

/// Bytes of `STATUS=`; systemd takes no message above 4096.
const STATUS_MAX: usize = 2048;

/// Keeps `STATUS=` current, for ever: after a change of the load or of the application, and now
/// and then while bytes flow, at most once a second. `carried` tells how many; several entrances
/// are told apart. `restored` were taken over from the process before this one.
pub async fn publish_status(
    notifier: &Notifier,
    limit: &ConnectionLimit,
    restored: usize,
    listener_infos: &[&ListenerInfo],
    carried: impl Fn() -> u64,
    application: Option<&Supervisor>,
) {
    if !notifier.has_manager() {
        return std::future::pending().await;
    }
    let max = limit.max().get();
    let mut said = String::new();
    let mut next = Instant::now();
    let mut phase = application.map(Supervisor::watch);
    loop {
        let open = limit.counts().open;
        tokio::select! {
            () = limit.changed() => {}
            () = changed(&mut phase) => {}
            () = sleep(BYTES_INTERVAL), if open > 0 => {}
        }
        tokio::time::sleep_until(next).await;
        next = Instant::now() + STATUS_INTERVAL;
        let application = application.zip(phase.as_mut()).map(|(application, phase)| {
            (application.name().to_string(), *phase.borrow_and_update())
        });
        let load = limit.counts();
        let open = listener_infos
            .iter()
            .map(|listener_info| (listener_info.to_string(), listener_info.counts().open.taken()));
        let open = open.filter(|(_, open)| *open > 0 && listener_infos.len() > 1).collect();
        let carried = carried();
        let status = Status { load, max, carried, restored, open, application }.to_string();
        // A socket's name is anything.
        let status = bounded_line(&status, STATUS_MAX);
        if status != said && notifier.send_once(&[NotifyState::Status(&status)]).is_ok() {
            said = status;
        }
    }
}

/// Waits for another phase; for ever if there is no application.
async fn changed(phase: &mut Option<watch::Receiver<CommandState>>) {
    let alive = match phase {
        Some(phase) => phase.changed().await.is_ok(),
        None => false,
    };
    if !alive {
        std::future::pending().await
    }
}

/// `2 connections of 256, 120 served, 1.2 GiB; web (127.0.0.1:80): 2; webhook: running`.
struct Status {
    load: ConnectionCounts,
    max: u32,
    carried: u64,
    restored: usize,
    /// Connections at each of several listeners that have any.
    open: Vec<(String, usize)>,
    application: Option<(String, CommandState)>,
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ConnectionCounts { open, served, refused } = self.load;
        let plural = if open == 1 { "" } else { "s" };
        write!(f, "{open} connection{plural} of {}, {served} served, ", self.max)?;
        if refused > 0 {
            write!(f, "{refused} refused, ")?;
        }
        write!(f, "{}", Bytes(self.carried))?;
        if self.restored > 0 {
            write!(f, "; {} recovered", self.restored)?;
        }
        for (listener, open) in self.open.iter().take(ENTRANCES_MAX) {
            write!(f, "; {listener}: {open}")?;
        }
        if self.open.len() > ENTRANCES_MAX {
            write!(f, "; {} more listeners", self.open.len() - ENTRANCES_MAX)?;
        }
        match &self.application {
            Some((name, phase)) => write!(f, "; {name}: {phase}"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn status_says_what_goes_on() {
        let status = |open, served, refused, carried| {
            let load = ConnectionCounts { open, served, refused };
            let (restored, open, application) = (0, Vec::new(), None);
            Status { load, max: 256, carried, restored, open, application }.to_string()
        };
        assert_eq!(status(2, 120, 0, 1_288_490_189), "2 connections of 256, 120 served, 1.2 GiB");
        assert_eq!(status(1, 0, 3, 64), "1 connection of 256, 0 served, 3 refused, 64 bytes");
        assert_eq!(status(0, 1, 0, 1536), "0 connections of 256, 1 served, 1.5 KiB");
        let application = Some(("webhook".to_string(), CommandState::Failed(3)));
        let open = vec![("web (127.0.0.1:80)".to_string(), 2), ("api (/run/a)".to_string(), 1)];
        let status = Status {
            load: ConnectionCounts::default(),
            max: 1,
            carried: 0,
            restored: 0,
            open,
            application,
        };
        assert_eq!(
            status.to_string(),
            "0 connections of 1, 0 served, 0 bytes; web (127.0.0.1:80): 2; api (/run/a): 1; \
             webhook: failed 3 times in a row"
        );
        let open = (0..10).map(|port| (format!(":{port}"), 1)).collect();
        let status = Status {
            load: ConnectionCounts::default(),
            max: 1,
            carried: 0,
            restored: 0,
            open,
            application: None,
        };
        assert!(status.to_string().ends_with("; :7: 1; 2 more listeners"), "{status}");
    }
}
