//! Everything that counts a connection, from accept to close.

use crate::counters::GaugeGuard;
use crate::limits::Permit;
use crate::limits::descriptors::FdPermit;

/// The guards that count one connection. They are dropped in the order of the fields.
#[derive(Debug)]
pub struct Slot {
    _listener: GaugeGuard,
    event_loop: Option<GaugeGuard>,
    // Dropped after the gauges: the tasks that it wakes read them next.
    permit: Option<Permit>,
    // Dropped after `permit`: under `--overflow=wait` this wakes the accept loop. The accept loop
    // must then find room below the connection limit.
    _descriptors: FdPermit,
}

impl Slot {
    pub fn new(listener: GaugeGuard, descriptors: FdPermit) -> Self {
        Self { _listener: listener, event_loop: None, permit: None, _descriptors: descriptors }
    }

    /// Counts the connection towards the connection limit.
    pub fn admit(&mut self, permit: Permit) {
        self.permit = Some(permit);
    }

    /// Counts the connection on the event loop that it is dispatched to.
    pub fn assign(&mut self, event_loop: GaugeGuard) {
        self.event_loop = Some(event_loop);
    }
}
