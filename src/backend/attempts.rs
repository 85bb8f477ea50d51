//! Attempts to connect to a backend that cannot be reached yet, until one succeeds.
//!
//! One attempt follows another: a lookup, then each address in turn, each for as long as
//! `--connect-timeout=` lets it. A dead address of a name would keep an attempt from the others for
//! that long. So a few addresses of a name are *watched* as well: each is tried again and again on
//! its own. All targets share the places for that, whose descriptors are set aside. An address
//! without a place just takes its turn.

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
        if let Err(socket) = watched.beside(sleep(backoff.next())).await {
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
        let attempt = match self.beside(connector.addresses()).await {
            Ok(Ok(addresses)) => {
                self.follow(&addresses).await;
                self.beside(connector.try_each(&addresses, OnFullBacklog::Fail)).await
            }
            Ok(Err(error)) => Ok(Err(error)),
            Err(socket) => Err(socket),
        };
        let connected = attempt.unwrap_or_else(Ok);
        connector.count(start, &connected);
        connected
    }

    /// Watches these addresses from now on, if there are several.
    async fn follow(&mut self, addresses: &[Address]) {
        if addresses == self.addresses {
            return;
        }
        self.addresses = addresses.to_vec();
        self.running.shutdown().await;
        if addresses.len() == 1 {
            return;
        }
        for address in addresses.iter().take(WATCHED_MAX) {
            let Ok(place) = Arc::clone(&self.connector.watch_places).try_acquire_owned() else {
                break;
            };
            let (connector, address) = (self.connector.clone(), address.clone());
            self.running.spawn_local(async move {
                let (_place, mut backoff) = (place, PROBE_PAUSES);
                loop {
                    match connector.try_address(&address, OnFullBacklog::Fail).await {
                        Ok(socket) => return socket,
                        Err(_) => sleep(backoff.next()).await,
                    }
                }
            });
        }
    }

    /// Waits for `other`, or for a connection to a watched address, which is the error.
    async fn beside<T>(&mut self, other: impl Future<Output = T>) -> Result<T, Socket> {
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
