//! Datagrams: sessions, their ends and limits, and a backend on demand.

#[path = "../support/mod.rs"]
mod support;

mod peers;

mod demand;
mod end;
mod handover;
mod limits;
mod programs;
mod quic;
mod sessions;
mod source;
mod start;
mod traffic;
