//! The life of the process: sockets, READY, serve, signals, idle exit, stop.

#![forbid(unsafe_code)]

use std::io;
use std::pin::pin;
use std::rc::Rc;
use std::time::Duration;

use sd_notify::NotifyState;
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::activation::Inherited;
use crate::admission::Admission;
use crate::cli::Config;
use crate::connection::{Client, Route, serve};
use crate::descriptors::{Descriptors, Division};
use crate::dial::Dialer;
use crate::flow::Shared;
use crate::hold::Backend;
use crate::idle::idle_for;
use crate::listen::Listener;
use crate::logging::{RateLimit, in_words};
use crate::notify::Notifier;
use crate::open::{ListenAddress, open};
use crate::target::Target;

/// How long a client that is queued at the moment of the idle exit has to be accepted.
const LAST_CLIENT: Duration = Duration::from_secs(1);

static REFUSED: RateLimit = RateLimit::new(5, Duration::from_secs(10));

/// Serves until a signal or the idle time ends it.
///
/// # Errors
/// One line on what kept it from starting, or on what broke.
pub fn run(config: Config, inherited: Vec<Inherited>) -> Result<(), String> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build_local(Default::default())
        .map_err(|error| format!("Failed to start the event loop: {error}."))?;
    let result = runtime.block_on(live(config, inherited));
    // Drops what is left, which resets it, and leaves behind the lookups that still run.
    runtime.shutdown_background();
    result
}

async fn live(config: Config, inherited: Vec<Inherited>) -> Result<(), String> {
    let failed = |error: io::Error| format!("Failed to wait for signals: {}.", in_words(&error));
    let mut terminate = signal(SignalKind::terminate()).map_err(failed)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(failed)?;
    let mut hangup = signal(SignalKind::hangup()).map_err(failed)?;
    let mut stop = pin!(async {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
            _ = hangup.recv() => {}
        }
    });
    let notifier = Notifier::from_environment();

    // A name to listen on may take its time; a signal must not.
    let listeners = tokio::select! {
        listeners = listeners(&config.listen, inherited) => listeners?,
        () = &mut stop => return Ok(()),
    };
    let connections_max = config.connections_max.get();
    let by_name = matches!(config.target, Target::Name(_));
    let division = Division::of_this_process(connections_max, by_name)?;
    let admission = Admission::new(config.connections_max);
    let shared = Rc::new(Shared::new(division.pipes));
    let dialer = Dialer::new(config.target, config.connect_timeout, division.lookups);
    let route = Rc::new(Route {
        backend: Rc::new(Backend::new(dialer, config.backend_wait)),
        proxy_protocol: config.proxy_protocol,
        shared: Rc::clone(&shared),
    });

    for listener in &listeners {
        tracing::debug!("Serving {listener}.");
    }
    let descriptors = Rc::new(Descriptors::new(division.connections));
    let mut entrances = JoinSet::new();
    for listener in &listeners {
        entrances.spawn_local(admit(
            Rc::clone(listener),
            Rc::clone(&descriptors),
            admission.clone(),
            Rc::clone(&route),
        ));
    }

    let serving = async {
        let ready = [NotifyState::Ready, NotifyState::Status("Processing requests...")];
        notifier.send(&ready).await;
        notifier.publish_status(admission.watch(), connections_max, &shared).await;
    };
    let idle = async {
        let mut load = admission.watch();
        loop {
            idle_for(config.exit_idle_time, &mut load).await;
            let queued = listeners.iter().any(|listener| listener.has_queued());
            if !queued && load.borrow().open == 0 {
                break;
            }
            let _ = timeout(LAST_CLIENT, load.changed()).await;
        }
    };
    let result = tokio::select! {
        () = stop => Ok(()),
        () = idle => Ok(()),
        Some(ended) = entrances.join_next() => Err(why(ended)),
        () = async { tokio::join!(serving, notifier.feed_watchdog()); } => Ok(()),
    };
    // From here on newcomers wait in the kernel, for the next process.
    entrances.shutdown().await;
    let open = admission.watch().borrow().open;
    if open > 0 {
        tracing::info!("Stopping, resetting open connections: {open}.");
    }
    let stopping = [NotifyState::Stopping, NotifyState::Status("Shutting down...")];
    notifier.send(&stopping).await;
    result
}

/// The sockets to serve: passed ones or opened ones.
async fn listeners(
    addresses: &[ListenAddress],
    inherited: Vec<Inherited>,
) -> Result<Vec<Rc<Listener>>, String> {
    let mut listeners = Vec::new();
    match (addresses.is_empty(), inherited.is_empty()) {
        (true, true) => {
            return Err("Didn't get any sockets passed in. (Start it from a .socket unit, or \
                        open one with --listen=ADDRESS.)"
                .into());
        }
        (false, false) => {
            return Err(
                "Got sockets passed in and --listen= as well; one of them has to go.".into()
            );
        }
        (true, false) => {
            for inherited in inherited {
                listeners.push(Rc::new(Listener::adopt(inherited)?));
            }
        }
        (false, true) => {
            for address in addresses {
                for listener in open(address).await? {
                    tracing::info!("Listening on {listener}.");
                    listeners.push(Rc::new(listener));
                }
            }
        }
    }
    Ok(listeners)
}

/// Lets clients in at one listener, until it breaks.
async fn admit(
    listener: Rc<Listener>,
    descriptors: Rc<Descriptors>,
    admission: Admission,
    route: Rc<Route>,
) -> String {
    loop {
        let (socket, address, reserved) = match listener.accept(&descriptors).await {
            Ok(accepted) => accepted,
            Err(error) => return format!("Failed to accept on {listener}: {}.", in_words(&error)),
        };
        let Some(permit) = admission.admit() else {
            if let Some(suppressed) = REFUSED.pass() {
                tracing::warn!(
                    client = %address,
                    listener = %listener,
                    "Hit connection limit, refusing connection.{suppressed}"
                );
            }
            socket.close();
            continue;
        };
        let listener = Rc::clone(&listener);
        let client = Client { socket, address, listener, permit, reserved };
        tokio::task::spawn_local(serve(client, Rc::clone(&route)));
    }
}

fn why(ended: Result<String, tokio::task::JoinError>) -> String {
    ended.unwrap_or_else(|error| format!("Internal error: {error}."))
}
