//! A connection that was accepted before the start: by systemd (`Accept=yes`) or by inetd.

use std::os::fd::OwnedFd;

use rustix::net::{SocketType, sockopt};
use socket2::SockRef;

use crate::limits::descriptors::FdPermit;
use crate::limits::slot::Slot;
use crate::listen::accepted::{Accepted, ListenerInfo};
use crate::listen::activation::{PassedFd, STDIN};
use crate::listen::listener::{configure, passed_error};
use crate::socket::address::{Address, SocketKind, SocketLabel};
use crate::socket::{Family, Keepalive, add_no_credentials};

/// A stream socket that is connected to a client.
#[derive(Debug)]
pub struct PassedConnection {
    fd: OwnedFd,
    family: Family,
    /// The client's address; `None` if the client has gone.
    peer: Option<Address>,
    pub label: SocketLabel,
}

impl PassedConnection {
    /// Returns whether a passed socket is a connection, and not a listener.
    ///
    /// A client that has gone leaves a socket without a peer. Such a socket has a pending error,
    /// which this call clears, or it is bound and has the name of a connection.
    pub fn is_connected(passed: &PassedFd) -> bool {
        let PassedFd { fd, name } = passed;
        let is_stream = sockopt::socket_type(fd).is_ok_and(|found| found == SocketType::STREAM);
        let listens = sockopt::socket_acceptconn(fd).unwrap_or(false);
        let socket = SockRef::from(fd);
        let is_bound = || {
            let address = socket.local_addr().ok().and_then(|address| address.as_socket());
            address.is_some_and(|address| address.port() != 0)
        };
        let had_peer = || {
            sockopt::socket_error(fd).is_ok_and(|error| error.is_err())
                || is_bound() && [CONNECTION, STDIN].contains(&&**name)
        };
        is_stream && !listens && (socket.peer_addr().is_ok() || had_peer())
    }

    /// # Errors
    /// A line for the log on why the socket is not usable.
    pub fn from_passed(passed: PassedFd) -> Result<Self, String> {
        let PassedFd { fd, name } = passed;
        let (family, address) = configure(&fd).map_err(|error| passed_error(&name, &error))?;
        if family == Family::Unix {
            add_no_credentials(&fd);
        }
        let peer = SockRef::from(&fd).peer_addr().ok();
        let peer = peer.map(|address| Address::from_sockaddr(&address));
        let label = SocketLabel { name: Some(name), kind: SocketKind::Stream, address };
        Ok(Self { fd, family, peer, label })
    }

    pub fn set_keepalive(&self, keepalive: Keepalive) {
        if self.family == Family::Tcp {
            keepalive.set(&self.fd);
        }
    }

    /// Returns what a listener would have accepted, or `None` if the client has gone.
    pub fn into_accepted(self, descriptors: FdPermit) -> Option<Accepted> {
        let listener = ListenerInfo::new(&self.label);
        let slot = Slot::new(listener.count_open(), descriptors);
        let Self { fd, family, peer, .. } = self;
        Some(Accepted { socket: fd, family, client: peer?, listener, slot })
    }
}

/// systemd's name for a connection (sd_listen_fds_with_names(3)).
const CONNECTION: &str = "connection";
