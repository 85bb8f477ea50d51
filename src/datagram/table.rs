//! The table of sessions: which exist, which are confirmed, and when each ends.
//!
//! A pure structure: it knows neither sockets nor a clock. It follows conntrack's rules for UDP. A
//! session ends [`SHORT_TIME`] after its last datagram, or after `--session-idle-time=` once it is
//! a *stream*: both sides have sent, and the last datagram came [`STREAM_AGE`] after the first or
//! later. A session is *confirmed* when the client has sent again after an answer. Senders with
//! forged addresses see no answer, so they seldom confirm a session.

use std::collections::{BTreeSet, HashMap};
use std::time::Duration;

use tokio::time::Instant;

/// The sessions, each with a value. Keys are hashed with a seed that is drawn at the start.
#[derive(Debug)]
pub struct SessionTable<T> {
    by_key: HashMap<Box<[u8]>, SessionId>,
    places: Vec<Place<T>>,
    free: Vec<u32>,
    /// The sessions that are not confirmed, oldest first.
    unconfirmed: BTreeSet<(u64, u32)>,
    /// When to look at each session. A later datagram does not change this moment. The look finds
    /// that the session ends later, and moves it.
    visits: BTreeSet<(Instant, u32)>,
    begun: u64,
    idle_time: Duration,
}

/// Names a session, also after its end: no two have the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SessionId {
    index: u32,
    generation: u32,
}

#[derive(Debug)]
struct Place<T> {
    generation: u32,
    session: Option<TableEntry<T>>,
}

#[derive(Debug)]
struct TableEntry<T> {
    key: Box<[u8]>,
    value: T,
    life: Life,
    /// Its number, in the order of begin.
    number: u64,
    visit: Instant,
}

/// What a session has been through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Life {
    pub begin: Instant,
    /// The last datagram of either side.
    pub last: Instant,
    /// Whether the backend has sent.
    pub is_answered: bool,
    pub is_confirmed: bool,
    pub is_stream: bool,
}

impl Life {
    pub fn new(now: Instant) -> Self {
        Self { begin: now, last: now, is_answered: false, is_confirmed: false, is_stream: false }
    }

    fn touch(&mut self, now: Instant) {
        self.last = now;
        self.is_stream |= self.is_answered && now - self.begin >= STREAM_AGE;
    }

    /// Returns when the session ends, if no datagram comes.
    fn end(&self, idle_time: Duration) -> Instant {
        let time = if self.is_stream { idle_time } else { idle_time.min(SHORT_TIME) };
        self.last + time
    }
}

impl SessionId {
    /// Returns the name as a number, for epoll(7).
    pub fn to_u64(self) -> u64 {
        u64::from(self.generation) << 32 | u64::from(self.index)
    }

    pub fn from_u64(number: u64) -> Self {
        Self { index: number as u32, generation: (number >> 32) as u32 }
    }
}

impl<T> SessionTable<T> {
    /// Creates a table in which streams end after `idle_time` without a datagram.
    pub fn new(idle_time: Duration) -> Self {
        Self {
            by_key: HashMap::new(),
            places: Vec::new(),
            free: Vec::new(),
            unconfirmed: BTreeSet::new(),
            visits: BTreeSet::new(),
            begun: 0,
            idle_time,
        }
    }

    pub fn find(&self, key: &[u8]) -> Option<SessionId> {
        self.by_key.get(key).copied()
    }

    /// Adds a session that `find` does not find.
    pub fn insert(&mut self, key: &[u8], value: T, life: Life) -> SessionId {
        let index = self.free.pop().unwrap_or_else(|| {
            self.places.push(Place { generation: 0, session: None });
            self.places.len() as u32 - 1
        });
        let place = &mut self.places[index as usize];
        let id = SessionId { index, generation: place.generation };
        let (number, visit) = (self.begun, life.end(self.idle_time));
        self.begun += 1;
        self.by_key.insert(key.into(), id);
        self.visits.insert((visit, index));
        if !life.is_confirmed {
            self.unconfirmed.insert((number, index));
        }
        place.session = Some(TableEntry { key: key.into(), value, life, number, visit });
        id
    }

    pub fn remove(&mut self, id: SessionId) -> Option<T> {
        self.entry(id)?;
        let place = &mut self.places[id.index as usize];
        let entry = place.session.take()?;
        // After 2^32 sessions in one place a name comes again. By then its events are long over.
        place.generation = place.generation.wrapping_add(1);
        self.free.push(id.index);
        self.by_key.remove(&entry.key);
        self.visits.remove(&(entry.visit, id.index));
        self.unconfirmed.remove(&(entry.number, id.index));
        Some(entry.value)
    }

    pub fn get(&self, id: SessionId) -> Option<&T> {
        self.entry(id).map(|entry| &entry.value)
    }

    pub fn get_mut(&mut self, id: SessionId) -> Option<&mut T> {
        self.entry_mut(id).map(|entry| &mut entry.value)
    }

    pub fn life(&self, id: SessionId) -> Option<Life> {
        self.entry(id).map(|entry| entry.life)
    }

    /// Returns all sessions, in no order.
    pub fn iter(&self) -> impl Iterator<Item = (SessionId, &T)> {
        let sessions = self.places.iter().zip(0..);
        sessions.filter_map(|(place, index)| {
            let id = SessionId { index, generation: place.generation };
            Some((id, &place.session.as_ref()?.value))
        })
    }

    /// Notes a datagram of the client. Returns whether it has confirmed the session.
    pub fn client_has_sent(&mut self, id: SessionId, now: Instant) -> bool {
        let Some(TableEntry { life, number, .. }) = self.entry_mut(id) else { return false };
        life.touch(now);
        if !life.is_answered || life.is_confirmed {
            return false;
        }
        life.is_confirmed = true;
        let number = *number;
        self.unconfirmed.remove(&(number, id.index));
        true
    }

    /// Notes a datagram of the backend.
    pub fn backend_has_sent(&mut self, id: SessionId, now: Instant) {
        if let Some(TableEntry { life, .. }) = self.entry_mut(id) {
            life.is_answered = true;
            life.touch(now);
        }
    }

    /// Lets a session live on that waits for its backend.
    pub fn touch(&mut self, id: SessionId, now: Instant) {
        if let Some(TableEntry { life, .. }) = self.entry_mut(id) {
            life.last = now;
        }
    }

    /// Returns the oldest session that is not confirmed.
    pub fn oldest_unconfirmed(&self) -> Option<SessionId> {
        let (_, index) = self.unconfirmed.first()?;
        Some(self.id_at(*index))
    }

    /// Returns when to ask for sessions that have ended.
    pub fn next_visit(&self) -> Option<Instant> {
        self.visits.first().map(|(visit, _)| *visit)
    }

    /// Returns a session that has ended. The caller removes or touches it.
    pub fn ended(&mut self, now: Instant) -> Option<SessionId> {
        loop {
            let &(visit, index) = self.visits.first().filter(|(visit, _)| *visit <= now)?;
            let (id, idle_time) = (self.id_at(index), self.idle_time);
            let entry = self.entry_mut(id)?;
            let end = entry.life.end(idle_time);
            if end <= now {
                return Some(id);
            }
            entry.visit = end;
            self.visits.remove(&(visit, index));
            self.visits.insert((end, index));
        }
    }

    fn id_at(&self, index: u32) -> SessionId {
        SessionId { index, generation: self.places[index as usize].generation }
    }

    fn entry(&self, id: SessionId) -> Option<&TableEntry<T>> {
        let place = self.places.get(id.index as usize)?;
        place.session.as_ref().filter(|_| place.generation == id.generation)
    }

    fn entry_mut(&mut self, id: SessionId) -> Option<&mut TableEntry<T>> {
        let place = self.places.get_mut(id.index as usize)?;
        place.session.as_mut().filter(|_| place.generation == id.generation)
    }
}

/// `nf_conntrack_udp_timeout`.
pub const SHORT_TIME: Duration = Duration::from_secs(30);

/// A resolver asks for an A and an AAAA record from one port. That is no stream.
const STREAM_AGE: Duration = Duration::from_secs(2);

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    const IDLE: Duration = Duration::from_secs(120);

    /// What the table promises, by a list that is searched from end to end.
    #[derive(Default)]
    struct Model {
        /// The key and the life of each session, in the order of begin.
        sessions: Vec<(u8, Life)>,
    }

    /// A generator of numbers below a bound (xorshift).
    struct Random(u64);

    impl Random {
        fn below(&mut self, bound: u64) -> u64 {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            self.0 % bound
        }
    }

    /// Each session of the table is in the model, with the same life, and no other.
    fn compare(table: &SessionTable<u8>, model: &Model) {
        let found: BTreeMap<_, _> =
            table.iter().map(|(id, key)| (*key, table.life(id).unwrap())).collect();
        let expected: BTreeMap<_, _> = model.sessions.iter().copied().collect();
        assert_eq!(found, expected);
        assert_eq!(table.by_key.len(), expected.len());
        let oldest = table.oldest_unconfirmed().map(|id| *table.get(id).unwrap());
        let mut unconfirmed = model.sessions.iter().filter(|(_, life)| !life.is_confirmed);
        assert_eq!(oldest, unconfirmed.next().map(|(key, _)| *key));
    }

    #[test]
    fn it_does_what_a_list_does() {
        for seed in 1..200_u64 {
            let (mut random, mut model) = (Random(seed * 0x9E37_79B9), Model::default());
            let (mut table, mut now) = (SessionTable::new(IDLE), Instant::now());
            let mut removed = Vec::new();
            for _ in 0..300 {
                now += Duration::from_millis(random.below(4000));
                let key = random.below(12) as u8;
                let known = model.sessions.iter().position(|(it, _)| *it == key);
                let id = table.find(&[key]);
                assert_eq!(id.is_some(), known.is_some());
                match (random.below(6), id.zip(known)) {
                    (0..3, None) => {
                        let id = table.insert(&[key], key, Life::new(now));
                        assert!(!removed.contains(&id), "a name came again");
                        model.sessions.push((key, Life::new(now)));
                    }
                    (0..3, Some((id, at))) => {
                        let life = &mut model.sessions[at].1;
                        let confirms = life.is_answered && !life.is_confirmed;
                        life.is_confirmed |= life.is_answered;
                        life.touch(now);
                        assert_eq!(table.client_has_sent(id, now), confirms);
                    }
                    (3, Some((id, at))) => {
                        let life = &mut model.sessions[at].1;
                        life.is_answered = true;
                        life.touch(now);
                        table.backend_has_sent(id, now);
                    }
                    (4, Some((id, at))) => {
                        assert_eq!(table.remove(id), Some(key));
                        assert!(table.get(id).is_none() && table.remove(id).is_none());
                        removed.push(id);
                        model.sessions.remove(at);
                    }
                    _ => {
                        let next = model.sessions.iter().map(|(_, life)| life.end(IDLE)).min();
                        assert!(table.next_visit() <= next || next.is_none(), "a visit is late");
                        while let Some(id) = table.ended(now) {
                            removed.push(id);
                            table.remove(id);
                        }
                        model.sessions.retain(|(_, life)| life.end(IDLE) > now);
                    }
                }
                compare(&table, &model);
            }
        }
    }

    #[test]
    fn a_session_lives_as_long_as_in_conntrack() {
        let begin = Instant::now();
        let at = |seconds: f64| begin + Duration::from_secs_f64(seconds);
        // When the client sends, when the backend does, and when the session ends.
        for (client, backend, end) in [
            (&[0.0][..], &[][..], 30.0),
            (&[0.0, 10.0], &[], 40.0),
            // A question and its answer, twice: no stream.
            (&[0.0, 0.1], &[0.05, 0.15], 30.15),
            (&[0.0], &[1.9], 31.9),
            (&[0.0], &[2.1], 122.1),
            (&[0.0, 3.0], &[0.1], 123.0),
        ] {
            let mut table = SessionTable::new(IDLE);
            let id = table.insert(b"", (), Life::new(begin));
            let sent = client.iter().map(|time: &f64| (*time, true));
            let answered = backend.iter().map(|time: &f64| (*time, false));
            let mut all: Vec<_> = sent.chain(answered).collect();
            all.sort_by(|one, other| one.0.total_cmp(&other.0));
            for (time, is_client) in all {
                match is_client {
                    true => assert!(!table.client_has_sent(id, at(time)) || time > 0.0),
                    false => table.backend_has_sent(id, at(time)),
                }
            }
            assert_eq!(table.ended(at(end - 0.01)), None, "{client:?} {backend:?}");
            assert_eq!(table.ended(at(end)), Some(id), "{client:?} {backend:?}");
        }
    }
}
