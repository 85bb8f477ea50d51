//! One side of a connection: its socket, and what is known of it between two edges.

use crate::socket::{Family, Socket};

/// A socket and its state.
#[derive(Debug)]
pub struct Endpoint {
    pub socket: Socket,
    /// Receiving may return bytes: no receive came short since the last edge.
    pub readable: bool,
    /// Sending may succeed: no send came short since the last edge.
    pub writable: bool,
    /// Its stream ended with a reset, not with a FIN: the kernel has reported that error already.
    pub reset: bool,
    /// The peer reset the connection, or the socket failed. What is left for the other side is
    /// waited for only as long as it moves.
    pub gone: bool,
    /// The options for bulk are set.
    is_prepared: bool,
}

impl Endpoint {
    /// Wraps a socket that no edge has called readable yet.
    pub fn new(socket: Socket) -> Self {
        let was_reset = socket.was_reset();
        Self {
            socket,
            readable: false,
            writable: true,
            reset: was_reset,
            gone: was_reset,
            is_prepared: false,
        }
    }

    /// Sets the options for bulk, once `delivered` bytes went there: a short connection does not
    /// pay for them.
    pub fn prepare_for_bulk(&mut self, delivered: u64) {
        if delivered < BULK_FROM || self.is_prepared {
            return;
        }
        self.is_prepared = true;
        match self.socket.family() {
            Family::Tcp => self.socket.limit_unsent(UNSENT_MAX),
            Family::Unix => self.socket.double_send_buffer(UNIX_BUFFER),
            Family::Vsock => {}
        }
    }
}

/// Bytes that a flow delivers before it counts as bulk.
const BULK_FROM: u64 = 128 * 1024;

/// A Unix socket that may hold at most so many bytes for its peer, the kernel's default, may hold
/// twice as many for bulk. The kernel reports room (EPOLLOUT) once less than a quarter is taken,
/// and again with each buffer that the peer has read. So twice as many are half the wake-ups.
const UNIX_BUFFER: usize = 212_992;

/// Bytes that a TCP socket may hold unsent. Without a limit each stalled sink holds the 4 MiB of
/// `tcp_wmem`. A few hundred of them use up the kernel's memory for TCP (`tcp_mem`), and the kernel
/// drops segments of the flows that move. A smaller limit costs bulk on hundreds of connections
/// CPU.
const UNSENT_MAX: u32 = 896 * 1024;

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use rustix::net::sockopt;

    use super::*;

    #[tokio::test]
    async fn the_options_for_bulk_are_set_once_and_for_bulk_alone() {
        let (socket, _peer) = UnixStream::pair().unwrap();
        // The kernel doubles it.
        sockopt::set_socket_send_buffer_size(&socket, 50_000).unwrap();
        let mut end = Endpoint::new(Socket::register(socket.into(), Family::Unix).unwrap());
        for (delivered, size) in
            [(1, 100_000), (BULK_FROM - 1, 100_000), (BULK_FROM, 200_000), (u64::MAX, 200_000)]
        {
            end.prepare_for_bulk(delivered);
            assert_eq!(sockopt::socket_send_buffer_size(&end.socket), Ok(size), "{delivered}");
        }
    }
}
