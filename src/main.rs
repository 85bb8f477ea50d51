//! The program: parse, log, serve, exit code.

use std::env;
use std::io::{self, Write};
use std::process::ExitCode;

use socket_proxyd::activation::{self, Stdin};
use socket_proxyd::cli::{Config, Request};
use socket_proxyd::dispositions;
use socket_proxyd::guard::Role;
use socket_proxyd::logging::{LogLevel, Logging};
use socket_proxyd::service;

fn main() -> ExitCode {
    // SAFETY: this is the first thing main() does.
    let inherited = unsafe { activation::take_inherited() };
    dispositions::unblock_signals();
    if let Some(role) = Role::of_this_process() {
        let _logging = Logging::start(LogLevel::from_environment());
        return exit_code(role.play());
    }
    let request = Config::parse(env::args_os());
    let level = match &request {
        Ok(Request::Serve(config)) => config.log_level,
        _ => LogLevel::from_environment(),
    };
    // Before anything is said, which would go to a client; what was asked for is no message.
    let nothing_passed = inherited.as_ref().map_or(true, Vec::is_empty);
    let stdin = match request {
        Ok(Request::Print(_)) => None,
        _ if nothing_passed => activation::take_stdin(),
        _ => None,
    };
    let _logging = match &stdin {
        Some(Stdin { was_stderr: true, .. }) => Logging::without_stderr(level),
        _ => Logging::start(level),
    };
    let inherited = inherited.map(|mut inherited| {
        inherited.extend(stdin.map(|stdin| stdin.socket));
        inherited
    });
    exit_code(request.and_then(|request| match request {
        Request::Serve(config) => service::run(*config, inherited?),
        Request::Print(text) => {
            let written = io::stdout().write_all(text.as_bytes());
            written.map_err(|error| format!("Failed to write: {error}."))
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
