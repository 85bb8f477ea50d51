//! The load of the rows for datagrams: clients that ask, and a sender that fills a pipe without loss.

use std::io::IoSliceMut;
use std::net::{SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use quinn::udp::{BATCH_SIZE, RecvMeta, Transmit, UdpSockRef, UdpSocketState};
use rustix::buffer::spare_capacity;
use rustix::event::{PollFd, PollFlags, Timespec, epoll, poll};
use socket2::SockRef;

use crate::clock;
use crate::load::Stats;

/// The longest buffer of segments.
const BUFFER: usize = 65_536;

/// Datagrams of 1,200 bytes that are under way: less than the queue of a socket holds.
const WINDOW: u64 = 64;

/// Clients that send the next question when the answer has come.
pub(crate) struct Askers {
    sockets: Vec<UdpSocket>,
    sent: Vec<u64>,
    question: Vec<u8>,
    epoll: rustix::fd::OwnedFd,
    pub(crate) stats: Stats,
}

impl Askers {
    pub(crate) fn new(front: SocketAddr, count: usize, size: usize) -> Self {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).expect("a set");
        let socket = |index: usize| {
            let socket = UdpSocket::bind("127.0.0.1:0").expect("a free port");
            socket.connect(front).expect("an address");
            socket.set_nonblocking(true).expect("a socket");
            let data = epoll::EventData::new_u64(index as u64);
            epoll::add(&epoll, &socket, data, epoll::EventFlags::IN).expect("room in the set");
            socket
        };
        Self {
            sockets: (0..count).map(socket).collect(),
            sent: vec![0; count],
            question: vec![7; size],
            epoll,
            stats: Stats::new(),
        }
    }

    /// Has each client ask its first question, a few at a time: a queue holds some 250.
    pub(crate) fn begin(&mut self) {
        for first in (0..self.sockets.len()).step_by(64) {
            let some = first..self.sockets.len().min(first + 64);
            some.clone().for_each(|index| self.ask(index));
            let before = self.stats.done;
            let enough = some.len() as u64;
            self.run_until(clock::after(1.0), |stats| stats.done >= before + enough);
        }
    }

    /// Asks one question. Returns whether an answer came in so many seconds.
    pub(crate) fn ask_once(&mut self, seconds: u32) -> bool {
        self.ask(0);
        // Not a second one, which would confirm the session.
        let wait = Timespec { tv_sec: seconds as _, tv_nsec: 0 };
        let _ = poll(&mut [PollFd::new(&self.sockets[0], PollFlags::IN)], Some(&wait));
        self.sockets[0].recv(&mut [0; 2048]).is_ok()
    }

    pub(crate) fn run(&mut self, until: u64) {
        self.run_until(until, |_| false);
    }

    fn run_until(&mut self, until: u64, is_enough: impl Fn(&Stats) -> bool) {
        let mut events = Vec::with_capacity(256);
        let mut answer = [0; 2048];
        while clock::now() < until && !is_enough(&self.stats) {
            events.clear();
            let wait = Timespec { tv_sec: 0, tv_nsec: 200_000_000 };
            let found = epoll::wait(&self.epoll, spare_capacity(&mut events), Some(&wait));
            if found == Ok(0) {
                // All were lost.
                self.stats.failures += 1;
                (0..self.sockets.len()).for_each(|index| self.ask(index));
            }
            for event in &events {
                let index = event.data.u64() as usize;
                if self.sockets[index].recv(&mut answer).is_ok() {
                    self.stats.done += 1;
                    let took = clock::now().saturating_sub(self.sent[index]);
                    let _ = self.stats.latency.record(took.max(1));
                    self.ask(index);
                }
            }
        }
    }

    fn ask(&mut self, index: usize) {
        self.sent[index] = clock::now();
        // A question that finds no room is lost, as any other.
        let _ = self.sockets[index].send(&self.question);
    }
}

/// Answers each datagram with itself until it is over.
pub(crate) fn echo(socket: &UdpSocket, is_over: &AtomicBool) {
    receive(socket, is_over, |datagram, from| drop(socket.send_to(datagram, from)));
}

/// Counts datagrams until it is over.
pub(crate) fn count(socket: &UdpSocket, counted: &AtomicU64, is_over: &AtomicBool) {
    receive(socket, is_over, |_, _| {
        counted.fetch_add(1, Ordering::Release);
    });
}

/// A backend's socket, with a long queue: it is not what is measured.
pub(crate) fn backend() -> UdpSocket {
    let socket = UdpSocket::bind("127.0.0.1:0").expect("a free port");
    let _ = SockRef::from(&socket).set_recv_buffer_size(1 << 23);
    socket
}

fn receive(socket: &UdpSocket, is_over: &AtomicBool, each: impl Fn(&[u8], SocketAddr)) {
    let state = UdpSocketState::new(UdpSockRef::from(socket)).expect("a UDP socket");
    socket.set_nonblocking(true).expect("a socket");
    let mut memory = vec![0; BUFFER * BATCH_SIZE];
    let mut metas = [RecvMeta::default(); BATCH_SIZE];
    while !is_over.load(Ordering::Relaxed) {
        let mut slots: Vec<_> = memory.chunks_mut(BUFFER).map(IoSliceMut::new).collect();
        let Ok(received) = state.recv(UdpSockRef::from(socket), &mut slots, &mut metas) else {
            let wait = Timespec { tv_sec: 0, tv_nsec: 50_000_000 };
            let _ = poll(&mut [PollFd::new(socket, PollFlags::IN)], Some(&wait));
            continue;
        };
        for (slot, meta) in slots.iter().zip(&metas[..received]) {
            let datagrams = slot[..meta.len].chunks(meta.stride.max(1));
            datagrams.for_each(|datagram| each(datagram, meta.addr));
        }
    }
}

/// Sends datagrams of 1,200 bytes, so many in a buffer, as fast as none is lost.
pub(crate) struct Filler<'a> {
    socket: UdpSocket,
    state: UdpSocketState,
    front: SocketAddr,
    segments: usize,
    sent: u64,
    counted: &'a AtomicU64,
    pub(crate) failures: u64,
}

impl<'a> Filler<'a> {
    pub(crate) fn new(front: SocketAddr, segments: usize, counted: &'a AtomicU64) -> Self {
        let socket = UdpSocket::bind("127.0.0.1:0").expect("a free port");
        let state = UdpSocketState::new(UdpSockRef::from(&socket)).expect("a UDP socket");
        Self { socket, state, front, segments, sent: 0, counted, failures: 0 }
    }

    pub(crate) fn run(&mut self, until: u64) {
        const SIZE: usize = 1200;
        let bytes = vec![7; SIZE * self.segments];
        let transmit = Transmit {
            destination: self.front,
            ecn: None,
            contents: &bytes,
            segment_size: (self.segments > 1).then_some(SIZE),
            src_ip: None,
        };
        let mut stuck = clock::after(0.2);
        let mut before = self.counted.load(Ordering::Acquire);
        loop {
            let now = clock::now();
            let counted = self.counted.load(Ordering::Acquire);
            if counted != before {
                (before, stuck) = (counted, clock::after(0.2));
            } else if now > stuck {
                self.failures += self.sent.saturating_sub(counted);
                (self.sent, stuck) = (counted, clock::after(0.2));
            }
            if now >= until {
                return;
            }
            let under_way = self.sent.saturating_sub(counted);
            if under_way + self.segments as u64 > WINDOW {
                std::thread::yield_now();
            } else if self.state.send(UdpSockRef::from(&self.socket), &transmit).is_ok() {
                self.sent += self.segments as u64;
            }
        }
    }
}
