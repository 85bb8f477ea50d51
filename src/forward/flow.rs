//! One direction of a connection: the bytes it has buffered, and how it moves bytes.
//!
//! The theory of operation is at the top of `forward`.

use std::mem;
use std::ops::ControlFlow;

use rustix::io::Errno;
use tokio::time::Instant;

use crate::counters::GaugeGuard;
use crate::forward::endpoint::Endpoint;
use crate::forward::loop_buffers::LoopBuffers;
use crate::forward::passing::{Passing, PassingError, Pause};
use crate::forward::pipe::Pipe;
use crate::forward::snapshot::{COPY_SIZE, FlowState};
use crate::socket::{Family, Received, Socket};

/// One direction.
#[derive(Debug, Default)]
pub struct Flow {
    pub state: FlowState,
    /// Bytes the sink accepted.
    pub delivered: u64,
    pub(super) buffered: Buffered,
    mode: Mode,
    /// Held while the flow does not read because its sink has no room. Counts it as stalled.
    lacks_space: Option<GaugeGuard>,
    /// While other descriptors are in the way of those that this flow passes on.
    pub(super) pause: Pause,
}

/// Bytes received from the source that the sink has not accepted yet.
#[derive(Debug, Default)]
pub(super) enum Buffered {
    #[default]
    Nothing,
    Copied {
        bytes: Vec<u8>,
        sent: usize,
    },
    /// In a pipe of the pool, which returns there when it is empty.
    Piped(Pipe),
    /// In a pipe that is stored with systemd and may be empty (crash mode).
    StoredPipe(Box<Pipe>),
    /// Copied bytes, with descriptors.
    Passing(Box<Passing>),
}

#[derive(Clone, Copy, Debug, Default)]
enum Mode {
    #[default]
    Copy,
    Splice {
        /// Bytes received since the source was last empty.
        bytes: u32,
        /// Whether the previous burst was smaller than [`BULK_MIN`].
        was_little: bool,
    },
    /// The source cannot be spliced from, or sends urgent data.
    CopyOnly,
}

/// The result of a step.
pub enum Step {
    Moved,
    /// Nothing moves before the next edge.
    Blocked,
    /// The source cannot be spliced from, and later steps copy. The caller must drop the journal
    /// first.
    CantSplice,
    /// The source's bytes are at their end, and the sink has accepted all of them.
    End,
}

/// What failed, and how.
pub enum Fault {
    Source(Errno),
    Sink(Errno),
    Passing(PassingError),
}

impl Flow {
    /// Creates a flow that sends `header` ahead of the source's bytes.
    pub fn with_header(header: Vec<u8>) -> Self {
        let buffered = match header.is_empty() {
            true => Buffered::Nothing,
            false => Buffered::Copied { bytes: header, sent: 0 },
        };
        Self { buffered, ..Self::default() }
    }

    /// Steps until the budget is used up ([`Step::Moved`]), or until a step returns anything else.
    pub fn drive(
        &mut self,
        source: &mut Endpoint,
        sink: &mut Endpoint,
        budget: &mut usize,
        shared: &LoopBuffers,
    ) -> Result<Step, Fault> {
        while *budget > 0 {
            let before = self.delivered;
            // What is left of a turn may be too little to be worth two system calls.
            let step = self.step(source, sink, (*budget).max(STEP_MIN), shared);
            *budget = budget.saturating_sub(((self.delivered - before) as usize).max(STEP_MIN));
            if !matches!(step, Ok(Step::Moved)) {
                return step;
            }
        }
        Ok(Step::Moved)
    }

    /// Sends what is buffered, or else moves one bufferful or pipeful of at most `size` bytes.
    fn step(
        &mut self,
        source: &mut Endpoint,
        sink: &mut Endpoint,
        size: usize,
        shared: &LoopBuffers,
    ) -> Result<Step, Fault> {
        if !self.buffered.is_empty() {
            return self.send_buffered(sink, shared);
        }
        if sink.writable {
            self.lacks_space = None;
        }
        if !source.readable || self.lacks_space.is_some() {
            return Ok(Step::Blocked);
        }
        let is_from_unix = source.socket.family() == Family::Unix;
        match (&self.buffered, &self.mode) {
            (Buffered::StoredPipe(_), _)
                if is_from_unix && sink.socket.family() == Family::Unix =>
            {
                self.splice_between_unix(source, sink, size, shared)
            }
            (Buffered::StoredPipe(_), _) => self.splice(source, sink, size, shared),
            _ if is_from_unix => self.pass(source, sink, shared),
            (_, Mode::Splice { .. }) => self.splice_bulk(source, sink, size, shared),
            _ => self.copy(source, sink, shared),
        }
    }

    /// Splices through a pipe of the pool, or copies where there is little room or no pipe.
    ///
    /// Not inlined, nor are others below that a small message does not need: its way stays short.
    #[inline(never)]
    fn splice_bulk(
        &mut self,
        source: &mut Endpoint,
        sink: &mut Endpoint,
        size: usize,
        shared: &LoopBuffers,
    ) -> Result<Step, Fault> {
        // A pipe may be filled beyond what the sink accepts now: fewer and larger steps, as long as
        // few flows do so.
        let is_careful = !shared.pipes.below_hold_limit();
        let most = if is_careful { sink.socket.send_space() } else { Some(usize::MAX) };
        match most {
            None => return Ok(self.wait_for_space(sink, shared)),
            // With little room, copy: at most one copy buffer is left over, and no pipe is held for
            // it. The room may be understated, above all while the kernel is short of memory for
            // TCP and has cut the send buffer to a page (tcp_mem in tcp(7)).
            Some(..COPY_SIZE) => {}
            Some(most) => {
                let are_tcp = [&source, &sink].map(|end| end.socket.family()) == [Family::Tcp; 2];
                let many_stalled = is_careful && shared.stalled.taken() >= MANY_STALLED;
                let most =
                    if many_stalled && are_tcp { most.min(STEP_BESIDE_STALLED) } else { most };
                if let Some(pipe) = shared.pipes.acquire() {
                    self.buffered = Buffered::Piped(pipe);
                    return self.splice(source, sink, most.min(size), shared);
                }
            }
        }
        self.copy(source, sink, shared)
    }

    /// Stops reading until the sink has room.
    #[inline(never)]
    pub(super) fn wait_for_space(&mut self, sink: &mut Endpoint, shared: &LoopBuffers) -> Step {
        sink.writable = false;
        self.lacks_space = Some(shared.stalled.take());
        Step::Blocked
    }

    /// Receives into the shared buffer and sends from there.
    fn copy(
        &mut self,
        source: &mut Endpoint,
        sink: &mut Endpoint,
        shared: &LoopBuffers,
    ) -> Result<Step, Fault> {
        let mut buffer = shared.buffer.borrow_mut();
        let received = source.socket.receive(&mut buffer);
        let received = match self.account_received(received, buffer.len(), source) {
            ControlFlow::Continue(received) => received,
            ControlFlow::Break(result) => return result,
        };
        self.send_received(&buffer[..received.bytes], sink)
    }

    /// Accounts for a receive of at most `most` bytes. Breaks if there is nothing to send.
    ///
    /// Inlined, as is the next: these run for each message.
    #[inline(always)]
    pub(super) fn account_received(
        &mut self,
        received: Result<Received, Errno>,
        most: usize,
        source: &mut Endpoint,
    ) -> ControlFlow<Result<Step, Fault>, Received> {
        let received = match received {
            Ok(received) => received,
            Err(Errno::AGAIN) => {
                source.readable = false;
                return ControlFlow::Break(Ok(Step::Blocked));
            }
            Err(Errno::INTR) => return ControlFlow::Break(Ok(Step::Moved)),
            Err(errno) => return ControlFlow::Break(Err(Fault::Source(errno))),
        };
        if received.bytes == 0 {
            return ControlFlow::Break(Ok(Step::End));
        }
        source.readable = !received.drained;
        match self.mode {
            // A full buffer: more than a message is coming.
            Mode::Copy if received.bytes == most => {
                self.mode = Mode::Splice { bytes: received.bytes as u32, was_little: false };
            }
            // It was copied for want of a pipe, and the bulk is over.
            Mode::Splice { .. } if received.drained => {
                self.mode = Mode::Copy;
            }
            _ => {}
        }
        ControlFlow::Continue(received)
    }

    /// Sends what was just received. Only what the sink does not accept is allocated.
    #[inline(always)]
    pub(super) fn send_received(
        &mut self,
        bytes: &[u8],
        sink: &mut Endpoint,
    ) -> Result<Step, Fault> {
        let sent = self.account(sink.socket.send(bytes), sink)?;
        if sent < bytes.len() {
            self.buffered = Buffered::Copied { bytes: bytes[sent..].to_vec(), sent: 0 };
        }
        Ok(Step::Moved)
    }

    /// Fills the pipe in `buffered`, which the caller has put there, and sends what is in it.
    #[inline(never)]
    pub(super) fn splice(
        &mut self,
        source: &mut Endpoint,
        sink: &mut Endpoint,
        size: usize,
        shared: &LoopBuffers,
    ) -> Result<Step, Fault> {
        let filled = match &mut self.buffered {
            Buffered::Piped(pipe) => pipe.fill(&source.socket, size),
            Buffered::StoredPipe(pipe) => pipe.fill(&source.socket, size).inspect(|bytes| {
                if *bytes == pipe.size() {
                    pipe.grow();
                }
            }),
            Buffered::Nothing | Buffered::Copied { .. } | Buffered::Passing(_) => {
                return Ok(Step::Moved);
            }
        };
        if let Ok(bytes @ 1..) = filled {
            // A pipe has at most 1 MiB.
            let bytes = bytes as u32;
            if let Mode::Splice { bytes: sum, .. } = &mut self.mode {
                *sum = sum.saturating_add(bytes);
            }
            return self.send_buffered(sink, shared);
        }
        self.release_if_sent(shared);
        match filled {
            _ if is_at_urgent_data(filled, &source.socket) => {
                self.mode = Mode::CopyOnly;
                Ok(Step::CantSplice)
            }
            Ok(_) => Ok(Step::End),
            Err(Errno::AGAIN) => {
                source.readable = false;
                if let Mode::Splice { bytes, was_little } = self.mode {
                    let is_little = (bytes as usize) < BULK_MIN;
                    self.mode = match is_little && was_little {
                        true => Mode::Copy,
                        false => Mode::Splice { bytes: 0, was_little: is_little },
                    };
                }
                Ok(Step::Blocked)
            }
            Err(Errno::INTR) => Ok(Step::Moved),
            Err(Errno::INVAL) => {
                self.mode = Mode::CopyOnly;
                Ok(Step::CantSplice)
            }
            Err(errno) => Err(Fault::Source(errno)),
        }
    }

    #[inline(never)]
    pub(super) fn send_buffered(
        &mut self,
        sink: &mut Endpoint,
        shared: &LoopBuffers,
    ) -> Result<Step, Fault> {
        if !sink.writable {
            return Ok(Step::Blocked);
        }
        let result = match &mut self.buffered {
            Buffered::Nothing => Ok(0),
            Buffered::Copied { bytes, sent } => {
                sink.socket.send(&bytes[*sent..]).inspect(|now| *sent += now)
            }
            Buffered::Piped(pipe) => pipe.drain(&sink.socket),
            Buffered::StoredPipe(pipe) => pipe.drain(&sink.socket),
            Buffered::Passing(passing) => {
                let sent = passing.send(&sink.socket, &mut self.pause).map_err(Fault::Passing)?;
                let Some(sent) = sent else { return Ok(Step::Blocked) };
                sent
            }
        };
        self.account(result, sink)?;
        self.release_if_sent(shared);
        Ok(Step::Moved)
    }

    /// Accounts for a write to the sink. A full sink accepted nothing.
    pub(super) fn account(
        &mut self,
        result: Result<usize, Errno>,
        sink: &mut Endpoint,
    ) -> Result<usize, Fault> {
        match result {
            Ok(bytes) => {
                self.delivered += bytes as u64;
                sink.prepare_for_bulk(self.delivered);
                Ok(bytes)
            }
            Err(Errno::AGAIN) => {
                sink.writable = false;
                Ok(0)
            }
            Err(Errno::INTR) => Ok(0),
            Err(errno) => Err(Fault::Sink(errno)),
        }
    }

    /// Gives a pipe back to the pool, or frees the copied bytes, once the sink has accepted
    /// everything.
    fn release_if_sent(&mut self, shared: &LoopBuffers) {
        self.buffered = match mem::take(&mut self.buffered) {
            Buffered::Copied { bytes, sent } if sent == bytes.len() => Buffered::Nothing,
            Buffered::Passing(passing) if passing.is_sent() => Buffered::Nothing,
            Buffered::Piped(pipe) => {
                shared.pipes.release_if_empty(pipe).map_or(Buffered::Nothing, Buffered::Piped)
            }
            buffered => buffered,
        };
    }

    /// Stops splicing for good. Returns whether the flow was splicing.
    pub fn begin_copying(&mut self) -> bool {
        let is_stored = matches!(self.buffered, Buffered::StoredPipe(_));
        let was_splicing = is_stored || matches!(self.mode, Mode::Splice { .. });
        self.mode = Mode::CopyOnly;
        was_splicing
    }

    /// Whether bytes may come.
    pub fn is_open(&self) -> bool {
        matches!(self.state, FlowState::Open)
    }

    /// Whether the flow carries more at a time than a message, or can only copy.
    pub fn is_bulky(&self) -> bool {
        match &self.buffered {
            Buffered::StoredPipe(pipe) => pipe.size() >= BULK_PIPE,
            _ => !matches!(self.mode, Mode::Copy),
        }
    }

    /// Returns when to try again, though no edge may come until then.
    pub fn retry_at(&self) -> Option<Instant> {
        self.pause.until()
    }

    /// Whether the flow does not read: it waits for the sink to accept bytes, or for the clock.
    pub fn is_waiting(&self) -> bool {
        self.lacks_space.is_some() || !self.buffered.is_empty() || self.retry_at().is_some()
    }

    /// Ends an open flow because its sink accepts no more bytes. What is buffered is discarded,
    /// which counts as `lost` too.
    pub fn close_sink(&mut self, lost: bool) {
        if self.is_open() {
            let lost = lost || !self.buffered.is_empty();
            self.state = FlowState::SinkClosed { lost };
            self.buffered = Buffered::Nothing;
            self.lacks_space = None;
            self.pause = Pause::default();
        }
    }
}

impl Buffered {
    fn is_empty(&self) -> bool {
        match self {
            Self::Nothing => true,
            Self::StoredPipe(pipe) => pipe.filled() == 0,
            // Between two steps these hold a byte at least.
            Self::Copied { .. } | Self::Piped(_) | Self::Passing(_) => false,
        }
    }
}

/// Whether a splice(2) moved nothing because urgent data is next: splice(2) stops at the urgent
/// mark, and only recv(2) passes it. After `EAGAIN` an edge of epoll (EPOLLPRI) tells. After 0 it
/// may not have come yet, so the kernel is asked.
fn is_at_urgent_data(filled: Result<usize, Errno>, source: &Socket) -> bool {
    match filled {
        Ok(0) => !source.has_ended(),
        Err(Errno::AGAIN) => source.has_urgent_data(),
        _ => false,
    }
}

/// A splicing flow that moves fewer bytes than this between two empty reads, twice in a row, goes
/// back to copying. (A message of 33 to 64 KiB may come in two parts.)
const BULK_MIN: usize = 32 * 1024;

/// The size of a stored pipe that has grown, which it does only for bulk.
const BULK_PIPE: usize = 128 * 1024;

/// From this many stalled flows of one event loop on, [`STEP_BESIDE_STALLED`] applies. Fewer cannot
/// use up the kernel's memory for TCP.
const MANY_STALLED: usize = 64;

/// Bytes that a flow from TCP to TCP takes at a time while many flows are stalled. The kernel sizes
/// the source's receive buffer by what one system call takes in a round trip. Where memory for TCP
/// is short, it drops what comes for a socket that holds more than the average one's share.
const STEP_BESIDE_STALLED: usize = 24 * 1024;

/// The least that a step takes from the budget, in bytes. It bounds the system calls of a turn,
/// whatever a peer sends. It is less than the copy buffer, so bulk is charged its true bytes.
const STEP_MIN: usize = 16 * 1024;

#[cfg(test)]
mod tests;
