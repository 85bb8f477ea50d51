//! Everything that counts a connection, from accept to close.

use crate::counters::GaugeGuard;
use crate::limits::ConnectionPermit;
use crate::limits::descriptors::FdPermit;
use crate::limits::idle_clock::InUse;
use crate::limits::source::SourcePermit;

/// The guards that count one connection. They are dropped in the order of the fields.
#[derive(Debug)]
pub struct Slot {
    _listener: GaugeGuard,
    /// Counts the connection on the event loop that it is dispatched to.
    pub event_loop: Option<GaugeGuard>,
    /// Counts the connection towards the connection limit.
    // Dropped after the gauges: the tasks that it wakes read them next.
    pub permit: Option<ConnectionPermit>,
    /// Stops the idle clock, unless the client is passive.
    // Dropped after `permit`: at the end of the last use no connection is open.
    pub in_use: Option<InUse>,
    /// Counts the connection towards the limit of its source.
    // Boxed: most proxies have no such limit.
    pub source: Option<Box<SourcePermit>>,
    // Dropped after `permit`: under `--overflow=wait` this wakes the accept loop. The accept loop
    // must then find room below the connection limit.
    _descriptors: FdPermit,
}

impl Slot {
    /// Whether the client is passive ([`ClientSet`](crate::config::client_set::ClientSet)).
    pub fn is_passive(&self) -> bool {
        self.in_use.is_none()
    }

    pub fn new(listener: GaugeGuard, descriptors: FdPermit) -> Self {
        Self {
            _listener: listener,
            event_loop: None,
            permit: None,
            in_use: None,
            source: None,
            _descriptors: descriptors,
        }
    }
}
