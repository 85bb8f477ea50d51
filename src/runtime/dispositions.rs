//! The signals that were ignored or blocked when this process was started (signal(7)).
//!
//! COMMAND starts with the dispositions that the proxy got from systemd (`IgnoreSIGPIPE=` in
//! systemd.exec(5)) or from a shell (nohup(1)). Two things stand in the way:
//!
//! - Rust's runtime ignores SIGPIPE before main(). This module reads the dispositions before that.
//! - std starts each child with SIGPIPE's default action and an empty mask. This module sets the
//!   dispositions after that.

use std::io;
use std::mem::MaybeUninit;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::ptr::{null, null_mut};
use std::sync::atomic::{AtomicU64, Ordering};

/// Whether `signal` was ignored when the process was started.
pub fn was_ignored(signal: i32) -> bool {
    IGNORED.load(Ordering::Relaxed) & bit(signal) != 0
}

/// Unblocks all signals: a blocked signal would never reach the event loop.
///
/// The mask is per thread, so this must run before there is a second thread.
pub fn unblock_signals() {
    set_mask(0);
}

/// Makes a program start with the dispositions that this process was started with.
pub fn restore_dispositions(command: &mut Command) {
    let restore = || -> io::Result<()> {
        for signal in signals(IGNORED.load(Ordering::Relaxed)) {
            // SAFETY: signal(2) is async-signal-safe, and SIG_IGN runs no code of this process.
            unsafe { libc::signal(signal, libc::SIG_IGN) };
        }
        set_mask(BLOCKED.load(Ordering::Relaxed));
        Ok(())
    };
    // SAFETY: between fork(2) and execve(2) the closure makes async-signal-safe calls only.
    unsafe { command.pre_exec(restore) };
}

fn set_mask(blocked: u64) {
    // SAFETY: sigemptyset(3) initialises the mask. The other calls add to the mask and read it.
    unsafe {
        let mut mask = MaybeUninit::<libc::sigset_t>::zeroed();
        libc::sigemptyset(mask.as_mut_ptr());
        for signal in signals(blocked) {
            libc::sigaddset(mask.as_mut_ptr(), signal);
        }
        libc::pthread_sigmask(libc::SIG_SETMASK, mask.as_ptr(), null_mut());
    }
}

extern "C" fn read() {
    let (mut ignored, mut blocked) = (0, 0);
    // SAFETY: all-zero is a valid mask and a valid action. sigaction(2) and pthread_sigmask(3)
    // write them whole or fail. Without a new action or mask they change nothing.
    unsafe {
        let mut mask = MaybeUninit::<libc::sigset_t>::zeroed();
        let has_mask = libc::pthread_sigmask(libc::SIG_BLOCK, null(), mask.as_mut_ptr()) == 0;
        for signal in signals(u64::MAX) {
            let mut action = MaybeUninit::<libc::sigaction>::zeroed();
            if libc::sigaction(signal, null(), action.as_mut_ptr()) == 0
                && action.assume_init_ref().sa_sigaction == libc::SIG_IGN
            {
                ignored |= bit(signal);
            }
            if has_mask && libc::sigismember(mask.as_ptr(), signal) == 1 {
                blocked |= bit(signal);
            }
        }
    }
    IGNORED.store(ignored, Ordering::Relaxed);
    BLOCKED.store(blocked, Ordering::Relaxed);
}

fn signals(set: u64) -> impl Iterator<Item = i32> {
    (1..=SIGRTMAX).filter(move |signal| set & bit(*signal) != 0)
}

const fn bit(signal: i32) -> u64 {
    1 << (signal - 1)
}

const SIGRTMAX: i32 = 64;

/// Sets of signals; the lowest bit is signal 1.
static IGNORED: AtomicU64 = AtomicU64::new(0);
static BLOCKED: AtomicU64 = AtomicU64::new(0);

/// The C library calls `read` before main(), and so before Rust's runtime.
#[used]
#[unsafe(link_section = ".init_array")]
static READ: extern "C" fn() = read;
