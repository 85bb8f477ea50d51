//! Whether a client is admitted, and whether it counts as in use.

use std::sync::Arc;

use crate::config::Config;
use crate::config::client_set::ClientSet;
use crate::counters::RefusalReason;
use crate::limits::ConnectionLimit;
use crate::limits::idle_clock::{IdleClock, InUse};
use crate::limits::slot::Slot;
use crate::limits::source::SourceLimit;
use crate::socket::address::Address;

/// What connections and sessions share: the two limits, the idle clock, and the passive clients.
#[derive(Clone, Debug)]
pub struct ClientLimits {
    pub limit: ConnectionLimit,
    pub clock: IdleClock,
    source_limit: Option<Arc<SourceLimit>>,
    passive_from: ClientSet,
}

impl ClientLimits {
    /// Clients of listeners may be passive. The one client of a process without listeners
    /// (Accept=yes) is not.
    pub fn new(config: &Config, has_listeners: bool) -> Self {
        let passive_from = has_listeners.then(|| config.passive_from.clone());
        Self {
            limit: ConnectionLimit::new(config.args.connections_max),
            clock: IdleClock::new(),
            source_limit: config.args.connections_max_per_source.map(SourceLimit::new),
            passive_from: passive_from.unwrap_or_default(),
        }
    }

    /// Counts a client. At the connection limit, calls `make_room`, which returns whether it has
    /// ended another client.
    ///
    /// # Errors
    /// The limit that is reached.
    pub fn acquire(
        &self,
        slot: &mut Slot,
        client: &Address,
        make_room: impl FnOnce() -> bool,
    ) -> Result<(), RefusalReason> {
        if let Some(sources) = &self.source_limit {
            let permit = sources.try_acquire(client).ok_or(RefusalReason::Source)?;
            slot.source = Some(Box::new(permit));
        }
        let permit = self.limit.try_acquire();
        let permit = permit.or_else(|| make_room().then(|| self.limit.try_acquire()).flatten());
        slot.permit = Some(permit.ok_or(RefusalReason::Limit)?);
        Ok(())
    }

    /// Whether the limit of the client's source is reached, so that no other has to make room.
    pub fn is_source_limit_reached(&self, client: &Address) -> bool {
        self.source_limit.as_ref().is_some_and(|limit| limit.is_reached(client))
    }

    /// Counts a client that this process has not accepted, whatever the limits are.
    pub fn acquire_unchecked(&self, slot: &mut Slot, client: &Address) {
        slot.permit = Some(self.limit.acquire_unchecked());
        slot.source =
            self.source_limit.as_ref().and_then(|it| it.acquire_unchecked(client)).map(Box::new);
    }

    pub fn is_passive(&self, client: &Address) -> bool {
        self.passive_from.contains(client)
    }

    /// Counts a client as in use, unless it is passive.
    pub fn begin_use(&self, client: &Address) -> Option<InUse> {
        (!self.is_passive(client)).then(|| self.clock.begin_use())
    }
}
