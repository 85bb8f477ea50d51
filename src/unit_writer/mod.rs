//! `socket-proxyd-units`: a proxy's units, from a line of options; socket-proxyd-units(8).
//!
//! Arguments are read and checked as the proxy reads its own, become text, and go to standard output or
//! into files:
//!
//! ```text
//! Arguments -> Plan -> UnitFile  -> Existing
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
use std::path::{Path, PathBuf};

use arguments::Arguments;
use escape::shell_word;
use files::Existing;
use plan::{OnFirstClient, Plan};
use render::{UnitFile, metrics_unit, own_directory};
use values::{HOMES, TEMPORARY, UNIT_DIRECTORIES};

use crate::config::command::CommandLine;
use crate::config::parser::Parsed;
use crate::logging::os_message;

/// Where packages put the proxy.
const PROGRAM: &str = "/usr/bin/socket-proxyd";

/// Does what the arguments ask for, the program's name first.
///
/// # Errors
/// One line on what is wrong with them, or with the files.
pub fn run(args: impl IntoIterator<Item = OsString>) -> Result<(), String> {
    match Arguments::read(args)? {
        Parsed::Print(text) => print(&mut io::stdout(), &text),
        Parsed::Arguments(mut arguments) => {
            let (directory, force) = (arguments.write.take(), arguments.force);
            let units = Plan::new(arguments)?;
            let files = render::files(&units, &program())?;
            match directory {
                None => {
                    for (index, file) in files.iter().enumerate() {
                        let between = if index == 0 { "" } else { "\n" };
                        let path = Path::new(UNIT_DIRECTORIES[0]).join(&file.path);
                        let text = format!("{between}# {}\n{}", path.display(), file.text);
                        print(&mut io::stdout(), &text)?;
                    }
                    print(&mut io::stderr(), "Next: the same with --write, as root.\n")?;
                }
                Some(directory) => {
                    let before = files::write(&files, &directory, force)?;
                    let mut text = String::new();
                    for (file, before) in files.iter().zip(&before) {
                        let what = match before {
                            Existing::Missing => "Wrote",
                            Existing::Different => "Replaced",
                            Existing::Identical => "Already there:",
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
fn note(units: &Plan) -> Result<(), String> {
    let OnFirstClient::Command(words) = &units.starts else { return Ok(()) };
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
    let word = shell_word(service);
    format!(
        "{service} has lost its proxy: if it runs, it runs on, and no client starts it any more. (systemctl \
         stop {word}, or systemctl enable --now {word})\n"
    )
}

/// What to type now.
fn next(
    units: &Plan,
    files: &[UnitFile],
    directory: &Path,
    before: &[Existing],
    left_metrics: Option<&Path>,
) -> String {
    let unit = &units.unit;
    let service = shell_word(format!("{unit}.service"));
    let mut sockets = shell_word(format!("{unit}.socket"));
    if units.metrics.is_some() {
        sockets += &format!(" {}", shell_word(format!("{}.socket", metrics_unit(unit))));
    }
    let mut commands = Vec::new();
    let is_systemds = UNIT_DIRECTORIES.iter().any(|it| directory == Path::new(it));
    if !is_systemds {
        let mut paths: Vec<_> = files.iter().filter_map(|file| file.path.iter().next()).collect();
        paths.dedup();
        let paths = paths.iter().map(|it| shell_word(directory.join(it)));
        let paths = paths.collect::<Vec<_>>().join(" ");
        commands.push(format!("cp -r {paths} {}", UNIT_DIRECTORIES[0]));
    }
    if let Some(path) = left_metrics {
        // Enabled and without --metrics=, it would be one more way in.
        if is_systemds {
            let metrics = shell_word(format!("{}.socket", metrics_unit(unit)));
            commands.push(format!("systemctl disable --now {metrics}"));
        }
        commands.push(format!("rm {}", shell_word(path)));
    }
    if let OnFirstClient::Service(started) = &units.starts {
        commands.push(format!("systemctl disable --now {}", shell_word(started)));
    }
    let runtime = if directory == Path::new(UNIT_DIRECTORIES[1]) { "--runtime " } else { "" };
    if before.contains(&Existing::Different) || left_metrics.is_some() {
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
    written.map_err(|error| format!("Failed to write: {}.", os_message(&error)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::unit_writer::values::PROGRAM;

    fn parse(line: &str) -> Result<(Plan, Option<PathBuf>), String> {
        let args = std::iter::once("socket-proxyd-units").chain(line.split(' '));
        match Arguments::read(args.map(OsString::from))? {
            Parsed::Arguments(mut arguments) => {
                let directory = arguments.write.take();
                Ok((Plan::new(arguments)?, directory))
            }
            Parsed::Print(text) => Err(text),
        }
    }

    #[test]
    fn mistakes_are_said_where_they_are_made() {
        let good = "--listen=8080 --target=127.0.0.1:3000 app";
        assert!(parse(good).is_ok());
        for (line, error) in [
            ("app", "There is no --listen=, where clients come in; see --help."),
            ("--listen=8080 app", "There is no --target=, where connections go; see --help."),
            ("--listen=8080 --target=/a", "There is no NAME for the units. (See --help.)"),
            (
                "--listen=8080 --target=/a app other",
                "There is another word after NAME: \"other\". (Put -- in front of a COMMAND, and write a relative directory as --write=DIR.)",
            ),
            (
                "--listen=localhost:80 --target=/a app",
                "invalid value 'localhost:80' for '--listen <ADDRESS>': ListenStream= takes no names, write IP:PORT",
            ),
            (
                "--listen=8080 --target=80 app",
                "Invalid target \"80\": that is a port; of this machine it is 127.0.0.1:80.",
            ),
            (
                "--listen=8080 --target=/a app.service",
                "Invalid NAME \"app.service\": write it without .service.",
            ),
            (
                "--listen=1 --target=/a --service=a.socket app",
                "invalid value 'a.socket' for '--service <UNIT>': it has to be the name of a .service unit",
            ),
            (
                "--listen=/ --target=/a app",
                "invalid value '/' for '--listen <ADDRESS>': that is a directory",
            ),
            (
                "--listen=1 --target=-x:80 app",
                "invalid value '-x:80' for '--target <TARGET>': it begins with a dash, as an option does",
            ),
            (
                "--listen=1 --target=/a --service=-x app",
                "invalid value '-x' for '--service <UNIT>': it begins with a dash, as an option of systemctl(1) does",
            ),
            (
                "--listen=1 --target=/a --service=a@ app",
                "invalid value 'a@' for '--service <UNIT>': a template has no process; name an instance of it",
            ),
            (
                "--listen=1 --target=/a --service=app-proxy app",
                "--service=app-proxy.service is the proxy's own name.",
            ),
            (
                "--listen=1 --target=/a --service=a app -- /bin/b",
                "--service= cannot be combined with COMMAND: one of them is what the proxy starts.",
            ),
            (
                "--listen=1 --target=/a app -- ./b",
                "Invalid COMMAND \"./b\": a service starts in /, write its whole path.",
            ),
            (
                "--listen=1 --target=/a --idle=x app",
                "invalid value 'x' for '--idle <TIME>': it has to be a time span (30s, 5min 20s, infinity)",
            ),
            (
                "--listen=1 --target=/a --user=-x app",
                "invalid value '-x' for '--user <USER>': that is no name of an account",
            ),
            (
                "--listen=1 --target=/a --force app",
                "the following required arguments were not provided: --write[=<DIR>]",
            ),
            (
                "--listen=1 --target=/a --target=/b app",
                "There are several --target= options; write SELECTOR=TARGET in each, as in --target=:8080=127.0.0.1:3000.",
            ),
            (
                "--listen=1 --listen=2 --target=:1=/a app",
                "No selector selects the socket app-proxy.socket ([::]:2). The sockets are: app-proxy.socket ([::]:1), app-proxy.socket ([::]:2).",
            ),
            ("--listen=1 --target=/a -- /bin/b", "There is no NAME before --. (See --help.)"),
            (
                "--listen=1 --target=/a --write= app",
                "a value is required for '--write[=<DIR>]' but none was supplied",
            ),
            (
                "--listen=1 --target=/a --service=a --service=b app",
                "the argument '--service <UNIT>' cannot be used multiple times",
            ),
            (
                "--listen=0 --target=/a app",
                "invalid value '0' for '--listen <ADDRESS>': nobody would know the port",
            ),
            ("--listen=1 --listen=1 --target=/a app", "The address 1 is given twice."),
            ("--listen=1 --metrics=1 --target=/a app", "The address 1 is given twice."),
            (
                "--listen=80 --target=127.0.0.1:80 app",
                "--listen=80 is what --target=127.0.0.1:80 leads to; let the backend listen on another address.",
            ),
            (
                "--listen=1 --target=/a --user=root app",
                "invalid value 'root' for '--user <USER>': root's rights are what no unit here has; leave it out",
            ),
            (
                "--listen=1 --target=/a app -- /home/me/b",
                "Invalid COMMAND \"/home/me/b\": the service sees no home, and a /tmp of its own; put it in /usr/local or /opt.",
            ),
            (
                "--listen=1 --target=/run/app.sock app -- /bin/b",
                "Invalid --target=/run/app.sock: COMMAND can make no socket there; write /run/app/SOCKET, whose directory is made for it, and as NAME a plain word that is no directory of the system's.",
            ),
            (
                "--listen=1 --target=/run/user/app.sock user -- /bin/b",
                "Invalid --target=/run/user/app.sock: COMMAND can make no socket there; write /run/user/SOCKET, whose directory is made for it, and as NAME a plain word that is no directory of the system's.",
            ),
            (
                "--listen=1 --target=127.0.0.1:2 --metrics=2 app",
                "--metrics=2 is what --target=127.0.0.1:2 leads to; let the backend listen on another address.",
            ),
            (
                "--listen=1 --target=/a --metrics=127.0.0.1:1 app",
                "--metrics=127.0.0.1:1 is an address that clients know already.",
            ),
            (
                "--listen=1 --target=/a --metrics=vsock::1 app",
                "invalid value 'vsock::1' for '--metrics <ADDRESS>': it has to be TCP or a Unix socket",
            ),
            (
                "--listen=1 --target=/a --metrics=2 --idle=1min app",
                "--idle= can't be had with the --metrics= of a bridge: whoever scrapes would start it again, and its counters with it.",
            ),
            (
                "--listen=1 --target=/a --write=a --write=b app",
                "the argument '--write[=<DIR>]' cannot be used multiple times",
            ),
            ("--frob app", "unexpected argument '--frob' found"),
            ("--force=1 app", "unexpected value '1' for '--force' found; no more were expected"),
        ] {
            assert_eq!(parse(line).unwrap_err(), error, "{line}");
        }
    }

    #[test]
    fn addresses_are_written_as_systemd_reads_them() {
        for (given, written) in [
            ("8080", "8080"),
            ("08080", "8080"),
            ("127.0.0.1:080", "127.0.0.1:80"),
            ("::1:80", "[::1]:80"),
            ("[::1]:0080", "[::1]:80"),
            ("vsock:2:080", "vsock:2:80"),
            ("/run/a.sock", "/run/a.sock"),
            ("@a", "@a"),
        ] {
            let (units, _) = parse(&format!("--listen={given} --target=/a app")).unwrap();
            assert_eq!(units.listen, [written], "{given}");
        }
        let (units, _) = parse("--listen=1 --metrics=::1:09464 --target=/a app").unwrap();
        assert_eq!(units.metrics.as_deref(), Some("[::1]:9464"));
    }

    #[test]
    fn where_they_are_written_stands_behind_the_option_or_after_it() {
        let base = "--listen=1 --target=127.0.0.1:2";
        for (words, expected) in [
            ("--write app", "/etc/systemd/system"),
            ("--write=/x app", "/x"),
            ("--write /x app", "/x"),
            ("--write ./x app", "./x"),
            ("app --write", "/etc/systemd/system"),
            ("app --write -- /bin/app", "/etc/systemd/system"),
        ] {
            let (units, destination) = parse(&format!("{base} {words}")).unwrap();
            assert_eq!(destination, Some(PathBuf::from(expected)), "{words}");
            let again = if words.ends_with("/bin/app") { " -- /bin/app" } else { "" };
            assert_eq!(units.command_line(), format!("{PROGRAM} {base} app{again}"));
        }
    }
}
