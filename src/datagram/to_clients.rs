//! Answers of backends to their clients.

use std::os::fd::AsFd;
use std::rc::Rc;

use rustix::event::epoll::EventFlags;
use rustix::io::Errno;
use tokio::time::Instant;

use crate::counters::DropReason;
use crate::datagram::relay::{Answer, Relay, RelayState, Token};
use crate::datagram::sender::{RunEnd, Sink, send_run};
use crate::datagram::session::SessionBackend;
use crate::datagram::table::SessionId;
use crate::socket::mmsg::{BATCH, Outgoing};

impl Relay {
    /// Receives the answers of a session's backend, and sends what the session holds once its
    /// socket has room.
    pub fn serve_session(
        self: &Rc<Self>,
        state: &mut RelayState,
        id: SessionId,
        flags: EventFlags,
    ) {
        if flags.contains(EventFlags::OUT) {
            self.send_held(state, id);
        }
        if flags == EventFlags::OUT {
            return;
        }
        self.begin_turn(state, Token::Session(id));
        for _ in 0..BATCHES_PER_TURN {
            if state.answers.len() == BATCH {
                self.send_answers(state);
            }
            let RelayState { table, input, answers, .. } = state;
            let Some(session) = table.get_mut(id) else { return };
            let SessionBackend::Open(socket) = &session.backend else { return };
            let (route, first) = (&self.routes[session.listener], answers.len());
            let received = match input.receive(socket, first, !socket.is_unix()) {
                Ok(received) => received,
                Err(Errno::AGAIN) => return,
                // The error of an earlier datagram. Answers may be queued behind it.
                Err(Errno::CONNREFUSED) => {
                    self.set_refused(session);
                    if !self.keeps_refused(route.backend, socket) {
                        return self.lose_backend(state, id);
                    }
                    continue;
                }
                Err(_) => continue,
            };
            for slot in first..first + received {
                let message = input.message(slot);
                route.tally(1).receive(message.count());
                session.datagrams[1] += message.count() as u64;
                let dropped = match message.is_truncated {
                    true => Some(DropReason::Truncated),
                    false => session.is_one_way().then_some(DropReason::Unreachable),
                };
                dropped.iter().for_each(|reason| route.tally(1).drop(*reason, message.count()));
                let id = dropped.is_none().then_some(id);
                answers.push(Answer { id, listener: session.listener });
            }
            if received > 0 {
                self.backends[route.backend].set_answered(&socket.address);
                table.backend_has_sent(id, Instant::now());
            }
            if first + received < BATCH {
                return;
            }
        }
        self.leave_unfinished(state, Token::Session(id));
    }

    /// Has the next datagram of a session look for the backend again. If the session holds some,
    /// they do so at once.
    pub fn lose_backend(self: &Rc<Self>, state: &mut RelayState, id: SessionId) {
        let Some(session) = state.table.get_mut(id) else { return };
        self.unwatch(session);
        session.backend = SessionBackend::Lost;
        session.open = None;
        if state.held[session.listener].has(id) {
            self.look_for_backend(state, id);
        }
    }

    /// Sends the answers in `input` to their clients, those of one listener in one call.
    pub fn send_answers(&self, state: &mut RelayState) {
        let RelayState { table, input, output, answers, .. } = state;
        let session = |slot: usize| table.get(answers[slot].id?);
        let listener = |slot: usize| session(slot).map(|session| session.listener);
        let mut next = 0;
        while next < answers.len() {
            let Some(index) = listener(next) else {
                if answers[next].id.is_some() {
                    // The session has ended in this turn.
                    let route = &self.routes[answers[next].listener];
                    route.tally(1).drop(DropReason::Unreachable, input.message(next).count());
                }
                next += 1;
                continue;
            };
            let rest = (next..answers.len()).take_while(|slot| listener(*slot) == Some(index));
            let (first, count, route) = (next, rest.count(), &self.routes[index]);
            let message = |at: usize| {
                let (message, session) = (input.message(first + at), session(first + at));
                let answer = Outgoing {
                    parts: [message.bytes, &[]],
                    segment: message.segment,
                    tos: message.tos,
                    ..Outgoing::default()
                };
                session.map_or(answer, |session| Outgoing {
                    name: &session.name,
                    source: session.local,
                    is_ipv4: session.is_ipv4,
                    ..answer
                })
            };
            let (tally, mut can_segment) = (route.tally(1), route.can_segment.get());
            let fd = route.listener.as_fd();
            let sink = Sink { fd, can_segment: &mut can_segment, retries: false };
            let end = send_run(output, sink, count, message, tally, &mut 0);
            route.can_segment.set(can_segment);
            next += match end {
                RunEnd::Done => count,
                // The queue of the listener is full, whichever client the others are for.
                RunEnd::Full(at) if !route.listener.is_unix => {
                    let left = (at.message..count).map(|at| message(at).datagrams()).sum::<usize>();
                    tally.drop(DropReason::Full, left - at.datagram);
                    count
                }
                RunEnd::Full(at) | RunEnd::Refused(at) => {
                    let is_full = matches!(end, RunEnd::Full(_));
                    let reason = if is_full { DropReason::Full } else { DropReason::Unreachable };
                    tally.drop(reason, message(at.message).datagrams() - at.datagram);
                    at.message + 1
                }
            };
        }
        answers.clear();
    }
}

/// Batches of one session before those of others.
const BATCHES_PER_TURN: usize = 4;
