//! `socket-proxyd-units`, socket-proxyd-units(8): writes the units of a proxy.
//!
//! The arguments are checked as the proxy checks its own, become text, and go to standard output or
//! into files:
//!
//! ```text
//! UnitArguments -> Plan -> UnitFile  -> Change
//! arguments,   plan     render,      files
//! values                templates,
//!                       stamp, escape
//! ```

mod arguments;
mod escape;
mod files;
mod plan;
mod render;
mod stamp;
mod values;

use std::env;
use std::ffi::OsString;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use arguments::UnitArguments;
use escape::shell_word;
use files::{Change, remove_leftovers};
use plan::Plan;
use render::UnitFile;
use values::{UNIT_DIRECTORIES, is_hidden};

use crate::config::command::CommandLine;
use crate::config::parser::Request;
use crate::logging::os_message;

/// Does what the arguments ask for, the program's name first.
///
/// # Errors
/// One line on what is wrong with the arguments or the files.
pub fn run(args: impl IntoIterator<Item = OsString>) -> Result<(), String> {
    let arguments = match UnitArguments::read(args)? {
        Request::Run(arguments) => arguments,
        Request::Print(text) => return print(&mut io::stdout(), &text),
    };
    let plan = Plan::new(arguments)?;
    let files = render::files(&plan, &program());
    let (output, next) = match &plan.arguments.write {
        Some(directory) => (write(&plan, &files, directory)?, ""),
        None => (listing(&files), "Next: run the same command with --write, as root.\n"),
    };
    print(&mut io::stdout(), &output)?;
    print(&mut io::stderr(), &(next.to_string() + &notes(&plan)))
}

fn listing(files: &[UnitFile]) -> String {
    let directory = Path::new(UNIT_DIRECTORIES[0]);
    let files = files.iter().map(|file| {
        let path = directory.join(&file.path);
        format!("# {}\n{}", path.display(), file.text)
    });
    files.collect::<Vec<_>>().join("\n")
}

/// Writes the units, and returns a report of that.
fn write(plan: &Plan, files: &[UnitFile], directory: &Path) -> Result<String, String> {
    let mut changes = files::write(files, directory, plan.arguments.force)?;
    changes.extend(remove_leftovers(files, &plan.unit, &plan.metrics_socket(), directory)?);
    let report = changes.iter().map(|(change, path)| format!("{change:?} {}\n", path.display()));
    let dropped = changes.iter().filter(|(it, _)| matches!(it, Change::Removed | Change::Kept));
    let lost = dropped.map(|(_, path)| lost_its_proxy(path));
    let next = next_commands(plan, files, directory, &changes).join(" && ");
    Ok(report.chain(lost).chain([format!("Next: {next}\n")]).collect())
}

/// Returns what becomes of the service that a drop-in was for.
fn lost_its_proxy(drop_in: &Path) -> String {
    let service = drop_in.parent().and_then(Path::file_stem).unwrap_or_default().to_string_lossy();
    let word = shell_word(&*service);
    format!(
        "{service} has no proxy any more: clients do not start it, and it does not stop by itself. \
         (systemctl stop {word}, or systemctl enable --now {word})\n"
    )
}

/// Returns the commands that put the written units into effect.
fn next_commands(
    plan: &Plan,
    files: &[UnitFile],
    directory: &Path,
    changes: &[(Change, PathBuf)],
) -> Vec<String> {
    let mut commands = Vec::new();
    let is_searched = UNIT_DIRECTORIES.iter().any(|it| directory == Path::new(it));
    if !is_searched {
        let names = files.iter().filter_map(|file| file.path.iter().next());
        let paths: Vec<_> = names.map(|name| shell_word(directory.join(name))).collect();
        commands.push(format!("cp -r {} {}", paths.join(" "), UNIT_DIRECTORIES[0]));
    }
    let obsolete = changes.iter().find(|(change, _)| *change == Change::Obsolete);
    if let Some((_, path)) = obsolete {
        if is_searched {
            let metrics = shell_word(plan.metrics_socket());
            commands.push(format!("systemctl disable --now {metrics}"));
        }
        commands.push(format!("rm {}", shell_word(path)));
    }
    if let Some(service) = &plan.arguments.service {
        commands.push(format!("systemctl disable --now {}", shell_word(service)));
    }
    let sockets = plan.sockets().iter().map(shell_word).collect::<Vec<_>>().join(" ");
    let runtime = if directory == Path::new(UNIT_DIRECTORIES[1]) { "--runtime " } else { "" };
    if obsolete.is_some() || changes.iter().any(|(change, _)| *change == Change::Replaced) {
        commands.extend([
            "systemctl daemon-reload".into(),
            format!("systemctl enable {runtime}{sockets}"),
            format!("systemctl stop {}", shell_word(format!("{}.service", plan.unit))),
            format!("systemctl restart {sockets}"),
        ]);
    } else {
        commands.push(format!("systemctl enable {runtime}--now {sockets}"));
    }
    commands
}

/// Returns what the units find on this machine, which may not be the one that they are for.
fn notes(plan: &Plan) -> String {
    let directory = plan.runtime_directory().filter(|directory| directory.exists());
    let directory = directory.map(|directory| {
        format!("the service will own {}, which exists, and remove it.", directory.display())
    });
    let command = plan.arguments.command.clone();
    let missing = command.and_then(|words| CommandLine::find(words).err());
    directory.into_iter().chain(missing).map(|note| format!("Note: {note}\n")).collect()
}

/// Returns the proxy beside this program, if a hardened unit can see it.
fn program() -> PathBuf {
    let beside = || Some(env::current_exe().ok()?.parent()?.join("socket-proxyd"));
    let found = beside().filter(|path| path.exists() && !is_hidden(path));
    found.unwrap_or_else(|| "/usr/bin/socket-proxyd".into())
}

fn print(to: &mut impl Write, text: &str) -> Result<(), String> {
    let written = to.write_all(text.as_bytes());
    written.map_err(|error| format!("Failed to write: {}.", os_message(&error)))
}
