//! The signals that were ignored or blocked when this process was started (signal(7)).
//!
//! COMMAND starts with the dispositions that the proxy got from systemd (`IgnoreSIGPIPE=` in
//! systemd.exec(5)) or from a shell (nohup(1)). Two things stand in the way:
//!
//! - Rust's runtime ignores SIGPIPE before main(). This module reads what is ignored before that.
//! - std starts each child with SIGPIPE's default action and an empty mask. This module sets the
//!   dispositions after that.

use std::io;
use std::mem;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::ptr::{null, null_mut};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

/// Whether `signal` was ignored when the process was started.
pub fn was_ignored(signal: i32) -> bool {
    IGNORED.load(Ordering::Relaxed) & bit(signal) != 0
}

/// Unblocks all signals: a blocked signal would never reach the event loop.
///
/// The mask is per thread, so this must run before there is a second thread.
pub fn unblock_signals() {
    // SAFETY: all-zero is a valid mask. sigemptyset(3) initialises one, and pthread_sigmask(3)
    // writes the other.
    let before = unsafe {
        let (mut none, mut before) = (mem::zeroed(), mem::zeroed());
        libc::sigemptyset(&raw mut none);
        libc::pthread_sigmask(libc::SIG_SETMASK, &raw const none, &raw mut before);
        before
    };
    let _ = BLOCKED.set(before);
}

/// Makes a program start with the dispositions that this process was started with.
pub fn restore_dispositions(command: &mut Command) {
    let restore = || -> io::Result<()> {
        for signal in signals(IGNORED.load(Ordering::Relaxed)) {
            // SAFETY: signal(2) is async-signal-safe, and SIG_IGN runs no code of this process.
            unsafe { libc::signal(signal, libc::SIG_IGN) };
        }
        if let Some(blocked) = BLOCKED.get() {
            // SAFETY: the call only reads the mask.
            unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, blocked, null_mut()) };
        }
        Ok(())
    };
    // SAFETY: between fork(2) and execve(2) the closure makes async-signal-safe calls only.
    unsafe { command.pre_exec(restore) };
}

extern "C" fn read() {
    let mut ignored = 0;
    for signal in signals(u64::MAX) {
        // SAFETY: all-zero is a valid action. sigaction(2) writes it whole or fails, and changes
        // nothing without a new action.
        unsafe {
            let mut action: libc::sigaction = mem::zeroed();
            if libc::sigaction(signal, null(), &raw mut action) == 0
                && action.sa_sigaction == libc::SIG_IGN
            {
                ignored |= bit(signal);
            }
        }
    }
    IGNORED.store(ignored, Ordering::Relaxed);
}

fn signals(set: u64) -> impl Iterator<Item = i32> {
    (1..=SIGRTMAX).filter(move |signal| set & bit(*signal) != 0)
}

const fn bit(signal: i32) -> u64 {
    1 << (signal - 1)
}

const SIGRTMAX: i32 = 64;

/// A set of signals; the lowest bit is signal 1.
static IGNORED: AtomicU64 = AtomicU64::new(0);

static BLOCKED: OnceLock<libc::sigset_t> = OnceLock::new();

/// The C library calls `read` before main(), and so before Rust's runtime.
#[used]
#[unsafe(link_section = ".init_array")]
static READ: extern "C" fn() = read;
