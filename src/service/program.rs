//! The whole program: inherit, parse, log, serve, exit code.

use std::env;
use std::io::{self, Write};
use std::process::ExitCode;

use crate::backend::command::guard::helper;
use crate::config::Config;
use crate::config::parser::Request;
use crate::listen::activation::{Stdin, take_passed_fds, take_stdin};
use crate::logging::{LogLevel, Logging};
use crate::runtime::dispositions;
use crate::service;

/// Runs the program, or the helper process that this process was started as.
///
/// # Safety
/// The caller calls this first in `main`: no other thread runs, and nothing owns the descriptors
/// from 3 on.
#[expect(unsafe_code, reason = "the caller's promise is passed on")]
pub unsafe fn run() -> ExitCode {
    // SAFETY: the caller's promise.
    let passed = unsafe { take_passed_fds() };
    dispositions::unblock_signals();
    if let Some(run_helper) = helper() {
        let _logging = Logging::start(LogLevel::from_environment());
        return exit_code(run_helper());
    }
    let request = Config::parse(env::args_os());
    let level = match &request {
        Ok(Request::Run(config)) => config.log_level,
        _ => LogLevel::from_environment(),
    };
    // Precedes any output: standard error may be the client's socket. Not for --help and --version,
    // which print to standard output, whatever that is.
    let may_take_stdin = passed.as_ref().map_or(true, Vec::is_empty);
    let stdin = match request {
        Ok(Request::Print(_)) => None,
        _ => may_take_stdin.then(take_stdin).flatten(),
    };
    let _logging = match &stdin {
        Some(Stdin { was_stderr: true, .. }) => Logging::without_stderr(level),
        _ => Logging::start(level),
    };
    exit_code(request.and_then(|request| match request {
        Request::Run(config) => {
            let mut passed = passed?;
            passed.extend(stdin.map(|stdin| stdin.socket));
            service::run(config, passed)
        }
        Request::Print(text) => {
            let written = io::stdout().write_all(text.as_bytes());
            written.map_err(|error| format!("Failed to write to standard output: {error}."))
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
