//! The signals that were ignored or blocked when this process was started (signal(7)).
//!
//! COMMAND gets them as the proxy did, from systemd (`IgnoreSIGPIPE=` in systemd.exec(5)) or a shell
//! (nohup(1)). Rust's runtime ignores SIGPIPE before main(), and std starts each child with SIGPIPE's
//! default action and an empty mask. So they are read before the runtime, and set behind std.

use std::io;
use std::mem::MaybeUninit;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::ptr::{null, null_mut};
use std::sync::atomic::{AtomicU64, Ordering};

/// The last signal (`SIGRTMAX`).
const LAST: i32 = 64;

/// A bit for each signal, the lowest for the first.
static IGNORED: AtomicU64 = AtomicU64::new(0);
static BLOCKED: AtomicU64 = AtomicU64::new(0);

/// The C library calls this before main(), and so before Rust's runtime.
#[used]
#[unsafe(link_section = ".init_array")]
static READ: extern "C" fn() = read;

extern "C" fn read() {
    let (mut ignored, mut blocked) = (0, 0);
    // SAFETY: all zero is a mask and an action. sigaction(2) and pthread_sigmask(3) write them whole, or
    // fail, and change nothing without a new one.
    unsafe {
        let mut mask = MaybeUninit::<libc::sigset_t>::zeroed();
        let has_mask = libc::pthread_sigmask(libc::SIG_BLOCK, null(), mask.as_mut_ptr()) == 0;
        for signal in 1..=LAST {
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

const fn bit(signal: i32) -> u64 {
    1 << (signal - 1)
}

/// Whether this signal was ignored when the process was started.
pub fn was_ignored(signal: i32) -> bool {
    IGNORED.load(Ordering::Relaxed) & bit(signal) != 0
}

/// Blocks no signal in this process: those that it waits for have to arrive. To be called before there
/// is a thread.
pub fn unblock_signals() {
    set_mask(0);
}

/// Has a program start with the signals ignored and blocked that were at the start of this process.
pub fn hand_down(command: &mut Command) {
    let set = || -> io::Result<()> {
        let ignored = IGNORED.load(Ordering::Relaxed);
        for signal in (1..=LAST).filter(|signal| ignored & bit(*signal) != 0) {
            // SAFETY: signal(2) is async-signal-safe, and SIG_IGN is no code of ours.
            unsafe { libc::signal(signal, libc::SIG_IGN) };
        }
        set_mask(BLOCKED.load(Ordering::Relaxed));
        Ok(())
    };
    // SAFETY: between fork(2) and execve(2) it makes async-signal-safe calls only.
    unsafe { command.pre_exec(set) };
}

fn set_mask(blocked: u64) {
    // SAFETY: sigemptyset(3) makes a mask of what is there, and the others read it.
    unsafe {
        let mut mask = MaybeUninit::<libc::sigset_t>::zeroed();
        libc::sigemptyset(mask.as_mut_ptr());
        for signal in (1..=LAST).filter(|signal| blocked & bit(*signal) != 0) {
            libc::sigaddset(mask.as_mut_ptr(), signal);
        }
        libc::pthread_sigmask(libc::SIG_SETMASK, mask.as_ptr(), null_mut());
    }
}
