//! Attempts to connect that overlap, for a backend that cannot be reached yet.
//!
//! An attempt may take as long as `--connect-timeout=` lets it, for one dead address of a name,
//! while another address is up again. So the next attempt starts beside an attempt that takes
//! longer than [`ATTEMPT_INTERVAL`], and the oldest of [`ATTEMPTS_MAX`] ends for it.
//!
//! There is at most one lookup at a time: a resolver that does not answer would keep a thread and a
//! place among the lookups for each. And an attempt beside another one needs a place among those of
//! all targets, since its descriptor is not the client's.

use std::cell::Cell;
use std::collections::VecDeque;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::OwnedSemaphorePermit;
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{Instant, sleep_until};

use crate::backend::connect::{Connector, OnFullBacklog};
use crate::backend::connect_error::ConnectError;
use crate::socket::Socket;

/// Attempts to connect to one target, oldest first. Dropping this ends them.
pub struct Attempts {
    connector: Connector,
    running: JoinSet<Result<Socket, ConnectError>>,
    handles: VecDeque<AbortHandle>,
    is_resolving: Rc<Cell<bool>>,
    /// When the next attempt starts beside the others.
    due: Instant,
}

impl Attempts {
    pub fn new(connector: Connector) -> Self {
        Self {
            connector,
            running: JoinSet::new(),
            handles: VecDeque::new(),
            is_resolving: Rc::default(),
            due: Instant::now(),
        }
    }

    /// Returns the outcome of the next attempt that ends, or `None` after [`ATTEMPT_INTERVAL`].
    /// Starts an attempt if there is none. A caller that stops waiting may call this again.
    pub async fn next(&mut self) -> Option<Result<Socket, ConnectError>> {
        self.handles.retain(|handle| !handle.is_finished());
        if self.handles.is_empty() {
            self.start(None);
        } else if Instant::now() >= self.due {
            self.due = Instant::now() + ATTEMPT_INTERVAL;
            if !self.is_resolving.get() {
                self.start_beside();
            }
        }
        tokio::select! {
            // An attempt that was ended has no outcome.
            Some(ended) = self.running.join_next() => ended.ok(),
            () = sleep_until(self.due) => None,
        }
    }

    /// Whether an attempt waits for the resolver.
    pub fn is_resolving(&self) -> bool {
        self.is_resolving.get()
    }

    fn start_beside(&mut self) {
        if let Ok(permit) = Arc::clone(&self.connector.overlaps).try_acquire_owned() {
            if self.handles.len() == ATTEMPTS_MAX {
                self.handles.pop_front().inspect(AbortHandle::abort);
            }
            self.start(Some(permit));
        }
    }

    fn start(&mut self, permit: Option<OwnedSemaphorePermit>) {
        let (connector, is_resolving) = (self.connector.clone(), Rc::clone(&self.is_resolving));
        self.due = Instant::now() + ATTEMPT_INTERVAL;
        self.handles.push_back(self.running.spawn_local(async move {
            let _permit = permit;
            let resolving = |now| is_resolving.set(now);
            connector.connect_and_tell(OnFullBacklog::Fail, resolving).await
        }));
    }
}

/// How long an attempt may take before the next one starts beside it.
pub const ATTEMPT_INTERVAL: Duration = Duration::from_millis(500);

const ATTEMPTS_MAX: usize = 3;
