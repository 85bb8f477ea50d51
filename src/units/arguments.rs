//! What the command line of `socket-proxyd-units` says, and what is wrong with it.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;

use crate::address::{Address, Identity};
use crate::getopt::{Known, Meaning, Word, Words};
use crate::open::ListenAddress;
use crate::selector::Targets;
use crate::target::{Port, Target};
use crate::timespan::TimeSpan;
use crate::units::escape::{shell_word, unit_name, value};

const PROGRAM: &str = "socket-proxyd-units";

const VERSION: &str = concat!("socket-proxyd-units ", env!("CARGO_PKG_VERSION"), "\n");

/// Where an administrator's units are.
const DIRECTORY: &str = "/etc/systemd/system";

/// The longest name of a unit, systemd.unit(5), without what is added here.
const NAME_MAX: usize = 255 - "-proxy.service.d".len();

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
What becomes of them:
     --write[=DIR]     Write them to DIR [/etc/systemd/system], don't print them
     --force           Even over files that this program has not written
  -h --help, --version  Show this or the version; see socket-proxyd-units(8)
";

type Set = fn(&mut Arguments, &OsStr) -> Result<(), String>;

/// All options, in the order of `--help`.
const OPTIONS: [Known<Set>; 10] = {
    const fn option(name: &'static str, meaning: Meaning<Set>) -> Known<Set> {
        let letter = if name.as_bytes()[0] == b'h' { Some('h') } else { None };
        Known { name, letter, is_upstreams: false, meaning }
    }
    [
        option("listen", Meaning::Takes(|it, text| it.listen(text))),
        option("target", Meaning::Takes(|it, text| it.target(text))),
        option("service", Meaning::Takes(|it, text| it.service(text))),
        option("idle", Meaning::Takes(|it, text| it.idle(text))),
        option("user", Meaning::Takes(|it, text| it.account("user", text))),
        option("group", Meaning::Takes(|it, text| it.account("group", text))),
        option("write", Meaning::MayTakePath(|it, text| it.write(text))),
        option("force", Meaning::Flag(|it, _| it.force())),
        option("help", Meaning::Prints(HELP)),
        option("version", Meaning::Prints(VERSION)),
    ]
};

/// What the command line asks for.
#[derive(Debug)]
pub(crate) enum Request {
    /// Units.
    Units(Box<Units>, Destination),
    /// This text.
    Print(&'static str),
}

/// Where they go.
#[derive(Debug)]
pub(crate) enum Destination {
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

/// A proxy that is to have units, checked.
#[derive(Debug)]
pub(crate) struct Units {
    /// As it was given.
    pub(crate) name: String,
    /// The name of its units, without suffixes.
    pub(crate) unit: String,
    /// `ListenStream=`, one each.
    pub(crate) listen: Vec<String>,
    /// The arguments behind the proxy's options.
    pub(crate) target_words: Vec<OsString>,
    /// The backends.
    pub(crate) targets: Vec<Target>,
    /// What they start.
    pub(crate) starts: Starts,
    pub(crate) idle: Option<String>,
    pub(crate) user: Option<String>,
    pub(crate) group: Option<String>,
    /// The command line that asks for them, for a shell.
    pub(crate) command_line: String,
}

/// What the first client starts.
#[derive(Debug)]
pub(crate) enum Starts {
    /// Only the proxy.
    Nothing,
    /// A service that exists.
    Service(String),
    /// A program.
    Command(Vec<OsString>),
}

/// The command line as it is taken apart.
#[derive(Debug, Default)]
pub(crate) struct Arguments {
    listen: Vec<(ListenAddress, String)>,
    targets: Vec<OsString>,
    service: Option<String>,
    idle: Option<String>,
    user: Option<String>,
    group: Option<String>,
    write: Option<PathBuf>,
    force: bool,
}

/// Reads the arguments, the program's name first.
///
/// # Errors
/// One line that names the option and the value.
pub(crate) fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Request, String> {
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
    let name = match &names[..] {
        [] => return Err("There is no NAME for the units; see --help.".into()),
        [name] => name.to_str().ok_or("NAME has to be UTF-8.")?.to_string(),
        [_, another, ..] => {
            return Err(format!(
                "There is another word after NAME, {another:?}; put -- in front of a COMMAND."
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
    let units = arguments.into_units(name, command, command_line(&args))?;
    Ok(Request::Units(Box::new(units), destination))
}

impl Arguments {
    fn listen(&mut self, text: &OsStr) -> Result<(), String> {
        let refused = |why: &str| format!("Invalid --listen={}: {why}.", text.display());
        let address = ListenAddress::parse(text).map_err(|why| refused(&why))?;
        if let ListenAddress::Host(host) = &address
            && (host.literal().is_none() || matches!(host.port, Port::Service(_)))
        {
            return Err(refused("ListenStream= takes no names, write IP:PORT"));
        }
        let text = text.to_str().ok_or_else(|| refused("a unit has to be UTF-8"))?;
        self.listen.push((address, value(text).map_err(|why| refused(&why))?));
        Ok(())
    }

    fn target(&mut self, text: &OsStr) -> Result<(), String> {
        self.targets.push(text.into());
        Ok(())
    }

    fn service(&mut self, text: &OsStr) -> Result<(), String> {
        let refused = |why: &str| format!("Invalid --service={}: {why}.", text.display());
        let name = text.to_str().ok_or_else(|| refused("it is no UTF-8"))?;
        let Some((stem, suffix)) = name.rsplit_once('.').or(Some((name, "service"))) else {
            unreachable!("one of the two is there")
        };
        let is_name = |c: char| c.is_ascii_alphanumeric() || "-_.:\\@".contains(c);
        if suffix != "service" || stem.is_empty() || !stem.chars().all(is_name) {
            return Err(refused("it has to be the name of a .service unit"));
        }
        if stem.ends_with('@') {
            return Err(refused("a template has no process; name an instance of it"));
        }
        self.service = Some(format!("{stem}.service"));
        Ok(())
    }

    fn idle(&mut self, text: &OsStr) -> Result<(), String> {
        let text = text.to_string_lossy();
        let refused =
            || format!("Failed to parse --idle= argument: {text} (30s, 5min 20s, infinity)");
        TimeSpan::parse(&text).ok_or_else(refused)?;
        self.idle = Some(text.into());
        Ok(())
    }

    fn account(&mut self, option: &str, text: &OsStr) -> Result<(), String> {
        let name = text.to_str().unwrap_or_default();
        let is_name = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        if name.is_empty() || !name.chars().all(is_name) || name.starts_with('-') {
            return Err(format!(
                "Invalid --{option}={}: it is no {option}'s name.",
                text.display()
            ));
        }
        let place = if option == "user" { &mut self.user } else { &mut self.group };
        *place = Some(name.into());
        Ok(())
    }

    fn write(&mut self, text: &OsStr) -> Result<(), String> {
        self.write = Some(if text.is_empty() { DIRECTORY.into() } else { text.into() });
        Ok(())
    }

    fn force(&mut self) -> Result<(), String> {
        self.force = true;
        Ok(())
    }

    /// Checks what only all of it together can tell.
    fn into_units(
        self,
        name: String,
        command: Option<Vec<OsString>>,
        command_line: String,
    ) -> Result<Units, String> {
        let unit = unit_name(&name);
        if name.is_empty() || unit.len() > NAME_MAX {
            return Err(format!("Invalid NAME {name:?}: it has to have 1 to {NAME_MAX} bytes."));
        }
        if let Some(suffix) = [".service", ".socket"].iter().find(|it| name.ends_with(**it)) {
            return Err(format!("Invalid NAME {name:?}: write it without {suffix}."));
        }
        let unit = format!("{unit}-proxy");
        if self.listen.is_empty() {
            return Err("There is no --listen=, where clients come in; see --help.".into());
        }
        if self.targets.is_empty() {
            return Err("There is no --target=, where connections go; see --help.".into());
        }
        let targets = Targets::parse(&self.targets)
            .map_err(|error| error.replace("Too many parameters.", "Several --target= options."))?;
        self.check_assignment(&targets, &unit)?;
        let starts = match (self.service, command) {
            (Some(_), Some(_)) => {
                return Err(
                    "--service= and a COMMAND can't be had together: one of them is what the \
                            proxy starts."
                        .into(),
                );
            }
            (Some(service), None) if service == format!("{unit}.service") => {
                return Err(format!("--service={service} is the proxy's own name."));
            }
            (Some(service), None) => Starts::Service(service),
            (None, Some(words)) => {
                if matches!(targets, Targets::Selected(_)) {
                    return Err("A COMMAND serves one --target=, without a selector.".into());
                }
                check_command(&words)?;
                Starts::Command(words)
            }
            (None, None) => Starts::Nothing,
        };
        Ok(Units {
            name,
            unit,
            listen: self.listen.into_iter().map(|(_, text)| text).collect(),
            targets: targets.iter().cloned().collect(),
            target_words: self.targets,
            starts,
            idle: self.idle,
            user: self.user,
            group: self.group,
            command_line,
        })
    }

    /// That each socket has its backend: as the proxy does at its start, and in its words.
    fn check_assignment(&self, targets: &Targets, unit: &str) -> Result<(), String> {
        let address = |address: &ListenAddress| match address {
            ListenAddress::Any(port) => {
                Address::Inet((std::net::Ipv6Addr::UNSPECIFIED, *port).into())
            }
            ListenAddress::Host(host) => host.literal().map_or(Address::Unix(None), Address::Inet),
            ListenAddress::Unix(name) => Address::Unix(Some(Box::new(name.clone()))),
            ListenAddress::Vsock(address) => address.clone(),
        };
        let name = Some(format!("{unit}.socket"));
        let identities: Vec<_> = self
            .listen
            .iter()
            .map(|(listen, _)| Identity { name: name.clone(), address: address(listen) })
            .collect();
        targets.assign(&identities.iter().collect::<Vec<_>>()).map(drop)
    }
}

fn check_command(words: &[OsString]) -> Result<(), String> {
    match words.first().map(|program| program.as_bytes()) {
        None | Some(b"") => Err("There is no COMMAND after --.".into()),
        Some(program) if program.contains(&b'/') && !program.starts_with(b"/") => Err(format!(
            "Invalid COMMAND {:?}: a service starts in /, write its whole path.",
            OsStr::from_bytes(program)
        )),
        Some(_) => Ok(()),
    }
}

/// The same command line, to be run again by a shell: without where it was written to.
fn command_line(args: &[OsString]) -> String {
    let mut line = PROGRAM.to_string();
    let mut is_command = false;
    let mut was_write = false;
    for word in args.iter().skip(1).map(|word| word.clone().into_vec()) {
        let is_directory = was_write && matches!(word.first(), Some(b'/' | b'.'));
        was_write = !is_command && word == b"--write";
        is_command |= word == b"--";
        let is_about_files =
            was_write || is_directory || word == b"--force" || word.starts_with(b"--write=");
        if is_command || !is_about_files {
            line.push(' ');
            line.push_str(&shell_word(&word));
        }
    }
    line
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::options::tests::{options_in, options_of_fish};

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
                "There is another word after NAME, \"other\"; put -- in front of a COMMAND.",
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
                "Failed to parse --idle= argument: x (30s, 5min 20s, infinity)",
            ),
            ("--listen=1 --target=/a --user=-x app", "Invalid --user=-x: it is no user's name."),
            ("--listen=1 --target=/a --force app", "--force is about --write, which is not there."),
            (
                "--listen=1 --target=/a --target=/b app",
                "Several --target= options. (Put -- in front of a COMMAND, or write SELECTOR=TARGET for each socket.)",
            ),
            (
                "--listen=1 --listen=2 --target=:1=/a app",
                "No selector selects the socket app-proxy.socket ([::]:2). The sockets are: app-proxy.socket ([::]:1), app-proxy.socket ([::]:2).",
            ),
            ("--frob app", "socket-proxyd-units: unrecognized option '--frob'"),
            ("--force=1 app", "socket-proxyd-units: option '--force' doesn't allow an argument"),
        ] {
            assert_eq!(parse(line).unwrap_err(), error, "{line}");
        }
    }

    #[test]
    fn where_they_are_written_stands_behind_the_option_or_after_it() {
        let base = "--listen=1 --target=/a";
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
            assert_eq!(units.command_line, format!("{PROGRAM} {base} app{again}"));
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
