//! The system calls of the program. Each can be the last one before a kill, and some can be
//! interrupted or cut short. On other architectures than x86-64, only the pauses between two steps of
//! a simulation can be.

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use crate::descriptors::{ABOVE, above, first, is_open};
use crate::support::stream::Random;

/// What a seed does to the system calls of the program.
pub struct Faults {
    random: Random,
    /// One call of so many is interrupted or cut short; 0 is none.
    pub one_of: u64,
    /// Calls until the program is killed.
    pub kill_in: Option<u64>,
    /// The descriptors of its event loop. Others see nothing of them.
    pub kept: Vec<RawFd>,
    /// What a kill leaves in place of the other descriptors: their numbers stay taken, so that
    /// nothing that the program does with them until it is dropped reaches anything.
    null: OwnedFd,
    pub is_killed: bool,
}

impl Faults {
    pub fn new(seed: u64) -> Self {
        let null = above(File::open("/dev/null").unwrap());
        Self {
            random: Random::new(seed),
            one_of: 0,
            kill_in: None,
            kept: Vec::new(),
            null,
            is_killed: false,
        }
    }

    /// Runs a part of the program under these faults.
    pub fn apply<T>(&mut self, part: impl FnOnce() -> T) -> T {
        if self.one_of == 0 && self.kill_in.is_none() && !self.is_killed {
            return part();
        }
        #[cfg(target_arch = "x86_64")]
        return crate::dispatch::run(self, part);
        #[cfg(not(target_arch = "x86_64"))]
        part()
    }

    /// Closes the descriptors of the program as the kernel does at a kill, without any of its code.
    pub fn kill(&mut self) {
        self.is_killed = true;
        let open = (first()..ABOVE).filter(|fd| is_open(*fd) && !self.kept.contains(fd));
        // SAFETY: the program that owns the descriptors was killed.
        open.for_each(|fd| unsafe { assert!(libc::dup3(self.null.as_raw_fd(), fd, 0) == fd) });
    }

    /// Makes a call as the seed says. Returns what the kernel returns: less than 0 is an error.
    ///
    /// Nothing here may allocate: the program may be in the middle of that.
    #[cfg(target_arch = "x86_64")]
    pub fn call(&mut self, number: i64, mut arguments: [i64; 6]) -> i64 {
        if VISIBLE.contains(&number) {
            match self.kill_in {
                Some(0) if !self.is_killed => self.kill(),
                Some(left) => self.kill_in = Some(left.saturating_sub(1)),
                None => {}
            }
            if self.is_killed && number != libc::SYS_close {
                return -i64::from(libc::EBADF);
            }
        }
        let length = match number {
            libc::SYS_sendto => Some(2),
            libc::SYS_splice => Some(4),
            _ => None,
        };
        if let Some(length) =
            length.filter(|_| self.one_of > 0 && self.random.is_one_of(self.one_of))
        {
            // Of the two, only splice(2) looks for signals before it looks for bytes.
            if number == libc::SYS_splice && self.random.is_one_of(2) {
                return -i64::from(libc::EINTR);
            }
            arguments[length] = 1 + self.random.below(arguments[length] as u64) as i64;
        }
        // SAFETY: the call that the program was about to make, with fewer bytes at most.
        unsafe { crate::dispatch::call(number, arguments) }
    }
}

/// The calls that others see, and those that make or close what they see.
#[cfg(target_arch = "x86_64")]
const VISIBLE: [i64; 15] = [
    libc::SYS_accept4,
    libc::SYS_bind,
    libc::SYS_close,
    libc::SYS_connect,
    libc::SYS_memfd_create,
    libc::SYS_pipe2,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
    libc::SYS_setsockopt,
    libc::SYS_shutdown,
    libc::SYS_socket,
    libc::SYS_socketpair,
    libc::SYS_splice,
];
