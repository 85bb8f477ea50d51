//! Pipes for splice(2), and the bounded pool they come from.
//!
//! Invariants: a pipe is filled only when it is empty, so that `EAGAIN` from [`Pipe::fill`] never
//! means full slots (small segments fill a pipe's slots long before its bytes), but an empty socket
//! or urgent data; and only an empty pipe returns to the pool.

use std::cell::{Cell, RefCell};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::io::Errno;
use rustix::pipe::{PipeFlags, SpliceFlags};
use tokio::time::Instant;

use crate::counters::{Gauge, GaugeGuard};
use crate::socket::Socket;

/// What is asked for, in bytes, one after the other: the most that anybody may have by default
/// (`pipe-max-size`), and what a user's quota lasts longer for. Each slot of a pipe takes one buffer
/// of a socket, so that a larger one means fewer and larger steps: a quarter less CPU than with 256 KiB.
const PIPE_SIZES: [usize; 2] = [1024 * 1024, 256 * 1024];

/// A new pipe's size as long as the user's quota lasts (pipe(7)). Smaller ones, 4 or 8 KiB, are
/// what `pipe-user-pages-soft` leaves, and cost more than copying.
const SMALLEST_USEFUL: usize = 64 * 1024;

/// How long to copy before asking the kernel again, after it refused a pipe.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// Pipes of a process that may be held for slow sinks, but at least one a thread: a quarter of the
/// 64 MiB that a user has by default.
pub const HELD_MAX: usize = 16;

/// A pipe, and how much is in it.
#[derive(Debug)]
pub struct Pipe {
    read: OwnedFd,
    write: OwnedFd,
    size: usize,
    filled: usize,
    /// Counts the pipes of a pool by being held.
    _counted: GaugeGuard,
}

impl Pipe {
    /// Moves what the socket has into the pipe, which must be empty: up to `most` bytes or the
    /// pipe's size, or fewer when its slots are full. 0 is the end of the stream, or urgent data in
    /// front of it.
    pub fn fill(&mut self, from: &Socket, most: usize) -> Result<usize, Errno> {
        debug_assert_eq!(self.filled, 0, "EAGAIN would be ambiguous");
        let most = most.min(self.size);
        self.filled = rustix::pipe::splice(from, None, &self.write, None, most, FLAGS)?;
        Ok(self.filled)
    }

    /// Moves what the socket takes out of the pipe.
    ///
    /// Exactly what is in it is asked for: a larger length would make the kernel hold the last
    /// segment back for more.
    pub fn drain(&mut self, to: &Socket) -> Result<usize, Errno> {
        let moved = rustix::pipe::splice(&self.read, None, to, None, self.filled, FLAGS)?;
        self.filled -= moved;
        Ok(moved)
    }

    /// Bytes in the pipe.
    pub fn filled(&self) -> usize {
        self.filled
    }

    /// Bytes it takes at a time.
    pub fn size(&self) -> usize {
        self.size
    }

    /// Puts all of these bytes into it, or fails.
    pub fn put(&mut self, bytes: &[u8]) -> Result<(), Errno> {
        let put = rustix::io::write(&self.write, bytes)?;
        self.filled += put;
        if put == bytes.len() { Ok(()) } else { Err(Errno::NOSPC) }
    }

    /// Makes room for more at a time, as far as the user's quota goes.
    pub fn grow(&mut self) {
        let grown = PIPE_SIZES.iter().find_map(|&size| {
            let is_more = size > self.size;
            is_more.then(|| rustix::pipe::fcntl_setpipe_size(&self.write, size).ok()).flatten()
        });
        self.size = grown.unwrap_or(self.size);
    }

    /// Its ends, to read from and to write to.
    pub fn ends(&self) -> [BorrowedFd<'_>; 2] {
        [self.read.as_fd(), self.write.as_fd()]
    }
}

/// How many pipes a thread may have, two descriptors each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// In all.
    pub max: usize,
    /// For slow sinks, before flows become careful.
    pub held: usize,
}

/// The pipes of one thread.
#[derive(Debug)]
pub struct PipePool {
    idle: RefCell<Vec<Pipe>>,
    counted: Gauge,
    limits: Limits,
    retry_at: Cell<Option<Instant>>,
}

impl PipePool {
    /// A pool that makes pipes within these limits when they are needed, and counts them.
    pub fn new(limits: Limits, counted: Gauge) -> Self {
        Self { idle: RefCell::default(), counted, limits, retry_at: Cell::new(None) }
    }

    /// An empty pipe, or `None` when the limit, the descriptors or the user's quota of pipe memory
    /// are used up: then the caller copies.
    pub fn take(&self) -> Option<Pipe> {
        if let Some(pipe) = self.idle.borrow_mut().pop() {
            return Some(pipe);
        }
        if self.in_use() >= self.limits.max {
            return None;
        }
        if let Some(until) = self.retry_at.get() {
            if Instant::now() < until {
                return None;
            }
            self.retry_at.set(None);
        }
        let pipe = self.create();
        if pipe.is_none() {
            self.retry_at.set(Some(Instant::now() + RETRY_AFTER));
        }
        pipe
    }

    /// Whether one more may be taken that is held for as long as its sink likes.
    pub fn below_hold_limit(&self) -> bool {
        self.in_use() - self.idle.borrow().len() < self.limits.held
    }

    /// Takes a pipe back; one with bytes in it is closed instead.
    pub fn release(&self, pipe: Pipe) {
        let mut idle = self.idle.borrow_mut();
        if pipe.filled == 0 && pipe.size >= SMALLEST_USEFUL && idle.len() <= self.limits.held {
            idle.push(pipe);
        }
    }

    /// Pipes in existence, idle ones included.
    pub fn in_use(&self) -> usize {
        self.counted.taken()
    }

    /// A pipe that is counted, and not bounded, here: for somebody who keeps it.
    pub fn make(&self) -> Option<Pipe> {
        let (read, write) = rustix::pipe::pipe_with(PIPE_FLAGS).ok()?;
        let size = rustix::pipe::fcntl_getpipe_size(&write).ok()?;
        Some(Pipe { read, write, size, filled: 0, _counted: self.counted.take() })
    }

    /// The same with a pipe that exists, and what is in it.
    pub fn adopt(&self, read: OwnedFd, write: OwnedFd) -> Result<Pipe, Errno> {
        let size = rustix::pipe::fcntl_getpipe_size(&write)?;
        let filled = rustix::io::ioctl_fionread(&read)? as usize;
        Ok(Pipe { read, write, size, filled, _counted: self.counted.take() })
    }

    fn create(&self) -> Option<Pipe> {
        let (read, write) = rustix::pipe::pipe_with(PIPE_FLAGS).ok()?;
        let size = PIPE_SIZES
            .iter()
            .find_map(|&size| rustix::pipe::fcntl_setpipe_size(&write, size).ok())
            .or_else(|| rustix::pipe::fcntl_getpipe_size(&write).ok())?;
        (size >= SMALLEST_USEFUL).then(|| Pipe {
            read,
            write,
            size,
            filled: 0,
            _counted: self.counted.take(),
        })
    }
}

const PIPE_FLAGS: PipeFlags = PipeFlags::CLOEXEC.union(PipeFlags::NONBLOCK);

const FLAGS: SpliceFlags = SpliceFlags::NONBLOCK.union(SpliceFlags::MOVE);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pool_is_bounded() {
        let pool = PipePool::new(Limits { max: 2, held: 1 }, Gauge::default());
        let pipes = (pool.take().unwrap(), pool.take().unwrap());
        assert!(pool.take().is_none());
        pool.release(pipes.0);
        assert_eq!(pool.in_use(), 2);
        assert!(pool.take().is_some());
    }

    #[test]
    fn a_pipe_with_bytes_in_it_never_returns() {
        let pool = PipePool::new(Limits { max: 1, held: 1 }, Gauge::default());
        let mut pipe = pool.take().unwrap();
        pipe.filled = rustix::io::write(&pipe.write, b"left over").unwrap();
        pool.release(pipe);
        assert_eq!(pool.in_use(), 0);
        let fresh = pool.take().unwrap();
        assert_eq!(rustix::io::read(&fresh.read, &mut [0; 9]), Err(Errno::AGAIN));
    }
}
