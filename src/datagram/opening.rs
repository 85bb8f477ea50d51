//! How a session that holds datagrams gets a backend.
//!
//! connect(2) on UDP does not tell whether a process listens. A datagram to a port without a socket
//! causes an ICMP error; on this machine the error comes at once. So a session that waits for its
//! backend sends the first datagram that it holds: the *probe*. The backend is up if it answers, or
//! if no error has come for [`NOT_REFUSED`]. Then the other datagrams follow. If several sessions
//! wait, one sends the probe, and the others use its result.

use std::io;
use std::rc::Rc;
use std::time::Duration;

use rustix::event::epoll;
use rustix::io::Errno;
use tokio::io::Interest;
use tokio::task::spawn_local;
use tokio::time::{Instant, sleep, timeout, timeout_at};

use crate::backend::connect_error::ConnectError;
use crate::backend::lifecycle::Lifecycle;
use crate::backend::source::SourceAddress;
use crate::backend::state::BackendState;
use crate::counters::DropReason;
use crate::datagram::backend::{DatagramBackend, FailedProbe, is_refusal};
use crate::datagram::relay::{Relay, RelayState, Token};
use crate::datagram::session::{BackendSocket, ProbedSocket, SessionBackend, WaitingTask};
use crate::datagram::table::SessionId;
use crate::datagram::to_backends::outgoing;
use crate::logging::{RateLimit, message_id, rate_limited};
use crate::runtime::backoff::Backoff;
use crate::socket::address::Address;

impl Relay {
    /// Starts to look for the backend of a session.
    pub fn look_for_backend(self: &Rc<Self>, state: &mut RelayState, id: SessionId) {
        let Some(session) = state.table.get_mut(id) else { return };
        let (route, client) = (&self.routes[session.listener], session.client());
        let backend = &self.backends[route.backend];
        if self.limits.is_passive(&client) && !backend.is_up() {
            let dropped = state.held[session.listener].clear(id);
            route.tally(0).drop(DropReason::Passive, dropped);
            return self.end(state, id, "its client is passive, and the backend is not ready");
        }
        if session.slot.in_use.is_none() {
            // The client needs the backend until the backend has what the session holds.
            session.slot.in_use = self.limits.begin_use(&client);
        }
        let _waiting = route.listener.info.counts.waiting.take();
        let task = spawn_local(Rc::clone(self).find_backend(id, route.backend));
        let task = task.abort_handle();
        session.backend = SessionBackend::Waiting { _task: WaitingTask { task, _waiting } };
    }

    /// Opens the backend's socket of a session, or ends the session.
    async fn find_backend(self: Rc<Self>, id: SessionId, index: usize) {
        let backend = &self.backends[index];
        let found = match backend.wait.is_zero() {
            true => {
                let connected = self.connect(id, backend).await;
                connected.map_err(|error| self.holds(id).then(|| error.to_string()))
            }
            false => {
                let waited = timeout_at(backend.wait.deadline(), self.wait_for(id, backend)).await;
                waited.unwrap_or_else(|_| {
                    let error = backend.wait_reason();
                    Err(Some(format!("{error}. (--backend-wait={} is over.)", backend.wait)))
                })
            }
        };
        let state = &mut *self.state.borrow_mut();
        match found {
            Ok(socket) => {
                self.open(state, id, socket);
                self.send_held(state, id);
            }
            Err(Some(error)) => self.fail(state, id, &error),
            // The next datagram looks again.
            Err(None) => {
                self.lose_backend(state, id);
                self.end_wait(state, id);
            }
        }
    }

    /// Connects as soon as the backend is up.
    ///
    /// # Errors
    /// A permanent error, or `None` if the session holds nothing any more.
    async fn wait_for(
        &self,
        id: SessionId,
        backend: &DatagramBackend,
    ) -> Result<BackendSocket, Option<String>> {
        let mut pauses = PAUSES;
        while self.holds(id) {
            if let Some(lifecycle) = &backend.lifecycle {
                if !lifecycle.is_ready() {
                    if let Some(socket) = self.wait_for_start(id, backend, lifecycle).await? {
                        return Ok(socket);
                    }
                }
            } else if let Some(readiness) = &backend.readiness {
                let failed = |error| backend.set_wait_reason(error);
                let ready = readiness.wait_until_ready(failed).await;
                ready.map_err(|error| Some(error.to_string()))?;
            }
            match self.connect(id, backend).await {
                Ok(socket) => return Ok(socket),
                Err(error) if error.is_transient() => backend.set_wait_reason(error.to_string()),
                Err(error) => return Err(Some(error.to_string())),
            }
            sleep(pauses.next()).await;
        }
        Err(None)
    }

    fn holds(&self, id: SessionId) -> bool {
        let state = &*self.state.borrow();
        state.table.get(id).is_some_and(|session| state.held[session.listener].has(id))
    }

    /// Waits until the backend that the proxy starts is ready. For a COMMAND to which only
    /// datagrams go, the sessions find that out, and one returns its socket.
    async fn wait_for_start(
        &self,
        id: SessionId,
        backend: &DatagramBackend,
        lifecycle: &Lifecycle,
    ) -> Result<Option<BackendSocket>, Option<String>> {
        let Some(found_up) = &backend.found_up else {
            return lifecycle.ready().await.map(|_| None).map_err(Some);
        };
        let find_up = async {
            let (mut state, mut pauses) = (lifecycle.watch(), PAUSES);
            loop {
                // Before that, processes of the previous run may still have their sockets.
                let _ = state.wait_for(|state| *state == BackendState::Starting).await;
                let connected = tokio::select! {
                    biased;
                    _ = state.changed() => continue,
                    connected = self.connect(id, backend) => connected,
                };
                match connected {
                    Ok(socket) => {
                        // Again and again: COMMAND's supervisor may not listen yet.
                        while *state.borrow_and_update() == BackendState::Starting {
                            found_up.notify_waiters();
                            let _ = timeout(NOTIFY_AGAIN, state.changed()).await;
                        }
                        if *state.borrow() == BackendState::Ready {
                            return Ok(Some(socket));
                        }
                        backend.up_at.take();
                    }
                    Err(_) if !self.holds(id) => return Err(None),
                    Err(error) => {
                        lifecycle.set_wait_reason(error.to_string());
                        sleep(pauses.next()).await;
                    }
                }
            }
        };
        tokio::select! {
            biased;
            found = find_up => found,
            ready = lifecycle.ready() => ready.map(|_| None).map_err(Some),
        }
    }

    /// Connects to the first address of the target at which the backend is up.
    async fn connect(
        &self,
        id: SessionId,
        backend: &DatagramBackend,
    ) -> Result<BackendSocket, ConnectError> {
        let from = self.source(id, backend);
        let from = from.as_ref();
        let addresses = self.addresses(id, backend, from).await?;
        let needs_probe = addresses.len() > 1 || !backend.wait.is_zero();
        if !needs_probe {
            let address = &addresses[0];
            let connected = BackendSocket::connect(address, from, self.is_one_way(id));
            return connected.map_err(|error| self.failed(backend, address, error));
        }
        let family = from.map(SourceAddress::family);
        let mut last = backend.probing.lock().await;
        let up_at = backend.up_at.borrow().clone().filter(|address| addresses.contains(address));
        if let Some(address) = up_at {
            let connected = BackendSocket::connect(&address, from, self.is_one_way(id));
            return connected.map_err(|error| self.failed(backend, &address, error));
        }
        if let Some(FailedProbe { at, id: other, family: probed, errno }) = *last {
            if other != id && probed == family && at.elapsed() < SHARED {
                return Err(ConnectError::Connect(addresses[0].clone(), errno.into()));
            }
        }
        let (mut failed, mut unsendable) = (None, None);
        for address in &addresses {
            match self.probe(id, address, from).await {
                Ok(socket) => {
                    backend.up_at.replace(Some(address.clone()));
                    *last = None;
                    return Ok(socket);
                }
                // Nothing was asked, so nothing is counted.
                Err(ProbeError::NothingHeld) => {}
                Err(ProbeError::Unsendable(reason)) => unsendable = Some(reason),
                Err(ProbeError::Failed(error)) => {
                    if let Some(errno) = Errno::from_io_error(&error).filter(|_| is_refusal(&error))
                    {
                        *last = Some(FailedProbe { at: Instant::now(), id, family, errno });
                    }
                    failed = Some(self.failed(backend, address, error));
                }
            }
        }
        if let (None, Some(reason)) = (&failed, unsendable) {
            // No address takes it. The next datagram is tried.
            self.drop_first(id, reason);
        }
        let again = || ConnectError::Connect(addresses[0].clone(), Errno::AGAIN.into());
        Err(failed.unwrap_or_else(again))
    }

    /// Returns the addresses of a target, without those of the session's own listener.
    async fn addresses(
        &self,
        id: SessionId,
        backend: &DatagramBackend,
        from: Option<&SourceAddress>,
    ) -> Result<Vec<Address>, ConnectError> {
        let mut addresses = backend.connector_for(from).addresses().await?;
        let first = addresses[0].clone();
        let state = &*self.state.borrow();
        if let Some(session) = state.table.get(id) {
            let listener = &self.routes[session.listener].listener.label.address;
            addresses.retain(|address| !listener.accepts(address));
        }
        match addresses.is_empty() {
            true => Err(ConnectError::Connect(first, io::Error::other("it is the listener's own"))),
            false => Ok(addresses),
        }
    }

    /// Counts an error, which may say that the backend is down.
    fn failed(
        &self,
        backend: &DatagramBackend,
        address: &Address,
        error: io::Error,
    ) -> ConnectError {
        if is_refusal(&error) {
            backend.set_down();
        }
        let error = ConnectError::Connect(address.clone(), error);
        backend.connector.counters.fail(error.kind());
        error
    }

    /// Connects to an address, and sends the session's first datagram. Waits until the backend
    /// answers or has not refused it in time.
    async fn probe(
        &self,
        id: SessionId,
        address: &Address,
        from: Option<&SourceAddress>,
    ) -> Result<BackendSocket, ProbeError> {
        let mut socket = BackendSocket::connect(address, from, self.is_one_way(id))?;
        if socket.is_unix() {
            // connect(2) has said that a process listens.
            return Ok(socket);
        }
        let number = self.send_first(id, &mut socket)?;
        let socket = ProbedSocket::new(socket)?;
        let wait = socket.io.ready(Interest::READABLE | Interest::ERROR);
        if let Ok(ready) = timeout(NOT_REFUSED, wait).await {
            drop(ready?);
            if let Some(error) = socket2::SockRef::from(&socket.io).take_error()? {
                return Err(error.into());
            }
        }
        self.delivered_first(id, number);
        Ok(socket.into_socket())
    }

    /// Sends the first datagram that a session holds, which stays held. Returns its number.
    fn send_first(&self, id: SessionId, socket: &mut BackendSocket) -> Result<u64, ProbeError> {
        let RelayState { table, held, output, .. } = &mut *self.state.borrow_mut();
        let first = table.get(id).and_then(|it| Some((it, held[it.listener].first(id)?)));
        let (session, (number, datagram)) = first.ok_or(ProbeError::NothingHeld)?;
        let message = outgoing(&session.header, datagram, socket.is_ipv4());
        match output.send(&*socket, 1, |_| message) {
            Ok(_) => Ok(number),
            Err(Errno::MSGSIZE) => Err(ProbeError::Unsendable(DropReason::TooLong)),
            Err(Errno::INVAL | Errno::PERM | Errno::ACCESS) => {
                Err(ProbeError::Unsendable(DropReason::Error))
            }
            Err(errno) => Err(ProbeError::Failed(errno.into())),
        }
    }

    /// Drops the first datagram that a session holds.
    fn drop_first(&self, id: SessionId, reason: DropReason) {
        let RelayState { table, held, .. } = &mut *self.state.borrow_mut();
        let Some(session) = table.get(id) else { return };
        if held[session.listener].pop(id).is_some() {
            self.routes[session.listener].tally(0).drop(reason, 1);
        }
    }

    /// Counts the datagram of [`Relay::send_first`] as delivered, unless it has given way to
    /// another meanwhile.
    fn delivered_first(&self, id: SessionId, number: u64) {
        let RelayState { table, held, .. } = &mut *self.state.borrow_mut();
        let Some(session) = table.get_mut(id) else { return };
        let held = &mut held[session.listener];
        if let Some((_, datagram)) = held.first(id).filter(|(first, _)| *first == number) {
            let message = outgoing(&session.header, datagram, false);
            let tally = self.routes[session.listener].tally(0);
            session.datagrams[0] += tally.deliver([message].into_iter());
            held.pop(id);
        }
    }

    /// Returns the address from which a session sends, unless that is the proxy's own.
    fn source(&self, id: SessionId, backend: &DatagramBackend) -> Option<SourceAddress> {
        let client = self.state.borrow().table.get(id)?.client();
        backend.connector.source_of(&client)
    }

    fn is_one_way(&self, id: SessionId) -> bool {
        self.state.borrow().table.get(id).is_some_and(|session| session.is_one_way())
    }

    /// Gives a session its backend's socket.
    pub fn open(&self, state: &mut RelayState, id: SessionId, socket: BackendSocket) {
        self.add(state, id, socket);
        if state.table.life(id).is_some_and(|life| life.is_confirmed) {
            self.keep_confirmed(state, id);
        }
    }

    /// Notes that a session holds nothing: unless it is confirmed, it is not in use.
    pub fn end_wait(&self, state: &mut RelayState, id: SessionId) {
        let is_confirmed = state.table.life(id).is_some_and(|life| life.is_confirmed);
        if let Some(session) = state.table.get_mut(id).filter(|_| !is_confirmed) {
            session.slot.in_use = None;
        }
    }

    /// Has the epoll set watch the socket of a session.
    pub fn add(&self, state: &mut RelayState, id: SessionId, socket: BackendSocket) {
        let Some(session) = state.table.get_mut(id) else { return };
        let added = epoll::add(&self.poller, &socket, Token::Session(id).data(), socket.interest());
        if let Err(errno) = added {
            return self.fail(state, id, &format!("Failed to watch a socket: {errno}"));
        }
        session.backend = SessionBackend::Open(socket);
        let readiness = &self.backends[self.routes[session.listener].backend].readiness;
        session.open = readiness.as_ref().map(|readiness| readiness.count_open());
    }

    /// Ends a session that gets no backend.
    pub fn fail(&self, state: &mut RelayState, id: SessionId, error: &str) {
        let Some(session) = state.table.get(id) else { return };
        let route = &self.routes[session.listener];
        route.listener.info.counts.failed.inc();
        rate_limited!(
            UNREACHABLE,
            warn,
            client = session.client(),
            listener = route.listener,
            backend = self.backends[route.backend].connector.target,
            message_id = message_id::BACKEND_UNREACHABLE,
            "{error}"
        );
        self.end(state, id, "it had no backend");
    }
}

/// Why a probe found no backend.
#[derive(Debug)]
enum ProbeError {
    /// The session holds no datagram: they gave way to those of others.
    NothingHeld,
    /// The datagram cannot be sent to this address.
    Unsendable(DropReason),
    Failed(io::Error),
}

impl From<io::Error> for ProbeError {
    fn from(error: io::Error) -> Self {
        Self::Failed(error)
    }
}

/// How long a backend that has not refused a datagram may still do so.
const NOT_REFUSED: Duration = Duration::from_millis(100);

/// The pause before COMMAND's supervisor is told again that it is ready.
const NOTIFY_AGAIN: Duration = Duration::from_millis(20);

/// How long what one session has found counts for the others.
const SHARED: Duration = Duration::from_millis(50);

/// The pauses between attempts.
const PAUSES: Backoff = Backoff::new(Duration::from_millis(5), Duration::from_millis(100));

static UNREACHABLE: RateLimit = RateLimit::new(10, Duration::from_secs(10));
