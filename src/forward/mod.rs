//! Bytes, half-closes and resets, both ways between a client and a backend.
//!
//! # Theory of operation
//!
//! A [`Forwarder`] has two *endpoints*, the client's socket and the backend's, and two *flows*, one
//! from each endpoint to the other. All state is in the struct and none in a future, so a
//! connection can be detached at any time without losing a byte. [`Forwarder::run`] alternates
//! between two steps:
//!
//! - **drive**: each flow moves what it can move without waiting, buffered bytes first. It tries a
//!   system call at once and waits only after `EAGAIN`. [`Turns`](turns::Turns) limits the bytes
//!   and the system calls of a turn. Then other connections have theirs.
//! - **wait**: for an edge on each socket that a flow is blocked on, and for the death of a peer
//!   that no flow reads from.
//!
//! ## How bytes move
//!
//! - A flow starts by *copying* through the event loop's buffer: `recv` and `send`. A receive that
//!   comes short leaves the socket empty, so no second receive follows. A request and its answer
//!   take two receives and two sends.
//! - A flow *splices* once it has filled the whole buffer: socket to pipe, pipe to socket, at half
//!   the CPU of copying. Its pipe comes from the event loop's pool and returns when it is empty.
//!   Once it carries only small messages, it goes back to copying. So does a flow that finds no
//!   pipe.
//! - A Unix source is copied: splice(2) closes the descriptors that come with its bytes. In bulk to
//!   TCP its many small buffers also cost more to splice than to copy.
//! - With `--handover=crash` each flow has a *stored* pipe, which systemd keeps as well. All of its
//!   bytes are spliced through that pipe, so none is ever in the memory of the process.
//!
//! Bytes that the sink does not accept are *buffered*: copied bytes in memory allocated for them,
//! spliced bytes in the pipe. A flow with buffered bytes, or whose sink has no room, does not read.
//! So the memory of each flow is bounded, and the kernel's flow control reaches the sender. An idle
//! connection holds only its two descriptors.
//!
//! A flow fills a pipe beyond what the sink accepts as long as few pipes are held for slow sinks,
//! which means fewer and larger system calls. When many are held, a flow takes only what its sink
//! has room for, and copies where that is little. So hundreds of stalled flows do not use up the
//! user's quota of pipe memory. Nor do they use up the kernel's memory for TCP: a flow that has
//! delivered 128 KiB limits what its TCP sink holds unsent (`TCP_NOTSENT_LOWAT`). What a Unix sink
//! holds is doubled then (`SO_SNDBUF`), which halves the wake-ups.
//!
//! ## What it costs in system calls
//!
//! - A small message and its answer: two receives, two sends, and their share of `epoll_wait`.
//! - A connection of one such message: two `accept4` (the second finds no further client),
//!   `socket`, `connect`, four `epoll_ctl`, four receives, two sends, `shutdown`, two `close`. A
//!   TCP backend adds two `setsockopt`, and a `getsockname` if its port is one that connect(2)
//!   picks (has the socket connected to itself?). Each Unix socket adds one `setsockopt`
//!   (SO_OOBINLINE, which it does not inherit).
//! - Bulk from a TCP socket: two `splice` for up to 1 MiB, and one `setsockopt` after the first 128
//!   KiB (to a Unix sink a `getsockopt`, too). With many stalled flows a `poll` and a `getsockopt`
//!   more.
//!
//! `tests/proxy/syscalls.rs` counts them, except those that stalled flows add.
//!
//! ## Descriptors
//!
//! A Unix peer can pass descriptors (`SCM_RIGHTS` in unix(7)). Between two Unix sockets they go on
//! with the first byte of the receive that returned them: never later than their own byte, perhaps
//! with bytes that were sent before it. (In crash mode a flow between Unix sockets peeks, and
//! splices only what comes without descriptors.) Descriptors that the sink does not accept at once
//! are buffered with their bytes, and nothing behind them is read.
//!
//! `limits::passed` has room for the descriptors that are open here. Once half of it may be taken,
//! a flow receives only while its sink accepts bytes, so the descriptors of slow peers do not take
//! the rest. Once no whole message fits, a flow peeks, and leaves a message with descriptors in the
//! kernel. The kernel refuses to send descriptors while too many of the user are in flight. Then
//! the flow tries again, for a second. If descriptors cannot be passed on, the connection ends on
//! both sides. On the way from a Unix socket to any other socket they are closed, by a thread of
//! its own: a close may wait for the client (SO_LINGER). Only what splice(2) closes in crash mode
//! is closed on the event loop.
//!
//! ## How a flow ends
//!
//! | state | means | the sink sees |
//! |---|---|---|
//! | `Open` | bytes may come | |
//! | `Ended` | the source's FIN was passed on after its last byte | FIN |
//! | `SourceReset` | the source was reset; what it sent before was delivered | a reset |
//! | `SinkClosed` | the sink accepts no more; `lost` if bytes of the source stay undelivered | |
//!
//! Each flow ends by itself. After a failed write the other direction drains. After a FIN the other
//! direction lives on until it ends, too. When both flows are over, each socket is closed, or
//! *reset* if the other socket was reset or bytes received from it were not delivered. A reset
//! overtakes bytes in flight, so it waits until the peer's kernel has acknowledged them all: an
//! answer followed by a reset arrives whole. After a reset, a receiver that makes no progress for
//! `LINGER`, or for the idle time if that is shorter, is given up.
//!
//! A socket that no flow reads from (its flow has ended, or waits for a stalled receiver) is
//! watched for EPOLLHUP, so that the death of its peer is noticed. A socket that has sent its FIN
//! also has EPOLLHUP after the peer's FIN. It is checked every `LINGER` instead.
//!
//! An *idle* connection, which delivered nothing for `--connection-idle-time=`, is reset on both
//! sides.
//!
//! Kernel facts this rests on: recv(2) and splice(2) return what was queued before a reset, then
//! `ECONNRESET`. The kernel reports that error once: if a failed `send` took it, `recv` ends as if
//! by a FIN. After a FIN, a reset makes `send` fail with `EPIPE` instead.

mod close;
mod persist;
mod from_unix;
mod flow;
pub mod loop_buffers;
mod passing;
mod endpoint;
pub mod pipe;
mod turns;
pub mod registry;
pub mod idle;
pub mod snapshot;

use std::future::{pending, poll_fn};
use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use rustix::io::Errno;

use crate::counters::ByteCounters;
use crate::forward::endpoint::Endpoint;
use crate::forward::flow::{Fault, Flow, Step};
use crate::forward::loop_buffers::LoopBuffers;
use crate::forward::registry::{EndRequest, Registration};
use crate::forward::snapshot::{Side, SnapshotStore};
use crate::socket::{Family, Socket};

pub use crate::forward::passing::PassingError;

/// Two connected sockets and the bytes between them. The arrays are indexed by [`Side`].
#[derive(Debug)]
pub struct Forwarder {
    endpoints: [Endpoint; 2],
    flows: [Flow; 2],
    shared: Rc<LoopBuffers>,
    counters: Arc<ByteCounters>,
    registration: Option<Registration>,
    /// Bytes of the PROXY header.
    header_len: u16,
    /// The first error of a socket.
    fault: Option<(Side, Errno)>,
    /// Descriptors of this side could not be passed on.
    passing_error: Option<(Side, PassingError)>,
    /// The number of its last bulk turn, of those on its event loop.
    last_turn: u64,
    /// The stored form, kept current (crash mode).
    journal: Option<Box<dyn SnapshotStore>>,
}

/// What became of a connection.
#[derive(Debug)]
pub enum Outcome {
    Closed(Summary),
    /// The connection was asked to detach. It is deregistered, and goes on from here when it is
    /// restored.
    Detached(Box<Forwarder>),
}

/// A connection that is over.
#[derive(Debug)]
pub struct Summary {
    /// Bytes of the client's that were delivered to the backend, the PROXY header excluded.
    pub from_client: u64,
    /// Bytes delivered to the client.
    pub from_backend: u64,
    pub reason: CloseReason,
}

/// Why a connection ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CloseReason {
    /// Both sides closed.
    Closed,
    /// The socket of this side failed.
    Fault(Side, Errno),
    /// The descriptors that this side has passed could not be passed on.
    Passing(Side, PassingError),
    /// `--connection-idle-time=`.
    IdleTimeout,
    /// The connection was not in use (`--passive-from=`) when its backend was frozen or stopped.
    NotInUse,
}

/// What a connection has done so far.
#[derive(Clone, Copy, Debug)]
pub struct Progress {
    /// Bytes of the client's that were delivered to the backend, the PROXY header excluded.
    pub from_client: u64,
    /// Bytes delivered to the client.
    pub from_backend: u64,
    /// The time since anything was sent or received, where a TCP socket tells it.
    pub idle: Option<Duration>,
}

impl Forwarder {
    /// Joins two sockets. `header` goes to the backend ahead of the client's bytes, in one write.
    /// With a `journal` the snapshot in it is kept current.
    pub fn new(
        client: Socket,
        backend: Socket,
        header: Vec<u8>,
        shared: Rc<LoopBuffers>,
        counters: Arc<ByteCounters>,
        registration: Option<Registration>,
        journal: Option<Box<dyn SnapshotStore>>,
    ) -> Self {
        let mut forwarder = Self {
            fault: backend.was_reset().then_some((Side::Backend, Errno::CONNRESET)),
            endpoints: [Endpoint::new(client), Endpoint::new(backend)],
            header_len: header.len() as u16,
            flows: [Flow::with_header(header), Flow::default()],
            shared,
            counters,
            registration,
            passing_error: None,
            last_turn: 0,
            journal: None,
        };
        if let Some(journal) = journal {
            forwarder.set_journal(journal);
        }
        forwarder
    }

    /// Moves bytes until both flows are over, and closes both sockets, or until the connection is
    /// asked to detach. Calls `report` when a report is requested.
    ///
    /// # Errors
    /// Only the event loop's own, while it is being shut down.
    #[expect(clippy::manual_async_fn, reason = "it would keep its argument twice, 248 bytes")]
    pub fn run(mut self, report: impl Fn(Progress)) -> impl Future<Output = io::Result<Outcome>> {
        async move {
            poll_fn(|cx| {
                // An edge may have come while the backend was being connected to.
                let client = &mut self.endpoints[Side::Client as usize];
                client.readable |= client.socket.poll_readable(cx).is_ready();
                if let Some(registration) = &self.registration {
                    registration.set_waker(cx.waker());
                    // Time spent waiting for the backend does not count as idle.
                    registration.activity().touch();
                }
                Poll::Ready(())
            })
            .await;
            while !self.is_over() {
                match self.drive_both() {
                    Turn::Blocked if self.is_over() || self.is_idle() => break,
                    _ if self.is_detach_requested() => return Ok(self.detached()),
                    // Boxed, here and below: what few connections need is not part of every future.
                    Turn::Blocked if self.is_stalled() => {
                        if !Box::pin(self.wait_while_stalled(&report)).await? {
                            break;
                        }
                    }
                    Turn::Blocked => {
                        if !self.wait().await? {
                            self.report_if_requested(&report);
                        }
                    }
                    Turn::Yield => {
                        self.report_if_requested(&report);
                        tokio::task::yield_now().await;
                    }
                }
            }
            // A connection that has ended is not idle, even if it ended late.
            let is_idle = !self.is_over() && self.is_idle();
            if !is_idle && self.has_unfinished_delivery() {
                let request = async {
                    match &self.registration {
                        Some(it) => it.end_requested(|| report(self.progress())).await,
                        None => pending().await,
                    }
                };
                tokio::select! {
                    biased;
                    () = Box::pin(self.finish_delivery()) => {}
                    request = Box::pin(request) => match request {
                        EndRequest::Detach => return Ok(self.detached()),
                        EndRequest::End => {}
                    },
                }
            }
            Ok(Outcome::Closed(self.close(is_idle)))
        }
    }

    /// Deregisters the connection. `Registry::detach_all` wakes only after the task has returned,
    /// so it finds the connection among the detached ones.
    fn detached(mut self) -> Outcome {
        self.registration = None;
        Outcome::Detached(Box::new(self))
    }

    fn report_if_requested(&self, report: &impl Fn(Progress)) {
        if let Some(registration) = &self.registration {
            registration.report_if_requested(|| report(self.progress()));
        }
    }

    fn is_detach_requested(&self) -> bool {
        self.registration.as_ref().is_some_and(Registration::is_detach_requested)
    }

    fn is_idle(&self) -> bool {
        self.registration.as_ref().is_some_and(|it| it.activity().is_idle())
    }

    fn is_over(&self) -> bool {
        !self.flows.iter().any(Flow::is_open)
    }

    fn progress(&self) -> Progress {
        let idle = self.endpoints.iter().filter_map(|end| end.socket.idle()).min();
        Progress { idle, ..self.delivered() }
    }

    fn delivered(&self) -> Progress {
        let [from_client, from_backend] = self.flows.each_ref().map(|flow| flow.delivered);
        let from_client = from_client.saturating_sub(self.header_len.into());
        Progress { from_client, from_backend, idle: None }
    }

    /// Inlined: this runs twice for each message.
    #[inline(always)]
    fn drive_both(&mut self) -> Turn {
        let budget = if self.flows.iter().any(Flow::is_bulky) {
            self.shared.turns.begin_bulk(&mut self.last_turn)
        } else {
            self.shared.turns.begin_message()
        };
        let from_client = self.drive(Side::Client, budget);
        match self.drive(Side::Backend, budget) {
            Turn::Blocked => from_client,
            Turn::Yield => Turn::Yield,
        }
    }

    /// Moves what the flow from `side` can move, in a turn of `budget` bytes.
    fn drive(&mut self, side: Side, mut budget: usize) -> Turn {
        let before = self.flows[side as usize].delivered;
        let mut turn = Turn::Blocked;
        while self.flows[side as usize].is_open() {
            let [client, backend] = &mut self.endpoints;
            let (source, sink) = match side {
                Side::Client => (client, backend),
                Side::Backend => (backend, client),
            };
            match self.flows[side as usize].drive(source, sink, &mut budget, &self.shared) {
                Ok(Step::Moved) => {
                    turn = Turn::Yield;
                    break;
                }
                Ok(Step::Blocked) => break,
                // No byte may be copied while the connection is stored.
                Ok(Step::CantSplice) => self.drop_journal(None),
                Ok(Step::End) => self.end(side),
                Err(Fault::Source(errno)) => self.fail_source(side, errno),
                Err(Fault::Sink(errno)) => self.fail_sink(side, errno),
                Err(Fault::Passing(error)) => self.fail_passing(side, error),
            }
        }
        let delivered = self.flows[side as usize].delivered - before;
        if delivered > 0 {
            self.counters.add(side as usize, delivered);
            if let Some(registration) = &self.registration {
                registration.activity().touch();
            }
        }
        turn
    }

    /// Waits for an edge, for the idle time, or for a request to detach or to report. Returns
    /// `false` for a request.
    async fn wait(&mut self) -> io::Result<bool> {
        poll_fn(|cx| match &self.registration {
            Some(registration) if registration.has_request() => Poll::Ready(Ok(false)),
            _ => self.poll_edges(cx).map_ok(|()| true),
        })
        .await
    }

    fn poll_edges(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let [client, backend] = &mut self.endpoints;
        let [from_client, from_backend] = &mut self.flows;
        let waits = [from_client.is_waiting(), from_backend.is_waiting()];
        let client_edge = poll_edge(client, from_client, from_backend, waits, cx)?;
        let waits = [waits[1], waits[0]];
        let backend_edge = poll_edge(backend, from_backend, from_client, waits, cx)?;
        if let Some(registration) = &self.registration {
            let activity = registration.activity();
            activity.report_unacked(|| self.unacked_bytes());
            if activity.is_idle() {
                return Poll::Ready(Ok(()));
            }
        }
        if client_edge || backend_edge { Poll::Ready(Ok(())) } else { Poll::Pending }
    }
}

/// Polls a socket for what the flow `from` it and the flow `to` it need. Returns whether there was
/// an edge.
///
/// Inlined: this runs four times for each message.
#[inline(always)]
fn poll_edge(
    end: &mut Endpoint,
    from: &Flow,
    to: &mut Flow,
    [from_waits, to_waits]: [bool; 2],
    cx: &mut Context<'_>,
) -> io::Result<bool> {
    let reads = from.is_open() && !from_waits;
    let mut edge = false;
    if reads && end.socket.poll_readable(cx)?.is_ready() {
        end.readable = true;
        edge = true;
    }
    if to_waits {
        // While the flow waits for the clock, no edge helps, and the end of a peer would be one
        // again and again.
        if to.retry_at().is_none() && end.socket.poll_writable(cx)?.is_ready() {
            end.writable = true;
            edge = true;
        }
    } else if !reads && to.is_open() && end.socket.poll_hung_up(cx)?.is_ready() {
        // A Unix peer that has read all it was sent just closes. Otherwise the kernel has an error.
        end.gone |= end.socket.family() != Family::Unix || end.socket.has_failed();
        to.close_sink(end.gone);
        edge = true;
    }
    Ok(edge)
}

/// The result of a turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Turn {
    /// Nothing can be done before the next edge.
    Blocked,
    /// More can be done than one turn may do.
    Yield,
}
