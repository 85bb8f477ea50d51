//! All options: what `--help` says of them, their defaults, and where their values go.

use std::ffi::{OsStr, OsString};
use std::num::{NonZeroU32, NonZeroUsize};
use std::time::Duration;

use crate::config::getopt::{Known, Meaning};
use crate::config::listen_address::{ListenAddress, MetricsAddress};
use crate::config::timespan::TimeSpan;
use crate::config::values;
use crate::config::values::{HandoverMode, Overflow, ReadyMode};
use crate::logging::LogLevel;
use crate::proxy_protocol::ProxyProtocol;

/// systemd-socket-proxyd's default.
const CONNECTIONS_MAX: NonZeroU32 = NonZeroU32::new(256).unwrap();

/// How long an address of the backend has by default.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

const VERSION: &str = concat!("socket-proxyd ", env!("CARGO_PKG_VERSION"), "\n");

const HELP: &str = "\
socket-proxyd [OPTION...] TARGET [-- COMMAND [ARG...]] | SELECTOR=TARGET...
Carry connections on listening sockets to TARGET: HOST[:PORT], /path, @abstract
or vsock:CID:PORT; the first one starts COMMAND. SELECTOR: :PORT, address, name.
Sockets: (in brackets the default; TIME as in systemd.time(7), like 5min 20s)
     --listen=ADDRESS        Open PORT, HOST:PORT, /path... [passed by systemd]
  -c --connections-max=N     Serve up to N connections at a time [256]
     --overflow=refuse|wait  Close clients above that, or let them wait [refuse]
     --exit-idle-time=TIME   Exit after TIME without a connection [infinity]
     --drain-time=TIME       When told to stop, let connections end for TIME [0]
     --handover=restart|crash  Connections outlive a restart, or a crash [never]
Backend:
     --backend-wait=TIME     Hold clients until TARGET is up [0; COMMAND: 90s]
     --connect-timeout=TIME  Give up on one address of TARGET [10s]
     --connection-idle-time=TIME  Close what carries nothing for TIME [infinity]
     --keepalive=TIME        Probe silent TCP peers, on both sides [infinity]
     --proxy-protocol=v1|v2  Tell TARGET the client's address [no]
     --ready=connect|notify  How COMMAND is known to be up [TARGET answers]
     --stop-idle-time=TIME   Stop COMMAND after TIME without clients [infinity]
Other:
     --threads=N             Serve with up to N threads, 1 to 256 [1]
     --metrics=ADDRESS       Answer Prometheus there, or at fd:NAME [nowhere]
     --log-level=LEVEL       err, warning, notice, info or debug [info]
  -h --help, --version       Show this help or the version; see socket-proxyd(8)
";

/// Takes the value of an option.
pub type Set = fn(&mut Arguments, &OsStr) -> Result<(), String>;

/// All options, in the order of `--help`.
pub const OPTIONS: [Known<Set>; 18] = {
    const fn option(name: &'static str, set: Set) -> Known<Set> {
        Known { name, letter: None, is_upstreams: false, meaning: Meaning::Takes(set) }
    }
    const fn upstreams(
        name: &'static str,
        letter: Option<char>,
        meaning: Meaning<Set>,
    ) -> Known<Set> {
        Known { name, letter, is_upstreams: true, meaning }
    }
    [
        option("listen", |it, value| {
            it.listen.push(values::listen(value)?);
            Ok(())
        }),
        upstreams(
            "connections-max",
            Some('c'),
            Meaning::Takes(|it, value| {
                put(&mut it.connections_max, value, values::connections_max)
            }),
        ),
        option("overflow", |it, value| put(&mut it.overflow, value, values::overflow)),
        upstreams(
            "exit-idle-time",
            None,
            Meaning::Takes(|it, value| {
                put(&mut it.exit_idle_time, value, |text| values::span("exit-idle-time", text))
            }),
        ),
        option("drain-time", |it, value| {
            put(&mut it.drain_time, value, |text| values::span("drain-time", text))
        }),
        option("handover", |it, value| put(&mut it.handover, value, values::handover)),
        option("backend-wait", |it, value| {
            put_some(&mut it.backend_wait, value, |text| values::span("backend-wait", text))
        }),
        option("connect-timeout", |it, value| {
            put(&mut it.connect_timeout, value, |text| values::positive("connect-timeout", text))
        }),
        option("connection-idle-time", |it, value| {
            put(&mut it.connection_idle_time, value, |text| {
                values::positive("connection-idle-time", text)
            })
        }),
        option("keepalive", |it, value| put(&mut it.keepalive, value, values::keepalive)),
        upstreams(
            "proxy-protocol",
            None,
            Meaning::Takes(|it, value| {
                put_some(&mut it.proxy_protocol, value, values::proxy_protocol)
            }),
        ),
        option("ready", |it, value| put_some(&mut it.ready, value, values::ready)),
        option("stop-idle-time", |it, value| {
            put_some(&mut it.stop_idle_time, value, |text| values::span("stop-idle-time", text))
        }),
        option("threads", |it, value| put(&mut it.threads, value, values::threads)),
        option("metrics", |it, value| {
            it.metrics = Some(values::metrics(value)?);
            Ok(())
        }),
        option("log-level", |it, value| put_some(&mut it.log_level, value, values::log_level)),
        upstreams("help", Some('h'), Meaning::Prints(HELP)),
        upstreams("version", None, Meaning::Prints(VERSION)),
    ]
};

/// Reads a value into its place; of an option given twice the last counts.
fn put<T>(
    place: &mut T,
    value: &OsStr,
    read: impl FnOnce(&str) -> Result<T, String>,
) -> Result<(), String> {
    // None of these values has a character that stands for another.
    *place = read(&value.to_string_lossy())?;
    Ok(())
}

/// The same, where it counts whether there is one.
fn put_some<T>(
    place: &mut Option<T>,
    value: &OsStr,
    read: impl FnOnce(&str) -> Result<T, String>,
) -> Result<(), String> {
    put(place, value, |text| read(text).map(Some))
}

/// The command line as it is taken apart, in the order of `--help`.
#[derive(Debug)]
pub struct Arguments {
    pub targets: Vec<OsString>,
    pub listen: Vec<ListenAddress>,
    pub connections_max: NonZeroU32,
    pub overflow: Overflow,
    pub exit_idle_time: TimeSpan,
    pub drain_time: TimeSpan,
    pub handover: Option<HandoverMode>,
    pub backend_wait: Option<TimeSpan>,
    pub connect_timeout: TimeSpan,
    pub connection_idle_time: TimeSpan,
    pub keepalive: TimeSpan,
    pub proxy_protocol: Option<ProxyProtocol>,
    pub ready: Option<ReadyMode>,
    pub stop_idle_time: Option<TimeSpan>,
    pub threads: NonZeroUsize,
    pub metrics: Option<MetricsAddress>,
    pub log_level: Option<LogLevel>,
}

impl Default for Arguments {
    fn default() -> Self {
        Self {
            targets: Vec::new(),
            listen: Vec::new(),
            connections_max: CONNECTIONS_MAX,
            overflow: Overflow::Refuse,
            exit_idle_time: TimeSpan::INFINITY,
            drain_time: TimeSpan::new(Duration::ZERO),
            handover: None,
            backend_wait: None,
            connect_timeout: TimeSpan::new(CONNECT_TIMEOUT),
            connection_idle_time: TimeSpan::INFINITY,
            keepalive: TimeSpan::INFINITY,
            proxy_protocol: None,
            ready: None,
            stop_idle_time: None,
            threads: NonZeroUsize::MIN,
            metrics: None,
            log_level: None,
        }
    }
}

#[cfg(test)]
pub mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn names_and_letters_are_unique() {
        let letters: BTreeSet<_> = OPTIONS.iter().filter_map(|option| option.letter).collect();
        assert_eq!(letters.len(), OPTIONS.iter().filter(|it| it.letter.is_some()).count());
        assert_eq!(known_options().len(), OPTIONS.len());
    }

    #[test]
    fn help_fits_a_screen_and_names_every_option() {
        assert!(HELP.lines().count() <= 23, "{HELP}");
        for line in HELP.lines() {
            assert!(line.chars().count() <= 80, "{line}");
        }
        assert_eq!(options_in(HELP), known_options());
    }

    #[test]
    fn the_manual_has_every_option_and_no_other() {
        let manual = include_str!("../../man/socket-proxyd.8").replace("\\-", "-");
        assert_eq!(options_in(&manual), known_options());
    }

    #[test]
    fn the_shells_complete_every_option_and_no_other() {
        let fish = include_str!("../../completions/socket-proxyd.fish");
        for completion in [
            include_str!("../../completions/socket-proxyd.bash"),
            include_str!("../../completions/_socket-proxyd"),
            &options_of_fish(fish),
        ] {
            assert_eq!(options_in(completion), known_options());
        }
    }

    /// fish says what is a long option by one of its own.
    pub fn options_of_fish(completion: &str) -> String {
        let options = completion.lines().filter(|line| line.starts_with("complete "));
        let options = options.map(|line| line.replace(" -s c", "").replace(" -s h", ""));
        options.map(|line| line.replace(" -l ", " --") + "\n").collect()
    }

    pub fn options_in(text: &str) -> BTreeSet<String> {
        text.split(|c: char| c != '-' && !c.is_ascii_alphanumeric())
            // In the manual a change of font may stand right in front.
            .filter_map(|word| word.split_once("--"))
            .map(|(_, name)| name.to_string())
            .filter(|name| !name.is_empty())
            .collect()
    }

    fn known_options() -> BTreeSet<String> {
        OPTIONS.iter().map(|option| option.name.to_string()).collect()
    }
}
