//! The signals that end the process, and the one that asks.

#![forbid(unsafe_code)]

use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::logging::in_words;

/// SIGTERM, SIGINT and SIGHUP.
#[derive(Debug)]
pub struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hangup: Signal,
}

/// SIGUSR1.
#[derive(Debug)]
pub struct Questions(Signal);

impl Questions {
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
    signal(kind).map_err(|error| format!("Failed to wait for signals: {}.", in_words(&error)))
}

impl Signals {
    /// From now on they don't end it by themselves.
    ///
    /// # Errors
    /// One line on sigaction(2)'s.
    pub fn catch() -> Result<Self, String> {
        Ok(Self {
            terminate: catch(SignalKind::terminate())?,
            interrupt: catch(SignalKind::interrupt())?,
            hangup: catch(SignalKind::hangup())?,
        })
    }

    /// Waits for the first of them.
    pub async fn stop(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
            _ = self.hangup.recv() => {}
        }
    }

    /// Waits for another; but SIGHUP may follow the first one by itself
    /// (`SendSIGHUP=`, systemd.kill(5)).
    pub async fn again(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}
