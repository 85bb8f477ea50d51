//! Datagram sockets at which clients arrive: UDP and Unix.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::io::{Errno, ioctl_fionbio};
use rustix::net::{SocketType, sockopt};
use socket2::{Domain, SockRef};

use crate::listen::accepted::ListenerInfo;
use crate::listen::activation::PassedFd;
use crate::listen::listener::passed_error;
use crate::listen::stored::SocketFile;
use crate::socket::address::{Address, SocketKind, SocketLabel};
use crate::socket::{Family, mmsg};

/// A bound datagram socket.
#[derive(Debug)]
pub struct DatagramListener {
    fd: OwnedFd,
    pub label: SocketLabel,
    pub info: Arc<ListenerInfo>,
    pub is_unix: bool,
    /// The socket file that this program created.
    file: Option<SocketFile>,
}

impl DatagramListener {
    /// Returns whether a passed socket is a datagram socket.
    pub fn is_datagram(passed: &PassedFd) -> bool {
        sockopt::socket_type(&passed.fd).is_ok_and(|found| found == SocketType::DGRAM)
    }

    /// # Errors
    /// A line for the log on a socket that is not usable.
    pub fn from_passed(passed: PassedFd) -> Result<Self, String> {
        let PassedFd { fd, name } = passed;
        if SockRef::from(&fd).peer_addr().is_ok() {
            return Err(format!(
                "Passed in socket {name} is connected: its datagrams come from one peer. (Write \
                 Accept=no in the .socket unit.)"
            ));
        }
        Self::from_fd(fd, Some(name.clone()), None).map_err(|error| passed_error(&name, &error))
    }

    /// Takes a bound socket and its socket file.
    ///
    /// # Errors
    /// The system's error, or EAFNOSUPPORT for a family other than IP and Unix.
    pub fn from_fd(
        fd: OwnedFd,
        name: Option<String>,
        file: Option<SocketFile>,
    ) -> io::Result<Self> {
        let is_unix = match Family::of(&fd)? {
            Some(Family::Tcp) => false,
            Some(Family::Unix) => true,
            Some(Family::Vsock) | None => return Err(Errno::AFNOSUPPORT.into()),
        };
        ioctl_fionbio(&fd, true)?;
        let socket = SockRef::from(&fd);
        let address = Address::from_sockaddr(&socket.local_addr()?);
        if is_unix {
            raise_send_buffer(&fd);
        } else {
            mmsg::set_options(&fd, socket.domain()? == Domain::IPV6, address.is_unspecified());
        }
        let label = SocketLabel { name, kind: SocketKind::Datagram, address };
        let info = ListenerInfo::new(&label);
        Ok(Self { fd, info, label, is_unix, file })
    }

    /// Returns the socket file that this program created.
    pub fn file(&self) -> Option<&SocketFile> {
        self.file.as_ref()
    }
}

/// Raises the send buffer of a Unix listener. Answers that a client has not read stay in the buffer
/// of the socket that has sent them, and all clients share this one.
fn raise_send_buffer(fd: &OwnedFd) {
    let current = sockopt::socket_send_buffer_size(fd).unwrap_or(usize::MAX);
    if current < ANSWERS_MAX && sockopt::set_socket_send_buffer_size_force(fd, ANSWERS_MAX).is_err()
    {
        // Without CAP_NET_ADMIN net.core.wmem_max is the limit.
        let _ = sockopt::set_socket_send_buffer_size(fd, ANSWERS_MAX);
    }
}

/// Memory for answers that Unix clients have not read.
const ANSWERS_MAX: usize = 8 << 20;

impl Drop for DatagramListener {
    /// Another program may get the socket next, and not expect several datagrams in one buffer.
    fn drop(&mut self) {
        if !self.is_unix {
            mmsg::set_gro(&self.fd, false);
        }
    }
}

impl AsFd for DatagramListener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl fmt::Display for DatagramListener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.label.fmt(f)
    }
}
