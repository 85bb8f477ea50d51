//! The units themselves: each setting for a reason, and beside it what a user may have to change.

use std::path::{Path, PathBuf};

use crate::config::listen_address::ListenAddress;
use crate::config::target::Target;
use crate::socket::address::{Address, UnixName};
use crate::unit_writer::arguments::Arguments;
use crate::unit_writer::escape::{exec_word, shell_word, value};
use crate::unit_writer::plan::Plan;
use crate::unit_writer::stamp::stamp;
use crate::unit_writer::values::{HOMES, TEMPORARY};

/// How long clients are held: while a backend is restarted, and while a service starts.
const BRIDGE_WAIT: &str = "30s";
const SERVICE_WAIT: &str = "90s";

/// What neither a proxy nor most applications need. (The measure is `systemd-analyze security`.)
const HARDENING: &str = "\
CapabilityBoundingSet=
NoNewPrivileges=yes
ProtectSystem=strict
ProtectHome=yes
ProtectProc=invisible
PrivateDevices=yes
PrivateTmp=yes
PrivateMounts=yes
ProtectClock=yes
ProtectControlGroups=yes
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
LockPersonality=yes
RemoveIPC=yes
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
SystemCallArchitectures=native
SystemCallFilter=@system-service
SystemCallErrorNumber=EPERM
";

/// What a proxy does not need beyond that.
const PROXY_HARDENING: &str = "\
UMask=0777
ProcSubset=pid
PrivateUsers=yes
MemoryDenyWriteExecute=yes
SystemCallFilter=~@privileged
";

/// Files of an application are its own.
const COMMAND_DEFAULTS: &str = "UMask=0077\n";

/// A file, below the directory of the units.
#[derive(Debug, PartialEq, Eq)]
pub struct UnitFile {
    pub path: PathBuf,
    pub text: String,
}

/// All files of a set, in the order in which they are read; `program` is the proxy's.
pub fn files(units: &Plan, program: &Path) -> Vec<UnitFile> {
    let title = &value(&units.name);
    let Plan { unit, arguments: Arguments { listen, service: started, metrics, .. }, .. } = units;
    let command_line = units.arguments.command_line();
    let file = |name: String, text: String| UnitFile {
        text: stamp(&shell_word(&name), &command_line, &text),
        path: name.into(),
    };
    let mut files = vec![file(units.socket(), socket(&units.socket(), listen, title, None))];
    if let Some(metrics) = metrics {
        let name = units.metrics_socket();
        let text = socket(&name, std::slice::from_ref(metrics), title, Some(unit));
        files.push(file(name, text));
    }
    files.push(file(units.service(), service(units, title, program)));
    if let Some(service) = started {
        files.push(UnitFile {
            path: format!("{service}.d/{unit}.conf").into(),
            text: stamp(&shell_word(service), &command_line, &drop_in(service)),
        });
    }
    files
}

/// A socket unit: for clients, or for the scrapers of a proxy.
fn socket(name: &str, listen: &[ListenAddress], title: &str, scrapers_of: Option<&str>) -> String {
    let is_file = listen.iter().any(|address| address.to_string().starts_with('/'));
    let lines: String =
        listen.iter().map(|it| format!("ListenStream={}\n", value(&it.to_string()))).collect();
    let who = if is_file {
        "# Every user may connect. SocketMode=0660 with SocketUser= or SocketGroup= restricts that.\n"
    } else {
        ""
    };
    let plural = if listen.len() == 1 { "socket" } else { "sockets" };
    let (about, what, more) = match scrapers_of {
        None => (
            format!("The {plural} that clients connect to"),
            "what clients connect to",
            String::new(),
        ),
        Some(proxy) => (
            "The socket where Prometheus gets /metrics".into(),
            "its metrics",
            format!("FileDescriptorName=metrics\nService={proxy}.service\n"),
        ),
    };
    format!(
        "# {about}. To open at boot: systemctl enable --now {}\n\
         [Unit]\n\
         Description={title}, {what}\n\
         Documentation=man:socket-proxyd(8) man:socket-proxyd-units(8)\n\
         \n\
         [Socket]\n\
         {who}{lines}{more}\
         \n\
         [Install]\n\
         WantedBy=sockets.target\n",
        shell_word(name),
    )
}

fn service(units: &Plan, title: &str, program: &Path) -> String {
    let Plan { unit, arguments: Arguments { user, group, metrics, .. }, .. } = units;
    let (starts, idle) = (OnFirstClient::of(units), units.idle());
    let stops = match idle {
        None => "then runs until this service stops".to_string(),
        Some(idle) => format!("stops after {idle} without a connection"),
    };
    let mut text = match &starts {
        OnFirstClient::Nothing => "# The first client starts this service.\n".to_string(),
        OnFirstClient::Service(service) => format!(
            "# The first client starts this service and {service}.\n\
             # {service} {stops}.\n\
             # Nothing else should start {service}: systemctl disable --now {}\n",
            shell_word(service)
        ),
        OnFirstClient::Command => format!(
            "# The first client starts this service and the program after --.\n\
             # The program {stops}.\n\
             # It must listen on the address before -- and stay in the foreground. If it sends READY=1, as\n\
             # sd_notify(3) does, add --ready=notify before that address.\n"
        ),
    };
    let metrics_socket = metrics.as_ref().map(|_| units.metrics_socket());
    let sockets = match &metrics_socket {
        Some(metrics) => format!("{unit}.socket {metrics}"),
        None => format!("{unit}.socket"),
    };
    text += &format!(
        "[Unit]\n\
         Description=Proxy in front of {title}\n\
         Documentation=man:socket-proxyd(8) man:socket-proxyd-units(8)\n"
    );
    if !matches!(starts, OnFirstClient::Command) && idle.is_some() {
        text += "# Each idle exit leads to another start. With a start limit, a short idle time and a few clients\n\
                 # would make systemd close the socket for good.\n\
                 StartLimitIntervalSec=0\n";
    }
    text += &format!("Requires={unit}.socket\n");
    if let Some(metrics) = &metrics_socket {
        text += &format!(
            "# Wanted, not required: without the metrics socket clients are still served.\n\
             Wants={metrics}\n"
        );
    }
    text += &match &starts {
        OnFirstClient::Service(service) => format!(
            "# Wanted, not required: Restart= starts a killed service again, and a service that cannot start\n\
             # does not close the socket.\n\
             Wants={service}\n\
             After={sockets} {service}\n"
        ),
        _ => format!("After={sockets}\n"),
    };
    text += "\n[Service]\nType=notify\n";
    if metrics.is_some() {
        text += &format!("Sockets={sockets}\n");
    }
    text += "# Add other options of socket-proxyd(8) before the target.\n";
    text += &exec_start(units, program);
    if let OnFirstClient::Command = starts {
        text += "# The proxy stops the program and the processes that it has started.\nKillMode=mixed\n";
    }
    text.push('\n');
    text += &match user {
        Some(user) => format!("User={user}\n"),
        None => "# Run as a transient, unprivileged user.\nDynamicUser=yes\n".into(),
    };
    if let Some(group) = group {
        text += &format!(
            "# This group may connect to the target's socket.\nSupplementaryGroups={group}\n"
        );
    }
    text += &match &starts {
        OnFirstClient::Command => for_application(units),
        _ => network(&units.targets, group.is_some()) + &for_proxy(&units.targets),
    };
    if user.is_some() {
        // What else that user has in memory is not ours to remove.
        text = text.replace("RemoveIPC=yes\n", "");
    }
    text
}

fn exec_start(units: &Plan, program: &Path) -> String {
    let idle = |option: &str| units.idle().map(|idle| format!("{option}={idle}"));
    let Arguments { targets, command, metrics, .. } = &units.arguments;
    let (wait, idle) = match OnFirstClient::of(units) {
        OnFirstClient::Nothing => (Some(BRIDGE_WAIT), idle("--exit-idle-time")),
        OnFirstClient::Service(_) => (Some(SERVICE_WAIT), idle("--exit-idle-time")),
        // It has a default of its own.
        OnFirstClient::Command => (None, idle("--stop-idle-time")),
    };
    let metrics = metrics.as_ref().map(|_| "--metrics=fd:metrics".to_string());
    let wait = wait.map(|wait| format!("--backend-wait={wait}"));
    let options = wait.into_iter().chain(idle).chain(metrics);
    let mut line = format!("ExecStart={}", exec_word(program));
    for option in options {
        line += &format!(" {}", exec_word(option));
    }
    let several = targets.len() > 1;
    for word in targets {
        line += if several { " \\\n    " } else { " " };
        line += &exec_word(word);
    }
    if let Some(words) = command {
        line += " -- \\\n   ";
        for word in words {
            line += &format!(" {}", exec_word(word));
        }
    }
    line + "\n"
}

/// What COMMAND, and the proxy with it, may use.
fn for_application(units: &Plan) -> String {
    let mut text = "# Most programs run under these restrictions. A program that keeps files needs StateDirectory=, a\n\
                    # directory in /var/lib whose path is in $STATE_DIRECTORY.\n"
        .to_string();
    if let Some(directory) = units.runtime_directory()
        && let Some(name) = directory.file_name()
    {
        text += &format!("RuntimeDirectory={}\n", name.to_string_lossy());
    }
    text += match &units.targets[..] {
        [Target::Address(Address::Vsock { .. })] => "RestrictAddressFamilies=AF_UNIX AF_VSOCK\n",
        _ => "RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6\n",
    };
    text + HARDENING + COMMAND_DEFAULTS
}

/// What a proxy needs of files: the sockets of its targets.
fn for_proxy(targets: &[Target]) -> String {
    let is_below = |directories: &[&str]| {
        let mut paths = targets.iter().filter_map(path);
        paths.any(|path| directories.iter().any(|directory| path.starts_with(directory)))
    };
    let mut text = [HARDENING, PROXY_HARDENING].concat();
    if is_below(&HOMES) {
        let needed =
            "# The target is in a home directory or below /run/user.\nProtectHome=read-only";
        text = text.replace("ProtectHome=yes", needed);
    }
    if is_below(&TEMPORARY) {
        text = text.replace(
            "PrivateTmp=yes",
            "# The target is in the /tmp or /var/tmp of the system.\nPrivateTmp=no",
        );
    }
    text
}

/// The file of a target.
fn path(target: &Target) -> Option<&Path> {
    match target {
        Target::Address(Address::Unix(Some(name))) => name.path(),
        _ => None,
    }
}

/// Which networks the way to the targets needs; the clients' sockets are not meant, they are systemd's.
fn network(targets: &[Target], has_group: bool) -> String {
    let (mut families, mut allowed) = (vec!["AF_UNIX"], Vec::<String>::new());
    let mut add = |new: &[&'static str]| {
        for family in new {
            if !families.contains(family) {
                families.push(family);
            }
        }
    };
    let mut allow = |address: String| {
        if !allowed.contains(&address) {
            allowed.push(address);
        }
    };
    let (mut anywhere, mut is_private) = (false, true);
    let mut is_file = false;
    for target in targets {
        match target {
            Target::Address(Address::Unix(Some(name))) => {
                is_private &= name.path().is_some();
                is_file |= matches!(**name, UnixName::Path(_));
            }
            Target::Address(Address::Unix(None)) => {}
            Target::Address(Address::Vsock { .. }) => {
                is_private = false;
                add(&["AF_VSOCK"]);
            }
            Target::Address(Address::Inet(address)) => {
                is_private = false;
                add(&["AF_INET", "AF_INET6"]);
                let ip = address.ip().to_canonical();
                let is_here = ip.is_loopback() || ip.is_unspecified();
                allow(if is_here { "localhost".into() } else { ip.to_string() });
            }
            Target::Name(name) => {
                is_private = false;
                if name.host == "localhost" {
                    allow("localhost".into());
                } else {
                    anywhere = true;
                }
                add(&["AF_INET", "AF_INET6"]);
            }
        }
    }
    let mut text = String::new();
    if is_file && !has_group {
        text += "# If only a group may connect to the target's socket, name it here.\n#SupplementaryGroups=\n";
    }
    if is_private {
        text += "# A Unix socket needs no network. For a target of another kind remove these three lines.\n\
                 PrivateNetwork=yes\n";
    }
    if anywhere {
        text += "# The target's name may resolve to any address. IPAddressDeny=any with IPAddressAllow= restricts that.\n";
    } else {
        if !allowed.is_empty() {
            text += "# Only the target's address. Clients are not affected: their sockets belong to systemd.\n";
        }
        text += "IPAddressDeny=any\n";
        if !allowed.is_empty() {
            text += &format!("IPAddressAllow={}\n", allowed.join(" "));
        }
    }
    text += &format!("RestrictAddressFamilies={}\n", families.join(" "));
    text
}

fn drop_in(service: &str) -> String {
    format!(
        "# {service} stops when its proxy, which wants it, has stopped.\n\
         [Unit]\n\
         StopWhenUnneeded=yes\n\
         # Try once a second for as long as the proxy holds clients, and then fail. This overrides the\n\
         # restart settings of the service itself.\n\
         StartLimitIntervalSec=2min\n\
         StartLimitBurst=90\n\
         \n\
         [Service]\n\
         Restart=on-failure\n\
         RestartSec=1s\n"
    )
}

/// What the first client starts.
enum OnFirstClient<'a> {
    Nothing,
    Service(&'a str),
    Command,
}

impl<'a> OnFirstClient<'a> {
    fn of(plan: &'a Plan) -> Self {
        match (&plan.arguments.service, &plan.arguments.command) {
            (Some(service), _) => Self::Service(service),
            (None, Some(_)) => Self::Command,
            (None, None) => Self::Nothing,
        }
    }
}
