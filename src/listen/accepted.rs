//! A connection between its accept(2) and its event loop.

use std::fmt;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use crate::counters::{GaugeGuard, ListenerCounters};
use crate::limits::slot::Slot;
use crate::logging::{RateLimit, os_message, rate_limited};
use crate::socket::address::{Address, SocketLabel};
use crate::socket::{Family, Socket};

/// An accepted connection.
///
/// `S` is a descriptor, or the registered socket once the connection is on its event loop.
#[derive(Debug)]
pub struct Accepted<S = OwnedFd> {
    /// The socket, non-blocking.
    pub socket: S,
    pub family: Family,
    pub client: Address,
    pub listener: Arc<ListenerInfo>,
    pub slot: Slot,
}

impl Accepted {
    /// Registers the socket with the event loop of this thread.
    ///
    /// If epoll_ctl(2) fails, this logs and closes the connection.
    pub fn register(self) -> Option<Accepted<Socket>> {
        let Self { socket, family, client, listener, slot } = self;
        match Socket::register(socket, family) {
            Ok(socket) => Some(Accepted { socket, family, client, listener, slot }),
            Err(error) => {
                rate_limited!(
                    REGISTER_FAILED,
                    error,
                    client,
                    listener,
                    "Failed to register a connection with epoll, closing it: {}.",
                    os_message(&error)
                );
                None
            }
        }
    }
}

/// What connections of any thread know of their listener.
#[derive(Debug)]
pub struct ListenerInfo {
    label: String,
    pub counts: Arc<ListenerCounters>,
}

impl ListenerInfo {
    pub fn new(label: &SocketLabel) -> Arc<Self> {
        Self::with_counters(label, Arc::default())
    }

    /// Counts the connections together with those of other listeners.
    pub fn with_counters(label: &SocketLabel, counts: Arc<ListenerCounters>) -> Arc<Self> {
        Arc::new(Self { label: label.to_string(), counts })
    }

    /// Counts a connection as open until the guard is dropped.
    pub fn count_open(&self) -> GaugeGuard {
        self.counts.open.take()
    }
}

impl fmt::Display for ListenerInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.label)
    }
}

static REGISTER_FAILED: RateLimit = RateLimit::new(1, Duration::from_secs(60));
