//! What is installed, what it is linked with, and the units that `socket-proxyd-units` writes.

#[path = "../support/mod.rs"]
mod support;

mod install;
mod linking;
mod unit_writer;
