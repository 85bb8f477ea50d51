//! What the sessions of one target share.

use std::cell::RefCell;
use std::io;
use std::sync::Arc;

use rustix::io::Errno;
use tokio::sync::{Mutex, Notify};
use tokio::time::Instant;

use crate::backend::connect::Connector;
use crate::backend::connect_error::errno_kind;
use crate::backend::lifecycle::Lifecycle;
use crate::backend::readiness::Readiness;
use crate::backend::source::{IpFamily, SourceAddress};
use crate::config::target::Target;
use crate::config::timespan::TimeSpan;
use crate::connection::{BackendSetup, Settings};
use crate::counters::ConnectErrorKind;
use crate::datagram::table::SessionId;
use crate::socket::address::Address;

/// The last probe that failed: when, of which session, of which family if that matters, and its
/// error.
#[derive(Clone, Copy, Debug)]
pub struct FailedProbe {
    pub at: Instant,
    pub id: SessionId,
    pub family: Option<IpFamily>,
    pub errno: Errno,
}

/// One target.
#[derive(Debug)]
pub struct DatagramBackend {
    pub connector: Connector,
    /// Those for clients with an IP address that the backend sees, IPv4 first.
    by_family: Option<[Connector; 2]>,
    /// `--backend-wait=`; zero means no wait.
    pub wait: TimeSpan,
    /// `Some` if the proxy starts the backend.
    pub lifecycle: Option<Arc<Lifecycle>>,
    pub readiness: Option<Arc<Readiness>>,
    /// Notified when a session finds the backend up, if COMMAND is ready then.
    pub found_up: Option<Arc<Notify>>,
    /// The address at which the backend is up, as far as sessions have found.
    pub up_at: RefCell<Option<Address>>,
    /// Held by the session that looks whether the backend is up. The others wait for it, and then
    /// know what it has found.
    pub probing: Mutex<Option<FailedProbe>>,
    has_only_datagrams: bool,
    /// Why sessions wait.
    wait_reason: RefCell<Option<String>>,
}

impl DatagramBackend {
    pub fn new(setup: &BackendSetup, settings: &Settings) -> Self {
        let BackendSetup { connector, readiness, datagrams_only, found_up, .. } = setup.clone();
        Self {
            by_family: connector.by_family(),
            connector,
            wait: settings.backend_wait,
            lifecycle: settings.lifecycle.clone(),
            readiness,
            found_up,
            up_at: RefCell::default(),
            probing: Mutex::default(),
            has_only_datagrams: datagrams_only.is_some(),
            wait_reason: RefCell::default(),
        }
    }

    /// Returns the connector that finds addresses for sessions from `from`.
    pub fn connector_for(&self, from: Option<&SourceAddress>) -> &Connector {
        SourceAddress::choose(from, self.by_family.as_ref(), &self.connector)
    }

    /// Returns the address to which a new session can connect at once.
    pub fn address_now(&self) -> Option<Address> {
        if !self.is_ready() {
            return None;
        }
        match &self.connector.target {
            Target::Address(address) if self.wait.is_zero() || self.up_at.borrow().is_some() => {
                Some(address.clone())
            }
            // A name is looked up for each session.
            _ => None,
        }
    }

    pub fn set_wait_reason(&self, reason: String) {
        self.wait_reason.replace(Some(reason));
    }

    /// Returns why the wait of sessions was not long enough.
    pub fn wait_reason(&self) -> String {
        let lifecycle = self.lifecycle.as_ref();
        let of_lifecycle = lifecycle.and_then(|lifecycle| lifecycle.wait_reason_unless_ready());
        of_lifecycle.or_else(|| self.wait_reason.borrow().clone()).unwrap_or_else(|| {
            format!(
                "Failed to connect to remote host: {}: Connection timed out",
                self.connector.target
            )
        })
    }

    /// Notes that the backend has answered from an address, which a restored session may have from
    /// another command line.
    pub fn set_answered(&self, address: &Address) {
        if matches!(&self.connector.target, Target::Address(target) if target == address) {
            self.up_at.borrow_mut().get_or_insert_with(|| address.clone());
        }
    }

    fn is_ready(&self) -> bool {
        self.lifecycle.as_ref().is_none_or(|lifecycle| lifecycle.is_ready())
            && self.readiness.as_ref().is_none_or(|readiness| readiness.is_ready())
    }

    /// Whether a passive client can be served.
    pub fn is_up(&self) -> bool {
        let tells = self.lifecycle.is_some() || self.readiness.is_some();
        self.wait.is_zero() || if tells { self.is_ready() } else { self.up_at.borrow().is_some() }
    }

    /// Notes that the backend has refused a datagram.
    pub fn set_down(&self) {
        let was_up = self.up_at.take().is_some();
        // Connections may lead to the backend as well, and to them it may well be ready.
        if let Some(readiness) = self.readiness.as_ref().filter(|_| self.has_only_datagrams) {
            readiness.reset();
        }
        // Once for each time that it was up: what has just been started may refuse for a while.
        if let (true, Some(lifecycle)) = (was_up, &self.lifecycle) {
            lifecycle.report_lost();
        }
    }
}

/// Whether an error of connect(2) or send(2) says that nothing listens, and not that this process
/// lacks something.
pub fn is_refusal(error: &io::Error) -> bool {
    matches!(
        errno_kind(error),
        ConnectErrorKind::Refused | ConnectErrorKind::NotFound | ConnectErrorKind::Unreachable
    )
}
