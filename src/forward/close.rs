//! How flows and their connection end: which receivers are waited for, and which ends are closed or
//! reset.
//!
//! "How a flow ends" in `forward` has the rules.

use std::io;
use std::rc::Rc;
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::sockopt;
use tokio::time::{Instant, sleep, timeout_at};

use crate::forward::endpoint::Endpoint;
use crate::forward::flow::Flow;
use crate::forward::registry::Registration;
use crate::forward::snapshot::{FlowState, SIDES, Side};
use crate::forward::{CloseReason, Forwarder, PassingError, Progress, Summary};
use crate::runtime::backoff::Backoff;
use crate::socket::{Family, FirstByte, Socket, first_byte};

impl Forwarder {
    /// Ends the flow from `side`, and passes its FIN on.
    pub(super) fn end(&mut self, side: Side) {
        let (from, to) = (side as usize, side.other() as usize);
        if self.endpoints[from].reset || self.is_expired() {
            self.flows[from].state = FlowState::SourceReset;
            return;
        }
        self.flows[from].state = FlowState::Ended;
        // When the other flow has ended too, close() sends the FIN.
        if !matches!(self.flows[to].state, FlowState::Ended) {
            // Fails only where the sink was reset, which its own flow will see.
            let _ = self.endpoints[to].socket.shutdown_write();
        }
    }

    pub(super) fn fail_source(&mut self, side: Side, errno: Errno) {
        self.fault.get_or_insert((side, errno));
        let source = &mut self.endpoints[side as usize];
        source.reset = true;
        source.gone = true;
        self.flows[side.other() as usize].close_sink(true);
        // In front of urgent data, splice(2) reports a reset though recv(2) still returns bytes.
        if first_byte(&source.socket) == FirstByte::There
            && self.flows[side as usize].begin_copying()
        {
            return self.drop_journal(None);
        }
        self.flows[side as usize].state = FlowState::SourceReset;
        // The kernel reported the error to this process and will not report it to the next.
        self.update_journal();
    }

    /// Ends both flows: descriptors from `side` cannot be passed on, and without them its bytes are
    /// not complete.
    pub(super) fn fail_passing(&mut self, side: Side, error: PassingError) {
        self.passing_error = Some((side, error));
        self.flows[side as usize].state = FlowState::SourceReset;
        self.flows[side.other() as usize].close_sink(true);
        self.update_journal();
    }

    /// Ends the flow from `side`, whose sink failed.
    ///
    /// EPIPE: a FIN was sent to the peer, or a Unix peer shut down reading. The sink's own bytes
    /// can still be read. The kernel has reported any other error for the last time: a later
    /// recv(2) would see a FIN. So the endpoint notes the reset.
    pub(super) fn fail_sink(&mut self, side: Side, errno: Errno) {
        self.fault.get_or_insert_with(|| (side.other(), errno));
        let sink = &mut self.endpoints[side.other() as usize];
        sink.reset |= errno != Errno::PIPE;
        sink.gone |= sink.reset || sink.socket.family() != Family::Unix;
        self.flows[side as usize].close_sink(true);
        self.update_journal();
    }

    /// Whether the connection is to end because it is not in use.
    pub(super) fn is_expired(&self) -> bool {
        self.registration.as_ref().is_some_and(|it| it.activity().is_expired())
    }

    /// Whether an edge may not be enough to go on: one direction waits, and the other has ended, or
    /// there is a time to try again.
    pub(super) fn is_stalled(&self) -> bool {
        let waits = self.flows.iter().any(Flow::is_waiting);
        waits && (self.retry_at().is_some() || !self.flows.iter().all(Flow::is_open))
    }

    fn retry_at(&self) -> Option<Instant> {
        self.flows.iter().filter_map(Flow::retry_at).min()
    }

    /// Waits until a turn can do something, or is to try again. Once the sender is gone, a receiver
    /// that accepts nothing for [`LINGER`] is given up. Returns whether the connection goes on.
    ///
    /// In this state the sender is not read from, and EPOLLHUP would not tell its reset from two
    /// FINs.
    pub(super) async fn wait_while_stalled(
        &mut self,
        report: &impl Fn(Progress),
    ) -> io::Result<bool> {
        if let Some(at) = self.retry_at() {
            let shared = Rc::clone(&self.shared);
            let waited = tokio::select! {
                waited = timeout_at(at, self.wait()) => waited,
                () = shared.passed.freed() => {
                    self.flows.iter_mut().for_each(|flow| flow.pause.cut_short());
                    return Ok(true);
                }
            };
            if let Ok(waited) = waited {
                if !waited? {
                    self.report_if_requested(report);
                }
            }
            return Ok(true);
        }
        let mut before = self.unacked_bytes();
        let mut deadline = Instant::now() + LINGER;
        loop {
            if let Ok(waited) = timeout_at(deadline, self.wait()).await {
                let is_edge = waited?;
                if is_edge || self.is_detach_requested() {
                    return Ok(true);
                }
                // A report does not count as progress: the deadline stays.
                self.report_if_requested(report);
                continue;
            }
            let was_gone = self.endpoints.iter().any(|end| end.gone);
            for end in &mut self.endpoints {
                end.gone |= end.socket.has_failed();
            }
            let now = self.unacked_bytes();
            if was_gone && now == before {
                return Ok(false);
            }
            before = now;
            deadline = Instant::now() + LINGER;
        }
    }

    /// Whether a peer still receives bytes that the end of its side would overtake.
    pub(super) fn has_unfinished_delivery(&self) -> bool {
        SIDES.into_iter().any(|side| self.is_delivering(side))
    }

    /// Waits until both peers have received their bytes, but at most [`LINGER`], or the idle time
    /// if that is shorter, without progress. Both sockets stay open. A caller that stops waiting
    /// may call this again.
    pub(super) async fn finish_delivery(&self) {
        let idle_time = self.registration.as_ref().and_then(Registration::idle_time);
        let linger = idle_time.map_or(LINGER, |time| time.min(LINGER));
        // At most one peer is waited for. The other is gone, or has ended and receives nothing, so
        // it need not be told meanwhile.
        for side in SIDES {
            if self.is_delivering(side) {
                wait_until_acked(&self.endpoints[side as usize].socket, linger).await;
            }
        }
    }

    /// Closes both sockets, or resets those whose peer must not take its bytes for complete.
    pub(super) fn close(self, is_idle: bool) -> Summary {
        let Progress { from_client, from_backend, .. } = self.delivered();
        let reason = match (self.passing_error, self.fault.or_else(|| self.unread_fault())) {
            _ if is_idle && self.is_expired() => CloseReason::NotInUse,
            _ if is_idle => CloseReason::IdleTimeout,
            (Some((side, error)), _) => CloseReason::Passing(side, error),
            (None, Some((side, errno))) => CloseReason::Fault(side, errno),
            (None, None) => CloseReason::Closed,
        };
        let resets = SIDES.map(|side| is_idle || self.is_to_be_reset(side));
        let states = self.flows.each_ref().map(|flow| flow.state);
        for ((end, reset), state) in self.endpoints.into_iter().zip(resets).zip(states) {
            match end.socket.family() {
                // Unread messages may have descriptors. Only close(2) makes this a reset, so
                // nothing shuts the socket down before.
                Family::Unix if state != FlowState::Ended && end.socket.closes_unread() => {
                    if let Ok(fd) = end.socket.release() {
                        drop(self.shared.passed.hold(vec![fd]));
                    }
                }
                _ if reset => end.socket.reset(),
                _ => end.socket.close(),
            }
        }
        Summary { from_client, from_backend, reason }
    }

    /// Returns why a peer is gone from which no flow read. The kernel says it once.
    fn unread_fault(&self) -> Option<(Side, Errno)> {
        let error = |side: Side| {
            let Endpoint { socket, gone, .. } = &self.endpoints[side as usize];
            gone.then(|| sockopt::socket_error(socket).ok()?.err())?
        };
        SIDES.into_iter().find_map(|side| Some((side, error(side)?)))
    }

    pub(super) fn unacked_bytes(&self) -> [usize; 2] {
        SIDES.map(|side| self.endpoints[side as usize].socket.unacked())
    }

    /// Whether closing this side now could discard bytes in flight to its peer. A reset discards
    /// them. So does close(2) if unread bytes arrive: the kernel sends a reset then.
    fn is_delivering(&self, side: Side) -> bool {
        let Endpoint { socket, gone, .. } = &self.endpoints[side as usize];
        let states = SIDES.map(|side| self.flows[side as usize].state);
        // What was sent on a Unix socket stays readable, whatever happens to this side. Where both
        // FINs are known, nothing can arrive that would make the kernel send a reset.
        states != [FlowState::Ended; 2]
            && !gone
            && matches!(states[side.other() as usize], FlowState::Ended | FlowState::SourceReset)
            && socket.family() != Family::Unix
            && socket.unacked() > 0
    }

    fn is_to_be_reset(&self, side: Side) -> bool {
        let (from, to) = (&self.flows[side as usize], &self.flows[side.other() as usize]);
        let bytes_were_lost = from.state == FlowState::SinkClosed { lost: true };
        bytes_were_lost || matches!(to.state, FlowState::SourceReset | FlowState::Open)
    }
}

/// Waits until the peer's kernel has acknowledged everything, or nothing more for `linger`.
///
/// The kernel has no event for it. The first look is nearly always enough.
async fn wait_until_acked(socket: &Socket, linger: Duration) {
    let mut left = socket.unacked();
    let mut moved = Instant::now();
    let mut backoff = Backoff::new(Duration::from_millis(1), Duration::from_millis(100));
    while left > 0 && !socket.has_failed() && moved.elapsed() < linger {
        sleep(backoff.next()).await;
        let now = socket.unacked();
        if now < left {
            left = now;
            moved = Instant::now();
        }
    }
}

/// How long a receiver may make no progress once its sender is gone. Also the interval at which a
/// stalled connection is checked.
const LINGER: Duration = Duration::from_secs(60);

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::{Shutdown, TcpListener, TcpStream};
    use std::os::unix::net::UnixStream;
    use std::sync::Arc;

    use tokio::time::timeout;

    use super::*;
    use crate::forward::loop_buffers::LoopBuffers;
    use crate::forward::registry::Registry;
    use crate::forward::snapshot::{FdRef, Snapshot, SnapshotStore};
    use crate::socket::sys::outq_len;

    fn register(stream: UnixStream) -> Socket {
        stream.set_nonblocking(true).unwrap();
        Socket::register(stream.into(), Family::Unix).unwrap()
    }

    fn join(
        [client, backend]: [Socket; 2],
        registration: Option<Registration>,
        journal: Option<Box<dyn SnapshotStore>>,
    ) -> Forwarder {
        let (shared, counters) = (Rc::new(LoopBuffers::for_tests(1)), Arc::default());
        Forwarder::new(client, backend, Vec::new(), shared, counters, registration, journal)
    }

    /// A TCP socket with a peer that reads nothing, whose window is full.
    fn full_tcp() -> (TcpStream, Socket) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let peer = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let mut stream = listener.accept().unwrap().0;
        stream.set_nonblocking(true).unwrap();
        while stream.write(&[0; 65536]).is_ok() {}
        (peer, Socket::register(stream.into(), Family::Tcp).unwrap())
    }

    /// Has room for everything.
    #[derive(Debug)]
    struct RoomyStore;

    impl SnapshotStore for RoomyStore {
        fn update(&self, _: Snapshot<FdRef<'_>>) -> bool {
            true
        }
        fn forget(self: Box<Self>) -> bool {
            true
        }
        fn detach(self: Box<Self>) {}
    }

    #[tokio::test]
    async fn a_stored_unix_socket_ends_although_another_descriptor_refers_to_it() {
        let [(client, near), (backend, far)] = [(); 2].map(|()| UnixStream::pair().unwrap());
        let _stored = [&near, &far].map(|socket| socket.try_clone().unwrap());
        drop(client);
        join([near, far].map(register), None, Some(Box::new(RoomyStore)))
            .run(|_| {})
            .await
            .unwrap();
        assert!((&backend).write(b"x").is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn a_unix_receiver_that_reads_nothing_is_not_waited_for() {
        let [(client, near), (_backend, far)] = [(); 2].map(|()| UnixStream::pair().unwrap());
        // A close with bytes unread is a reset.
        (&near).write_all(b"never read").unwrap();
        (&client).write_all(b"a request").unwrap();
        drop(client);
        let start = Instant::now();
        join([near, far].map(register), None, None).run(|_| {}).await.unwrap();
        assert_eq!(start.elapsed(), Duration::ZERO);
    }

    #[tokio::test(start_paused = true)]
    async fn a_receiver_that_takes_little_is_waited_for() {
        let [(client, near), (mut backend, far)] = [(); 2].map(|()| UnixStream::pair().unwrap());
        backend.shutdown(Shutdown::Write).unwrap();
        (&near).write_all(b"never read").unwrap();
        client.set_nonblocking(true).unwrap();
        let sink = far.try_clone().unwrap();
        let peers = async move {
            // Until nothing more is taken.
            for _ in 0..100 {
                while (&client).write(&[0; 32 * 1024]).is_ok() {}
                sleep(Duration::from_millis(1)).await;
            }
            drop(client);
            for _ in 0..6 {
                sleep(LINGER * 9 / 10).await;
                // One buffer of the kernel's, too little for an edge.
                let before = outq_len(&sink);
                while outq_len(&sink) == before {
                    backend.read_exact(&mut [0; 1024]).unwrap();
                }
            }
        };
        let forwarding = join([near, far].map(register), None, None).run(|_| {});
        tokio::select! {
            _ = forwarding => panic!("the receiver is given up"),
            () = peers => {}
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_receiver_is_waited_for_no_longer_than_the_idle_time() {
        let (_peer, far) = full_tcp();
        let (client, near) = UnixStream::pair().unwrap();
        (&near).write_all(b"never read").unwrap();
        drop(client);
        let registry = Rc::new(Registry::new(Some(Duration::from_secs(1))));
        let start = Instant::now();
        join([register(near), far], Some(registry.register(false)), None)
            .run(|_| {})
            .await
            .unwrap();
        let took = start.elapsed();
        assert!(took >= Duration::from_secs(1) && took < LINGER, "{took:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_peer_that_acknowledges_nothing_is_waited_for_only_so_long() {
        let (_peer, socket) = full_tcp();
        let acked = wait_until_acked(&socket, Duration::from_secs(1));
        timeout(Duration::from_secs(60), acked).await.expect("it ends");
        assert!(socket.unacked() > 0);
    }
}
