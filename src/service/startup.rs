//! From the configuration and the sockets to a [`Server`], before the first client is accepted.

use std::os::fd::AsFd;
use std::rc::Rc;
use std::sync::Arc;

use rustix::thread::{clear_ambient_capability_set, set_no_new_privs};
use tokio::sync::Notify;

use crate::backend::command::Supervisor;
use crate::backend::command::guard_client::StartGuard;
use crate::backend::connect::{ConnectPermits, Connector};
use crate::backend::prober::SharedProber;
use crate::backend::readiness::Readiness;
use crate::backend::source::ClientSources;
use crate::backend::source_trial::try_sources;
use crate::backend::start_command::StartCommand;
use crate::backend::starter::Starter;
use crate::config::Config;
use crate::config::listen_address::MetricsAddress;
use crate::config::selector::Targets;
use crate::config::target::Target;
use crate::config::values::{Overflow, ReadyMode, SourceMode};
use crate::connection::event_loop::EventLoops;
use crate::connection::{BackendSetup, Settings};
use crate::counters::Loops;
use crate::datagram::relay::Relay;
use crate::forward::pipe::{self, PipeLimits};
use crate::handover::Handover;
use crate::handover::replay::Leftovers;
use crate::limits::client_limits::ClientLimits;
use crate::limits::descriptors::{FdBudget, FdPlan, raise_limit};
use crate::limits::passed::PassedRoom;
use crate::listen::activation::{PassedFd, set_cloexec_all, take_matching};
use crate::listen::datagram::DatagramListener;
use crate::listen::listener::Listener;
use crate::listen::passed_connection::PassedConnection;
use crate::listen::stored::SocketFile;
use crate::listen::{ClientSockets, check_no_loop};
use crate::logging::os_message;
use crate::metrics::exporter::Exporter;
use crate::notify::Notifier;
use crate::service::dispatcher::Dispatcher;
use crate::service::server::Server;
use crate::socket::address::{Address, SocketLabel};
use crate::socket::proxy_protocol::ProxyProtocol;

/// Sets `PR_SET_NO_NEW_PRIVS`, unless the proxy starts programs: they would inherit the flag, and
/// may need set-user-ID programs.
pub fn forbid_new_privileges(config: &Config) {
    if starts_programs(config) {
        return;
    }
    if let Err(error) = set_no_new_privs(true) {
        tracing::debug!("Failed to set PR_SET_NO_NEW_PRIVS, ignoring: {error}.");
    }
}

/// Keeps the capability of `--source=client` to the proxy: no program that it starts inherits an
/// ambient capability. Each thread has an ambient set of its own, so none may run yet.
///
/// # Errors
/// One line on prctl(2).
pub fn drop_ambient_capabilities(config: &Config) -> Result<(), String> {
    if config.args.source == SourceMode::Proxy {
        return Ok(());
    }
    clear_ambient_capability_set()
        .map_err(|error| format!("Failed to drop the ambient capabilities: {error}."))
}

/// Takes the sockets that were passed and stored, opens the others, builds the server, and serves
/// its metrics. No client is accepted yet, and the connections of the previous process are not
/// restored yet.
///
/// # Errors
/// One line on a socket that is missing, in use, or damaged, on options that do not fit the
/// sockets, or on limits that are too low.
pub async fn start(
    config: Config,
    mut passed: Vec<PassedFd>,
    notifier: &Notifier,
    start_guard: StartGuard,
) -> Result<(Server, Leftovers, Option<Exporter>), String> {
    if config.handover.is_some() {
        // First, because the stored connections may need many descriptors.
        raise_limit();
    }
    let sources = match config.args.source {
        SourceMode::Proxy => None,
        SourceMode::Client => Some(try_sources(config.targets.iter()).await?),
    };
    let of_metrics = match &config.args.metrics {
        Some(MetricsAddress::Passed(name)) => take_matching(&mut passed, |fd| fd.name == *name),
        _ => Vec::new(),
    };
    let opens = !config.args.listen.is_empty();
    let (handover, mut leftovers) =
        Handover::open(config.handover, opens, &mut passed, notifier).await?;
    let has_connections = !leftovers.connections.is_empty();
    let stored = &mut leftovers.listeners;
    let sockets = ClientSockets::open(&config.args.listen, passed, stored, has_connections).await?;
    let mut exporter = match &config.args.metrics {
        Some(option) => {
            let exporter = match option {
                // A listener that is stored, and not configured any more, may have the address.
                MetricsAddress::Open(address) => Exporter::open(address, stored).await,
                MetricsAddress::Passed(name) => Exporter::from_passed(name, of_metrics),
            };
            Some(exporter.map_err(|error| format!("--metrics={option}: {error}"))?)
        }
        None => None,
    };
    let server = build(config, sockets, sources, handover, &leftovers, start_guard)?;
    if let Some(exporter) = &mut exporter {
        exporter.serve(server.metrics()).map_err(|error| {
            format!("Failed to start a thread for --metrics=: {}.", os_message(&error))
        })?;
    }
    Ok((server, leftovers, exporter))
}

fn build(
    config: Config,
    sockets: ClientSockets,
    sources: Option<ClientSources>,
    handover: Option<Arc<Handover>>,
    leftovers: &Leftovers,
    start_guard: StartGuard,
) -> Result<Server, String> {
    let Routes { listeners, connection, datagrams } = routes(&config, sockets)?;
    let is_journaled = handover.as_ref().is_some_and(|handover| handover.is_crash_mode());
    let passes = !is_journaled && passes_descriptors(&config, &listeners, &connection);
    let fds = FdPlan::of_this_process(&config, is_journaled, passes, leftovers.descriptors())?;
    if starts_programs(&config) {
        set_cloexec_all().map_err(|error| format!("Failed to list /proc/self/fd: {error}."))?;
    }
    let has_streams = |index| {
        let leads_there = listeners.iter().any(|(_, backend)| *backend == index);
        leads_there || connection.is_some() || datagrams.is_empty()
    };
    let backends = backend_setups(&config, sources, fds, has_streams);
    let has_opened = !config.args.listen.is_empty();
    let routes = || {
        let streams = listeners.iter().map(|(it, backend)| (&it.label, *backend));
        streams.chain(datagrams.iter().map(|(it, backend)| (&it.label, *backend)))
    };
    for (label, backend) in routes().filter(|_| has_opened) {
        let target = &backends[backend].connector.target;
        check_no_loop(label, target, config.command.is_some())?;
    }
    let starter = starter(&config, fds.inherited, start_guard)?;
    let threads = config.args.threads.get();
    let settings = Settings {
        backends,
        backend_wait: config.backend_wait,
        lifecycle: starter.as_ref().map(|starter| Arc::clone(starter.lifecycle())),
        proxy_protocol: config.args.proxy_protocol,
        connection_idle_time: config.args.connection_idle_time,
        pipes: PipeLimits { max: fds.pipes / threads, held: (pipe::HELD_MAX / threads).max(1) },
        passed: PassedRoom::new(fds.passed),
        handover: handover.clone(),
        loops: Arc::new(Loops::default()),
    };
    log_routes(&config, routes(), &settings);
    let streams = listeners.iter().map(|(it, _)| (it.as_fd(), it.file()));
    let opened = streams.chain(datagrams.iter().map(|(it, _)| (it.as_fd(), it.file())));
    let keep = |(socket, file): (_, Option<&SocketFile>)| {
        handover.as_ref()?.keep_listener(socket, file.map(|file| file.id))
    };
    let listener_entries = opened.filter(|_| has_opened).filter_map(keep).collect();
    let event_loops = EventLoops::new(settings, config.args.threads);
    let has_listeners = !listeners.is_empty() || !datagrams.is_empty();
    let limits = ClientLimits::new(&config, has_listeners);
    // To refuse a client, the accept loop must accept it.
    let accepted_max = match config.args.overflow {
        Overflow::Refuse => usize::MAX,
        Overflow::Wait => config.args.connections_max.get() as usize,
    };
    let descriptors = Rc::new(FdBudget::new(fds.connections, accepted_max));
    let relay = match datagrams.is_empty() {
        true => None,
        false => {
            let handover = handover.clone();
            Some(relay(&config, datagrams, &event_loops, &limits, &descriptors, handover)?)
        }
    };
    let dispatcher = Dispatcher::new(
        &config,
        limits,
        event_loops,
        relay.clone(),
        handover.clone(),
        has_listeners,
    );
    Ok(Server {
        listeners,
        connection,
        relay,
        descriptors,
        dispatcher,
        starter,
        exit_idle_time: config.args.exit_idle_time,
        handover,
        restored: leftovers.connections.len(),
        has_opened,
        listener_entries,
        unconfigured: Arc::default(),
    })
}

/// The sockets, each with the index of its backend.
struct Routes {
    listeners: Vec<(Rc<Listener>, usize)>,
    connection: Option<(PassedConnection, usize)>,
    datagrams: Vec<(DatagramListener, usize)>,
}

/// Finds the backend of each socket, and refuses options that do not fit the sockets.
fn routes(config: &Config, sockets: ClientSockets) -> Result<Routes, String> {
    check_single_connection(config, &sockets)?;
    let backends = backends_of(config, &sockets)?;
    if let Some(keepalive) = config.keepalive {
        sockets.set_keepalive(keepalive);
    }
    let ClientSockets { listeners, datagrams, connection } = sockets;
    // In the order of the labels. A connection is the only socket.
    let of_datagrams = backends[listeners.len()..].to_vec();
    let connection = connection.zip(backends.first().copied());
    let routes = Routes {
        listeners: listeners.into_iter().zip(backends).collect(),
        connection,
        datagrams: datagrams.into_iter().zip(of_datagrams).collect(),
    };
    check_datagrams(config, &routes.datagrams)?;
    Ok(routes)
}

/// Whether connections lead from Unix sockets to Unix sockets, which can pass descriptors.
fn passes_descriptors(
    config: &Config,
    listeners: &[(Rc<Listener>, usize)],
    connection: &Option<(PassedConnection, usize)>,
) -> bool {
    let connection = connection.iter().map(|(it, backend)| (&it.label, *backend));
    let mut routes = listeners.iter().map(|(it, backend)| (&it.label, *backend)).chain(connection);
    routes.any(|(label, backend)| {
        let target = config.targets.iter().nth(backend);
        let is_unix = matches!(target, Some(Target::Address(address)) if address.is_unix());
        is_unix && label.address.is_unix()
    })
}

/// Whether the proxy starts programs: COMMAND, or those of `--start-command=` and `--ready=exec:`.
fn starts_programs(config: &Config) -> bool {
    config.starts_backend() || matches!(config.ready, ReadyMode::Exec(_))
}

/// Refuses options that do not fit Accept=yes, where each connection has a process of its own.
fn check_single_connection(config: &Config, sockets: &ClientSockets) -> Result<(), String> {
    if sockets.connection.is_none() {
        return Ok(());
    }
    let option = match (&config.command, &config.args.metrics) {
        (Some(_), _) => "COMMAND",
        (_, Some(_)) => "--metrics=",
        _ => return Ok(()),
    };
    Err(format!(
        "{option} needs one process that serves all connections, and only one connection was passed in. \
         (Write Accept=no in the .socket unit.)"
    ))
}

/// Finds the backend of each source.
fn backends_of(config: &Config, sockets: &ClientSockets) -> Result<Vec<usize>, String> {
    let labels = sockets.labels();
    let backends = match &labels[..] {
        // No socket accepts.
        [] => Vec::new(),
        labels => config.targets.assign(labels)?,
    };
    if let Some(target) = config.targets.resembles_selector(&labels) {
        tracing::warn!(
            "TARGET {target} is not split at =, because it begins with / or @. (A single TARGET needs no \
             selector.)"
        );
    }
    Ok(backends)
}

/// Returns what carries the datagrams of these listeners.
fn relay(
    config: &Config,
    datagrams: Vec<(DatagramListener, usize)>,
    event_loops: &EventLoops,
    limits: &ClientLimits,
    descriptors: &Rc<FdBudget>,
    handover: Option<Arc<Handover>>,
) -> Result<Rc<Relay>, String> {
    let idle_time = config.args.session_idle_time;
    let (limits, descriptors) = (limits.clone(), Rc::clone(descriptors));
    let load = event_loops.main_load.clone();
    Relay::new(datagrams, &event_loops.settings, idle_time, limits, descriptors, load, handover)
        .map_err(|error| format!("Failed to watch the datagram sockets: {}.", os_message(&error)))
}

/// Refuses what datagrams cannot have.
fn check_datagrams(config: &Config, datagrams: &[(DatagramListener, usize)]) -> Result<(), String> {
    let Some((listener, _)) = datagrams.first() else { return Ok(()) };
    if config.args.proxy_protocol == Some(ProxyProtocol::V1) {
        return Err(format!(
            "--proxy-protocol=v1 cannot be combined with the datagram socket {listener}: version 1 knows \
             TCP only. (Write --proxy-protocol=v2.)"
        ));
    }
    let targets: Vec<_> = config.targets.iter().collect();
    for (listener, backend) in datagrams {
        if let Target::Address(Address::Vsock { .. }) = targets[*backend] {
            return Err(format!(
                "TARGET {} cannot be reached from the datagram socket {listener}: vsock has streams \
                 only.",
                targets[*backend]
            ));
        }
    }
    Ok(())
}

/// Returns the setup of each target. All share the permits. `has_streams` tells whether connections
/// lead to a target.
fn backend_setups(
    config: &Config,
    sources: Option<ClientSources>,
    fds: FdPlan,
    has_streams: impl Fn(usize) -> bool,
) -> Vec<BackendSetup> {
    let permits = ConnectPermits::new(fds.lookups, fds.watch_places, fds.beside_places);
    let setup = |(index, target): (usize, &Target)| {
        let connector = Connector::new(
            target.clone(),
            sources,
            config.args.start_command.is_some(),
            config.args.connect_timeout,
            config.keepalive,
            permits.clone(),
        );
        let readiness = Readiness::new(&config.ready, config.args.proxy_protocol, &connector);
        let datagrams_only: Option<Arc<Notify>> = (!has_streams(index)).then(Arc::default);
        let shows_ready = config.command.is_some() && config.ready == ReadyMode::Connect;
        let found_up = datagrams_only.clone().filter(|_| shows_ready);
        BackendSetup {
            connector,
            prober: SharedProber::default(),
            probers_by_family: Default::default(),
            readiness,
            datagrams_only,
            found_up,
        }
    };
    config.targets.iter().enumerate().map(setup).collect()
}

/// Returns what starts the backend, if the proxy does. `fd_limit` is COMMAND's soft limit on
/// descriptors.
fn starter(
    config: &Config,
    fd_limit: Option<u64>,
    start_guard: StartGuard,
) -> Result<Option<Starter>, String> {
    let Some(target) = config.targets.iter().next().cloned() else { return Ok(None) };
    if let Some(command) = &config.command {
        let supervisor = Supervisor::new(
            command.clone(),
            &config.ready,
            config.args.busy,
            config.times,
            target,
            fd_limit,
            start_guard,
        )?;
        return Ok(Some(Starter::Command(Arc::new(supervisor))));
    }
    Ok(config.args.start_command.clone().map(|start| {
        let stop = config.args.stop_command.clone();
        Starter::StartCommand(Arc::new(StartCommand::new(start, stop, target, config.times)))
    }))
}

fn log_routes<'a>(
    config: &Config,
    routes: impl Iterator<Item = (&'a SocketLabel, usize)>,
    settings: &Settings,
) {
    for (listener, backend) in routes {
        match &config.targets {
            Targets::One(_) => tracing::debug!("Serving {listener}."),
            // At info, because a wrong selector shows here.
            Targets::Selected(_) => {
                let target = &settings.backends[backend].connector.target;
                tracing::info!("Serving {listener}, connections go to {target}.");
            }
        }
    }
}
