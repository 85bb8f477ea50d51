//! What the command line of `socket-proxyd-units` says, option by option.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use crate::config::getopt::{Known, Meaning, Word, Words};
use crate::config::listen_address::ListenAddress;
use crate::unit_writer::SYSTEMDS;
use crate::unit_writer::plan::Units;
use crate::unit_writer::values::{account, idle, listen, metrics, service};

pub const PROGRAM: &str = "socket-proxyd-units";

const VERSION: &str = concat!("socket-proxyd-units ", env!("CARGO_PKG_VERSION"), "\n");

const HELP: &str = "\
socket-proxyd-units --listen=ADDRESS --target=TARGET [OPTION...] NAME
    [-- COMMAND [ARG...]]
Write the units of a proxy: NAME-proxy.socket and NAME-proxy.service, ready to
run, hardened, and with comments on what to change.
What it is for:
     --listen=ADDRESS  What clients know: PORT, IP:PORT, /path, @abstract,
                       vsock:CID:PORT; again for several sockets
     --target=TARGET   Where connections go, as in socket-proxyd(8); again, as
                       SELECTOR=TARGET, for a backend of each socket
     --service=UNIT    Start this service for the first client
     --idle=TIME       Stop it, or COMMAND, after TIME without clients [never]
     --user=USER       Run the proxy, and COMMAND, as USER [a dynamic one]
     --group=GROUP     Be in GROUP, which may use the target's Unix socket
     --metrics=ADDRESS  Answer Prometheus there, from a socket unit of its own
What becomes of them:
     --write[=DIR]     Write them to DIR [/etc/systemd/system], don't print them
     --force           Even over files that this program has not written
  -h --help, --version  Show this or the version; see socket-proxyd-units(8)
";

type Set = fn(&mut Arguments, &OsStr) -> Result<(), String>;

/// All options, in the order of `--help`.
const OPTIONS: [Known<Set>; 11] = {
    const fn option(name: &'static str, meaning: Meaning<Set>) -> Known<Set> {
        let letter = if name.as_bytes()[0] == b'h' { Some('h') } else { None };
        Known { name, letter, is_upstreams: false, meaning }
    }
    [
        option("listen", Meaning::Takes(|it, text| it.listen(text))),
        option("target", Meaning::Takes(|it, text| it.target(text))),
        option(
            "service",
            Meaning::Takes(|it, text| once(&mut it.service, "service", text, service)),
        ),
        option("idle", Meaning::Takes(|it, text| once(&mut it.idle, "idle", text, idle))),
        option("user", Meaning::Takes(|it, text| once(&mut it.user, "user", text, account))),
        option("group", Meaning::Takes(|it, text| once(&mut it.group, "group", text, account))),
        option(
            "metrics",
            Meaning::Takes(|it, text| once(&mut it.metrics, "metrics", text, metrics)),
        ),
        option("write", Meaning::MayTakePath(|it, text| it.write(text))),
        option("force", Meaning::Flag(|it, _| it.force())),
        option("help", Meaning::Prints(HELP)),
        option("version", Meaning::Prints(VERSION)),
    ]
};

/// Reads a value that there may be one of.
fn once<T>(
    place: &mut Option<T>,
    option: &str,
    text: &OsStr,
    read: fn(&str) -> Result<T, String>,
) -> Result<(), String> {
    let refused = |why: &str| format!("Invalid --{option}={}: {why}.", text.display());
    if place.is_some() {
        return Err(refused("it is given twice"));
    }
    let value = text.to_str().ok_or_else(|| refused("a unit has to be UTF-8"))?;
    *place = Some(read(value).map_err(|why| refused(&why))?);
    Ok(())
}

/// What the command line asks for.
#[derive(Debug)]
pub enum Request {
    /// Units.
    Units(Box<Units>, Destination),
    /// This text.
    Print(&'static str),
}

/// Where they go.
#[derive(Debug)]
pub enum Destination {
    /// To standard output.
    Print,
    /// To files of this directory.
    Write {
        /// Where.
        directory: PathBuf,
        /// Whatever is there.
        force: bool,
    },
}

/// The command line as it is taken apart.
#[derive(Debug, Default)]
pub struct Arguments {
    pub listen: Vec<(ListenAddress, String)>,
    pub targets: Vec<OsString>,
    pub service: Option<String>,
    pub idle: Option<String>,
    pub user: Option<String>,
    pub group: Option<String>,
    pub metrics: Option<(ListenAddress, String)>,
    write: Option<PathBuf>,
    force: bool,
}

/// Reads the arguments, the program's name first.
///
/// # Errors
/// One line that names the option and the value.
pub fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Request, String> {
    let args: Vec<_> = args.into_iter().collect();
    let (mut arguments, mut names, mut command) = (Arguments::default(), Vec::new(), None);
    let mut words = Words::new(PROGRAM, &OPTIONS, args.iter().cloned());
    while let Some(word) = words.next()? {
        match word {
            Word::Value(set, value) => set(&mut arguments, &value)?,
            Word::Prints(text) => return Ok(Request::Print(text)),
            Word::Argument(argument) => names.push(argument),
            Word::Command(given) => command = Some(given),
        }
    }
    // What follows a -- in front of any argument are arguments, by getopt's rules; here it can't be NAME.
    let is_in_vain = command.is_none() && args.iter().any(|word| word == "--");
    let name = match &names[..] {
        _ if is_in_vain => return Err("There is no NAME in front of --; see --help.".into()),
        [] => return Err("There is no NAME for the units; see --help.".into()),
        [name] => name.to_str().ok_or("NAME has to be UTF-8.")?.to_string(),
        [_, another, ..] => {
            return Err(format!(
                "There is another word after NAME, {another:?}; put -- in front of a COMMAND, and write \
                 a relative directory as --write=DIR."
            ));
        }
    };
    let destination = match arguments.write.take() {
        Some(directory) => Destination::Write { directory, force: arguments.force },
        None if arguments.force => {
            return Err("--force is about --write, which is not there.".into());
        }
        None => Destination::Print,
    };
    let units = arguments.into_units(name, command)?;
    Ok(Request::Units(Box::new(units), destination))
}

impl Arguments {
    fn listen(&mut self, text: &OsStr) -> Result<(), String> {
        let mut address = None;
        once(&mut address, "listen", text, listen)?;
        self.listen.extend(address);
        Ok(())
    }

    fn target(&mut self, text: &OsStr) -> Result<(), String> {
        if text.as_bytes().starts_with(b"-") {
            let text = text.display();
            return Err(format!(
                "Invalid --target={text}: it begins with a dash, as an option does."
            ));
        }
        self.targets.push(text.into());
        Ok(())
    }

    fn write(&mut self, text: &OsStr) -> Result<(), String> {
        if self.write.is_some() {
            return Err("--write is given twice.".into());
        }
        self.write = Some(if text.is_empty() { SYSTEMDS[0].into() } else { text.into() });
        Ok(())
    }

    fn force(&mut self) -> Result<(), String> {
        self.force = true;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::config::options::tests::{options_in, options_of_fish};

    fn parse(line: &str) -> Result<(Units, Destination), String> {
        let args = std::iter::once("socket-proxyd-units").chain(line.split(' '));
        match super::parse(args.map(OsString::from))? {
            Request::Units(units, destination) => Ok((*units, destination)),
            Request::Print(text) => Err(text.into()),
        }
    }

    #[test]
    fn mistakes_are_said_where_they_are_made() {
        let good = "--listen=8080 --target=127.0.0.1:3000 app";
        assert!(parse(good).is_ok());
        for (line, error) in [
            ("app", "There is no --listen=, where clients come in; see --help."),
            ("--listen=8080 app", "There is no --target=, where connections go; see --help."),
            ("--listen=8080 --target=/a", "There is no NAME for the units; see --help."),
            (
                "--listen=8080 --target=/a app other",
                "There is another word after NAME, \"other\"; put -- in front of a COMMAND, and write a relative directory as --write=DIR.",
            ),
            (
                "--listen=localhost:80 --target=/a app",
                "Invalid --listen=localhost:80: ListenStream= takes no names, write IP:PORT.",
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
                "Invalid --service=a.socket: it has to be the name of a .service unit.",
            ),
            ("--listen=/ --target=/a app", "Invalid --listen=/: that is a directory."),
            (
                "--listen=1 --target=-x:80 app",
                "Invalid --target=-x:80: it begins with a dash, as an option does.",
            ),
            (
                "--listen=1 --target=/a --service=-x app",
                "Invalid --service=-x: it begins with a dash, as an option of systemctl(1) does.",
            ),
            (
                "--listen=1 --target=/a --service=a@ app",
                "Invalid --service=a@: a template has no process; name an instance of it.",
            ),
            (
                "--listen=1 --target=/a --service=app-proxy app",
                "--service=app-proxy.service is the proxy's own name.",
            ),
            (
                "--listen=1 --target=/a --service=a app -- /bin/b",
                "--service= and a COMMAND can't be had together: one of them is what the proxy starts.",
            ),
            (
                "--listen=1 --target=/a app -- ./b",
                "Invalid COMMAND \"./b\": a service starts in /, write its whole path.",
            ),
            (
                "--listen=1 --target=/a --idle=x app",
                "Invalid --idle=x: it has to be a time span (30s, 5min 20s, infinity).",
            ),
            (
                "--listen=1 --target=/a --user=-x app",
                "Invalid --user=-x: that is no name of an account.",
            ),
            ("--listen=1 --target=/a --force app", "--force is about --write, which is not there."),
            (
                "--listen=1 --target=/a --target=/b app",
                "There are several --target= options; write SELECTOR=TARGET in each, as in --target=:8080=127.0.0.1:3000.",
            ),
            (
                "--listen=1 --listen=2 --target=:1=/a app",
                "No selector selects the socket app-proxy.socket ([::]:2). The sockets are: app-proxy.socket ([::]:1), app-proxy.socket ([::]:2).",
            ),
            ("--listen=1 --target=/a -- /bin/b", "There is no NAME in front of --; see --help."),
            (
                "--listen=1 --target=/a --write= app",
                "socket-proxyd-units: option '--write=' has an empty argument",
            ),
            (
                "--listen=1 --target=/a --service=a --service=b app",
                "Invalid --service=b: it is given twice.",
            ),
            ("--listen=0 --target=/a app", "Invalid --listen=0: nobody would know the port."),
            ("--listen=1 --listen=1 --target=/a app", "The address 1 is given twice."),
            ("--listen=1 --metrics=1 --target=/a app", "The address 1 is given twice."),
            (
                "--listen=80 --target=127.0.0.1:80 app",
                "--listen=80 is what --target=127.0.0.1:80 leads to; let the backend listen on another address.",
            ),
            (
                "--listen=1 --target=/a --user=root app",
                "Invalid --user=root: root's rights are what no unit here has; leave it out.",
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
                "Invalid --metrics=vsock::1: it has to be TCP or a Unix socket.",
            ),
            (
                "--listen=1 --target=/a --metrics=2 --idle=1min app",
                "--idle= can't be had with the --metrics= of a bridge: whoever scrapes would start it again, and its counters with it.",
            ),
            ("--listen=1 --target=/a --write=a --write=b app", "--write is given twice."),
            ("--frob app", "socket-proxyd-units: unrecognized option '--frob'"),
            ("--force=1 app", "socket-proxyd-units: option '--force' doesn't allow an argument"),
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
            let Destination::Write { directory, force: false } = destination else {
                panic!("{words}: {destination:?}")
            };
            assert_eq!(directory, PathBuf::from(expected), "{words}");
            let again = if words.ends_with("/bin/app") { " -- /bin/app" } else { "" };
            assert_eq!(units.command_line(), format!("{PROGRAM} {base} app{again}"));
        }
    }

    #[test]
    fn help_manual_and_completions_have_every_option_and_no_other() {
        for line in HELP.lines() {
            assert!(line.chars().count() <= 80, "{line}");
        }
        let known: BTreeSet<_> = OPTIONS.iter().map(|option| option.name.to_string()).collect();
        assert_eq!(options_in(HELP), known);
        let manual = include_str!("../../man/socket-proxyd-units.8").replace("\\-", "-");
        let manual: Vec<_> = manual.lines().filter(|it| !it.starts_with("systemctl")).collect();
        let manual = manual.join("\n");
        assert_eq!(options_in(&manual), known);
        let bash = include_str!("../../completions/socket-proxyd-units.bash");
        // Without what systemctl(1) is asked for.
        let bash = bash.replace("--no-legend --type=service", "");
        let zsh = include_str!("../../completions/_socket-proxyd-units");
        let fish = include_str!("../../completions/socket-proxyd-units.fish");
        for completion in [&bash, zsh, &options_of_fish(fish)] {
            assert_eq!(options_in(completion), known);
        }
    }
}
