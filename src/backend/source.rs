//! `--source=client`: connections and sessions come to the backend from the client's IP address.
//!
//! What Linux does, as far as it matters here:
//!
//! - **IPv4**: bind(2) to an address that is not local fails with EADDRNOTAVAIL, unless the socket
//!   has IP_TRANSPARENT, which needs CAP_NET_RAW or CAP_NET_ADMIN. IP_FREEBIND is not enough:
//!   bind(2) succeeds, but connect(2) fails with ENETUNREACH.
//! - **IPv6**: IPV6_FREEBIND, which needs no capability, is enough for bind(2), connect(2) and the
//!   answers. Without it, and without IPV6_TRANSPARENT, bind(2) fails with EADDRNOTAVAIL.
//! - A route of type local in the table `local` makes its addresses local (`ip route add local
//!   0.0.0.0/0 dev lo`). IPv4 then needs neither option; IPv6 still needs one of them.
//! - If no route leads the answers back, TCP times out, and UDP answers are lost.
//! - With IP_BIND_ADDRESS_NO_PORT, connect(2) picks the port. For TCP it must be unused only for
//!   this pair of addresses: one client may have as many connections to a backend as
//!   `net.ipv4.ip_local_port_range` has ports.

use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};

use rustix::io::Errno;
use rustix::net::sockopt::set_ipv6_freebind;
use socket2::{SockAddr, Socket};

use crate::socket::address::{Address, canonical};
use crate::socket::sys::set_bind_address_no_port;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum IpFamily {
    V4,
    V6,
}

impl IpFamily {
    pub fn of(address: SocketAddr) -> Self {
        if canonical(address).is_ipv4() { Self::V4 } else { Self::V6 }
    }

    /// Whether an address belongs to the family.
    pub fn has(self, address: &Address) -> bool {
        matches!(address, Address::Inet(address) if Self::of(*address) == self)
    }
}

impl fmt::Display for IpFamily {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
        })
    }
}

/// How sockets get the addresses of clients.
#[derive(Clone, Copy, Debug)]
pub struct ClientSources {
    /// Whether this process may set IP_TRANSPARENT.
    pub is_transparent: bool,
}

impl ClientSources {
    /// Returns what the backend sees of a client; `None` for a client without an IP address, for
    /// which the proxy connects from its own.
    pub fn of(self, client: &Address) -> Option<SourceAddress> {
        let Address::Inet(client) = client else { return None };
        let mut address = canonical(*client);
        address.set_port(0);
        Some(SourceAddress { address, is_transparent: self.is_transparent })
    }
}

/// The IP address of a client, from which a socket connects. This machine need not have it.
#[derive(Clone, Copy, Debug)]
pub struct SourceAddress {
    /// Never an IPv4-mapped one.
    address: SocketAddr,
    is_transparent: bool,
}

impl SourceAddress {
    pub fn family(&self) -> IpFamily {
        IpFamily::of(self.address)
    }

    /// Returns the entry of `by_family`, for IPv4 and for IPv6, that belongs to the family of
    /// `from`, or `any` for a client without an IP address.
    pub fn choose<'a, T>(from: Option<&Self>, by_family: Option<&'a [T; 2]>, any: &'a T) -> &'a T {
        match (by_family, from.map(Self::family)) {
            (Some([ipv4, _]), Some(IpFamily::V4)) => ipv4,
            (Some([_, ipv6]), Some(IpFamily::V6)) => ipv6,
            _ => any,
        }
    }

    /// Returns the address of `target` for connect(2), from the address `from` if there is one.
    ///
    /// # Errors
    /// That of [`Address::to_sockaddr`].
    pub fn sockaddr(from: Option<&Self>, target: &Address) -> io::Result<SockAddr> {
        match (from, target) {
            (Some(_), Address::Inet(target)) => Ok(Self::destination(*target).into()),
            _ => target.to_sockaddr(),
        }
    }

    /// Returns the address by which a bound socket reaches `target`.
    ///
    /// From a bound socket, connect(2) to 0.0.0.0 or :: goes to the address that it is bound to,
    /// here the client's. So the loopback address is given instead. An IPv4-mapped address becomes
    /// one of IPv4, as the client's is.
    pub fn destination(target: SocketAddr) -> SocketAddr {
        let mut target = canonical(target);
        match target.ip() {
            IpAddr::V4(ip) if ip.is_unspecified() => target.set_ip(Ipv4Addr::LOCALHOST.into()),
            IpAddr::V6(ip) if ip.is_unspecified() => target.set_ip(Ipv6Addr::LOCALHOST.into()),
            _ => {}
        }
        target
    }

    /// Binds a socket that is about to connect to `destination`.
    ///
    /// # Errors
    /// Those of setsockopt(2) and bind(2), one of which fails if the socket is of another family.
    pub fn bind(&self, socket: &Socket, destination: &SockAddr) -> io::Result<()> {
        set_bind_address_no_port(socket)?;
        match (self.family(), self.is_transparent) {
            (IpFamily::V4, true) => socket.set_ip_transparent_v4(true)?,
            (IpFamily::V6, true) => socket.set_ip_transparent_v6(true)?,
            (IpFamily::V4, false) => {}
            (IpFamily::V6, false) => set_ipv6_freebind(socket, true)?,
        }
        socket.bind(&self.on_interface_of(destination).into())
    }

    /// Returns the address to bind to. A link-local address ties the socket to an interface, which
    /// must be the one that leads to the destination. The client may have come by another.
    fn on_interface_of(&self, destination: &SockAddr) -> SocketAddr {
        let (SocketAddr::V6(own), Some(to)) = (self.address, destination.as_socket_ipv6()) else {
            return self.address;
        };
        let scope = match (own.scope_id(), to.scope_id()) {
            (0, _) => 0,
            _ if to.ip().is_loopback() => LOOPBACK_INTERFACE,
            (own, 0) => own,
            (_, to) => to,
        };
        SocketAddrV6::new(*own.ip(), 0, 0, scope).into()
    }

    /// Checks that a connected socket has this address. bind(2) also takes a broadcast or multicast
    /// address, and connect(2) then picks one of this machine's.
    ///
    /// # Errors
    /// EINVAL: the backend would take the client for the proxy.
    pub fn check(&self, local: SocketAddr) -> io::Result<()> {
        match local.ip() == self.address.ip() {
            true => Ok(()),
            false => Err(Errno::INVAL.into()),
        }
    }
}

/// The index of `lo` in each network namespace.
const LOOPBACK_INTERFACE: u32 = 1;

#[cfg(test)]
mod tests {
    use super::*;

    fn source(client: &str) -> SourceAddress {
        let client = Address::Inet(client.parse().unwrap());
        ClientSources { is_transparent: false }.of(&client).unwrap()
    }

    #[test]
    fn source_is_the_canonical_address_of_a_client() {
        for (client, family, address) in [
            ("203.0.113.7:5", IpFamily::V4, "203.0.113.7:0"),
            ("[::ffff:203.0.113.7]:5", IpFamily::V4, "203.0.113.7:0"),
            ("[2001:db8::7]:5", IpFamily::V6, "[2001:db8::7]:0"),
            ("[fe80::7%3]:5", IpFamily::V6, "[fe80::7%3]:0"),
        ] {
            let source = source(client);
            assert_eq!((source.family(), source.address.to_string()), (family, address.into()));
        }
        for client in [Address::Unnamed, Address::Vsock { cid: 3, port: 80 }] {
            assert!(ClientSources { is_transparent: true }.of(&client).is_none());
        }
    }

    #[test]
    fn link_local_client_is_bound_to_the_interface_of_the_backend() {
        let bound = |client, to: &str| {
            let to: SocketAddr = to.parse().unwrap();
            source(client).on_interface_of(&to.into()).to_string()
        };
        assert_eq!(bound("[fe80::7%3]:5", "[::1]:80"), "[fe80::7%1]:0");
        assert_eq!(bound("[fe80::7%3]:5", "[fe80::1%4]:80"), "[fe80::7%4]:0");
        assert_eq!(bound("[fe80::7%3]:5", "[2001:db8::1]:80"), "[fe80::7%3]:0");
        assert_eq!(bound("[2001:db8::7]:5", "[::1]:80"), "[2001:db8::7]:0");
    }

    #[test]
    fn unspecified_destination_is_the_loopback_address() {
        for (target, destination) in [
            ("0.0.0.0:80", "127.0.0.1:80"),
            ("[::]:80", "[::1]:80"),
            ("[::ffff:127.0.0.2]:80", "127.0.0.2:80"),
            ("[fe80::1%4]:80", "[fe80::1%4]:80"),
        ] {
            let found = SourceAddress::destination(target.parse().unwrap());
            assert_eq!(found.to_string(), destination);
        }
    }
}
