//! Socket options. A failure to set one never ends a connection: at most it is logged at debug
//! level.

use std::fmt::Display;
use std::os::fd::AsFd;
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::sockopt;

/// Sends small segments at once. With Nagle's algorithm, some patterns of requests wait 40 ms for a
/// delayed acknowledgement. An accepted socket inherits the option from its listener.
pub fn set_nodelay(fd: impl AsFd) {
    log_failure(sockopt::set_tcp_nodelay(fd, true), "TCP_NODELAY");
}

/// Turns urgent data into ordinary data: the kernel would drop the out-of-band byte.
///
/// On TCP an accepted socket inherits the option from its listener. On a Unix socket it does not;
/// there each socket needs the option before it is read.
pub fn set_oobinline(fd: impl AsFd) {
    log_failure(sockopt::set_socket_oobinline(fd, true), "SO_OOBINLINE");
}

/// Decides whether close(2) resets a TCP connection instead of ending it.
pub fn set_reset_on_close(fd: impl AsFd, resets: bool) {
    // tcp(7): close(2) with a linger time of zero sends RST instead of FIN.
    let _ = sockopt::set_socket_linger(fd, resets.then_some(Duration::ZERO));
}

/// When the kernel notices that a TCP peer has vanished (tcp(7)).
///
/// The kernel sends a first probe after a time without a byte, and up to nine probes in all. The
/// interval between two probes is a ninth of that time, but at least a second.
///
/// There is no TCP_USER_TIMEOUT: it would end a connection whose peer is alive but does not read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Keepalive {
    first: Duration,
    interval: Duration,
}

impl Keepalive {
    /// The longest time that the kernel accepts.
    pub const MAX: Duration = Duration::from_secs(32_767);

    /// Sends the first probe after `first`, rounded up to whole seconds.
    pub fn after(first: Duration) -> Self {
        let first = Duration::from_secs(first.as_secs_f64().ceil().max(1.0) as u64).min(Self::MAX);
        // Rounded down: all intervals together are no longer than `first`.
        let interval = Duration::from_secs((first.as_secs() / u64::from(PROBES)).max(1));
        Self { first, interval }
    }

    /// Sets the options. An accepted socket inherits them from its listener.
    pub fn set(self, fd: impl AsFd) {
        let set = || -> Result<(), Errno> {
            sockopt::set_tcp_keepidle(&fd, self.first)?;
            sockopt::set_tcp_keepintvl(&fd, self.interval)?;
            sockopt::set_tcp_keepcnt(&fd, PROBES)?;
            sockopt::set_socket_keepalive(&fd, true)
        };
        log_failure(set(), "SO_KEEPALIVE");
    }
}

fn log_failure(result: Result<(), impl Display>, option: &str) {
    if let Err(error) = result {
        tracing::debug!("Failed to set {option}, ignoring: {error}.");
    }
}

const PROBES: u32 = 9;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vanished_peer_is_noticed_within_twice_the_time_or_nine_seconds_more() {
        for seconds in [1, 2, 8, 9, 10, 17, 18, 30, 600, 32_767] {
            let Keepalive { first, interval } = Keepalive::after(Duration::from_secs(seconds));
            assert_eq!(first.as_secs(), seconds);
            let noticed = first + interval * PROBES;
            assert!(noticed <= first + first.max(Duration::from_secs(9)), "{seconds}: {noticed:?}");
        }
    }
}
