//! Families, and the addresses on both sides of a proxy.

use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::atomic::AtomicU16;
use std::sync::atomic::Ordering::Relaxed;

use socket2::{Domain, SockAddr, Socket, Type};

/// The families on both sides of the proxy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Family {
    Tcp,
    Unix,
    Udp,
}

impl Family {
    fn socket_type(self) -> Type {
        if self == Self::Udp { Type::DGRAM } else { Type::STREAM }
    }
}

/// A listening socket of a family. Its port is one of servers, which connect(2) does not pick by
/// default.
pub(crate) fn listener(family: Family, directory: &Path) -> (Socket, SockAddr) {
    static PORTS: AtomicU16 = AtomicU16::new(0);
    let (domain, socket_type) = match family {
        Family::Tcp | Family::Udp => (Domain::IPV4, family.socket_type()),
        Family::Unix => (Domain::UNIX, Type::STREAM),
    };
    let socket = Socket::new(domain, socket_type, None).expect("a socket");
    if family == Family::Unix {
        let address = SockAddr::unix(directory.join("socket")).expect("a short path");
        socket.bind(&address).expect("a free address");
    } else {
        let mut ports = (0..10_000).map(|_| 20_000 + PORTS.fetch_add(1, Relaxed) % 10_000);
        let bind = |port| socket.bind(&SocketAddr::from(([127, 0, 0, 1], port)).into()).ok();
        ports.find_map(bind).expect("a free port");
    }
    if family != Family::Udp {
        socket.listen(4096).expect("a listener");
    }
    let address = socket.local_addr().expect("an address");
    (socket, address)
}

/// As it is written on command lines.
pub(crate) fn written(address: &SockAddr) -> String {
    match address.as_socket() {
        Some(address) => address.to_string(),
        None => address.as_pathname().expect("a path").display().to_string(),
    }
}

/// Returns an address that nothing has.
pub(crate) fn free_address(family: Family, directory: &Path) -> SockAddr {
    let (socket, address) = listener(family, directory);
    drop(socket);
    if family == Family::Unix {
        let _ = fs::remove_file(directory.join("socket"));
    }
    address
}
