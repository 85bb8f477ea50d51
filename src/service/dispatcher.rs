//! Admits clients under the limits, decides whether they count as in use, and sends them to an
//! event loop.

use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use tokio::task::spawn_local;

use crate::config::Config;
use crate::config::values::WakeOn;
use crate::connection::event_loop::EventLoops;
use crate::connection::{Restored, forget};
use crate::counters::RefusalReason;
use crate::datagram::relay::Relay;
use crate::handover::Handover;
use crate::handover::journal::JournalEntry;
use crate::limits::client_limits::ClientLimits;
use crate::listen::accepted::Accepted;
use crate::logging::{RateLimit, message_id, rate_limited};
use crate::service::silent::{Silent, SilentClients};
use crate::socket::{FirstByte, first_byte};

/// The limits on connections, and the event loops that serve them.
pub struct Dispatcher {
    pub limits: ClientLimits,
    pub event_loops: EventLoops,
    /// Sessions of datagrams, which share the limits.
    relay: Option<Rc<Relay>>,
    /// Clients without a byte, with `--wake-on=data`.
    silent: Option<SilentClients>,
    handover: Option<Arc<Handover>>,
}

impl Dispatcher {
    /// Clients of listeners may be silent. The one client of a process without listeners
    /// (Accept=yes) is not.
    pub fn new(
        config: &Config,
        limits: ClientLimits,
        event_loops: EventLoops,
        relay: Option<Rc<Relay>>,
        handover: Option<Arc<Handover>>,
        has_listeners: bool,
    ) -> Rc<Self> {
        let wakes_on_data = has_listeners && config.args.wake_on == WakeOn::Data;
        Rc::new(Self {
            limits,
            event_loops,
            relay,
            silent: wakes_on_data.then(SilentClients::default),
            handover,
        })
    }

    /// Serves a client of `backend`, or closes it at a limit.
    pub fn serve(self: &Rc<Self>, mut accepted: Accepted, backend: usize) {
        let Accepted { slot, client, .. } = &mut accepted;
        if let Err(reason) = self.limits.acquire(slot, client, || self.make_room()) {
            return self.refuse(&accepted, reason);
        }
        accepted.listener.counts.admitted.inc();
        let entry = self.journal_client(&accepted);
        self.dispatch(accepted, backend, entry);
    }

    /// Serves a client that this process has not accepted, whatever the limits are.
    pub fn serve_unchecked(
        self: &Rc<Self>,
        mut accepted: Accepted,
        backend: usize,
        entry: Option<JournalEntry>,
    ) {
        self.limits.acquire_unchecked(&mut accepted.slot, &accepted.client);
        self.dispatch(accepted, backend, entry);
    }

    /// Goes on with a connection that a process before this one has stored.
    pub fn resume(&self, mut restored: Restored) {
        let Restored { slot, client, .. } = &mut restored;
        self.limits.acquire_unchecked(slot, client);
        slot.in_use = self.limits.begin_use(client);
        self.event_loops.resume(restored);
    }

    /// Stores a client, with `--handover=crash`.
    pub fn journal_client(&self, accepted: &Accepted) -> Option<JournalEntry> {
        self.handover.as_ref()?.keep_client(&accepted.socket)
    }

    /// Sends a client to an event loop, or has it wait for its first byte.
    fn dispatch(
        self: &Rc<Self>,
        mut accepted: Accepted,
        backend: usize,
        entry: Option<JournalEntry>,
    ) {
        let silent = match &self.silent {
            Some(silent) if first_byte(&accepted.socket) != FirstByte::There => silent,
            _ => {
                accepted.slot.in_use = self.limits.begin_use(&accepted.client);
                return self.event_loops.serve(accepted, backend, entry);
            }
        };
        let Some(accepted) = accepted.register() else { return forget(entry) };
        let number = silent.hold(accepted, backend, entry);
        let this = Rc::clone(self);
        let task = spawn_local(async move {
            let Some(silent) = &this.silent else { return };
            if let Some(woken) = silent.wait(number).await {
                this.wake(woken);
            }
        });
        silent.set_task(number, task.abort_handle());
    }

    /// Serves a client that has sent its first byte.
    fn wake(&self, silent: Silent) {
        let Silent { accepted, backend, entry, .. } = silent;
        let Accepted { socket, family, client, listener, mut slot } = accepted;
        slot.in_use = self.limits.begin_use(&client);
        // Another event loop may serve it. If there is no descriptor left, the client is reset.
        let Ok(socket) = socket.release() else { return forget(entry) };
        let accepted = Accepted { socket, family, client, listener, slot };
        self.event_loops.serve(accepted, backend, entry);
    }

    /// Ends the oldest session that is not confirmed, or else closes the oldest silent client.
    /// Returns `false` if there is none.
    pub fn make_room(&self) -> bool {
        if self.relay.as_ref().is_some_and(|relay| relay.make_room()) {
            return true;
        }
        let Some(silent) = &self.silent else { return false };
        while let Some(oldest) = silent.take_oldest() {
            if !oldest.has_sent() {
                oldest.close();
                return true;
            }
            self.wake(oldest);
        }
        false
    }

    /// Whether a client is in use, or about to be.
    pub fn is_in_use(&self) -> bool {
        let has_sent = self.silent.as_ref().is_some_and(SilentClients::any_has_sent);
        has_sent || self.limits.clock.is_in_use()
    }

    /// Resets the connections that are not in use.
    pub fn reset_unused(&self) {
        self.event_loops.reset_passive();
        self.relay.iter().for_each(|relay| relay.end_unused());
        for silent in self.silent.iter().flat_map(SilentClients::take_all) {
            // Dropping the others resets them.
            if silent.has_sent() {
                self.wake(silent);
            }
        }
    }

    /// Asks all connections to report their progress.
    pub fn request_reports(&self) {
        self.event_loops.request_reports();
        self.relay.iter().for_each(|relay| relay.report());
        self.silent.iter().for_each(SilentClients::report);
    }

    /// Stores all connections for the next process.
    pub async fn detach_all(&self, handover: &Handover) {
        self.silent.iter().for_each(|silent| silent.detach_all(handover));
        self.relay.iter().for_each(|relay| relay.detach_all(handover));
        self.event_loops.detach_all(handover).await;
    }

    fn refuse(&self, accepted: &Accepted, reason: RefusalReason) {
        let Accepted { client, listener, .. } = accepted;
        listener.counts.refuse(reason);
        self.limits.limit.notify();
        let limit = match reason {
            RefusalReason::Limit => "connection limit",
            _ => "connection limit for one source",
        };
        rate_limited!(
            REFUSED,
            warn,
            client,
            listener,
            message_id = message_id::CONNECTION_LIMIT,
            "Hit {limit}, refusing connection."
        );
    }
}

static REFUSED: RateLimit = RateLimit::new(5, Duration::from_secs(10));
