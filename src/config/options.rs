//! The command line of socket-proxyd: one description, from which `--help` and the completions
//! come.

use std::ffi::OsString;
use std::num::{NonZeroU32, NonZeroUsize};
use std::time::Duration;

use clap::builder::{OsStringValueParser, TypedValueParser};
use clap::{Arg, Parser, ValueHint};

use crate::config::client_set::ClientSet;
use crate::config::command::CommandLine;
use crate::config::listen_address::{ListenAddress, MetricsAddress};
use crate::config::parser::{InfoOptions, Request, parse};
use crate::config::timespan::TimeSpan;
use crate::config::values::{
    self, BusyMode, HandoverMode, Overflow, ReadyMode, SourceMode, WakeOn,
};
use crate::logging::LogLevel;
use crate::socket::proxy_protocol::ProxyProtocol;

/// The command line, option by option, in the order of `--help`. Fields that are not public, and
/// `ready`, are to be read in [`Config`](super::Config), which has their defaults.
#[derive(Debug, Parser)]
#[command(
    name = "socket-proxyd",
    version,
    about = "Carry connections from listening sockets to TARGET, and start COMMAND for the first one.",
    override_usage = "socket-proxyd [OPTION...] TARGET [-- COMMAND [ARG...]]\n       \
                      socket-proxyd [OPTION...] SELECTOR=TARGET...",
    after_help = "TIME is a time span as in systemd.time(7), for example 5min 20s.\n\
                  See socket-proxyd(8).",
    infer_long_args = true,
    args_override_self = true,
    disable_help_flag = true,
    disable_version_flag = true,
    mut_args = option
)]
pub struct Arguments {
    #[arg(help = "HOST[:PORT], /path, @abstract, vsock:CID:PORT; SELECTOR: a socket's name or address",
        value_name = "TARGET", value_hint = ValueHint::FilePath)]
    pub(super) targets: Vec<OsString>,
    /// Started for the first connection
    #[arg(last = true, value_name = "COMMAND", value_hint = ValueHint::CommandWithArguments)]
    pub(super) command: Option<Vec<OsString>>,

    // As `help`: rustdoc would read the brackets as links.
    #[arg(long, value_parser = OsStringValueParser::new().try_map(ListenAddress::parse),
        help = "Open [udp:][HOST:]PORT, [dgram:]/path, @name, vsock:CID:PORT",
        value_name = "ADDRESS", help_heading = "Sockets", value_hint = ValueHint::FilePath)]
    pub listen: Vec<ListenAddress>,
    /// Serve up to N connections at a time
    #[arg(long, short, value_name = "N", value_parser = values::connections_max,
        default_value = "256", help_heading = "Sockets", aliases = abbreviations())]
    pub connections_max: NonZeroU32,
    /// Serve up to N of them from one IPv4 address or IPv6 /64
    #[arg(long, value_name = "N", value_parser = values::connections_max,
        help_heading = "Sockets")]
    pub connections_max_per_source: Option<NonZeroU32>,
    /// Refuse others, or let them wait
    #[arg(long, value_name = "refuse|wait", default_value = "refuse", help_heading = "Sockets")]
    pub overflow: Overflow,
    /// Serve at once, or from the first byte on
    #[arg(long, value_name = "connect|data", default_value = "connect", help_heading = "Sockets")]
    pub wake_on: WakeOn,
    /// Clients that start and postpone nothing: 10.0.0.0/8, unix
    #[arg(long, value_name = "NET[,NET...]", help_heading = "Sockets")]
    pub(super) passive_from: Option<ClientSet>,
    /// Exit after TIME without a connection
    #[arg(long, value_name = "TIME", default_value = "infinity", help_heading = "Sockets")]
    pub exit_idle_time: TimeSpan,
    /// When stopped, give open connections TIME to end
    #[arg(long, value_name = "TIME", default_value = "0", help_heading = "Sockets")]
    pub drain_time: TimeSpan,
    /// Keep connections over a restart or a crash
    #[arg(
        long,
        value_name = "never|restart|crash",
        default_value = "never",
        help_heading = "Sockets"
    )]
    pub(super) handover: HandoverMode,

    /// Hold clients until TARGET is up [default: 0; on demand: 90s]
    #[arg(long, value_name = "TIME", help_heading = "Backend")]
    pub(super) backend_wait: Option<TimeSpan>,
    /// Give up on one address of TARGET after TIME
    #[arg(long, value_name = "TIME", value_parser = values::positive, default_value = "10s",
        help_heading = "Backend")]
    pub connect_timeout: TimeSpan,
    /// Close connections idle for TIME
    #[arg(long, value_name = "TIME", value_parser = values::positive, default_value = "infinity",
        help_heading = "Backend")]
    pub connection_idle_time: TimeSpan,
    /// End datagram sessions idle for TIME
    #[arg(long, value_name = "TIME", value_parser = values::session_idle_time,
        default_value = "2min", help_heading = "Backend")]
    pub session_idle_time: Duration,
    /// Probe TCP peers silent for TIME
    #[arg(long, value_name = "TIME", value_parser = values::keepalive, default_value = "infinity",
        help_heading = "Backend")]
    pub(super) keepalive: TimeSpan,
    /// Tell TARGET the client's address
    // In systemd-socket-proxyd `--p` is unambiguous.
    #[arg(long, value_name = "v1|v2", help_heading = "Backend", alias = "p")]
    pub proxy_protocol: Option<ProxyProtocol>,
    /// Choose whose IP address TARGET sees
    #[arg(long, value_name = "proxy|client", default_value = "proxy", help_heading = "Backend")]
    pub source: SourceMode,
    /// Ready on connect (the default), notify, http:PATH or exec:LINE
    #[arg(long, value_name = "MODE", value_parser = values::ReadyParser, help_heading = "Backend")]
    pub ready: Option<ReadyMode>,
    /// Run LINE for the first client, such as docker start web
    #[arg(long, value_name = "LINE", value_parser = CommandLine::split, help_heading = "Backend")]
    pub start_command: Option<CommandLine>,
    /// Run LINE when idle for --stop-idle-time=
    #[arg(long, value_name = "LINE", value_parser = CommandLine::split, help_heading = "Backend")]
    pub stop_command: Option<CommandLine>,
    /// Freeze COMMAND when idle for TIME [default: infinity]
    #[arg(long, value_name = "TIME", help_heading = "Backend")]
    pub(super) freeze_idle_time: Option<TimeSpan>,
    /// Stop COMMAND when idle for TIME [default: infinity]
    #[arg(long, value_name = "TIME", help_heading = "Backend")]
    pub(super) stop_idle_time: Option<TimeSpan>,
    /// Let COMMAND say that it is busy
    #[arg(long, value_name = "no|notify", default_value = "no", help_heading = "Backend")]
    pub busy: BusyMode,
    /// Keep COMMAND running for TIME once it is ready [default: 0]
    #[arg(long, value_name = "TIME", help_heading = "Backend")]
    pub(super) min_run_time: Option<TimeSpan>,

    /// Serve with up to N threads, 1 to 256
    #[arg(long, value_name = "N", value_parser = values::threads, default_value = "1",
        help_heading = "Other")]
    pub threads: NonZeroUsize,
    /// Answer Prometheus there, or at the passed socket fd:NAME
    #[arg(long, value_parser = OsStringValueParser::new().try_map(MetricsAddress::parse),
        value_name = "ADDRESS", help_heading = "Other", value_hint = ValueHint::FilePath)]
    pub metrics: Option<MetricsAddress>,
    /// Log err, warning, notice, info or debug [default: info]
    #[arg(long, value_name = "LEVEL", help_heading = "Other")]
    pub(super) log_level: Option<LogLevel>,
    #[command(flatten, next_help_heading = "Other")]
    info: InfoOptions,
}

impl Arguments {
    /// Reads a command line, the program's name first.
    ///
    /// # Errors
    /// One line that names the option and the value.
    pub fn read(args: impl IntoIterator<Item = OsString>) -> Result<Request<Self>, String> {
        let args: Vec<_> = args.into_iter().collect();
        let has_dashes = args.iter().any(|arg| arg == "--");
        let mut arguments = match parse::<Self>(args)? {
            Request::Run(arguments) => arguments,
            Request::Print(text) => return Ok(Request::Print(text)),
        };
        let Self { targets, command, .. } = &mut arguments;
        if targets.is_empty() {
            // As in `-- TARGET -- COMMAND`: for clap, all words behind the first `--` are COMMAND.
            *targets = command.take().unwrap_or_default();
            if let Some(at) = targets.iter().position(|word| word == "--") {
                *command = Some(targets.split_off(at + 1));
                targets.pop();
            }
        } else if has_dashes {
            command.get_or_insert_default();
        }
        Ok(Request::Run(arguments))
    }

    /// Returns the words of each command, after what precedes them in the command line.
    pub fn programs(&self) -> impl Iterator<Item = (&'static str, &[OsString])> {
        let probe = match &self.ready {
            Some(ReadyMode::Exec(line)) => Some(line),
            _ => None,
        };
        let lines = [
            ("--ready=exec:", probe),
            ("--start-command=", self.start_command.as_ref()),
            ("--stop-command=", self.stop_command.as_ref()),
        ];
        let lines = lines.into_iter().filter_map(|(origin, line)| Some((origin, &line?.words[..])));
        self.command.iter().map(|words| ("COMMAND ", &words[..])).chain(lines)
    }
}

/// Returns the abbreviations of `--connections-max` that are unambiguous in systemd-socket-proxyd,
/// whatever options stand beside it here. Those of its other options are unambiguous here, too.
fn abbreviations() -> impl Iterator<Item = &'static str> {
    const LONGEST: &str = "connections-ma";
    (1..=LONGEST.len()).map(|end| &LONGEST[..end])
}

/// Lets the value of an option begin with a dash. `--help` lists no possible values: the value's
/// name does.
fn option(arg: Arg) -> Arg {
    let has_value = !arg.is_positional() && arg.get_action().takes_values();
    arg.allow_hyphen_values(has_value).hide_possible_values(has_value)
}

#[cfg(test)]
pub mod tests {
    use std::collections::BTreeSet;

    use clap::CommandFactory;
    use clap_complete::{Shell, generate};

    use super::*;

    /// Whether the checked-in completions of a program are current; with UPDATE=1 they are written.
    pub fn check_completions(mut command: clap::Command) {
        let name = command.get_name().to_string();
        let directory = concat!(env!("CARGO_MANIFEST_DIR"), "/completions");
        for (shell, file) in [
            (Shell::Bash, format!("{name}.bash")),
            (Shell::Zsh, format!("_{name}")),
            (Shell::Fish, format!("{name}.fish")),
        ] {
            let mut text = Vec::new();
            generate(shell, &mut command, &name, &mut text);
            let path = format!("{directory}/{file}");
            if std::env::var_os("UPDATE").is_some() {
                std::fs::write(&path, &text).unwrap();
            }
            let current = std::fs::read(&path).unwrap_or_default();
            assert!(current == text, "{path} is out of date; run UPDATE=1 cargo test --lib");
        }
    }

    /// Whether `--help` fits and the manual has every option and no other.
    pub fn check_documents(mut command: clap::Command, manual: &str) {
        let help = command.render_help().to_string();
        for line in help.lines() {
            assert!(line.chars().count() <= 100, "{line}");
        }
        let known: BTreeSet<_> =
            command.get_arguments().filter_map(|it| it.get_long().map(String::from)).collect();
        assert_eq!(options_in(&manual.replace("\\-", "-")), known);
    }

    fn options_in(text: &str) -> BTreeSet<String> {
        text.split(|c: char| c != '-' && !c.is_ascii_alphanumeric())
            // In the manual a change of font may stand right in front.
            .filter_map(|word| word.split_once("--"))
            .map(|(_, name)| name.to_string())
            .filter(|name| !name.is_empty())
            .collect()
    }

    #[test]
    fn completions_are_current() {
        check_completions(Arguments::command());
    }

    #[test]
    fn help_and_manual_have_every_option_and_no_other() {
        Arguments::command().debug_assert();
        check_documents(Arguments::command(), include_str!("../../man/socket-proxyd.8"));
    }
}
