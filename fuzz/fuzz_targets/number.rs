#![no_main]

use socket_proxyd::fuzzing::{connections, number};

// What systemd reads as a number is read as the same one. 0 is no limit.
libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    number(bytes);
    match str::from_utf8(bytes) {
        // systemd also reads white space and a sign behind 0o and 0b.
        Ok(text) if text.trim_start().bytes().skip(1).all(|it| it.is_ascii_alphanumeric()) => {
            if let Some(number @ 1..) = systemd::number(text) {
                assert_eq!(connections(text), Some(number));
            }
        }
        _ => {}
    }
});
