//! Between two processes: connections of the previous one are taken over, and open ones are detached for
//! the next one.

use std::io;
use std::sync::Arc;

use sd_notify::NotifyState;
use socket2::{SockAddr, SockRef};

use crate::connection::Restored;
use crate::handover::Handover;
use crate::handover::journal::JournalEntry;
use crate::handover::replay::{Leftovers, RestoredRecord};
use crate::limits::slot::Slot;
use crate::listen::listener::{Accepted, Listener, ListenerInfo};
use crate::notify::Notifier;
use crate::service::server::Server;
use crate::socket::address::{Address, SocketLabel};
use crate::socket::{Family, abort, set_reset_on_close};

/// Goes on with the connections of the previous process.
pub fn take_over(server: &Server, restored: Leftovers) {
    let Some(handover) = &server.handover else { return };
    // From here on it is this process's, and before any of it is moved.
    handover.discard_replayed();
    if restored.refused > 0 {
        tracing::warn!(
            "Stored connections can't be taken back, closing them: {}. (They are damaged, or of another \
             version.)",
            restored.refused
        );
    }
    server.routes.listeners().iter().for_each(|(listener, _)| listener.unlink_on_drop(true));
    // Those of them that are still used are stored anew.
    restored.listener_entries.into_iter().for_each(|entry| drop(entry.own()));
    for RestoredRecord { body, start, entry } in restored.forwarders {
        let [client, backend] = body.endpoints.each_ref().map(|end| SockRef::from(&end.socket));
        let [address, backend] = [client.peer_addr(), backend.peer_addr()].map(or_unnamed);
        let (listener_info, known_backend) = find_listener(server, &client);
        let slot = slot(server, &listener_info);
        server.event_loops.resume(Restored {
            snapshot: body,
            client: address,
            listener: listener_info,
            backend,
            known_backend,
            start,
            slot,
            journal: entry,
        });
    }
    for RestoredRecord { body: fd, entry, .. } in restored.clients {
        set_reset_on_close(&fd, false);
        let entry = entry.map(JournalEntry::own);
        let Ok(Some(family)) = Family::of(&fd) else { continue };
        let client = SockRef::from(&fd);
        let address = or_unnamed(client.peer_addr());
        let (listener_info, backend) = find_listener(server, &client);
        let Some(backend) = backend else {
            tracing::warn!(
                client = %address,
                listener = %listener_info,
                "A stored client came in at a socket that is not passed any more, closing it."
            );
            abort(&fd);
            continue;
        };
        let slot = slot(server, &listener_info);
        let accepted =
            Accepted { socket: fd, family, client: address, listener: listener_info, slot };
        server.event_loops.serve(accepted, backend, entry);
    }
    if server.restored > 0 {
        tracing::info!("Recovered connections: {}.", server.restored);
    }
}

/// Returns a slot for a connection of the previous process, whatever the limits are now.
fn slot(server: &Server, listener: &ListenerInfo) -> Slot {
    let mut slot = Slot::new(listener.track(), server.descriptors.reserve_unchecked());
    slot.admit(server.limit.acquire_unchecked());
    slot
}

/// The listener at which an accepted socket came in, as far as its own address tells, and the
/// backend that it leads to.
fn find_listener(server: &Server, client: &socket2::Socket) -> (Arc<ListenerInfo>, Option<usize>) {
    let at = or_unnamed(client.local_addr());
    let listeners = server.routes.listeners();
    let find =
        |is_it: &dyn Fn(&Listener) -> bool| listeners.iter().find(|(listener, _)| is_it(listener));
    let address = |listener: &Listener| listener.label().address.clone();
    // The same listener is of the same family; one that has taken its place may be of another, if
    // it has the same clients.
    let found = find(&|it| address(it) == at)
        .or_else(|| find(&|it| address(it).covers(&at)))
        .or_else(|| {
            let at = at.in_other_family()?;
            find(&|it| !it.is_ipv6_only() && address(it).covers(&at))
        });
    match found {
        Some((listener, backend)) => (Arc::clone(listener.info()), Some(*backend)),
        // With one backend there is no question which.
        None => {
            let backend = (server.event_loops.settings().backends.len() == 1).then_some(0);
            let identity = SocketLabel { name: None, address: at };
            (ListenerInfo::with_counters(&identity, Arc::clone(&server.elsewhere)), backend)
        }
    }
}

/// Stores all open connections for the next process.
pub async fn detach_all(server: &Server, handover: &Handover, notifier: &Notifier) {
    let listeners = server.routes.listeners().iter().filter(|_| server.has_opened);
    let mut listening = server.listener_entries.len();
    for (listener, _) in listeners {
        if handover.is_crash_mode() {
            listener.unlink_on_drop(false);
        } else if handover.store_listener(listener) {
            listener.unlink_on_drop(false);
            listening += 1;
        }
    }
    server.event_loops.detach_all(handover).await;
    let [stored, lost] = handover.stored_and_lost();
    let stored = stored.saturating_sub(listening);
    let status = format!("Left open connections with systemd: {stored}.");
    let _ = notifier.send_once(&[NotifyState::Stopping, NotifyState::Status(&status)]);
    if stored > 0 {
        tracing::info!(
            "Stopping, left open connections with systemd: {stored}. (Without a restart it resets \
             them.)"
        );
    }
    if lost > 0 {
        tracing::warn!(
            "Open connections could not be stored, resetting them: {lost}. (If the store is full, \
             raise LimitNOFILE= or net.core.wmem_max.)"
        );
    }
}

fn or_unnamed(address: io::Result<SockAddr>) -> Address {
    address.map_or(Address::Unix(None), |address| Address::from_sockaddr(&address))
}
