//! The unit writer: its work is in `socket_proxyd::units`.

use std::env;
use std::process::ExitCode;

use socket_proxyd::units;

fn main() -> ExitCode {
    match units::run(env::args_os()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(line) => {
            eprintln!("{line}");
            ExitCode::FAILURE
        }
    }
}
