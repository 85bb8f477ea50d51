//! The two halves of one end of a connection: a sender and a checking receiver.

use std::fmt;
use std::io::{self, ErrorKind, Read, Write};
use std::net::Shutdown;

use socket2::Socket;

use crate::support::stream::Stream;

/// What goes wrong at one end.
#[derive(Debug)]
pub enum Fault {
    /// The connection ended early, which a mode may allow.
    Cut(String),
    /// Other bytes, more bytes or another end than was sent. No mode allows that.
    Wrong(String),
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cut(text) => write!(f, "cut: {text}"),
            Self::Wrong(text) => write!(f, "wrong: {text}"),
        }
    }
}

pub struct Sender<'a> {
    pub socket: &'a Socket,
    pub stream: Stream,
}

impl Sender<'_> {
    pub fn send(&mut self, bytes: u64) -> Result<(), Fault> {
        let mut buffer = vec![0; bytes.min(LARGEST) as usize];
        let end = self.stream.position() + bytes;
        while self.stream.position() < end {
            let length = (end - self.stream.position()).min(LARGEST) as usize;
            self.stream.fill(&mut buffer[..length]);
            let written = self.socket.write_all(&buffer[..length]);
            written.map_err(|error| Fault::Cut(format!("write to byte {end}: {error}")))?;
        }
        Ok(())
    }

    /// Sends some bytes, the last of them as urgent data.
    pub fn send_urgent(&mut self, bytes: u64) -> Result<(), Fault> {
        self.send(bytes - 1)?;
        let mut last = [0];
        self.stream.fill(&mut last);
        let sent = self.socket.send_out_of_band(&last);
        sent.map_err(|error| Fault::Cut(format!("send urgent data: {error}")))?;
        Ok(())
    }

    pub fn finish(&self) -> Result<(), Fault> {
        let done = self.socket.shutdown(Shutdown::Write);
        done.map_err(|error| Fault::Cut(format!("half-close: {error}")))
    }
}

pub struct Receiver<'a> {
    pub socket: &'a Socket,
    pub stream: Stream,
}

impl Receiver<'_> {
    /// Receives exactly so many bytes, in pieces of at most `piece`.
    pub fn receive_in_pieces(
        &mut self,
        bytes: u64,
        piece: u64,
        mut after_each: impl FnMut(),
    ) -> Result<(), Fault> {
        let end = self.stream.position() + bytes;
        let mut buffer = vec![0; piece.min(bytes) as usize];
        while self.stream.position() < end {
            let most = (end - self.stream.position()).min(piece) as usize;
            let position = self.stream.position();
            let cut = |end_: &str| Fault::Cut(format!("{end_} at byte {position} of {end}"));
            match self.read(&mut buffer[..most]) {
                Ok(0) => return Err(cut("an early end")),
                Ok(length) => self.check(&buffer[..length])?,
                Err(error) => return Err(cut(&error.to_string())),
            }
            after_each();
        }
        Ok(())
    }

    pub fn receive(&mut self, bytes: u64) -> Result<(), Fault> {
        self.receive_in_pieces(bytes, LARGEST, || ())
    }

    /// Receives exactly so many bytes, or the end in front of them. Returns whether bytes came.
    pub fn receive_or_end(&mut self, bytes: u64) -> Result<bool, Fault> {
        let position = self.stream.position();
        match self.receive(bytes) {
            Ok(()) => Ok(true),
            Err(Fault::Cut(_)) if self.stream.position() == position => Ok(false),
            Err(fault) => Err(fault),
        }
    }

    /// Receives the end of the stream, and nothing before it.
    pub fn end(&mut self) -> Result<(), Fault> {
        let mut more = [0; 64];
        let position = self.stream.position();
        match self.read(&mut more) {
            Ok(0) => Ok(()),
            Ok(_) => Err(Fault::Wrong(format!("{more:x?} behind the last byte, {position}"))),
            Err(error) => Err(Fault::Cut(format!("{error} at the end, byte {position}"))),
        }
    }

    /// Receives at most so many bytes before an end of whatever kind, which is returned.
    pub fn receive_to_any_end(&mut self, most: u64) -> Result<io::Result<()>, Fault> {
        let mut buffer = vec![0; LARGEST as usize];
        loop {
            match self.read(&mut buffer) {
                Ok(0) => return Ok(Ok(())),
                Ok(length) => self.check(&buffer[..length])?,
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    let position = self.stream.position();
                    return Err(Fault::Wrong(format!("no end comes after byte {position}")));
                }
                Err(error) => return Ok(Err(error)),
            }
            if self.stream.position() > most {
                return Err(Fault::Wrong(format!("more than the {most} bytes that were sent")));
            }
        }
    }

    fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            match (&*self.socket).read(buffer) {
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                other => return other,
            }
        }
    }

    pub fn check(&mut self, received: &[u8]) -> Result<(), Fault> {
        self.stream.check(received).map_err(Fault::Wrong)
    }
}

/// Bytes of a read or a write.
const LARGEST: u64 = 64 * 1024;
