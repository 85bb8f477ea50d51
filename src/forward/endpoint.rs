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
    unsent_is_limited: bool,
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
            unsent_is_limited: false,
        }
    }

    /// Limits the bytes that a TCP socket holds unsent, once `delivered` bytes went there.
    pub fn limit_unsent(&mut self, delivered: u64) {
        let is_due = delivered >= UNSENT_LIMITED_AFTER && !self.unsent_is_limited;
        if is_due && self.socket.family() == Family::Tcp {
            self.unsent_is_limited = true;
            self.socket.limit_unsent(UNSENT_MAX);
        }
    }
}

/// Bytes that a flow delivers before the limit is set: a short connection does not pay for it.
const UNSENT_LIMITED_AFTER: u64 = 128 * 1024;

/// Bytes that a TCP socket may hold unsent. Without a limit each stalled sink holds the 4 MiB of
/// `tcp_wmem`. A few hundred of them use up the kernel's memory for TCP (`tcp_mem`), and the kernel
/// drops segments of the flows that move. A smaller limit costs bulk on hundreds of connections
/// CPU.
const UNSENT_MAX: u32 = 896 * 1024;
