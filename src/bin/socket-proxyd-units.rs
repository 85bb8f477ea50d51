//! The unit writer: its work is in `socket_proxyd::write_units`.

use std::env;
use std::process::ExitCode;

fn main() -> ExitCode {
    match socket_proxyd::write_units(env::args_os()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(line) => {
            eprintln!("{line}");
            ExitCode::FAILURE
        }
    }
}
