//! Connections that are taken off their event loop, to be stored.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use tokio::time::Instant;

use crate::forward::Forwarder;
use crate::forward::snapshot::FdRef;
use crate::handover::encoding::{RecordBody, SessionRecord};
use crate::handover::journal::JournalEntry;
use crate::limits::slot::Slot;
use crate::socket::Socket;

/// A connection that is to be stored. Dropping this resets both sides.
#[derive(Debug)]
pub struct Detached {
    /// When the connection was accepted.
    pub start: Instant,
    pub state: DetachedState,
    pub _slot: Slot,
}

#[derive(Debug)]
pub enum DetachedState {
    /// A client that still waits for its backend.
    Client(Socket),
    /// A connection with its buffered bytes.
    Forwarder(Box<Forwarder>),
    Session(SessionRecord<OwnedFd>),
}

impl Detached {
    /// Detaches a client that waits for its backend, or for its own first byte. Returns `None` if
    /// it is stored already.
    pub fn client(
        start: Instant,
        socket: Socket,
        slot: Slot,
        entry: Option<JournalEntry>,
    ) -> Option<Self> {
        let Some(entry) = entry else {
            return Some(Self { start, state: DetachedState::Client(socket), _slot: slot });
        };
        entry.detach();
        socket.detach();
        None
    }

    /// Returns what is to be stored of the connection.
    pub fn body(&self) -> io::Result<RecordBody<FdRef<'_>>> {
        Ok(match &self.state {
            DetachedState::Client(socket) => RecordBody::Client(FdRef::Borrowed(socket.as_fd())),
            DetachedState::Forwarder(it) => RecordBody::Forwarder(Box::new(it.snapshot()?)),
            DetachedState::Session(session) => {
                let session = session.map_fd(|fd| FdRef::Borrowed(fd.as_fd()));
                RecordBody::Session(Box::new(session))
            }
        })
    }

    /// Closes the sockets here: the stored ones keep the connection open.
    pub fn release(self) {
        match self.state {
            DetachedState::Client(socket) => socket.detach(),
            DetachedState::Forwarder(forwarder) => forwarder.detach(),
            // Closing a datagram socket tells its peer nothing.
            DetachedState::Session(_) => {}
        }
    }
}
