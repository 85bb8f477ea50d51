//! The proxy, one option or one promise a module. What the originals have as well is in tests/compat/.

#[path = "../support/mod.rs"]
mod support;

mod application;

mod accept_yes;
mod attempts;
mod command;
mod descriptors;
mod diagnostics;
mod drain;
mod freeze;
mod guard;
mod idle_time;
mod keepalive;
mod listen;
mod logging;
mod metrics;
mod notifications;
mod passive;
mod programs;
mod proxy_protocol;
mod ready;
mod selectors;
mod source;
mod sources;
mod start_command;
mod syscalls;
mod threads;
mod unix_peers;
mod urgent;
mod wake_on;
