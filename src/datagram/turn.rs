//! The relay's task, turn by turn.

use std::convert::Infallible;
use std::future::pending;
use std::io;
use std::rc::Rc;

use rustix::buffer::spare_capacity;
use rustix::event::{Timespec, epoll};
use tokio::task::yield_now;
use tokio::time::{Instant, sleep, sleep_until};

use crate::datagram::relay::{EVENTS, Relay, Token};
use crate::datagram::session::SessionBackend;
use crate::listen::listener::ACCEPT_PAUSE;
use crate::runtime::catch_panic;

impl Relay {
    /// Carries datagrams, forever. A panic ends at most the turn that caused it.
    ///
    /// # Errors
    /// The epoll set is broken.
    pub async fn run(self: Rc<Self>) -> io::Result<Infallible> {
        loop {
            tokio::select! {
                // Cleared before the set is asked: what comes later makes a new edge.
                ready = self.poller.readable() => ready?.clear_ready(),
                () = self.resumed.notified() => {}
            }
            loop {
                match catch_panic(async { self.turn() }).await {
                    Some(true) => yield_now().await,
                    Some(false) => break,
                    None => {
                        self.recover();
                        sleep(ACCEPT_PAUSE).await;
                    }
                }
            }
        }
    }

    /// Ends sessions without datagrams, forever.
    pub async fn end_idle(self: Rc<Self>) -> Infallible {
        loop {
            let visit = self.state.borrow().table.next_visit();
            let due = async {
                match visit {
                    Some(visit) => sleep_until(visit).await,
                    None => pending().await,
                }
            };
            tokio::select! {
                () = due => {}
                // A session that ends before all others has begun.
                () = self.begun.notified() => continue,
            }
            let (state, now) = (&mut *self.state.borrow_mut(), Instant::now());
            while let Some(id) = state.table.ended(now) {
                match state.table.get(id).map(|session| &session.backend) {
                    // `--backend-wait=` ends it.
                    Some(SessionBackend::Waiting { .. }) => state.table.touch(id, now),
                    _ => self.end(state, id, "it was idle"),
                }
            }
        }
    }

    /// Handles what the sockets have. Returns whether there may be more.
    fn turn(self: &Rc<Self>) -> bool {
        if self.is_paused.get() {
            return false;
        }
        let state = &mut *self.state.borrow_mut();
        state.ready.clear();
        for token in state.unfinished.drain(..) {
            // The turn that has left it may have missed that it has room.
            state.ready.push((token, epoll::EventFlags::IN | epoll::EventFlags::OUT));
        }
        state.events.clear();
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        let asked = epoll::wait(&self.poller, spare_capacity(&mut state.events), Some(&now));
        let is_full = asked.is_ok_and(|events| events == EVENTS);
        for event in &state.events {
            let token = Token::of(event, self.routes.len());
            // A socket has one turn, however many edges it has.
            let is_unfinished = match token {
                Token::Listener(index) => self.routes[index].is_unfinished.get(),
                Token::Session(id) => state.table.get(id).is_some_and(|it| it.is_unfinished),
            };
            let flags =
                if is_unfinished { event.flags & epoll::EventFlags::OUT } else { event.flags };
            if !flags.is_empty() {
                state.ready.push((token, flags));
            }
        }
        // The answers first: clients' datagrams come into the same slots.
        for index in 0..state.ready.len() {
            if let (Token::Session(id), flags) = state.ready[index] {
                self.serve_session(state, id, flags);
            }
        }
        self.send_answers(state);
        for index in 0..state.ready.len() {
            if let (Token::Listener(listener), _) = state.ready[index] {
                self.serve_listener(state, listener);
            }
        }
        is_full || !state.unfinished.is_empty()
    }
}
