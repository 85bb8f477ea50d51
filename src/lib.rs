//! A listening socket from systemd, or one opened here, and each connection on it carried to a TCP
//! or Unix backend by splice(2).
//!
//! # The map
//!
//! Values move forward by ownership, in the order in which a connection lives; no stage calls back
//! into an earlier one:
//!
//! ```text
//! Inherited -> Listener -> Newcomer -> + Permit -> Client -> + backend -> + header -> Pair -> Closed
//! activation   listen      listen, or  admission   worker    backend      proxy_header forward, flow
//!   or open                connected                         hold, dial                pipe, quiet
//! ```
//!
//! With `--handover=` a connection that leaves its process goes on in the next one:
//!
//! ```text
//! Pair  -> Left      -> Parcel -> Queue, which systemd keeps -> Parcel   -> Returning -> Pair
//! orders   connection   parcel    ledger, queue, store         recovery    takeover     keep
//! ```
//!
//! Two functions know the order: [`service::run`], the life of the process, and
//! [`connection::serve`], the life of a connection. Beside them COMMAND has a life of its own,
//! [`application::Application::live`]; a connection only waits for its phases.
//!
//! The modules below stand in that order: what the command line says, the process, a connection on
//! its way, and what all of them lean on. The leaves ([`timespan`], [`address`], [`target`],
//! [`proxy_header`], [`pipe`], [`activation`]) know nothing of the product.
//!
//! - Parsing ends in [`cli`]: after a [`cli::Config`] exists no string is interpreted again.
//! - Counting is dropping: a [`admission::Permit`] lives from accept to close, and the idle timers
//!   and `STATUS=` wait for the count.
//! - The main thread accepts, and serves; with `--threads=` others serve, too. From [`worker`] on
//!   nothing of a connection leaves its thread.
//! - A [`socket::Socket`] that is dropped instead of closed is reset: whatever ends a connection
//!   early (a signal, a panic), its peers don't take it for whole.
//! - Unsafe code stands in [`socket`], `sys`, [`activation`] and [`dispositions`], and in the one call of
//!   the latter in `main`.

#[cfg(not(target_os = "linux"))]
compile_error!("socket-proxyd needs Linux: splice(2), epoll(7) and systemd");

// What the command line says.
pub mod cli;
pub mod getopt;
pub mod options;
pub mod values;
pub mod selector;
pub mod target;
pub mod listen_address;
pub mod host_port;
pub mod timespan;
pub mod command;

// The life of the process.
pub mod service;
pub mod sockets;
pub mod dispositions;
pub mod signals;
pub mod drain;
mod status;
pub mod takeover;

// The life of COMMAND.
pub mod application;
pub mod phase;
pub mod ready;
pub mod run;
pub mod guard;

// The life of a connection.
pub mod activation;
pub mod open;
pub mod listen;
mod stored_listener;
pub mod connected;
pub mod admission;
pub mod slot;
pub mod worker;
pub mod connection;
pub mod backend;
pub mod hold;
pub mod dial;
pub mod resolve;
pub mod proxy_header;
pub mod forward;
pub mod flow;
pub mod pipe;
mod turns;
pub mod snapshot;
pub mod quiet;
pub mod roster;
pub mod orders;
pub mod socket;
mod sys;

// What outlives the process.
pub mod keep;
pub mod handover;
pub mod recovery;
pub mod ledger;
pub mod parcel;
pub mod queue;
pub mod store;

// The unit writer, a program of its own.
pub mod units;

// What is seen from outside.
pub mod scrape;
pub mod metrics;
pub mod exposition;
pub mod statistics;

// What they lean on.
pub mod address;
pub mod bytes;
pub mod descriptors;
pub mod idle;
pub mod logging;
pub mod notify;
mod runtime;
