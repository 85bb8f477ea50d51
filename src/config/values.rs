//! What an option may be given: each value read and checked, or refused in one line that names the
//! option, the value, and what is taken instead.

use std::ffi::OsStr;
use std::num::{NonZeroU32, NonZeroUsize};
use std::time::Duration;

use crate::config::listen_address::{ListenAddress, MetricsAddress};
use crate::config::timespan::TimeSpan;
use crate::logging::LogLevel;
use crate::proxy_protocol::ProxyProtocol;
use crate::socket::Keepalive;

/// More than there are processors in most machines; each costs four descriptors and a stack.
const THREADS_MAX: u32 = 256;

pub fn listen(text: &OsStr) -> Result<ListenAddress, String> {
    ListenAddress::parse(text)
        .map_err(|error| format!("Invalid --listen={}: {error}.", text.display()))
}

pub fn connections_max(text: &str) -> Result<NonZeroU32, String> {
    let count = parse_unsigned(text).ok_or_else(|| failed("connections-max", text))?;
    NonZeroU32::new(count).ok_or_else(|| "Connection limit is too low.".into())
}

pub fn overflow(text: &str) -> Result<Overflow, String> {
    Overflow::parse(text).ok_or_else(|| failed("overflow", text) + " (refuse or wait)")
}

pub fn span(option: &str, text: &str) -> Result<TimeSpan, String> {
    TimeSpan::parse(text).ok_or_else(|| failed(option, text) + " (30s, 5min 20s, infinity)")
}

/// A time span longer than nothing.
pub fn positive(option: &str, text: &str) -> Result<TimeSpan, String> {
    let span = span(option, text)?;
    if span.is_zero() {
        return Err(failed(option, text) + " (more than 0, or infinity)");
    }
    Ok(span)
}

pub fn keepalive(text: &str) -> Result<TimeSpan, String> {
    let span = span("keepalive", text)?;
    let is_taken = |time: Duration| !time.is_zero() && time <= Keepalive::MAX;
    match span.finite() {
        Some(time) if !is_taken(time) => {
            let max = TimeSpan::new(Keepalive::MAX);
            Err(failed("keepalive", text) + &format!(" (more than 0, up to {max}, or infinity)"))
        }
        _ => Ok(span),
    }
}

pub fn handover(text: &str) -> Result<Option<HandoverMode>, String> {
    HandoverMode::parse(text).ok_or_else(|| failed("handover", text) + " (never, restart or crash)")
}

pub fn proxy_protocol(text: &str) -> Result<ProxyProtocol, String> {
    ProxyProtocol::parse(text).ok_or_else(|| failed("proxy-protocol", text) + " (v1 or v2)")
}

pub fn ready(text: &str) -> Result<ReadyMode, String> {
    ReadyMode::parse(text).ok_or_else(|| failed("ready", text) + " (connect or notify)")
}

pub fn threads(text: &str) -> Result<NonZeroUsize, String> {
    let count = parse_unsigned(text).filter(|count| *count <= THREADS_MAX);
    count
        .and_then(|count| NonZeroUsize::new(count as usize))
        .ok_or_else(|| failed("threads", text) + &format!(" (1 to {THREADS_MAX})"))
}

pub fn metrics(text: &OsStr) -> Result<MetricsAddress, String> {
    MetricsAddress::parse(text)
        .map_err(|error| format!("Invalid --metrics={}: {error}.", text.display()))
}

pub fn log_level(text: &str) -> Result<LogLevel, String> {
    let levels = " (err, warning, notice, info or debug)";
    LogLevel::parse(text).ok_or_else(|| failed("log-level", text) + levels)
}

fn failed(option: &str, value: &str) -> String {
    format!("Failed to parse --{option}= argument: {value}")
}

/// A number as systemd's `safe_atou` reads it: leading white space, a plus sign, and the bases
/// that `0x`, `0o`, `0b` and a leading zero name.
fn parse_unsigned(text: &str) -> Option<u32> {
    let text = text.trim_start_matches([' ', '\t', '\n', '\r']);
    let (negative, text) = match text.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, text.strip_prefix('+').unwrap_or(text)),
    };
    let base = |prefix: [&str; 2]| prefix.iter().find_map(|prefix| text.strip_prefix(prefix));
    let (digits, radix) = if let Some(digits) = base(["0x", "0X"]) {
        (digits, 16)
    } else if let Some(digits) = base(["0o", "0O"]) {
        (digits, 8)
    } else if let Some(digits) = base(["0b", "0B"]) {
        (digits, 2)
    } else if text.len() > 1 && text.starts_with('0') {
        (&text[1..], 8)
    } else {
        (text, 10)
    };
    // from_str_radix would take another sign here.
    if !digits.chars().all(|digit| digit.is_digit(radix)) {
        return None;
    }
    u32::from_str_radix(digits, radix).ok().filter(|number| !negative || *number == 0)
}

/// What happens to clients above the connection limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Overflow {
    /// They are accepted and closed.
    Refuse,
    /// They stay queued in the kernel, and are accepted in order as others leave.
    Wait,
}

impl Overflow {
    /// Reads the value of `--overflow=`.
    pub fn parse(text: &str) -> Option<Self> {
        match text {
            "refuse" => Some(Self::Refuse),
            "wait" => Some(Self::Wait),
            _ => None,
        }
    }
}

/// What open connections survive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HandoverMode {
    /// A stop of the process.
    Restart,
    /// Any end of the process.
    Crash,
}

impl HandoverMode {
    /// Reads the value of `--handover=`; `Some(None)` is `never`.
    pub fn parse(text: &str) -> Option<Option<Self>> {
        match text {
            "never" => Some(None),
            "restart" => Some(Some(Self::Restart)),
            "crash" => Some(Some(Self::Crash)),
            _ => None,
        }
    }
}

/// When COMMAND counts as ready.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReadyMode {
    /// When TARGET accepts a connection.
    Connect,
    /// When it sends `READY=1`.
    Notify,
}

impl ReadyMode {
    /// Reads the value of `--ready=`.
    pub fn parse(text: &str) -> Option<Self> {
        match text {
            "connect" => Some(Self::Connect),
            "notify" => Some(Self::Notify),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_read_as_systemd_reads_them() {
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
