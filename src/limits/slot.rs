//! What one connection takes up, from accept to close.

use crate::counters::GaugeGuard;
use crate::limits::Permit;
use crate::limits::descriptors::FdPermit;

/// Everything a connection is counted by. Dropping it gives all of it back, in the order of the fields.
#[derive(Debug)]
pub struct Slot {
    _listener: GaugeGuard,
    event_loop: Option<GaugeGuard>,
    // Dropped after the gauges: tasks that wait for the number of connections read them next.
    permit: Option<Permit>,
    // Dropped after `permit`: under `--overflow=wait` this wakes the accept loop, which must then find
    // room below the connection limit.
    _descriptors: FdPermit,
}

impl Slot {
    /// A slot for a connection that has just been accepted at a listener.
    pub fn new(listener: GaugeGuard, descriptors: FdPermit) -> Self {
        Self { _listener: listener, event_loop: None, permit: None, _descriptors: descriptors }
    }

    /// Counts the connection towards `--connections-max=`.
    pub fn admit(&mut self, permit: Permit) {
        self.permit = Some(permit);
    }

    /// Counts the connection on the event loop that it is dispatched to.
    pub fn assign(&mut self, event_loop: GaugeGuard) {
        self.event_loop = Some(event_loop);
    }
}
