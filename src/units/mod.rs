//! `socket-proxyd-units`: a proxy's units, from a line of options; socket-proxyd-units(8).
//!
//! Arguments are read and checked as the proxy reads its own, become text, and go to standard output or
//! into files:
//!
//! ```text
//! Units -> UnitFile -> Before
//! arguments  text, escape   files
//! ```

#![forbid(unsafe_code)]

mod arguments;
mod escape;
mod files;
mod text;

use std::env;
use std::ffi::OsString;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use arguments::{Destination, Request, Starts, Units};
use files::Before;
use text::quoted;

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
            let files = text::files(&units, &program())?;
            match destination {
                Destination::Print => {
                    for (index, file) in files.iter().enumerate() {
                        let between = if index == 0 { "" } else { "\n" };
                        let path = Path::new(SYSTEMDS[0]).join(&file.path);
                        let text = format!("{between}# {}\n{}", path.display(), file.text);
                        print(&mut io::stdout(), &text)?;
                    }
                    print(&mut io::stderr(), "Next: the same with --write, as root.\n")
                }
                Destination::Write { directory, force } => {
                    let before = files::write(&files, &directory, force)?;
                    let mut text = String::new();
                    for (file, before) in files.iter().zip(&before) {
                        let path = directory.join(&file.path);
                        let what = match before {
                            Before::Nothing | Before::Other => "Wrote",
                            Before::Same => "Already there:",
                        };
                        text += &format!("{what} {}\n", path.display());
                    }
                    text += &next(&units, &directory, &before);
                    print(&mut io::stdout(), &text)
                }
            }
        }
    }
}

/// The proxy beside this program, if there is one.
fn program() -> PathBuf {
    let beside = || Some(env::current_exe().ok()?.parent()?.join("socket-proxyd"));
    beside().filter(|path| path.exists()).unwrap_or_else(|| PROGRAM.into())
}

/// What to type now.
fn next(units: &Units, directory: &Path, before: &[Before]) -> String {
    let [socket, service] = ["socket", "service"].map(|it| quoted(&format!("{}.{it}", units.unit)));
    if !SYSTEMDS.iter().any(|it| directory == Path::new(it)) {
        return format!("Next: copy them to {}.\n", SYSTEMDS[0]);
    }
    if before.contains(&Before::Other) {
        return format!(
            "Next: systemctl daemon-reload && systemctl stop {service} && systemctl restart {socket}\n"
        );
    }
    match &units.starts {
        Starts::Service(started) => {
            let started = quoted(started);
            format!("Next: systemctl disable --now {started} && systemctl enable --now {socket}\n")
        }
        _ => format!("Next: systemctl enable --now {socket}\n"),
    }
}

fn print(to: &mut impl Write, text: &str) -> Result<(), String> {
    let written = to.write_all(text.as_bytes());
    written.map_err(|error| format!("Failed to write: {}.", in_words(&error)))
}
