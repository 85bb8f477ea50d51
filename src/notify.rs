//! What systemd is told: READY, STATUS, STOPPING, WATCHDOG (sd_notify(3)).
//!
//! Nothing here blocks the event loop: the socket is non-blocking. While the queue of systemd's socket is
//! full (a daemon-reload, the boot), what systemd acts on is tried again until it is sent: `READY=1`,
//! `WATCHDOG=1`, and what the store is told. A status, and `STOPPING=1`, are left out.

use std::convert::Infallible;
use std::env;
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::BorrowedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixDatagram;
use std::time::Duration;

use rustix::net::{
    SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix, sendmsg_addr,
};
use sd_notify::NotifyState;
use tokio::time::{Instant, sleep};

use crate::logging::{RateLimit, os_message};

/// Between two attempts while systemd does not take a message, and how long before that is logged.
const RETRY_AFTER: Duration = Duration::from_millis(20);
const WARN_AFTER: Duration = Duration::from_secs(5);

static UNSENT: RateLimit = RateLimit::new(3, Duration::from_secs(60));
static BUSY: RateLimit = RateLimit::new(1, Duration::from_secs(60));

/// The service manager, or nobody.
#[derive(Debug)]
pub struct Notifier(Option<(UnixDatagram, SocketAddrUnix)>);

impl Notifier {
    /// Connects to `$NOTIFY_SOCKET`, a path or an abstract name.
    pub fn from_environment() -> Self {
        let Some(name) = env::var_os("NOTIFY_SOCKET") else {
            return Self(None);
        };
        let open = || -> io::Result<_> {
            let address = match name.as_bytes() {
                [b'@', name @ ..] => SocketAddrUnix::new_abstract_name(name)?,
                _ => SocketAddrUnix::new(name.as_os_str())?,
            };
            let socket = UnixDatagram::unbound()?;
            socket.set_nonblocking(true)?;
            Ok((socket, address))
        };
        Self(
            open()
                .inspect_err(|error| {
                    tracing::warn!("Failed to use NOTIFY_SOCKET={name:?}, ignoring: {error}");
                })
                .ok(),
        )
    }

    /// Whether there is one that can be told.
    pub fn has_manager(&self) -> bool {
        self.0.is_some()
    }

    /// Sends a message that may be left out: if systemd does not take it at once, it is.
    pub fn send_once(&self, states: &[NotifyState<'_>]) -> io::Result<()> {
        self.try_send(states, &[])
    }

    fn try_send(&self, states: &[NotifyState<'_>], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let Some((socket, address)) = &self.0 else {
            return Ok(());
        };
        let lines: String = states.iter().map(|state| format!("{state}\n")).collect();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let lines = [IoSlice::new(lines.as_bytes())];
        sendmsg_addr(socket, address, &lines, &mut control, SendFlags::NOSIGNAL)?;
        Ok(())
    }

    /// Sends, however long systemd takes for it.
    pub async fn send(&self, states: &[NotifyState<'_>]) {
        self.send_with(states, &[]).await;
    }

    /// Sends with at most one descriptor for systemd to have; whether it has got it.
    pub async fn send_with(&self, states: &[NotifyState<'_>], fds: &[BorrowedFd<'_>]) -> bool {
        let start = Instant::now();
        loop {
            match self.try_send(states, fds) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    if start.elapsed() > WARN_AFTER {
                        warn_busy(states);
                    }
                    sleep(RETRY_AFTER).await;
                }
                Err(error) => {
                    if let Some(suppressed) = UNSENT.pass() {
                        let error = os_message(&error);
                        tracing::warn!("Failed to notify systemd, ignoring: {error}{suppressed}");
                    }
                    return false;
                }
                Ok(()) => return true,
            }
        }
    }

    /// Answers the watchdog at twice the rate it asks for, for ever. (It asks for nothing any more after
    /// STOPPING=1.)
    pub async fn feed_watchdog(&self) -> Infallible {
        let Some(limit) = sd_notify::watchdog_enabled().filter(|limit| !limit.is_zero()) else {
            return std::future::pending().await;
        };
        loop {
            self.send(&[NotifyState::Watchdog]).await;
            sleep(limit / 2).await;
        }
    }
}

fn warn_busy(states: &[NotifyState<'_>]) {
    if let Some(suppressed) = BUSY.pass() {
        let message = states.first().map(ToString::to_string).unwrap_or_default();
        tracing::warn!(
            "Failed to send {message} to systemd, trying again: its queue is full.{suppressed}"
        );
    }
}
