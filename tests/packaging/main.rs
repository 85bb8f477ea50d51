//! What is installed, what it is linked with, the units that `socket-proxyd-units` writes, and the NixOS
//! module.

#[path = "../support/mod.rs"]
mod support;

mod install;
mod linking;
mod nixos;
mod unit_writer;
