//! The relay's state: its listeners and their sessions, and how sessions end.

use std::cell::{Cell, RefCell};
use std::convert::Infallible;
use std::future::pending;
use std::io;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use rustix::event::{PollFlags, epoll};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::Notify;

use crate::backend::state::BackendState;
use crate::config::timespan::TimeSpan;
use crate::connection::Settings;
use crate::counters::{DropReason, Gauge};
use crate::datagram::backend::DatagramBackend;
use crate::datagram::held::HeldDatagrams;
use crate::datagram::sender::Tally;
use crate::datagram::session::{Session, SessionBackend};
use crate::datagram::table::{Life, SessionId, SessionTable};
use crate::forward::snapshot::SnapshotStore;
use crate::handover::Handover;
use crate::limits::client_limits::ClientLimits;
use crate::limits::descriptors::FdBudget;
use crate::listen::datagram::DatagramListener;
use crate::socket::mmsg::{BATCH, ReceiveBuffer, SendBuffer, UDP_MAX, UNIX_MAX};
use crate::socket::polls;
use crate::socket::proxy_protocol::ProxyProtocol;
use crate::socket::sys::register;

/// The sessions of all datagram listeners.
pub struct Relay {
    /// The epoll(7) set of the listeners and of the sessions' sockets.
    pub poller: AsyncFd<OwnedFd>,
    pub routes: Vec<Route>,
    pub backends: Vec<DatagramBackend>,
    pub limits: ClientLimits,
    pub descriptors: Rc<FdBudget>,
    /// Counts the sessions as connections of the main thread's event loop.
    pub load: Gauge,
    /// Where confirmed sessions are stored, with `--handover=crash`.
    pub handover: Option<Arc<Handover>>,
    pub sends_header: bool,
    /// Whether datagrams of clients without a session are dropped, because the proxy stops.
    pub is_draining: Cell<bool>,
    pub state: RefCell<RelayState>,
    /// A session has begun that ends before all others.
    pub begun: Notify,
    /// Whether no socket is served, before an idle exit.
    pub is_paused: Cell<bool>,
    pub resumed: Notify,
}

/// A listener, and the index of its backend.
pub struct Route {
    pub listener: DatagramListener,
    pub backend: usize,
    pub can_segment: Cell<bool>,
    /// Whether the listener is among the unfinished sockets.
    pub is_unfinished: Cell<bool>,
}

/// What changes with each datagram.
pub struct RelayState {
    pub table: SessionTable<Session>,
    /// The datagrams of each listener that wait for their backend, or for room in its queue.
    pub held: Vec<HeldDatagrams>,
    pub input: ReceiveBuffer,
    pub output: SendBuffer,
    /// The answers in the first slots of `input`.
    pub answers: Vec<Answer>,
    pub events: Vec<epoll::Event>,
    /// The sockets of this turn, and those of which the turn before has left datagrams behind.
    pub ready: Vec<(Token, epoll::EventFlags)>,
    pub unfinished: Vec<Token>,
}

/// An answer that was received and not sent yet.
#[derive(Clone, Copy, Debug)]
pub struct Answer {
    /// Its session, or `None` if it is dropped.
    pub id: Option<SessionId>,
    pub listener: usize,
}

/// What the epoll set calls a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Token {
    /// The index of a listener.
    Listener(usize),
    Session(SessionId),
}

impl Token {
    /// Returns the number for epoll(7). No session has a number so high: there are less than 2^32.
    pub fn data(self) -> epoll::EventData {
        epoll::EventData::new_u64(match self {
            Self::Listener(index) => u64::from(u32::MAX) - index as u64,
            Self::Session(id) => id.to_u64(),
        })
    }

    pub fn of(event: &epoll::Event, listeners: usize) -> Self {
        let number = event.data.u64();
        match u64::from(u32::MAX).checked_sub(number) {
            Some(index) if index < listeners as u64 => Self::Listener(index as usize),
            _ => Self::Session(SessionId::from_u64(number)),
        }
    }
}

impl Route {
    /// Returns the counters of a direction: 0 from clients, 1 from the backend.
    pub fn tally(&self, direction: usize) -> Tally<'_> {
        Tally { counters: &self.listener.info.counts.datagrams, direction }
    }
}

impl Relay {
    /// Creates the relay of these listeners, each with the index of its backend.
    ///
    /// # Errors
    /// Those of epoll_create1(2) and epoll_ctl(2).
    pub fn new(
        listeners: Vec<(DatagramListener, usize)>,
        settings: &Settings,
        idle_time: Duration,
        limits: ClientLimits,
        descriptors: Rc<FdBudget>,
        load: Gauge,
        handover: Option<Arc<Handover>>,
    ) -> io::Result<Rc<Self>> {
        let poller = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        for (index, (listener, _)) in listeners.iter().enumerate() {
            let flags = epoll::EventFlags::IN | epoll::EventFlags::ET;
            epoll::add(&poller, listener, Token::Listener(index).data(), flags)?;
        }
        let backends = settings.backends.iter().map(|it| DatagramBackend::new(it, settings));
        let backends: Vec<_> = backends.collect();
        let has_unix = listeners.iter().any(|(listener, backend)| {
            listener.is_unix || backends[*backend].connector.is_instant()
        });
        let held = listeners.iter().map(|_| HeldDatagrams::default()).collect();
        let route = |(listener, backend): (DatagramListener, usize)| {
            let can_segment = Cell::new(!listener.is_unix);
            Route { listener, backend, can_segment, is_unfinished: Cell::new(false) }
        };
        Ok(Rc::new(Self {
            poller: register(poller, Interest::READABLE)?,
            routes: listeners.into_iter().map(route).collect(),
            backends,
            limits,
            descriptors,
            load,
            handover,
            sends_header: settings.proxy_protocol == Some(ProxyProtocol::V2),
            is_draining: Cell::new(false),
            state: RefCell::new(RelayState {
                table: SessionTable::new(idle_time),
                held,
                input: ReceiveBuffer::new(if has_unix { UNIX_MAX } else { UDP_MAX }),
                output: SendBuffer::new(),
                answers: Vec::with_capacity(BATCH),
                events: Vec::with_capacity(EVENTS),
                ready: Vec::with_capacity(EVENTS),
                unfinished: Vec::new(),
            }),
            begun: Notify::new(),
            is_paused: Cell::new(false),
            resumed: Notify::new(),
        }))
    }

    /// Returns the bytes delivered both ways.
    pub fn delivered(&self) -> u64 {
        let bytes = self.routes.iter().flat_map(|it| &it.listener.info.counts.datagrams.bytes);
        bytes.map(|bytes| bytes.get()).sum()
    }

    /// Ends the oldest session that is not confirmed. Returns whether there was one.
    pub fn make_room(&self) -> bool {
        self.evict(&mut self.state.borrow_mut())
    }

    /// Ends the sessions that are not in use.
    pub fn end_unused(&self) {
        let state = &mut *self.state.borrow_mut();
        let unused = state.table.iter().filter(|(_, session)| session.slot.in_use.is_none());
        for id in unused.map(|(id, _)| id).collect::<Vec<_>>() {
            self.end(state, id, "it was not in use");
        }
    }

    /// Whether a listener has datagrams that were not received.
    pub fn has_queued(&self) -> bool {
        self.routes.iter().any(|route| polls(&route.listener, PollFlags::IN))
    }

    /// Stops to receive, or goes on. What comes meanwhile stays in the kernel.
    pub fn pause(&self, is_paused: bool) {
        self.is_paused.set(is_paused);
        self.resumed.notify_one();
    }

    /// From now on drops datagrams of clients without a session.
    pub fn begin_drain(&self) {
        self.is_draining.set(true);
    }

    /// Whenever the backend that the proxy starts is no longer ready, has all sessions look for it
    /// again with their next datagram. Never returns.
    pub async fn follow_backend(self: Rc<Self>) -> Infallible {
        let lifecycle = self.backends.iter().find_map(|backend| backend.lifecycle.clone());
        let Some(lifecycle) = lifecycle else { return pending().await };
        let mut state = lifecycle.watch();
        loop {
            // The lifecycle lives as long as the relay.
            let _ = state.changed().await;
            if *state.borrow_and_update() == BackendState::Ready {
                continue;
            }
            self.backends.iter().for_each(|backend| drop(backend.up_at.take()));
            // A backend that is not a child may run all the same. It refuses datagrams if not.
            if lifecycle.is_child {
                self.lose_backends();
            }
        }
    }

    fn lose_backends(self: &Rc<Self>) {
        let state = &mut *self.state.borrow_mut();
        let open = state
            .table
            .iter()
            .filter(|(_, session)| matches!(session.backend, SessionBackend::Open(_)));
        for id in open.map(|(id, _)| id).collect::<Vec<_>>() {
            self.lose_backend(state, id);
        }
    }

    /// Logs a line for each session.
    pub fn report(&self) {
        let state = &*self.state.borrow();
        for (id, session) in state.table.iter() {
            let Some(life) = state.table.life(id) else { continue };
            let (route, [there, back]) = (&self.routes[session.listener], session.datagrams);
            let [age, idle] = [life.begin, life.last].map(|it| TimeSpan::rounded(it.elapsed()));
            let progress = match session.backend {
                SessionBackend::Waiting { .. } => "There is no backend yet".into(),
                SessionBackend::Lost => "The backend refuses datagrams".into(),
                SessionBackend::Open(_) => {
                    format!("{there} datagrams to the backend, {back} back, idle for {idle}")
                }
            };
            tracing::info!(
                client = %session.client(),
                listener = %route.listener,
                backend = %self.backends[route.backend].connector.target,
                "Session of {age} at {}: {progress}.",
                route.listener
            );
        }
    }

    /// Ends the oldest session that is not confirmed. Returns whether there was one.
    pub fn evict(&self, state: &mut RelayState) -> bool {
        let Some(id) = state.table.oldest_unconfirmed() else { return false };
        if let Some(session) = state.table.get(id) {
            self.routes[session.listener].listener.info.counts.datagrams.evicted.inc();
        }
        self.end(state, id, "it gave way to another client");
        true
    }

    /// Has the next turn go on with a socket, of which this one has left datagrams behind.
    pub fn leave_unfinished(&self, state: &mut RelayState, token: Token) {
        match token {
            Token::Listener(index) => self.routes[index].is_unfinished.set(true),
            Token::Session(id) => match state.table.get_mut(id) {
                Some(session) => session.is_unfinished = true,
                None => return,
            },
        }
        state.unfinished.push(token);
    }

    /// Has all listeners served, after a turn that was not finished.
    pub fn recover(&self) {
        let state = &mut *self.state.borrow_mut();
        state.unfinished.clear();
        state.answers.clear();
        let ids: Vec<_> = state.table.iter().map(|(id, _)| Token::Session(id)).collect();
        let listeners = (0..self.routes.len()).map(Token::Listener);
        listeners.chain(ids).for_each(|token| self.leave_unfinished(state, token));
    }

    /// Notes that a socket has its turn.
    pub fn begin_turn(&self, state: &mut RelayState, token: Token) {
        match token {
            Token::Listener(index) => self.routes[index].is_unfinished.set(false),
            Token::Session(id) => {
                state.table.get_mut(id).into_iter().for_each(|it| it.is_unfinished = false);
            }
        }
    }

    /// Ends a session, and drops what it holds.
    pub fn end(&self, state: &mut RelayState, id: SessionId, why: &str) {
        let Some((mut session, life)) = self.remove(state, id) else { return };
        self.unwatch(&session);
        if let Some(entry) = session.entry.take() {
            // Otherwise the next process could restore it, until the record is cleaned away.
            Box::new(entry).forget();
        }
        let route = &self.routes[session.listener];
        let [there, back] = session.datagrams;
        let time = TimeSpan::rounded(life.begin.elapsed());
        tracing::debug!(
            client = %session.client(),
            listener = %route.listener,
            "Session ended after {time}, {there} datagrams to the backend, {back} back: {why}."
        );
    }

    /// Takes the socket of a session out of the epoll set. Closing it does not do that while a
    /// record in the store holds it open.
    pub fn unwatch(&self, session: &Session) {
        if let SessionBackend::Open(socket) = &session.backend {
            if session.entry.is_some() {
                let _ = epoll::delete(&self.poller, socket);
            }
        }
    }

    /// Takes a session out of the table, and drops what it holds.
    pub fn remove(&self, state: &mut RelayState, id: SessionId) -> Option<(Session, Life)> {
        let life = state.table.life(id)?;
        let session = state.table.remove(id)?;
        let dropped = state.held[session.listener].clear(id);
        self.routes[session.listener].tally(0).drop(DropReason::Unreachable, dropped);
        Some((session, life))
    }
}

/// Events of one turn.
pub const EVENTS: usize = 64;
