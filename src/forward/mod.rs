//! Both directions of a connection: bytes, half-close, reset.
//!
//! # Theory of operation
//!
//! A [`Forwarder`] is two *endpoints* (the client's socket and the backend's) and two *flows*, one from each
//! end to the other. All state is in the struct and none in a future, so that a pair can be left
//! at any time without losing what it holds. [`Forwarder::run`] alternates between two steps:
//!
//! - **turn**: each flow moves what can be moved without waiting, what it holds first. System calls
//!   are tried at once and only wait after `EAGAIN`. A turn is bounded in bytes and in system calls
//!   ([`Turns`](crate::forward::turns::Turns)): then other connections have theirs;
//! - **wait**: for an edge on any socket that a flow is stuck on, or that would otherwise not be
//!   looked at.
//!
//! ## How bytes move
//!
//! - *Copying*, through one buffer a thread: `recv` and `send`. A receive that comes short leaves
//!   the socket empty, so there is no third call: a request and its answer are two receives and two
//!   sends.
//! - *Splicing*, once a flow filled the whole buffer: socket to pipe, pipe to socket, half the CPU of
//!   copying. The pipe comes from the thread's pool for the turn and goes back when it is empty; a flow
//!   that turns quiet goes back to copying. Bulk from a Unix socket is copied: its many small buffers
//!   cost more to splice, except in messages that fit into the socket. Where no pipe is to be had,
//!   copying carries on.
//!
//! A pipe is filled with more than the sink takes as long as few are buffered for slow sinks: fewer and
//! larger steps. When many are, a flow takes only what its sink has room for, and copies a buffer where
//! that is little, so that hundreds of stalled flows don't use up the user's quota of pipe memory. Nor do
//! they use up the kernel's memory for TCP: a flow that has delivered 128 KiB limits what its TCP sink
//! may hold unsent (`TCP_NOTSENT_LOWAT`).
//!
//! ## What it costs in system calls
//!
//! - A small message and its answer: two receives, two sends, and their share of `epoll_wait`.
//! - A connection of one such message: two `accept4` (the second says that nobody else waits),
//!   `socket`, `connect`, for a TCP backend two `setsockopt` and one `getsockname` (has it connected
//!   to itself?), for each Unix socket one `setsockopt` (SO_OOBINLINE, which is not inherited there),
//!   four `epoll_ctl`, four receives, two sends, `shutdown`, two `close`.
//! - Bulk from a TCP socket: two `splice` for up to 1 MiB, and one `setsockopt` for the first 128 KiB to a TCP sink; with many stalled flows a `poll` and a
//!   `getsockopt` more.
//!
//! `tests/syscalls.rs` counts them, but for what stalled flows add.
//!
//! What the sink did not take is *buffered*: copied bytes in a buffer made for them, spliced bytes in
//! the pipe. A flow that holds bytes, or whose sink has no room, does not read, so that each flow's
//! memory is bounded and the kernel's flow control reaches the sender. An idle connection holds
//! nothing but two descriptors.
//!
//! ## How a flow ends
//!
//! | state | means | the sink sees |
//! |---|---|---|
//! | `Open` | bytes may come | |
//! | `Ended` | the source's FIN was passed on after its last byte | FIN |
//! | `SourceReset` | the source was reset; what it sent before was delivered | a reset |
//! | `SinkClosed` | the sink takes no more; `lost` if bytes of the source stay undelivered | |
//!
//! The flows end one by one: a failed write lets the other direction drain, and a FIN lets it live
//! on until it ends too. When both are over, each end is closed, or *reset* if its counterpart was
//! reset or its own bytes were lost. A reset overtakes bytes in flight, so it waits until the
//! peer's kernel has acknowledged them all: an answer followed by a reset arrives whole. Once an
//! end was reset, a receiver that makes no progress for [`LINGER`] (or the idle time, if that is
//! shorter) is not waited for.
//!
//! An end that no flow reads from (its flow ended, or waits for a stalled reader) is watched
//! for EPOLLHUP, so that a peer that died is noticed although nothing is asked of it; where that
//! could also mean two FINs, it is looked at every [`LINGER`].
//!
//! A connection that is *quiet*, because nothing was delivered and received for as long as `quiet`
//! allows, is reset on both sides, whatever its flows wait for.
//!
//! Kernel facts this rests on: recv(2) and splice(2) give what was queued before a reset, then
//! `ECONNRESET`; that error is given once, so after a failed `send` took it, `recv` ends as if by a
//! FIN; after a FIN, a reset makes `send` fail with `EPIPE` instead.

mod persist;
pub mod flow;
pub mod pipe;
mod turns;
pub mod idle;
pub mod control;
mod registry;
pub mod snapshot;

use std::future::poll_fn;
use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use rustix::io::Errno;
use tokio::time::{Instant, sleep, timeout_at};

use crate::counters::ByteCounters;
use crate::forward::control::ControlHandle;
use crate::forward::flow::{Buffered, Endpoint, Fault, Flow, LoopBuffers, Step};
use crate::forward::idle::IdleGuard;
use crate::forward::snapshot::{FlowState, SIDES, Side, SnapshotStore};
use crate::socket::{Family, Socket};

/// How long a receiver may make no progress after its counterpart was reset.
const LINGER: Duration = Duration::from_secs(60);

/// What a step counts for at least, in bytes: a turn is bounded in system calls, too, whatever a peer
/// sends. Less than the copy buffer, so that bulk is bounded by its bytes alone.
const STEP: usize = 16 * 1024;

/// How a connection was, once it is over.
#[derive(Debug)]
pub struct Summary {
    /// Bytes of the client's that were delivered to the backend; the preface is not among them.
    pub from_client: u64,
    /// Bytes delivered to the client.
    pub from_backend: u64,
    /// How it ended.
    pub end: CloseReason,
}

/// What ended a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CloseReason {
    /// Both sides closed.
    Closed,
    /// This side did otherwise, and what the kernel said of it.
    Fault(Side, Errno),
    /// It carried nothing for too long.
    Quiet,
}

/// Two connected sockets and the bytes between them.
#[derive(Debug)]
pub struct Forwarder {
    pub endpoints: [Endpoint; 2],
    pub flows: [Flow; 2],
    pub shared: Rc<LoopBuffers>,
    pub carried: Arc<ByteCounters>,
    pub idle_guard: Option<IdleGuard>,
    pub preface: u64,
    pub fault: Option<(Side, Errno)>,
    /// The number of its last turn of bulk, of all on this event loop.
    pub last_turn: u64,
    /// The stored form, kept current (crash mode only).
    pub journal: Option<Box<dyn SnapshotStore>>,
}

/// How a connection is.
#[derive(Clone, Copy, Debug)]
pub struct Progress {
    /// Bytes of the client's that were delivered to the backend.
    pub from_client: u64,
    /// Bytes delivered to the client.
    pub from_backend: u64,
    /// For how long nothing was sent or received, where a TCP socket tells.
    pub idle: Option<Duration>,
}

/// What became of a connection.
#[derive(Debug)]
pub enum Outcome {
    /// It is over.
    Closed(Summary),
    /// It was told to leave, and goes on from here.
    Left(Box<Forwarder>),
}

impl Forwarder {
    /// Joins two sockets; `preface` goes to the backend ahead of the client's bytes, in one write.
    /// What is delivered is counted as `carried`. It ends when it is idle, with an `idle_guard`.
    pub fn new(
        client: Socket,
        backend: Socket,
        preface: Vec<u8>,
        shared: Rc<LoopBuffers>,
        carried: Arc<ByteCounters>,
        idle_guard: Option<IdleGuard>,
    ) -> Self {
        let mut flows = [Flow::default(), Flow::default()];
        let preface_len = preface.len() as u64;
        if !preface.is_empty() {
            flows[Side::Client as usize].buffered = Buffered::Copied { bytes: preface, sent: 0 };
        }
        let fault = backend.was_reset().then_some((Side::Backend, Errno::CONNRESET));
        Self {
            endpoints: [Endpoint::new(client), Endpoint::new(backend)],
            flows,
            shared,
            carried,
            idle_guard,
            preface: preface_len,
            fault,
            last_turn: 0,
            journal: None,
        }
    }

    /// Carries bytes until both directions are over, and closes both sockets, or until it is told to
    /// leave; when it is asked how it is, it gives the answer.
    ///
    /// # Errors
    /// Only the event loop's own, when it is being shut down.
    #[expect(clippy::manual_async_fn, reason = "it would keep its argument twice, 248 bytes")]
    pub fn run(
        mut self,
        presence: Option<&ControlHandle>,
        answer: impl Fn(Progress),
    ) -> impl Future<Output = io::Result<Outcome>> {
        async move {
            let is_detach_requested = || presence.is_some_and(ControlHandle::is_to_leave);
            let is_called = || presence.is_some_and(|it| it.is_to_leave() || it.is_asked());
            // An edge of the time of dialling tells of bytes.
            poll_fn(|cx| {
                let client = &mut self.endpoints[Side::Client as usize];
                client.readable = client.socket.poll_readable(cx).is_ready();
                if let Some(idle_guard) = &self.idle_guard {
                    idle_guard.register(cx.waker());
                }
                if let Some(presence) = presence {
                    presence.register(cx.waker());
                }
                Poll::Ready(())
            })
            .await;
            while !self.is_over() {
                if let Some(presence) = presence {
                    presence.answer(|| answer(self.progress()));
                }
                match self.drive_both() {
                    Turn::Blocked if self.is_over() || self.is_idle() => break,
                    _ if is_detach_requested() => return Ok(Outcome::Left(Box::new(self))),
                    Turn::Blocked if self.is_stalled() => {
                        // Boxed, like the end below: what few connections need is no part of all.
                        if !Box::pin(self.wait_for_the_stalled(presence, &answer)).await? {
                            break;
                        }
                    }
                    Turn::Blocked => {
                        self.wait(&is_called).await?;
                    }
                    Turn::Yield => tokio::task::yield_now().await,
                }
            }
            // What has ended by itself is not quiet, even if it was late.
            let is_idle = !self.is_over() && self.is_idle();
            let linger = self.idle_guard.take().map_or(LINGER, |it| it.idle_time().min(LINGER));
            if !is_idle && SIDES.map(|side| self.is_delivering(side)) != [false; 2] {
                let finish = Box::pin(self.finish(linger));
                let detach_requested = async {
                    match presence {
                        Some(presence) => {
                            presence.detach_requested(|| answer(self.progress())).await;
                        }
                        None => std::future::pending().await,
                    }
                };
                tokio::select! {
                    biased;
                    () = finish => {}
                    () = Box::pin(detach_requested) => return Ok(Outcome::Left(Box::new(self))),
                }
            }
            let Progress { from_client, from_backend, .. } = self.delivered();
            let closed = Summary {
                from_client,
                from_backend,
                end: match self.fault {
                    _ if is_idle => CloseReason::Quiet,
                    Some((side, errno)) => CloseReason::Fault(side, errno),
                    None => CloseReason::Closed,
                },
            };
            let resets = SIDES.map(|side| is_idle || self.is_to_be_reset(side));
            for (end, reset) in self.endpoints.into_iter().zip(resets) {
                if reset { end.socket.reset() } else { end.socket.close() }
            }
            Ok(Outcome::Closed(closed))
        }
    }

    fn delivered(&self) -> Progress {
        let [from_client, from_backend] = self.flows.each_ref().map(|flow| flow.delivered);
        let from_client = from_client.saturating_sub(self.preface);
        Progress { from_client, from_backend, idle: None }
    }

    fn progress(&self) -> Progress {
        let idle = self.endpoints.iter().filter_map(|end| end.socket.idle()).min();
        Progress { idle, ..self.delivered() }
    }

    fn is_idle(&self) -> bool {
        self.idle_guard.as_ref().is_some_and(IdleGuard::is_idle)
    }

    fn is_over(&self) -> bool {
        self.flows.iter().all(|flow| flow.state != FlowState::Open)
    }

    fn drive_both(&mut self) -> Turn {
        let size = if self.flows.iter().any(Flow::is_bulky) {
            self.shared.turns.begin_bulk(&mut self.last_turn)
        } else {
            self.shared.turns.begin_message()
        };
        let mut drive_both = Turn::Blocked;
        for side in SIDES {
            if self.drive(side, size) == Turn::Yield {
                drive_both = Turn::Yield;
            }
        }
        drive_both
    }

    /// Moves what the flow from `side` can move, up to a turn of this size.
    fn drive(&mut self, side: Side, mut size: usize) -> Turn {
        let [client, backend] = &mut self.endpoints;
        let (source, sink) = match side {
            Side::Client => (client, backend),
            Side::Backend => (backend, client),
        };
        let [from_client, from_backend] = &mut self.flows;
        let (flow, opposite) = match side {
            Side::Client => (from_client, from_backend),
            Side::Backend => (from_backend, from_client),
        };
        let sink_side = side.other();
        let before = flow.delivered;
        let (mut failed, mut cant_splice) = (false, false);
        let mut drive_both = Turn::Blocked;
        while flow.state == FlowState::Open {
            if size == 0 {
                drive_both = Turn::Yield;
                break;
            }
            let delivered = flow.delivered;
            // What is left of a turn may be too little to be worth two system calls.
            let step = flow.step(source, sink, size.max(STEP), &self.shared);
            size = size.saturating_sub(((flow.delivered - delivered) as usize).max(STEP));
            match step {
                Ok(Step::Moved) => {}
                Ok(Step::Blocked) => break,
                Ok(Step::CantSplice) => {
                    cant_splice = true;
                    break;
                }
                Ok(Step::End) if source.reset => flow.state = FlowState::SourceReset,
                Ok(Step::End) => {
                    flow.state = FlowState::Ended;
                    // When the other flow has ended too, close() sends the FIN.
                    if opposite.state != FlowState::Ended {
                        // Fails only where the sink was reset, which its own flow will see.
                        let _ = sink.socket.shutdown_write();
                    }
                    break;
                }
                Err(Fault::Source(errno)) => {
                    failed = true;
                    self.fault.get_or_insert((side, errno));
                    source.reset = true;
                    source.gone = true;
                    flow.state = FlowState::SourceReset;
                    opposite.close_sink(true);
                    break;
                }
                Err(Fault::Sink(errno)) => {
                    failed = true;
                    self.fault.get_or_insert((sink_side, errno));
                    // EPIPE comes after a FIN, or from a Unix peer that only stopped reading: the
                    // sink's own bytes end as they end. Any other error was taken from the socket
                    // here, and its flow would take the missing rest for a FIN.
                    sink.reset |= errno != Errno::PIPE;
                    sink.gone |= sink.reset || sink.socket.family() != Family::Unix;
                    flow.close_sink(true);
                }
            }
        }
        if flow.delivered > before {
            opposite.unanswered = 0;
            self.carried.add(side as usize, flow.delivered - before);
            if let Some(idle_guard) = &self.idle_guard {
                idle_guard.touch();
            }
        }
        if self.journal.is_some() {
            if cant_splice {
                self.drop_journal(None);
                drive_both = Turn::Yield;
            } else if failed {
                // The error has been taken from the socket, which will not tell it again.
                self.update_journal();
            }
        }
        drive_both
    }

    /// Waits until a turn can do something, or it is called.
    ///
    /// Whether it was an edge.
    async fn wait(&mut self, is_called: impl Fn() -> bool) -> io::Result<bool> {
        poll_fn(|cx| match self.poll_edges(cx) {
            Poll::Pending if is_called() => Poll::Ready(Ok(false)),
            edge => edge.map_ok(|()| true),
        })
        .await
    }

    fn poll_edges(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut edge = false;
        for side in SIDES {
            let end = &mut self.endpoints[side as usize];
            let from = &self.flows[side as usize];
            let reads = from.state == FlowState::Open && !from.waits_for_sink();
            let to = &mut self.flows[side.other() as usize];
            if reads && let Poll::Ready(ready) = end.socket.poll_readable(cx) {
                ready?;
                end.readable = true;
                edge = true;
            }
            if to.waits_for_sink() {
                if let Poll::Ready(ready) = end.socket.poll_writable(cx) {
                    ready?;
                    end.writable = true;
                    edge = true;
                }
            } else if !reads
                && to.state == FlowState::Open
                && let Poll::Ready(ready) = end.socket.poll_hung_up(cx)
            {
                ready?;
                // A Unix peer may just have closed, after it read all it was sent.
                end.gone |= end.socket.family() != Family::Unix;
                to.close_sink(end.gone);
                edge = true;
            }
        }
        if let Some(idle_guard) = &self.idle_guard
            && idle_guard.is_asked()
        {
            idle_guard.report_unacked(self.unacked_bytes());
        }
        if edge || self.is_idle() { Poll::Ready(Ok(())) } else { Poll::Pending }
    }

    /// Whether the only thing that can happen is that a receiver takes what is buffered for it.
    fn is_stalled(&self) -> bool {
        let waits = self.flows.iter().any(Flow::waits_for_sink);
        waits && self.flows.iter().any(|flow| flow.state != FlowState::Open)
    }

    /// Waits; but once the sender is gone, not for a receiver that takes nothing for [`LINGER`].
    ///
    /// Here the sender is not read from, and EPOLLHUP would not tell its reset from two FINs.
    async fn wait_for_the_stalled(
        &mut self,
        presence: Option<&ControlHandle>,
        answer: &impl Fn(Progress),
    ) -> io::Result<bool> {
        let is_called = || presence.is_some_and(|it| it.is_to_leave() || it.is_asked());
        let mut left = self.unacked_bytes();
        let mut deadline = Instant::now() + LINGER;
        loop {
            if let Ok(waited) = timeout_at(deadline, self.wait(is_called)).await {
                let is_edge = waited?;
                match presence {
                    // To be asked is no reason to wait longer.
                    Some(presence) if !is_edge && !presence.is_to_leave() => {
                        presence.answer(|| answer(self.progress()));
                        continue;
                    }
                    _ => return Ok(true),
                }
            }
            let was_gone = self.endpoints.iter().any(|end| end.gone);
            for end in &mut self.endpoints {
                end.gone |= end.socket.has_failed();
            }
            let now = self.unacked_bytes();
            if was_gone && now == left {
                return Ok(false);
            }
            left = now;
            deadline = Instant::now() + LINGER;
        }
    }

    fn unacked_bytes(&self) -> [usize; 2] {
        [0, 1].map(|end| self.endpoints[end].socket.unacked())
    }

    /// Both flows are over: the endpoints get theirs, after `linger` without progress at the latest, and stay
    /// open. It can be left at any time and begun anew.
    async fn finish(&self, linger: Duration) {
        tokio::join!(self.finish_end(Side::Client, linger), self.finish_end(Side::Backend, linger));
    }

    async fn finish_end(&self, side: Side, linger: Duration) {
        let socket = &self.endpoints[side as usize].socket;
        if self.is_delivering(side) {
            delivered(socket, linger).await;
        }
        let (from, to) = (&self.flows[side as usize], &self.flows[side.other() as usize]);
        let peer_has_ended =
            from.state == FlowState::Ended && matches!(to.state, FlowState::SinkClosed { .. });
        // If the other is not waited for either, both are closed at once.
        if !peer_has_ended && self.is_delivering(side.other()) {
            if self.is_to_be_reset(side) { socket.abort() } else { socket.end() }
        }
    }

    /// Whether bytes are on their way to this side that its end would overtake: a reset would, and so
    /// would bytes that come and are not read.
    fn is_delivering(&self, side: Side) -> bool {
        let Endpoint { socket, gone, .. } = &self.endpoints[side as usize];
        let states = SIDES.map(|side| self.flows[side as usize].state);
        // What was sent on a Unix socket stays readable, whatever happens to this side; where both
        // FINs are known, nothing can come that would make the kernel send a reset.
        states != [FlowState::Ended; 2]
            && !gone
            && matches!(states[side.other() as usize], FlowState::Ended | FlowState::SourceReset)
            && socket.family() != Family::Unix
            && socket.unacked() > 0
    }

    /// Given how the flow from there and the flow to there ended.
    fn is_to_be_reset(&self, side: Side) -> bool {
        let (from, to) = (&self.flows[side as usize], &self.flows[side.other() as usize]);
        let bytes_were_lost = from.state == FlowState::SinkClosed { lost: true };
        bytes_were_lost || matches!(to.state, FlowState::SourceReset | FlowState::Open)
    }
}

/// Waits until the peer's kernel has acknowledged everything, or takes no more for `linger`.
///
/// The kernel has no event for it. The first look is nearly always enough.
async fn delivered(socket: &Socket, linger: Duration) {
    let mut left = socket.unacked();
    let mut moved = Instant::now();
    let mut pause = Duration::from_millis(1);
    while left > 0 && !socket.has_failed() && moved.elapsed() < linger {
        sleep(pause).await;
        pause = (pause * 2).min(Duration::from_millis(100));
        let now = socket.unacked();
        if now < left {
            left = now;
            moved = Instant::now();
        }
    }
}

/// What came of a turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Turn {
    /// Nothing can be done before the next edge.
    Blocked,
    /// There was more to do than one turn may.
    Yield,
}
