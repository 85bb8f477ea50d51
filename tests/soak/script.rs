//! What the two ends of a connection do. A client picks a script; its header tells the backend which.

use std::thread;
use std::time::Duration;

use socket2::Socket;

use crate::ends::{Fault, Receiver, Sender};
use crate::passing;
use crate::stop::Stop;
use crate::support::stream::{Random, Stream, mix};
use crate::support::{Family, pause};
use crate::traffic::PATIENCE;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A request, an answer and the end, from either side.
    Short,
    /// Requests and answers of 64 bytes.
    Exchange,
    /// Megabytes, both ways at once.
    Bulk,
    /// One side ends its bytes before the other begins.
    HalfClose,
    /// One side resets the connection while the other receives, or sends as well.
    Reset,
    /// One side receives slowly.
    Slow,
    /// An exchange, then silence, then an exchange.
    Idle,
    /// Megabytes to a client that receives nothing before the end of the phase.
    Stalled,
    /// Urgent data from one side; TCP only.
    Urgent,
    /// Descriptors from one side; between Unix sockets only.
    Passing,
    /// Requests and answers of 64 bytes for as long as the client wants.
    Lasting,
}

const KINDS: [Kind; 11] = [
    Kind::Short,
    Kind::Exchange,
    Kind::Bulk,
    Kind::HalfClose,
    Kind::Reset,
    Kind::Slow,
    Kind::Idle,
    Kind::Stalled,
    Kind::Urgent,
    Kind::Passing,
    Kind::Lasting,
];

impl Kind {
    /// Whether connections between such sockets can play it.
    pub fn fits(self, families: (Family, Family)) -> bool {
        match self {
            Self::Urgent => families == (Family::Tcp, Family::Tcp),
            Self::Passing => families == (Family::Unix, Family::Unix),
            _ => true,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    Client,
    Backend,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Script {
    pub kind: Kind,
    pub seed: u64,
    /// Whether both sides are TCP, where a reset must arrive as a reset.
    pub is_tcp: bool,
}

impl Script {
    pub const HEADER: usize = 24;

    pub fn header(self) -> [u8; Self::HEADER] {
        let kind = KINDS.iter().position(|kind| *kind == self.kind).unwrap() as u64;
        let word = kind << 1 | u64::from(self.is_tcp);
        let words = [word, self.seed, mix(word ^ mix(self.seed))];
        let mut header = [0; Self::HEADER];
        for (bytes, word) in header.chunks_mut(8).zip(words) {
            bytes.copy_from_slice(&word.to_le_bytes());
        }
        header
    }

    /// The script of a header, unless these are other bytes.
    pub fn parse(header: &[u8; Self::HEADER]) -> Option<Self> {
        let word = u64::from_le_bytes(header[..8].try_into().unwrap());
        let seed = u64::from_le_bytes(header[8..16].try_into().unwrap());
        let kind = *KINDS.get((word >> 1) as usize)?;
        let script = Self { kind, seed, is_tcp: word & 1 == 1 };
        (script.header() == *header).then_some(script)
    }

    /// The two streams of a side: the one it sends, and the one it receives.
    pub fn streams(self, side: Side) -> (Stream, Stream) {
        let (up, down) = (Stream::new(self.seed), Stream::new(!self.seed));
        if side == Side::Client { (up, down) } else { (down, up) }
    }

    /// Plays one side, behind the header. Returns also how many bytes were received.
    pub fn play(self, side: Side, socket: &Socket, stop: &Stop) -> (Result<(), Fault>, u64) {
        let (sent, received) = self.streams(side);
        let out = Sender { socket, stream: sent };
        let input = Receiver { socket, stream: received };
        let dice = Random::new(self.seed);
        let mut end = End { script: self, is_client: side == Side::Client, out, input, dice, stop };
        let result = match self.kind {
            Kind::Short => end.short(),
            Kind::Exchange => end.exchange(),
            Kind::Bulk => end.bulk(),
            Kind::HalfClose => end.half_close(),
            Kind::Reset => end.reset(),
            Kind::Slow => end.slow(),
            Kind::Idle => end.idle(),
            Kind::Stalled => end.stalled(),
            Kind::Urgent => end.urgent(),
            Kind::Passing => end.passing(),
            Kind::Lasting => end.lasting(),
        };
        (result, end.input.stream.position())
    }
}

/// One end of a connection. Both ends throw the same dice, and so agree.
struct End<'a> {
    script: Script,
    is_client: bool,
    out: Sender<'a>,
    input: Receiver<'a>,
    dice: Random,
    stop: &'a Stop,
}

impl End<'_> {
    /// Whether this side is the one that begins, sends or resets.
    fn is_first(&mut self) -> bool {
        self.dice.is_one_of(2) == self.is_client
    }

    /// A request from the client and its answer.
    fn ask(&mut self, request: u64, answer: u64) -> Result<(), Fault> {
        if self.is_client {
            self.out.send(request)?;
            self.input.receive(answer)
        } else {
            self.input.receive(request)?;
            self.out.send(answer)
        }
    }

    fn short(&mut self) -> Result<(), Fault> {
        let (request, answer) = (1 + self.dice.below(4096), 1 + self.dice.below(16_384));
        let is_last = self.is_first();
        self.ask(request, answer)?;
        if is_last { self.input.end() } else { Ok(()) }
    }

    fn exchange(&mut self) -> Result<(), Fault> {
        let pause_after = 1 + self.dice.below(16);
        for round in 0..1 + self.dice.below(200) {
            self.ask(64, 64)?;
            if self.is_client && round % pause_after == 0 {
                pause(Duration::from_millis(1));
            }
        }
        if self.is_client { Ok(()) } else { self.input.end() }
    }

    fn bulk(&mut self) -> Result<(), Fault> {
        let (up, down) = (self.dice.below(BULK), self.dice.below(BULK));
        let (sent, received) = if self.is_client { (up, down) } else { (down, up) };
        let (out, input) = (&mut self.out, &mut self.input);
        thread::scope(|scope| {
            let sending = scope.spawn(|| {
                out.send(sent)?;
                out.finish()
            });
            let received = input.receive(received).and_then(|()| input.end());
            if matches!(received, Err(Fault::Wrong(_))) {
                // Ends the sender as well.
                let _ = input.socket.shutdown(std::net::Shutdown::Both);
            }
            let sent = sending.join().unwrap();
            received.and(sent)
        })
    }

    fn half_close(&mut self) -> Result<(), Fault> {
        let (first, second) = (self.dice.below(HUNDREDS_OF_KB), self.dice.below(HUNDREDS_OF_KB));
        if self.is_first() {
            self.out.send(first)?;
            self.out.finish()?;
            self.input.receive(second)?;
            self.input.end()
        } else {
            self.input.receive(first)?;
            self.input.end()?;
            self.out.send(second)?;
            self.out.finish()
        }
    }

    fn reset(&mut self) -> Result<(), Fault> {
        let bytes = self.dice.below(2 * HUNDREDS_OF_KB);
        let both_send = self.dice.is_one_of(2);
        if self.is_first() {
            self.out.send(bytes)?;
            // The close of the socket resets the connection.
            let linger = self.out.socket.set_linger(Some(Duration::ZERO));
            return linger.map_err(|error| Fault::Cut(format!("linger: {error}")));
        }
        let (out, input) = (&mut self.out, &mut self.input);
        thread::scope(|scope| {
            let sending = both_send.then(|| scope.spawn(|| out.send(2 * HUNDREDS_OF_KB)));
            let end = input.receive_to_any_end(bytes);
            let is_sent = sending.is_none_or(|sending| sending.join().unwrap().is_ok());
            if end?.is_ok() && is_sent && self.script.is_tcp {
                let position = input.stream.position();
                let text = format!("a clean end after byte {position} of {bytes}, not a reset");
                // So ends a process that is killed, and only that.
                return Err(Fault::Cut(text));
            }
            Ok(())
        })
    }

    fn slow(&mut self) -> Result<(), Fault> {
        let bytes = HUNDREDS_OF_KB + self.dice.below(HUNDREDS_OF_KB);
        if self.is_first() {
            self.out.send(bytes)?;
            self.out.finish()?;
        } else {
            let _ = self.input.socket.set_recv_buffer_size(32 * 1024);
            let (piece, stop) = (512 + self.dice.below(8192), self.stop);
            self.input.receive_in_pieces(bytes, piece, || {
                stop.wait(Duration::from_millis(1));
            })?;
        }
        self.input.end()
    }

    fn idle(&mut self) -> Result<(), Fault> {
        self.ask(64, 64)?;
        let longest = 50 + self.dice.below(8000);
        if self.is_client {
            self.stop.wait(Duration::from_millis(longest));
        } else {
            let _ = self.input.socket.set_read_timeout(None);
        }
        self.ask(64, 64)?;
        if self.is_client { Ok(()) } else { self.input.end() }
    }

    fn stalled(&mut self) -> Result<(), Fault> {
        if self.is_client {
            self.stop.wait(PATIENCE);
            self.input.receive(STALLED)?;
            return self.input.end();
        }
        let _ = self.out.socket.set_write_timeout(None);
        self.out.send(STALLED)
    }

    fn urgent(&mut self) -> Result<(), Fault> {
        let is_first = self.is_first();
        // Small ones arrive together, large ones are bulk.
        const SIZES: [u64; 5] = [1, 40, 3_000, 100_000, 300_000];
        for _ in 0..1 + self.dice.below(6) {
            let size = SIZES[self.dice.below(5) as usize] + self.dice.below(256);
            let is_urgent = self.dice.is_one_of(2);
            match (is_first, is_urgent) {
                (true, true) => self.out.send_urgent(size)?,
                (true, false) => self.out.send(size)?,
                (false, _) => self.input.receive(size)?,
            }
        }
        if is_first { self.out.finish() } else { self.input.end() }?;
        if is_first { self.input.end() } else { Ok(()) }
    }

    /// The receiver tells when it has received all that came before: descriptors may come with bytes that
    /// were sent before them.
    fn passing(&mut self) -> Result<(), Fault> {
        if self.is_first() {
            self.input.receive(64)?;
            passing::send(&mut self.out, self.script.seed)?;
            self.out.finish()?;
            self.input.end()
        } else {
            self.out.send(64)?;
            passing::receive(&mut self.input, self.script.seed)
        }
    }

    /// The client's side is in [`crate::traffic`].
    fn lasting(&mut self) -> Result<(), Fault> {
        assert!(!self.is_client);
        let _ = self.input.socket.set_read_timeout(None);
        while self.input.receive_or_end(64)? {
            self.out.send(64)?;
        }
        Ok(())
    }
}

/// The most bytes of a direction in bulk.
const BULK: u64 = 4 * 1024 * 1024;

const HUNDREDS_OF_KB: u64 = 300_000;

/// More than the buffers of the client and its socket at the proxy, so that a pipe is filled.
const STALLED: u64 = 4 * 1024 * 1024;
