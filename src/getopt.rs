//! getopt_long(3)'s manners, which clap does not have and upstream's users know: how a word becomes
//! an option, and the words in which a wrong one is refused.

#![forbid(unsafe_code)]

use std::error::Error;
use std::ffi::OsString;

use clap::Command;
use clap::error::{ContextKind, ErrorKind};

/// systemd-socket-proxyd's own options; a prefix that is unambiguous among these means the same
/// here, whatever options are added beside them.
const UPSTREAM_OPTIONS: [&str; 5] =
    ["connections-max", "exit-idle-time", "proxy-protocol", "help", "version"];

/// A command line as clap can read it.
#[derive(Debug, Default)]
pub(crate) struct Spelled {
    /// Options and TARGETs.
    pub(crate) args: Vec<OsString>,
    /// What follows the `--` after a TARGET, if there is one.
    pub(crate) command: Option<Vec<OsString>>,
}

/// Writes each option as `--name=value`, as getopt_long(3) understands it with upstream's options:
/// before clap sees more options that begin the same way (`--conn=5`), or takes an `=` away (`-c=5`
/// gives `-c` the value `=5`).
///
/// A `--` ends the options, as ever; after a TARGET it begins COMMAND.
pub(crate) fn spell_out(command: &Command, args: impl IntoIterator<Item = OsString>) -> Spelled {
    let mut args = args.into_iter();
    let mut spelled: Vec<OsString> = args.next().into_iter().collect();
    let mut has_target = false;
    while let Some(arg) = args.next() {
        let Some(text) = arg.to_str() else {
            has_target = true;
            spelled.push(arg);
            continue;
        };
        let option = match text.strip_prefix("--") {
            Some("") if has_target => {
                return Spelled { args: spelled, command: Some(args.collect()) };
            }
            Some("") => {
                spelled.push(arg);
                let mut rest: Vec<_> = args.collect();
                let command = rest.iter().position(|word| word == "--").map(|dashes| {
                    let command = rest.split_off(dashes + 1);
                    rest.pop();
                    command
                });
                spelled.extend(rest);
                return Spelled { args: spelled, command };
            }
            Some(option) => option,
            None => match text.strip_prefix("-c") {
                Some("") => "connections-max",
                Some(value) => {
                    spelled.push(format!("--connections-max={value}").into());
                    continue;
                }
                None => {
                    // A lone dash is no option to getopt(3).
                    has_target |= text == "-" || !text.starts_with('-');
                    spelled.push(arg);
                    continue;
                }
            },
        };
        let (name, value) = match option.split_once('=') {
            Some((name, value)) => (name, Some(OsString::from(value))),
            None => (option, None),
        };
        let name = whole_name(command, name);
        let value = value.or_else(|| takes_value(command, name).then(|| args.next()).flatten());
        let mut whole = OsString::from(format!("--{name}"));
        if let Some(value) = value {
            whole.push("=");
            whole.push(value);
        }
        spelled.push(whole);
    }
    Spelled { args: spelled, command: None }
}

/// The upstream option that a prefix means, or else the only one of ours.
fn whole_name<'a>(command: &'a Command, name: &'a str) -> &'a str {
    let ours = || command.get_arguments().filter_map(|option| option.get_long());
    if ours().any(|known| known == name) {
        return name;
    }
    the_only(UPSTREAM_OPTIONS.into_iter(), name).or_else(|| the_only(ours(), name)).unwrap_or(name)
}

fn the_only<'a>(options: impl Iterator<Item = &'a str>, prefix: &str) -> Option<&'a str> {
    let mut meant = options.filter(|option| option.starts_with(prefix));
    match (meant.next(), meant.next()) {
        (Some(option), None) => Some(option),
        _ => None,
    }
}

fn takes_value(command: &Command, name: &str) -> bool {
    let mut options = command.get_arguments();
    let option = options.find(|option| option.get_long() == Some(name));
    option.is_some_and(|option| option.get_action().takes_values())
}

/// One line for what clap refuses, in getopt's words, which administrators know.
pub(crate) fn explain(error: &clap::Error) -> String {
    let text = |kind| match error.get(kind) {
        Some(value) => value.to_string(),
        None => String::new(),
    };
    // clap names an option together with its value: `--listen <ADDRESS>`.
    let argument = text(ContextKind::InvalidArg);
    let option =
        argument.split_whitespace().find(|word| word.starts_with("--")).unwrap_or(&argument);
    match error.kind() {
        ErrorKind::ValueValidation => match error.source() {
            Some(message) => message.to_string(),
            None => error.to_string(),
        },
        ErrorKind::UnknownArgument => {
            format!("socket-proxyd: unrecognized option '{argument}'")
        }
        ErrorKind::InvalidValue | ErrorKind::WrongNumberOfValues | ErrorKind::TooFewValues => {
            format!("socket-proxyd: option '{option}' requires an argument")
        }
        ErrorKind::TooManyValues => {
            format!("socket-proxyd: option '{option}' doesn't allow an argument")
        }
        ErrorKind::InvalidUtf8 => "socket-proxyd: an argument is not valid UTF-8".into(),
        _ => {
            let message = error.to_string();
            let line = message.lines().next().unwrap_or_default();
            format!("socket-proxyd: {}", line.trim_start_matches("error: "))
        }
    }
}
