//! Datagrams: sessions between clients and backends.
//!
//! # Theory of operation
//!
//! A datagram socket has no connections, so the relay creates sessions. A *session* is a client,
//! the address that it has sent to, and a socket of its own that is connected to the backend. What
//! the backend sends to that socket goes back to the client, from the address that the client has
//! sent to. A connected socket receives from its peer only.
//!
//! A datagram passes whole, or is dropped and counted. A session holds a few datagrams while its
//! backend starts, or while its socket to the backend is full. No session waits for another.
//!
//! One task on the main thread's event loop serves all sessions. Its sockets are in an epoll(7) set
//! of their own, edge-triggered. The task works in turns. A turn calls epoll_wait(2) once, whatever
//! the number of sessions that have answers. A session needs no task of its own. System calls:
//!
//! - One recvmmsg(2) receives up to 32 datagrams, of any clients.
//! - One sendmmsg(2) sends what a session has of these 32.
//! - One recvmmsg(2) receives the answers of a session. If it returns fewer datagrams than it had
//!   room for, the queue is empty, and no second call follows.
//! - One sendmmsg(2) on the listener sends up to 32 answers, of all sessions of a turn.
//!
//! Segments that the kernel has merged (UDP_GRO) stay one buffer on their way, and are sent as one
//! (UDP_SEGMENT).

mod turn;
pub mod relay;
pub mod begin;
mod to_backends;
mod to_clients;
mod opening;
mod backend;
pub mod session;
mod stored;
mod sender;
mod held;
mod table;
