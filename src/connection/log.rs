//! What is logged of a connection, and with which fields.

use std::fmt;
use std::time::Duration;

use tokio::time::Instant;

use crate::config::timespan::TimeSpan;
use crate::forward::snapshot::Side;
use crate::forward::{CloseReason, PassingError, Progress, Summary};
use crate::listen::accepted::ListenerInfo;
use crate::logging::bytes::Bytes;
use crate::logging::{RateLimit, message_id, os_message, rate_limited};
use crate::socket::address::Address;

/// The fields that the log lines of a connection share.
pub struct LogContext<'a> {
    pub start: Instant,
    pub client: &'a Address,
    pub listener: &'a ListenerInfo,
    pub backend: &'a dyn fmt::Display,
}

impl LogContext<'_> {
    /// Warns that there is no backend for the client.
    pub fn unreachable(&self, error: &str) {
        let Self { client, listener, backend, .. } = self;
        let message_id = message_id::BACKEND_UNREACHABLE;
        rate_limited!(UNREACHABLE, warn, client, listener, backend, message_id, "{error}");
    }

    /// Logs that a passive client was closed.
    pub fn refused_passive(&self) {
        let Self { client, listener, backend, .. } = self;
        rate_limited!(
            PASSIVE,
            info,
            client,
            listener,
            backend,
            "Backend is not ready, refusing passive client."
        );
    }

    pub fn established(&self) {
        let Self { client, listener, backend, .. } = self;
        tracing::debug!(%client, %listener, %backend, "Connection established.");
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
        let Self { start, client, listener, backend } = self;
        let age = TimeSpan::rounded(start.elapsed());
        tracing::info!(
            %client,
            %listener,
            %backend,
            "Connection of {age} at {listener}: {state}."
        );
    }

    /// Logs the end of a connection: how it ended, its time, and its bytes.
    pub fn closed(&self, summary: &Summary, idle_time: Option<Duration>) {
        let (outcome, reason) = match summary.reason {
            CloseReason::Closed => ("Connection closed", None),
            CloseReason::IdleTimeout => {
                self.idle_timeout(idle_time);
                ("Idle connection closed", None)
            }
            CloseReason::NotInUse => ("Connection reset, it was not in use,", None),
            CloseReason::Passing(side, error) => {
                self.not_passed(side, error);
                ("Connection reset, descriptors could not be passed on,", None)
            }
            CloseReason::Fault(Side::Client, errno) => {
                ("Connection ended by the client", Some(errno))
            }
            CloseReason::Fault(Side::Backend, errno) => {
                ("Connection ended by the backend", Some(errno))
            }
        };
        let reason = reason.map(|errno| format!(": {}", os_message(&errno.into())));
        let bytes = [summary.from_client, summary.from_backend];
        self.ended(outcome, bytes, &reason.unwrap_or_default());
    }

    /// Logs the end of a connection that has carried no byte.
    pub fn ended_unserved(&self, outcome: &str) {
        self.ended(outcome, [0, 0], "");
    }

    fn ended(&self, outcome: &str, [from_client, from_backend]: [u64; 2], reason: &str) {
        // Without the message no clock is read.
        if !tracing::event_enabled!(tracing::Level::DEBUG) {
            return;
        }
        let Self { start, client, listener, backend } = self;
        let duration = start.elapsed();
        let time = TimeSpan::rounded(duration);
        let [there, back] = [from_client, from_backend].map(Bytes);
        tracing::debug!(
            %client,
            %listener,
            %backend,
            bytes_from_client = from_client,
            bytes_from_backend = from_backend,
            duration_usec = duration.as_micros() as u64,
            "{outcome} after {time}, {there} to the backend, {back} back{reason}."
        );
    }

    fn not_passed(&self, side: Side, error: PassingError) {
        let Self { client, listener, backend, .. } = self;
        let side = match side {
            Side::Client => "client",
            Side::Backend => "backend",
        };
        rate_limited!(
            NOT_PASSED,
            warn,
            client,
            listener,
            backend,
            "Failed to pass on descriptors of the {side}, resetting the connection: {error}"
        );
    }

    fn idle_timeout(&self, idle_time: Option<Duration>) {
        let idle_time = idle_time.map_or(TimeSpan::INFINITY, TimeSpan::new);
        let Self { client, listener, backend, .. } = self;
        rate_limited!(
            IDLE,
            info,
            client,
            listener,
            backend,
            message_id = message_id::CONNECTION_IDLE,
            "Connection was idle for {idle_time}, closing it."
        );
    }
}

static UNREACHABLE: RateLimit = RateLimit::new(10, Duration::from_secs(10));
static PASSIVE: RateLimit = RateLimit::new(5, Duration::from_secs(10));
static NOT_PASSED: RateLimit = RateLimit::new(5, Duration::from_secs(10));
static IDLE: RateLimit = RateLimit::new(10, Duration::from_secs(10));
