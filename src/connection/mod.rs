//! The life of a connection: connect, header, forward, log.

pub mod event_loop;
mod context;
mod log;

use std::future::{pending, poll_fn};
use std::io;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;

use tokio::time::Instant;

use crate::backend::Backend;
use crate::connection::log::LogContext;
use crate::counters::RefusalReason;
use crate::forward::registry::{EndRequest, Registration};
use crate::forward::snapshot::{Snapshot, SnapshotStore};
use crate::forward::{Forwarder, Outcome};
use crate::handover::journal::JournalEntry;
use crate::handover::{Detached, DetachedState};
use crate::limits::slot::Slot;
use crate::listen::accepted::{Accepted, ListenerInfo};
use crate::logging::{message_id, os_message};
use crate::socket::address::Address;
use crate::socket::{Socket, has_unread};

pub use context::{BackendSetup, LoopContext, Settings};

/// A connection that the previous process stored.
#[derive(Debug)]
pub struct Restored {
    pub snapshot: Box<Snapshot<OwnedFd>>,
    pub client: Address,
    /// The listener, or a placeholder if it no longer exists.
    pub listener: Arc<ListenerInfo>,
    /// The backend's address as it was stored, even if TARGET has changed.
    pub backend: Address,
    /// The index of the backend that its listener leads to, if there is one.
    pub known_backend: Option<usize>,
    /// When the connection was accepted.
    pub start: Instant,
    pub slot: Slot,
    /// Its stored form (crash mode).
    pub entry: Option<JournalEntry>,
}

/// Serves a client until the connection is over, and logs the outcome.
///
/// Dropped before that, the future resets both sides.
pub fn serve(
    accepted: Accepted<Socket>,
    backend: usize,
    entry: Option<JournalEntry>,
    context: Rc<LoopContext>,
) -> impl Future<Output = ()> {
    let start = Instant::now();
    let Accepted { socket, client, listener, slot, .. } = accepted;
    if entry.is_some() {
        socket.mark_shared();
    }
    // Registered before the task is polled for the first time, however late that is.
    let registration = context.registry.register(slot.is_passive());
    // An async fn would keep its arguments twice, in each of thousands of connections.
    //
    // At most 664 bytes. With more, tokio's task is a large chunk for malloc(3): 600 instructions a
    // connection.
    async move {
        let setup = &context.backends[backend];
        let counters = context.byte_counters(Some(backend));
        let backend = setup.target();
        let log = LogContext { start, client: &client, listener: &listener, backend };
        // Boxed: the memory that connecting needs is freed before the connection, which may last
        // for days.
        let connecting = Box::pin(connect(&socket, setup, slot.is_passive(), &registration, &log));
        let backend = match connecting.await {
            ConnectOutcome::Connected(backend) => backend,
            ConnectOutcome::Failed(error) => {
                log.listener.counts.failed.inc();
                log.unreachable(&error);
                close_unserved(socket, entry);
                return log.ended_unserved("Connection closed without a backend");
            }
            ConnectOutcome::NotReady => {
                log.listener.counts.refuse(RefusalReason::Passive);
                log.refused_passive();
                close_unserved(socket, entry);
                return log.ended_unserved("Connection closed without a backend");
            }
            ConnectOutcome::NotInUse => {
                forget(entry);
                return log.ended_unserved("Connection reset, it was not in use");
            }
            ConnectOutcome::ClientGone => {
                return log
                    .ended_unserved("Connection ended by the client before it had a backend");
            }
            ConnectOutcome::Detach => {
                let detached = Detached::client(start, socket, slot, entry);
                return context.detached.borrow_mut().extend(detached);
            }
        };
        let _open = setup.backend_wait.count_open();
        log.established();
        let header = context.proxy_protocol.map_or_else(Vec::new, |version| {
            let local = socket.local_address().unwrap_or(Address::Unnamed);
            version.header(&client, &local)
        });
        let shared = Rc::clone(&context.shared);
        let journal = entry.map(|entry| Box::new(entry) as Box<dyn SnapshotStore>);
        // Not in a variable: that would be kept beside the running forwarder.
        let outcome =
            Forwarder::new(socket, backend, header, shared, counters, Some(registration), journal)
                .run(|progress| log.report(progress))
                .await;
        finish(outcome, &log, slot, &context);
    }
}

/// Closes a client that got no backend.
pub fn close_unserved(client: Socket, entry: Option<JournalEntry>) {
    forget(entry);
    client.close();
}

/// Has the next process not restore a client that is about to be closed. It would serve the bytes
/// that the client has sent.
pub fn forget(entry: Option<JournalEntry>) {
    if let Some(entry) = entry {
        Box::new(entry).forget();
    }
}

/// Goes on with a connection that the previous process stored, until it is over.
pub fn resume(restored: Restored, context: Rc<LoopContext>) -> impl Future<Output = ()> {
    let Restored { snapshot, client, listener, backend, known_backend, start, slot, entry } =
        restored;
    let registration = context.registry.register(slot.is_passive());
    async move {
        let known = known_backend.map(|backend| &context.backends[backend].backend_wait);
        let _open = known.and_then(|backend| backend.count_open());
        let log = LogContext { start, client: &client, listener: &listener, backend: &backend };
        let journal = entry.map(|entry| Box::new(entry.own()) as Box<dyn SnapshotStore>);
        let (shared, counters) = (Rc::clone(&context.shared), context.byte_counters(known_backend));
        let restored = Forwarder::restore(*snapshot, shared, counters, Some(registration), journal);
        let forwarder = match restored {
            Ok(forwarder) => forwarder,
            Err(error) => {
                return tracing::error!(
                    client = %log.client,
                    listener = %log.listener,
                    message_id = message_id::HANDOVER_LOST,
                    "Failed to restore a connection, closing it: {}.",
                    os_message(&error)
                );
            }
        };
        let outcome = forwarder.run(|progress| log.report(progress)).await;
        finish(outcome, &log, slot, &context);
    }
}

/// Logs a connection that has closed. Keeps a detached one until it is stored.
fn finish(outcome: io::Result<Outcome>, log: &LogContext<'_>, slot: Slot, context: &LoopContext) {
    match outcome {
        Ok(Outcome::Closed(summary)) => {
            // First: a reader of the log line finds that the connection is no longer counted.
            drop(slot);
            log.closed(&summary, context.registry.idle_time());
        }
        Ok(Outcome::Detached(forwarder)) => {
            if let Err(forwarder) = forwarder.detach_stored() {
                let state = DetachedState::Forwarder(forwarder);
                let detached = Detached { start: log.start, state, _slot: slot };
                context.detached.borrow_mut().push(detached);
            }
        }
        // The event loop is being shut down.
        Err(_) => {}
    }
}

/// The result of connecting to the backend.
enum ConnectOutcome {
    Connected(Socket),
    Failed(String),
    /// The client is passive, and the backend is not ready.
    NotReady,
    /// The client is passive, and the backend stops.
    NotInUse,
    ClientGone,
    Detach,
}

/// Connects to the backend, unless the client leaves first or the connection is asked to detach.
async fn connect(
    client: &Socket,
    backend: &Backend,
    is_passive: bool,
    registration: &Registration,
    log: &LogContext<'_>,
) -> ConnectOutcome {
    let report = || log.report_state("There is no backend yet");
    let waiting = &log.listener.counts.waiting;
    tokio::select! {
        biased;
        request = registration.end_requested(report) => match request {
            EndRequest::Detach => ConnectOutcome::Detach,
            EndRequest::End => ConnectOutcome::NotInUse,
        },
        connected = backend.connect(waiting, log.client, is_passive) => match connected {
            Ok(socket) => ConnectOutcome::Connected(socket),
            Err(Some(error)) => ConnectOutcome::Failed(error),
            Err(None) => ConnectOutcome::NotReady,
        },
        () = wait_until_gone(client) => ConnectOutcome::ClientGone,
    }
}

/// Waits until a client that has no backend yet is gone: a TCP client that reset the connection, or
/// a Unix client that closed.
///
/// A FIN alone says that the client waits for its answer. A Unix client that closed after it sent
/// bytes is not gone: the backend gets them.
async fn wait_until_gone(client: &Socket) {
    let is_gone = poll_fn(|cx| client.poll_hung_up(cx)).await.is_ok();
    if !is_gone || has_unread(client) {
        pending().await
    }
}
