//! `socket-proxyd-units`: a proxy's units, from a line of options; socket-proxyd-units(8).
//!
//! Arguments are read and checked as the proxy reads its own, become text, and go to standard output or
//! into files:
//!
//! ```text
//! Arguments -> Units -> UnitFile  -> Before
//! arguments,   plan     render,      files
//! values                stamp, escape
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
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use arguments::{Destination, Request};
use escape::shell_word;
use files::Before;
use plan::{Starts, Units};
use render::{HOMES, TEMPORARY, UnitFile, metrics_unit, own_directory, quoted};

use crate::config::command::CommandLine;
use crate::logging::in_words;

/// Where packages put the proxy.
const PROGRAM: &str = "/usr/bin/socket-proxyd";

/// Where systemd looks for an administrator's units.
const SYSTEMDS: [&str; 2] = ["/etc/systemd/system", "/run/systemd/system"];

/// Does what the arguments ask for, the program's name first.
///
/// # Errors
/// One line on what is wrong with them, or with the files.
pub fn run(args: impl IntoIterator<Item = OsString>) -> Result<(), String> {
    match arguments::parse(args)? {
        Request::Print(text) => print(&mut io::stdout(), text),
        Request::Units(units, destination) => {
            let files = render::files(&units, &program())?;
            match destination {
                Destination::Print => {
                    for (index, file) in files.iter().enumerate() {
                        let between = if index == 0 { "" } else { "\n" };
                        let path = Path::new(SYSTEMDS[0]).join(&file.path);
                        let text = format!("{between}# {}\n{}", path.display(), file.text);
                        print(&mut io::stdout(), &text)?;
                    }
                    print(&mut io::stderr(), "Next: the same with --write, as root.\n")?;
                }
                Destination::Write { directory, force } => {
                    let before = files::write(&files, &directory, force)?;
                    let mut text = String::new();
                    for (file, before) in files.iter().zip(&before) {
                        let what = match before {
                            Before::Nothing => "Wrote",
                            Before::Other => "Replaced",
                            Before::Same => "Already there:",
                        };
                        text += &format!("{what} {}\n", directory.join(&file.path).display());
                    }
                    let metrics = format!("{}.socket", metrics_unit(&units.unit));
                    let left = files::clear(&files, &units.unit, &metrics, &directory)?;
                    for path in &left.removed {
                        text += &format!("Removed {}, of before\n", path.display());
                    }
                    for path in &left.changed {
                        text += &format!("Left {}, which has been changed\n", path.display());
                    }
                    for path in left.removed.iter().chain(&left.changed) {
                        text += &lost_its_proxy(path);
                    }
                    text += &next(&units, &files, &directory, &before, left.metrics.as_deref());
                    print(&mut io::stdout(), &text)?;
                }
            }
            note(&units)
        }
    }
}

/// Says what may be wrong, as far as this machine is the one that the units are for.
fn note(units: &Units) -> Result<(), String> {
    let Starts::Command(words) = &units.starts else { return Ok(()) };
    if let Some(directory) = own_directory(units).filter(|directory| directory.exists()) {
        let note = format!(
            "Note: {} is there, and becomes the unit's, which removes it when it stops.\n",
            directory.display()
        );
        print(&mut io::stderr(), &note)?;
    }
    match CommandLine::find(words.clone()) {
        Ok(_) => Ok(()),
        Err(error) => print(&mut io::stderr(), &format!("Note: {error}\n")),
    }
}

/// The proxy beside this program, if there is one, and a hardened unit can see it.
fn program() -> PathBuf {
    let is_hidden =
        |path: &Path| HOMES.iter().chain(&TEMPORARY).any(|directory| path.starts_with(directory));
    let beside = || Some(env::current_exe().ok()?.parent()?.join("socket-proxyd"));
    let found = beside().filter(|path| path.exists() && !is_hidden(path));
    found.unwrap_or_else(|| PROGRAM.into())
}

/// What becomes of the service whose drop-in this was.
fn lost_its_proxy(drop_in: &Path) -> String {
    let directory = drop_in.parent().and_then(Path::file_name).unwrap_or_default();
    let directory = directory.to_string_lossy();
    let service = directory.strip_suffix(".d").unwrap_or(&directory);
    let word = quoted(service);
    format!(
        "{service} has lost its proxy: if it runs, it runs on, and no client starts it any more. (systemctl \
         stop {word}, or systemctl enable --now {word})\n"
    )
}

/// What to type now.
fn next(
    units: &Units,
    files: &[UnitFile],
    directory: &Path,
    before: &[Before],
    left_metrics: Option<&Path>,
) -> String {
    let unit = &units.unit;
    let service = quoted(&format!("{unit}.service"));
    let mut sockets = quoted(&format!("{unit}.socket"));
    if units.metrics.is_some() {
        sockets += &format!(" {}", quoted(&format!("{}.socket", metrics_unit(unit))));
    }
    let mut commands = Vec::new();
    let is_systemds = SYSTEMDS.iter().any(|it| directory == Path::new(it));
    if !is_systemds {
        let mut paths: Vec<_> = files.iter().filter_map(|file| file.path.iter().next()).collect();
        paths.dedup();
        let paths = paths.iter().map(|it| shell_word(directory.join(it).as_os_str().as_bytes()));
        let paths = paths.collect::<Vec<_>>().join(" ");
        commands.push(format!("cp -r {paths} {}", SYSTEMDS[0]));
    }
    if let Some(path) = left_metrics {
        // Enabled and without --metrics=, it would be one more way in.
        if is_systemds {
            let metrics = quoted(&format!("{}.socket", metrics_unit(unit)));
            commands.push(format!("systemctl disable --now {metrics}"));
        }
        commands.push(format!("rm {}", shell_word(path.as_os_str().as_bytes())));
    }
    if let Starts::Service(started) = &units.starts {
        commands.push(format!("systemctl disable --now {}", quoted(started)));
    }
    let runtime = if directory == Path::new(SYSTEMDS[1]) { "--runtime " } else { "" };
    if before.contains(&Before::Other) || left_metrics.is_some() {
        commands.push("systemctl daemon-reload".into());
        commands.push(format!("systemctl enable {runtime}{sockets}"));
        commands.push(format!("systemctl stop {service}"));
        commands.push(format!("systemctl restart {sockets}"));
    } else {
        commands.push(format!("systemctl enable {runtime}--now {sockets}"));
    }
    format!("Next: {}\n", commands.join(" && "))
}

fn print(to: &mut impl Write, text: &str) -> Result<(), String> {
    let written = to.write_all(text.as_bytes());
    written.map_err(|error| format!("Failed to write: {}.", in_words(&error)))
}
