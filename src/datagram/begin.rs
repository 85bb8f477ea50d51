//! Which session a datagram belongs to, and whether a new client may begin one.

use std::net::IpAddr;
use std::rc::Rc;
use std::time::Duration;

use tokio::time::Instant;

use crate::counters::{DropReason, RefusalReason};
use crate::datagram::backend::is_refusal;
use crate::datagram::relay::{Relay, RelayState};
use crate::datagram::session::{BackendSocket, Session, SessionBackend, address_of, is_ipv4};
use crate::datagram::table::{Life, SessionId};
use crate::limits::slot::Slot;
use crate::logging::{RateLimit, message_id, os_message, rate_limited};
use crate::socket::address::{Address, canonical};
use crate::socket::mmsg::LocalAddress;
use crate::socket::proxy_protocol::datagram_header;

impl Relay {
    /// Returns the session of a received datagram, which may begin with it. Returns `None` if the
    /// datagram is dropped.
    pub fn find_session(
        self: &Rc<Self>,
        state: &mut RelayState,
        listener: usize,
        slot: usize,
        now: Instant,
    ) -> Option<SessionId> {
        let message = state.input.message(slot);
        let (tally, count) = (self.routes[listener].tally(0), message.count());
        tally.receive(count);
        if message.is_truncated {
            tally.drop(DropReason::Truncated, count);
            return None;
        }
        let mut space = [0; KEY_MAX];
        let key = session_key(&mut space, listener, message.name, message.local);
        if let Some(id) = state.table.find(key) {
            if state.table.client_has_sent(id, now) {
                let session = state.table.get_mut(id)?;
                session.slot.in_use = self.limits.begin_use(&session.client());
                self.keep_confirmed(state, id);
            }
            return Some(id);
        }
        let client = NewClient { name: message.name.into(), local: message.local, listener };
        let begun = self.begin(state, client, key, now);
        begun.inspect_err(|reason| tally.drop(*reason, count)).ok()
    }

    /// Begins a session, if the limits admit the client.
    fn begin(
        self: &Rc<Self>,
        state: &mut RelayState,
        client: NewClient,
        key: &[u8],
        now: Instant,
    ) -> Result<SessionId, DropReason> {
        let NewClient { name, local, listener } = client;
        let address = address_of(&name);
        let route = &self.routes[listener];
        let backend = &self.backends[route.backend];
        if !can_be_answered(&address) {
            return Err(DropReason::Source);
        } else if self.is_draining.get() {
            return Err(DropReason::Draining);
        } else if self.limits.is_passive(&address) && !backend.is_up() {
            return Err(DropReason::Passive);
        }
        let from = backend.connector.source_of(&address);
        let from = from.as_ref();
        if let Err(error) = backend.connector_for(from).check_family() {
            rate_limited!(
                OTHER_FAMILY,
                warn,
                client = address,
                listener = route.listener,
                backend = backend.connector.target,
                message_id = message_id::BACKEND_UNREACHABLE,
                "{error}"
            );
            return Err(DropReason::Unreachable);
        }
        let slot = self.acquire(state, listener, &address).inspect_err(|reason| {
            let limit = match reason {
                DropReason::SourceLimit => "connection limit for one source",
                _ => "connection limit",
            };
            rate_limited!(
                REFUSED,
                warn,
                client = address,
                listener = route.listener,
                message_id = message_id::CONNECTION_LIMIT,
                "Hit {limit}, dropping datagrams of a new client."
            );
        })?;
        tracing::debug!(client = %address, listener = %route.listener, "Session begun.");
        let session = self.session(listener, name, local, slot);
        let is_one_way = session.is_one_way();
        let id = self.insert(state, key, session, Life::new(now));
        let address = backend.address_now();
        match address.map(|address| BackendSocket::connect(&address, from, is_one_way)) {
            Some(Ok(socket)) => {
                self.open(state, id, socket);
                if state.table.get(id).is_none() {
                    return Err(DropReason::Error);
                }
            }
            Some(Err(error)) if is_refusal(&error) => backend.set_down(),
            Some(Err(error)) => {
                self.fail(state, id, &format!("Failed to open a socket: {}.", os_message(&error)));
                return Err(DropReason::Error);
            }
            None => {}
        }
        Ok(id)
    }

    /// Adds a session to the table.
    pub fn insert(
        &self,
        state: &mut RelayState,
        key: &[u8],
        session: Session,
        life: Life,
    ) -> SessionId {
        let before = state.table.next_visit();
        let id = state.table.insert(key, session, life);
        if state.table.next_visit() != before {
            self.begun.notify_one();
        }
        id
    }

    /// Counts a client. At a limit, ends the oldest session that is not confirmed.
    fn acquire(
        &self,
        state: &mut RelayState,
        listener: usize,
        client: &Address,
    ) -> Result<Slot, DropReason> {
        if self.limits.is_source_limit_reached(client) {
            return Err(DropReason::SourceLimit);
        }
        let info = &self.routes[listener].listener.info;
        let permit = self.descriptors.try_reserve();
        let permit =
            permit.or_else(|| self.evict(state).then(|| self.descriptors.try_reserve())?);
        let mut slot = Slot::new(info.count_open(), permit.ok_or(DropReason::Limit)?);
        let acquired = self.limits.acquire(&mut slot, client, || self.evict(state));
        acquired.map_err(|reason| match reason {
            RefusalReason::Source => DropReason::SourceLimit,
            _ => DropReason::Limit,
        })?;
        slot.event_loop = Some(self.load.take());
        info.counts.admitted.inc();
        Ok(slot)
    }

    /// Creates a session without a backend.
    pub fn session(
        &self,
        listener: usize,
        name: Box<[u8]>,
        local: Option<LocalAddress>,
        slot: Slot,
    ) -> Session {
        let client = address_of(&name);
        let header = match self.sends_header {
            true => datagram_header(&client, &self.asked(listener, local)),
            false => Vec::new(),
        };
        Session {
            listener,
            name,
            local,
            header: header.into(),
            backend: SessionBackend::Lost,
            open: None,
            slot,
            is_unfinished: false,
            entry: None,
            is_ipv4: is_ipv4(&client),
            datagrams: [0, 0],
        }
    }

    /// Returns the address that a client has sent to.
    fn asked(&self, listener: usize, local: Option<LocalAddress>) -> Address {
        let address = &self.routes[listener].listener.label.address;
        match (local, address.port()) {
            (Some(local), Some(port)) => Address::Inet((local.ip, port).into()),
            _ => address.clone(),
        }
    }
}

/// A client without a session.
struct NewClient {
    name: Box<[u8]>,
    local: Option<LocalAddress>,
    listener: usize,
}

/// Writes what tells sessions apart: the listener, the client's address, and the address that it
/// has sent to.
pub fn session_key<'a>(
    space: &'a mut [u8; KEY_MAX],
    listener: usize,
    name: &[u8],
    local: Option<LocalAddress>,
) -> &'a [u8] {
    let mut len = 0;
    let mut push = |bytes: &[u8]| {
        space[len..len + bytes.len()].copy_from_slice(bytes);
        len += bytes.len();
    };
    push(&(listener as u32).to_ne_bytes());
    if let Some(LocalAddress { ip, interface }) = local {
        match ip {
            IpAddr::V4(ip) => push(&ip.octets()),
            IpAddr::V6(ip) => push(&ip.octets()),
        }
        push(&interface.to_ne_bytes());
    }
    // Last, because its length varies.
    push(name);
    &space[..len]
}

/// Whether an address is one that a client can have.
fn can_be_answered(client: &Address) -> bool {
    let Address::Inet(address) = client else { return true };
    let is_one_machine = match canonical(*address).ip() {
        IpAddr::V4(ip) => !ip.is_broadcast() && !ip.is_multicast() && !ip.is_unspecified(),
        IpAddr::V6(ip) => !ip.is_multicast() && !ip.is_unspecified(),
    };
    address.port() != 0 && is_one_machine
}

/// A listener (4), a local address (16) and its interface (4), and the longest `sockaddr`.
pub const KEY_MAX: usize = 24 + size_of::<socket2::SockAddrStorage>();

static OTHER_FAMILY: RateLimit = RateLimit::new(5, Duration::from_secs(10));
static REFUSED: RateLimit = RateLimit::new(5, Duration::from_secs(10));
