//! System calls on sockets that the safe crates don't make, or not in a way that copes with every peer.
//!
//! A leaf: it knows nothing of the product. One of the four files with unsafe code (the others are
//! `socket`, `activation` and `dispositions`).

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::time::Duration;

use socket2::SockAddr;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Accepts a connection, non-blocking and close-on-exec, and gives the address of its peer.
///
/// A Unix peer may be bound to a path of 108 bytes, all of `sun_path`, without a NUL. Linux then gives
/// an address of 111 bytes, since it adds the NUL (unix(7), BUGS). rustix and std panic on that length;
/// socket2 has room for it.
///
/// # Errors
/// accept(2)'s.
pub fn accept(listener: impl AsFd) -> io::Result<(OwnedFd, SockAddr)> {
    // SAFETY: accept4(2) writes at most `length` bytes to `storage`, which is that long, and the length
    // that it wrote to `length`; it returns a descriptor that nothing else owns.
    unsafe {
        SockAddr::try_init(|storage, length| {
            let flags = libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
            let listener = listener.as_fd().as_raw_fd();
            match libc::accept4(listener, storage.cast(), length, flags) {
                -1 => Err(io::Error::last_os_error()),
                fd => Ok(OwnedFd::from_raw_fd(fd)),
            }
        })
    }
}

/// Hands a descriptor to the event loop: one `epoll_ctl`, edge-triggered.
///
/// # Errors
/// epoll_ctl(2)'s; the descriptor is closed then.
pub fn register(fd: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd gives the same open descriptor from as_raw_fd() for as long as it lives,
    // and the AsyncFd owns it.
    let registered = unsafe { AsyncFd::register_with_interest(fd, interest) };
    Ok(registered?)
}

/// The memory that a socket has for what it sends (`SO_MEMINFO`).
pub struct SendMemory {
    /// Of the bytes that a Unix peer has not received.
    pub allocated: usize,
    /// Of the bytes that a TCP or vsock peer has not acknowledged.
    pub outq_len: usize,
    /// How much there may be.
    pub limit: usize,
}

/// Asks for the memory that a socket has for what it sends.
pub fn send_memory(fd: impl AsFd) -> io::Result<SendMemory> {
    let mut info = [0_u32; SK_MEMINFO_VARS];
    let mut length = size_of_val(&info) as libc::socklen_t;
    // SAFETY: getsockopt(2) writes at most `length` bytes to `info`, which is that long.
    let result = unsafe {
        libc::getsockopt(
            fd.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_MEMINFO,
            info.as_mut_ptr().cast(),
            &raw mut length,
        )
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    let at = |place: usize| info[place] as usize;
    Ok(SendMemory {
        allocated: at(SK_MEMINFO_WMEM_ALLOC),
        outq_len: at(SK_MEMINFO_WMEM_QUEUED),
        limit: at(SK_MEMINFO_SNDBUF),
    })
}

/// For how long a TCP socket has neither sent nor received data (`TCP_INFO` in tcp(7)).
pub fn tcp_idle(fd: impl AsFd) -> io::Result<Duration> {
    // SAFETY: all zero is one: it has numbers only.
    let mut info: libc::tcp_info = unsafe { std::mem::zeroed() };
    let mut length = size_of_val(&info) as libc::socklen_t;
    // SAFETY: getsockopt(2) writes at most `length` bytes to `info`, which is that long.
    let result = unsafe {
        libc::getsockopt(
            fd.as_fd().as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            (&raw mut info).cast(),
            &raw mut length,
        )
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    let last = info.tcpi_last_data_sent.min(info.tcpi_last_data_recv);
    Ok(Duration::from_millis(last.into()))
}

/// What was sent on a socket and is still on this side, in bytes; on a Unix socket with what the kernel
/// needs for it.
pub fn outq_len(fd: impl AsFd) -> usize {
    // SAFETY: TIOCOUTQ, which is SIOCOUTQ on a socket, writes one int (tcp(7), unix(7)).
    let bytes = unsafe {
        let request = rustix::ioctl::Getter::<TIOCOUTQ, i32>::new();
        rustix::ioctl::ioctl(fd, request)
    };
    bytes.map_or(0, |bytes| bytes.max(0) as usize)
}

/// Where the next receive with `MSG_PEEK` begins, in bytes of what is queued; each moves it on
/// (`SO_PEEK_OFF` in socket(7)).
pub fn set_peek_offset(fd: impl AsFd, offset: u32) -> io::Result<()> {
    // SAFETY: setsockopt(2) reads an int.
    let result = unsafe {
        libc::setsockopt(
            fd.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEEK_OFF,
            (&raw const offset).cast(),
            size_of_val(&offset) as libc::socklen_t,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// linux/sock_diag.h: the places in what SO_MEMINFO tells.
const SK_MEMINFO_WMEM_ALLOC: usize = 2;
const SK_MEMINFO_SNDBUF: usize = 3;
const SK_MEMINFO_WMEM_QUEUED: usize = 5;
const SK_MEMINFO_VARS: usize = 9;

/// From asm-generic/ioctls.h; the same on every architecture Rust supports Linux on but the
/// MIPS, PowerPC and SPARC families.
#[cfg(not(any(
    target_arch = "mips",
    target_arch = "mips64",
    target_arch = "powerpc",
    target_arch = "powerpc64",
    target_arch = "sparc64"
)))]
const TIOCOUTQ: rustix::ioctl::Opcode = 0x5411;
