//! The kinds of work, and the rows of the comparison.

use serde::{Deserialize, Serialize};

use crate::addresses::Family;
use crate::contender::{Contender, Kind, OURS, User};

/// A kind of work.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Work {
    /// Bytes from the clients to the backend, as many as go.
    BulkUp(usize),
    /// Bytes from the backend to the clients.
    BulkDown(usize),
    /// Messages of so many bytes, each answered, on so many connections.
    RoundTrips(usize, usize),
    /// Small messages beside so many connections of bulk, whose bytes are the work.
    Beside(usize),
    /// Bytes from one client to the backend, beside so many receivers that have stopped reading.
    BesideStalled(usize),
    /// Connect, 64 bytes there and back, close.
    Short,
    /// So many connections that are idle after one message.
    Idle(usize),
    /// From exec(2) to the answer of a client that was queued.
    Activation,
    /// From the connect to the answer of an application that is not running.
    ColdStart,
    /// From the connect to the answer of an application that is frozen.
    Thaw,
    /// Datagrams of so many bytes, each answered, on so many sessions.
    Datagrams(usize, usize),
    /// Datagrams of 1,200 bytes from one client to the backend, so many in a buffer, as many as are
    /// not lost.
    DatagramsUp(usize),
    /// From the first datagram to the answer of an application that is not running.
    DatagramColdStart,
}

/// A row of the comparison.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Row {
    pub(crate) name: &'static str,
    pub(crate) about: &'static str,
    pub(crate) work: Work,
    pub(crate) user: User,
}

/// A unit of work.
#[derive(Clone, Copy, Debug, Deserialize, Serialize)]
pub(crate) enum Unit {
    RoundTrip,
    Connection,
    Gigabyte,
    Datagram,
    Start,
    Answer,
}

impl Unit {
    /// Names the cost of a unit.
    pub(crate) fn words(self) -> &'static str {
        match self {
            Self::RoundTrip => "CPU µs per round trip",
            Self::Connection => "CPU µs per connection",
            Self::Gigabyte => "CPU s per GB",
            Self::Datagram => "CPU µs per datagram",
            Self::Start => "ms from exec to answer",
            Self::Answer => "ms from connect to answer",
        }
    }

    pub(crate) fn symbol(self) -> &'static str {
        match self {
            Self::RoundTrip | Self::Connection | Self::Datagram => "µs",
            Self::Gigabyte => "s/GB",
            Self::Start | Self::Answer => "ms",
        }
    }

    /// Writes a cost in seconds as a number of what the symbol says.
    pub(crate) fn number(self, seconds: f64) -> String {
        match self {
            Self::RoundTrip | Self::Connection => format!("{:.1}", seconds * 1e6),
            Self::Datagram => format!("{:.2}", seconds * 1e6),
            Self::Gigabyte => format!("{seconds:.2}"),
            Self::Start | Self::Answer => format!("{:.2}", seconds * 1e3),
        }
    }
}

/// All rows.
pub(crate) const ROWS: [Row; 34] = {
    use Work::*;
    const fn row(name: &'static str, about: &'static str, work: Work) -> Row {
        Row { name, about, work, user: User::Ourselves }
    }
    [
        row("bulk-up", "4 connections, client to backend", BulkUp(4)),
        row("bulk-down", "4 connections, backend to client", BulkDown(4)),
        row("bulk-1-up", "1 connection, client to backend", BulkUp(1)),
        row("bulk-1-down", "1 connection, backend to client", BulkDown(1)),
        row("64B-1", "64 B round trips, 1 connection", RoundTrips(64, 1)),
        row("64B-100", "64 B round trips, 100 connections", RoundTrips(64, 100)),
        row("64B-1000", "64 B round trips, 1,000 connections", RoundTrips(64, 1000)),
        row("64B-4000", "64 B round trips, 4,000 connections", RoundTrips(64, 4000)),
        row("16K-1", "16 KiB round trips, 1 connection", RoundTrips(16_384, 1)),
        row("16K-100", "16 KiB round trips, 100 connections", RoundTrips(16_384, 100)),
        row("16K-1000", "16 KiB round trips, 1,000 connections", RoundTrips(16_384, 1000)),
        row("1K-50", "1 KiB round trips, 50 connections", RoundTrips(1024, 50)),
        row("4K-50", "4 KiB round trips, 50 connections", RoundTrips(4096, 50)),
        row("32K-50", "32 KiB round trips, 50 connections", RoundTrips(32_768, 50)),
        row("48K-50", "48 KiB round trips, 50 connections", RoundTrips(49_152, 50)),
        row("64K-50", "64 KiB round trips, 50 connections", RoundTrips(65_536, 50)),
        row("256K-50", "256 KiB round trips, 50 connections", RoundTrips(262_144, 50)),
        row(
            "beside-1",
            "1 bulk connection from the backend, and 64 B round trips beside it",
            Beside(1),
        ),
        row(
            "beside-8",
            "8 bulk connections from the backend, and 64 B round trips beside them",
            Beside(8),
        ),
        row(
            "beside-stalled",
            "1 bulk connection beside 500 whose receivers have stopped reading",
            BesideStalled(500),
        ),
        row("short", "connect, 64 B there and back, close", Short),
        row("idle-100", "100 idle connections", Idle(100)),
        row("idle-4000", "4,000 idle connections", Idle(4000)),
        row("idle-8000", "8,000 idle connections", Idle(8000)),
        row("bulk-600", "600 bulk connections", BulkUp(600)),
        Row {
            name: "bulk-600-unprivileged",
            about: "600 bulk connections, the proxy as an unprivileged user",
            work: BulkUp(600),
            user: User::Nobody,
        },
        row("activation", "exec to the answer of a queued client", Activation),
        row("cold start", "connect to the answer of an application that is started", ColdStart),
        row("thaw", "connect to the answer of an application that is frozen", Thaw),
        row("datagrams-100", "64 B datagrams and answers, 100 sessions", Datagrams(64, 100)),
        row("datagrams-9000", "64 B datagrams and answers, 9,000 sessions", Datagrams(64, 9000)),
        row("datagrams-up", "1,200 B datagrams, client to backend, none lost", DatagramsUp(1)),
        row("datagrams-up-16", "the same, 16 in a buffer (UDP_SEGMENT)", DatagramsUp(16)),
        row(
            "datagram cold start",
            "first datagram to the answer of an application that is started",
            DatagramColdStart,
        ),
    ]
};

impl Row {
    pub(crate) fn unit(&self) -> Unit {
        match self.work {
            Work::RoundTrips(..) => Unit::RoundTrip,
            Work::Short | Work::Idle(_) => Unit::Connection,
            Work::Activation => Unit::Start,
            Work::ColdStart | Work::Thaw | Work::DatagramColdStart => Unit::Answer,
            Work::Datagrams(..) => Unit::RoundTrip,
            Work::DatagramsUp(_) => Unit::Datagram,
            Work::BulkUp(_) | Work::BulkDown(_) | Work::Beside(_) | Work::BesideStalled(_) => {
                Unit::Gigabyte
            }
        }
    }

    /// The pairs of families that it runs on.
    pub(crate) fn pairs(&self) -> &'static [(Family, Family)] {
        use Family::{Tcp, Udp, Unix};
        match self.is_datagrams() {
            true => &[(Udp, Udp)],
            false => &[(Tcp, Tcp), (Tcp, Unix), (Unix, Tcp), (Unix, Unix)],
        }
    }

    fn is_datagrams(&self) -> bool {
        matches!(self.work, Work::Datagrams(..) | Work::DatagramsUp(_) | Work::DatagramColdStart)
    }

    /// Whether a contender takes part.
    pub(crate) fn is_for(&self, contender: &Contender) -> bool {
        if !contender.rows.is_empty() && !contender.rows.contains(&self.name) {
            return false;
        }
        let activated = matches!(contender.kind, Kind::Activated(_));
        if self.is_datagrams() {
            let carries_datagrams = contender.kind != Kind::Haproxy
                && !contender.name.starts_with("systemd")
                && !contender.name.ends_with("(half-close)");
            return match self.work {
                Work::DatagramColdStart => contender.name == OURS,
                // Socat has a process for each session.
                Work::Datagrams(_, 9000) => carries_datagrams && contender.kind != Kind::Socat,
                _ => carries_datagrams,
            };
        }
        match self.work {
            Work::Activation => activated,
            Work::ColdStart | Work::Thaw => contender.name == OURS,
            // The originals need more than 20,000 descriptors, for 4,000 connections under work, too;
            // HAProxy's and nginx's configurations allow less.
            Work::Idle(8000) => activated && !contender.name.starts_with("systemd"),
            Work::Idle(_) => contender.kind != Kind::Direct && contender.kind != Kind::Socat,
            _ if self.user == User::Nobody => activated,
            // Socat has a process for each, of which only the first is measured.
            Work::BulkUp(600) | Work::Beside(_) | Work::BesideStalled(_) => {
                contender.kind != Kind::Socat
            }
            Work::RoundTrips(_, 1000) => contender.kind != Kind::Socat,
            Work::RoundTrips(_, 4000) => {
                contender.kind != Kind::Socat && !contender.name.starts_with("systemd")
            }
            _ => true,
        }
    }
}
