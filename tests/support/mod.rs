//! What the test crates share: sockets, the program under test, a fake systemd.
#![allow(dead_code, unreachable_pub, unused_imports, reason = "each test crate uses its own part")]

pub mod descriptors;
mod fake_systemd;
pub mod floods;
mod metrics;
mod network;
mod process;
mod sockets;
pub mod stream;
mod trials;
pub mod urgent;
mod wait;

pub use fake_systemd::FakeSystemd;
pub use metrics::{metrics_address, scrape};
pub use network::{CLIENTS, ClientNetwork, HOST, NetworkNamespace, clients_of, inside};
pub use process::{Launch, Lines, Running, raise_descriptor_limit, run};
pub use sockets::*;
pub use trials::{Trials, are_installed_for, is_root_for, linux_is_before, skip};
pub use wait::*;

/// The program under test.
pub const OURS: &str = env!("CARGO_BIN_EXE_socket-proxyd");

/// The unit writer under test.
pub const UNIT_WRITER: &str = env!("CARGO_BIN_EXE_socket-proxyd-units");

/// The checkout.
pub const ROOT: &str = env!("CARGO_MANIFEST_DIR");

/// What tests/root puts into its root: the newest systemd-socket-proxyd, and a small Debian.
pub const NEWEST_ORIGINAL: &str = "/opt/newest-original/systemd-socket-proxyd";
pub const FRESH_DEBIAN: &str = "/opt/fresh-debian.tar";

/// An application for COMMAND; says what it takes.
pub const APP: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/support/app.pl");
