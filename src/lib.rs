//! A proxy from listening sockets, passed by systemd or opened here, to TCP, Unix and vsock
//! backends.
//!
//! # The map
//!
//! A connection passes from one folder to the next by ownership. No stage calls back into an
//! earlier one.
//!
//! ```text
//! listen          a Listener accepts a client                      -> Accepted
//! limits          the client gets a Slot, which counts it
//! connection      an event loop serves it: connect, header, forward, log
//! backend         a Connector reaches TARGET, or a client waits    -> Socket
//! socket          the PROXY header (socket::proxy_protocol)        -> bytes
//! forward         a Forwarder moves bytes until both sides end     -> closed, or Detached
//! handover        a Detached connection becomes a record in the journal (what is stored:
//!                 forward::snapshot; its bytes: handover::encoding)
//! ```
//!
//! Datagrams have no connections. The relay of [`datagram`] makes sessions up, with the same
//! limits, backends and handover:
//!
//! ```text
//! listen::datagram   a bound socket
//! datagram::begin    a datagram belongs to a session, or begins one with a Slot
//! datagram::opening  the session gets a socket to its backend, or holds datagrams
//! datagram           to_backends and to_clients carry datagrams, in batches (socket::mmsg)
//! ```
//!
//! With `--handover=` the next process replays the journal, and each record becomes a forwarder
//! again.
//!
//! The list of modules below has the order of imports: a module imports only modules that stand
//! below it.
//!
//! - Three modules define the order of things: the life of the process ([`service`]), the life of
//!   a connection ([`connection`]) and that of a session ([`datagram`]).
//! - A backend that the proxy starts has a life of its own ([`backend::lifecycle`]); a connection
//!   only waits for its states.
//! - Parsing ends in [`config`]: once a [`config::Config`] exists, no string is interpreted again.
//!   [`config::options`] has each option with its default.
//! - Dropping a [`limits::slot::Slot`] decrements every count of a connection. It lives from accept
//!   to close, and everything that waits for connections to end watches the count.
//! - [`metrics`] has the names of all metrics; `metrics::exporter` is the HTTP server.
//! - The main thread accepts and serves. With `--threads=` other threads serve as well. Once its
//!   task is spawned, a connection stays on its event loop. One more thread closes descriptors
//!   that were passed ([`limits::passed`]).
//! - A [`socket::Socket`] that is dropped instead of closed is reset: a connection cut short by a
//!   signal or a panic must not look complete to its peers.
//! - `fuzz` has a target for each reader of foreign bytes. It is not part of the programs.
//! - Unsafe code is confined to [`socket::sys`], [`socket::mmsg`], `socket::passed_fds`,
//!   [`listen::activation`] and [`runtime::dispositions`], and to one call in `main`, which
//!   [`service::program`] passes on.

#![deny(unsafe_code)]

#[cfg(not(target_os = "linux"))]
compile_error!("socket-proxyd needs Linux: splice(2), epoll(7) and systemd");

// Fuzz targets, which neither program contains.
#[cfg(any(test, fuzzing))]
mod fuzz;

// The two programs.
mod service;
mod unit_writer;

// The life of a connection, and of a session.
mod metrics;
mod datagram;
mod connection;
mod handover;
mod backend;
mod listen;
mod forward;
mod limits;

// Shared foundations.
mod notify;
mod config;
mod counters;
mod runtime;
mod socket;
mod logging;

pub use service::program::run;
pub use unit_writer::run as write_units;

#[cfg(fuzzing)]
pub mod fuzzing {
    //! What `fuzz/` runs.
    pub use crate::fuzz::*;
    pub use crate::notify::watchdog_interval;
}

#[doc(hidden)]
pub mod testing {
    //! What the tests of the forwarder and of the journal look into, and what simulations run.
    pub use crate::backend::command::guard_client::{
        Event, FREEZE, GuardProcess, STOP, StartGuard, THAW, start_guard,
    };
    pub use crate::config::Config;
    pub use crate::config::parser::Request;
    pub use crate::config::timespan::TimeSpan;
    pub use crate::counters::{ByteCounters, Gauge};
    pub use crate::forward::loop_buffers::LoopBuffers;
    pub use crate::forward::pipe::PipeLimits;
    pub use crate::forward::registry::Registry;
    pub use crate::forward::{CloseReason, Forwarder, Outcome, Progress, Summary};
    pub use crate::handover::encoding::{Record, RecordBody, encode_message, record_ids};
    pub use crate::handover::queue::Queue;
    pub use crate::handover::replay::replay;
    pub use crate::limits::passed::{PassedLimits, PassedRoom};
    pub use crate::listen::activation::{PassedFd, take_passed_fds};
    pub use crate::notify::Notifier;
    pub use crate::service::{Signals, start_and_serve};
    pub use crate::socket::{Family, Socket};
}
