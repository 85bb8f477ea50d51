//! Fills in the text of the units. `templates/` has a file for each: its settings in order, with
//! comments that say why a setting is there, or when an administrator has to change it. Each value
//! is escaped for its place before it enters a template.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use minijinja::syntax::SyntaxConfig;
use minijinja::{Environment, UndefinedBehavior, Value, context};

use crate::config::listen_address::{ListenAddress, ListenPlace};
use crate::config::options::Arguments;
use crate::config::target::Target;
use crate::socket::address::{Address, SocketKind};
use crate::unit_writer::escape::{exec_line, exec_program, exec_words, shell_word, value};
use crate::unit_writer::options::UnitArguments;
use crate::unit_writer::plan::Plan;
use crate::unit_writer::stamp::stamp;
use crate::unit_writer::values::{
    HOMES, LOCALHOST, TEMPORARY, can_be_in_exec_start, is_below, is_local, socket_path,
};

/// A generated file; its path is relative to the directory of the units.
#[derive(Debug, PartialEq, Eq)]
pub struct UnitFile {
    pub path: PathBuf,
    pub text: String,
}

/// Renders all files of a plan; `program` is the path of the proxy.
pub fn files(plan: &Plan, program: &Path) -> Vec<UnitFile> {
    let UnitArguments { service: started, metrics, .. } = &plan.arguments;
    let context = context(plan, program);
    let command_line = plan.arguments.command_line();
    let file = |template: &str, unit: &str, path: &str| {
        let unit = shell_word(unit);
        let text = render(template, context! { unit => &unit, ..context.clone() });
        UnitFile { path: path.into(), text: stamp(&unit, &command_line, &text) }
    };
    let unit = |template: &str, unit: &str| file(template, unit, unit);
    let mut files = vec![unit(SOCKET, &plan.socket())];
    files.extend(metrics.iter().map(|_| unit(METRICS, &plan.metrics_socket())));
    files.push(unit(SERVICE, &plan.service()));
    let drop_in = |started: &String| format!("{started}.d/{}.conf", plan.unit);
    files.extend(started.iter().map(|started| file(DROP_IN, started, &drop_in(started))));
    files
}

/// Fills in a template. A line that is only `{% ... %}` or `{# ... #}` leaves nothing behind.
pub fn render(template: &str, context: Value) -> String {
    let mut syntax = SyntaxConfig::builder();
    let syntax = syntax.trim_blocks(true).keep_trailing_newline(true).build();
    // An empty environment escapes nothing.
    let mut environment = Environment::empty();
    environment.set_syntax(syntax.expect("the delimiters are the usual ones"));
    environment.set_undefined_behavior(UndefinedBehavior::Strict);
    let template = environment.template_from_str(template).expect("each template is tested");
    // Rendering finds missing values only in the branches that this context takes.
    let is_missing = |name: &String| context.get_attr(name).is_ok_and(|it| it.is_undefined());
    debug_assert_eq!(template.undeclared_variables(false).into_iter().find(is_missing), None);
    template.render(context).expect("the context has each value that the template names")
}

/// Returns the values that the templates of the units name.
fn context(plan: &Plan, program: &Path) -> Value {
    let Plan { targets, arguments, .. } = plan;
    let UnitArguments { listen, service, command, user, group, metrics, .. } = arguments;
    let Arguments { start_command, stop_command, ready, .. } = &plan.proxy;
    let addresses: BTreeSet<_> = targets.iter().filter_map(ip_address).collect();
    let directory = plan.runtime_directory().and_then(Path::file_name);
    let address = |listen: &ListenAddress| {
        context! {
            text => value(&listen.place.to_string()),
            setting => if is_datagram(listen) { "ListenDatagram" } else { "ListenStream" },
            is_path => matches!(listen.place, ListenPlace::Address(Address::Path(_))),
            may_be_absent => may_be_absent(listen),
        }
    };
    let stop_line =
        stop_command.as_ref().filter(|line| can_be_in_exec_start(line.words[0].as_ref()));
    let any = |is: fn(&Target) -> bool| targets.iter().any(is);
    let is_proxy_below = |directories: &[&str]| {
        let mut paths = targets.iter().filter_map(socket_path);
        command.is_none() && paths.any(|path| is_below(path, directories))
    };
    context! {
        name => value(&plan.name),
        proxy_service => plan.service(),
        socket => plan.socket(),
        metrics_socket => plan.metrics_socket(),
        sockets => plan.sockets().join(" "),
        listen => listen.iter().map(address).collect::<Vec<_>>(),
        has_several => listen.len() > 1,
        has_datagrams => listen.iter().any(is_datagram),
        has_streams => !listen.iter().all(is_datagram),
        may_be_absent => listen.iter().any(may_be_absent),
        metrics => metrics.as_ref().map(address),
        service => service,
        service_word => service.as_ref().map(shell_word),
        program => exec_program(program),
        idle => arguments.idle_time(),
        exits_when_idle => arguments.exits_when_idle(),
        derived_options => exec_words(&arguments.derived_options()),
        passed_options => exec_words(&arguments.passed_options()),
        targets => exec_words(&arguments.targets),
        command => command.as_ref().map(|words| exec_words(words).join(" ")),
        starts => start_command.is_some(),
        is_isolated => arguments.isolate,
        shows_clients => plan.shows_clients(),
        has_stop_command => stop_command.is_some(),
        stop_line => stop_line.map(|line| exec_line(&line.words)),
        is_ready_set => ready.is_some(),
        has_programs => plan.proxy.programs().next().is_some(),
        user => user,
        group => group,
        runtime_directory => directory.map(OsStr::to_string_lossy),
        // A proxy gets only the addresses of its targets.
        addresses => Vec::from_iter(addresses).join(" "),
        has_inet => any(|it| matches!(it, Target::Name(_) | Target::Address(Address::Inet(_)))),
        has_vsock => any(|it| matches!(it, Target::Address(Address::Vsock { .. }))),
        has_name => any(|it| matches!(it, Target::Name(name) if name.host != LOCALHOST)),
        has_path => any(|it| socket_path(it).is_some()),
        has_only_paths => targets.iter().all(|it| socket_path(it).is_some()),
        in_home => is_proxy_below(&HOMES),
        in_tmp => is_proxy_below(&TEMPORARY),
    }
}

fn is_datagram(listen: &ListenAddress) -> bool {
    listen.kind == SocketKind::Datagram
}

/// Whether this machine may not have the address yet when systemd opens the socket.
fn may_be_absent(listen: &ListenAddress) -> bool {
    match &listen.place {
        ListenPlace::Host(host) => host.literal().is_some_and(|it| !is_local(it.ip())),
        _ => false,
    }
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

const SOCKET: &str = include_str!("templates/socket.unit");
const METRICS: &str = include_str!("templates/metrics.unit");
const SERVICE: &str = include_str!("templates/service.unit");
const DROP_IN: &str = include_str!("templates/drop_in.conf");
