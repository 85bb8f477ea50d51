//! The server: accepts until a signal, the idle exit, or a failure of its own.

use std::convert::Infallible;
use std::io;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use prometheus_client::registry::Registry;
use sd_notify::NotifyState;
use tokio::signal::unix::Signal;
use tokio::sync::watch;
use tokio::task::{JoinError, JoinSet, yield_now};
use tokio::time::{sleep, timeout};

use crate::backend::starter::Starter;
use crate::config::timespan::TimeSpan;
use crate::connection::BackendSetup;
use crate::counters::ListenerCounters;
use crate::datagram::relay::{Relay, Route};
use crate::handover::Handover;
use crate::handover::journal::JournalEntry;
use crate::limits::client_limits::ClientLimits;
use crate::limits::descriptors::FdBudget;
use crate::listen::listener::{ACCEPT_PAUSE, Listener};
use crate::listen::passed_connection::PassedConnection;
use crate::logging::os_message;
use crate::metrics::{self, MetricsSources};
use crate::notify::Notifier;
use crate::runtime::catch_panic;
use crate::service::dispatcher::Dispatcher;
use crate::service::signals::Signals;
use crate::service::status::{PROCESSING, publish_status};

/// Everything that lives as long as the process.
pub struct Server {
    /// The listeners, each with the index of its backend.
    pub listeners: Vec<(Rc<Listener>, usize)>,
    /// A connection that was accepted before the start, with the index of its backend, until it is
    /// served.
    pub connection: Option<(PassedConnection, usize)>,
    /// What carries datagrams, if a socket is for them.
    pub relay: Option<Rc<Relay>>,
    pub descriptors: Rc<FdBudget>,
    pub dispatcher: Rc<Dispatcher>,
    pub starter: Option<Starter>,
    pub exit_idle_time: TimeSpan,
    pub handover: Option<Arc<Handover>>,
    /// Connections restored from the previous process.
    pub restored: usize,
    /// Whether the proxy opened the listeners itself. Without `--handover=` they close with the
    /// process.
    pub has_opened: bool,
    /// Journal entries that keep such listeners open after the exit (crash mode only).
    pub listener_entries: Vec<JournalEntry>,
    /// Counters of restored connections whose listener no longer exists.
    pub unconfigured: Arc<ListenerCounters>,
}

impl Server {
    /// Returns the metrics of `--metrics=`.
    pub fn metrics(&self) -> Registry {
        let settings = &self.dispatcher.event_loops.settings;
        let listener = |(listener, backend): &(Rc<Listener>, usize)| {
            (listener.to_string(), *backend, Arc::clone(&listener.info.counts))
        };
        let route = |route: &Route| {
            let Route { listener, backend, .. } = route;
            (listener.to_string(), *backend, Arc::clone(&listener.info.counts))
        };
        let backend = |setup: &BackendSetup| {
            (setup.connector.target.to_string(), Arc::clone(&setup.connector.counters))
        };
        metrics::registry(MetricsSources {
            connections_max: self.dispatcher.limits.limit.max(),
            listeners: self.listeners.iter().map(listener).collect(),
            datagrams: self.relay.iter().flat_map(|relay| &relay.routes).map(route).collect(),
            unconfigured: Arc::clone(&self.unconfigured),
            backends: settings.backends.iter().map(backend).collect(),
            loops: Arc::clone(&settings.loops),
            descriptors_dropped: settings.passed.dropped.clone(),
            restored: self.restored,
            starts: self.starter.as_ref().map(|it| Arc::clone(&it.lifecycle().counters)),
        })
    }

    /// Spawns the accept loops and what starts the backend, and serves a connection that was
    /// accepted before the start.
    pub fn start(&mut self) -> Tasks {
        if let Some((connection, backend)) = self.connection.take() {
            self.serve_passed(connection, backend);
        }
        let mut accepting = JoinSet::new();
        for (listener, backend) in &self.listeners {
            accepting.spawn_local(accept_loop(
                Rc::clone(listener),
                *backend,
                Rc::clone(&self.descriptors),
                Rc::clone(&self.dispatcher),
            ));
        }
        let mut relaying = JoinSet::new();
        if let Some(relay) = &self.relay {
            relaying.spawn_local(carry_datagrams(Rc::clone(relay)));
        }
        let mut supervising = JoinSet::new();
        if let Some(starter) = &self.starter {
            let Dispatcher { event_loops, limits, .. } = &*self.dispatcher;
            let backend_wait = Rc::clone(event_loops.backend_wait());
            supervising.spawn_local(starter.clone().run(backend_wait, limits.clock.clone()));
        }
        Tasks { accepting, relaying, supervising }
    }

    fn serve_passed(&self, connection: PassedConnection, backend: usize) {
        // The connection exists already, so neither limit can refuse it.
        match connection.into_accepted(self.descriptors.reserve_unchecked()) {
            Some(accepted) => {
                let entry = self.dispatcher.journal_client(&accepted);
                self.dispatcher.serve_unchecked(accepted, backend, entry);
            }
            None => tracing::debug!("Connection ended by the client before it was served."),
        }
    }

    /// Serves until a signal or the idle exit.
    ///
    /// # Errors
    /// One line on a listener that broke, or on a panic.
    pub async fn serve(
        &self,
        tasks: &mut Tasks,
        signals: &mut Signals,
        report_signal: &mut Signal,
        notifier: &Notifier,
    ) -> Result<StopReason, String> {
        let ready = watch::Sender::new(false);
        let mut maintain = pin!(async {
            // Clients that are queued already come first. In the first turn the accept loops find
            // them, in the second their connections start.
            yield_now().await;
            yield_now().await;
            let states = [NotifyState::Ready, NotifyState::Status(PROCESSING)];
            notifier.send(&states).await;
            ready.send_replace(true);
            // None of these ends. The second says so by its type.
            tokio::join!(
                self.publish_status(notifier),
                notifier.feed_watchdog(),
                self.compact(),
                self.reset_unused()
            )
            .1
        });
        let reason = tokio::select! {
            never = report_connections(report_signal, &self.dispatcher) => match never {},
            () = signals.stop() => StopReason::Signal,
            () = self.wait_idle(&ready) => StopReason::Idle,
            Some(ended) = tasks.accepting.join_next() => {
                return Err(ended.unwrap_or_else(internal));
            }
            Some(ended) = tasks.relaying.join_next() => {
                return Err(ended.unwrap_or_else(internal));
            }
            Some(Err(panic)) = tasks.supervising.join_next() => return Err(internal(panic)),
            never = &mut maintain => match never {},
        };
        if !*ready.borrow() {
            // From now on new clients wait in the kernel.
            tasks.accepting.shutdown().await;
            tokio::select! {
                () = wait_until_ready_sent(&ready) => {}
                () = signals.second() => return Ok(StopReason::SecondSignal),
                never = &mut maintain => match never {},
            }
        }
        // Without a listener the process ends with its connections.
        if reason == StopReason::Idle && self.has_listeners() {
            tracing::info!("No connection for {}, exiting.", self.exit_idle_time);
        }
        Ok(reason)
    }

    async fn publish_status(&self, notifier: &Notifier) {
        let listeners = self.listeners.iter().map(|(listener, _)| &*listener.info);
        let routes = self.relay.iter().flat_map(|relay| &relay.routes);
        let listeners: Vec<_> = listeners.chain(routes.map(|it| &*it.listener.info)).collect();
        let Dispatcher { limits: ClientLimits { limit, .. }, event_loops, .. } = &*self.dispatcher;
        let relay = self.relay.as_ref();
        let bytes = || event_loops.delivered() + relay.map_or(0, |relay| relay.delivered());
        let lifecycle = self.starter.as_ref().map(|starter| &**starter.lifecycle());
        publish_status(notifier, limit, self.restored, &listeners, bytes, lifecycle).await;
    }

    /// Resets connections that are not in use whenever COMMAND is frozen or stopped.
    async fn reset_unused(&self) -> Infallible {
        loop {
            self.dispatcher.limits.clock.reset_requested().await;
            self.dispatcher.reset_unused();
        }
    }

    async fn compact(&self) {
        if let Some(handover) = &self.handover {
            handover.clean().await;
        }
    }

    /// Whether clients can come, so that the process does not end with its connections.
    fn has_listeners(&self) -> bool {
        !self.listeners.is_empty() || self.relay.is_some()
    }

    /// Whether no connection is in use or queued.
    fn is_unused(&self) -> bool {
        !self.dispatcher.is_in_use()
            && !self.listeners.iter().any(|(listener, _)| listener.has_queued())
            && !self.relay.as_ref().is_some_and(|relay| relay.has_queued())
    }

    /// Waits until there was no connection for `--exit-idle-time=`, none is queued, COMMAND has
    /// stopped, and `READY=1` was sent. A client that arrives meanwhile cancels the exit.
    async fn wait_idle(&self, ready: &watch::Sender<bool>) {
        let clock = &self.dispatcher.limits.clock;
        if !self.has_listeners() {
            clock.unused().await;
            return wait_until_ready_sent(ready).await;
        }
        loop {
            clock.alarm(self.exit_idle_time).await;
            if self.is_unused() {
                if let Some(starter) = &self.starter {
                    starter.stop().await;
                }
                wait_until_ready_sent(ready).await;
                // What comes from now on is for the next process.
                self.relay.iter().for_each(|relay| relay.pause(true));
                if self.is_unused() {
                    return;
                }
                self.relay.iter().for_each(|relay| relay.pause(false));
                if let Some(starter) = &self.starter {
                    starter.lifecycle().allow_start();
                }
            }
            let _ = timeout(LATE_CLIENT_GRACE, clock.used()).await;
        }
    }
}

/// The tasks beside the connections.
pub struct Tasks {
    /// The accept loops. Each ends only when its socket breaks.
    pub accepting: JoinSet<String>,
    /// What carries datagrams. It ends only when it breaks.
    pub relaying: JoinSet<String>,
    /// What starts and stops the backend, which never ends.
    pub supervising: JoinSet<Infallible>,
}

/// Why the server stops without a failure.
#[derive(Debug, PartialEq, Eq)]
pub enum StopReason {
    Signal,
    /// Another one, before `READY=1` was sent.
    SecondSignal,
    Idle,
}

/// Logs a line for each open connection at each SIGUSR1, forever.
pub async fn report_connections(report_signal: &mut Signal, dispatcher: &Dispatcher) -> Infallible {
    loop {
        report_signal.recv().await;
        tracing::info!("Open connections: {}.", dispatcher.limits.limit.counts().open);
        dispatcher.request_reports();
    }
}

/// Accepts at one listener until its socket breaks. A panic closes only the connection that caused
/// it.
async fn accept_loop(
    listener: Rc<Listener>,
    backend: usize,
    descriptors: Rc<FdBudget>,
    dispatcher: Rc<Dispatcher>,
) -> String {
    let accept_next = async || {
        dispatcher.serve(listener.accept(&descriptors, || dispatcher.make_room()).await?, backend);
        io::Result::Ok(())
    };
    loop {
        match catch_panic(accept_next()).await {
            Some(Ok(())) => {}
            Some(Err(error)) => {
                return format!("Failed to accept on {listener}: {}.", os_message(&error));
            }
            None => sleep(ACCEPT_PAUSE).await,
        }
    }
}

/// Carries datagrams until the relay breaks.
async fn carry_datagrams(relay: Rc<Relay>) -> String {
    let error = tokio::select! {
        never = Rc::clone(&relay).end_idle() => match never {},
        never = Rc::clone(&relay).follow_backend() => match never {},
        Err(error) = relay.run() => error,
    };
    format!("Failed to wait for datagrams: {}.", os_message(&error))
}

/// Waits until `READY=1` was sent. For systemd a Type=notify unit that ends before has failed.
async fn wait_until_ready_sent(ready: &watch::Sender<bool>) {
    let _ = ready.subscribe().wait_for(|ready| *ready).await;
}

fn internal(error: JoinError) -> String {
    format!("Internal error: {error}.")
}

/// How long the accept loops have for a client that is queued when the idle time ends.
const LATE_CLIENT_GRACE: Duration = Duration::from_secs(1);
