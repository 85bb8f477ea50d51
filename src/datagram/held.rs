//! The datagrams of one listener that wait for their backend, or for room in its queue.
//!
//! A pure structure. A session holds at most [`SESSION_DATAGRAMS`] and [`SESSION_BYTES`], all
//! sessions of a listener [`LISTENER_BYTES`]. The oldest datagrams are dropped.

use std::collections::{BTreeMap, HashMap, VecDeque};

use crate::datagram::table::SessionId;

#[derive(Debug, Default)]
pub struct HeldDatagrams {
    /// All of them by number, the oldest first.
    datagrams: BTreeMap<u64, (SessionId, HeldDatagram)>,
    sessions: HashMap<SessionId, HeldOfSession>,
    bytes: usize,
    next: u64,
}

#[derive(Debug, Default)]
struct HeldOfSession {
    numbers: VecDeque<u64>,
    bytes: usize,
}

/// A datagram of a client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeldDatagram {
    pub bytes: Box<[u8]>,
    pub tos: u8,
}

impl HeldDatagrams {
    /// Adds a datagram of a session. Returns how many were dropped for it.
    pub fn push(&mut self, id: SessionId, datagram: HeldDatagram) -> usize {
        let (number, len) = (self.next, datagram.bytes.len());
        self.next += 1;
        self.bytes += len;
        self.datagrams.insert(number, (id, datagram));
        let session = self.sessions.entry(id).or_default();
        session.numbers.push_back(number);
        session.bytes += len;
        let mut dropped = 0;
        while self.sessions.get(&id).is_some_and(HeldOfSession::is_over) {
            self.pop(id);
            dropped += 1;
        }
        while self.bytes > LISTENER_BYTES {
            let Some((_, (oldest, _))) = self.datagrams.first_key_value() else { break };
            self.pop(*oldest);
            dropped += 1;
        }
        dropped
    }

    /// Takes the oldest datagram of a session.
    pub fn pop(&mut self, id: SessionId) -> Option<HeldDatagram> {
        let session = self.sessions.get_mut(&id)?;
        let number = session.numbers.pop_front()?;
        let (_, datagram) = self.datagrams.remove(&number)?;
        session.bytes -= datagram.bytes.len();
        self.bytes -= datagram.bytes.len();
        if session.numbers.is_empty() {
            self.sessions.remove(&id);
        }
        Some(datagram)
    }

    /// Returns the oldest datagram of a session, and its number.
    pub fn first(&self, id: SessionId) -> Option<(u64, &HeldDatagram)> {
        let number = self.sessions.get(&id)?.numbers.front()?;
        self.datagrams.get(number).map(|(_, datagram)| (*number, datagram))
    }

    pub fn has(&self, id: SessionId) -> bool {
        self.sessions.contains_key(&id)
    }

    /// Drops the datagrams of a session. Returns how many.
    pub fn clear(&mut self, id: SessionId) -> usize {
        std::iter::from_fn(|| self.pop(id)).count()
    }
}

impl HeldOfSession {
    fn is_over(&self) -> bool {
        self.numbers.len() > SESSION_DATAGRAMS || self.bytes > SESSION_BYTES
    }
}

/// Datagrams that a session holds at most.
pub const SESSION_DATAGRAMS: usize = 16;

/// Bytes that a session holds at most.
const SESSION_BYTES: usize = 64 * 1024;

/// Bytes that the sessions of a listener hold at most.
const LISTENER_BYTES: usize = 1024 * 1024;

#[cfg(test)]
mod tests {
    use super::*;

    fn datagram(len: usize, mark: u8) -> HeldDatagram {
        HeldDatagram { bytes: vec![mark; len].into(), tos: 0 }
    }

    fn id(number: u64) -> SessionId {
        SessionId::from_u64(number)
    }

    #[test]
    fn the_oldest_give_way() {
        let mut held = HeldDatagrams::default();
        for mark in 0..20 {
            assert_eq!(held.push(id(1), datagram(10, mark)), usize::from(mark >= 16));
        }
        assert_eq!(held.first(id(1)), Some((4, &datagram(10, 4))));
        // 16 of 10 bytes are there. What is as long as all that a session may hold leaves no other.
        assert_eq!(held.push(id(1), datagram(SESSION_BYTES, 99)), 16);
        assert_eq!(held.pop(id(1)), Some(datagram(SESSION_BYTES, 99)));
        assert_eq!(held.push(id(1), datagram(SESSION_BYTES + 1, 0)), 1);
        assert!(!held.has(id(1)));
        // The oldest of the listener, whose ever they are.
        for session in 0..16 {
            assert_eq!(held.push(id(session), datagram(SESSION_BYTES, 1)), 0);
        }
        assert_eq!(held.push(id(16), datagram(1, 1)), 1);
        assert!(!held.has(id(0)) && held.has(id(1)));
        assert_eq!((1..17).map(|session| held.clear(id(session))).sum::<usize>(), 16);
        assert_eq!((held.bytes, held.datagrams.len(), held.sessions.len()), (0, 0, 0));
    }

    #[test]
    fn each_session_gets_its_own_in_order() {
        let mut held = HeldDatagrams::default();
        for mark in 0..15 {
            held.push(id(u64::from(mark % 3)), datagram(mark.into(), mark));
        }
        for session in 0..3 {
            let marks: Vec<_> = (0..5).map(|round| round * 3 + session).collect();
            let taken = std::iter::from_fn(|| held.pop(id(session.into())));
            let expected: Vec<_> =
                marks.iter().map(|mark| datagram((*mark).into(), *mark)).collect();
            assert_eq!(taken.collect::<Vec<_>>(), expected);
        }
        assert!(held.pop(id(0)).is_none() && held.bytes == 0);
    }
}
