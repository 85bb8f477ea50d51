//! System calls that the safe crates lack, or make in a way that fails with some peers or kernels.
//!
//! A leaf: it knows nothing of the product. Unsafe code also stands in `socket::mmsg`,
//! `socket::passed_fds`, `listen::activation`, `runtime::dispositions` and one call in `main`.

use std::io;
use std::mem;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::time::Duration;

use rustix::io::Errno;
use rustix::ioctl::{Getter, Opcode};
use socket2::SockAddr;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Accepts a connection, non-blocking and close-on-exec. Returns the peer's address as well.
///
/// A Unix peer may be bound to a path of 108 bytes, all of `sun_path`, without a NUL. Linux adds
/// the NUL and returns an address of 111 bytes (unix(7), BUGS). rustix and std panic on that
/// length; socket2 has room for it.
///
/// # Errors
/// Those of accept(2).
pub fn accept(listener: impl AsFd) -> io::Result<(OwnedFd, SockAddr)> {
    // SAFETY: accept4(2) writes at most `length` bytes to `storage`, which is that long, and sets
    // `length` to the number written. It returns a descriptor that nothing else owns.
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

/// Registers a descriptor with the event loop: one epoll_ctl(2), edge-triggered.
///
/// # Errors
/// Those of epoll_ctl(2). The descriptor is closed then.
pub fn register(fd: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: as_raw_fd() of an OwnedFd returns the same open descriptor for its whole life, and
    // the AsyncFd owns it.
    let registered = unsafe { AsyncFd::register_with_interest(fd, interest) };
    Ok(registered?)
}

/// The memory of a socket for the bytes that it sends (`SO_MEMINFO`).
pub struct SendMemory {
    /// Memory of the bytes that a Unix peer has not received.
    pub allocated: usize,
    /// Memory of the bytes that a TCP or vsock peer has not acknowledged.
    pub queued: usize,
    /// The most memory that the socket may use (SO_SNDBUF).
    pub limit: usize,
}

pub fn send_memory(fd: impl AsFd) -> io::Result<SendMemory> {
    let mut info = [0_u32; libc::SK_MEMINFO_DROPS as usize + 1];
    // SAFETY: SO_MEMINFO is an array of `u32` (linux/sock_diag.h).
    unsafe { getsockopt(fd, libc::SOL_SOCKET, libc::SO_MEMINFO, &mut info) }?;
    let value = |index: i32| info[index as usize] as usize;
    Ok(SendMemory {
        allocated: value(libc::SK_MEMINFO_WMEM_ALLOC),
        queued: value(libc::SK_MEMINFO_WMEM_QUEUED),
        limit: value(libc::SK_MEMINFO_SNDBUF),
    })
}

/// Returns how long a TCP socket has neither sent nor received data (`TCP_INFO` in tcp(7)).
pub fn tcp_idle(fd: impl AsFd) -> io::Result<Duration> {
    let info = tcp_info(fd)?;
    let last = info.tcpi_last_data_sent.min(info.tcpi_last_data_recv);
    Ok(Duration::from_millis(last.into()))
}

/// Returns how many clients wait to be accepted on a TCP listener: there, TCP_INFO has this number
/// as `tcpi_unacked`, and ss(8) shows it as Recv-Q.
pub fn accept_queue_len(fd: impl AsFd) -> io::Result<u32> {
    Ok(tcp_info(fd)?.tcpi_unacked)
}

fn tcp_info(fd: impl AsFd) -> io::Result<libc::tcp_info> {
    // SAFETY: the structure consists of integers, for which all-zero is valid.
    let mut info: libc::tcp_info = unsafe { mem::zeroed() };
    // SAFETY: TCP_INFO is a `tcp_info`, of which the kernel writes as much as it knows.
    unsafe { getsockopt(fd, libc::IPPROTO_TCP, libc::TCP_INFO, &mut info) }?;
    Ok(info)
}

/// Returns the bytes sent that are still on this side (`SIOCOUTQ`).
///
/// On a Unix socket the number includes the kernel's overhead.
pub fn outq_len(fd: impl AsFd) -> usize {
    // SAFETY: TIOCOUTQ, which is SIOCOUTQ on a socket, writes one int (tcp(7), unix(7)).
    let bytes =
        unsafe { rustix::ioctl::ioctl(fd, Getter::<{ libc::TIOCOUTQ as Opcode }, i32>::new()) };
    bytes.map_or(0, |bytes| bytes.max(0) as usize)
}

/// Sets where the next receive with `MSG_PEEK` begins, as an offset into the queued bytes.
///
/// Each such receive advances the offset (`SO_PEEK_OFF` in socket(7)).
pub fn set_peek_offset(fd: impl AsFd, offset: u32) -> io::Result<()> {
    setsockopt(fd, libc::SOL_SOCKET, libc::SO_PEEK_OFF, offset as i32)
}

/// Leaves the port of a socket that is bound to port 0 to connect(2) (`IP_BIND_ADDRESS_NO_PORT` in
/// ip(7)). Sockets of IPv6 have the option as well.
pub fn set_bind_address_no_port(fd: impl AsFd) -> io::Result<()> {
    setsockopt(fd, libc::IPPROTO_IP, libc::IP_BIND_ADDRESS_NO_PORT, 1)
}

/// Sets an option that is an int.
pub fn setsockopt(fd: impl AsFd, level: i32, name: i32, value: i32) -> io::Result<()> {
    let (fd, length) = (fd.as_fd().as_raw_fd(), size_of_val(&value) as libc::socklen_t);
    // SAFETY: setsockopt(2) reads `length` bytes of `value`, which is that long.
    let result = unsafe { libc::setsockopt(fd, level, name, (&raw const value).cast(), length) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Returns whether a Unix socket adds control messages of its own to what is received: the sender's
/// credentials, security label or pidfd. An accepted socket inherits this from its listener.
pub fn adds_credentials(fd: impl AsFd) -> bool {
    ADD_CREDENTIALS.into_iter().any(|option| {
        let mut is_on = 0_i32;
        // SAFETY: these options are ints.
        let result = unsafe { getsockopt(&fd, libc::SOL_SOCKET, option, &mut is_on) };
        result.is_ok() && is_on != 0
    })
}

/// Has a Unix socket add no control messages of its own.
pub fn add_no_credentials(fd: impl AsFd) {
    for option in ADD_CREDENTIALS {
        // Fails only where the kernel does not know the option.
        let _ = setsockopt(&fd, libc::SOL_SOCKET, option, 0);
    }
}

/// The third is SO_PASSPIDFD (Linux 6.5).
const ADD_CREDENTIALS: [i32; 3] = [libc::SO_PASSCRED, libc::SO_PASSSEC, 76];

/// Returns CLOCK_MONOTONIC, which all processes since the boot share.
///
/// rustix asks the vDSO, and panics where that has no `__vdso_getcpu`: Linux 7 has none as User
/// Mode Linux.
pub fn monotonic() -> Duration {
    // SAFETY: a timespec is integers.
    let mut now: libc::timespec = unsafe { mem::zeroed() };
    // SAFETY: clock_gettime(2) writes a timespec, and knows this clock on every kernel.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) };
    Duration::new(now.tv_sec as u64, now.tv_nsec as u32)
}

/// Returns the error of the system call that has just failed.
pub fn last_errno() -> Errno {
    Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::IO)
}

/// Reads an option into `value`.
///
/// # Safety
/// Any bytes that the kernel writes for this option must be a valid `T`.
unsafe fn getsockopt<T>(fd: impl AsFd, level: i32, name: i32, value: &mut T) -> io::Result<()> {
    let mut length = size_of::<T>() as libc::socklen_t;
    let fd = fd.as_fd().as_raw_fd();
    // SAFETY: getsockopt(2) writes at most `length` bytes to `value`, which is that long. The
    // caller promises that they are a valid `T`.
    let result =
        unsafe { libc::getsockopt(fd, level, name, (&raw mut *value).cast(), &raw mut length) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
