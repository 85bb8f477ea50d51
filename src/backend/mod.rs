//! The way to the backend: at once, or held until it is up, or until COMMAND has started it.

pub mod command;
pub mod wait;
pub mod connect;

use std::rc::Rc;
use std::sync::Arc;

use tokio::time::timeout_at;

use crate::backend::command::Supervisor;
use crate::backend::command::state::CommandState;
use crate::backend::connect::Connector;
use crate::backend::wait::BackendWait;
use crate::config::target::Target;
use crate::config::timespan::TimeSpan;
use crate::counters::Gauge;
use crate::socket::Socket;

/// What all clients are connected to.
#[derive(Debug)]
pub struct Backend {
    backend_wait: Rc<BackendWait>,
    wait: TimeSpan,
    supervisor: Option<Arc<Supervisor>>,
}

impl Backend {
    /// `wait` is how long a client is held; with zero it is not, and there is no supervisor.
    pub fn new(
        backend_wait: Rc<BackendWait>,
        wait: TimeSpan,
        supervisor: Option<Arc<Supervisor>>,
    ) -> Self {
        Self { backend_wait, wait, supervisor }
    }

    /// Where it is, for messages.
    pub fn target(&self) -> &Target {
        self.connector().target()
    }

    /// Where its clients are held.
    pub fn backend_wait(&self) -> &Rc<BackendWait> {
        &self.backend_wait
    }

    fn connector(&self) -> &Connector {
        &self.backend_wait.connector
    }

    /// Whether clients are held at all.
    fn waits(&self) -> bool {
        !self.wait.is_zero()
    }

    /// Connects, now or as soon as the backend is up; who has to wait for that is counted as `waiting`.
    ///
    /// # Errors
    /// In words, what stood in the way: something that time can't mend, or the last obstacle when
    /// the time is over.
    pub async fn connect(&self, waiting: &Gauge) -> Result<Socket, String> {
        if !self.waits() {
            return self.connector().dial().await.map_err(|error| error.to_string());
        }
        let _waiting = waiting.take();
        timeout_at(self.wait.deadline(), Box::pin(self.waiting())).await.unwrap_or_else(|_| {
            let supervisor = self.supervisor.as_ref();
            let last_error = supervisor.and_then(|supervisor| supervisor.last_error());
            let last_error = last_error.unwrap_or_else(|| self.backend_wait.timeout_error());
            Err(format!("{last_error}, for {}", self.wait))
        })
    }

    async fn waiting(&self) -> Result<Socket, String> {
        let connect = async || self.backend_wait.connect().await.map_err(|error| error.to_string());
        let Some(supervisor) = &self.supervisor else {
            return connect().await;
        };
        loop {
            let is_held = *supervisor.watch().borrow() != CommandState::Ready;
            let mut run = supervisor.ready().await?;
            if is_held {
                self.backend_wait.take_turn().await;
            }
            tokio::select! {
                biased;
                // First: nobody is handed to one that is being stopped.
                () = run.ended() => {}
                connected = connect() => return connected,
            }
        }
    }
}
