//! Datagrams from clients to their backends.

use std::rc::Rc;
use std::time::Duration;

use rustix::event::epoll;
use rustix::io::Errno;
use tokio::time::Instant;

use crate::config::target::Target;
use crate::counters::DropReason;
use crate::datagram::held::HeldDatagram;
use crate::datagram::relay::{Relay, RelayState, Token};
use crate::datagram::sender::{Position, RunEnd, Sink, send_run};
use crate::datagram::session::{BackendSocket, Session, SessionBackend};
use crate::datagram::table::SessionId;
use crate::logging::{RateLimit, message_id, os_message, rate_limited};
use crate::socket::mmsg::{BATCH, Outgoing};

impl Relay {
    /// Receives from a listener, and sends to the backends of the sessions.
    pub fn serve_listener(self: &Rc<Self>, state: &mut RelayState, index: usize) {
        let listener = &self.routes[index].listener;
        self.begin_turn(state, Token::Listener(index));
        for _ in 0..BATCHES_PER_TURN {
            let received = match state.input.receive(listener, 0, !listener.is_unix) {
                Ok(received) => received,
                Err(Errno::AGAIN) => return,
                Err(errno) => {
                    // An error of a datagram that was sent, or a lack of memory.
                    let error = os_message(&errno.into());
                    rate_limited!(RECEIVE, warn, listener, "Failed to receive: {error}.");
                    return self.leave_unfinished(state, Token::Listener(index));
                }
            };
            let now = Instant::now();
            let mut slots = [(SessionId::from_u64(0), 0); BATCH];
            let mut count = 0;
            for slot in 0..received {
                if let Some(id) = self.find_session(state, index, slot, now) {
                    slots[count] = (id, slot);
                    count += 1;
                }
            }
            // By session. The datagrams of one stay in order, since their slots are.
            let slots = &mut slots[..count];
            slots.sort_unstable();
            for run in slots.chunk_by(|one, other| one.0 == other.0) {
                self.send_to_backend(state, index, run);
            }
            if received < BATCH {
                return;
            }
        }
        self.leave_unfinished(state, Token::Listener(index));
    }

    /// Sends datagrams of one session to its backend, or holds them.
    fn send_to_backend(
        self: &Rc<Self>,
        state: &mut RelayState,
        listener: usize,
        run: &[(SessionId, usize)],
    ) {
        let (route, id) = (&self.routes[listener], run[0].0);
        let RelayState { table, held, input, output, .. } = state;
        let (held, tally) = (&mut held[listener], route.tally(0));
        let Some(session) = table.get_mut(id) else {
            // It gave way to another client of this batch.
            let datagrams = run.iter().map(|(_, slot)| input.message(*slot).count()).sum();
            return tally.drop(DropReason::Limit, datagrams);
        };
        let end = match &mut session.backend {
            SessionBackend::Open(socket) if !socket.waits_for_room => {
                let (header, is_ipv4) = (&session.header, socket.is_ipv4());
                let message = |index: usize| {
                    let message = input.message(run[index].1);
                    let (bytes, segment, tos) = (message.bytes, message.segment, message.tos);
                    Outgoing { segment, ..with_header(header, bytes, tos, is_ipv4) }
                };
                let sink = self.sink(route.backend, socket);
                send_run(output, sink, run.len(), message, tally, &mut session.datagrams[0])
            }
            _ => RunEnd::Full(Position::default()),
        };
        let (RunEnd::Full(from) | RunEnd::Refused(from)) = end else { return };
        let mut skip = from.datagram;
        for (_, slot) in &run[from.message..] {
            let message = input.message(*slot);
            for bytes in message.segments().skip(skip) {
                let datagram = HeldDatagram { bytes: bytes.into(), tos: message.tos };
                tally.drop(DropReason::Held, held.push(id, datagram));
            }
            skip = 0;
        }
        self.go_on(state, id, end);
    }

    /// Sends what a session has held, oldest first.
    pub fn send_held(self: &Rc<Self>, state: &mut RelayState, id: SessionId) {
        let RelayState { table, held, output, .. } = state;
        let Some(session) = table.get_mut(id) else { return };
        let (route, held) = (&self.routes[session.listener], &mut held[session.listener]);
        let SessionBackend::Open(socket) = &mut session.backend else { return };
        while let Some((_, datagram)) = held.first(id) {
            let (header, is_ipv4) = (&session.header, socket.is_ipv4());
            let message = |_| outgoing(header, datagram, is_ipv4);
            let sink = self.sink(route.backend, socket);
            let delivered = &mut session.datagrams[0];
            match send_run(output, sink, 1, message, route.tally(0), delivered) {
                RunEnd::Done => drop(held.pop(id)),
                end => return self.go_on(state, id, end),
            }
        }
        if socket.waits_for_room {
            socket.waits_for_room = false;
            self.watch(id, socket);
        }
        self.end_wait(state, id);
    }

    /// Decides what becomes of a session that holds datagrams.
    fn go_on(self: &Rc<Self>, state: &mut RelayState, id: SessionId, end: RunEnd) {
        let Some(session) = state.table.get_mut(id) else { return };
        match (&mut session.backend, end) {
            (SessionBackend::Open(socket), RunEnd::Full(_)) => {
                if !std::mem::replace(&mut socket.waits_for_room, true) {
                    self.watch(id, socket);
                }
                if session.slot.in_use.is_none() {
                    // Until the backend has what the session holds.
                    session.slot.in_use = self.limits.begin_use(&session.client());
                }
            }
            (SessionBackend::Open(_), _) => {
                self.set_refused(session);
                self.lose_backend(state, id);
            }
            (SessionBackend::Lost, _) => self.look_for_backend(state, id),
            (SessionBackend::Waiting { .. }, _) => {}
        }
    }

    /// Notes that the backend of a session has refused a datagram.
    pub fn set_refused(&self, session: &Session) {
        let route = &self.routes[session.listener];
        let backend = &self.backends[route.backend];
        backend.set_down();
        if backend.wait.is_zero() {
            rate_limited!(
                UNREACHABLE,
                warn,
                client = session.client(),
                listener = route.listener,
                backend = backend.connector.target,
                message_id = message_id::BACKEND_UNREACHABLE,
                "Failed to send to remote host: {backend}: Connection refused."
            );
        }
    }

    /// Whether a session keeps its socket when a datagram is refused: it has no other address, and
    /// does not wait for the backend. A Unix backend that was restarted is another socket.
    pub fn keeps_refused(&self, backend: usize, socket: &BackendSocket) -> bool {
        let backend = &self.backends[backend];
        // A restored session may have the address of another command line.
        let is_target =
            matches!(&backend.connector.target, Target::Address(it) if *it == socket.address);
        is_target && backend.wait.is_zero() && !socket.is_unix()
    }

    fn sink<'a>(&self, backend: usize, socket: &'a mut BackendSocket) -> Sink<'a> {
        let retries = self.keeps_refused(backend, socket);
        socket.sink(retries)
    }

    /// Has the epoll set wait for what a session needs.
    pub fn watch(&self, id: SessionId, socket: &BackendSocket) {
        // Cannot fail: the socket is in the set.
        let _ = epoll::modify(&self.poller, socket, Token::Session(id).data(), socket.interest());
    }
}

/// Returns the message of a held datagram to the backend.
pub fn outgoing<'a>(header: &'a [u8], datagram: &'a HeldDatagram, is_ipv4: bool) -> Outgoing<'a> {
    with_header(header, &datagram.bytes, datagram.tos, is_ipv4)
}

fn with_header<'a>(header: &'a [u8], bytes: &'a [u8], tos: u8, is_ipv4: bool) -> Outgoing<'a> {
    let parts = if header.is_empty() { [bytes, &[]] } else { [header, bytes] };
    Outgoing { parts, tos, is_ipv4, ..Outgoing::default() }
}

/// Batches that one listener gets before other tasks have their turn.
const BATCHES_PER_TURN: usize = 4;

static RECEIVE: RateLimit = RateLimit::new(1, Duration::from_secs(60));
static UNREACHABLE: RateLimit = RateLimit::new(10, Duration::from_secs(10));
