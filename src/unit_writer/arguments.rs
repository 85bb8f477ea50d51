//! The command line of socket-proxyd-units: one description, from which `--help` and the completions
//! come.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Parser, ValueHint};

use crate::config::listen_address::ListenAddress;
use crate::config::parser::{InfoOptions, Parsed, join_path, parse, split_command};
use crate::unit_writer::values::{
    UNIT_DIRECTORIES, account, idle, listen, metrics, service, target,
};

/// The command line, option by option, in the order of `--help`.
#[derive(Debug, Parser)]
#[command(
    name = "socket-proxyd-units",
    version,
    about = "Write the units of a proxy: NAME-proxy.socket and NAME-proxy.service, hardened, with \
             comments.",
    override_usage = "socket-proxyd-units --listen=ADDRESS --target=TARGET [OPTION...] NAME \
                      [-- COMMAND [ARG...]]",
    after_help = "TIME is a time span as in systemd.time(7), for example 5min 20s.\n\
                  See socket-proxyd-units(8).",
    infer_long_args = true,
    disable_help_flag = true,
    disable_version_flag = true
)]
pub struct Arguments {
    /// The name of the units, without -proxy
    #[arg(value_name = "NAME", value_hint = ValueHint::Other)]
    pub names: Vec<OsString>,
    /// Started by the proxy for the first connection
    #[arg(last = true, value_name = "COMMAND", value_hint = ValueHint::CommandWithArguments)]
    command_words: Vec<OsString>,

    /// PORT, IP:PORT, /path, @abstract or vsock:CID:PORT; repeatable
    #[arg(long, value_name = "ADDRESS", value_parser = listen, help_heading = "The proxy",
        value_hint = ValueHint::FilePath, allow_hyphen_values = true)]
    pub listen: Vec<(ListenAddress, String)>,
    /// Where connections go; repeatable as SELECTOR=TARGET
    #[arg(long = "target", value_name = "TARGET", value_parser = target,
        help_heading = "The proxy", value_hint = ValueHint::FilePath, allow_hyphen_values = true)]
    pub targets: Vec<OsString>,
    /// Start this service for the first connection
    #[arg(long, value_name = "UNIT", value_parser = service, help_heading = "The proxy",
        allow_hyphen_values = true)]
    pub service: Option<String>,
    /// Stop it, or COMMAND, after TIME without a connection [default: infinity]
    #[arg(long, value_name = "TIME", value_parser = idle, help_heading = "The proxy",
        allow_hyphen_values = true)]
    pub idle: Option<String>,
    /// Run the proxy, and COMMAND, as USER [default: a dynamic user]
    #[arg(long, value_name = "USER", value_parser = account, help_heading = "The proxy",
        value_hint = ValueHint::Username, allow_hyphen_values = true)]
    pub user: Option<String>,
    /// Add the proxy to GROUP, which may use the target's Unix socket
    #[arg(long, value_name = "GROUP", value_parser = account, help_heading = "The proxy",
        allow_hyphen_values = true)]
    pub group: Option<String>,
    /// Answer Prometheus there, from a socket unit of its own
    #[arg(long, value_name = "ADDRESS", value_parser = metrics, help_heading = "The proxy",
        value_hint = ValueHint::FilePath, allow_hyphen_values = true)]
    pub metrics: Option<(ListenAddress, String)>,

    /// Write to DIR instead of printing [default: /etc/systemd/system]
    #[arg(long, value_name = "DIR", num_args = 0..=1, require_equals = true,
        default_missing_value = UNIT_DIRECTORIES[0], help_heading = "Output",
        value_hint = ValueHint::DirPath)]
    pub write: Option<PathBuf>,
    /// Replace files that this program has not written, too
    #[arg(long, requires = "write", help_heading = "Output")]
    pub force: bool,
    #[command(flatten, next_help_heading = "Output")]
    info: InfoOptions,

    /// COMMAND and its arguments, if there is a `--` for them.
    #[arg(skip)]
    pub command: Option<Vec<OsString>>,
}

impl Arguments {
    /// Reads a command line, the program's name first.
    ///
    /// # Errors
    /// One line that names the option and the value.
    pub fn read(args: impl IntoIterator<Item = OsString>) -> Result<Parsed<Self>, String> {
        let mut args: Vec<_> = args.into_iter().collect();
        join_path(&mut args, "--write");
        let has_dashes = args.iter().any(|arg| arg == "--");
        let mut arguments = match parse::<Self>(args)? {
            Parsed::Arguments(arguments) => arguments,
            Parsed::Print(text) => return Ok(Parsed::Print(text)),
        };
        if has_dashes && arguments.names.is_empty() {
            return Err("There is no NAME before --. (See --help.)".into());
        }
        (arguments.names, arguments.command) = split_command(
            arguments.names,
            std::mem::take(&mut arguments.command_words),
            has_dashes,
        );
        Ok(Parsed::Arguments(arguments))
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;
    use crate::config::arguments::tests::{check_completions, check_documents};

    #[test]
    fn completions_are_current() {
        check_completions(Arguments::command());
    }

    #[test]
    fn help_and_manual_have_every_option_and_no_other() {
        Arguments::command().debug_assert();
        let manual = include_str!("../../man/socket-proxyd-units.8");
        let lines = manual.lines().filter(|it| !it.starts_with("systemctl"));
        check_documents(Arguments::command(), &lines.collect::<Vec<_>>().join("\n"));
    }
}
