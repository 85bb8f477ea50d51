//! The program: parse, log, serve, exit code.

use std::env;
use std::io::{self, Write};
use std::process::ExitCode;

use socket_proxyd::cli::{Config, Request};
use socket_proxyd::guard::Role;
use socket_proxyd::logging::{LogLevel, Logging};
use socket_proxyd::{activation, service};

fn main() -> ExitCode {
    // SAFETY: this is the first thing main() does.
    let inherited = unsafe { activation::take_inherited() };
    if let Some(role) = Role::of_this_process() {
        let _logging = Logging::start(LogLevel::from_environment());
        return exit_code(role.play());
    }
    let request = Config::parse(env::args_os());
    let level = match &request {
        Ok(Request::Serve(config)) => config.log_level,
        _ => LogLevel::from_environment(),
    };
    let _logging = Logging::start(level);
    exit_code(request.and_then(|request| match request {
        Request::Serve(config) => service::run(*config, inherited?),
        Request::Print(text) => {
            let _ = io::stdout().write_all(text.as_bytes());
            Ok(())
        }
    }))
}

fn exit_code(result: Result<(), String>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(line) => {
            tracing::error!("{line}");
            ExitCode::FAILURE
        }
    }
}
