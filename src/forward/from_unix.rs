//! How a flow moves bytes and descriptors from a Unix socket: "Descriptors" in `forward`.

use std::ops::ControlFlow;
use std::os::fd::OwnedFd;

use rustix::io::Errno;

use crate::forward::endpoint::Endpoint;
use crate::forward::flow::{Buffered, Fault, Flow, Step};
use crate::forward::loop_buffers::LoopBuffers;
use crate::forward::passing::{Passing, PassingError, Pause};
use crate::limits::passed::MessageRoom;
use crate::socket::{Family, has_hung_up};

impl Flow {
    /// Receives into the shared buffer and sends from there, to another Unix socket with the
    /// descriptors.
    ///
    /// Not inlined: flows from other sockets need none of it.
    #[inline(never)]
    pub fn pass(
        &mut self,
        source: &mut Endpoint,
        sink: &mut Endpoint,
        shared: &LoopBuffers,
    ) -> Result<Step, Fault> {
        let mut buffer = shared.buffer.borrow_mut();
        // The room is held until the descriptors are counted in `Passing`.
        let (most, _room) = if shared.passed.is_scarce() {
            match self.take_room(source, sink, shared, &mut buffer) {
                ControlFlow::Continue(taken) => taken,
                ControlFlow::Break(result) => return result,
            }
        } else {
            self.pause = Pause::default();
            (buffer.len(), None)
        };
        let mut descriptors = Vec::new();
        let received = source.socket.receive_passed(&mut buffer[..most], &mut descriptors);
        let received = match self.account_received(received, buffer.len(), source) {
            ControlFlow::Continue(received) => received,
            ControlFlow::Break(result) => return result,
        };
        let bytes = &buffer[..received.bytes];
        if descriptors.is_empty() && !received.lost_descriptors {
            return self.send_received(bytes, sink);
        }
        self.pass_on(bytes, descriptors, received.lost_descriptors, sink, shared)
    }

    /// Sends bytes with the descriptors that came with them, some of which may be `lost`.
    #[inline(never)]
    fn pass_on(
        &mut self,
        bytes: &[u8],
        descriptors: Vec<OwnedFd>,
        lost: bool,
        sink: &mut Endpoint,
        shared: &LoopBuffers,
    ) -> Result<Step, Fault> {
        if sink.socket.family() != Family::Unix {
            shared.passed.drop_message();
            drop(shared.passed.hold(descriptors));
            return self.send_received(bytes, sink);
        }
        let are_too_many = descriptors.len() > shared.passed.limits.message;
        let descriptors = shared.passed.hold(descriptors);
        if lost {
            return Err(Fault::Passing(PassingError::TableFull));
        }
        if are_too_many {
            return Err(Fault::Passing(PassingError::TooMany));
        }
        self.buffered = Buffered::Passing(Passing::new(bytes.to_vec(), descriptors));
        self.send_buffered(sink, shared)
    }

    /// Takes room for a message with descriptors. Where there is none, returns how many bytes come
    /// without descriptors. Breaks if the flow has to wait.
    #[inline(never)]
    fn take_room<'a>(
        &mut self,
        source: &mut Endpoint,
        sink: &mut Endpoint,
        shared: &'a LoopBuffers,
        buffer: &mut [u8],
    ) -> ControlFlow<Result<Step, Fault>, (usize, Option<MessageRoom<'a>>)> {
        if self.pause.is_running() {
            return ControlFlow::Break(Ok(Step::Blocked));
        }
        // Descriptors that are received now must not wait for a slow peer.
        if sink.socket.send_space().is_none() {
            self.pause = Pause::default();
            return ControlFlow::Break(Ok(self.wait_for_space(sink, shared)));
        }
        let room = shared.passed.take();
        let mut most = buffer.len();
        if room.is_none() {
            match source.socket.peek_passed(buffer) {
                // No edge tells it during the pause.
                Ok((_, true)) if has_hung_up(&sink.socket) => {
                    return ControlFlow::Break(Err(Fault::Sink(Errno::PIPE)));
                }
                Ok((_, true)) => {
                    self.pause.begin();
                    return ControlFlow::Break(Ok(Step::Blocked));
                }
                // 0 is the end, which the receive has to find.
                Ok((bytes, false)) => most = bytes.max(1),
                Err(Errno::AGAIN) => {
                    source.readable = false;
                    self.pause = Pause::default();
                    return ControlFlow::Break(Ok(Step::Blocked));
                }
                Err(Errno::INTR) => return ControlFlow::Break(Ok(Step::Moved)),
                // The kernel reports an error once, here to the look.
                Err(errno) => return ControlFlow::Break(Err(Fault::Source(errno))),
            }
        }
        self.pause = Pause::default();
        ControlFlow::Continue((most, room))
    }

    /// Splices from a Unix source to a Unix sink (crash mode). Looks first whether the source has
    /// passed descriptors, which splice(2) would close.
    #[inline(never)]
    pub fn splice_between_unix(
        &mut self,
        source: &mut Endpoint,
        sink: &mut Endpoint,
        size: usize,
        shared: &LoopBuffers,
    ) -> Result<Step, Fault> {
        let most = match source.socket.peek_passed(&mut shared.buffer.borrow_mut()) {
            Ok((_, true)) => return Err(Fault::Passing(PassingError::Stored)),
            Ok((bytes @ 1.., false)) => bytes,
            Err(Errno::AGAIN) => {
                source.readable = false;
                return Ok(Step::Blocked);
            }
            // splice(2) returns the end.
            Ok(_) => usize::MAX,
            Err(Errno::INTR) => return Ok(Step::Moved),
            Err(errno) => return Err(Fault::Source(errno)),
        };
        self.splice(source, sink, size.min(most), shared)
    }
}
