//! One direction of a connection: what it holds, and how it moves bytes.
//!
//! The theory of operation is at the top of `forward`.

use std::cell::RefCell;
use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::os::fd::OwnedFd;

use rustix::fs::{MemfdFlags, memfd_create};
use rustix::io::Errno;

use crate::counters::{Gauge, GaugeGuard};
use crate::forward::pipe::{Limits, Pipe, PipePool};
use crate::forward::snapshot::{BufferedSnapshot, COPY_SIZE, FdRef, FlowSnapshot, FlowState};
use crate::forward::turns::Turns;
use crate::socket::{Family, Socket};

/// Bytes between two empty sockets below which a bulky flow may be quiet again. It is, when that happens
/// twice in a row: a message of 33 to 64 KiB may come in two parts.
const QUIET_BELOW: usize = 32 * 1024;

/// Bytes from a Unix socket without any the other way from which on they are bulk, and copied. Its many
/// small buffers cost more to splice than to copy, but for messages that fit into the socket.
const UNIX_BULK: usize = 128 * 1024;

/// The size from which on a pipe that a flow has for itself is one for bulk: those before have grown.
const BULK_PIPE: usize = 128 * 1024;

/// Bytes that a TCP sink may hold unsent, once a flow has delivered [`UNSENT_AFTER`]. Without a bound each
/// stalled sink holds the 4 MiB of `tcp_wmem`. A few hundred of them use up the kernel's memory for TCP
/// (`tcp_mem`), and the kernel drops segments of the flows that move. A smaller bound costs bulk on hundreds
/// of connections CPU.
const UNSENT_MAX: u32 = 896 * 1024;

/// Bytes that a flow delivers before the bound is set: a short connection does not pay for it.
const UNSENT_AFTER: u64 = 128 * 1024;

/// Flows of one event loop that wait for room in their sinks before [`CAREFUL`] applies: so many may hold the
/// kernel's memory for TCP.
const MANY_STALLED: usize = 64;

/// Bytes that a flow from TCP to TCP takes at a time while many flows are stalled. The kernel sizes the source's
/// receive buffer by what one system call takes in a round trip. Where memory for TCP is short, it drops
/// what comes for a socket that holds more than the average one's share.
const CAREFUL: usize = 24 * 1024;

/// What the connections of one thread share.
#[derive(Debug)]
pub struct LoopBuffers {
    buffer: RefCell<Box<[u8]>>,
    pipes: PipePool,
    /// Flows that wait for room in their sinks.
    stalled: Gauge,
    pub turns: Turns,
}

impl LoopBuffers {
    /// `limits` bounds the pipes, which are counted in `pipes`.
    pub fn new(limits: Limits, pipes: Gauge) -> Self {
        let buffer = RefCell::new(vec![0; COPY_SIZE].into());
        let (pipes, stalled) = (PipePool::new(limits, pipes), Gauge::default());
        Self { buffer, pipes, stalled, turns: Turns::default() }
    }
}

/// A socket, and what is known of it between two edges.
#[derive(Debug)]
pub struct Endpoint {
    pub socket: Socket,
    /// Worth reading from: no receive came short since the last edge.
    pub readable: bool,
    /// Worth writing to: no send came short since the last edge.
    pub writable: bool,
    /// An end of its bytes is not a FIN: the error that says so has been taken from the socket.
    pub reset: bool,
    /// What may wait on it unsent is bounded by [`UNSENT_MAX`].
    pub is_bounded: bool,
    /// The peer reset the connection, or it failed: what is left for its counterpart is waited for
    /// only as long as it moves.
    pub gone: bool,
}

impl Endpoint {
    /// A socket of which no edge has told yet that it is worth reading from.
    pub fn new(socket: Socket) -> Self {
        let was_reset = socket.was_reset();
        Self {
            socket,
            readable: false,
            writable: true,
            is_bounded: false,
            reset: was_reset,
            gone: was_reset,
        }
    }

    /// Bounds what may wait on it unsent.
    fn limit_unsent(&mut self) {
        if !self.is_bounded && self.socket.family() == Family::Tcp {
            self.is_bounded = true;
            self.socket.limit_unsent(UNSENT_MAX);
        }
    }
}

/// One direction.
#[derive(Debug, Default)]
pub struct Flow {
    pub state: FlowState,
    pub buffered: Buffered,
    /// Held while nothing is taken from the source, because the sink has no room for it.
    lacks_space: Option<GaugeGuard>,
    mode: Mode,
    /// Bytes that were spliced since the other direction carried any.
    pub unanswered: usize,
    /// Bytes the sink took.
    pub delivered: u64,
    /// Where all bytes are that it has taken and not delivered, if it may not hold them otherwise.
    stored_pipe: Option<Box<Pipe>>,
}

/// Bytes taken from the source that the sink has not taken yet.
#[derive(Debug, Default)]
pub enum Buffered {
    #[default]
    Nothing,
    Copied {
        bytes: Vec<u8>,
        sent: usize,
    },
    Piped(Pipe),
}

impl Buffered {
    pub fn is_nothing(&self) -> bool {
        matches!(self, Self::Nothing)
    }
}

#[derive(Clone, Copy, Debug, Default)]
enum Mode {
    #[default]
    Copy,
    /// `bytes` came since the source was last empty; `was_little` came before that.
    Splice { bytes: usize, was_little: bool },
    /// The source can't be spliced from, or sends urgent data, or bulk on a Unix socket.
    CopyOnly,
}

/// What came of a step.
pub enum Step {
    Moved,
    Blocked,
    /// The source can't be spliced from, and nothing else may be done.
    CantSplice,
    /// The source's bytes are at their end, and all of them are with the sink.
    End,
}

/// A socket that failed, and how.
pub enum Fault {
    Source(Errno),
    Sink(Errno),
}

impl Pipe {
    fn snapshot(&self) -> BufferedSnapshot<FdRef<'_>> {
        let [read, write] = self.ends().map(FdRef::Borrowed);
        BufferedSnapshot::Piped { read, write }
    }
}

impl Flow {
    /// Sends what is buffered, or else moves one bufferful or pipeful, of at most `size` bytes.
    pub fn step(
        &mut self,
        source: &mut Endpoint,
        sink: &mut Endpoint,
        size: usize,
        shared: &LoopBuffers,
    ) -> Result<Step, Fault> {
        if self.stored_pipe.is_some() {
            return self.step_stored(source, sink, size);
        }
        if !self.buffered.is_nothing() {
            return self.send_held(sink, shared);
        }
        if sink.writable {
            self.lacks_space = None;
        }
        if !source.readable || self.lacks_space.is_some() {
            return Ok(Step::Blocked);
        }
        if !matches!(self.mode, Mode::Splice { .. }) {
            return self.copy(source, sink, shared);
        }
        // A pipe may be filled beyond what the sink takes now, and is buffered until it takes more: fewer and
        // larger steps, as long as few flows do so.
        let is_careful = !shared.pipes.below_hold_limit();
        let most = if is_careful { sink.socket.send_space() } else { Some(usize::MAX) };
        match most {
            None => {
                sink.writable = false;
                self.lacks_space = Some(shared.stalled.take());
                return Ok(Step::Blocked);
            }
            // A sink that is writable takes more than its buffer has room for, above all while the kernel
            // is short of memory for TCP and has cut that buffer to a page (tcp_mem in tcp(7)). What it
            // does not take is less than a buffer, and no pipe is buffered for it.
            Some(..COPY_SIZE) => {}
            Some(most) => {
                let are_tcp = [&source, &sink].map(|end| end.socket.family()) == [Family::Tcp; 2];
                let many_stalled = is_careful && shared.stalled.taken() >= MANY_STALLED;
                let most = if many_stalled && are_tcp { most.min(CAREFUL) } else { most };
                if let Some(pipe) = shared.pipes.take() {
                    return self.splice(pipe, most.min(size), source, sink, shared);
                }
            }
        }
        self.copy(source, sink, shared)
    }

    fn copy(
        &mut self,
        source: &mut Endpoint,
        sink: &mut Endpoint,
        shared: &LoopBuffers,
    ) -> Result<Step, Fault> {
        let mut buffer = shared.buffer.borrow_mut();
        let received = match source.socket.receive(&mut buffer) {
            Ok(received) => received,
            Err(Errno::AGAIN) => {
                source.readable = false;
                return Ok(Step::Blocked);
            }
            Err(Errno::INTR) => return Ok(Step::Moved),
            Err(errno) => return Err(Fault::Source(errno)),
        };
        if received.bytes == 0 {
            return Ok(Step::End);
        }
        source.readable = !received.drained;
        match self.mode {
            // A full buffer: there is more than a message.
            Mode::Copy if received.bytes == buffer.len() => {
                self.mode = Mode::Splice { bytes: received.bytes, was_little: false };
            }
            // It was not spliced, and now there is no bulk.
            Mode::Splice { .. } if received.drained && received.bytes < QUIET_BELOW => {
                self.mode = Mode::Copy;
            }
            _ => {}
        }
        let bytes = &buffer[..received.bytes];
        let sent = self.sent(sink.socket.send(bytes), sink)?;
        if sent < bytes.len() {
            self.buffered = Buffered::Copied { bytes: bytes[sent..].to_vec(), sent: 0 };
        }
        Ok(Step::Moved)
    }

    fn splice(
        &mut self,
        mut pipe: Pipe,
        most: usize,
        source: &mut Endpoint,
        sink: &mut Endpoint,
        shared: &LoopBuffers,
    ) -> Result<Step, Fault> {
        let filled = pipe.fill(&source.socket, most);
        if is_at_urgent_data(filled, &source.socket) {
            shared.pipes.release(pipe);
            self.mode = Mode::CopyOnly;
            return Ok(Step::Moved);
        }
        match filled {
            Ok(0) => {
                shared.pipes.release(pipe);
                return Ok(Step::End);
            }
            Ok(now) => {
                self.unanswered = self.unanswered.saturating_add(now);
                if source.socket.family() == Family::Unix && self.unanswered > UNIX_BULK {
                    self.mode = Mode::CopyOnly;
                } else if let Mode::Splice { bytes, .. } = &mut self.mode {
                    *bytes = bytes.saturating_add(now);
                }
            }
            Err(errno) => {
                shared.pipes.release(pipe);
                return match errno {
                    Errno::AGAIN => {
                        source.readable = false;
                        if let Mode::Splice { bytes, was_little } = self.mode {
                            let is_little = bytes < QUIET_BELOW;
                            self.mode = match is_little && was_little {
                                true => Mode::Copy,
                                false => Mode::Splice { bytes: 0, was_little: is_little },
                            };
                        }
                        Ok(Step::Blocked)
                    }
                    Errno::INTR => Ok(Step::Moved),
                    Errno::INVAL => {
                        self.mode = Mode::CopyOnly;
                        Ok(Step::Moved)
                    }
                    errno => Err(Fault::Source(errno)),
                };
            }
        }
        self.buffered = Buffered::Piped(pipe);
        self.send_held(sink, shared)
    }

    fn send_held(&mut self, sink: &mut Endpoint, shared: &LoopBuffers) -> Result<Step, Fault> {
        if !sink.writable {
            return Ok(Step::Blocked);
        }
        let left = match &mut self.buffered {
            Buffered::Nothing => return Ok(Step::Moved),
            Buffered::Copied { bytes, sent } => {
                let result = sink.socket.send(&bytes[*sent..]);
                if let Ok(now) = result {
                    *sent += now;
                }
                let left = bytes.len() - *sent;
                self.sent(result, sink)?;
                left
            }
            Buffered::Piped(pipe) => {
                let result = pipe.drain(&sink.socket);
                let left = pipe.filled();
                self.sent(result, sink)?;
                left
            }
        };
        if left == 0
            && let Buffered::Piped(pipe) = std::mem::take(&mut self.buffered)
        {
            shared.pipes.release(pipe);
        }
        Ok(Step::Moved)
    }

    /// The same for a flow with a pipe of its own.
    fn step_stored(
        &mut self,
        source: &mut Endpoint,
        sink: &mut Endpoint,
        size: usize,
    ) -> Result<Step, Fault> {
        let Some(pipe) = &mut self.stored_pipe else { return Ok(Step::Blocked) };
        if pipe.filled() == 0 {
            if !source.readable {
                return Ok(Step::Blocked);
            }
            let filled = pipe.fill(&source.socket, size);
            if is_at_urgent_data(filled, &source.socket) {
                return Ok(Step::CantSplice);
            }
            match filled {
                Ok(0) => return Ok(Step::End),
                Ok(bytes) if bytes == pipe.size() => pipe.grow(),
                Ok(_) => {}
                Err(Errno::AGAIN) => {
                    source.readable = false;
                    return Ok(Step::Blocked);
                }
                Err(Errno::INTR) => return Ok(Step::Moved),
                Err(Errno::INVAL) => return Ok(Step::CantSplice),
                Err(errno) => return Err(Fault::Source(errno)),
            }
        }
        if !sink.writable {
            return Ok(Step::Blocked);
        }
        let result = pipe.drain(&sink.socket);
        self.sent(result, sink)?;
        Ok(Step::Moved)
    }

    /// Takes a pipe of its own, with what is buffered in it.
    ///
    /// # Errors
    /// When there is no pipe, or none with enough room; then all is as before.
    pub fn attach_stored_pipe(&mut self, shared: &LoopBuffers) -> Result<(), Errno> {
        let pipe = match std::mem::take(&mut self.buffered) {
            Buffered::Piped(pipe) => pipe,
            buffered => {
                let pipe = shared.pipes.make().ok_or(Errno::MFILE).and_then(|mut pipe| {
                    if let Buffered::Copied { bytes, sent } = &buffered {
                        pipe.put(&bytes[*sent..])?;
                    }
                    Ok(pipe)
                });
                pipe.inspect_err(|_| self.buffered = buffered)?
            }
        };
        self.stored_pipe = Some(Box::new(pipe));
        Ok(())
    }

    /// Gives its own pipe up, and carries bytes as other flows do.
    pub fn detach_stored_pipe(&mut self) {
        if let Some(pipe) = self.stored_pipe.take()
            && pipe.filled() > 0
        {
            self.buffered = Buffered::Piped(*pipe);
        }
    }

    /// As it is to be stored.
    ///
    /// # Errors
    /// When bytes that were copied can't be put into a file: memfd_create(2)'s and write(2)'s.
    pub fn snapshot(&self) -> io::Result<FlowSnapshot<FdRef<'_>>> {
        let buffered = match (&self.stored_pipe, &self.buffered) {
            (Some(pipe), _) => pipe.snapshot(),
            (None, Buffered::Piped(pipe)) => pipe.snapshot(),
            (None, Buffered::Copied { bytes, sent }) => {
                let file = memfd_create(c"socket-proxyd", MemfdFlags::CLOEXEC)?;
                File::from(file.try_clone()?).write_all(&bytes[*sent..])?;
                BufferedSnapshot::Copied(FdRef::Owned(file))
            }
            (None, Buffered::Nothing) => BufferedSnapshot::Nothing,
        };
        Ok(FlowSnapshot { state: self.state, delivered: self.delivered, buffered })
    }

    /// One that was stored; with `its_own` pipe, if it had one.
    ///
    /// # Errors
    /// When what it buffered can't be had.
    pub fn restore(
        stored: FlowSnapshot<OwnedFd>,
        its_own: bool,
        shared: &LoopBuffers,
    ) -> io::Result<Self> {
        let FlowSnapshot { state, delivered, buffered } = stored;
        let mut flow = Self { state, delivered, ..Self::default() };
        if state != FlowState::Open {
            return Ok(flow);
        }
        match buffered {
            BufferedSnapshot::Nothing => {}
            BufferedSnapshot::Copied(file) => {
                let mut bytes = Vec::new();
                let mut file = File::from(file);
                file.rewind()?;
                file.take(COPY_SIZE as u64).read_to_end(&mut bytes)?;
                flow.buffered = Buffered::Copied { bytes, sent: 0 };
            }
            BufferedSnapshot::Piped { read, write } => {
                let pipe = shared.pipes.adopt(read, write)?;
                if its_own {
                    flow.stored_pipe = Some(Box::new(pipe));
                } else if pipe.filled() > 0 {
                    flow.buffered = Buffered::Piped(pipe);
                }
            }
        }
        Ok(flow)
    }

    /// Whether it has carried more at a time than a message.
    pub fn is_bulky(&self) -> bool {
        match &self.stored_pipe {
            Some(pipe) => pipe.size() >= BULK_PIPE,
            None => !matches!(self.mode, Mode::Copy),
        }
    }

    /// Whether it has a pipe of its own, or needs none any more.
    pub fn is_storable(&self) -> bool {
        self.stored_pipe.is_some() || self.state != FlowState::Open
    }

    /// Accounts for a write to the sink; a full sink took nothing.
    fn sent(&mut self, result: Result<usize, Errno>, sink: &mut Endpoint) -> Result<usize, Fault> {
        match result {
            Ok(bytes) => {
                self.delivered += bytes as u64;
                if self.delivered >= UNSENT_AFTER {
                    sink.limit_unsent();
                }
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

    /// Whether the next thing that can happen is that the sink takes something.
    pub fn waits_for_sink(&self) -> bool {
        self.lacks_space.is_some() || self.holds()
    }

    fn holds(&self) -> bool {
        !self.buffered.is_nothing()
            || self.stored_pipe.as_ref().is_some_and(|pipe| pipe.filled() > 0)
    }

    /// Nothing more can be delivered; what is buffered never will be, and its pipe is closed.
    pub fn close_sink(&mut self, lost: bool) {
        if self.state == FlowState::Open {
            let lost = lost || self.holds();
            self.state = FlowState::SinkClosed { lost };
            self.buffered = Buffered::Nothing;
            self.stored_pipe = None;
            self.lacks_space = None;
        }
    }
}

/// Whether a splice(2) moved nothing because urgent data is next, which only receiving gets past. After `EAGAIN` an event that has not been fetched yet comes as an edge; after 0 nothing
/// would.
fn is_at_urgent_data(filled: Result<usize, Errno>, source: &Socket) -> bool {
    match filled {
        Ok(0) => !source.has_ended(),
        Err(Errno::AGAIN) => source.has_urgent_data(),
        _ => false,
    }
}
