//! The command line: upstream's options first, as upstream reads them, into a finished [`Config`].
//!
//! Parsing ends here: after a `Config` exists no string is interpreted again.

pub mod options;
pub mod getopt;
pub mod values;
pub mod selector;
pub mod target;
pub mod listen_address;
pub mod command;
pub mod timespan;

use std::ffi::OsString;
use std::num::{NonZeroU32, NonZeroUsize};
use std::time::Duration;

use crate::config::command::CommandLine;
use crate::config::getopt::{Word, Words};
use crate::config::listen_address::{ListenAddress, MetricsAddress};
use crate::config::options::{Arguments, OPTIONS};
use crate::config::selector::Targets;
use crate::config::timespan::TimeSpan;
use crate::config::values::{HandoverMode, Overflow, ReadyMode};
use crate::logging::LogLevel;
use crate::proxy_protocol::ProxyProtocol;
use crate::socket::Keepalive;

/// Everything the command line says, read and checked.
#[derive(Clone, Debug)]
pub struct Config {
    /// The backends.
    pub targets: Targets,
    /// Sockets to open; none when systemd passes them.
    pub listen: Vec<ListenAddress>,
    /// The exact cap on connections, dialled ones included.
    pub connections_max: NonZeroU32,
    /// What becomes of clients above it.
    pub overflow: Overflow,
    /// Exit after this long without a connection.
    pub exit_idle_time: TimeSpan,
    /// On a signal, open connections have this long to end.
    pub drain_time: TimeSpan,
    /// What open connections outlive.
    pub handover: Option<HandoverMode>,
    /// What serves the target, if it is ours to start and stop.
    pub application: Option<Application>,
    /// How long a client is held while the backend is not up yet.
    pub backend_wait: TimeSpan,
    /// For one attempt to reach one address.
    pub connect_timeout: TimeSpan,
    /// A connection that carries nothing for this long is closed.
    pub connection_idle_time: TimeSpan,
    /// When TCP peers that carry nothing are probed.
    pub keepalive: Option<Keepalive>,
    /// The header that tells the backend who the client is.
    pub proxy_protocol: Option<ProxyProtocol>,
    /// Event loops, each a thread.
    pub threads: NonZeroUsize,
    /// Where scrapers ask for metrics.
    pub metrics: Option<MetricsAddress>,
    /// What is logged; from `--log-level=`, or else `$SYSTEMD_LOG_LEVEL`.
    pub log_level: LogLevel,
}

/// An application that runs only while somebody uses it.
#[derive(Clone, Debug)]
pub struct Application {
    /// COMMAND and its arguments.
    pub command: CommandLine,
    /// How it is known to be ready.
    pub ready: ReadyMode,
    /// It is stopped after this long without a connection.
    pub stop_idle_time: TimeSpan,
}

/// What the command line asks for.
#[derive(Debug)]
pub enum Request {
    /// Serve.
    Serve(Box<Config>),
    /// Print this on standard output and exit with success.
    Print(String),
}

impl Config {
    /// Reads the arguments, the program's name first.
    ///
    /// # Errors
    /// One line for standard error that names the option and the value.
    pub fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Request, String> {
        let mut arguments = Arguments::default();
        let mut command = None;
        let mut words = Words::new("socket-proxyd", &OPTIONS, args);
        // Each value is read as it comes, so that the first mistake is the one that is said, as
        // upstream.
        while let Some(word) = words.next()? {
            match word {
                Word::Value(set, value) => set(&mut arguments, &value)?,
                Word::Prints(text) => return Ok(Request::Print(text.into())),
                Word::Argument(argument) => arguments.targets.push(argument),
                Word::Command(given) => command = Some(given),
            }
        }
        if arguments.targets.is_empty() {
            return Err("Not enough parameters. (There is no TARGET; see --help.)".into());
        }
        if command.is_some() && arguments.targets.len() > 1 {
            return Err("Too many parameters: one COMMAND serves one TARGET, write \
                        TARGET -- COMMAND [ARG...], and run a proxy for each."
                .into());
        }
        let targets = Targets::parse(&arguments.targets)?;
        if command.is_some() && matches!(targets, Targets::Selected(_)) {
            let why = "SELECTOR=TARGET can't be had with a COMMAND, which serves one TARGET; write \
                       TARGET -- COMMAND [ARG...].";
            return Err(why.into());
        }
        if arguments.handover.is_some() && command.is_some() {
            let why = "--handover= can't be had with a COMMAND, which ends with the proxy, and with \
                       it the connections; give it a unit of its own.";
            return Err(why.into());
        }
        if arguments.handover.is_some() && !arguments.drain_time.is_zero() {
            let why = "--handover= hands open connections over when the proxy is told to stop, and \
                       --drain-time= waits for their end; one of them has to go.";
            return Err(why.into());
        }
        let application = match command {
            Some(words) => Some(Application {
                command: CommandLine::find(words)?,
                ready: arguments.ready.unwrap_or(ReadyMode::Connect),
                stop_idle_time: arguments.stop_idle_time.unwrap_or(TimeSpan::INFINITY),
            }),
            None => {
                let given = [
                    ("ready", arguments.ready.is_some()),
                    ("stop-idle-time", arguments.stop_idle_time.is_some()),
                ];
                if let Some((option, _)) = given.iter().find(|(_, given)| *given) {
                    return Err(format!(
                        "--{option}= is about a COMMAND, and there is none; write \
                         TARGET -- COMMAND [ARG...]."
                    ));
                }
                None
            }
        };
        let backend_wait = match (arguments.backend_wait, &application) {
            (Some(wait), Some(_)) if wait.is_zero() => {
                return Err("--backend-wait=0 leaves COMMAND no time to start.".into());
            }
            (Some(wait), _) => wait,
            (None, Some(_)) => TimeSpan::new(COMMAND_WAIT),
            (None, None) => TimeSpan::new(Duration::ZERO),
        };
        Ok(Request::Serve(Box::new(Self {
            targets,
            listen: arguments.listen,
            connections_max: arguments.connections_max,
            overflow: arguments.overflow,
            exit_idle_time: arguments.exit_idle_time,
            drain_time: arguments.drain_time,
            handover: arguments.handover,
            application,
            backend_wait,
            connect_timeout: arguments.connect_timeout,
            connection_idle_time: arguments.connection_idle_time,
            keepalive: arguments.keepalive.finite().map(Keepalive::after),
            proxy_protocol: arguments.proxy_protocol,
            threads: arguments.threads,
            metrics: arguments.metrics,
            log_level: arguments.log_level.unwrap_or_else(LogLevel::from_environment),
        })))
    }
}

/// How long clients are held by default while COMMAND starts.
const COMMAND_WAIT: Duration = Duration::from_secs(90);

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(args: &[&str]) -> Result<Config, String> {
        let args = std::iter::once("socket-proxyd").chain(args.iter().copied());
        match Config::parse(args.map(OsString::from))? {
            Request::Serve(config) => Ok(*config),
            Request::Print(text) => Err(text),
        }
    }

    fn connections_max(args: &[&str]) -> Result<u32, String> {
        parse(args).map(|config| config.connections_max.get())
    }

    #[test]
    fn words_that_are_no_utf8_are_refused_or_kept() {
        use std::os::unix::ffi::OsStringExt;
        let parse = |words: &[&[u8]]| {
            let words = words.iter().map(|word| OsString::from_vec(word.to_vec()));
            Config::parse(std::iter::once("socket-proxyd".into()).chain(words)).map(drop)
        };
        for (word, message) in [
            (&b"-c\xff"[..], "Failed to parse --connections-max= argument: \u{fffd}"),
            (b"-\xff", "socket-proxyd: unrecognized option '-\u{fffd}'"),
            (b"--\xff=1", "socket-proxyd: unrecognized option '--\u{fffd}'"),
            (b"--ready=\xff", "Failed to parse --ready= argument: \u{fffd} (connect or notify)"),
        ] {
            assert_eq!(parse(&[word, b"x"]).unwrap_err(), message);
        }
        assert_eq!(parse(&[b"--listen=/\xff", b"/\xfe"]), Ok(()));
    }

    #[test]
    fn what_an_option_does_not_take_is_said_with_what_it_does() {
        for (option, says) in [
            ("--overflow=maybe", "maybe (refuse or wait)"),
            ("--proxy-protocol=v3", "v3 (v1 or v2)"),
            ("--handover=yes", "yes (never, restart or crash)"),
            ("--keepalive=0", "0 (more than 0, up to 32767s, or infinity)"),
            ("--keepalive=10h", "10h (more than 0, up to 32767s, or infinity)"),
            ("--threads=0", "0 (1 to 256)"),
            ("--connection-idle-time=0", "0 (more than 0, or infinity)"),
            ("--connect-timeout=0", "0 (more than 0, or infinity)"),
            ("--drain-time=x", "x (30s, 5min 20s, infinity)"),
        ] {
            let name = option.split('=').next().unwrap();
            let expected = format!("Failed to parse {name}= argument: {says}");
            assert_eq!(parse(&[option, "/a"]).unwrap_err(), expected);
        }
        let config = parse(&["--keepalive=1500ms", "/a"]).unwrap();
        assert_eq!(config.keepalive, Some(Keepalive::after(Duration::from_secs(2))));
        assert_eq!(parse(&["--keepalive=infinity", "/a"]).unwrap().keepalive, None);
    }

    #[test]
    fn prefixes_are_resolved_among_upstreams_options_first() {
        for conn in ["--conn=5", "--connections-m=5", "--c=5", "-c5"] {
            assert_eq!(connections_max(&[conn, "x"]), Ok(5), "{conn}");
        }
        assert_eq!(connections_max(&["--conn", "5", "x"]), Ok(5));
        let config = parse(&["--connect-t=3", "x"]).unwrap();
        assert_eq!(config.connect_timeout.to_string(), "3s");
        assert!(parse(&["--", "--conn"]).is_ok(), "a target after --");
    }

    #[test]
    fn the_last_of_a_repeated_option_wins() {
        assert_eq!(connections_max(&["-c", "5", "x", "--connections-max=7"]), Ok(7));
        assert_eq!(parse(&["--listen=1", "--listen=2", "x"]).unwrap().listen.len(), 2);
    }

    #[test]
    fn messages_are_upstreams() {
        for (args, message) in [
            (&[][..], "Not enough parameters. (There is no TARGET; see --help.)"),
            (
                &["a", "b"],
                "Too many parameters. (Put -- in front of a COMMAND, or write SELECTOR=TARGET for \
                 each socket.)",
            ),
            (
                &["a=b", "--", "c"],
                "SELECTOR=TARGET can't be had with a COMMAND, which serves one TARGET; write \
                 TARGET -- COMMAND [ARG...].",
            ),
            (
                &["--handover=restart", "a", "--", "b"],
                "--handover= can't be had with a COMMAND, which ends with the proxy, and with it the \
                 connections; give it a unit of its own.",
            ),
            (
                &["--handover=crash", "--drain-time=5", "a"],
                "--handover= hands open connections over when the proxy is told to stop, and \
                 --drain-time= waits for their end; one of them has to go.",
            ),
            (&["-c", "0", "x"], "Connection limit is too low."),
            (&["-c=5", "x"], "Failed to parse --connections-max= argument: =5"),
            (&["-c", "0", "--help"], "Connection limit is too low."),
            (&["-cx", "-c5", "x"], "Failed to parse --connections-max= argument: x"),
            (&["--c", "--he"], "Failed to parse --connections-max= argument: --he"),
            (
                &["--connect-t=x", "y"],
                "Failed to parse --connect-timeout= argument: x (30s, 5min 20s, infinity)",
            ),
            (&["-c", "-1", "x"], "Failed to parse --connections-max= argument: -1"),
            (
                &["--exit-idle-time=foo", "x"],
                "Failed to parse --exit-idle-time= argument: foo (30s, 5min 20s, infinity)",
            ),
            (&["--foo", "x"], "socket-proxyd: unrecognized option '--foo'"),
            (&["-x"], "socket-proxyd: unrecognized option '-x'"),
            (&["-xfoo"], "socket-proxyd: unrecognized option '-x'"),
            (&["--=x", "y"], "socket-proxyd: unrecognized option '--'"),
            (
                &["--l=x", "y"],
                "socket-proxyd: option '--l' is ambiguous; possibilities: --listen, --log-level",
            ),
            (&["-c"], "socket-proxyd: option '--connections-max' requires an argument"),
            (&["--help=3"], "socket-proxyd: option '--help' doesn't allow an argument"),
            (&["--listen=99999", "x"], "Invalid --listen=99999: port 99999 is above 65535."),
            (&[""], "Invalid target \"\": the host is empty."),
        ] {
            assert_eq!(parse(args).unwrap_err(), message, "{args:?}");
        }
    }
}
