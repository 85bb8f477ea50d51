//! Time spans and numbers.

use std::num::NonZeroU32;
use std::time::Duration;

use tokio::time::Instant;

use crate::config::timespan::TimeSpan;
use crate::config::values::connections_max;

/// 584542 years, 16 days less than the largest number of microseconds.
pub const LONGEST: Duration = Duration::from_secs(584_542 * 31_557_600);

/// A time span that is printed is read as the same one.
pub fn time_span(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let parsed = text.parse::<TimeSpan>();
    assert_eq!(format!("\t{text} ").parse(), parsed);
    let Ok(span) = parsed else { return };
    // systemd refuses so many years in one number, and so they cannot be read as they are printed.
    let is_longest = span.finite().is_some_and(|time| time >= LONGEST);
    assert!(is_longest || span.to_string().parse() == Ok(span));
    assert!(span <= TimeSpan::INFINITY);
    let now = Instant::now();
    assert!(span.after(now) >= now);
    if let Some(time) = span.finite() {
        // systemd keeps microseconds in 64 bits. The largest number stands for infinity.
        assert!(time < Duration::from_micros(u64::MAX));
        assert!(TimeSpan::rounded(time) <= span.max(TimeSpan::new(Duration::from_millis(1))));
    }
}

/// A number that is printed is read as the same one.
pub fn number(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    if let Some(number) = connections(text) {
        assert_eq!(connections(&number.to_string()), Some(number));
        assert_eq!(connections(&format!("0x{number:x}")), Some(number));
    }
}

/// Returns the value of `--connections-max=`, or `None` if it is refused.
pub fn connections(text: &str) -> Option<u32> {
    connections_max(text).ok().map(NonZeroU32::get)
}
