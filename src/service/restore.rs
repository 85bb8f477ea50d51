//! The start with `--handover=`: the connections of the previous process are restored.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use socket2::{SockAddr, SockRef};
use tokio::time::Instant;

use crate::connection::{Restored, forget};
use crate::forward::snapshot::Snapshot;
use crate::handover::encoding::{Record, RecordBody};
use crate::handover::journal::{JournalEntry, monotonic_micros};
use crate::handover::replay::Leftovers;
use crate::limits::slot::Slot;
use crate::listen::accepted::{Accepted, ListenerInfo};
use crate::listen::listener::Listener;
use crate::listen::stored::StoredListener;
use crate::logging::message_id;
use crate::service::server::Server;
use crate::socket::address::{Address, SocketKind, SocketLabel};
use crate::socket::{Family, abort, set_reset_on_close};

/// Restores the connections of the previous process.
pub fn restore(server: &Server, leftovers: Leftovers) {
    let Some(handover) = &server.handover else { return };
    // First: from here on this process has the connections, and none of them has moved a byte yet.
    handover.discard_replayed();
    if leftovers.refused > 0 {
        tracing::warn!(
            message_id = message_id::HANDOVER_LOST,
            "Failed to restore stored connections, closing them: {}. (They are damaged, or of another \
             version.)",
            leftovers.refused
        );
    }
    let files = server.listeners.iter().filter_map(|(listener, _)| listener.file());
    let routes = server.relay.iter().flat_map(|relay| &relay.routes);
    files
        .chain(routes.filter_map(|it| it.listener.file()))
        .for_each(|file| file.unlinks_on_drop.set(true));
    // These listeners are no longer configured. They are closed only now, so that a start that
    // fails leaves them open.
    leftovers.listeners.into_iter().for_each(StoredListener::close);
    // The listeners that are still used have new entries, or serve metrics. Behind a live record
    // the old ones stay in the queue for some seconds, and would be refused if they were not
    // superseded.
    leftovers.listener_entries.into_iter().for_each(|entry| forget(Some(entry)));
    let mut lost_sessions = 0;
    for (Record { start, body, .. }, entry) in leftovers.connections {
        match body {
            RecordBody::Forwarder(snapshot) => restore_connection(server, snapshot, start, entry),
            RecordBody::Client(socket) => restore_client(server, socket, entry),
            RecordBody::Session(session) => {
                let (begin, entry) = (begin_of(start), entry.map(JournalEntry::own));
                let relay = server.relay.as_ref();
                let is_restored = relay.is_some_and(|it| it.restore(*session, begin, entry));
                lost_sessions += usize::from(!is_restored);
            }
            RecordBody::Nothing | RecordBody::Listener(..) => {}
        }
    }
    if lost_sessions > 0 {
        tracing::warn!(
            message_id = message_id::HANDOVER_LOST,
            "Failed to restore sessions of datagrams: {lost_sessions}. (Their sockets are gone.)"
        );
    }
    let recovered = server.restored - lost_sessions;
    if recovered > 0 {
        tracing::info!(
            message_id = message_id::HANDOVER_RECOVERED,
            "Recovered connections: {recovered}."
        );
    }
}

fn restore_connection(
    server: &Server,
    snapshot: Box<Snapshot<OwnedFd>>,
    start: u64,
    entry: Option<JournalEntry>,
) {
    let start = begin_of(start);
    let sockets = snapshot.endpoints.each_ref().map(|end| SockRef::from(&end.socket));
    let (listener, known_backend) = find_listener(server, &sockets[0]);
    let [client, backend] = sockets.map(|socket| or_unnamed(socket.peer_addr()));
    let slot = Slot::new(listener.count_open(), server.descriptors.reserve_unchecked());
    let restored =
        Restored { snapshot, client, listener, backend, known_backend, start, slot, entry };
    server.dispatcher.resume(restored);
}

/// Returns the moment that a record has as CLOCK_MONOTONIC.
fn begin_of(start: u64) -> Instant {
    let age = Duration::from_micros(monotonic_micros().saturating_sub(start));
    Instant::now().checked_sub(age).unwrap_or_else(Instant::now)
}

/// Serves a client that waited for its backend when the previous process ended.
fn restore_client(server: &Server, socket: OwnedFd, entry: Option<JournalEntry>) {
    set_reset_on_close(&socket, false);
    let entry = entry.map(JournalEntry::own);
    let Ok(Some(family)) = Family::of(&socket) else { return };
    let client = or_unnamed(SockRef::from(&socket).peer_addr());
    let (listener, backend) = find_listener(server, &SockRef::from(&socket));
    let Some(backend) = backend else {
        tracing::warn!(
            %client,
            %listener,
            message_id = message_id::HANDOVER_LOST,
            "Failed to restore a client that had no backend yet: no socket listens on {listener} any \
             more."
        );
        return abort(&socket);
    };
    let slot = Slot::new(listener.count_open(), server.descriptors.reserve_unchecked());
    let accepted = Accepted { socket, family, client, listener, slot };
    server.dispatcher.serve_unchecked(accepted, backend, entry);
}

/// Finds the listener that accepted a socket, by the socket's own address, and its backend.
fn find_listener(server: &Server, client: &socket2::Socket) -> (Arc<ListenerInfo>, Option<usize>) {
    let local = or_unnamed(client.local_addr());
    // An accepted socket inherits BindToDevice=. A listener without it accepts from all devices.
    let device = client.device().ok().flatten();
    let device_of = |listener: &Listener| SockRef::from(listener).device().ok().flatten();
    let listeners = server.listeners.iter().map(|it| (device_of(&it.0), it));
    let mut listeners: Vec<_> =
        listeners.filter(|(bound, _)| bound.is_none() || *bound == device).collect();
    listeners.sort_by_key(|(bound, _)| bound.is_none());
    let find = |matches: &dyn Fn(&Listener, &Address) -> bool| {
        let mut listeners = listeners.iter().map(|(_, it)| *it);
        listeners.find(|(listener, _)| matches(listener, &listener.label.address))
    };
    // The listener itself has the socket's family. A listener that has replaced it may be of the
    // other family, if it accepts the same clients.
    let found = find(&|_, address| *address == local)
        .or_else(|| find(&|_, address| address.covers(&local)))
        .or_else(|| {
            let local = local.in_other_family()?;
            find(&|listener, address| !listener.is_ipv6_only() && address.covers(&local))
        });
    if let Some((listener, backend)) = found {
        return (Arc::clone(&listener.info), Some(*backend));
    }
    // A single backend is the backend of all listeners.
    let backend = (server.dispatcher.event_loops.settings.backends.len() == 1).then_some(0);
    let label = SocketLabel { name: None, kind: SocketKind::Stream, address: local };
    (ListenerInfo::with_counters(&label, Arc::clone(&server.unconfigured)), backend)
}

fn or_unnamed(address: io::Result<SockAddr>) -> Address {
    address.map_or(Address::Unnamed, |address| Address::from_sockaddr(&address))
}
