//! Attempts to connect to a backend that cannot be reached yet, until one succeeds.
//!
//! An attempt looks the target up and then tries each address in turn, for at most
//! `--connect-timeout=`. A dead address delays those behind it. So a few addresses of a name are
//! also *watched*: a task of its own tries each again and again. Each needs a permit, which all
//! targets share and for which a descriptor is reserved. An address without one takes its turn
//! only. All come from the proxy's own address, also with `--source=client`.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};

use crate::backend::connect::{Connector, OnFullBacklog};
use crate::backend::connect_error::ConnectError;
use crate::runtime::backoff::Backoff;
use crate::socket::Socket;
use crate::socket::address::Address;

/// Connects as soon as the backend can be reached. Passes each error that means "not yet" to
/// `failed`.
///
/// # Errors
/// A permanent error.
pub async fn connect_when_up(
    connector: &Connector,
    failed: impl Fn(&ConnectError),
) -> Result<Socket, ConnectError> {
    let (mut backoff, mut watched) = (PROBE_PAUSES, Watched::new(connector));
    loop {
        match watched.attempt().await {
            Err(error) if error.is_transient() => failed(&error),
            connected => return connected,
        }
        if let Err(socket) = watched.or_watched(sleep(backoff.next())).await {
            return Ok(socket);
        }
    }
}

/// Makes one attempt.
pub async fn connect_once(connector: &Connector) -> Result<Socket, ConnectError> {
    Watched::new(connector).attempt().await
}

/// Addresses that are tried on their own. Dropping this ends it.
struct Watched<'a> {
    connector: &'a Connector,
    addresses: Vec<Address>,
    running: JoinSet<Socket>,
}

impl<'a> Watched<'a> {
    fn new(connector: &'a Connector) -> Self {
        Self { connector, addresses: Vec::new(), running: JoinSet::new() }
    }

    /// Tries each address in turn, beside those that are watched.
    async fn attempt(&mut self) -> Result<Socket, ConnectError> {
        let (start, connector) = (Instant::now(), self.connector);
        let attempt = match self.or_watched(connector.addresses()).await {
            Ok(Ok(addresses)) => {
                self.watch(&addresses).await;
                self.or_watched(connector.try_each(&addresses, None, OnFullBacklog::Fail)).await
            }
            Ok(Err(error)) => Ok(Err(error)),
            Err(socket) => Err(socket),
        };
        let connected = attempt.unwrap_or_else(Ok);
        connector.count(start, &connected);
        connected
    }

    /// Watches these addresses from now on, if there are several.
    async fn watch(&mut self, addresses: &[Address]) {
        if addresses == self.addresses {
            return;
        }
        self.addresses = addresses.to_vec();
        self.running.shutdown().await;
        if addresses.len() == 1 {
            return;
        }
        for address in addresses.iter().take(WATCHED_MAX) {
            let Ok(permit) = Arc::clone(&self.connector.permits.watched).try_acquire_owned() else {
                break;
            };
            let (connector, address) = (self.connector.clone(), address.clone());
            self.running.spawn_local(async move {
                let (_permit, mut backoff) = (permit, PROBE_PAUSES);
                loop {
                    match connector.try_address(&address, None, OnFullBacklog::Fail).await {
                        Ok(socket) => return socket,
                        Err(_) => sleep(backoff.next()).await,
                    }
                }
            });
        }
    }

    /// Waits for `other`. A connection to a watched address ends the wait, as its error.
    async fn or_watched<T>(&mut self, other: impl Future<Output = T>) -> Result<T, Socket> {
        tokio::select! {
            done = other => Ok(done),
            Some(Ok(socket)) = self.running.join_next() => Err(socket),
        }
    }
}

/// The pauses between attempts. They delay the discovery of a backend that refuses at once while it
/// is down.
const PROBE_PAUSES: Backoff = Backoff::new(Duration::from_millis(5), Duration::from_millis(100));

/// Addresses of a name that are watched.
const WATCHED_MAX: usize = 3;
