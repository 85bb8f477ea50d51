//! How a backend is reached: at once, within `--backend-wait=`, or as soon as COMMAND is ready.

pub mod command;
pub mod lifecycle;
pub mod state;
pub mod wait;
pub mod prober;
pub mod readiness;
mod attempts;
pub mod connect;
pub mod connect_error;
pub mod source;
pub mod source_trial;
pub mod start_command;
pub mod starter;
mod process_group;

use std::rc::Rc;
use std::sync::Arc;

use tokio::time::timeout_at;

use crate::backend::connect::OnFullBacklog;
use crate::backend::connect_error::ConnectError;
use crate::backend::lifecycle::Lifecycle;
use crate::backend::source::SourceAddress;
use crate::backend::state::BackendState;
use crate::backend::wait::BackendWait;
use crate::config::target::Target;
use crate::counters::Gauge;
use crate::socket::Socket;
use crate::socket::address::Address;

/// The backend of one target, for the clients of one event loop.
#[derive(Debug)]
pub struct Backend {
    pub backend_wait: Rc<BackendWait>,
    /// Of clients with an IP address that the backend sees, IPv4 first. That one family can reach
    /// the backend says nothing about the other.
    pub by_family: Option<[Rc<BackendWait>; 2]>,
    /// `Some` if the proxy starts the backend.
    pub lifecycle: Option<Arc<Lifecycle>>,
}

impl Backend {
    pub fn target(&self) -> &Target {
        &self.backend_wait.connector.target
    }

    /// Connects for a client, now or as soon as the backend can be reached. `waiting` counts the
    /// clients that wait. A client that `is_passive` waits only while the backend starts for
    /// another client.
    ///
    /// # Errors
    /// A message on a permanent error, or on the last error before the wait timed out. `None` for a
    /// passive client, if the backend is not ready.
    pub async fn connect(
        &self,
        waiting: &Gauge,
        client: &Address,
        is_passive: bool,
    ) -> Result<Socket, Option<String>> {
        let from = self.backend_wait.connector.source_of(client);
        let client = self.client(from.as_ref());
        let BackendWait { connector, wait, .. } = &**client.backend_wait;
        let message = |error: ConnectError| Some(error.to_string());
        // First: a client that is refused starts nothing.
        connector.check_family().map_err(message)?;
        if wait.is_zero() {
            return connector.connect(client.from, OnFullBacklog::Wait).await.map_err(message);
        }
        let _waiting = waiting.take();
        let connecting = async {
            match is_passive {
                true => self.connect_passively(client).await,
                false => self.wait_and_connect(client).await.map_err(Some),
            }
        };
        timeout_at(wait.deadline(), Box::pin(connecting)).await.unwrap_or_else(|_| {
            let error =
                self.lifecycle.as_ref().and_then(|lifecycle| lifecycle.wait_reason_unless_ready());
            let error = error.unwrap_or_else(|| client.backend_wait.record_timeout());
            Err(Some(format!("{error}. (--backend-wait={wait} is over.)")))
        })
    }

    /// Returns how a client reaches the backend.
    fn client<'a>(&'a self, from: Option<&'a SourceAddress>) -> Client<'a> {
        let any = &self.backend_wait;
        let backend_wait = SourceAddress::choose(from, self.by_family.as_ref(), any);
        Client { backend_wait, from }
    }

    async fn connect_passively(&self, client: Client<'_>) -> Result<Socket, Option<String>> {
        let error = |error: Option<ConnectError>| error.map(|error| error.to_string());
        let Client { backend_wait, from } = client;
        let Some(lifecycle) = &self.lifecycle else {
            return backend_wait.connect_passively(from).await.map_err(error);
        };
        while let Some(mut state) = lifecycle.started().await {
            tokio::select! {
                biased;
                _ = state.changed() => {}
                connected = backend_wait.connect_passively(from) => {
                    return connected.map_err(error);
                }
            }
        }
        Err(None)
    }

    async fn wait_and_connect(&self, client: Client<'_>) -> Result<Socket, String> {
        let message = |error: ConnectError| error.to_string();
        let Client { backend_wait, from } = client;
        let Some(lifecycle) = &self.lifecycle else {
            return backend_wait.connect(from).await.map_err(message);
        };
        loop {
            let was_ready = *lifecycle.watch().borrow() == BackendState::Ready;
            let mut state = lifecycle.ready().await?;
            if !was_ready {
                backend_wait.take_turn().await;
            }
            tokio::select! {
                biased;
                // Polled first: a client must not connect to a COMMAND that is being stopped.
                _ = state.changed() => continue,
                connected = client.connect_started(lifecycle) => {
                    if let Some(socket) = connected.map_err(message)? {
                        return Ok(socket);
                    }
                }
            }
            // The starter looks at the backend, and changes the state.
            lifecycle.report_lost();
            let _ = state.changed().await;
        }
    }
}

/// How a client reaches the backend.
#[derive(Clone, Copy)]
struct Client<'a> {
    backend_wait: &'a Rc<BackendWait>,
    /// The address to connect from, unless it is the proxy's own.
    from: Option<&'a SourceAddress>,
}

impl Client<'_> {
    /// Connects to a backend that the proxy has started. Returns `None` if it is gone, though not
    /// for COMMAND: its end is a change of the state.
    async fn connect_started(self, lifecycle: &Lifecycle) -> Result<Option<Socket>, ConnectError> {
        match lifecycle.is_child {
            true => self.backend_wait.connect(self.from).await.map(Some),
            false => self.backend_wait.connect_if_up(self.from).await,
        }
    }
}
