//! The end of the process: connections are handed over, drained, or reset, and COMMAND is stopped.

use std::time::Duration;

use sd_notify::NotifyState;

use crate::config::timespan::TimeSpan;
use crate::handover::journal::JournalEntry;
use crate::notify::Notifier;
use crate::service::drain::drain;
use crate::service::server::{Server, StopReason, Tasks, report_connections};
use crate::service::signals::{ReportSignal, Signals};
use crate::service::takeover;

/// Stops the server, which has served until `ended`. What is open at the end is reset.
pub async fn stop(
    server: Server,
    mut tasks: Tasks,
    ended: &Result<StopReason, String>,
    drain_time: TimeSpan,
    signals: &mut Signals,
    report_signal: &mut ReportSignal,
    notifier: &Notifier,
) {
    // New clients wait in the kernel for the next process. Where nothing else keeps the socket open, the
    // kernel refuses them.
    tasks.accepting.shutdown().await;
    // After a failure there are connections to hand over, too.
    if let Some(handover) = &server.handover
        && *ended != Ok(StopReason::Idle)
    {
        takeover::detach_all(&server, handover, notifier).await;
        return server.listener_entries.into_iter().for_each(JournalEntry::detach);
    }
    drop(server.routes);
    let _ = notifier.send_once(&[NotifyState::Stopping]);
    let is_signal = *ended == Ok(StopReason::Signal);
    let drain_time = if is_signal { drain_time } else { TimeSpan::new(Duration::ZERO) };
    let end = async {
        // The idle exit may have stopped COMMAND, and a connection that is drained may need it.
        if let Some(supervisor) = &server.supervisor
            && !drain_time.is_zero()
        {
            supervisor.allow_start();
        }
        drain(drain_time, &server.limit, notifier).await;
        let _ = notifier.send_once(&[NotifyState::Status("Shutting down...")]);
        if let Some(supervisor) = &server.supervisor
            && !tasks.supervising.is_empty()
        {
            // COMMAND may end its connections in its own way.
            tokio::select! {
                () = supervisor.stop() => {}
                Some(_) = tasks.supervising.join_next() => {}
            }
        }
    };
    let second_signal = async {
        if !is_signal {
            signals.stop().await;
        }
        signals.again().await;
    };
    // A second signal leaves COMMAND to its guard.
    tokio::select! {
        () = end => {}
        () = second_signal => {}
        never = report_connections(report_signal, &server.limit, &server.event_loops) => match never {},
    }
    let open = server.limit.counts().open;
    if open > 0 {
        tracing::info!("Stopping, resetting open connections: {open}.");
    }
}
