//! What is stored of a connection, as plain data. `persist` makes a snapshot and restores a
//! forwarder from it; `handover::encoding` makes bytes of it.
//!
//! The order of fields and variants is the stored format: a change needs another `VERSION` in
//! `handover::encoding`.
//!
//! The forwarder knows neither systemd nor the bytes that are stored. In crash mode it keeps its
//! snapshot current in a [`SnapshotStore`], which the handover implements.

use std::fmt;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use serde::{Deserialize, Serialize};

/// The size of the copy buffer, and the most bytes of a stored file. It is larger than the 16 KiB
/// that most protocols write at once: such a message leaves the buffer unfilled, so no second
/// receive follows.
pub const COPY_SIZE: usize = 32 * 1024;

/// A side of a connection. As the index of a flow: the side at which the flow starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Side {
    /// The peer that connected to a listener.
    Client,
    /// The peer that the proxy connected to.
    Backend,
}

pub const SIDES: [Side; 2] = [Side::Client, Side::Backend];

impl Side {
    pub const fn other(self) -> Self {
        match self {
            Self::Client => Self::Backend,
            Self::Backend => Self::Client,
        }
    }
}

/// Whether and how a flow has ended: see "How a flow ends" in `forward`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum FlowState {
    /// Bytes may come.
    #[default]
    Open,
    /// The source's FIN was passed on.
    Ended,
    /// The source was reset.
    SourceReset,
    /// The sink accepts no more bytes.
    SinkClosed {
        /// Bytes of the source stay undelivered.
        lost: bool,
    },
}

/// A connection and its buffered bytes. The arrays are indexed by [`Side`].
#[derive(Debug, Serialize, Deserialize)]
pub struct Snapshot<Fd> {
    /// The client's socket and the backend's.
    pub endpoints: [EndpointSnapshot<Fd>; 2],
    /// The flow from the client, and the flow from the backend.
    pub flows: [FlowSnapshot<Fd>; 2],
    /// Length of the PROXY header in bytes, which counts as the client's.
    pub header_len: u16,
    /// The first error of a socket, as a number of errno(3).
    pub fault: Option<(Side, i32)>,
}

impl<Fd> Snapshot<Fd> {
    /// Returns the snapshot with the results of `map` in place of its descriptors, which are mapped
    /// in the order in which a message has them.
    pub fn map_fds<'a, T>(&'a self, mut map: impl FnMut(&'a Fd) -> T) -> Snapshot<T> {
        let endpoints = self.endpoints.each_ref().map(|end| EndpointSnapshot {
            socket: map(&end.socket),
            reset: end.reset,
            gone: end.gone,
        });
        let flows = self.flows.each_ref().map(|flow| FlowSnapshot {
            state: flow.state,
            delivered: flow.delivered,
            buffered: match &flow.buffered {
                BufferedSnapshot::Nothing => BufferedSnapshot::Nothing,
                BufferedSnapshot::Copied(file) => BufferedSnapshot::Copied(map(file)),
                BufferedSnapshot::Piped { read, write } => {
                    BufferedSnapshot::Piped { read: map(read), write: map(write) }
                }
                BufferedSnapshot::Passing(socket) => BufferedSnapshot::Passing(map(socket)),
            },
        });
        Snapshot { endpoints, flows, header_len: self.header_len, fault: self.fault }
    }
}

/// A socket, and what can no longer be read from it.
#[derive(Debug, Serialize, Deserialize)]
pub struct EndpointSnapshot<Fd> {
    /// The socket.
    pub socket: Fd,
    /// Its stream ended with a reset, not with a FIN.
    pub reset: bool,
    /// Its peer is gone.
    pub gone: bool,
}

/// One direction.
#[derive(Debug, Serialize, Deserialize)]
pub struct FlowSnapshot<Fd> {
    /// Whether and how it has ended.
    pub state: FlowState,
    /// Bytes the sink accepted.
    pub delivered: u64,
    /// Bytes received and not yet delivered.
    pub buffered: BufferedSnapshot<Fd>,
}

/// Where the bytes are that a flow has received and not yet delivered.
#[derive(Debug, Serialize, Deserialize)]
pub enum BufferedSnapshot<Fd> {
    /// There are none.
    Nothing,
    /// In a file without a name.
    Copied(Fd),
    /// In a pipe, which may be empty.
    Piped {
        /// The pipe's read end.
        read: Fd,
        /// The pipe's write end.
        write: Fd,
    },
    /// In the queue of a Unix socket, with the descriptors that the source has passed.
    Passing(Fd),
}

/// A descriptor of a snapshot that is to be stored.
#[derive(Debug)]
pub enum FdRef<'a> {
    /// A descriptor of the forwarder's.
    Borrowed(BorrowedFd<'a>),
    /// A descriptor made for the snapshot.
    Owned(OwnedFd),
}

impl AsFd for FdRef<'_> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Borrowed(fd) => *fd,
            Self::Owned(fd) => fd.as_fd(),
        }
    }
}

/// The stored form of one connection, kept current for as long as the connection lives (crash
/// mode).
pub trait SnapshotStore: fmt::Debug {
    /// Stores the connection as it stands now. Returns whether there was room.
    fn update(&self, snapshot: Snapshot<FdRef<'_>>) -> bool;

    /// Makes sure the connection is not restored. Returns whether that could be stored.
    fn forget(self: Box<Self>) -> bool;

    /// Keeps the stored form when the process ends.
    fn detach(self: Box<Self>);
}
