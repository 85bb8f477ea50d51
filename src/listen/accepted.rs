//! A connection that was accepted by somebody else: by systemd (`Accept=yes`), or by inetd.

use std::io;
use std::os::fd::OwnedFd;

use rustix::net::{SocketType, sockopt};
use socket2::SockRef;

use crate::limits::descriptors::FdPermit;
use crate::limits::slot::Slot;
use crate::listen::activation::{PassedFd, STDIN};
use crate::listen::listener::{Accepted, ListenerInfo, prepare};
use crate::logging::os_message;
use crate::socket::address::{Address, SocketLabel};
use crate::socket::{Family, Keepalive};

/// What systemd calls it, sd_listen_fds_with_names(3).
const CONNECTION: &str = "connection";

/// A stream socket with a client at its other end.
#[derive(Debug)]
pub struct AcceptedSocket {
    fd: OwnedFd,
    family: Family,
    /// None if they have gone.
    peer: Option<Address>,
    identity: SocketLabel,
}

impl AcceptedSocket {
    /// Whether a passed socket is one, and not a listener. If its client has gone by now, it has no
    /// peer any more, but an error, which this takes from it, or the name of a connection.
    pub fn is_connected(inherited: &PassedFd) -> bool {
        let PassedFd { fd, name } = inherited;
        let is_stream = sockopt::socket_type(fd).is_ok_and(|it| it == SocketType::STREAM);
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

    /// Takes it.
    ///
    /// # Errors
    /// One line on what is wrong with it.
    pub fn adopt(inherited: PassedFd) -> Result<Self, String> {
        let PassedFd { fd, name } = inherited;
        let adopted = Self::from_fd(fd, name.clone());
        adopted
            .map_err(|error| format!("Failed to use passed socket {name}: {}.", os_message(&error)))
    }

    fn from_fd(fd: OwnedFd, name: String) -> io::Result<Self> {
        let (family, address) = prepare(&fd)?;
        let peer = SockRef::from(&fd).peer_addr().ok().map(|it| Address::from_sockaddr(&it));
        Ok(Self { fd, family, peer, identity: SocketLabel { name: Some(name), address } })
    }

    /// Its name, and this side's address.
    pub fn identity(&self) -> &SocketLabel {
        &self.identity
    }

    /// Has a TCP client probed from now on.
    pub fn keep_alive(&self, keepalive: Keepalive) {
        if self.family == Family::Tcp {
            keepalive.set_or_warn(&self.fd);
        }
    }

    /// As if they had just been accepted; `None` if they have gone.
    pub fn into_accepted(self, descriptors: FdPermit) -> Option<Accepted> {
        let listener = ListenerInfo::new(&self.identity);
        let slot = Slot::new(listener.enter(), descriptors);
        let Self { fd, family, peer, .. } = self;
        Some(Accepted { socket: fd, family, client: peer?, listener, slot })
    }
}
