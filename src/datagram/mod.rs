//! Datagrams: sessions between clients and backends.
//!
//! # Theory of operation
//!
//! A datagram socket has no connections, so the relay makes them up. A *session* is a client, the
//! address that it has sent to, and a socket of its own that is connected to the backend. What the
//! backend sends to that socket goes back to the client, from the address that the client has
//! asked. The kernel keeps datagrams of strangers away from a connected socket.
//!
//! A datagram passes whole, or is dropped and counted. A full queue of a receiver delays no other
//! client: the session holds a few datagrams while its backend starts or its socket is full.
//!
//! One task on the main thread's event loop has all sessions. Its sockets are in an epoll(7) set of
//! their own, edge-triggered. A turn asks it once, whatever the number of sessions with answers,
//! and needs neither a task nor a waker for each. System calls:
//!
//! - A batch of up to 32 datagrams of any clients is one recvmmsg(2).
//! - What a session sends in a batch is one sendmmsg(2) on its socket.
//! - The answers of a session are one recvmmsg(2). One that returns fewer datagrams than it had
//!   room for has emptied the queue, so that no second one follows.
//! - The answers of all sessions in a turn, up to 32, are one sendmmsg(2) on the listener.
//!
//! Segments that the kernel has merged (UDP_GRO) stay one buffer on their way, and are sent as one
//! (UDP_SEGMENT).

mod turn;
pub mod relay;
mod begin;
mod to_backends;
mod to_clients;
mod opening;
mod backend;
mod session;
mod stored;
mod sender;
mod held;
mod table;
