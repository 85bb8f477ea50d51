//! Descriptors that wait for their receiver, and why they could not be passed on.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use tokio::time::Instant;

use crate::forward::snapshot::{BufferedSnapshot, COPY_SIZE, FdRef};
use crate::limits::passed::{PassedFds, PassedRoom};
use crate::runtime::backoff::Backoff;
use crate::socket::{receive_passed, send_passed};

/// Bytes and descriptors that the sink has not accepted.
#[derive(Debug)]
pub struct Passing {
    bytes: Vec<u8>,
    /// How many of the bytes were sent.
    sent: usize,
    /// They go with the first byte.
    descriptors: Option<PassedFds>,
}

/// Why descriptors could not be passed on, which ends the connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PassingError {
    /// A message had more than the proxy passes on.
    TooMany,
    /// The kernel could not open all of them, because the table of descriptors is full.
    TableFull,
    /// `ETOOMANYREFS` for too long.
    TooManyInFlight,
    /// The receiver takes none: SO_PASSRIGHTS in unix(7), Linux 6.16.
    Refused,
    /// The connection is stored (crash mode), and its bytes never leave the kernel.
    Stored,
}

impl fmt::Display for PassingError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::TooMany => {
                "there are more of them in a message than a quarter of RLIMIT_NOFILE. (Raise \
                 LimitNOFILE=.)"
            }
            Self::TableFull => "Too many open files. (Raise LimitNOFILE=.)",
            Self::TooManyInFlight => {
                "too many descriptors of this user are in flight. (See ETOOMANYREFS in unix(7), \
                 and raise LimitNOFILE=.)"
            }
            Self::Refused => "the receiver takes none (SO_PASSRIGHTS).",
            Self::Stored => {
                "stored connections carry none. (Write --handover=restart instead of \
                 --handover=crash.)"
            }
        })
    }
}

/// A wait between two attempts, where no event tells when to try again.
#[derive(Debug, Default)]
pub struct Pause(Option<Box<PauseState>>);

#[derive(Debug)]
struct PauseState {
    since: Instant,
    until: Instant,
    next: Backoff,
}

impl Pause {
    /// Begins to wait, or to wait longer.
    pub fn begin(&mut self) {
        let now = Instant::now();
        let begin = || Box::new(PauseState { since: now, until: now, next: PAUSES });
        let state = self.0.get_or_insert_with(begin);
        state.until = now + state.next.next();
    }

    /// Returns when the wait is over, unless there is none.
    pub fn until(&self) -> Option<Instant> {
        self.0.as_ref().map(|state| state.until)
    }

    /// Ends the present pause, but not the series.
    pub fn cut_short(&mut self) {
        if let Some(state) = &mut self.0 {
            state.until = Instant::now();
        }
    }

    pub fn is_running(&self) -> bool {
        self.until().is_some_and(|until| Instant::now() < until)
    }

    /// Whether it is so long since the first attempt of this series.
    pub fn has_lasted(&self, time: Duration) -> bool {
        self.0.as_ref().is_some_and(|state| state.since.elapsed() >= time)
    }
}

impl Passing {
    pub fn new(bytes: Vec<u8>, descriptors: PassedFds) -> Box<Self> {
        Box::new(Self { bytes, sent: 0, descriptors: Some(descriptors) })
    }

    /// Sends what the sink accepts, and closes the descriptors that were sent. Returns the result
    /// of sendmsg(2), or `None` during a pause, which begins when too many descriptors are in
    /// flight.
    ///
    /// # Errors
    /// When too many are in flight for [`REFUSED_MAX`], or the receiver refuses them.
    pub fn send(
        &mut self,
        to: impl AsFd,
        pause: &mut Pause,
    ) -> Result<Option<Result<usize, Errno>>, PassingError> {
        if pause.is_running() {
            return Ok(None);
        }
        let sent = match self.send_rest(to) {
            Err(Errno::TOOMANYREFS) if pause.has_lasted(REFUSED_MAX) => {
                return Err(PassingError::TooManyInFlight);
            }
            Err(Errno::TOOMANYREFS) => {
                pause.begin();
                return Ok(None);
            }
            Err(Errno::PERM) if self.descriptors.is_some() => return Err(PassingError::Refused),
            sent => sent,
        };
        *pause = Pause::default();
        if let Ok(bytes) = sent {
            self.sent += bytes;
            self.descriptors = None;
        }
        Ok(Some(sent))
    }

    fn send_rest(&self, to: impl AsFd) -> Result<usize, Errno> {
        let descriptors = self.descriptors.as_ref().map(PassedFds::as_fds).unwrap_or_default();
        send_passed(to, &self.bytes[self.sent..], &descriptors)
    }

    /// Whether the sink has accepted everything.
    pub fn is_sent(&self) -> bool {
        self.sent == self.bytes.len()
    }

    /// Returns a socket that has the bytes and the descriptors in its queue.
    ///
    /// # Errors
    /// socketpair(2)'s and sendmsg(2)'s.
    pub fn snapshot(&self) -> io::Result<BufferedSnapshot<FdRef<'static>>> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let (reader, writer) = socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        if self.send_rest(&writer)? < self.bytes.len() - self.sent {
            return Err(Errno::NOSPC.into());
        }
        Ok(BufferedSnapshot::Passing(FdRef::Owned(reader)))
    }

    /// Takes the bytes and the descriptors out of the socket of a snapshot.
    ///
    /// # Errors
    /// recvmsg(2)'s, and when something is missing.
    pub fn restore(socket: &OwnedFd, room: &PassedRoom) -> io::Result<Box<Self>> {
        let (mut bytes, mut filled, mut descriptors) = (vec![0; COPY_SIZE], 0, Vec::new());
        while filled < COPY_SIZE {
            let rest = &mut bytes[filled..];
            let message = receive_passed(socket, rest, Some(&mut descriptors))?;
            if message.is_truncated {
                return Err(Errno::MFILE.into());
            }
            if message.bytes == 0 {
                break;
            }
            filled += message.bytes;
        }
        bytes.truncate(filled);
        if bytes.is_empty() {
            return Err(Errno::INVAL.into());
        }
        Ok(Self::new(bytes, room.hold(descriptors)))
    }
}

/// How long the kernel may refuse descriptors in flight.
const REFUSED_MAX: Duration = Duration::from_secs(1);

/// The pauses between attempts. No event tells when descriptors in flight have been received.
const PAUSES: Backoff = Backoff::new(Duration::from_millis(5), Duration::from_millis(50));

#[cfg(test)]
mod tests {
    use rustix::fs::{MemfdFlags, OFlags, fcntl_getfl, memfd_create};
    use rustix::io::{FdFlags, fcntl_getfd};
    use tokio::time::advance;

    use super::*;
    use crate::limits::passed::PassedLimits;
    use crate::socket::file_id::FileId;

    #[tokio::test(start_paused = true)]
    async fn a_pause_ends_and_its_series_goes_on() {
        let mut pause = Pause::default();
        assert!(!pause.is_running() && !pause.has_lasted(Duration::ZERO));
        pause.begin();
        let first = pause.until().unwrap() - Instant::now();
        assert!(pause.is_running() && pause.has_lasted(Duration::ZERO));
        advance(first).await;
        assert!(!pause.is_running() && pause.has_lasted(first));
        pause.begin();
        assert!(pause.is_running() && pause.until().unwrap() > Instant::now());
        pause.cut_short();
        assert!(!pause.is_running() && pause.has_lasted(first) && !pause.has_lasted(first * 2));
    }

    #[test]
    fn a_message_is_restored_with_its_descriptors() {
        let room = PassedRoom::new(PassedLimits { message: 8, all: 16, threads: 1 });
        let ids = |fds: &PassedFds| -> Vec<_> {
            fds.as_fds().into_iter().map(|fd| FileId::of(fd).unwrap()).collect()
        };
        let all: Vec<_> = (0..COPY_SIZE).map(|at| at as u8).collect();
        for sent in [0, 100] {
            let files = (0..2).map(|_| memfd_create(c"", MemfdFlags::CLOEXEC).unwrap()).collect();
            // They go with the first byte.
            let descriptors = Some(room.hold(files)).filter(|_| sent == 0);
            let before = descriptors.as_ref().map(ids).unwrap_or_default();
            let passing = Passing { bytes: all.clone(), sent, descriptors };
            let Ok(BufferedSnapshot::Passing(FdRef::Owned(socket))) = passing.snapshot() else {
                panic!("no snapshot");
            };
            assert_eq!(fcntl_getfd(&socket).unwrap(), FdFlags::CLOEXEC);
            assert!(fcntl_getfl(&socket).unwrap().contains(OFlags::NONBLOCK));
            drop(passing);
            let restored = Passing::restore(&socket, &room).unwrap();
            assert!(restored.bytes == all[sent..] && !restored.is_sent());
            assert_eq!(restored.descriptors.as_ref().map(ids), Some(before));
            assert!(Passing::restore(&socket, &room).is_err());
        }
    }
}
