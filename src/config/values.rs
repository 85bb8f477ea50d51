//! The values of options: enums, and parsers for values that have no type of their own.

use std::ffi::OsStr;
use std::num::{NonZeroU32, NonZeroUsize};
use std::str::FromStr;
use std::time::Duration;

use clap::builder::{PossibleValue, StringValueParser, TypedValueParser};
use clap::{Arg, Command, Error, ValueEnum};
use hyper::Uri;

use crate::config::command::CommandLine;
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

/// Parses how long a session may be idle. It has no other end.
pub fn session_idle_time(text: &str) -> Result<Duration, String> {
    positive(text)?.finite().ok_or_else(|| "it must be a time, not infinity".into())
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
    let text = text.trim_start_matches([' ', '\t', '\n', '\r', '\x0b', '\x0c']);
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

/// When a connection starts to count as in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum WakeOn {
    /// From accept on.
    Connect,
    /// From its first byte on.
    Data,
}

/// What open connections survive.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum HandoverMode {
    Never,
    /// A stop of the process.
    Restart,
    /// Any end of the process, SIGKILL included.
    Crash,
}

/// The address that connections and sessions come to the backend from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum SourceMode {
    /// The proxy's.
    Proxy,
    /// The client's IP address.
    Client,
}

/// How COMMAND says that it is busy without a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum BusyMode {
    /// Not at all.
    No,
    /// By notifications.
    Notify,
}

/// When the backend counts as ready.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ReadyMode {
    /// TARGET accepts a connection.
    Connect,
    /// COMMAND sends `READY=1`.
    Notify,
    /// A GET of this path is answered with a status of 2xx or 3xx.
    Http(Uri),
    /// This command exits with 0.
    Exec(CommandLine),
}

impl FromStr for ReadyMode {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            None if text == "connect" => Ok(Self::Connect),
            None if text == "notify" => Ok(Self::Notify),
            Some(("http", path)) if !path.starts_with('/') => Err("PATH must begin with /".into()),
            Some(("http", path)) => {
                path.parse().map(Self::Http).map_err(|error| format!("PATH is not valid: {error}"))
            }
            Some(("exec", line)) => CommandLine::split(line).map(Self::Exec),
            _ => Err("it is not connect, notify, http:PATH or exec:LINE".into()),
        }
    }
}

/// Parses a [`ReadyMode`]. The completions list how each begins.
#[derive(Clone)]
pub struct ReadyParser;

impl TypedValueParser for ReadyParser {
    type Value = ReadyMode;

    fn parse_ref(
        &self,
        command: &Command,
        arg: Option<&Arg>,
        value: &OsStr,
    ) -> Result<ReadyMode, Error> {
        let parser = StringValueParser::new().try_map(|text| text.parse::<ReadyMode>());
        parser.parse_ref(command, arg, value)
    }

    fn possible_values(&self) -> Option<Box<dyn Iterator<Item = PossibleValue> + '_>> {
        let values = ["connect", "notify", "http:/", "exec:"];
        Some(Box::new(values.into_iter().map(PossibleValue::new)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn readiness_is_a_word_a_path_or_a_line() {
        let parse = |text: &str| text.parse::<ReadyMode>();
        assert_eq!(parse("connect"), Ok(ReadyMode::Connect));
        assert_eq!(parse("notify"), Ok(ReadyMode::Notify));
        assert_eq!(parse("http:/a?b=c:d"), Ok(ReadyMode::Http(Uri::from_static("/a?b=c:d"))));
        let words = ["sh", "-c", "exit 0"].map(Into::into).to_vec();
        assert_eq!(parse("exec:sh -c 'exit 0'"), Ok(ReadyMode::Exec(CommandLine { words })));
        for (text, why) in [
            ("http:x", "PATH must begin with /"),
            ("http:", "PATH must begin with /"),
            ("http:/a b", "PATH is not valid: invalid uri character"),
            ("exec:", "it names no program"),
            ("exec:sh '", "a quote is not closed, or the line ends in a backslash"),
            ("maybe", "it is not connect, notify, http:PATH or exec:LINE"),
            ("connect:", "it is not connect, notify, http:PATH or exec:LINE"),
        ] {
            assert_eq!(parse(text), Err(why.into()), "{text}");
        }
    }

    #[test]
    fn parses_numbers_as_systemd_does() {
        for (text, number) in [
            ("0x10", Some(16)),
            ("010", Some(8)),
            ("0o17", Some(15)),
            ("0b101", Some(5)),
            ("+5", Some(5)),
            (" 5", Some(5)),
            ("\n\x0c5", Some(5)),
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
