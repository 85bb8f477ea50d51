//! The text of the units, as tables of settings. A comment says why a setting is there, or when an
//! administrator has to change it.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::slice;

use crate::config::listen_address::ListenAddress;
use crate::config::target::Target;
use crate::socket::address::Address;
use crate::unit_writer::arguments::UnitArguments;
use crate::unit_writer::escape::{exec_word, shell_word, value};
use crate::unit_writer::plan::Plan;
use crate::unit_writer::stamp::stamp;
use crate::unit_writer::values::{HOMES, TEMPORARY, is_below, socket_path};

/// A generated file; its path is relative to the directory of the units.
#[derive(Debug, PartialEq, Eq)]
pub struct UnitFile {
    pub path: PathBuf,
    pub text: String,
}

/// Renders all files of a plan; `program` is the path of the proxy.
pub fn files(plan: &Plan, program: &Path) -> Vec<UnitFile> {
    let UnitArguments { listen, service: started, metrics, .. } = &plan.arguments;
    let command_line = plan.arguments.command_line();
    let file = |unit: &str, path: &str, text: String| UnitFile {
        path: path.into(),
        text: stamp(&shell_word(unit), &command_line, &text),
    };
    let service = plan.service();
    let socket = plan.socket();
    let mut files = vec![file(&socket, &socket, socket_unit(plan, &socket, listen, false))];
    if let Some(metrics) = metrics {
        let socket = plan.metrics_socket();
        let text = socket_unit(plan, &socket, slice::from_ref(metrics), true);
        files.push(file(&socket, &socket, text));
    }
    files.push(file(&service, &service, service_unit(plan, program)));
    if let Some(started) = started {
        files.push(file(started, &format!("{started}.d/{}.conf", plan.unit), drop_in(started)));
    }
    files
}

/// Renders the socket unit for clients, or the one for Prometheus: all sockets of a unit have the
/// same `FileDescriptorName=`.
fn socket_unit(plan: &Plan, name: &str, listen: &[ListenAddress], is_metrics: bool) -> String {
    let (about, description) = match listen {
        _ if is_metrics => ("The socket where Prometheus gets /metrics", "its metrics"),
        [_] => ("The socket that clients connect to", "what clients connect to"),
        _ => ("The sockets that clients connect to", "what clients connect to"),
    };
    let addresses = listen.iter().map(|address| {
        let is_file = matches!(address, ListenAddress::Address(Address::Path(_)));
        row("ListenStream", value(&address.to_string()), hint(is_file, OPEN_TO_ALL))
    });
    let may_be_absent = listen.iter().any(|address| match address {
        ListenAddress::Host(host) => host.literal().is_some_and(|it| !is_local(it.ip())),
        _ => false,
    });
    let settings = [
        optional("FreeBind", may_be_absent.then_some("yes"), FREE_BIND),
        optional("FileDescriptorName", is_metrics.then_some("metrics"), ""),
        optional("Service", is_metrics.then(|| plan.service()), ""),
    ];
    let unit = vec![
        row("Description", format!("{}, {description}", value(&plan.name)), ""),
        row("Documentation", DOCUMENTATION, ""),
    ];
    let install = vec![row("WantedBy", "sockets.target", "")];
    let about = format!("{about}. To open at boot: systemctl enable --now {}", shell_word(name));
    let socket = addresses.chain(settings).collect();
    print(&about, &[("Unit", unit), ("Socket", socket), ("Install", install)])
}

fn service_unit(plan: &Plan, program: &Path) -> String {
    let UnitArguments { service, command, metrics, .. } = &plan.arguments;
    let stops = match plan.idle() {
        Some(idle) => format!("stops after {idle} without a connection"),
        None => "then runs until this service stops".into(),
    };
    let about = match (service, command) {
        (Some(service), _) => format!(
            "The first client starts this service and {service}.\n\
             {service} {stops}.\n\
             Nothing else should start {service}: systemctl disable --now {}",
            shell_word(service)
        ),
        (None, Some(_)) => format!(
            "The first client starts this service and the program after --.\n\
             The program {stops}.\n\
             The program must listen on the address before -- and stay in the foreground. If it sends\n\
             READY=1, as sd_notify(3) does, add --ready=notify before that address."
        ),
        (None, None) => "The first client starts this service.".into(),
    };
    let exits_when_idle = plan.idle().is_some() && command.is_none();
    let sockets = plan.sockets().join(" ");
    let after = service.as_ref().map(|service| format!("{sockets} {service}"));
    let unit = vec![
        row("Description", format!("Proxy in front of {}", value(&plan.name)), ""),
        row("Documentation", DOCUMENTATION, ""),
        optional("StartLimitIntervalSec", exits_when_idle.then_some("0"), MANY_STARTS),
        row("Requires", plan.socket(), ""),
        optional("Wants", metrics.as_ref().map(|_| plan.metrics_socket()), WANTS_METRICS),
        optional("Wants", service.as_ref(), WANTS_SERVICE),
        row("After", after.as_ref().unwrap_or(&sockets), ""),
    ];
    let options = if metrics.is_some() { OPTIONS_BESIDE_METRICS } else { OPTIONS };
    let execution = vec![
        row("Type", "notify", ""),
        optional("Sockets", metrics.as_ref().map(|_| sockets), ""),
        row("ExecStart", exec_start(plan, program), options),
        optional("KillMode", command.as_ref().map(|_| "mixed"), KILL_MODE),
    ];
    let mut sandbox = access(plan);
    sandbox.extend(hardening(plan));
    // A section without a name continues the one before.
    print(&about, &[("Unit", unit), ("Service", execution), ("", sandbox)])
}

fn exec_start(plan: &Plan, program: &Path) -> String {
    let UnitArguments { service, command, metrics, targets, .. } = &plan.arguments;
    let wait = if service.is_some() { SERVICE_WAIT } else { BRIDGE_WAIT };
    let idle_option = if command.is_some() { "--stop-idle-time" } else { "--exit-idle-time" };
    let options = [
        // The proxy's default is for a COMMAND.
        command.is_none().then(|| format!("--backend-wait={wait}")),
        plan.idle().map(|idle| format!("{idle_option}={idle}")),
        metrics.as_ref().map(|_| "--metrics=fd:metrics".into()),
    ];
    let line_break = if targets.len() > 1 { "\\\n    " } else { "" };
    let mut words = vec![exec_word(program)];
    words.extend(options.iter().flatten().map(exec_word));
    words.extend(targets.iter().map(|target| format!("{line_break}{}", exec_word(target))));
    if let Some(command) = command {
        words.push("-- \\\n   ".into());
        words.extend(command.iter().map(exec_word));
    }
    words.join(" ")
}

/// Returns the user of the service, and the directory and the networks that it may use: a proxy
/// only the addresses of its targets, a COMMAND all.
fn access(plan: &Plan) -> Vec<Row> {
    let Plan { targets, arguments: UnitArguments { user, group, command, .. }, .. } = plan;
    let any = |is: fn(&Target) -> bool| targets.iter().any(is);
    let has_vsock = any(|it| matches!(it, Target::Address(Address::Vsock { .. })));
    let has_inet = any(|it| matches!(it, Target::Name(_) | Target::Address(Address::Inet(_))));
    let has_name = any(|it| matches!(it, Target::Name(name) if name.host != LOCALHOST));
    let has_path = any(|it| socket_path(it).is_some());
    let has_only_paths = !any(|it| socket_path(it).is_none());

    let is_proxy = command.is_none();
    let is_limited = is_proxy && !has_name;
    let addresses: BTreeSet<_> = targets.iter().filter_map(ip_address).collect();
    let addresses = Some(addresses).filter(|addresses| is_limited && !addresses.is_empty());
    let inet = if is_proxy { has_inet } else { !has_vsock };
    let inet = inet.then_some("AF_INET AF_INET6");
    let families = [Some("AF_UNIX"), inet, has_vsock.then_some("AF_VSOCK")];
    let families: Vec<_> = families.into_iter().flatten().collect();
    let name = plan.runtime_directory().and_then(Path::file_name).map(OsStr::to_string_lossy);
    let needs_group = is_proxy && has_path && group.is_none();
    let deny_hint = hint(addresses.is_some(), ONLY_TARGETS);
    let families_hint = if is_proxy { hint(has_name, ANY_ADDRESS) } else { COMMAND_NEEDS };
    vec![
        optional("User", user.as_ref(), ""),
        optional("DynamicUser", user.is_none().then_some("yes"), DYNAMIC_USER),
        optional("SupplementaryGroups", group.as_ref(), GROUP),
        optional("#SupplementaryGroups", needs_group.then_some(""), NO_GROUP),
        optional("RuntimeDirectory", name, ""),
        optional("PrivateNetwork", (is_proxy && has_only_paths).then_some("yes"), NO_NETWORK),
        optional("IPAddressDeny", is_limited.then_some("any"), deny_hint),
        optional("IPAddressAllow", addresses.map(|all| Vec::from_iter(all).join(" ")), ""),
        row("RestrictAddressFamilies", families.join(" "), families_hint),
    ]
}

/// Returns the address of a target for `IPAddressAllow=`.
fn ip_address(target: &Target) -> Option<String> {
    let ip = match target {
        Target::Address(Address::Inet(address)) => address.ip().to_canonical(),
        Target::Name(name) if name.host == LOCALHOST => return Some(LOCALHOST.into()),
        _ => return None,
    };
    Some(if is_local(ip) { LOCALHOST.into() } else { ip.to_string() })
}

fn is_local(ip: IpAddr) -> bool {
    ip.is_loopback() || ip.is_unspecified()
}

/// Returns the restrictions that a proxy or most programs do not notice, by `systemd-analyze
/// security`.
fn hardening(plan: &Plan) -> Vec<Row> {
    let is_proxy = plan.arguments.command.is_none();
    let has_target_below = |directories: &[&str]| {
        let mut paths = plan.targets.iter().filter_map(socket_path);
        is_proxy && paths.any(|path| is_below(path, directories))
    };
    let (in_home, in_tmp) = (has_target_below(&HOMES), has_target_below(&TEMPORARY));
    vec![
        row("CapabilityBoundingSet", "", ""),
        row("NoNewPrivileges", "yes", ""),
        row("ProtectSystem", "strict", ""),
        row("ProtectHome", if in_home { "read-only" } else { "yes" }, hint(in_home, IN_HOME)),
        row("ProtectProc", "invisible", ""),
        row("PrivateDevices", "yes", ""),
        row("PrivateTmp", if in_tmp { "no" } else { "yes" }, hint(in_tmp, IN_TMP)),
        row("PrivateMounts", "yes", ""),
        row("ProtectClock", "yes", ""),
        row("ProtectControlGroups", "yes", ""),
        row("ProtectHostname", "yes", ""),
        row("ProtectKernelLogs", "yes", ""),
        row("ProtectKernelModules", "yes", ""),
        row("ProtectKernelTunables", "yes", ""),
        row("LockPersonality", "yes", ""),
        // Not for a user of the system, whose other processes may use IPC.
        optional("RemoveIPC", plan.arguments.user.is_none().then_some("yes"), ""),
        row("RestrictNamespaces", "yes", ""),
        row("RestrictRealtime", "yes", ""),
        row("RestrictSUIDSGID", "yes", ""),
        row("SystemCallArchitectures", "native", ""),
        row("SystemCallFilter", "@system-service", ""),
        row("SystemCallErrorNumber", "EPERM", ""),
        row("UMask", if is_proxy { "0777" } else { "0077" }, ""),
        optional("ProcSubset", is_proxy.then_some("pid"), ""),
        optional("PrivateUsers", is_proxy.then_some("yes"), ""),
        optional("MemoryDenyWriteExecute", is_proxy.then_some("yes"), ""),
        optional("SystemCallFilter", is_proxy.then_some("~@privileged"), ""),
    ]
}

fn drop_in(service: &str) -> String {
    let about = format!(
        "{service} stops when its proxy, which wants it, has stopped. Without the proxy it does not stay\n\
         up: to run it by hand, start the proxy."
    );
    let unit = vec![
        row("StopWhenUnneeded", "yes", ""),
        row("StartLimitIntervalSec", "2min", RESTARTS),
        row("StartLimitBurst", "90", ""),
    ];
    let service = vec![row("Restart", "always", ""), row("RestartSec", "1s", "")];
    print(&about, &[("Unit", unit), ("Service", service)])
}

/// A setting, its value, and the comment above it. A setting without a value is left out.
type Row = (&'static str, Option<String>, &'static str);

fn row(setting: &'static str, value: impl Into<String>, comment: &'static str) -> Row {
    optional(setting, Some(value), comment)
}

fn optional(setting: &'static str, value: Option<impl Into<String>>, comment: &'static str) -> Row {
    (setting, value.map(Into::into), comment)
}

fn hint(applies: bool, comment: &'static str) -> &'static str {
    if applies { comment } else { "" }
}

/// Prints a unit: a comment on the whole of it, and its sections.
fn print(about: &str, sections: &[(&str, Vec<Row>)]) -> String {
    let comment = |text: &str| text.lines().map(|line| format!("# {line}\n")).collect::<String>();
    let print_row = |(setting, value, why): &Row| {
        value.as_ref().map(|value| format!("{}{setting}={value}\n", comment(why)))
    };
    let sections = sections.iter().map(|(name, rows)| {
        let heading = if name.is_empty() { String::new() } else { format!("[{name}]\n") };
        heading + &rows.iter().filter_map(print_row).collect::<String>()
    });
    comment(about) + &sections.collect::<Vec<_>>().join("\n")
}

const DOCUMENTATION: &str = "man:socket-proxyd(8) man:socket-proxyd-units(8)";

const LOCALHOST: &str = "localhost";

/// How long clients are held: while a backend restarts, and while a service starts.
const BRIDGE_WAIT: &str = "30s";
const SERVICE_WAIT: &str = "90s";

// Comments of the units.
const OPEN_TO_ALL: &str =
    "Every user may connect. SocketMode=0660 with SocketUser= or SocketGroup= restricts that.";
const MANY_STARTS: &str = "\
Each idle exit leads to another start. With a start limit, a short idle time and a few clients
would make systemd close the socket for good.";
const WANTS_METRICS: &str =
    "Wanted, not required: without the metrics socket clients are still served.";
const WANTS_SERVICE: &str = "\
Wanted, not required: Restart= starts a killed service again, and a service that cannot start
does not close the socket.";
const OPTIONS: &str = "\
For other options of socket-proxyd(8), write an empty ExecStart= and then this line into a drop-in,
with the options before the target.";
const OPTIONS_BESIDE_METRICS: &str = "\
For other options of socket-proxyd(8), write an empty ExecStart= and then this line into a drop-in,
with the options before the target. Keep --metrics=fd:metrics: without it, clients of the metrics
socket reach the target.";
const FREE_BIND: &str = "Also before the machine has the address, as early in the boot.";
const KILL_MODE: &str = "The proxy stops the program and the processes that it has started.";
const DYNAMIC_USER: &str = "Run as a transient, unprivileged user.";
const GROUP: &str = "This group may connect to the target's socket.";
const NO_GROUP: &str = "If only a group may connect to the target's socket, name it here.";
const NO_NETWORK: &str =
    "A Unix socket needs no network. For a target of another kind remove these three lines.";
const ONLY_TARGETS: &str =
    "Only the target's address. Clients are not affected: their sockets belong to systemd.";
const ANY_ADDRESS: &str = "\
The target's name may resolve to any address. IPAddressDeny=any with IPAddressAllow= restricts that.";
const IN_HOME: &str = "The target is in a home directory or below /run/user.";
const IN_TMP: &str = "The target is in the /tmp or /var/tmp of the system.";
const COMMAND_NEEDS: &str = "\
Most programs run under these restrictions. A program that keeps files needs StateDirectory=, a
directory in /var/lib whose path is in $STATE_DIRECTORY.";
const RESTARTS: &str = "\
While the proxy runs, start the service again a second after it has ended, up to 90 times in 2
minutes: for as long as the proxy holds clients. This replaces the service's own settings.";
