//! How a backend is reached: at once, within `--backend-wait=`, or as soon as COMMAND is ready.

pub mod command;
pub mod wait;
pub mod readiness;
mod attempts;
pub mod connect;
mod connect_error;
mod process_group;

use std::rc::Rc;
use std::sync::Arc;

use tokio::time::timeout_at;

use crate::backend::command::Supervisor;
use crate::backend::command::state::CommandState;
use crate::backend::connect::OnFullBacklog;
use crate::backend::connect_error::ConnectError;
use crate::backend::wait::BackendWait;
use crate::config::target::Target;
use crate::counters::Gauge;
use crate::socket::Socket;

/// The backend of one target, for the clients of one event loop.
#[derive(Debug)]
pub struct Backend {
    pub backend_wait: Rc<BackendWait>,
    pub supervisor: Option<Arc<Supervisor>>,
}

impl Backend {
    pub fn target(&self) -> &Target {
        &self.backend_wait.connector.target
    }

    /// Connects, now or as soon as the backend can be reached. `waiting` counts the clients that
    /// wait. A client that `is_passive` waits only while another client has the backend start.
    ///
    /// # Errors
    /// A message on a permanent error, or on the last error before the wait timed out. `None` for a
    /// passive client, if the backend is not ready.
    pub async fn connect(
        &self,
        waiting: &Gauge,
        is_passive: bool,
    ) -> Result<Socket, Option<String>> {
        let wait = self.backend_wait.wait;
        if wait.is_zero() {
            let connected = self.backend_wait.connector.connect(OnFullBacklog::Wait).await;
            return connected.map_err(|error| Some(error.to_string()));
        }
        let _waiting = waiting.take();
        let connecting = async {
            match is_passive {
                true => self.connect_passively().await,
                false => self.wait_and_connect().await.map_err(Some),
            }
        };
        timeout_at(wait.deadline(), Box::pin(connecting)).await.unwrap_or_else(|_| {
            let error = self.supervisor.as_ref().and_then(|supervisor| supervisor.last_error());
            let error = error.unwrap_or_else(|| self.backend_wait.timeout_error());
            Err(Some(format!("{error}. (--backend-wait={wait} is over.)")))
        })
    }

    async fn connect_passively(&self) -> Result<Socket, Option<String>> {
        let error = |error: Option<ConnectError>| error.map(|error| error.to_string());
        let Some(supervisor) = &self.supervisor else {
            return self.backend_wait.connect_passively().await.map_err(error);
        };
        let mut state = supervisor.watch();
        let is_ready = state.wait_for(|state| *state != CommandState::Starting).await;
        if !is_ready.is_ok_and(|state| *state == CommandState::Ready) {
            return Err(None);
        }
        tokio::select! {
            biased;
            _ = state.changed() => Err(None),
            connected = self.backend_wait.connect_passively() => connected.map_err(error),
        }
    }

    async fn wait_and_connect(&self) -> Result<Socket, String> {
        let connect = async || self.backend_wait.connect().await.map_err(|error| error.to_string());
        let Some(supervisor) = &self.supervisor else {
            return connect().await;
        };
        loop {
            let was_ready = *supervisor.watch().borrow() == CommandState::Ready;
            let mut state = supervisor.ready().await?;
            if !was_ready {
                self.backend_wait.take_turn().await;
            }
            tokio::select! {
                biased;
                // Polled first: a client must not connect to a COMMAND that is being stopped.
                _ = state.changed() => {}
                connected = connect() => return connected,
            }
        }
    }
}
