//! What the connections of one event loop share: the copy buffer, the pipes, and whose turn it is.

use std::cell::RefCell;

use crate::counters::Gauge;
use crate::forward::pipe::{PipeLimits, PipePool};
use crate::forward::snapshot::COPY_SIZE;
use crate::forward::turns::Turns;
use crate::limits::passed::PassedRoom;

/// What the connections of one event loop share.
#[derive(Debug)]
pub struct LoopBuffers {
    pub buffer: RefCell<Box<[u8]>>,
    pub pipes: PipePool,
    /// Flows that wait for room in their sinks.
    pub stalled: Gauge,
    /// Room for the descriptors of all event loops.
    pub passed: PassedRoom,
    pub turns: Turns,
}

impl LoopBuffers {
    /// Returns those of a test, in which one pipe may be open, and `held` for slow sinks.
    #[cfg(test)]
    pub fn for_tests(held: usize) -> Self {
        use crate::limits::passed::PassedLimits;
        let passed = PassedRoom::new(PassedLimits { message: 16, all: 64, threads: 1 });
        Self::new(PipeLimits { max: 1, held }, Gauge::default(), passed)
    }

    /// `limits` bounds the pipes, which are counted in `pipes`. `passed` is common to all loops.
    pub fn new(limits: PipeLimits, pipes: Gauge, passed: PassedRoom) -> Self {
        Self {
            buffer: RefCell::new(vec![0; COPY_SIZE].into()),
            pipes: PipePool::new(limits, pipes),
            stalled: Gauge::default(),
            passed,
            turns: Turns::default(),
        }
    }
}
