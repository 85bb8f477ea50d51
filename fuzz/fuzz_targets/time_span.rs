#![no_main]

use std::time::Duration;

use socket_proxyd::fuzzing::{LONGEST, time_span};
use socket_proxyd::testing::TimeSpan;

// systemd reads the same, and each reads what the other prints.
libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    time_span(bytes);
    let Ok(text) = str::from_utf8(bytes) else { return };
    // systemd reads the sign of micro in one form only. It refuses a dash, but not between a form
    // feed and a 0.
    if text.contains(['\0', '\u{3bc}', '-']) {
        return;
    }
    let span = text.parse::<TimeSpan>().ok();
    let micros = |span: Duration| span.as_micros() as u64;
    let ours = span.map(|span| span.finite().map_or(u64::MAX, micros));
    assert_eq!(ours, systemd::time_span(text));
    if let (Some(span), Some(micros)) = (span, ours) {
        if span.finite().is_none_or(|time| time < LONGEST) {
            assert_eq!(systemd::time_span(&span.to_string()), Some(micros));
            assert_eq!(systemd::printed_time_span(micros).parse(), Ok(span));
        }
    }
});
