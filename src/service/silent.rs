//! `--wake-on=data`: clients that have not sent a byte yet.
//!
//! A silent client has no backend and is not in use. It waits on the main thread's event loop, and
//! goes on to be served with its first byte, which stays unread. At the connection limit, and when
//! file descriptors are short, the oldest silent client gives way. So silent scanners lock nothing
//! out.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::future::poll_fn;
use std::task::Poll;

use tokio::task::AbortHandle;
use tokio::time::Instant;

use crate::config::timespan::TimeSpan;
use crate::connection::close_unserved;
use crate::handover::journal::JournalEntry;
use crate::handover::{Detached, Handover};
use crate::listen::accepted::Accepted;
use crate::socket::{FirstByte, Socket, first_byte};

/// A client, its backend, and its stored form.
pub struct Silent {
    pub accepted: Accepted<Socket>,
    pub backend: usize,
    pub entry: Option<JournalEntry>,
    start: Instant,
    /// The task that waits for its first byte.
    task: Option<AbortHandle>,
}

/// The silent clients, oldest first.
#[derive(Default)]
pub struct SilentClients {
    clients: RefCell<BTreeMap<u64, Silent>>,
    next: Cell<u64>,
}

impl SilentClients {
    /// Takes a client. Returns its number.
    pub fn hold(
        &self,
        accepted: Accepted<Socket>,
        backend: usize,
        entry: Option<JournalEntry>,
    ) -> u64 {
        if entry.is_some() {
            accepted.socket.mark_shared();
        }
        let number = self.next.get();
        self.next.set(number + 1);
        let silent = Silent { accepted, backend, entry, start: Instant::now(), task: None };
        self.clients.borrow_mut().insert(number, silent);
        number
    }

    /// Names the task that runs [`SilentClients::wait`] for a client.
    pub fn set_task(&self, number: u64, task: AbortHandle) {
        if let Some(silent) = self.clients.borrow_mut().get_mut(&number) {
            silent.task = Some(task);
        }
    }

    /// Waits for the first byte of a client. Returns `None` if the client is gone without one.
    pub async fn wait(&self, number: u64) -> Option<Silent> {
        let first = poll_fn(|cx| match self.clients.borrow().get(&number) {
            Some(silent) => silent.accepted.socket.poll_first_byte(cx),
            None => Poll::Ready(FirstByte::Never),
        });
        let first = first.await;
        let silent = self.clients.borrow_mut().remove(&number)?;
        match first {
            FirstByte::There => Some(silent),
            FirstByte::Missing | FirstByte::Never => {
                silent.close();
                None
            }
        }
    }

    /// Takes the oldest client.
    pub fn take_oldest(&self) -> Option<Silent> {
        let (_, silent) = self.clients.borrow_mut().pop_first()?;
        silent.task.iter().for_each(AbortHandle::abort);
        Some(silent)
    }

    /// Takes all clients.
    pub fn take_all(&self) -> impl Iterator<Item = Silent> {
        std::iter::from_fn(|| self.take_oldest())
    }

    /// Whether a client has sent a byte that its task has not seen yet.
    pub fn any_has_sent(&self) -> bool {
        self.clients.borrow().values().any(Silent::has_sent)
    }

    /// Answers SIGUSR1.
    pub fn report(&self) {
        for silent in self.clients.borrow().values() {
            let (age, accepted) = (TimeSpan::rounded(silent.start.elapsed()), &silent.accepted);
            tracing::info!(
                client = %accepted.client,
                listener = %accepted.listener,
                "Connection of {age} at {}: The client has not sent a byte.",
                accepted.listener
            );
        }
    }

    /// Stores all clients for the next process.
    pub fn detach_all(&self, handover: &Handover) {
        let detached = self.take_all().filter_map(|silent| {
            let Silent { accepted: Accepted { socket, slot, .. }, entry, start, .. } = silent;
            Detached::client(start, socket, slot, entry)
        });
        handover.store(detached.collect());
    }
}

impl Silent {
    pub fn has_sent(&self) -> bool {
        first_byte(&self.accepted.socket) == FirstByte::There
    }

    /// Closes the client, which gives way or has ended.
    pub fn close(self) {
        close_unserved(self.accepted.socket, self.entry);
    }
}
