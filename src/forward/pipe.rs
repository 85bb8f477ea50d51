//! Pipes for splice(2), and the bounded pool they come from.
//!
//! Invariants:
//!
//! - A pipe is filled only when it is empty. Then `EAGAIN` from [`Pipe::fill`] never means full
//!   slots (small segments fill a pipe's slots long before its bytes), but an empty socket or
//!   urgent data.
//! - Only an empty pipe returns to the pool. Its flow (`forward::flow`) offers it after each send,
//!   and when it has read nothing ([`PipePool::release_if_empty`]).

use std::cell::{Cell, RefCell};
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use rustix::io::Errno;
use rustix::pipe::{PipeFlags, SpliceFlags};
use tokio::time::Instant;

use crate::counters::{Gauge, GaugeGuard};
use crate::forward::snapshot::{BufferedSnapshot, FdRef};
use crate::socket::Socket;

/// A pipe and the number of bytes in it.
#[derive(Debug)]
pub struct Pipe {
    read: OwnedFd,
    write: OwnedFd,
    size: usize,
    filled: usize,
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

    /// Moves what the socket accepts out of the pipe.
    ///
    /// Exactly the bytes in the pipe are asked for: a larger length would make the kernel hold the
    /// last segment back for more.
    pub fn drain(&mut self, to: &Socket) -> Result<usize, Errno> {
        let moved = rustix::pipe::splice(&self.read, None, to, None, self.filled, FLAGS)?;
        self.filled -= moved;
        Ok(moved)
    }

    /// Returns the number of bytes in the pipe.
    pub fn filled(&self) -> usize {
        self.filled
    }

    /// Returns the number of bytes the pipe has room for.
    pub fn size(&self) -> usize {
        self.size
    }

    /// Writes all of `bytes` into the pipe, or fails.
    pub fn put(&mut self, bytes: &[u8]) -> Result<(), Errno> {
        let put = rustix::io::write(&self.write, bytes)?;
        self.filled += put;
        if put == bytes.len() { Ok(()) } else { Err(Errno::NOSPC) }
    }

    /// Makes the pipe as large as the user's quota allows.
    pub fn grow(&mut self) {
        let mut larger = PIPE_SIZES.into_iter().filter(|size| *size > self.size);
        let grown =
            larger.find_map(|size| rustix::pipe::fcntl_setpipe_size(&self.write, size).ok());
        self.size = grown.unwrap_or(self.size);
    }

    /// Returns the pipe as it is to be stored.
    pub fn snapshot(&self) -> BufferedSnapshot<FdRef<'_>> {
        let [read, write] = [&self.read, &self.write].map(|end| FdRef::Borrowed(end.as_fd()));
        BufferedSnapshot::Piped { read, write }
    }

    /// Turns the pipe into what is to be stored of it.
    pub fn into_snapshot(self) -> BufferedSnapshot<FdRef<'static>> {
        let [read, write] = [self.read, self.write].map(FdRef::Owned);
        BufferedSnapshot::Piped { read, write }
    }
}

/// How many pipes an event loop may have, two descriptors each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PipeLimits {
    /// Pipes in all.
    pub max: usize,
    /// Filled pipes from which on flows take only what their sinks have room for. The pool keeps
    /// one idle pipe more than this.
    pub held: usize,
}

/// The pipes of one event loop.
#[derive(Debug)]
pub struct PipePool {
    idle: RefCell<Vec<Pipe>>,
    counted: Gauge,
    limits: PipeLimits,
    /// When to ask the kernel again, after it refused a pipe.
    retry_at: Cell<Option<Instant>>,
}

impl PipePool {
    /// Creates a pool that creates pipes when they are needed, within `limits`.
    pub fn new(limits: PipeLimits, counted: Gauge) -> Self {
        Self { idle: RefCell::default(), counted, limits, retry_at: Cell::new(None) }
    }

    /// Returns an empty pipe, or `None` when the limit, the descriptors or the user's quota of pipe
    /// memory are used up. Then the caller copies.
    pub fn acquire(&self) -> Option<Pipe> {
        if let Some(pipe) = self.idle.borrow_mut().pop() {
            return Some(pipe);
        }
        let is_refused = |until| Instant::now() < until;
        if self.open() >= self.limits.max || self.retry_at.get().is_some_and(is_refused) {
            return None;
        }
        let pipe = self.create();
        self.note(pipe.is_some());
        pipe
    }

    /// Notes whether the kernel has made a pipe.
    fn note(&self, is_made: bool) {
        self.retry_at.set((!is_made).then(|| Instant::now() + RETRY_AFTER));
    }

    /// Whether one more pipe may be filled beyond what its sink accepts now.
    pub fn below_hold_limit(&self) -> bool {
        self.open() - self.idle.borrow().len() < self.limits.held
    }

    /// Takes a pipe back if it is empty, and closes it if enough are idle or it is too small.
    /// Returns a pipe that still has bytes in it.
    pub fn release_if_empty(&self, pipe: Pipe) -> Option<Pipe> {
        if pipe.filled > 0 {
            return Some(pipe);
        }
        let mut idle = self.idle.borrow_mut();
        if pipe.size >= SMALLEST_USEFUL && idle.len() <= self.limits.held {
            idle.push(pipe);
        }
        None
    }

    /// Creates a pipe for a caller that keeps it: the pool counts it, but does not bound it.
    pub fn create_unpooled(&self) -> Result<Pipe, Errno> {
        let (read, write) = rustix::pipe::pipe_with(PIPE_FLAGS)?;
        self.count(read, write, 0)
    }

    /// Counts a pipe that exists, and the bytes in it.
    pub fn adopt(&self, read: OwnedFd, write: OwnedFd) -> Result<Pipe, Errno> {
        let filled = rustix::io::ioctl_fionread(&read)? as usize;
        self.count(read, write, filled)
    }

    fn count(&self, read: OwnedFd, write: OwnedFd, filled: usize) -> Result<Pipe, Errno> {
        let size = rustix::pipe::fcntl_getpipe_size(&write)?;
        Ok(Pipe { read, write, size, filled, _counted: self.counted.take() })
    }

    fn create(&self) -> Option<Pipe> {
        let mut pipe = self.create_unpooled().ok()?;
        pipe.grow();
        (pipe.size >= SMALLEST_USEFUL).then_some(pipe)
    }

    /// Open pipes, idle ones included.
    fn open(&self) -> usize {
        self.counted.taken()
    }
}

/// Pipes that a process may hold for slow sinks: 16 of 1 MiB, a quarter of the 64 MiB that a user
/// has by default. Each event loop may hold at least one.
pub const HELD_MAX: usize = 16;

/// The sizes in bytes to ask for, in this order: the largest that a user may have by default
/// (`pipe-max-size`), and one that makes a user's quota last longer. Each slot of a pipe takes one
/// buffer of a socket, so a larger pipe means fewer and larger steps: a quarter less CPU than with
/// 256 KiB.
const PIPE_SIZES: [usize; 2] = [1024 * 1024, 256 * 1024];

/// A smaller pipe costs more than copying. Once the user's quota is used up, the kernel makes pipes
/// of 4 or 8 KiB (`pipe-user-pages-soft` in pipe(7)).
const SMALLEST_USEFUL: usize = 64 * 1024;

/// How long flows copy before the kernel is asked again, after it refused a pipe.
const RETRY_AFTER: Duration = Duration::from_secs(1);

const PIPE_FLAGS: PipeFlags = PipeFlags::CLOEXEC.union(PipeFlags::NONBLOCK);

const FLAGS: SpliceFlags = SpliceFlags::NONBLOCK.union(SpliceFlags::MOVE);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pool_is_bounded() {
        let pool = PipePool::new(PipeLimits { max: 2, held: 1 }, Gauge::default());
        let pipes = (pool.acquire().unwrap(), pool.acquire().unwrap());
        assert!(pool.acquire().is_none());
        assert!(pool.release_if_empty(pipes.0).is_none());
        assert_eq!(pool.open(), 2);
        assert!(pool.acquire().is_some());
    }

    #[test]
    fn few_pipes_are_held_or_idle() {
        let pool = PipePool::new(PipeLimits { max: 4, held: 2 }, Gauge::default());
        assert!(pool.below_hold_limit());
        let mut pipes = vec![pool.acquire().unwrap()];
        assert!(pool.below_hold_limit());
        pipes.push(pool.acquire().unwrap());
        assert!(!pool.below_hold_limit());
        pipes.extend([pool.acquire().unwrap(), pool.acquire().unwrap()]);
        assert!(!pool.below_hold_limit());
        // Three, two, one and none are held then. The last finds enough idle ones.
        for expected in [(false, 4), (false, 4), (true, 4), (true, 3)] {
            pool.release_if_empty(pipes.pop().unwrap());
            assert_eq!((pool.below_hold_limit(), pool.open()), expected);
        }
    }

    #[test]
    fn bytes_fit_into_a_pipe_or_are_refused() {
        let pool = PipePool::new(PipeLimits { max: 1, held: 1 }, Gauge::default());
        let mut pipe = pool.acquire().unwrap();
        assert_eq!(pipe.size(), rustix::pipe::fcntl_getpipe_size(&pipe.write).unwrap());
        pipe.put(b"first").unwrap();
        pipe.put(b"second").unwrap();
        assert_eq!(pipe.filled(), 11);
        assert_eq!(pipe.put(&vec![0; pipe.size()]), Err(Errno::NOSPC));
    }

    #[test]
    fn a_pipe_returns_only_when_it_is_empty() {
        let pool = PipePool::new(PipeLimits { max: 1, held: 1 }, Gauge::default());
        let mut pipe = pool.acquire().unwrap();
        pipe.filled = rustix::io::write(&pipe.write, b"left over").unwrap();
        let mut pipe = pool.release_if_empty(pipe).expect("it has bytes in it");
        assert!(pool.acquire().is_none());
        assert_eq!(rustix::io::read(&pipe.read, &mut [0; 99]), Ok(9));
        pipe.filled = 0;
        assert!(pool.release_if_empty(pipe).is_none());
        assert!(pool.acquire().is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn the_kernel_is_asked_again_a_second_after_it_refused() {
        let pool = PipePool::new(PipeLimits { max: 1, held: 1 }, Gauge::default());
        pool.note(false);
        assert!(pool.acquire().is_none());
        tokio::time::advance(RETRY_AFTER - Duration::from_millis(1)).await;
        assert!(pool.acquire().is_none());
        tokio::time::advance(Duration::from_millis(1)).await;
        assert!(pool.acquire().is_some());
    }

    #[test]
    fn a_pipe_grows_once() {
        let pool = PipePool::new(PipeLimits { max: 1, held: 1 }, Gauge::default());
        let mut pipe = pool.create_unpooled().unwrap();
        pipe.grow();
        assert!(PIPE_SIZES.contains(&pipe.size()), "{}", pipe.size());
        // The largest is let alone, whatever has become of it.
        pipe.size = PIPE_SIZES[0];
        rustix::pipe::fcntl_setpipe_size(&pipe.write, SMALLEST_USEFUL).unwrap();
        pipe.grow();
        assert_eq!(rustix::pipe::fcntl_getpipe_size(&pipe.write), Ok(SMALLEST_USEFUL));
    }
}
