//! A forwarder and its flows to and from a [`Snapshot`], and the moments at which crash mode stores
//! one.

use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::mem;
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::{MemfdFlags, memfd_create};
use rustix::io::Errno;
use socket2::SockRef;

use crate::counters::ByteCounters;
use crate::forward::Forwarder;
use crate::forward::endpoint::Endpoint;
use crate::forward::flow::{Buffered, Flow};
use crate::forward::loop_buffers::LoopBuffers;
use crate::forward::passing::Passing;
use crate::forward::registry::Registration;
use crate::forward::snapshot::{
    BufferedSnapshot, COPY_SIZE, EndpointSnapshot, FdRef, FlowSnapshot, FlowState, SIDES, Side,
    Snapshot, SnapshotStore,
};
use crate::logging::{RateLimit, rate_limited};
use crate::socket::{Family, Socket, has_hung_up_reading, set_reset_on_close};

static UNSTORED: RateLimit = RateLimit::new(1, Duration::from_secs(60));

impl Forwarder {
    /// Restores a forwarder. With a `journal` its snapshot is kept current.
    ///
    /// # Errors
    /// When a socket cannot be registered or buffered bytes cannot be read. Both sides are reset
    /// then.
    pub fn restore(
        snapshot: Snapshot<OwnedFd>,
        shared: Rc<LoopBuffers>,
        counters: Arc<ByteCounters>,
        registration: Option<Registration>,
        journal: Option<Box<dyn SnapshotStore>>,
    ) -> io::Result<Self> {
        let was_reset = SIDES.map(|side| was_reset(&snapshot, side));
        let Snapshot {
            endpoints: [client, backend],
            flows: [from_client, from_backend],
            header_len,
            fault,
        } = snapshot;
        let is_journaled = journal.is_some();
        let endpoint = |end: EndpointSnapshot<OwnedFd>, was_reset: bool| -> io::Result<Endpoint> {
            let family = Family::of(&end.socket)?.ok_or(Errno::AFNOSUPPORT)?;
            let socket = Socket::register(end.socket, family)?;
            // The previous process made close(2) reset the socket. In crash mode that stays.
            if is_journaled {
                socket.mark_shared();
            } else {
                set_reset_on_close(&socket, false);
            }
            let mut endpoint = Endpoint::new(socket);
            // The previous process may have passed on a FIN, which a snapshot does not say. A flow
            // that reads before it waits knows, and no EPOLLHUP after two FINs misleads it.
            endpoint.readable = true;
            endpoint.reset = end.reset || was_reset;
            endpoint.gone = end.gone || was_reset;
            Ok(endpoint)
        };
        // Both are registered before an error is returned: a Socket that is dropped is reset, and a
        // bare descriptor is not.
        let (client, backend) = (endpoint(client, was_reset[0]), endpoint(backend, was_reset[1]));
        let endpoints = [client?, backend?];
        let flows = [
            Flow::restore(from_client, is_journaled, &shared)?,
            Flow::restore(from_backend, is_journaled, &shared)?,
        ];
        let errno = |raw| Errno::from_io_error(&io::Error::from_raw_os_error(raw));
        let fault = fault.and_then(|(side, raw)| Some((side, errno(raw)?)));
        let mut forwarder = Self {
            endpoints,
            flows,
            shared,
            counters,
            registration,
            header_len,
            fault,
            passing_error: None,
            last_turn: 0,
            journal: None,
        };
        match journal {
            // The stored snapshot is current.
            Some(journal) if forwarder.flows.iter().all(Flow::is_storable) => {
                forwarder.journal = Some(journal);
            }
            Some(journal) => forwarder.set_journal(journal),
            None => {}
        }
        Ok(forwarder)
    }

    /// Returns what the connection consists of at this moment.
    ///
    /// # Errors
    /// When copied bytes fit neither into a pipe nor into a file.
    pub fn snapshot(&self) -> io::Result<Snapshot<FdRef<'_>>> {
        let endpoint = |side: Side| {
            let Endpoint { socket, reset, gone, .. } = &self.endpoints[side as usize];
            EndpointSnapshot { socket: FdRef::Borrowed(socket.as_fd()), reset: *reset, gone: *gone }
        };
        let [from_client, from_backend] = &self.flows;
        Ok(Snapshot {
            endpoints: SIDES.map(endpoint),
            flows: [from_client.snapshot(&self.shared)?, from_backend.snapshot(&self.shared)?],
            header_len: self.header_len,
            fault: self.fault.map(|(side, errno)| (side, errno.raw_os_error())),
        })
    }

    /// Keeps the snapshot in `journal` current from now on: no byte is in the memory of the
    /// process. Where that is impossible, the connection is no longer stored.
    pub fn set_journal(&mut self, journal: Box<dyn SnapshotStore>) {
        self.journal = Some(journal);
        // Also if the journal is dropped below: the copies that systemd has keep the sockets open.
        self.endpoints.iter().for_each(|end| end.socket.mark_shared());
        // A vsock connection is not stored: see --handover= in socket-proxyd(8).
        if self.endpoints.iter().any(|end| end.socket.family() == Family::Vsock) {
            return self.drop_journal(None);
        }
        let mut flows = self.flows.iter_mut().filter(|flow| !flow.is_storable());
        match flows.try_for_each(|flow| flow.use_stored_pipe(&self.shared)) {
            Ok(()) => self.update_journal(),
            Err(Errno::OPNOTSUPP) => self.drop_journal(Some("it passes descriptors on.")),
            Err(_) => self.drop_journal(Some(
                "there is no pipe for it. (See pipe-user-pages-soft in pipe(7), and LimitNOFILE=.)",
            )),
        }
    }

    /// Stores the snapshot as it is now.
    pub(super) fn update_journal(&mut self) {
        let Some(journal) = &self.journal else { return };
        if !self.snapshot().is_ok_and(|snapshot| journal.update(snapshot)) {
            self.drop_journal(Some("the descriptor store is full."));
        }
    }

    /// Stores the connection no longer. `why` is logged.
    pub(super) fn drop_journal(&mut self, why: Option<&str>) {
        let Some(journal) = self.journal.take() else { return };
        if let Some(why) = why {
            rate_limited!(
                UNSTORED,
                warn,
                "Failed to store a connection, which would end with the proxy: {why}"
            );
        }
        self.flows.iter_mut().for_each(Flow::leave_stored_pipe);
        if !journal.forget() {
            // The next process would restore the stale snapshot and send its bytes a second time.
            self.flows.iter_mut().for_each(|flow| flow.close_sink(true));
        }
    }

    /// Detaches the connection if it is stored. What the snapshot lacks, the next process reads
    /// from the sockets again.
    ///
    /// # Errors
    /// Itself, when it has no journal.
    pub fn detach_stored(mut self: Box<Self>) -> Result<(), Box<Self>> {
        let Some(journal) = self.journal.take() else { return Err(self) };
        journal.detach();
        self.detach();
        Ok(())
    }

    /// Closes the sockets here without ending the connection: a stored reference keeps it open.
    pub fn detach(self) {
        let [client, backend] = self.endpoints;
        client.socket.detach();
        backend.socket.detach();
    }
}

impl Flow {
    /// Moves the buffered bytes into a pipe that can be stored, and uses it from now on.
    ///
    /// # Errors
    /// When there is no pipe, or none with enough room. EOPNOTSUPP: the flow holds descriptors.
    /// Then nothing has changed.
    pub fn use_stored_pipe(&mut self, shared: &LoopBuffers) -> Result<(), Errno> {
        let pipe = match mem::take(&mut self.buffered) {
            Buffered::Piped(pipe) => pipe,
            passing @ Buffered::Passing(_) => {
                self.buffered = passing;
                return Err(Errno::OPNOTSUPP);
            }
            buffered => {
                let pipe = shared.pipes.create_unpooled().and_then(|mut pipe| {
                    if let Buffered::Copied { bytes, sent } = &buffered {
                        pipe.put(&bytes[*sent..])?;
                    }
                    Ok(pipe)
                });
                pipe.inspect_err(|_| self.buffered = buffered)?
            }
        };
        self.buffered = Buffered::StoredPipe(Box::new(pipe));
        Ok(())
    }

    /// Leaves the stored pipe: sends what is in it, then works like any other flow.
    pub fn leave_stored_pipe(&mut self) {
        self.buffered = match mem::take(&mut self.buffered) {
            Buffered::StoredPipe(pipe) if pipe.filled() > 0 => Buffered::Piped(*pipe),
            Buffered::StoredPipe(_) => Buffered::Nothing,
            buffered => buffered,
        };
    }

    /// Returns the flow as it is to be stored.
    ///
    /// # Errors
    /// When copied bytes fit neither into a pipe nor into a file: memfd_create(2)'s and write(2)'s.
    pub fn snapshot(&self, shared: &LoopBuffers) -> io::Result<FlowSnapshot<FdRef<'_>>> {
        let buffered = match &self.buffered {
            Buffered::Nothing => BufferedSnapshot::Nothing,
            Buffered::Copied { bytes, sent } => copied_snapshot(&bytes[*sent..], shared)?,
            Buffered::Piped(pipe) => pipe.snapshot(),
            Buffered::StoredPipe(pipe) => pipe.snapshot(),
            Buffered::Passing(passing) => passing.snapshot()?,
        };
        Ok(FlowSnapshot { state: self.state, delivered: self.delivered, buffered })
    }

    /// Restores a flow. If it `is_journaled`, it goes on with its stored pipe.
    ///
    /// # Errors
    /// When its buffered bytes cannot be read.
    pub fn restore(
        stored: FlowSnapshot<OwnedFd>,
        is_journaled: bool,
        shared: &LoopBuffers,
    ) -> io::Result<Self> {
        let FlowSnapshot { state, delivered, buffered } = stored;
        let buffered = match buffered {
            _ if state != FlowState::Open => Buffered::Nothing,
            BufferedSnapshot::Nothing => Buffered::Nothing,
            BufferedSnapshot::Copied(file) => {
                let mut bytes = Vec::new();
                let mut file = File::from(file);
                file.rewind()?;
                file.take(COPY_SIZE as u64).read_to_end(&mut bytes)?;
                Buffered::Copied { bytes, sent: 0 }
            }
            BufferedSnapshot::Piped { read, write } => {
                Buffered::StoredPipe(Box::new(shared.pipes.adopt(read, write)?))
            }
            BufferedSnapshot::Passing(socket) => {
                Buffered::Passing(Passing::restore(&socket, &shared.passed)?)
            }
        };
        let mut flow = Self::default();
        (flow.state, flow.delivered, flow.buffered) = (state, delivered, buffered);
        if !is_journaled {
            flow.leave_stored_pipe();
        }
        Ok(flow)
    }

    /// Whether all bytes of the flow stay out of the memory of the process from now on.
    pub fn is_storable(&self) -> bool {
        !self.is_open() || matches!(self.buffered, Buffered::StoredPipe(_))
    }
}

/// Writes copied bytes to a pipe or, once the user's quota leaves pipes too small for them, to a
/// file without a name. (`LimitFSIZE=` applies to such a file.)
fn copied_snapshot(
    bytes: &[u8],
    shared: &LoopBuffers,
) -> io::Result<BufferedSnapshot<FdRef<'static>>> {
    let pipe = shared.pipes.create_unpooled();
    if let Ok(pipe) = pipe.and_then(|mut pipe| pipe.put(bytes).map(|()| pipe)) {
        return Ok(pipe.into_snapshot());
    }
    let file = memfd_create(c"socket-proxyd", MemfdFlags::CLOEXEC)?;
    File::from(file.try_clone()?).write_all(bytes)?;
    Ok(BufferedSnapshot::Copied(FdRef::Owned(file)))
}

/// Whether the peer reset a TCP connection, and the previous process read that error but did not
/// come to store it: the kernel reports it once.
///
/// The snapshot may be older than a FIN that was passed on to this side. But that FIN came from
/// the other side, where EPOLLRDHUP shows it. Without one, FINs alone cannot have closed this
/// socket: if it is no longer connected, it was reset.
fn was_reset(snapshot: &Snapshot<OwnedFd>, side: Side) -> bool {
    let (from, to) = (side as usize, 1 - side as usize);
    let socket = &snapshot.endpoints[from].socket;
    let are_open = snapshot.flows.iter().all(|flow| flow.state == FlowState::Open);
    are_open
        && Family::of(socket).is_ok_and(|family| family == Some(Family::Tcp))
        && !has_hung_up_reading(&snapshot.endpoints[to].socket)
        && SockRef::from(socket).peer_addr().is_err()
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::net::{TcpListener, TcpStream};
    use std::os::unix::net::UnixStream;

    use super::*;

    /// Counts the snapshots.
    #[derive(Debug)]
    struct CountingStore(Rc<Cell<usize>>);

    impl SnapshotStore for CountingStore {
        fn update(&self, _: Snapshot<FdRef<'_>>) -> bool {
            self.0.set(self.0.get() + 1);
            true
        }
        fn forget(self: Box<Self>) -> bool {
            true
        }
        fn detach(self: Box<Self>) {}
    }

    fn restore(stored: Snapshot<OwnedFd>, journal: Option<Box<dyn SnapshotStore>>) -> Forwarder {
        let shared = Rc::new(LoopBuffers::for_tests(1));
        Forwarder::restore(stored, shared, Arc::default(), None, journal).unwrap()
    }

    #[tokio::test]
    async fn a_side_that_was_reset_or_is_gone_stays_so() {
        for (reset, gone) in [(false, false), (false, true), (true, true)] {
            let [(near, _client), (far, _backend)] = [(); 2].map(|()| UnixStream::pair().unwrap());
            let mut stored = snapshot([near.into(), far.into()], FlowState::Open);
            (stored.endpoints[1].reset, stored.endpoints[1].gone) = (reset, gone);
            let restored = restore(stored, None);
            let ends = restored.snapshot().unwrap().endpoints.map(|end| (end.reset, end.gone));
            assert_eq!(ends, [(false, false), (reset, gone)]);
        }
    }

    #[tokio::test]
    async fn what_has_stored_pipes_is_not_stored_again() {
        for (state, has_pipes, expected) in
            [(FlowState::Open, true, 0), (FlowState::Open, false, 1), (FlowState::Ended, true, 0)]
        {
            let [(near, _client), (far, _backend)] = [(); 2].map(|()| UnixStream::pair().unwrap());
            let mut stored = snapshot([near.into(), far.into()], state);
            for flow in stored.flows.iter_mut().filter(|_| has_pipes) {
                let (read, write) = rustix::pipe::pipe().unwrap();
                flow.buffered = BufferedSnapshot::Piped { read, write };
            }
            let updates = Rc::<Cell<usize>>::default();
            let restored = restore(stored, Some(Box::new(CountingStore(Rc::clone(&updates)))));
            assert!(restored.flows.iter().all(Flow::is_storable));
            assert_eq!(updates.get(), expected);
            let has_pipe = !matches!(restored.flows[0].buffered, Buffered::Nothing);
            assert_eq!(has_pipe, state == FlowState::Open);
        }
    }

    fn tcp_pair() -> [TcpStream; 2] {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let peer = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        [listener.accept().unwrap().0, peer]
    }

    /// A socket whose peer has sent a reset, which was read.
    fn reset_socket() -> OwnedFd {
        let [mut socket, peer] = tcp_pair();
        SockRef::from(&peer).set_linger(Some(Duration::ZERO)).unwrap();
        drop(peer);
        assert!(socket.read(&mut [0]).is_err());
        socket.into()
    }

    fn snapshot(sockets: [OwnedFd; 2], state: FlowState) -> Snapshot<OwnedFd> {
        let flow =
            |state| FlowSnapshot { state, delivered: 0, buffered: BufferedSnapshot::Nothing };
        Snapshot {
            endpoints: sockets.map(|socket| EndpointSnapshot { socket, reset: false, gone: false }),
            flows: [flow(state), flow(FlowState::Open)],
            header_len: 0,
            fault: None,
        }
    }

    #[test]
    fn a_reset_that_was_read_and_not_stored_is_known() {
        let was_reset = |sockets, state| {
            let snapshot = snapshot(sockets, state);
            SIDES.map(|side| was_reset(&snapshot, side))
        };
        let ([open, _peer], (unix, _unix_peer)) = (tcp_pair(), UnixStream::pair().unwrap());
        let open = || open.try_clone().unwrap().into();
        let unix = || unix.try_clone().unwrap().into();
        assert_eq!(was_reset([reset_socket(), open()], FlowState::Open), [true, false]);
        assert_eq!(was_reset([unix(), reset_socket()], FlowState::Open), [false, true]);
        // The other side's FIN may have been passed on, and both FINs end a connection as well.
        let ended = UnixStream::pair().unwrap().0.into();
        assert_eq!(was_reset([reset_socket(), ended], FlowState::Open), [false, false]);
        assert_eq!(was_reset([reset_socket(), open()], FlowState::Ended), [false, false]);
    }
}
