//! Time spans as in systemd.time(7): `5min 20s`, `1.5`, `infinity`.
//!
//! No library parses them exactly as systemd does, which truncates each decimal of a fraction by
//! itself, and refuses `3.s` and `+.5`. A text must mean the same time to both, to the microsecond.

use std::cmp::Ordering;
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use tokio::time::Instant;

/// A time span, in whole microseconds as systemd keeps it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TimeSpan(Option<Duration>);

const WHITE_SPACE: [char; 4] = [' ', '\t', '\n', '\r'];

const SECOND: u64 = 1_000_000;
const MINUTE: u64 = 60 * SECOND;
const HOUR: u64 = 60 * MINUTE;
const DAY: u64 = 24 * HOUR;
/// 365.25 days.
const YEAR: u64 = 31_557_600 * SECOND;
const MONTH: u64 = YEAR / 12;

/// The deadline of an infinite span: so far in the future.
const FOREVER: Duration = Duration::from_secs(100 * 365 * 24 * 60 * 60);

/// The names of each unit, the printed name first. When parsed, the longest name that matches
/// counts.
const UNITS: [(&[&str], u64); 9] = [
    (&["y", "year", "years"], YEAR),
    (&["month", "months", "M"], MONTH),
    (&["w", "week", "weeks"], 7 * DAY),
    (&["d", "day", "days"], DAY),
    (&["h", "hr", "hour", "hours"], HOUR),
    (&["min", "minute", "minutes", "m"], MINUTE),
    (&["s", "sec", "second", "seconds"], SECOND),
    (&["ms", "msec"], 1000),
    (&["us", "usec", "µs"], 1),
];

impl TimeSpan {
    pub const ZERO: Self = Self(Some(Duration::ZERO));
    pub const INFINITY: Self = Self(None);

    /// Creates a finite span.
    pub const fn new(span: Duration) -> Self {
        Self(Some(span))
    }

    /// Shortens a duration for a message: to milliseconds within a second, to seconds within an
    /// hour, to minutes within a day.
    pub fn rounded(span: Duration) -> Self {
        let seconds = span.as_secs();
        if seconds == 0 {
            return Self::new(Duration::from_millis(span.as_millis().max(1) as u64));
        }
        let accuracy = match seconds {
            0..3600 => 1,
            3600..86_400 => 60,
            _ => 3600,
        };
        Self::new(Duration::from_secs(seconds / accuracy * accuracy))
    }

    /// Whether the span is zero.
    pub fn is_zero(self) -> bool {
        self == Self::ZERO
    }

    /// Returns when the span is over, if it begins now.
    pub fn deadline(self) -> Instant {
        self.after(Instant::now())
    }

    /// Returns when the span is over, if it begins at `start`.
    pub fn after(self, start: Instant) -> Instant {
        start + self.0.unwrap_or(FOREVER).min(FOREVER)
    }

    /// Returns the duration, or `None` for infinity.
    pub const fn finite(self) -> Option<Duration> {
        self.0
    }
}

/// Infinity is the longest.
impl Ord for TimeSpan {
    fn cmp(&self, other: &Self) -> Ordering {
        let length = |span: &Self| span.0.unwrap_or(Duration::MAX);
        length(self).cmp(&length(other))
    }
}

impl PartialOrd for TimeSpan {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

/// Parses a time span. A number without a unit is in seconds. Fails where systemd refuses it.
impl FromStr for TimeSpan {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        // U+03BC, the Greek letter, stands for U+00B5, the sign, as people type either.
        let text = text.replace('\u{3bc}', "\u{b5}");
        let text = text.trim_matches(WHITE_SPACE);
        if text == "infinity" {
            return Ok(Self::INFINITY);
        }
        let micros = parse_micros(text).ok_or("it is not a time span (30s, 5min 20s, infinity)")?;
        Ok(Self::new(Duration::from_micros(micros)))
    }
}

/// As systemd prints it: `1min 30s`, `1.5s`, `100ms`.
impl fmt::Display for TimeSpan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(span) = self.0 else { return f.write_str("infinity") };
        let mut rest = span.as_micros() as u64;
        if rest == 0 {
            return f.write_str("0");
        }
        let mut separator = "";
        for (names, unit) in UNITS {
            let name = names[0];
            let (count, remainder) = (rest / unit, rest % unit);
            match count {
                0 => continue,
                _ if rest < MINUTE && remainder > 0 => {
                    let digits = unit.ilog10() as usize;
                    let fraction = format!("{remainder:0digits$}");
                    let fraction = fraction.trim_end_matches('0');
                    return write!(f, "{separator}{count}.{fraction}{name}");
                }
                _ => write!(f, "{separator}{count}{name}")?,
            }
            separator = " ";
            rest = remainder;
        }
        Ok(())
    }
}

fn parse_micros(text: &str) -> Option<u64> {
    let (mut micros, mut rest) = parse_part(text)?;
    while !rest.is_empty() {
        let (part, behind) = parse_part(rest)?;
        micros = add(micros, part)?;
        rest = behind;
    }
    Some(micros)
}

/// Parses one number with its fraction and unit. Returns the microseconds and the rest of the text.
fn parse_part(text: &str) -> Option<(u64, &str)> {
    // strtoll(3), which systemd calls, skips more white space than systemd itself.
    let number = text.trim_start_matches([' ', '\t', '\n', '\r', '\x0b', '\x0c']);
    let (whole, rest) = digits(number.strip_prefix('+').unwrap_or(number));
    let (fraction, rest) = rest.strip_prefix('.').map_or(("0", rest), digits);
    // systemd reads `.5`, but neither `+.5` nor `3.`.
    if fraction.is_empty() || (whole.is_empty() && !text.starts_with('.')) {
        return None;
    }
    let behind = rest.trim_start_matches(WHITE_SPACE);
    let names = UNITS.iter().flat_map(|(names, unit)| names.iter().map(|name| (name, *unit)));
    let (unit, behind) = names
        .filter_map(|(name, unit)| Some((unit, behind.strip_prefix(name)?)))
        .min_by_key(|(_, behind)| behind.len())
        .unwrap_or((SECOND, behind));
    // A unit or white space must separate two numbers: `12.34.56` is not a time span.
    if behind.len() == rest.len() && !rest.is_empty() {
        return None;
    }
    // systemd parses the number as a signed one of 64 bits, and refuses more.
    let whole = if whole.is_empty() { 0 } else { whole.parse::<i64>().ok()?.unsigned_abs() };
    if whole >= u64::MAX / unit {
        return None;
    }
    let mut micros = whole * unit;
    let mut decimal = unit / 10;
    for digit in fraction.bytes() {
        micros = add(micros, u64::from(digit - b'0') * decimal)?;
        decimal /= 10;
    }
    Some((micros, behind.trim_start_matches(WHITE_SPACE)))
}

fn digits(text: &str) -> (&str, &str) {
    text.split_at(text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len()))
}

/// Refuses the largest sum, which stands for infinity in systemd.
fn add(a: u64, b: u64) -> Option<u64> {
    a.checked_add(b).filter(|&sum| sum < u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn micros(text: &str) -> Option<u128> {
        let span = text.parse::<TimeSpan>().ok();
        span.map(|span| span.finite().map_or(u128::MAX, |span| span.as_micros()))
    }

    #[test]
    fn prints_as_systemd_does() {
        for text in
            ["0", "10min", "1min 30s", "1.5s", "100ms", "2h 3min 4.05s", "1w 3d", "5us", "infinity"]
        {
            assert_eq!(text.parse::<TimeSpan>().unwrap().to_string(), text);
        }
        assert_eq!("600".parse::<TimeSpan>().unwrap().to_string(), "10min");
        let rounded = |seconds| TimeSpan::rounded(Duration::from_secs_f64(seconds)).to_string();
        assert_eq!(rounded(0.000_001), "1ms");
        assert_eq!(rounded(0.0125), "12ms");
        assert_eq!(rounded(184.5), "3min 4s");
        assert_eq!(rounded(7300.0), "2h 1min");
        assert_eq!(rounded(93_600.0 + 120.0), "1d 2h");
    }

    // tests/systemd/drop_in.rs holds the same function against `systemd-analyze timespan`.
    #[test]
    fn parses_as_systemd_does() {
        for (text, expected) in [
            ("5", 5_000_000),
            ("1.5", 1_500_000),
            ("5min 20s", 320_000_000),
            ("1M", 2_629_800_000_000),
            ("10us", 10),
            ("10\u{3bc}s", 10),
            (" 3 s ", 3_000_000),
            (".5s", 500_000),
            ("5 .5", 5_500_000),
            ("5s500ms", 5_500_000),
            ("0.123456789min", 7_407_402),
            ("0", 0),
            ("9223372036854775807us", i64::MAX as u128),
            (" infinity ", u128::MAX),
            ("5s\n\x0c3s", 8_000_000),
        ] {
            assert_eq!(micros(text), Some(expected), "{text:?}");
        }
        for text in [
            "",
            " ",
            "foo",
            "-5s",
            "s",
            "5 parsecs",
            "3.s",
            "3.",
            "12.34.56",
            "+.5",
            "\x0c.5",
            "5mins",
            "infinity 3s",
            "3s infinity",
            "9223372036854775808us",
            "584542years",
        ] {
            assert_eq!(micros(text), None, "{text:?}");
        }
    }
}
