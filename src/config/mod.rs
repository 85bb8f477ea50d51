//! The command line, parsed and checked into a [`Config`].
//!
//! Parsing ends here: once a `Config` exists, no string is interpreted again. [`options`] has
//! each option, its help and its default. A default that depends on other options is set here.

pub mod options;
pub mod parser;
pub mod values;
pub mod selector;
pub mod target;
pub mod listen_address;
pub mod client_set;
pub mod command;
pub mod timespan;

use std::ffi::OsString;
use std::time::Duration;

use crate::config::client_set::ClientSet;
use crate::config::command::{CommandLine, find_program};
use crate::config::options::Arguments;
use crate::config::parser::Request;
use crate::config::selector::Targets;
use crate::config::target::Target;
use crate::config::timespan::TimeSpan;
use crate::config::values::{BusyMode, HandoverMode, ReadyMode, SourceMode};
use crate::logging::LogLevel;
use crate::socket::Keepalive;

/// Everything the command line says, parsed and checked.
#[derive(Debug)]
pub struct Config {
    /// TARGET, or each SELECTOR=TARGET.
    pub targets: Targets,
    /// COMMAND.
    pub command: Option<CommandLine>,
    /// Clients that start nothing and postpone nothing.
    pub passive_from: ClientSet,
    pub handover: Option<HandoverMode>,
    pub backend_wait: TimeSpan,
    pub keepalive: Option<Keepalive>,
    pub ready: ReadyMode,
    pub times: CommandTimes,
    /// `--log-level=`, or else `$SYSTEMD_LOG_LEVEL`.
    pub log_level: LogLevel,
    /// The other options.
    pub args: Arguments,
}

/// When a backend that the proxy starts is frozen and stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CommandTimes {
    /// `--freeze-idle-time=`.
    pub freeze_idle: TimeSpan,
    /// `--stop-idle-time=`.
    pub stop_idle: TimeSpan,
    /// `--min-run-time=`, from readiness.
    pub min_run: TimeSpan,
}

impl Config {
    /// Parses the arguments, the program's name first.
    ///
    /// # Errors
    /// One line for standard error that names the option and the value.
    pub fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Request<Self>, String> {
        let args = match Arguments::read(args)? {
            Request::Run(args) => args,
            Request::Print(text) => return Ok(Request::Print(text)),
        };
        let targets = check(&args)?;
        find_programs(&args)?;
        Ok(Request::Run(Self::new(args, targets)))
    }

    /// Sets the defaults, of arguments that were checked.
    pub fn new(mut args: Arguments, targets: Targets) -> Self {
        let default_wait = if starts(&args) { START_WAIT } else { Duration::ZERO };
        let command = args.command.take().map(|words| CommandLine { words });
        let times = CommandTimes {
            freeze_idle: args.freeze_idle_time.unwrap_or(TimeSpan::INFINITY),
            stop_idle: args.stop_idle_time.unwrap_or(TimeSpan::INFINITY),
            min_run: args.min_run_time.unwrap_or(TimeSpan::ZERO),
        };
        Self {
            targets,
            command,
            passive_from: args.passive_from.take().unwrap_or_default(),
            handover: (args.handover != HandoverMode::Never).then_some(args.handover),
            backend_wait: args.backend_wait.unwrap_or_else(|| TimeSpan::new(default_wait)),
            keepalive: args.keepalive.finite().map(Keepalive::after),
            ready: args.ready.clone().unwrap_or(ReadyMode::Connect),
            times,
            log_level: args.log_level.unwrap_or_else(LogLevel::from_environment),
            args,
        }
    }

    /// Whether the proxy starts the backend.
    pub fn starts_backend(&self) -> bool {
        self.command.is_some() || self.args.start_command.is_some()
    }
}

/// Checks the options together, without a look at the machine. Returns the targets.
///
/// # Errors
/// One line on what is wrong.
pub fn check(arguments: &Arguments) -> Result<Targets, String> {
    if let Some((_, why)) = CONFLICTS.iter().find(|(is_so, _)| is_so(arguments)) {
        return Err((*why).into());
    }
    let targets = Targets::parse(&arguments.targets)?;
    if arguments.command.is_some() && matches!(targets, Targets::Selected(_)) {
        return Err(
            "SELECTOR=TARGET cannot be combined with COMMAND, which serves one TARGET. (Write \
                    TARGET -- COMMAND [ARG...].)"
                .into(),
        );
    }
    if arguments.start_command.is_some() && targets.iter().count() > 1 {
        return Err("--start-command= serves one TARGET. (Run a proxy for each.)".into());
    }
    if arguments.source == SourceMode::Client && !targets.iter().any(Target::has_ip) {
        return Err(
            "--source=client needs a TARGET with an IP address or a host name: over Unix and \
                    vsock sockets a backend sees no IP address."
                .into(),
        );
    }
    Ok(targets)
}

/// Checks that the machine has each program that the proxy may run.
///
/// # Errors
/// One line that names the program and the reason.
pub fn find_programs(arguments: &Arguments) -> Result<(), String> {
    arguments.programs().try_for_each(|(origin, words)| find_program(origin, words))
}

/// How long clients wait by default while the proxy starts their backend.
const START_WAIT: Duration = Duration::from_secs(90);

/// Whether the proxy starts the backend.
fn starts(args: &Arguments) -> bool {
    args.command.is_some() || args.start_command.is_some()
}

/// Options that exclude each other, and the error. The first that applies counts.
type Conflict = (fn(&Arguments) -> bool, &'static str);

const CONFLICTS: [Conflict; 14] = [
    (|args| args.targets.is_empty(), "Not enough parameters. (There is no TARGET; see --help.)"),
    (
        |args| args.command.is_some() && args.targets.len() > 1,
        "Too many parameters: one COMMAND serves one TARGET. (Write TARGET -- COMMAND [ARG...], and run \
         a proxy for each.)",
    ),
    (
        |args| args.command.is_some() && args.handover != HandoverMode::Never,
        "--handover= cannot be combined with COMMAND, which stops with the proxy. (Run COMMAND from a \
         unit of its own.)",
    ),
    (
        |args| args.handover != HandoverMode::Never && !args.drain_time.is_zero(),
        "--handover= cannot be combined with --drain-time=: the first hands open connections to the next \
         process, the second waits for their end.",
    ),
    (
        |args| args.command.is_none() && args.ready == Some(ReadyMode::Notify),
        "--ready=notify needs a COMMAND. (Write TARGET -- COMMAND [ARG...].)",
    ),
    (
        |args| {
            let has_wait = args.backend_wait.is_some_and(|wait| !wait.is_zero());
            args.ready.is_some() && !starts(args) && !has_wait
        },
        "--ready= needs a COMMAND, a --start-command=, or a --backend-wait= above 0.",
    ),
    (
        |args| args.command.is_some() && args.start_command.is_some(),
        "--start-command= cannot be combined with COMMAND, which the proxy starts itself.",
    ),
    (
        |args| args.start_command.is_none() && args.stop_command.is_some(),
        "--stop-command= needs a --start-command=.",
    ),
    (
        |args| {
            let stops = args.command.is_some() || args.stop_command.is_some();
            args.stop_idle_time.is_some() && !stops
        },
        "--stop-idle-time= needs a COMMAND or a --stop-command=.",
    ),
    (
        |args| args.command.is_none() && args.freeze_idle_time.is_some(),
        "--freeze-idle-time= needs a COMMAND. (Write TARGET -- COMMAND [ARG...].)",
    ),
    (
        |args| args.command.is_none() && args.busy == BusyMode::Notify,
        "--busy=notify needs a COMMAND. (Write TARGET -- COMMAND [ARG...].)",
    ),
    (
        |args| args.min_run_time.is_some() && !starts(args),
        "--min-run-time= needs a COMMAND or a --start-command=.",
    ),
    (
        |args| {
            let end = args
                .stop_idle_time
                .map_or(args.exit_idle_time, |stop| stop.min(args.exit_idle_time));
            args.freeze_idle_time.is_some_and(|freeze| freeze >= end && end != TimeSpan::INFINITY)
        },
        "--freeze-idle-time= must be less than --stop-idle-time= and --exit-idle-time=, or COMMAND stops \
         before it is frozen.",
    ),
    (
        |args| starts(args) && args.backend_wait.is_some_and(|wait| wait.is_zero()),
        "--backend-wait=0 leaves COMMAND or --start-command= no time.",
    ),
];

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::values::Overflow;

    fn parse(args: &[&str]) -> Result<Config, String> {
        let args = std::iter::once("socket-proxyd").chain(args.iter().copied());
        match Config::parse(args.map(OsString::from))? {
            Request::Run(config) => Ok(config),
            Request::Print(text) => Err(text),
        }
    }

    fn connections_max(args: &[&str]) -> Result<u32, String> {
        parse(args).map(|config| config.args.connections_max.get())
    }

    #[test]
    fn words_that_are_no_utf8_are_refused_or_kept() {
        use std::os::unix::ffi::OsStringExt;
        let parse = |words: &[&[u8]]| {
            let words = words.iter().map(|word| OsString::from_vec(word.to_vec()));
            Config::parse(std::iter::once("socket-proxyd".into()).chain(words)).map(drop)
        };
        for word in [&b"-c\xff"[..], b"-\xff", b"--\xff=1", b"--ready=\xff"] {
            assert!(!parse(&[word, b"x"]).unwrap_err().contains('\n'), "{word:?}");
        }
        assert_eq!(parse(&[b"--listen=/\xff", b"/\xfe"]), Ok(()));
    }

    #[test]
    fn refused_values_are_named_with_their_option() {
        for (option, value, why) in [
            ("--overflow <refuse|wait>", "maybe", " [possible values: refuse, wait]"),
            ("--source <proxy|client>", "yes", " [possible values: proxy, client]"),
            ("--proxy-protocol <v1|v2>", "v3", " [possible values: v1, v2]"),
            (
                "--handover <never|restart|crash>",
                "yes",
                " [possible values: never, restart, crash]",
            ),
            ("--keepalive <TIME>", "0", ": it must be more than 0, or infinity"),
            ("--keepalive <TIME>", "10h", ": it must be at most 9h 6min 7s, or infinity"),
            ("--threads <N>", "0", ": it is not a number from 1 to 256"),
            ("--connection-idle-time <TIME>", "0", ": it must be more than 0, or infinity"),
            ("--connect-timeout <TIME>", "0", ": it must be more than 0, or infinity"),
            ("--drain-time <TIME>", "x", ": it is not a time span (30s, 5min 20s, infinity)"),
            ("--connections-max <N>", "0", ": Connection limit is too low."),
            ("--connections-max <N>", "-1", ": it is not a number from 1 to 4294967295"),
            ("--listen <ADDRESS>", "99999", ": port 99999 is above 65535"),
            ("--metrics <ADDRESS>", "vsock:1:2", ": it must be a TCP or Unix socket"),
        ] {
            let name = option.split(' ').next().unwrap();
            let expected = format!("invalid value '{value}' for '{option}'{why}");
            assert_eq!(parse(&[&format!("{name}={value}"), "/a"]).unwrap_err(), expected);
            assert_eq!(parse(&[name, value, "/a"]).unwrap_err(), expected);
        }
        let config = parse(&["--keepalive=1500ms", "/a"]).unwrap();
        assert_eq!(config.keepalive, Some(Keepalive::after(Duration::from_secs(2))));
        assert_eq!(parse(&["--keepalive=infinity", "/a"]).unwrap().keepalive, None);
    }

    #[test]
    fn abbreviations_are_resolved_among_upstreams_options_first() {
        for conn in ["--conn=5", "--connections-m=5", "--c=5", "-c5"] {
            assert_eq!(connections_max(&[conn, "x"]), Ok(5), "{conn}");
        }
        assert_eq!(connections_max(&["--conn", "5", "x"]), Ok(5));
        for name in ["connections-max", "exit-idle-time", "proxy-protocol", "help", "version"] {
            for end in 1..=name.len() {
                let error = parse(&[&format!("--{}=?", &name[..end]), "x"]).unwrap_err();
                assert!(error.contains(&format!(" '?' for '--{name}")), "{error}");
            }
        }
        let config = parse(&["--connect-t=3", "x"]).unwrap();
        assert_eq!(config.args.connect_timeout.to_string(), "3s");
        assert!(parse(&["--", "--conn"]).is_ok(), "a target after --");
    }

    #[test]
    fn the_last_of_a_repeated_option_wins() {
        assert_eq!(connections_max(&["-c", "5", "x", "--connections-max=7"]), Ok(7));
        assert_eq!(parse(&["--listen=1", "--listen=2", "x"]).unwrap().args.listen.len(), 2);
    }

    #[test]
    fn defaults_are_those_of_the_manual() {
        let config = parse(&["/a"]).unwrap();
        assert_eq!(
            (config.args.connections_max.get(), config.args.overflow),
            (256, Overflow::Refuse)
        );
        assert_eq!(config.args.exit_idle_time, TimeSpan::INFINITY);
        assert!(config.args.drain_time.is_zero() && config.backend_wait.is_zero());
        assert_eq!(config.handover, None);
        assert_eq!(config.args.connect_timeout, TimeSpan::new(Duration::from_secs(10)));
        assert_eq!(config.args.connection_idle_time, TimeSpan::INFINITY);
        assert_eq!((config.keepalive, config.args.proxy_protocol), (None, None));
        assert_eq!((config.args.threads.get(), config.args.metrics), (1, None));
        assert_eq!(config.ready, ReadyMode::Connect);
        let config = parse(&["/a", "--", "ls"]).unwrap();
        assert_eq!(config.backend_wait, TimeSpan::new(Duration::from_secs(90)));
        assert_eq!(config.times.stop_idle, TimeSpan::INFINITY);
    }

    #[test]
    fn dashes_stand_before_a_command_or_a_target() {
        let words = |args: &[&str]| {
            let config = parse(args).unwrap();
            let target = config.targets.iter().next().unwrap().to_string();
            (target, config.command.map(|it| it.words.len()))
        };
        assert_eq!(words(&["--", "/a"]), ("/a".into(), None));
        assert_eq!(words(&["/a", "--", "ls", "-l"]), ("/a".into(), Some(2)));
        assert_eq!(words(&["-c5", "--", "/a", "--", "ls", "--", "-c"]), ("/a".into(), Some(3)));
    }

    #[test]
    fn errors_are_one_line() {
        for (args, message) in [
            (&[][..], "Not enough parameters. (There is no TARGET; see --help.)"),
            (
                &["a", "b"],
                "Too many parameters. (Put -- in front of a COMMAND, or write SELECTOR=TARGET for \
                 each socket.)",
            ),
            (
                &["a=b", "--", "c"],
                "SELECTOR=TARGET cannot be combined with COMMAND, which serves one TARGET. (Write \
                 TARGET -- COMMAND [ARG...].)",
            ),
            (
                &["--handover=restart", "a", "--", "b"],
                "--handover= cannot be combined with COMMAND, which stops with the proxy. (Run \
                 COMMAND from a unit of its own.)",
            ),
            (
                &["--handover=crash", "--drain-time=5", "a"],
                "--handover= cannot be combined with --drain-time=: the first hands open connections \
                 to the next process, the second waits for their end.",
            ),
            (
                &["--ready=notify", "--backend-wait=1s", "a"],
                "--ready=notify needs a COMMAND. (Write TARGET -- COMMAND [ARG...].)",
            ),
            (
                &["--ready=http:/", "--backend-wait=0", "a"],
                "--ready= needs a COMMAND, a --start-command=, or a --backend-wait= above 0.",
            ),
            (
                &["--source=client", "a=/a", "b=vsock:3:80"],
                "--source=client needs a TARGET with an IP address or a host name: over Unix and vsock \
                 sockets a backend sees no IP address.",
            ),
            (&["--foo", "x"], "unexpected argument '--foo' found"),
            (&["-x"], "unexpected argument '-x' found"),
            (&["-c"], "a value is required for '--connections-max <N>' but none was supplied"),
            (&["--help=3"], "unexpected value '3' for '--help' found; no more were expected"),
            (&[""], "Invalid target \"\": the host is empty."),
        ] {
            assert_eq!(parse(args).unwrap_err(), message, "{args:?}");
        }
    }
}
