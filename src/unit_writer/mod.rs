//! `socket-proxyd-units`, socket-proxyd-units(8): writes the units of a proxy.
//!
//! The arguments are checked as the proxy checks its own, become text, and go to standard output or into
//! files:
//!
//! ```text
//! Arguments -> Plan -> UnitFile  -> Change
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
use files::{Change, remove_leftovers};
use plan::{OnFirstClient, Plan};
use render::{UnitFile, metrics_unit, own_directory};
use values::{HOMES, TEMPORARY, UNIT_DIRECTORIES};

use crate::config::command::CommandLine;
use crate::config::parser::Parsed;
use crate::logging::os_message;

/// Does what the arguments ask for, the program's name first.
///
/// # Errors
/// One line on what is wrong with the arguments or the files.
pub fn run(args: impl IntoIterator<Item = OsString>) -> Result<(), String> {
    let mut arguments = match Arguments::read(args)? {
        Parsed::Arguments(arguments) => arguments,
        Parsed::Print(text) => return print(&mut io::stdout(), &text),
    };
    let (directory, force) = (arguments.write.take(), arguments.force);
    let plan = Plan::new(arguments)?;
    let files = render::files(&plan, &program())?;
    let (output, next) = match &directory {
        Some(directory) => (write(&plan, &files, directory, force)?, ""),
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
fn write(plan: &Plan, files: &[UnitFile], directory: &Path, force: bool) -> Result<String, String> {
    let metrics_socket = format!("{}.socket", metrics_unit(&plan.unit));
    let mut changes = files::write(files, directory, force)?;
    changes.extend(remove_leftovers(files, &plan.unit, &metrics_socket, directory)?);
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
    let metrics = shell_word(format!("{}.socket", metrics_unit(&plan.unit)));
    let is_searched = UNIT_DIRECTORIES.iter().any(|it| directory == Path::new(it));
    if !is_searched {
        let names = files.iter().filter_map(|file| file.path.iter().next());
        let paths: Vec<_> = names.map(|name| shell_word(directory.join(name))).collect();
        commands.push(format!("cp -r {} {}", paths.join(" "), UNIT_DIRECTORIES[0]));
    }
    let obsolete = changes.iter().find(|(change, _)| *change == Change::Obsolete);
    if let Some((_, path)) = obsolete {
        if is_searched {
            commands.push(format!("systemctl disable --now {metrics}"));
        }
        commands.push(format!("rm {}", shell_word(path)));
    }
    if let OnFirstClient::Service(service) = &plan.starts {
        commands.push(format!("systemctl disable --now {}", shell_word(service)));
    }
    let mut sockets = shell_word(format!("{}.socket", plan.unit));
    if plan.metrics.is_some() {
        sockets += &format!(" {metrics}");
    }
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
    let OnFirstClient::Command(words) = &plan.starts else { return String::new() };
    let directory = own_directory(plan).filter(|directory| directory.exists());
    let directory = directory.map(|directory| {
        format!("the service will own {}, which exists, and remove it.", directory.display())
    });
    let missing = CommandLine::find(words.clone()).err();
    directory.into_iter().chain(missing).map(|note| format!("Note: {note}\n")).collect()
}

/// Returns the proxy beside this program, if a hardened unit can see it.
fn program() -> PathBuf {
    let beside = || Some(env::current_exe().ok()?.parent()?.join("socket-proxyd"));
    let is_hidden =
        |path: &Path| HOMES.iter().chain(&TEMPORARY).any(|directory| path.starts_with(directory));
    let found = beside().filter(|path| path.exists() && !is_hidden(path));
    found.unwrap_or_else(|| "/usr/bin/socket-proxyd".into())
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
