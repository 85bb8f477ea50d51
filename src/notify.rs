//! Messages to the service manager (sd_notify(3)): `READY=1`, `STATUS=`, `STOPPING=1`,
//! `WATCHDOG=1`, and those about the descriptor store.
//!
//! No message blocks the event loop: the socket is non-blocking. systemd's queue can be full,
//! during a daemon-reload or at boot. [`Notifier::send`] then tries again until the message is
//! sent. [`Notifier::send_once`] drops the message.

use std::convert::Infallible;
use std::env;
use std::ffi::OsStr;
use std::future::pending;
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

use crate::logging::{RateLimit, os_message, rate_limited};

/// The way to the service manager, if there is one.
#[derive(Debug)]
pub struct Notifier(Option<(UnixDatagram, SocketAddrUnix)>);

impl Notifier {
    /// Opens a socket to `$NOTIFY_SOCKET`, a path or an abstract name. A value that cannot be used
    /// is logged and ignored.
    pub fn from_environment() -> Self {
        let name = env::var_os("NOTIFY_SOCKET").filter(|name| !name.is_empty());
        let opened = name.map(|name| {
            Self::to(&name).inspect_err(|error| {
                tracing::warn!(
                    "Failed to use NOTIFY_SOCKET={name:?}, ignoring: {error}. (With Type=notify the start \
                     will time out. RestrictAddressFamilies= must allow AF_UNIX.)"
                );
            })
        });
        opened.and_then(Result::ok).unwrap_or(Self(None))
    }

    /// Returns a notifier without a service manager.
    #[cfg(test)]
    pub fn none() -> Self {
        Self(None)
    }

    /// Opens a socket to a path or an abstract name (`@`).
    ///
    /// # Errors
    /// socket(2)'s, or a name that is too long.
    pub fn to(name: &OsStr) -> io::Result<Self> {
        let address = match name.as_bytes() {
            [b'@', name @ ..] => SocketAddrUnix::new_abstract_name(name)?,
            _ => SocketAddrUnix::new(name)?,
        };
        let socket = UnixDatagram::unbound()?;
        socket.set_nonblocking(true)?;
        Ok(Self(Some((socket, address))))
    }

    pub fn has_manager(&self) -> bool {
        self.0.is_some()
    }

    /// Sends a message, or fails with EAGAIN if systemd's queue is full.
    pub fn send_once(&self, states: &[NotifyState<'_>]) -> io::Result<()> {
        self.try_send(states, &[])
    }

    /// Sends a message, and waits for room in systemd's queue.
    pub async fn send(&self, states: &[NotifyState<'_>]) {
        self.send_with(states, &[]).await;
    }

    /// Sends a message with at most one descriptor, and waits for room in systemd's queue. Returns
    /// whether the message was sent.
    pub async fn send_with(&self, states: &[NotifyState<'_>], fds: &[BorrowedFd<'_>]) -> bool {
        let start = Instant::now();
        loop {
            match self.try_send(states, fds) {
                Ok(()) => return true,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    if start.elapsed() > WARN_AFTER {
                        rate_limited!(
                            BUSY,
                            warn,
                            "Failed to send {} to systemd, trying again: its queue is full.",
                            states.first().map(ToString::to_string).unwrap_or_default()
                        );
                    }
                    sleep(RETRY_AFTER).await;
                }
                Err(error) => {
                    rate_limited!(
                        UNSENT,
                        warn,
                        "Failed to notify systemd, ignoring: {}.",
                        os_message(&error)
                    );
                    return false;
                }
            }
        }
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

    /// Sends `WATCHDOG=1` at twice the rate that `WatchdogSec=` requires. systemd stops its
    /// watchdog at `STOPPING=1`.
    pub async fn feed_watchdog(&self) -> Infallible {
        let Some(interval) = watchdog_interval() else { return pending().await };
        loop {
            self.send(&[NotifyState::Watchdog]).await;
            sleep(interval).await;
        }
    }
}

/// Returns half of `$WATCHDOG_USEC`, if the watchdog is for this process.
pub fn watchdog_interval() -> Option<Duration> {
    let limit = sd_notify::watchdog_enabled().filter(|limit| !limit.is_zero());
    limit.map(|limit| limit / 2)
}

/// The pause between two attempts while systemd's queue is full.
const RETRY_AFTER: Duration = Duration::from_millis(20);

/// How long systemd's queue may be full before that is logged.
const WARN_AFTER: Duration = Duration::from_secs(5);

static UNSENT: RateLimit = RateLimit::new(3, Duration::from_secs(60));
static BUSY: RateLimit = RateLimit::new(1, Duration::from_secs(60));
