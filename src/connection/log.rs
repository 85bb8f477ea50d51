//! What is logged of a connection, and with which fields.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use crate::config::timespan::TimeSpan;
use crate::forward::snapshot::Side;
use crate::forward::{CloseReason, Progress, Summary};
use crate::listen::listener::ListenerInfo;
use crate::logging::bytes::Bytes;
use crate::logging::{RateLimit, os_message};
use crate::socket::address::Address;

/// The fields that the log lines of a connection share.
pub struct LogContext<'a> {
    pub start: Instant,
    pub client: Address,
    pub listener: Arc<ListenerInfo>,
    pub backend: &'a dyn fmt::Display,
}

impl LogContext<'_> {
    /// Warns that there is no backend for the client.
    pub fn unreachable(&self, error: &str) {
        if let Some(suppressed) = UNREACHABLE.pass() {
            tracing::warn!(
                client = %self.client,
                listener = %self.listener,
                backend = %self.backend,
                "{error}{suppressed}"
            );
        }
    }

    pub fn established(&self) {
        tracing::debug!(client = %self.client, listener = %self.listener, "Connection established");
    }

    /// Answers SIGUSR1 for a connection that has a backend.
    pub fn report(&self, progress: Progress) {
        let Progress { from_client, from_backend, idle } = progress;
        let [there, back] = [from_client, from_backend].map(Bytes);
        let idle = idle.map(|idle| format!(", idle for {}", TimeSpan::rounded(idle)));
        let idle = idle.unwrap_or_default();
        self.report_state(&format!("{there} to the backend, {back} back{idle}"));
    }

    /// Answers SIGUSR1.
    pub fn report_state(&self, state: &str) {
        let age = TimeSpan::rounded(self.start.elapsed());
        tracing::info!(
            client = %self.client,
            listener = %self.listener,
            backend = %self.backend,
            "Connection of {age}: {state}."
        );
    }

    /// Logs how a connection was.
    pub fn closed(&self, summary: &Summary, idle_time: Option<Duration>) {
        let outcome = match summary.reason {
            CloseReason::Closed => "Connection closed".into(),
            CloseReason::IdleTimeout => {
                self.idle_timeout(idle_time);
                "Connection closed, it was idle".into()
            }
            CloseReason::Fault(Side::Client, errno) => {
                format!("Connection ended by the client: {}", os_message(&errno.into()))
            }
            CloseReason::Fault(Side::Backend, errno) => {
                format!("Connection ended by the backend: {}", os_message(&errno.into()))
            }
        };
        self.ended(&outcome, [summary.from_client, summary.from_backend]);
    }

    /// Logs the end of a connection and the bytes from the client and from the backend.
    pub fn ended(&self, outcome: &str, bytes: [u64; 2]) {
        tracing::debug!(
            client = %self.client,
            listener = %self.listener,
            backend = %self.backend,
            bytes_from_client = bytes[0],
            bytes_from_backend = bytes[1],
            duration_usec = self.start.elapsed().as_micros() as u64,
            "{outcome}"
        );
    }

    fn idle_timeout(&self, idle_time: Option<Duration>) {
        let idle_time = idle_time.map_or(TimeSpan::INFINITY, TimeSpan::new);
        if let Some(suppressed) = IDLE.pass() {
            tracing::info!(
                client = %self.client,
                listener = %self.listener,
                backend = %self.backend,
                "Connection was idle for {idle_time}, closing it.{suppressed}"
            );
        }
    }
}

static UNREACHABLE: RateLimit = RateLimit::new(10, Duration::from_secs(10));
static IDLE: RateLimit = RateLimit::new(10, Duration::from_secs(10));
