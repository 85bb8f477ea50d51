//! The command line of socket-proxyd-units: one description for parsing, `--help` and the
//! completions.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Parser, ValueHint};

use crate::config::listen_address::ListenAddress;
use crate::config::parser::{InfoOptions, Request, join_path, parse};
use crate::unit_writer::escape::shell_words;
use crate::unit_writer::values::{
    UNIT_DIRECTORIES, account, idle, listen, metrics, name, service, target,
};

/// The options in the order of `--help`.
#[derive(Debug, Parser)]
#[command(
    name = PROGRAM,
    version,
    about = "Write the units of a proxy: NAME-proxy.socket and NAME-proxy.service, hardened, with \
             comments.",
    override_usage = "socket-proxyd-units --listen=ADDRESS --target=TARGET [OPTION...] NAME \
                      [-- COMMAND [ARG...]]",
    after_help = "TIME is a time span as in systemd.time(7), for example 5min 20s.\n\
                  See socket-proxyd-units(8).",
    infer_long_args = true,
    disable_help_flag = true,
    disable_version_flag = true
)]
pub struct UnitArguments {
    /// The name of the units, without -proxy
    #[arg(value_name = "NAME", value_parser = name, value_hint = ValueHint::Other, required = true)]
    pub names: Vec<String>,
    /// A program that the proxy starts for the first connection
    #[arg(last = true, value_hint = ValueHint::CommandWithArguments, conflicts_with = "service")]
    pub command: Option<Vec<OsString>>,

    /// PORT, IP:PORT, /path, @name, vsock:CID:PORT, udp:PORT, dgram:/path
    #[arg(long, value_name = "ADDRESS", value_parser = listen, help_heading = "The proxy",
        value_hint = ValueHint::FilePath, required = true)]
    pub listen: Vec<ListenAddress>,
    /// Where connections go; repeatable as SELECTOR=TARGET
    #[arg(long = "target", value_name = "TARGET", value_parser = target, help_heading = "The proxy",
        value_hint = ValueHint::FilePath, required = true)]
    pub targets: Vec<String>,
    /// Start this service for the first connection
    #[arg(long, value_name = "UNIT", value_parser = service, help_heading = "The proxy")]
    pub service: Option<String>,
    /// Start the backend with LINE, such as docker start web
    #[arg(long, value_name = "LINE", help_heading = "The proxy", conflicts_with = "service",
        value_hint = ValueHint::CommandString)]
    pub start_command: Option<String>,
    /// Stop it with LINE
    #[arg(long, value_name = "LINE", help_heading = "The proxy",
        value_hint = ValueHint::CommandString)]
    pub stop_command: Option<String>,
    /// Ready on connect (the default), notify, http:PATH or exec:LINE
    #[arg(long, value_name = "MODE", help_heading = "The proxy")]
    pub ready: Option<String>,
    /// Freeze COMMAND when idle for TIME [default: infinity]
    #[arg(long, value_name = "TIME", help_heading = "The proxy")]
    pub freeze_idle_time: Option<String>,
    /// Stop the backend when idle for TIME [default: infinity]
    #[arg(long, value_name = "TIME", value_parser = idle, help_heading = "The proxy")]
    pub idle: Option<String>,
    /// Let COMMAND say that it is busy: no (the default) or notify
    #[arg(long, value_name = "MODE", help_heading = "The proxy")]
    pub busy: Option<String>,
    /// Neither freeze nor stop the backend in its first TIME [default: 0]
    #[arg(long, value_name = "TIME", help_heading = "The proxy")]
    pub min_run_time: Option<String>,
    /// Run the proxy and COMMAND as USER [default: a transient user]
    #[arg(long, value_parser = account, help_heading = "The proxy", value_hint = ValueHint::Username)]
    pub user: Option<String>,
    /// Add the proxy to GROUP, for the target's Unix socket or a command
    #[arg(long, value_parser = account, help_heading = "The proxy")]
    pub group: Option<String>,
    /// Run the backend in a network namespace that only the proxy reaches
    #[arg(long, help_heading = "The proxy")]
    pub isolate: bool,
    /// Answer Prometheus at ADDRESS, from a socket unit of its own
    #[arg(long, value_name = "ADDRESS", value_parser = metrics, help_heading = "The proxy",
        value_hint = ValueHint::FilePath, conflicts_with = "service")]
    pub metrics: Option<ListenAddress>,

    /// Serve at once, or from the first byte on [default: connect]
    #[arg(long, value_name = "connect|data", help_heading = "Clients")]
    pub wake_on: Option<String>,
    /// Clients that start and postpone nothing: 10.0.0.0/8, unix
    #[arg(long, value_name = "NET[,NET...]", help_heading = "Clients")]
    pub passive_from: Option<String>,
    /// Serve up to N connections from one IPv4 address or IPv6 /64
    #[arg(long, value_name = "N", help_heading = "Clients")]
    pub connections_max_per_source: Option<String>,
    /// Whose IP address the backend sees [default: proxy]
    #[arg(long, value_name = "proxy|client", help_heading = "Clients")]
    pub source: Option<String>,

    /// Write to DIR instead of printing [default: /etc/systemd/system]
    #[arg(long, value_name = "DIR", num_args = 0..=1, require_equals = true,
        default_missing_value = UNIT_DIRECTORIES[0], help_heading = "Output",
        value_hint = ValueHint::DirPath)]
    pub write: Option<PathBuf>,
    /// Replace files that were edited or that this program did not write
    #[arg(long, requires = "write", help_heading = "Output")]
    pub force: bool,
    #[command(flatten, next_help_heading = "Output")]
    info: InfoOptions,
}

impl UnitArguments {
    /// Reads a command line, the program's name first.
    ///
    /// # Errors
    /// One line that names the option and the value.
    pub fn read(args: impl IntoIterator<Item = OsString>) -> Result<Request<Self>, String> {
        let mut args: Vec<_> = args.into_iter().collect();
        join_path(&mut args, "--write");
        let has_dashes = args.iter().any(|arg| arg == "--");
        match parse(args)? {
            Request::Run(Self { command: None, .. }) if has_dashes => {
                Err("There is no COMMAND after --.".into())
            }
            parsed => Ok(parsed),
        }
    }

    /// Returns the command line that asks for the same units, quoted for a shell.
    pub fn command_line(&self) -> String {
        let mut words = vec![OsString::from(PROGRAM)];
        words.extend(self.listen.iter().map(|listen| format!("--listen={listen}").into()));
        words.extend(self.targets.iter().map(|target| format!("--target={target}").into()));
        let metrics = self.metrics.as_ref().map(ToString::to_string);
        let options = [
            ("service", self.service.as_deref()),
            ("idle", self.idle.as_deref()),
            ("user", self.user.as_deref()),
            ("group", self.group.as_deref()),
            ("metrics", metrics.as_deref()),
        ];
        words.extend(given(options).into_iter().map(OsString::from));
        words.extend(self.isolate.then(|| "--isolate".into()));
        words.extend(self.passed_options().into_iter().map(OsString::from));
        words.extend(self.names.iter().map(OsString::from));
        if let Some(command) = &self.command {
            words.push("--".into());
            words.extend_from_slice(command);
        }
        shell_words(words)
    }

    /// Returns the idle time, if it is finite.
    pub fn idle_time(&self) -> Option<&str> {
        self.idle.as_deref().filter(|idle| *idle != "infinity")
    }

    /// Whether an idle proxy exits, instead of stopping its backend.
    pub fn exits_when_idle(&self) -> bool {
        self.command.is_none() && self.stop_command.is_none()
    }

    /// Returns the options of the proxy that have another form here.
    pub fn derived_options(&self) -> Vec<String> {
        // Clients wait while a service starts or a backend restarts. The proxy has a default of its
        // own for a backend that it starts.
        let wait = match (&self.service, &self.command, &self.start_command) {
            (Some(_), ..) => Some("90s"),
            (None, None, None) => Some("30s"),
            _ => None,
        };
        let idle = if self.exits_when_idle() { "exit-idle-time" } else { "stop-idle-time" };
        given([
            ("backend-wait", wait),
            (idle, self.idle_time()),
            ("metrics", self.metrics.as_ref().map(|_| "fd:metrics")),
        ])
    }

    /// Returns the options that the proxy gets as they were given.
    pub fn passed_options(&self) -> Vec<String> {
        given([
            ("start-command", self.start_command.as_deref()),
            ("stop-command", self.stop_command.as_deref()),
            ("ready", self.ready.as_deref()),
            ("freeze-idle-time", self.freeze_idle_time.as_deref()),
            ("busy", self.busy.as_deref()),
            ("min-run-time", self.min_run_time.as_deref()),
            ("wake-on", self.wake_on.as_deref()),
            ("passive-from", self.passive_from.as_deref()),
            ("connections-max-per-source", self.connections_max_per_source.as_deref()),
            ("source", self.source.as_deref()),
        ])
    }
}

/// Returns the words of the options that have a value.
fn given<'a>(options: impl IntoIterator<Item = (&'a str, Option<&'a str>)>) -> Vec<String> {
    let word = |(name, value): (&str, Option<&str>)| Some(format!("--{name}={}", value?));
    options.into_iter().filter_map(word).collect()
}

const PROGRAM: &str = "socket-proxyd-units";

#[cfg(test)]
pub mod tests {
    use clap::CommandFactory;

    use super::*;
    use crate::config::options::tests::{check_completions, check_documents};

    pub fn parse(line: &str) -> Result<UnitArguments, String> {
        let args = std::iter::once(PROGRAM).chain(line.split(' '));
        match UnitArguments::read(args.map(OsString::from))? {
            Request::Run(arguments) => Ok(arguments),
            Request::Print(text) => Err(text),
        }
    }

    #[test]
    fn completions_are_current() {
        check_completions(UnitArguments::command());
    }

    #[test]
    fn help_and_manual_have_every_option_and_no_other() {
        UnitArguments::command().debug_assert();
        let manual = include_str!("../../man/socket-proxyd-units.8");
        let lines = manual.lines().filter(|it| !it.starts_with("systemctl"));
        check_documents(UnitArguments::command(), &lines.collect::<Vec<_>>().join("\n"));
    }

    #[test]
    fn addresses_are_normalised_for_systemd() {
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
            let arguments = parse(&format!("--listen={given} --target=/a app")).unwrap();
            assert_eq!(arguments.listen[0].to_string(), written, "{given}");
        }
        let arguments = parse("--listen=1 --metrics=::1:09464 --target=/a app").unwrap();
        assert_eq!(arguments.metrics.unwrap().to_string(), "[::1]:9464");
    }

    #[test]
    fn directory_is_the_value_of_write_or_the_next_word() {
        let base = "--listen=1 --target=127.0.0.1:2";
        for (words, expected) in [
            ("--write app", "/etc/systemd/system"),
            ("--write=/x app", "/x"),
            ("--write /x app", "/x"),
            ("--write ./x app", "./x"),
            ("app --write", "/etc/systemd/system"),
            ("app --write -- /bin/app", "/etc/systemd/system"),
        ] {
            let arguments = parse(&format!("{base} {words}")).unwrap();
            assert_eq!(arguments.write, Some(PathBuf::from(expected)), "{words}");
            let again = if words.ends_with("/bin/app") { " -- /bin/app" } else { "" };
            assert_eq!(arguments.command_line(), format!("{PROGRAM} {base} app{again}"));
        }
    }
}
