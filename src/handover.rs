//! Connections that outlive the process: `--handover=`.
//!
//! With `restart` connections leave when the process is told to stop: each comes to rest, its sockets
//! and the bytes under way go into the [`Queue`] that systemd keeps, and the next process takes them
//! from there before it accepts anybody. With `crash` they are there from accept on, and what is
//! under way never is in the memory of the process; a [`Ledger`] keeps the queue current.

#![forbid(unsafe_code)]

use std::collections::{BTreeMap, HashSet};
use std::convert::Infallible;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{SocketType, sockopt};
use tokio::time::Instant;

use crate::activation::Inherited;
use crate::connection::Left;
use crate::ledger::{Kept, Ledger, now};
use crate::logging::in_words;
use crate::notify::Notifier;
use crate::parcel::{Content, PARCELS_MAX, Parcel, Sealed, StoredHeld, StoredPair, unpack};
use crate::queue::{Message, Queue};
use crate::socket::queued;
use crate::store::{self, Returned};

/// What connections outlive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Survival {
    /// That the process is told to stop.
    Restart,
    /// Whatever ends the process.
    Crash,
}

impl Survival {
    /// Reads the value of `--handover=`; `Some(None)` is `never`.
    pub fn parse(text: &str) -> Option<Option<Self>> {
        match text {
            "never" => Some(None),
            "restart" => Some(Some(Self::Restart)),
            "crash" => Some(Some(Self::Crash)),
            _ => None,
        }
    }
}

/// What the process before this one has left.
#[derive(Debug, Default)]
pub struct Recovered {
    /// Sockets it listened on, which it had opened.
    pub listeners: Vec<OwnedFd>,
    /// That these are stored, until those that are used are again.
    pub kept_listeners: Vec<Kept>,
    /// Clients without a backend.
    pub clients: Vec<Recovery<OwnedFd>>,
    /// Connections.
    pub pairs: Vec<Recovery<Box<StoredPair<OwnedFd>>>>,
}

impl Recovered {
    /// Whether there are any, with a backend or without.
    pub fn has_connections(&self) -> bool {
        self.connections() > 0
    }

    /// How many.
    pub fn connections(&self) -> usize {
        self.clients.len() + self.pairs.len()
    }
}

/// A connection that was stored.
#[derive(Debug)]
pub struct Recovery<T> {
    /// What it consists of.
    pub content: T,
    /// When it began.
    pub start: Instant,
    /// That it is stored at this moment, if it is to be at every one.
    pub kept: Option<Kept>,
}

/// The store, as the connections of this process use it.
#[derive(Debug)]
pub struct Handover {
    survival: Survival,
    ledger: Arc<Ledger>,
    threads_are_told: AtomicBool,
    stored: AtomicUsize,
    lost: AtomicUsize,
}

impl Handover {
    /// Takes what was stored, and makes a store for what is to be. Without one it says so, once.
    pub async fn open(
        survival: Option<Survival>,
        inherited: &mut Vec<Inherited>,
        notifier: &Notifier,
    ) -> (Option<Arc<Self>>, Recovered) {
        let nothing = (None, Recovered::default());
        let returned = Returned::take(inherited);
        let Some(survival) = survival else {
            if !returned.is_empty() {
                tracing::info!("Closing what was stored, since --handover=never.");
                returned.discard(notifier).await;
            }
            return nothing;
        };
        remove_strangers(inherited, notifier).await;
        let queue = match returned.is_empty() {
            false => returned.into_queue(notifier).await,
            true => None,
        };
        let queue = match queue {
            Some(queue) => queue,
            None => match new_queue(notifier).await {
                Ok(queue) => queue,
                Err(error) => {
                    tracing::warn!(
                        "--handover= without a store, connections end with the process: {error}."
                    );
                    return nothing;
                }
            },
        };
        let SortedOut { messages, parcels, refused } = sort_out(queue.messages());
        if refused > 0 {
            tracing::warn!("Stored connections are damaged or unknown, closing them: {refused}.");
        }
        let current: Vec<_> = parcels.iter().map(|parcel| parcel.id).collect();
        let ledger = Ledger::new(queue, messages, &current);
        let recovered = recover(parcels, survival, &ledger);
        let handover = Self {
            survival,
            ledger,
            threads_are_told: AtomicBool::default(),
            stored: AtomicUsize::default(),
            lost: AtomicUsize::default(),
        };
        (Some(Arc::new(handover)), recovered)
    }

    /// Whether connections are stored from accept on.
    pub fn is_for_crashes(&self) -> bool {
        self.survival == Survival::Crash
    }

    /// All that was stored is this process's again.
    pub fn has_recovered(&self) {
        if self.survival == Survival::Restart {
            // A second reference would keep peers from seeing the end of their connections.
            self.ledger.clear();
        }
    }

    /// Keeps the store clean, for ever.
    pub async fn clean(&self) -> Infallible {
        match self.survival {
            // There is nothing in it.
            Survival::Restart => std::future::pending().await,
            Survival::Crash => self.ledger.clean().await,
        }
    }

    /// Keeps a client, from now on and whatever ends the process, if that is asked for.
    pub fn keep_client(&self, client: impl AsFd) -> Option<Kept> {
        self.keep(Content::Client(client))
    }

    /// The same for a socket that was opened here.
    pub fn keep_listener(&self, listener: impl AsFd) -> Option<Kept> {
        self.keep(Content::Listener(listener))
    }

    fn keep<Fd: AsFd>(&self, content: Content<Fd>) -> Option<Kept> {
        self.is_for_crashes().then(|| self.ledger.keep(now(), content)).flatten()
    }

    /// Has each other thread store its connections when it ends.
    pub fn tell_threads(&self) {
        self.threads_are_told.store(true, Ordering::Release);
    }

    /// Whether they are to.
    pub fn has_told_threads(&self) -> bool {
        self.threads_are_told.load(Ordering::Acquire)
    }

    /// Stores what has left; what can't be stored is reset.
    pub fn store(&self, left: Vec<Left>) {
        let mut left = left.into_iter();
        loop {
            let batch: Vec<_> = left.by_ref().take(PARCELS_MAX).collect();
            if batch.is_empty() {
                break;
            }
            let (mut contents, mut all) = (Vec::new(), true);
            for one in &batch {
                match one.stored() {
                    Ok((age, content)) => contents.push((begun(age), content)),
                    Err(error) => {
                        tracing::error!("Failed to store a connection: {}", in_words(&error));
                        all = false;
                    }
                }
            }
            let count = batch.len();
            match self.ledger.leave(contents) {
                Ok(()) if all => {
                    self.stored.fetch_add(count, Ordering::Relaxed);
                    batch.into_iter().for_each(Left::leave);
                }
                _ => {
                    self.lost.fetch_add(count, Ordering::Relaxed);
                }
            }
        }
    }

    /// The same for a socket that was opened here; whether it is stored.
    pub fn leave_listener(&self, listener: impl AsFd) -> bool {
        self.ledger.leave(vec![(now(), Content::Listener(listener))]).is_ok()
    }

    /// Connections that the next process will find, and those that it will not.
    pub fn left_behind(&self) -> [usize; 2] {
        [self.stored.load(Ordering::Relaxed), self.lost.load(Ordering::Relaxed)]
    }
}

async fn new_queue(notifier: &Notifier) -> Result<Queue, String> {
    let queue = Queue::new().map_err(|error| in_words(&error))?;
    store::keep(&queue, notifier).await?;
    Ok(queue)
}

/// What can't come from a socket unit, beside the sockets that do: somebody else's descriptors in the
/// store. A connection is the only one, or is somebody else's as well.
async fn remove_strangers(inherited: &mut Vec<Inherited>, notifier: &Notifier) {
    let is_listener = |it: &Inherited| {
        sockopt::socket_type(&it.fd).is_ok_and(|it| it == SocketType::STREAM)
            && sockopt::socket_acceptconn(&it.fd).unwrap_or(false)
    };
    if !inherited.iter().any(is_listener) {
        return;
    }
    let strangers: Vec<_> = inherited.extract_if(.., |it| !is_listener(it)).collect();
    if strangers.is_empty() {
        return;
    }
    let names: Vec<_> = strangers.iter().map(|it| &*it.name).collect();
    tracing::warn!("Got what is no listening socket passed in, closing it: {}.", names.join(", "));
    for stranger in &strangers {
        store::remove(&stranger.name, notifier).await;
    }
}

/// What the messages of a queue say.
#[derive(Debug, Default)]
pub struct SortedOut {
    /// The numbers of the parcels in each.
    pub messages: Vec<Vec<u64>>,
    /// The parcels that count, in the order of their numbers.
    pub parcels: Vec<Parcel<OwnedFd>>,
    /// What can't be taken back.
    pub refused: usize,
}

/// Takes each parcel as it was last stored, or not at all; a descriptor belongs to one parcel.
pub fn sort_out(messages: impl Iterator<Item = Message>) -> SortedOut {
    let mut out = SortedOut::default();
    let mut last = BTreeMap::new();
    for message in messages {
        let parcels = match unpack(&message.bytes, message.fds) {
            Ok(parcels) if message.is_whole => parcels,
            _ => {
                out.refused += 1;
                Vec::new()
            }
        };
        out.messages.push(parcels.iter().map(Sealed::id).collect());
        last.extend(parcels.into_iter().map(|parcel| (parcel.id(), parcel)));
    }
    let mut seen = HashSet::new();
    for sealed in last.into_values() {
        match sealed.open() {
            Ok(Parcel { content: Content::Nothing, .. }) => {}
            Ok(parcel) if parcel.identities().iter().all(|it| !seen.contains(it)) => {
                seen.extend(parcel.identities());
                out.parcels.push(parcel);
            }
            _ => out.refused += 1,
        }
    }
    out
}

fn recover(parcels: Vec<Parcel<OwnedFd>>, survival: Survival, ledger: &Arc<Ledger>) -> Recovered {
    let mut recovered = Recovered::default();
    for Parcel { id, start, content } in parcels {
        // Otherwise it stays as it is until all is taken.
        let kept = (survival == Survival::Crash).then(|| ledger.kept(id, start));
        let age = Duration::from_micros(now().saturating_sub(start));
        let start = Instant::now().checked_sub(age).unwrap_or_else(Instant::now);
        match content {
            Content::Nothing => {}
            Content::Listener(fd) => {
                recovered.listeners.push(fd);
                recovered.kept_listeners.extend(kept);
            }
            Content::Client(fd) if is_over(&fd) => {}
            Content::Pair(pair) if has_ended(&pair) => {}
            Content::Client(content) => {
                recovered.clients.push(Recovery { content, start, kept });
            }
            Content::Pair(content) => {
                recovered.pairs.push(Recovery { content, start, kept });
            }
        }
    }
    recovered
}

/// Whether it was ended on both sides, and only was not taken out of the store.
fn has_ended(pair: &StoredPair<OwnedFd>) -> bool {
    let is_empty = |held: &StoredHeld<OwnedFd>| match held {
        StoredHeld::Nothing => true,
        StoredHeld::Copied(_) => false,
        StoredHeld::Piped { read, .. } => rustix::io::ioctl_fionread(read) == Ok(0),
    };
    pair.ends.iter().all(|end| is_over(&end.socket) && queued(&end.socket) == 0)
        && pair.flows.iter().all(|flow| is_empty(&flow.held))
}

fn is_over(fd: &OwnedFd) -> bool {
    let mut fds = [PollFd::new(fd, PollFlags::empty())];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut fds, Some(&now)).is_ok()
        && fds[0].revents().intersects(PollFlags::HUP | PollFlags::ERR)
}

fn begun(age: Duration) -> u64 {
    now().saturating_sub(age.as_micros() as u64)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::os::fd::BorrowedFd;

    use rustix::io::Errno;
    use rustix::net::{AddressFamily, SocketFlags, socketpair};
    use rustix::pipe::pipe;

    use super::*;
    use crate::flow::State;
    use crate::forward::Side;
    use crate::parcel::{Sealed, StoredEnd, StoredFlow, pack};

    /// The same for the same seed.
    struct Dice(u64);

    impl Dice {
        fn below(&mut self, sides: usize) -> usize {
            self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (self.0 >> 33) as usize % sides
        }

        fn says(&mut self) -> bool {
            self.below(2) == 0
        }
    }

    fn socket() -> OwnedFd {
        socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None).unwrap().0
    }

    fn parcel(id: u64, dice: &mut Dice) -> Parcel<OwnedFd> {
        let content = match dice.below(4) {
            0 => Content::Client(socket()),
            _ => Content::Pair(Box::new(pair(dice))),
        };
        Parcel { id, start: dice.below(1000) as u64, content }
    }

    fn pair(dice: &mut Dice) -> StoredPair<OwnedFd> {
        let mut flow = || {
            let states = [State::Ended, State::SourceReset, State::SinkGone { lost: true }];
            let state = if dice.says() { State::Open } else { states[dice.below(3)] };
            let held = match dice.below(3) {
                0 => StoredHeld::Nothing,
                1 if state == State::Open => {
                    let file = tempfile::tempfile().unwrap();
                    file.set_len(1 + dice.below(100) as u64).unwrap();
                    StoredHeld::Copied(file.into())
                }
                _ => {
                    let (read, write) = pipe().unwrap();
                    StoredHeld::Piped { read, write }
                }
            };
            StoredFlow { state, delivered: dice.below(1 << 30) as u64, held }
        };
        let flows = [flow(), flow()];
        let mut end = || StoredEnd { socket: socket(), reset: dice.says(), gone: dice.says() };
        let ends = [end(), end()];
        let side = if dice.says() { Side::Client } else { Side::Backend };
        let fault = dice.says().then_some((side, Errno::CONNRESET));
        StoredPair { ends, flows, preface: dice.below(300) as u16, fault }
    }

    /// All that a parcel says, descriptors as the kernel knows them.
    fn told(parcel: &Parcel<OwnedFd>) -> String {
        let told = match &parcel.content {
            Content::Pair(pair) => {
                let flow = |it: &StoredFlow<OwnedFd>| (it.state, it.delivered);
                let end = |it: &StoredEnd<OwnedFd>| (it.reset, it.gone);
                let flows = pair.flows.each_ref().map(flow);
                format!("{:?}", (flows, pair.ends.each_ref().map(end), pair.preface, pair.fault))
            }
            _ => "client".into(),
        };
        format!("{} {told} {:?}", parcel.start, parcel.identities())
    }

    fn messages(sealed: &[Sealed<BorrowedFd<'_>>], dice: &mut Dice) -> Vec<Message> {
        let mut messages = Vec::new();
        let mut rest = sealed;
        while !rest.is_empty() {
            let (now, later) = rest.split_at(1 + dice.below(rest.len().min(PARCELS_MAX)));
            let (bytes, fds) = pack(now);
            let fds = fds.iter().map(|fd| fd.try_clone_to_owned().unwrap()).collect();
            messages.push(Message { bytes, fds, is_whole: true });
            rest = later;
        }
        messages
    }

    #[test]
    fn what_was_stored_comes_back_as_it_was() {
        let mut dice = Dice(1);
        for _ in 0..50 {
            let parcels: Vec<_> = (0..20).map(|id| parcel(id, &mut dice)).collect();
            let sealed: Vec<_> = parcels.iter().map(Parcel::seal).collect();
            let out = sort_out(messages(&sealed, &mut dice).into_iter());
            assert_eq!(out.refused, 0);
            let back: Vec<_> = out.parcels.iter().map(told).collect();
            assert_eq!(back, parcels.iter().map(told).collect::<Vec<_>>());
        }
    }

    #[test]
    fn the_last_of_a_number_counts_and_nothing_is_nothing() {
        let mut dice = Dice(2);
        let first = parcel(7, &mut dice);
        let last = parcel(7, &mut dice);
        let gone = parcel(8, &mut dice);
        let forgotten = Parcel { id: 8, start: 0, content: Content::<OwnedFd>::Nothing };
        let sealed = [first.seal(), gone.seal(), last.seal(), forgotten.seal()];
        let out = sort_out(messages(&sealed, &mut dice).into_iter());
        assert_eq!((out.refused, out.parcels.len()), (0, 1));
        assert_eq!(told(&out.parcels[0]), told(&last));
    }

    #[test]
    fn whatever_was_done_to_it_a_connection_is_as_it_was_or_refused() {
        let mut dice = Dice(3);
        for _ in 0..1000 {
            let mut parcels: Vec<_> = (0..12).map(|id| parcel(id, &mut dice)).collect();
            // Some were stored twice, as they were before and as they are.
            parcels.extend((0..4).map(|id| parcel(id, &mut dice)));
            let were: BTreeMap<_, _> = parcels.iter().map(|it| (told(it), it.id)).collect();
            let sealed: Vec<_> = parcels.iter().map(Parcel::seal).collect();
            let mut messages = messages(&sealed, &mut dice);
            for _ in 0..dice.below(6) {
                damage(&mut messages, &mut dice);
            }
            let out = sort_out(messages.into_iter());
            let mut seen = HashSet::new();
            for parcel in &out.parcels {
                assert_eq!(were.get(&told(parcel)), Some(&parcel.id), "it is another");
                assert!(parcel.identities().into_iter().all(|it| seen.insert(it)), "it is two");
            }
        }
    }

    /// Changes messages as nothing should: bytes, descriptors, their order, their number.
    fn damage(messages: &mut Vec<Message>, dice: &mut Dice) {
        if messages.is_empty() {
            return;
        }
        let (one, other) = (dice.below(messages.len()), dice.below(messages.len()));
        let copy = |fd: &OwnedFd| fd.try_clone().unwrap();
        match dice.below(9) {
            0 => messages.swap(one, other),
            1 => drop(messages.remove(one)),
            2 => {
                let Message { bytes, fds, is_whole } = &messages[one];
                let fds = fds.iter().map(copy).collect();
                let again = Message { bytes: bytes.clone(), fds, is_whole: *is_whole };
                messages.insert(other, again);
            }
            3 => {
                let bytes = &mut messages[one].bytes;
                let at = dice.below(bytes.len());
                bytes[at] ^= 1 << dice.below(8);
            }
            4 => {
                let bytes = &mut messages[one].bytes;
                bytes.truncate(dice.below(bytes.len()) + 1);
            }
            5 => {
                let fds = &mut messages[one].fds;
                let places = usize::from(!fds.is_empty());
                fds.rotate_left(places);
            }
            6 => drop(messages[one].fds.pop()),
            7 => {
                // Descriptors of two messages change places.
                let taken = std::mem::take(&mut messages[one].fds);
                messages[one].fds = std::mem::replace(&mut messages[other].fds, taken);
            }
            _ => {
                let fd = messages[other].fds.first().map(copy);
                if let Some((place, fd)) = messages[one].fds.last_mut().zip(fd) {
                    *place = fd;
                }
            }
        }
    }
}
