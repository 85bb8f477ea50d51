//! The unit writer: its work is in `socket_proxyd::write_units`.

use std::env;
use std::io::{self, Write};
use std::process::ExitCode;

fn main() -> ExitCode {
    match socket_proxyd::write_units(env::args_os()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(line) => {
            // Standard error may be closed or full.
            let _ = writeln!(io::stderr(), "{line}");
            ExitCode::FAILURE
        }
    }
}
