//! Fuzz targets: a function for each reader of foreign bytes, which asserts what holds for any
//! bytes.
//!
//! `fuzz/` runs them with libFuzzer. `cargo test` runs them for a moment, on the inputs of
//! `fuzz/corpus` and on mutations of these. A target parses and never connects.

mod command_line;
mod spans;
mod sockets;
mod http;
mod notifications;
mod stored;
mod units;

#[cfg(test)]
mod corpus;

pub use command_line::{command_line, passive_from, selectors};
pub use http::{backend_answer, metrics_request};
pub use notifications::notification;
pub use sockets::{addresses, control_messages, session_keys, socket_address};
#[cfg(fuzzing)]
pub use spans::{LONGEST, connections};
pub use spans::{number, time_span};
pub use stored::{stored_message, stored_queue};
#[cfg(fuzzing)]
pub use units::UnitReader;
pub use units::{PLAIN, exec_words, unit_writer};

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;

/// Splits an input into words: at each NUL, which no argument contains, or else at each newline.
fn words(bytes: &[u8]) -> Vec<OsString> {
    let separator = if bytes.contains(&0) { 0 } else { b'\n' };
    let bytes = bytes.strip_suffix(&[separator]).unwrap_or(bytes);
    bytes.split(|byte| *byte == separator).map(|word| OsString::from_vec(word.into())).collect()
}

/// Asserts that a message says something.
fn assert_is_message(message: &str) {
    assert!(!message.trim().is_empty(), "{message:?}");
}
