//! How a run of COMMAND ended.

use std::process::ExitStatus;

use crate::backend::connect_error::ConnectError;
use crate::config::command::CommandLine;

pub enum RunResult {
    /// The proxy asked for the stop.
    StopRequested,
    /// There was no connection for `--stop-idle-time=`.
    Idle,
    /// Another process serves the target.
    AddressInUse,
    /// The target cannot be reached because of a permanent error.
    Unreachable(ConnectError),
    /// COMMAND was never ready, or only for a moment.
    Failed(String),
    /// COMMAND served and then exited by itself. The status is `None` if its guard was killed.
    Exited(Option<ExitStatus>),
}

impl RunResult {
    /// COMMAND exited before it was ready or right after; `when` says which.
    pub fn early_exit(name: &CommandLine, when: &str, status: Option<ExitStatus>) -> Self {
        let hint = match status {
            Some(status) if status.success() => ", but must stay in the foreground",
            _ => "",
        };
        let status = describe_status(status);
        Self::Failed(format!("{name} has ended {when} it was ready ({status}){hint}"))
    }
}

pub fn describe_status(status: Option<ExitStatus>) -> String {
    status.map_or_else(|| "its guard was killed".into(), |status| status.to_string())
}
