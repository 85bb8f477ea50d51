//! Sessions that outlive the process (`--handover=`).

use std::os::fd::{AsFd, OwnedFd};

use tokio::time::Instant;

use crate::datagram::begin::{KEY_MAX, session_key};
use crate::datagram::relay::{Relay, RelayState};
use crate::datagram::session::{BackendSocket, Session, SessionBackend};
use crate::datagram::table::{Life, SessionId};
use crate::forward::snapshot::SnapshotStore;
use crate::handover::encoding::SessionRecord;
use crate::handover::journal::JournalEntry;
use crate::handover::{Detached, DetachedState, Handover};
use crate::limits::slot::Slot;
use crate::socket::address::Address;
use crate::socket::file_id::FileId;
use crate::socket::mmsg::LocalAddress;

impl Relay {
    /// Stores the sessions for the next process, and drops what they hold. In crash mode those that
    /// are confirmed are stored already.
    pub fn detach_all(&self, handover: &Handover) {
        let state = &mut *self.state.borrow_mut();
        let ids: Vec<_> = state.table.iter().map(|(id, _)| id).collect();
        let mut detached = Vec::new();
        for id in ids {
            let Some((session, life)) = self.remove(state, id) else { continue };
            detached.extend(self.detach(session, life));
        }
        handover.store(detached);
    }

    /// Returns what is to be stored of a session that has a backend.
    fn detach(&self, mut session: Session, life: Life) -> Option<Detached> {
        if let Some(entry) = session.entry.take() {
            entry.detach();
            return None;
        }
        let listener = FileId::of(&self.routes[session.listener].listener).ok()?;
        let SessionBackend::Open(socket) = session.backend else { return None };
        let slot = session.slot;
        let record = record(&session.name, session.local, listener, life, socket.into_fd());
        Some(Detached { start: life.begin, state: DetachedState::Session(record), _slot: slot })
    }

    /// Keeps a confirmed session in the store from now on (crash mode).
    pub fn keep_confirmed(&self, state: &mut RelayState, id: SessionId) {
        let Some(handover) = self.handover.as_ref().filter(|it| it.is_crash_mode()) else { return };
        let life = state.table.life(id);
        let (Some(session), Some(life)) = (state.table.get_mut(id), life) else { return };
        let SessionBackend::Open(socket) = &session.backend else { return };
        let Ok(listener) = FileId::of(&self.routes[session.listener].listener) else { return };
        let record = record(&session.name, session.local, listener, life, socket.as_fd());
        let replaced = session.entry.take();
        session.entry = handover.keep_session(life.begin, record);
        if let Some(replaced) = replaced {
            Box::new(replaced).forget();
        }
    }

    /// Goes on with a session of the previous process. Returns whether its listener is still there.
    pub fn restore(
        &self,
        record: SessionRecord<OwnedFd>,
        begin: Instant,
        entry: Option<JournalEntry>,
    ) -> bool {
        let SessionRecord { socket, listener, client, local, .. } = record;
        let is_listener = |at: &usize| {
            FileId::of(&self.routes[*at].listener).is_ok_and(|found| found == listener)
        };
        let Some(listener) = (0..self.routes.len()).find(is_listener) else { return false };
        let route = &self.routes[listener];
        let peer = socket2::SockRef::from(&socket).peer_addr();
        let Ok(address) = peer.map(|peer| Address::from_sockaddr(&peer)) else { return false };
        let local = local.map(|(ip, interface)| LocalAddress { ip, interface });
        let permit = self.descriptors.reserve_unchecked();
        let slot = Slot::new(route.listener.info.count_open(), permit);
        let mut session = self.session(listener, client.into(), local, slot);
        let client = session.client();
        self.limits.acquire_unchecked(&mut session.slot, &client);
        session.slot.event_loop = Some(self.load.take());
        if record.is_confirmed {
            session.slot.in_use = self.limits.begin_use(&client);
        }
        session.entry = entry;
        let life = Life {
            begin,
            last: Instant::now(),
            is_answered: record.is_answered,
            is_confirmed: record.is_confirmed,
            is_stream: record.is_stream,
        };
        let mut space = [0; KEY_MAX];
        let state = &mut *self.state.borrow_mut();
        let key = session_key(&mut space, listener, &session.name, local);
        if let Some(earlier) = state.table.find(key) {
            self.end(state, earlier, "a later record of it was restored");
        }
        let id = self.insert(state, key, session, life);
        self.add(state, id, BackendSocket::new(socket, address));
        true
    }
}

fn record<Fd>(
    client: &[u8],
    local: Option<LocalAddress>,
    listener: FileId,
    life: Life,
    socket: Fd,
) -> SessionRecord<Fd> {
    SessionRecord {
        socket,
        listener,
        client: client.into(),
        local: local.map(|local| (local.ip, local.interface)),
        is_answered: life.is_answered,
        is_confirmed: life.is_confirmed,
        is_stream: life.is_stream,
    }
}
