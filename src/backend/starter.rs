//! What starts and stops a backend: the supervisor of COMMAND, or commands that return.

use std::convert::Infallible;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use crate::backend::command::Supervisor;
use crate::backend::lifecycle::Lifecycle;
use crate::backend::start_command::StartCommand;
use crate::backend::wait::BackendWait;
use crate::limits::idle_clock::IdleClock;

#[derive(Clone, Debug)]
pub enum Starter {
    Command(Arc<Supervisor>),
    StartCommand(Arc<StartCommand>),
}

impl Starter {
    pub fn lifecycle(&self) -> &Arc<Lifecycle> {
        match self {
            Self::Command(supervisor) => &supervisor.lifecycle,
            Self::StartCommand(commands) => &commands.lifecycle,
        }
    }

    /// Starts and stops the backend as clients need it, forever.
    pub async fn run(self, wait: Rc<BackendWait>, clock: IdleClock) -> Infallible {
        match self {
            Self::Command(supervisor) => supervisor.run(wait, clock).await,
            Self::StartCommand(commands) => commands.run(wait, clock).await,
        }
    }

    /// Returns how long [`Starter::stop`] may take, if that may be longer than systemd waits.
    pub fn stop_time(&self) -> Option<Duration> {
        match self {
            Self::Command(_) => None,
            Self::StartCommand(commands) => commands.time_left(),
        }
    }

    /// Stops what does not outlive the proxy: COMMAND, or a running start command. Waits for a
    /// running stop command. Nothing is started again before [`Lifecycle::allow_start`].
    pub async fn stop(&self) {
        match self {
            Self::Command(supervisor) => supervisor.stop().await,
            Self::StartCommand(commands) => commands.stop().await,
        }
    }
}
