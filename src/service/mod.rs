//! The life of the process: start, serve, stop.

pub mod program;
mod shutdown;
mod restore;
mod startup;
mod server;
mod dispatcher;
mod silent;
mod drain;
mod status;
mod signals;

use tokio::signal::unix::SignalKind;

use crate::backend::command::guard_client::{StartGuard, start_guard};
use crate::config::Config;
use crate::listen::activation::PassedFd;
use crate::logging::os_message;
use crate::notify::Notifier;
use crate::runtime::event_loop;
pub use crate::service::signals::Signals;

/// Serves until a signal or the idle exit.
///
/// # Errors
/// One line on why the server did not start, or what broke.
pub fn run(config: Config, passed: Vec<PassedFd>) -> Result<(), String> {
    startup::forbid_new_privileges(&config);
    startup::drop_ambient_capabilities(&config)?;
    let runtime = event_loop()
        .map_err(|error| format!("Failed to start the event loop: {}.", os_message(&error)))?;
    let result = runtime.block_on(async {
        let signals = Signals::catch()?;
        start_and_serve(config, passed, signals, Notifier::from_environment(), start_guard).await
    });
    // Dropping the remaining connections resets them. Lookups that still run are left behind.
    runtime.shutdown_background();
    result
}

/// The life of the process inside its event loop.
///
/// # Errors
/// As [`run`].
pub async fn start_and_serve(
    config: Config,
    passed: Vec<PassedFd>,
    mut signals: Signals,
    notifier: Notifier,
    start_guard: StartGuard,
) -> Result<(), String> {
    let mut report_signal = signals::catch(SignalKind::user_defined1())?;
    let drain_time = config.args.drain_time;

    // systemd and the lookups of --listen= may be slow. A signal ends the wait for them.
    // The exporter removes its socket files when it is dropped, at the end of the process.
    let (mut server, leftovers, _exporter) = tokio::select! {
        started = startup::start(config, passed, &notifier, start_guard) => started?,
        () = signals.stop() => return Ok(()),
    };
    // Last, because this empties the store: a start that fails leaves the connections stored.
    restore::restore(&server, leftovers);
    if !drain_time.is_zero() && !notifier.has_manager() {
        tracing::warn!(
            "Failed to ask systemd to wait for --drain-time={drain_time}: there is no NOTIFY_SOCKET. \
             (Set Type=notify, or a longer TimeoutStopSec=.)"
        );
    }
    let _abort = server.handover.as_ref().and_then(|handover| handover.abort_on_panic());

    let mut tasks = server.start();
    let ended = server.serve(&mut tasks, &mut signals, &mut report_signal, &notifier).await;

    let (signals, report_signal) = (&mut signals, &mut report_signal);
    shutdown::stop(server, tasks, &ended, drain_time, signals, report_signal, &notifier).await;
    ended.map(drop)
}
