//! The prober's state, which the clients of all event loops share: whether it runs, what it has
//! found, and a connection on offer. [`BackendWait`](crate::backend::wait::BackendWait) runs it.

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::{AbortHandle, spawn_local};
use tokio::time::sleep;

use crate::runtime::lock;
use crate::socket::address::Address;
use crate::socket::{Family, Socket, has_hung_up};

/// The state of one target's prober.
#[derive(Clone, Debug, Default)]
pub struct SharedProber(Arc<Mutex<ProberState>>);

#[derive(Debug, Default)]
pub struct ProberState {
    pub run: Option<ProberRun>,
    pub task: Option<AbortHandle>,
    /// Why the backend cannot be reached, as far as that is known.
    pub last_error: Option<String>,
    /// The address that has answered, when the prober has ended for that.
    pub answered: Option<Address>,
    /// A connection that a probe made, for the first client that takes it.
    connection: Option<(OwnedFd, Family)>,
    /// The number of connections offered so far.
    offers: u64,
}

/// What clients hold while they wait for the prober. Both are closed when it ends. It never sends,
/// so a failed probe wakes no client.
#[derive(Clone, Debug)]
pub struct ProberRun {
    /// Keeps the prober running.
    pub wanted: watch::Receiver<()>,
    /// Of passive clients, for which the prober does not run.
    pub ended: watch::Receiver<()>,
}

impl SharedProber {
    pub fn state(&self) -> MutexGuard<'_, ProberState> {
        lock(&self.0)
    }

    /// Offers a fresh connection to the first client that takes it, on any event loop. After
    /// [`OFFER`] the connection is reset.
    pub fn offer(&self, socket: Socket) {
        let (family, answered) = (socket.family(), socket.peer_address().ok());
        let connection = socket.release().ok().map(|fd| (fd, family));
        let mut state = self.state();
        state.last_error = None;
        state.answered = answered;
        state.connection = connection;
        state.offers += 1;
        let (offers, this) = (state.offers, self.clone());
        spawn_local(async move {
            sleep(OFFER).await;
            if this.state().offers == offers {
                drop(this.take_connection());
            }
        });
    }

    /// Notes that the backend has answered, and closes the connection that showed it.
    pub fn close_answered(&self, socket: Socket) {
        let mut state = self.state();
        state.last_error = None;
        state.answered = socket.peer_address().ok();
        socket.close();
    }

    /// Takes the connection on offer, unless the backend has closed it meanwhile.
    pub fn take_connection(&self) -> Option<Socket> {
        let (fd, family) = self.state().connection.take()?;
        Socket::register(fd, family).ok().filter(|socket| !has_hung_up(socket))
    }
}

impl ProberState {
    /// Ends the prober, since the backend can be reached by this connection.
    pub fn end(&mut self, connected: &Socket) {
        if let Some(task) = self.task.take() {
            self.last_error = None;
            self.answered = connected.peer_address().ok();
            task.abort();
        }
    }

    /// Returns the run of the prober, unless it has ended, in whatever way.
    pub fn running(&self) -> Option<ProberRun> {
        self.run.clone().filter(|run| run.ended.has_changed().is_ok())
    }
}

/// Waits until the prober has ended.
pub async fn closed(mut run: watch::Receiver<()>) {
    let _ = run.changed().await;
}

/// How long a connection is on offer.
const OFFER: Duration = Duration::from_millis(100);
