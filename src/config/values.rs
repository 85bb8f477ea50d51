//! The values of options: enums, and parsers for values that have no type of their own.

use std::num::{NonZeroU32, NonZeroUsize};

use clap::ValueEnum;

use crate::config::timespan::TimeSpan;
use crate::socket::Keepalive;

/// More than most machines have processors. Each thread costs four descriptors and a stack.
const THREADS_MAX: u32 = 256;

pub fn connections_max(text: &str) -> Result<NonZeroU32, String> {
    let count = parse_unsigned(text).ok_or("it is not a number from 1 to 4294967295")?;
    NonZeroU32::new(count).ok_or_else(|| "Connection limit is too low.".into())
}

/// Parses a time span above zero.
pub fn positive(text: &str) -> Result<TimeSpan, String> {
    let span: TimeSpan = text.parse()?;
    if span.is_zero() { Err("it must be more than 0, or infinity".into()) } else { Ok(span) }
}

pub fn keepalive(text: &str) -> Result<TimeSpan, String> {
    let span = positive(text)?;
    if span.finite().is_some_and(|time| time > Keepalive::MAX) {
        let max = TimeSpan::new(Keepalive::MAX);
        return Err(format!("it must be at most {max}, or infinity"));
    }
    Ok(span)
}

pub fn threads(text: &str) -> Result<NonZeroUsize, String> {
    let count = parse_unsigned(text).filter(|count| *count <= THREADS_MAX);
    let count = count.and_then(|count| NonZeroUsize::new(count as usize));
    count.ok_or_else(|| format!("it is not a number from 1 to {THREADS_MAX}"))
}

/// Parses a number as systemd's `safe_atou` does: with leading white space, a plus sign, and the
/// base that `0x`, `0o`, `0b` or a leading zero names.
fn parse_unsigned(text: &str) -> Option<u32> {
    let text = text.trim_start_matches([' ', '\t', '\n', '\r']);
    let (negative, text) = match text.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, text.strip_prefix('+').unwrap_or(text)),
    };
    let (digits, radix) = match text.as_bytes() {
        [b'0', b'x' | b'X', ..] => (&text[2..], 16),
        [b'0', b'o' | b'O', ..] => (&text[2..], 8),
        [b'0', b'b' | b'B', ..] => (&text[2..], 2),
        [b'0', _, ..] => (&text[1..], 8),
        _ => (text, 10),
    };
    // from_str_radix() would accept another sign here.
    if !digits.chars().all(|digit| digit.is_digit(radix)) {
        return None;
    }
    u32::from_str_radix(digits, radix).ok().filter(|number| !negative || *number == 0)
}

/// What happens to clients above the connection limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Overflow {
    /// Accept and close them.
    Refuse,
    /// Leave them queued in the kernel until a connection ends.
    Wait,
}

/// From when on a connection is in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum WakeOn {
    /// From accept on.
    Connect,
    /// From its first byte on.
    Data,
}

/// Which ends of the process open connections survive.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum HandoverMode {
    Never,
    /// A stop.
    Restart,
    /// Any end, SIGKILL included.
    Crash,
}

/// When COMMAND counts as ready.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ReadyMode {
    /// TARGET accepts a connection.
    Connect,
    /// COMMAND sends `READY=1`.
    Notify,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parses_numbers_as_systemd_does() {
        for (text, number) in [
            ("0x10", Some(16)),
            ("010", Some(8)),
            ("0o17", Some(15)),
            ("0b101", Some(5)),
            ("+5", Some(5)),
            (" 5", Some(5)),
            ("4294967295", Some(u32::MAX)),
            ("4294967296", None),
            ("-1", None),
            ("-0", Some(0)),
            ("", None),
            ("5 ", None),
            ("09", None),
            ("+-5", None),
            ("0x", None),
        ] {
            assert_eq!(parse_unsigned(text), number, "{text:?}");
        }
    }
}
