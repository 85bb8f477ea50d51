//! Sessions of datagrams: clients that ask, and backends that answer.
//!
//! A question may be lost, as UDP allows: at a full queue, or with a process that is killed. Then it is
//! asked again. What comes must be what was sent: once, in order, and to its client.

use std::collections::HashMap;
use std::io::ErrorKind;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::thread;
use std::time::Duration;

use socket2::Socket;
use tokio::time::Instant;

use crate::load::{Failures, Load, Totals};
use crate::peers::{Kind, Peer, receive_from};
use crate::stop::Stop;
use crate::support::pause;
use crate::support::stream::{Random, Stream, mix};

pub struct Sessions {
    stop: Stop,
    failures: Arc<Failures>,
    fronts: Vec<Peer>,
    backends: Vec<Peer>,
    seed: u64,
    sessions: AtomicU64,
    bytes: Arc<AtomicU64>,
    lost: AtomicU64,
}

/// The families of a listener and of its backend.
const ROUTES: [(Kind, Kind); 4] = [
    (Kind::Udp, Kind::Udp),
    (Kind::Udp6, Kind::Unix),
    (Kind::Unix, Kind::Udp),
    (Kind::Unix, Kind::Unix),
];

impl Sessions {
    pub fn new(seed: u64) -> Self {
        let this = Self {
            stop: Stop::default(),
            failures: Arc::default(),
            fronts: ROUTES.iter().map(|(front, _)| Peer::new(*front)).collect(),
            backends: ROUTES.iter().map(|(_, backend)| Peer::new(*backend)).collect(),
            seed,
            sessions: AtomicU64::new(0),
            bytes: Arc::default(),
            lost: AtomicU64::new(0),
        };
        for backend in &this.backends {
            let socket = backend.socket.try_clone().unwrap();
            let (failures, bytes) = (Arc::clone(&this.failures), Arc::clone(&this.bytes));
            thread::spawn(move || answer(&socket, &failures, &bytes));
        }
        this
    }

    pub fn listeners(&self) -> Vec<(String, Socket)> {
        let fronts = self.fronts.iter().enumerate();
        fronts.map(|(at, it)| (format!("front{at}"), it.socket.try_clone().unwrap())).collect()
    }

    pub fn targets(&self) -> Vec<String> {
        let backends = self.backends.iter().enumerate();
        backends.map(|(at, it)| format!("front{at}={}", it.target)).collect()
    }

    /// One session after the other.
    fn run_clients(&self, seed: u64) {
        let mut random = Random::new(seed);
        while !self.stop.is_stopped() && !self.failures.any() {
            let front = &self.fronts[random.below(ROUTES.len() as u64) as usize];
            self.sessions.fetch_add(1, Relaxed);
            let client =
                Client { socket: front.client(), session: random.next(), number: 0, answered: 0 };
            if let Err(failure) = self.run_client(client, &mut random) {
                self.failures.add(failure);
            }
        }
    }

    fn run_client(&self, mut client: Client, random: &mut Random) -> Result<(), String> {
        for _ in 0..1 + random.below(100) {
            if self.stop.is_stopped() {
                break;
            }
            let largest = [100, 1400, LARGEST][random.below(3) as usize];
            let size = HEADER as u64 + random.below(largest - HEADER as u64);
            self.ask(&mut client, size as usize)?;
            pause(Duration::from_millis(random.below(5)));
        }
        Ok(())
    }

    /// Asks until an answer comes.
    fn ask(&self, client: &mut Client, size: usize) -> Result<(), String> {
        let start = Instant::now();
        let first = client.number;
        loop {
            client.number += 1;
            if client.number - first > 300 {
                return Err(format!("no answer in {:?}", start.elapsed()));
            }
            let question = datagram(client.session, client.number, size);
            client.socket.set_read_timeout(Some(AGAIN_AFTER)).unwrap();
            match client.socket.send(&question) {
                Ok(_) => {}
                // The queue of a Unix listener is full, or there is no proxy.
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    pause(Duration::from_millis(5));
                    continue;
                }
                Err(error) => return Err(format!("send {size} bytes: {error}")),
            }
            while let Ok((answer, _)) = receive_from(&client.socket) {
                self.bytes.fetch_add(answer.len() as u64, Relaxed);
                let (session, number) = check(&answer).map_err(|it| format!("answer: {it}"))?;
                if session != !client.session || number <= client.answered {
                    let expected = (!client.session, client.answered);
                    return Err(format!("{session:x} {number} answers behind {expected:x?}"));
                }
                client.answered = number;
                if number == client.number {
                    return Ok(());
                }
            }
            self.lost.fetch_add(1, Relaxed);
        }
    }
}

struct Client {
    socket: Socket,
    session: u64,
    /// Of the last question. Each question has another one, also if it is asked again.
    number: u64,
    /// The number of the last answer.
    answered: u64,
}

/// A backend: answers each question with as many bytes of its own.
fn answer(socket: &Socket, failures: &Failures, bytes: &AtomicU64) {
    socket.set_read_timeout(None).unwrap();
    let mut last: HashMap<u64, u64> = HashMap::new();
    while let Ok((question, from)) = receive_from(socket) {
        bytes.fetch_add(question.len() as u64, Relaxed);
        let (session, number) = match check(&question) {
            Ok(found) => found,
            Err(failure) => {
                failures.add(format!("question: {failure}"));
                return;
            }
        };
        let before = last.insert(session, number).unwrap_or(0);
        if number <= before {
            failures.add(format!("question {number} of {session:x} behind {before}"));
        }
        let _ = socket.send_to(&datagram(!session, number, question.len()), &from);
    }
}

/// A session, a number and a checksum of both; then a stream of that.
fn datagram(session: u64, number: u64, size: usize) -> Vec<u8> {
    let sum = mix(session ^ mix(number));
    let mut bytes = vec![0; size];
    for (bytes, word) in bytes.chunks_mut(8).zip([session, number, sum]) {
        bytes.copy_from_slice(&word.to_le_bytes());
    }
    Stream::new(sum ^ size as u64).fill(&mut bytes[HEADER..]);
    bytes
}

/// The session and the number of a datagram, if it is as it was sent.
fn check(received: &[u8]) -> Result<(u64, u64), String> {
    let word = |at: usize| {
        let bytes = received.get(at..at + 8).ok_or("a piece of a datagram")?;
        Ok::<_, String>(u64::from_le_bytes(bytes.try_into().unwrap()))
    };
    let (session, number, sum) = (word(0)?, word(8)?, word(16)?);
    if sum != mix(session ^ mix(number)) {
        return Err(format!("the header of {} bytes is not one", received.len()));
    }
    Stream::new(sum ^ received.len() as u64).check(&received[HEADER..])?;
    Ok((session, number))
}

impl Load for Sessions {
    fn stop(&self) -> &Stop {
        &self.stop
    }

    fn failures(&self) -> &Failures {
        &self.failures
    }

    /// No session lasts without datagrams.
    fn warm_up(&self) {}

    fn run_phase(&self, seed: u64) {
        let mut random = Random::new(self.seed ^ seed);
        thread::scope(|scope| {
            for _ in 0..CLIENTS_AT_A_TIME {
                let seed = random.next();
                scope.spawn(move || self.run_clients(seed));
            }
        });
    }

    fn run_calm_phase(&self, _: u64) {}

    fn totals(&self) -> Totals {
        Totals {
            connections: self.sessions.load(Relaxed),
            bytes: self.bytes.load(Relaxed),
            cuts: self.lost.load(Relaxed),
        }
    }

    /// One receive takes up to 32 datagrams. The longest batch so far decides how many pages of the
    /// receive buffer are in memory.
    fn burst_memory(&self) -> u64 {
        32 * LARGEST.div_ceil(1024)
    }
}

const HEADER: usize = 24;

const LARGEST: u64 = 65_000;

/// Questions that are asked again are counted, see [`crate::measures::table`].
const AGAIN_AFTER: Duration = Duration::from_millis(200);

const CLIENTS_AT_A_TIME: usize = 16;
