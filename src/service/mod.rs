//! The life of the process: sockets, READY, serve, signals, idle exit, stop.

pub mod program;
mod takeover;
mod drain;
mod status;
mod signals;

use std::cell::Cell;
use std::convert::Infallible;
use std::io;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use rustix::thread::set_no_new_privs;
use sd_notify::NotifyState;
use tokio::sync::Semaphore;
use tokio::task::{JoinError, JoinSet, yield_now};
use tokio::time::{sleep, timeout};

use crate::backend::command::Supervisor;
use crate::backend::command::ready::NotifyPlace;
use crate::backend::connect::Connector;
use crate::backend::wait::SharedProbe;
use crate::config::selector::Targets;
use crate::config::target::Target;
use crate::config::timespan::TimeSpan;
use crate::config::values::{Overflow, ReadyMode};
use crate::config::{CommandConfig, Config};
use crate::connection::worker::EventLoops;
use crate::connection::{BackendSetup, Settings};
use crate::counters::{ConnectCounters, ListenerCounters, Loops};
use crate::forward::pipe::{self, Limits};
use crate::handover::Handover;
use crate::handover::journal::JournalEntry;
use crate::limits::descriptors::{FdBudget, FdNeeds, FdPlan, raise_limit};
use crate::limits::idle::wait_idle;
use crate::limits::{ConnectionLimit, ConnectionWatch};
use crate::listen::accepted::AcceptedSocket;
use crate::listen::activation::{PassedFd, set_cloexec_all};
use crate::listen::listener::{ACCEPT_PAUSE, Listener};
use crate::listen::{Sources, check_command_target, check_no_loop};
use crate::logging::{RateLimit, os_message};
use crate::metrics::exporter::Exporter;
use crate::metrics::{self, Metrics};
use crate::notify::Notifier;
use crate::runtime::{catch_panic, event_loop};
use crate::service::drain::drain;
use crate::service::signals::{ReportSignal, Signals};
use crate::service::status::publish_status;

/// How long a client that is queued at the moment of the idle exit has to be accepted.
const LATE_CLIENT_GRACE: Duration = Duration::from_secs(1);

static REFUSED: RateLimit = RateLimit::new(5, Duration::from_secs(10));

/// Serves until a signal or the idle time ends it.
///
/// # Errors
/// One line on what kept it from starting, or on what broke.
pub fn run(config: Config, inherited: Vec<PassedFd>) -> Result<(), String> {
    // COMMAND may need set-user-ID programs, and would inherit this.
    if config.application.is_none()
        && let Err(error) = set_no_new_privs(true)
    {
        tracing::debug!("Failed to set PR_SET_NO_NEW_PRIVS, ignoring: {error}");
    }
    let runtime = event_loop()
        .map_err(|error| format!("Failed to start the event loop: {}.", os_message(&error)))?;
    let result = runtime.block_on(live(config, inherited));
    // Drops what is left, which resets it, and leaves behind the lookups that still run.
    runtime.shutdown_background();
    result
}

async fn live(config: Config, mut inherited: Vec<PassedFd>) -> Result<(), String> {
    let (mut signals, mut report_signal) = (Signals::catch()?, ReportSignal::catch()?);
    let notifier = Notifier::from_environment();

    if config.handover.is_some() {
        // Before what was stored is taken, however much there is.
        raise_limit();
    }
    // systemd, or a name to listen on, may take its time; a signal must not.
    let gather = async {
        // First: what is passed for it is nobody's listener.
        let exporter = match &config.metrics {
            Some(address) => {
                let opened = Exporter::open(address, &mut inherited).await;
                Some(opened.map_err(|error| format!("--metrics={address}: {error}"))?)
            }
            None => None,
        };
        let opens = !config.listen.is_empty();
        let (handover, mut restored) =
            Handover::open(config.handover, opens, &mut inherited, &notifier).await?;
        let sockets = {
            let has_connections = restored.has_connections();
            let stored = &mut restored.listeners;
            Sources::gather(&config.listen, inherited, stored, has_connections).await?
        };
        Ok::<_, String>((handover, restored, sockets, exporter))
    };
    let (handover, restored, sockets, mut exporter) = tokio::select! {
        gathered = gather => gathered?,
        () = signals.stop() => return Ok(()),
    };
    let drain_time = config.drain_time;
    let mut server = Server::new(config, sockets, handover, restored.descriptors())?;
    server.take_back(restored);
    if let Some(exporter) = &mut exporter {
        exporter.serve(server.metrics()).map_err(|error| {
            format!("Failed to start a thread for --metrics=: {}.", os_message(&error))
        })?;
    }
    if !drain_time.is_zero() && !notifier.has_manager() {
        tracing::warn!(
            "--drain-time={} without NOTIFY_SOCKET: systemd can't be asked to wait (Type=notify), \
             and TimeoutStopSec= may cut it short.",
            drain_time
        );
    }
    let _abort = server.handover.as_ref().and_then(|it| it.abort_on_panic());
    let mut tasks = server.start();
    let ended = server.serve(&mut tasks, &mut signals, &mut report_signal, &notifier).await;
    let was_told = ended == Ok(StopReason::Signal);
    let drain_time = if was_told { drain_time } else { TimeSpan::new(Duration::ZERO) };
    let again = async {
        if !was_told {
            signals.stop().await;
        }
        signals.again().await;
    };
    // Who has failed has connections, too.
    let leaves = ended != Ok(StopReason::Idle);
    server.stop(tasks, leaves, drain_time, again, &mut report_signal, &notifier).await;
    ended.map(|_| ())
}

/// Why it stops serving.
#[derive(Debug, PartialEq, Eq)]
enum StopReason {
    /// By a signal.
    Signal,
    /// Nobody needs it.
    Idle,
}

/// What serves, for as long as the process does.
pub struct Server {
    pub sources: Routes,
    pub descriptors: Rc<FdBudget>,
    pub limit: ConnectionLimit,
    pub workers: Rc<EventLoops>,
    pub application: Option<Arc<Supervisor>>,
    pub exit_idle_time: TimeSpan,
    pub handover: Option<Arc<Handover>>,
    /// Connections of the process before this one.
    pub restored: usize,
    /// Whether the listeners are ours, and end with the process.
    pub has_opened: bool,
    /// That they don't.
    pub listener_entries: Vec<JournalEntry>,
    /// Connections of the process before this one that came in elsewhere.
    pub elsewhere: Arc<ListenerCounters>,
}

/// Where clients come from, each with the backend of the plan that it leads to.
pub enum Routes {
    Listeners(Vec<(Rc<Listener>, usize)>),
    /// Somebody who came in before the start, until they are served; nobody will after them.
    Connection(Option<(AcceptedSocket, usize)>),
}

impl Routes {
    fn new(sockets: Sources, backends: Vec<usize>) -> Self {
        match sockets {
            Sources::Listeners(listeners) => {
                Self::Listeners(listeners.into_iter().zip(backends).collect())
            }
            Sources::Connection(connection) => {
                Self::Connection(Some(connection).zip(backends.first().copied()))
            }
            Sources::Stored => Self::Connection(None),
        }
    }

    pub fn listeners(&self) -> &[(Rc<Listener>, usize)] {
        match self {
            Self::Listeners(listeners) => listeners,
            Self::Connection(_) => &[],
        }
    }
}

/// What runs beside the connections.
struct Tasks {
    /// The listeners; each ends only when its socket breaks.
    accepting: JoinSet<String>,
    /// COMMAND, if there is one; it never ends.
    application: JoinSet<Infallible>,
}

impl Server {
    fn new(
        config: Config,
        sockets: Sources,
        handover: Option<Arc<Handover>>,
        restored: usize,
    ) -> Result<Self, String> {
        let identities = sockets.identities();
        let backends = match sockets {
            // Nobody comes in any more.
            Sources::Stored => Vec::new(),
            _ => config.targets.assign(&identities)?,
        };
        if let Some(target) = config.targets.resembles_selector(&identities) {
            tracing::warn!(
                "TARGET {target} is taken as a whole, since it begins with / or @; one TARGET for all \
                 sockets needs no selector."
            );
        }
        let by_name = config.targets.iter().any(|target| matches!(target, Target::Name(_)));
        if let Some(keepalive) = config.keepalive {
            sockets.keep_alive(keepalive);
        }
        if matches!(sockets, Sources::Connection(_)) && config.application.is_some() {
            return Err("COMMAND serves all connections, and only one was passed in. (Write \
                        Accept=no in the .socket unit.)"
                .into());
        }
        if matches!(sockets, Sources::Connection(_)) && config.metrics.is_some() {
            return Err(
                "--metrics= is for one process that serves all connections, and only one was \
                        passed in. (Write Accept=no in the .socket unit.)"
                    .into(),
            );
        }
        let sources = Routes::new(sockets, backends);
        let threads = config.threads.get();
        let uses = FdNeeds {
            lookups: by_name,
            command: config.application.is_some(),
            threads: threads - 1,
            metrics: config.metrics.is_some(),
            is_journaled: handover.as_ref().is_some_and(|it| it.is_crash_mode()),
            restored,
        };
        let division = FdPlan::of_this_process(config.connections_max.get(), uses)?;
        let backend_setups = backend_setups(&config, division.lookups);
        let application = match (config.application, config.targets.iter().next()) {
            (Some(application), Some(target)) => {
                if !config.listen.is_empty() {
                    check_command_target(target, sources.listeners())?;
                }
                let descriptors = division.inherited;
                Some(Arc::new(prepare(application, target.clone(), descriptors)?))
            }
            _ => None,
        };
        if !config.listen.is_empty() {
            sources.listeners().iter().try_for_each(|(listener, backend)| {
                check_no_loop(listener, backend_setups[*backend].connector.target())
            })?;
        }
        let plan = Settings {
            backends: backend_setups,
            backend_wait: config.backend_wait,
            application: application.clone(),
            proxy_protocol: config.proxy_protocol,
            connection_idle_time: config.connection_idle_time,
            pipes: Limits {
                max: division.pipes / threads,
                held: (pipe::HELD_MAX / threads).max(1),
            },
            handover: handover.clone(),
            loops: Arc::new(Loops::default()),
        };
        for (listener, backend) in sources.listeners() {
            let target = plan.backends[*backend].connector.target();
            match &config.targets {
                Targets::One(_) => tracing::debug!("Serving {listener}."),
                // What a mistake in a selector would change.
                Targets::Selected(_) => {
                    tracing::info!("Serving {listener}, connections go to {target}.");
                }
            }
        }
        let has_opened = !config.listen.is_empty();
        let keep = |listener: &Rc<Listener>| handover.as_ref()?.keep_listener(listener);
        let listeners = sources.listeners().iter().filter(|_| has_opened);
        let listener_entries = listeners.filter_map(|(listener, _)| keep(listener)).collect();
        Ok(Self {
            restored: 0,
            elsewhere: Arc::default(),
            has_opened,
            listener_entries,
            handover,
            sources,
            descriptors: Rc::new(match config.overflow {
                Overflow::Refuse => FdBudget::new(division.connections),
                Overflow::Wait => {
                    let max = config.connections_max.get() as usize;
                    FdBudget::capped(division.connections, max)
                }
            }),
            limit: ConnectionLimit::new(config.connections_max),
            workers: Rc::new(EventLoops::new(plan, config.threads)),
            application,
            exit_idle_time: config.exit_idle_time,
        })
    }

    /// What it counts.
    fn metrics(&self) -> Metrics {
        let plan = self.workers.plan();
        let listener = |(listener, backend): &(Rc<Listener>, usize)| {
            (listener.to_string(), *backend, Arc::clone(listener.entrance().counts()))
        };
        let backend = |setup: &BackendSetup| {
            (setup.connector.target().to_string(), Arc::clone(setup.connector.counters()))
        };
        Metrics::new(metrics::MetricsSources {
            limit: self.limit.clone(),
            listeners: self.sources.listeners().iter().map(listener).collect(),
            elsewhere: Arc::clone(&self.elsewhere),
            backends: plan.backends.iter().map(backend).collect(),
            loops: Arc::clone(&plan.loops),
            restored: self.restored,
            starts: self.application.as_ref().map(|it| Arc::clone(it.starts())),
        })
    }

    /// Lets clients in.
    fn start(&mut self) -> Tasks {
        if let Routes::Connection(connection) = &mut self.sources
            && let Some((connection, backend)) = connection.take()
        {
            // It has them already.
            match connection.into_accepted(self.descriptors.reserve_unchecked()) {
                Some(mut accepted) => {
                    accepted.slot.admit(self.limit.acquire_unchecked());
                    let handover = self.handover.as_ref();
                    let journal = handover.and_then(|it| it.keep_client(&accepted.socket));
                    self.workers.serve(accepted, backend, journal);
                }
                None => tracing::debug!("Connection closed, the client has left"),
            }
        }
        let mut accepting = JoinSet::new();
        for (listener, backend) in self.sources.listeners() {
            accepting.spawn_local(admit(
                Rc::clone(listener),
                *backend,
                Rc::clone(&self.descriptors),
                self.limit.clone(),
                Rc::clone(&self.workers),
                self.handover.clone(),
            ));
        }
        let mut application = JoinSet::new();
        if let Some(it) = &self.application {
            let backend_wait = Rc::clone(self.workers.backend_wait());
            application.spawn_local(Arc::clone(it).run(backend_wait, self.limit.watch()));
        }
        Tasks { accepting, application }
    }

    /// Until a signal, or idleness, or something that broke.
    async fn serve(
        &self,
        tasks: &mut Tasks,
        signals: &mut Signals,
        report_signal: &mut ReportSignal,
        notifier: &Notifier,
    ) -> Result<StopReason, String> {
        let is_ready = Cell::new(false);
        let mut get_ready = pin!(async {
            // Clients that are queued come first: the loop finds them, and then they are accepted and
            // dialled for. What systemd is told may have to wait.
            yield_now().await;
            yield_now().await;
            let ready = [NotifyState::Ready, NotifyState::Status("Processing requests...")];
            notifier.send(&ready).await;
            is_ready.set(true);
        });
        let told = async {
            get_ready.as_mut().await;
            let carried = || self.workers.carried();
            let application = self.application.as_deref();
            let clean = async {
                match &self.handover {
                    Some(handover) => handover.clean().await,
                    None => std::future::pending().await,
                }
            };
            let listeners = self.sources.listeners().iter();
            let listener_infos: Vec<_> =
                listeners.map(|(listener, _)| &**listener.entrance()).collect();
            let (limit, restored) = (&self.limit, self.restored);
            let status =
                publish_status(notifier, limit, restored, &listener_infos, carried, application);
            tokio::join!(status, notifier.feed_watchdog(), clean).1
        };
        let end = tokio::select! {
            never = report_connections(report_signal, &self.limit, &self.workers) => match never {},
            () = signals.stop() => StopReason::Signal,
            () = self.idle() => StopReason::Idle,
            Some(ended) = tasks.accepting.join_next() => return Err(ended.unwrap_or_else(internal)),
            Some(Err(panic)) = tasks.application.join_next() => return Err(internal(panic)),
            never = told => match never {},
        };
        // A unit whose process ends before it is ready has failed.
        if !is_ready.get() {
            tokio::select! {
                () = get_ready => {}
                () = signals.again() => {}
            }
        }
        Ok(end)
    }

    /// Waits until there has been no connection for the idle time, nobody is queued, and COMMAND is
    /// gone; a client that comes while it is being stopped calls the exit off.
    async fn idle(&self) {
        let mut watch = self.limit.watch();
        if let Routes::Connection(_) = self.sources {
            return watch.wait_empty().await;
        }
        let nobody = |watch: &ConnectionWatch| {
            let mut listeners = self.sources.listeners().iter();
            watch.is_empty() && !listeners.any(|(listener, _)| listener.has_queued())
        };
        loop {
            wait_idle(self.exit_idle_time, &mut watch).await;
            if nobody(&watch) {
                let Some(application) = &self.application else { return };
                application.stop().await;
                if nobody(&watch) {
                    return;
                }
                application.allow_start();
            }
            let _ = timeout(LATE_CLIENT_GRACE, watch.turn()).await;
        }
    }

    /// Lets nobody in any more, gives connections their time, and waits for the end of COMMAND. What
    /// is open then is left to be reset.
    async fn stop(
        self,
        mut tasks: Tasks,
        leaves: bool,
        drain_time: TimeSpan,
        again: impl Future<Output = ()>,
        report_signal: &mut ReportSignal,
        notifier: &Notifier,
    ) {
        // From here on newcomers wait in the kernel, for the next process; where nobody else keeps
        // the socket, they are refused.
        tasks.accepting.shutdown().await;
        if let Some(handover) = &self.handover
            && leaves
        {
            self.leave(handover, notifier).await;
            return self.listener_entries.into_iter().for_each(JournalEntry::leave);
        }
        drop(self.sources);
        let _ = notifier.send_once(&[NotifyState::Stopping]);
        let end = async {
            // An idle exit may have been under way, and somebody may need COMMAND after all.
            if let Some(application) = &self.application
                && !drain_time.is_zero()
            {
                application.allow_start();
            }
            drain(drain_time, &self.limit, notifier).await;
            let _ = notifier.send_once(&[NotifyState::Status("Shutting down...")]);
            if let Some(application) = &self.application
                && !tasks.application.is_empty()
            {
                // It may end its connections in its own way.
                tokio::select! {
                    () = application.stop() => {}
                    Some(_) = tasks.application.join_next() => {}
                }
            }
        };
        // Another signal leaves COMMAND to its guard.
        tokio::select! {
            () = end => {}
            () = again => {}
            never = report_connections(report_signal, &self.limit, &self.workers) => match never {},
        }
        let open = self.limit.load().open;
        if open > 0 {
            tracing::info!("Stopping, resetting open connections: {open}.");
        }
    }
}

/// Has all connections say how they are whenever that is asked, for ever.
async fn report_connections(
    report_signal: &mut ReportSignal,
    limit: &ConnectionLimit,
    workers: &EventLoops,
) -> Infallible {
    loop {
        report_signal.next().await;
        tracing::info!("Open connections: {}.", limit.load().open);
        workers.ask();
    }
}

/// The way to each target; they share the lookups.
fn backend_setups(config: &Config, lookups_max: usize) -> Vec<BackendSetup> {
    let lookups = Arc::new(Semaphore::new(lookups_max));
    let setup = |target: &Target| BackendSetup {
        connector: Connector::new(
            target.clone(),
            config.connect_timeout,
            config.keepalive,
            Arc::clone(&lookups),
            Arc::new(ConnectCounters::default()),
        ),
        probing: SharedProbe::default(),
    };
    config.targets.iter().map(setup).collect()
}

/// COMMAND, before anything is known to need it.
fn prepare(
    application: CommandConfig,
    target: Target,
    descriptors: Option<u64>,
) -> Result<Supervisor, String> {
    set_cloexec_all().map_err(|error| format!("Failed to list /proc/self/fd: {error}."))?;
    let notify = match application.ready {
        ReadyMode::Connect => None,
        ReadyMode::Notify => Some(NotifyPlace::find()?),
    };
    let (command, idle_time) = (application.command, application.stop_idle_time);
    Ok(Supervisor::new(command, target, notify, idle_time, descriptors))
}

/// Lets clients in at one listener, until it breaks. A panic costs the client that it met.
async fn admit(
    listener: Rc<Listener>,
    backend: usize,
    descriptors: Rc<FdBudget>,
    limit: ConnectionLimit,
    workers: Rc<EventLoops>,
    handover: Option<Arc<Handover>>,
) -> String {
    let admit_one = async || {
        let mut accepted = listener.accept(&descriptors).await?;
        match limit.admit() {
            Some(permit) => {
                accepted.slot.admit(permit);
                accepted.listener.counts().admitted.add_one();
                let journal = handover.as_ref().and_then(|it| it.keep_client(&accepted.socket));
                workers.serve(accepted, backend, journal);
            }
            None => {
                accepted.listener.counts().refused.add_one();
                if let Some(suppressed) = REFUSED.pass() {
                    tracing::warn!(
                        client = %accepted.client,
                        %listener,
                        "Hit connection limit, refusing connection.{suppressed}"
                    );
                }
            }
        }
        io::Result::Ok(())
    };
    loop {
        match catch_panic(admit_one()).await {
            Some(Ok(())) => {}
            Some(Err(error)) => {
                return format!("Failed to accept on {listener}: {}.", os_message(&error));
            }
            None => sleep(ACCEPT_PAUSE).await,
        }
    }
}

fn internal(error: JoinError) -> String {
    format!("Internal error: {error}.")
}
