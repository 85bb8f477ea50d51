//! The proxy: all of it is in the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    // SAFETY: this is the first thing main() does.
    unsafe { socket_proxyd::run() }
}
