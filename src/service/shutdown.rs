//! The end of the process: connections are handed over, drained, or reset, and COMMAND stops.

use std::convert::Infallible;
use std::future::pending;
use std::os::fd::AsFd;

use sd_notify::NotifyState;
use tokio::signal::unix::Signal;

use crate::backend::starter::Starter;
use crate::config::timespan::TimeSpan;
use crate::handover::Handover;
use crate::handover::journal::JournalEntry;
use crate::listen::stored::SocketFile;
use crate::logging::message_id;
use crate::notify::Notifier;
use crate::service::drain::drain;
use crate::service::server::{Server, StopReason, Tasks, report_connections};
use crate::service::signals::Signals;
use crate::service::status::{SHUTTING_DOWN, handed_over};

/// Stops a server that has served until `ended`. Connections that are open at the end are reset.
pub async fn stop(
    server: Server,
    mut tasks: Tasks,
    ended: &Result<StopReason, String>,
    drain_time: TimeSpan,
    signals: &mut Signals,
    report_signal: &mut Signal,
    notifier: &Notifier,
) {
    // From now on new clients wait in the kernel for the next process. If no other process holds
    // the socket, the kernel refuses them.
    tasks.accepting.shutdown().await;
    // After the idle exit there is no connection to hand over, but after a failure there may be.
    if server.handover.is_some() && *ended != Ok(StopReason::Idle) {
        tasks.relaying.shutdown().await;
        return hand_over(server, signals, notifier).await;
    }
    drop(server.listeners);
    let is_signal = *ended == Ok(StopReason::Signal);
    let drain_time = if is_signal { drain_time } else { TimeSpan::ZERO };
    match &server.relay {
        // Clients without a session are not served any more. Others send to the same socket.
        Some(relay) if !drain_time.is_zero() => relay.begin_drain(),
        // From now on datagrams wait in the kernel, too.
        _ => tasks.relaying.shutdown().await,
    }
    let starter = server.starter.as_ref();
    let drain_and_stop = async {
        // The idle exit may have stopped COMMAND, and a connection that is drained may need it.
        if let Some(starter) = starter.filter(|_| !drain_time.is_zero()) {
            starter.lifecycle().allow_start();
        }
        drain(drain_time, &server.dispatcher.limits, notifier).await;
        let _ = notifier.send_once(&[NotifyState::Status(SHUTTING_DOWN)]);
        if let Some(starter) = starter.filter(|_| !tasks.supervising.is_empty()) {
            // COMMAND may end its connections in its own way.
            tokio::select! {
                () = stop_backend(starter, notifier) => {}
                Some(_) = tasks.supervising.join_next() => {}
            }
        }
    };
    let second_signal = async {
        match ended {
            Ok(StopReason::SecondSignal) => return,
            Ok(StopReason::Signal) => {}
            _ => signals.stop().await,
        }
        signals.second().await;
    };
    // A second signal ends the process, and the guard stops COMMAND.
    tokio::select! {
        biased;
        // First, because a drain tells systemd more. After a signal that does not come from systemd
        // this ends its watchdog, which a drain does not feed.
        never = say(notifier, NotifyState::Stopping) => match never {},
        () = second_signal => {}
        () = drain_and_stop => {}
        never = report_connections(report_signal, &server.dispatcher) => match never {},
    }
    let open = server.dispatcher.limits.limit.counts().open;
    if open > 0 {
        tracing::info!("Stopping, resetting open connections: {open}.");
    }
}

/// Leaves the connections and the listeners to the next process.
async fn hand_over(server: Server, signals: &mut Signals, notifier: &Notifier) {
    if let Some(handover) = &server.handover {
        detach_all(&server, handover, notifier).await;
    }
    if let Some(starter) = &server.starter {
        tokio::select! {
            () = stop_backend(starter, notifier) => {}
            () = signals.second() => {}
        }
    }
    server.listener_entries.into_iter().for_each(JournalEntry::detach);
}

/// Stops what the proxy has started, and asks systemd to wait for it.
async fn stop_backend(starter: &Starter, notifier: &Notifier) {
    let Some(time) = starter.stop_time() else { return starter.stop().await };
    tokio::select! {
        biased;
        never = say(notifier, NotifyState::ExtendTimeoutUsec(time.as_micros() as u32)) => match never {},
        () = starter.stop() => {}
    }
}

/// Tries to say this to systemd until it is sent, and then does nothing more.
async fn say(notifier: &Notifier, state: NotifyState<'_>) -> Infallible {
    notifier.send(&[state]).await;
    pending().await
}

/// Stores all open connections for the next process.
async fn detach_all(server: &Server, handover: &Handover, notifier: &Notifier) {
    // In crash mode the journal has the listeners already.
    let mut stored_listeners = server.listener_entries.len();
    let mut keep = |socket, file: Option<&SocketFile>| {
        let is_stored =
            handover.is_crash_mode() || handover.store_listener(socket, file.map(|file| file.id));
        stored_listeners += usize::from(is_stored && !handover.is_crash_mode());
        if let Some(file) = file.filter(|_| is_stored) {
            file.unlinks_on_drop.set(false);
        }
    };
    if server.has_opened {
        let streams = server.listeners.iter().map(|(it, _)| (it.as_fd(), it.file()));
        streams.for_each(|(socket, file)| keep(socket, file));
        let datagrams = server.relay.iter().flat_map(|relay| &relay.routes);
        datagrams.for_each(|it| keep(it.listener.as_fd(), it.listener.file()));
    }
    server.dispatcher.detach_all(handover).await;
    let [stored, lost] = handover.stored_and_lost();
    let stored = stored.saturating_sub(stored_listeners);
    let status = handed_over(stored);
    let _ = notifier.send_once(&[NotifyState::Stopping, NotifyState::Status(&status)]);
    if stored > 0 {
        tracing::info!(
            message_id = message_id::HANDOVER_STORED,
            "Stopping, left open connections with systemd: {stored}. (systemd closes them unless it \
             restarts the service.)"
        );
    }
    if lost > 0 {
        tracing::warn!(
            message_id = message_id::HANDOVER_LOST,
            "Failed to store open connections, resetting them: {lost}. (If the descriptor store is full, \
             raise LimitNOFILE= or net.core.wmem_max.)"
        );
    }
}
