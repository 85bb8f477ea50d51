//! The program: parse, log, serve, exit code.

use std::env;
use std::io::{self, Write};
use std::process::ExitCode;

use socket_proxyd::activation::{self, Stdin};
use socket_proxyd::cli::{Config, Request};
use socket_proxyd::guard::Role;
use socket_proxyd::logging::{LogLevel, Logging};
use socket_proxyd::service;

fn main() -> ExitCode {
    // SAFETY: this is the first thing main() does.
    let inherited = unsafe { activation::take_inherited() };
    if let Some(role) = Role::of_this_process() {
        let _logging = Logging::start(LogLevel::from_environment());
        return exit_code(role.play());
    }
    let request = Config::parse(env::args_os());
    let (level, opens_its_own) = match &request {
        Ok(Request::Serve(config)) => (config.log_level, !config.listen.is_empty()),
        Ok(Request::Print(_)) => (LogLevel::from_environment(), true),
        Err(_) => (LogLevel::from_environment(), false),
    };
    // Before anything is said, which would go to a client.
    let may_be_stdin = inherited.as_ref().is_ok_and(Vec::is_empty) && !opens_its_own;
    let stdin = if may_be_stdin { activation::take_stdin() } else { None };
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
