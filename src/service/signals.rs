//! The signals that stop the process.

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc::UnboundedReceiver;

use crate::logging::os_message;
use crate::runtime::dispositions::was_ignored;

/// SIGTERM, SIGINT and SIGHUP.
///
/// The last two stay ignored if they were ignored at the start: nohup(1) ignores SIGHUP, and a
/// shell ignores SIGINT for what a script starts with `&`.
#[derive(Debug)]
pub struct Signals {
    terminate: Terminate,
    interrupt: Option<Signal>,
    hangup: Option<Signal>,
}

/// Where SIGTERM comes from.
#[derive(Debug)]
enum Terminate {
    Caught(Signal),
    /// Of one proxy among several in a process, in a simulation.
    Simulated(UnboundedReceiver<()>),
}

impl Terminate {
    async fn recv(&mut self) -> Option<()> {
        match self {
            Self::Caught(signal) => signal.recv().await,
            Self::Simulated(receiver) => receiver.recv().await,
        }
    }
}

impl Signals {
    /// Takes each message for a SIGTERM.
    pub fn simulated(receiver: UnboundedReceiver<()>) -> Self {
        Self { terminate: Terminate::Simulated(receiver), interrupt: None, hangup: None }
    }

    /// Catches the signals: from now on they do not kill the process.
    ///
    /// # Errors
    /// One line on the failure of sigaction(2).
    pub fn catch() -> Result<Self, String> {
        // With `LimitFSIZE=` a write that is too large then fails with EFBIG, and ends one
        // connection at most.
        let _ = catch(SignalKind::from_raw(libc::SIGXFSZ))?;
        // Where SIGCHLD is ignored, the kernel reaps children, and their status is lost.
        let _ = catch(SignalKind::child())?;
        Ok(Self {
            terminate: Terminate::Caught(catch(SignalKind::terminate())?),
            interrupt: catch_unless_ignored(SignalKind::interrupt())?,
            hangup: catch_unless_ignored(SignalKind::hangup())?,
        })
    }

    /// Waits for the first signal.
    pub async fn stop(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            Some(()) = next(&mut self.interrupt) => {}
            Some(()) = next(&mut self.hangup) => {}
        }
    }

    /// Waits for a second signal. SIGHUP is not one: systemd may send it right behind the first
    /// (`SendSIGHUP=`, systemd.kill(5)).
    pub async fn second(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            Some(()) = next(&mut self.interrupt) => {}
        }
    }
}

/// Catches a signal: from now on it does not kill the process.
///
/// # Errors
/// One line on the failure of sigaction(2).
pub fn catch(kind: SignalKind) -> Result<Signal, String> {
    signal(kind).map_err(|error| format!("Failed to wait for signals: {}.", os_message(&error)))
}

fn catch_unless_ignored(kind: SignalKind) -> Result<Option<Signal>, String> {
    (!was_ignored(kind.as_raw_value())).then(|| catch(kind)).transpose()
}

/// Waits for the signal. Returns `None` at once if it stays ignored, which disables the branch of a
/// `select!`.
async fn next(signal: &mut Option<Signal>) -> Option<()> {
    signal.as_mut()?.recv().await
}
