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

mod addresses;
pub mod options;
pub mod escape;
mod files;
pub mod plan;
pub mod render;
pub mod stamp;
pub mod values;

use std::env;
use std::ffi::OsString;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use minijinja::context;

use escape::{shell_word, shell_words};
use files::{Change, remove_leftovers};
use options::UnitArguments;
use plan::Plan;
use render::{UnitFile, render};
use values::{UNIT_DIRECTORIES, can_be_in_exec_start, is_hidden};

use crate::config::find_programs;
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
    let directory = UNIT_DIRECTORIES[0];
    let list = |it: &UnitFile| format!("# {directory}/{}\n{}", it.path.display(), it.text);
    files.iter().map(list).collect::<Vec<_>>().join("\n")
}

/// Writes the units, and returns a report: what changed, the services that lost their proxy, and
/// the commands that put the units into effect.
fn write(plan: &Plan, files: &[UnitFile], directory: &Path) -> Result<String, String> {
    let mut changes = files::write(files, directory, plan.arguments.force)?;
    changes.extend(remove_leftovers(files, &plan.unit, &plan.metrics_socket(), directory)?);
    let changed = |wanted: &'static [Change]| {
        changes.iter().filter(|(change, _)| wanted.contains(change)).map(|(_, path)| path)
    };
    let lost = changed(&[Change::Removed, Change::Kept]).map(|drop_in| {
        let service = drop_in.parent().and_then(Path::file_stem).unwrap_or_default();
        let name = service.to_string_lossy();
        context! { word => shell_word(&*name), name => name }
    });
    let written = files.iter().filter_map(|file| Some(directory.join(file.path.iter().next()?)));
    let report = changes.iter().map(|(change, path)| format!("{change:?} {}", path.display()));
    let runtime = if directory == Path::new(UNIT_DIRECTORIES[1]) { "--runtime " } else { "" };
    let context = context! {
        changes => report.collect::<Vec<_>>(),
        lost => lost.collect::<Vec<_>>(),
        written => shell_words(written),
        is_searched => UNIT_DIRECTORIES.iter().any(|it| directory == Path::new(it)),
        obsolete => changed(&[Change::Obsolete]).next().map(shell_word),
        metrics_socket => shell_word(plan.metrics_socket()),
        service => plan.arguments.service.as_ref().map(shell_word),
        is_update => changed(&[Change::Replaced, Change::Obsolete]).next().is_some(),
        runtime => runtime,
        sockets => shell_words(plan.sockets()),
        proxy_service => shell_word(plan.service()),
    };
    Ok(render(include_str!("templates/report.txt"), context))
}

/// Returns what the units find on this machine, which may not be the one that they are for.
fn notes(plan: &Plan) -> String {
    let directory = plan.runtime_directory().filter(|directory| directory.exists());
    let directory = directory.map(|directory| {
        format!("the service will own {}, which exists, and remove it.", directory.display())
    });
    let missing = find_programs(&plan.proxy).err();
    directory.into_iter().chain(missing).map(|note| format!("Note: {note}\n")).collect()
}

/// Returns the proxy beside this program, if a hardened unit may execute it.
fn program() -> PathBuf {
    let beside = || Some(env::current_exe().ok()?.parent()?.join("socket-proxyd"));
    let may_execute = |path: &Path| !is_hidden(path) && can_be_in_exec_start(path.as_os_str());
    let found = beside().filter(|path| path.exists() && may_execute(path));
    found.unwrap_or_else(|| "/usr/bin/socket-proxyd".into())
}

fn print(to: &mut impl Write, text: &str) -> Result<(), String> {
    let written = to.write_all(text.as_bytes());
    written.map_err(|error| format!("Failed to write: {}.", os_message(&error)))
}
