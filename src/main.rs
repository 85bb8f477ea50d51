//! The proxy. Everything it does is in the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    // SAFETY: this is the first call in main().
    unsafe { socket_proxyd::run() }
}
