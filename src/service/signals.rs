//! The signals that end the process, and the one that asks.

use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::logging::os_message;
use crate::runtime::dispositions::was_ignored;

/// SIGTERM, SIGINT and SIGHUP. The last two stay ignored if they were at the start: nohup(1) ignores
/// SIGHUP, and a shell's script SIGINT in what it starts with `&`.
#[derive(Debug)]
pub struct Signals {
    terminate: Signal,
    interrupt: Option<Signal>,
    hangup: Option<Signal>,
}

/// SIGUSR1.
#[derive(Debug)]
pub struct ReportSignal(Signal);

impl ReportSignal {
    /// From now on it does not end the process.
    ///
    /// # Errors
    /// One line on sigaction(2)'s.
    pub fn catch() -> Result<Self, String> {
        catch(SignalKind::user_defined1()).map(Self)
    }

    /// Waits for the next.
    pub async fn next(&mut self) {
        let _ = self.0.recv().await;
    }
}

fn catch(kind: SignalKind) -> Result<Signal, String> {
    signal(kind).map_err(|error| format!("Failed to wait for signals: {}.", os_message(&error)))
}

fn catch_unless_ignored(kind: SignalKind) -> Result<Option<Signal>, String> {
    (!was_ignored(kind.as_raw_value())).then(|| catch(kind)).transpose()
}

async fn next(signal: &mut Option<Signal>) {
    match signal {
        Some(signal) => {
            signal.recv().await;
        }
        None => std::future::pending().await,
    }
}

impl Signals {
    /// From now on they don't end it by themselves.
    ///
    /// # Errors
    /// One line on sigaction(2)'s.
    pub fn catch() -> Result<Self, String> {
        Ok(Self {
            terminate: catch(SignalKind::terminate())?,
            interrupt: catch_unless_ignored(SignalKind::interrupt())?,
            hangup: catch_unless_ignored(SignalKind::hangup())?,
        })
    }

    /// Waits for the first of them.
    pub async fn stop(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            () = next(&mut self.interrupt) => {}
            () = next(&mut self.hangup) => {}
        }
    }

    /// Waits for another; but SIGHUP may follow the first one by itself
    /// (`SendSIGHUP=`, systemd.kill(5)).
    pub async fn again(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            () = next(&mut self.interrupt) => {}
        }
    }
}
