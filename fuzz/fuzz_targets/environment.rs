#![no_main]

use std::env;
use std::ffi::CString;
use std::process;
use std::time::Duration;

use socket_proxyd::fuzzing::watchdog_interval;
use socket_proxyd::testing::take_passed_fds;

const NAMES: [&str; 5] =
    ["LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "WATCHDOG_USEC", "WATCHDOG_PID"];

/// The descriptors that are open.
const OPEN: usize = 2;

// The variables of systemd, a line each. A pid of `self` is that of this process. Not in cargo test:
// there other threads use the environment and the descriptors.
libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    if bytes.contains(&0) {
        return;
    }
    let own_pid = process::id().to_string();
    let value = |line| if line == b"self" { own_pid.as_bytes() } else { line };
    let values: Vec<_> = bytes.split(|byte| *byte == b'\n').map(value).collect();
    let variables = NAMES.iter().zip(&values);
    let variables: Vec<_> = variables
        .map(|(name, value)| CString::new([name.as_bytes(), b"=", value].concat()).unwrap())
        .collect();
    // SAFETY: there is one thread. Each variable is removed before its memory is freed. Nothing
    // else owns the descriptors 3 to 5, of which the last is closed.
    let passed = unsafe {
        for variable in &variables {
            libc::putenv(variable.as_ptr().cast_mut());
        }
        libc::dup2(libc::STDIN_FILENO, 3);
        libc::dup2(libc::STDIN_FILENO, 4);
        libc::close(5);
        take_passed_fds()
    };
    for name in &NAMES[..3] {
        assert!(env::var_os(name).is_none(), "{name}");
    }
    let text = |at: usize| values.get(at).and_then(|value| str::from_utf8(value).ok());
    let number = |at| text(at)?.parse::<u64>().ok();
    let is_ours = text(0).and_then(|pid| pid.parse().ok()) == Some(process::id());
    match passed {
        Ok(passed) => {
            let count = number(1).filter(|_| is_ours).unwrap_or(0);
            assert_eq!(passed.len() as u64, count);
            let mut names = text(2).unwrap_or("").split(':');
            for fd in &passed {
                let name = names.next().filter(|name| !name.is_empty()).unwrap_or("unknown");
                assert_eq!(fd.name, name);
            }
        }
        Err(message) => {
            assert!(message.starts_with("Failed to receive sockets from parent: "), "{message}");
            assert!(!is_ours || number(1).is_none_or(|count| count > OPEN as u64));
        }
    }
    if let Some(interval) = watchdog_interval() {
        assert!(interval > Duration::ZERO);
        assert_eq!(number(3).map(Duration::from_micros), Some(interval * 2));
        // A text that is not a pid is ignored.
        let is_another = |pid: &str| pid.parse::<u32>().is_ok_and(|pid| pid != process::id());
        assert!(!text(4).is_some_and(is_another));
    }
    for name in &NAMES[3..] {
        // SAFETY: there is one thread.
        unsafe { env::remove_var(name) };
    }
});
