//! Which accepted clients are served, and as what they count.

use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use crate::config::Config;
use crate::config::client_set::ClientSet;
use crate::connection::event_loop::EventLoops;
use crate::counters::RefusalReason;
use crate::handover::Handover;
use crate::handover::journal::JournalEntry;
use crate::limits::ConnectionLimit;
use crate::limits::idle_clock::{IdleClock, InUse};
use crate::limits::slot::Slot;
use crate::limits::source::SourceLimit;
use crate::listen::listener::Accepted;
use crate::logging::{RateLimit, message_id};
use crate::socket::address::Address;

/// The limits on connections, and the event loops that serve them.
#[derive(Debug)]
pub struct Dispatcher {
    pub limit: ConnectionLimit,
    pub clock: IdleClock,
    pub event_loops: EventLoops,
    sources: Option<Arc<SourceLimit>>,
    passive_from: ClientSet,
    handover: Option<Arc<Handover>>,
}

impl Dispatcher {
    pub fn new(
        config: &Config,
        event_loops: EventLoops,
        handover: Option<Arc<Handover>>,
    ) -> Rc<Self> {
        Rc::new(Self {
            limit: ConnectionLimit::new(config.connections_max),
            clock: IdleClock::new(),
            event_loops,
            sources: config.connections_max_per_source.map(SourceLimit::new),
            passive_from: config.passive_from.clone(),
            handover,
        })
    }

    /// Serves a client of `backend`, or closes it at a limit.
    pub fn serve(&self, mut accepted: Accepted, backend: usize) {
        if let Err(reason) = self.acquire(&mut accepted) {
            return self.refuse(&accepted, reason);
        }
        accepted.listener.counts.admitted.inc();
        self.dispatch(accepted, backend);
    }

    /// Serves a client whose connection existed before this process did, whatever the limits are.
    pub fn serve_unchecked(&self, mut accepted: Accepted, backend: usize) {
        self.acquire_unchecked(&mut accepted.slot, &accepted.client);
        self.dispatch(accepted, backend);
    }

    /// Serves a client that a process before this one has accepted and stored.
    pub fn serve_stored(
        &self,
        mut accepted: Accepted,
        backend: usize,
        journal: Option<JournalEntry>,
    ) {
        self.acquire_unchecked(&mut accepted.slot, &accepted.client);
        self.event_loops.serve(accepted, backend, journal);
    }

    /// Counts a connection that exists, whatever the limits are.
    pub fn acquire_unchecked(&self, slot: &mut Slot, client: &Address) {
        slot.permit = Some(self.limit.acquire_unchecked());
        slot.in_use = self.begin_use(client);
        slot.source =
            self.sources.as_ref().and_then(|it| it.acquire_unchecked(client)).map(Box::new);
    }

    fn acquire(&self, accepted: &mut Accepted) -> Result<(), RefusalReason> {
        let Accepted { slot, client, .. } = accepted;
        if let Some(sources) = &self.sources {
            let permit = sources.try_acquire(client).ok_or(RefusalReason::Source)?;
            slot.source = Some(Box::new(permit));
        }
        slot.permit = Some(self.limit.try_acquire().ok_or(RefusalReason::Limit)?);
        slot.in_use = self.begin_use(client);
        Ok(())
    }

    /// Counts a connection as in use, unless its client is passive.
    fn begin_use(&self, client: &Address) -> Option<InUse> {
        (!self.passive_from.contains(client)).then(|| self.clock.begin_use())
    }

    fn dispatch(&self, accepted: Accepted, backend: usize) {
        let handover = self.handover.as_ref();
        let journal = handover.and_then(|handover| handover.keep_client(&accepted.socket));
        self.event_loops.serve(accepted, backend, journal);
    }

    fn refuse(&self, accepted: &Accepted, reason: RefusalReason) {
        let Accepted { client, listener, .. } = accepted;
        listener.counts.refused[reason as usize].inc();
        self.limit.notify();
        let limit = match reason {
            RefusalReason::Limit => "connection limit",
            _ => "connection limit for one source",
        };
        if let Some(suppressed) = REFUSED.pass() {
            tracing::warn!(
                suppressed,
                %client,
                %listener,
                message_id = message_id::CONNECTION_LIMIT,
                "Hit {limit}, refusing connection."
            );
        }
    }
}

static REFUSED: RateLimit = RateLimit::new(5, Duration::from_secs(10));
