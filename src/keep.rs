//! A connection that is stored: as what, at which moments, and how it is taken back.

#![forbid(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use rustix::io::Errno;
use socket2::SockRef;

use crate::flow::{End, Flow, Shared, State, Stored};
use crate::forward::{Pair, SIDES, Side};
use crate::ledger::Kept;
use crate::logging::RateLimit;
use crate::parcel::{Content, StoredEnd, StoredPair};
use crate::quiet::Watched;
use crate::socket::{Family, Socket, has_hung_up_reading};
use crate::statistics::Carried;

static UNSTORED: RateLimit = RateLimit::new(1, Duration::from_secs(60));

impl Pair {
    /// Goes on with one that was stored, and is to be `kept` so.
    ///
    /// # Errors
    /// When a socket can't be watched, or what was under way can't be had; it ends then.
    pub fn resume(
        stored: StoredPair<OwnedFd>,
        shared: Rc<Shared>,
        carried: Arc<Carried>,
        watched: Option<Watched>,
        kept: Option<Kept>,
    ) -> io::Result<Self> {
        let was_reset = SIDES.map(|side| was_reset(&stored, side));
        let StoredPair { ends: [client, backend], flows: [there, back], preface, fault } = stored;
        let is_kept = kept.is_some();
        let end = |end: StoredEnd<OwnedFd>, was_reset: bool| -> io::Result<End> {
            let family = Family::of(&end.socket)?.ok_or(Errno::AFNOSUPPORT)?;
            let socket = Socket::register(end.socket, family)?;
            if is_kept {
                socket.set_stored();
            }
            let (reset, gone) = (end.reset || was_reset, end.gone || was_reset);
            Ok(End { reset, gone, ..End::new(socket) })
        };
        // Both, before it matters whether one failed.
        let (client, backend) = (end(client, was_reset[0]), end(backend, was_reset[1]));
        let ends = [client?, backend?];
        let flows = [Flow::resume(there, is_kept, &shared)?, Flow::resume(back, is_kept, &shared)?];
        let preface = preface.into();
        let mut pair = Self {
            ends,
            flows,
            shared,
            carried,
            watched,
            preface,
            fault,
            last_turn: 0,
            kept: None,
        };
        match kept {
            // It is stored as it stands.
            Some(kept) if pair.flows.iter().all(Flow::has_its_own) => pair.kept = Some(kept),
            Some(kept) => pair.keep(kept),
            None => {}
        }
        Ok(pair)
    }

    /// As it is to be stored.
    ///
    /// # Errors
    /// When bytes that are held have no place outside this process.
    pub fn stored(&self) -> io::Result<StoredPair<Stored<'_>>> {
        let end = |side: Side| {
            let End { socket, reset, gone, .. } = &self.ends[side as usize];
            StoredEnd { socket: Stored::Lent(socket.as_fd()), reset: *reset, gone: *gone }
        };
        let [there, back] = &self.flows;
        Ok(StoredPair {
            ends: SIDES.map(end),
            flows: [there.stored()?, back.stored()?],
            preface: self.preface as u16,
            fault: self.fault,
        })
    }

    /// From now on it is stored at every moment, and its bytes never are in this process; where that
    /// can't be, it is carried as others are.
    pub fn keep(&mut self, kept: Kept) {
        self.kept = Some(kept);
        // Whatever becomes of it here.
        self.ends.iter().for_each(|end| end.socket.set_stored());
        let has_vsock = self.ends.iter().any(|end| end.socket.family() == Family::Vsock);
        let mut flows = self.flows.iter_mut();
        let has_pipes =
            flows.all(|flow| flow.has_its_own() || flow.take_its_own(&self.shared).is_ok());
        if has_vsock {
            self.keep_no_more(None);
        } else if !has_pipes {
            self.keep_no_more(Some(
                "there is no pipe for it; see pipe-user-pages-soft in pipe(7), and LimitNOFILE=",
            ));
        }
        self.store();
    }

    /// Stores it as it stands now.
    pub(crate) fn store(&mut self) {
        let Some(kept) = &self.kept else { return };
        let is_stored = self.stored().is_ok_and(|pair| kept.store(Content::Pair(Box::new(pair))));
        if !is_stored {
            self.keep_no_more(Some("the store is full"));
        }
    }

    /// Goes on without being stored; `why`, if that is not its own fault.
    pub(crate) fn keep_no_more(&mut self, why: Option<&str>) {
        if let Some(why) = why
            && let Some(suppressed) = UNSTORED.pass()
        {
            tracing::warn!(
                "A connection is not stored, and would end with the proxy: {why}.{suppressed}"
            );
        }
        self.flows.iter_mut().for_each(Flow::give_its_own_up);
        if let Some(kept) = self.kept.take()
            && !kept.forget()
        {
            // What is stored would be taken for how it stands, and its bytes would come twice.
            self.flows.iter_mut().for_each(|flow| flow.sink_is_gone(true));
        }
    }

    /// Leaves it to the store, where it is as it stands.
    ///
    /// # Errors
    /// Itself, when it is not there.
    pub fn leave_to_store(mut self: Box<Self>) -> Result<(), Box<Self>> {
        let Some(kept) = self.kept.take() else { return Err(self) };
        kept.leave();
        self.leave();
        Ok(())
    }

    /// Ends it here; its peers notice nothing, as long as somebody else has its sockets.
    pub fn leave(self) {
        let [client, backend] = self.ends;
        client.socket.leave();
        backend.socket.leave();
    }
}

/// Whether a peer reset its TCP connection, and the process before this one took the error from the socket
/// without coming to store that: the kernel tells the error once.
///
/// Nothing was sent after a FIN of ours, since the other side has not ended. So where a socket is not
/// connected any more, it was a reset; an end by FINs takes both.
fn was_reset(stored: &StoredPair<OwnedFd>, side: Side) -> bool {
    let (from, to) = (side as usize, 1 - side as usize);
    let socket = &stored.ends[from].socket;
    let are_open = stored.flows.iter().all(|flow| flow.state == State::Open);
    are_open
        && Family::of(socket).is_ok_and(|family| family == Some(Family::Tcp))
        && !has_hung_up_reading(&stored.ends[to].socket)
        && SockRef::from(socket).peer_addr().is_err()
}
