//! `--ready=exec:LINE`: the backend is ready when a command exits with 0.

use crate::backend::process_group::ProcessGroup;
use crate::config::command::CommandLine;
use crate::config::target::Target;
use crate::logging::os_message;

/// Runs the command once, and kills what it leaves behind in its process group. Dropping the future
/// kills the command as well.
///
/// # Errors
/// The status of the command, or why it did not start.
pub async fn probe(line: &CommandLine, target: &Target) -> Result<(), String> {
    let run = async || ProcessGroup::start(line, target)?.exited_alone().await;
    match run().await {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(status.to_string()),
        Err(error) => Err(os_message(&error)),
    }
}
