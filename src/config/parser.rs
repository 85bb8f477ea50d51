//! clap, with errors of one line.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;

use clap::error::ErrorKind;
use clap::{ArgAction, Args, Parser};

/// What a command line asks for.
#[derive(Debug)]
pub enum Request<T> {
    Run(T),
    /// Print this text, help or the version, on standard output and exit with 0.
    Print(String),
}

/// The options that print something instead of running the program.
#[derive(Debug, Args)]
pub struct InfoOptions {
    // In systemd-socket-proxyd `--h` is unambiguous.
    /// Show this help
    #[arg(long, short, alias = "h", action = ArgAction::HelpShort)]
    help: Option<bool>,
    /// Show the version
    #[arg(long, action = ArgAction::Version)]
    version: Option<bool>,
}

/// Reads a command line, the program's name first.
///
/// # Errors
/// One line that names the option and the value.
pub fn parse<T: Parser>(args: Vec<OsString>) -> Result<Request<T>, String> {
    match T::try_parse_from(args) {
        Ok(arguments) => Ok(Request::Run(arguments)),
        Err(error) => match error.kind() {
            ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => {
                Ok(Request::Print(format!("{}\n", error.to_string().trim_end())))
            }
            _ => Err(one_line(&error.to_string())),
        },
    }
}

/// clap's first paragraph; hints and the usage follow in others.
fn one_line(text: &str) -> String {
    let text = text.strip_prefix("error: ").unwrap_or(text);
    let lines = text.lines().map(str::trim).take_while(|line| !line.is_empty());
    lines.collect::<Vec<_>>().join(" ")
}

/// Joins an option whose value is optional with the next word, if that begins with `/` or `.`.
pub fn join_path(args: &mut Vec<OsString>, option: &str) {
    let is_path = |word: &OsStr| matches!(word.as_bytes(), [b'/' | b'.', ..]);
    let end = args.iter().position(|arg| arg == "--").unwrap_or(args.len());
    let found = (1..end.saturating_sub(1)).find(|&at| args[at] == option && is_path(&args[at + 1]));
    if let Some(at) = found {
        let path = args.remove(at + 1);
        args[at].push("=");
        args[at].push(path);
    }
}
