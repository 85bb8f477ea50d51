//! The PROXY protocol header, which tells the backend the client's address.
//!
//! The format is that of HAProxy's proxy-protocol.txt. The header is sent as systemd-socket-proxyd
//! sends it.

use std::net::SocketAddr;
use std::os::unix::ffi::OsStrExt;

use clap::ValueEnum;
use ppp::{v1, v2};

use crate::socket::address::{Address, canonical};

/// A version of the header.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ProxyProtocol {
    /// One line of text, at most 107 bytes.
    V1,
    /// Binary, at most 232 bytes here.
    V2,
}

impl ProxyProtocol {
    /// Returns the bytes that go to the backend ahead of the client's.
    ///
    /// `client` is the connection's peer, `listener` the address it connected to. Version 1 knows
    /// TCP. Version 2 also knows Unix sockets with a name. For other clients the header says that
    /// the address is unknown.
    pub fn header(self, client: &Address, listener: &Address) -> Vec<u8> {
        match self {
            Self::V1 => {
                let addresses = inet(client, listener).map(v1::Addresses::from);
                addresses.unwrap_or_default().to_string().into_bytes()
            }
            Self::V2 => v2_header(v2::Protocol::Stream, client, listener),
        }
    }
}

/// Returns the version 2 header that stands in front of each datagram.
///
/// `listener` is the address that the client has sent to.
pub fn datagram_header(client: &Address, listener: &Address) -> Vec<u8> {
    v2_header(v2::Protocol::Datagram, client, listener)
}

/// Returns the IP addresses of both sides. An IPv4 client of a dual-stack listener is an IPv4
/// client.
fn inet(client: &Address, listener: &Address) -> Option<(SocketAddr, SocketAddr)> {
    let (Address::Inet(client), Address::Inet(listener)) = (client, listener) else { return None };
    Some((canonical(*client), canonical(*listener)))
}

fn v2_header(protocol: v2::Protocol, client: &Address, listener: &Address) -> Vec<u8> {
    use v2::{Addresses, Command, Protocol, Unix, Version};
    let addresses = match (client, listener) {
        (Address::Path(_) | Address::Abstract(_), _) => {
            Addresses::Unix(Unix::new(sun_path(client), sun_path(listener)))
        }
        _ => inet(client, listener).map_or(Addresses::Unspecified, Addresses::from),
    };
    // LOCAL: the receiver takes the connection's own addresses.
    let (command, protocol) = match addresses {
        Addresses::Unspecified => (Command::Local, Protocol::Unspecified),
        _ => (Command::Proxy, protocol),
    };
    let header = v2::Builder::with_addresses(Version::Two | command, protocol, addresses).build();
    header.expect("the length of addresses fits into two bytes")
}

/// Returns `sun_path` as the kernel has it, all zero for an unnamed socket.
fn sun_path(address: &Address) -> [u8; 108] {
    let mut path = [0; 108];
    let (start, name) = match address {
        Address::Path(name) => (0, name.as_os_str().as_bytes()),
        Address::Abstract(name) => (1, &name[..]),
        _ => return path,
    };
    let room = &mut path[start..];
    let length = name.len().min(room.len());
    room[..length].copy_from_slice(&name[..length]);
    path
}

#[cfg(test)]
mod tests {
    use super::*;

    fn v1(client: &str, listener: &str) -> String {
        let inet = |text: &str| Address::Inet(text.parse().unwrap());
        String::from_utf8(ProxyProtocol::V1.header(&inet(client), &inet(listener))).unwrap()
    }

    #[test]
    fn version_1_is_one_line() {
        assert_eq!(
            v1("192.0.2.1:4000", "192.0.2.2:80"),
            "PROXY TCP4 192.0.2.1 192.0.2.2 4000 80\r\n"
        );
        assert_eq!(
            v1("[2001:db8::1]:4000", "[2001:db8::2]:80"),
            "PROXY TCP6 2001:db8::1 2001:db8::2 4000 80\r\n"
        );
        assert_eq!(
            v1("[::ffff:192.0.2.1]:4000", "[::ffff:192.0.2.2]:80"),
            "PROXY TCP4 192.0.2.1 192.0.2.2 4000 80\r\n"
        );
        let unix = Address::Unnamed;
        assert_eq!(ProxyProtocol::V1.header(&unix, &unix), b"PROXY UNKNOWN\r\n");
    }

    #[test]
    fn version_2_is_binary() {
        let inet = |text: &str| Address::Inet(text.parse().unwrap());
        let header = |client: &Address, listener: &Address| {
            let header = ProxyProtocol::V2.header(client, listener);
            assert_eq!(header[..12], *b"\r\n\r\n\0\r\nQUIT\n");
            header[12..].to_vec()
        };
        // PROXY over version 2, TCP over IPv4, 12 bytes.
        let ipv4 = [0x21, 0x11, 0, 12, 192, 0, 2, 1, 192, 0, 2, 2, 0x0f, 0xa0, 0, 80];
        assert_eq!(header(&inet("192.0.2.1:4000"), &inet("192.0.2.2:80")), ipv4);
        let mapped = header(&inet("[::ffff:192.0.2.1]:4000"), &inet("[::ffff:192.0.2.2]:80"));
        assert_eq!(mapped, ipv4);
        let ipv6 = header(&inet("[2001:db8::1]:4000"), &inet("[2001:db8::2]:80"));
        assert_eq!(ipv6[..4], [0x21, 0x21, 0, 36]);
        assert_eq!(ipv6.len(), 4 + 36);
        // Unix streams: two paths of 108 bytes.
        let path = Address::Path("/run/a".into());
        let unix = header(&Address::Abstract(b"client".into()), &path);
        assert_eq!(unix[..4], [0x21, 0x31, 0, 216]);
        assert_eq!(unix[4..12], *b"\0client\0");
        assert_eq!(unix[112..119], *b"/run/a\0");
        let unnamed = header(&Address::Path("/run/b".into()), &Address::Unnamed);
        assert_eq!(unnamed[112..], [0; 108]);
        // LOCAL, without addresses.
        assert_eq!(header(&Address::Unnamed, &path), [0x20, 0, 0, 0]);
        let vsock = Address::Vsock { cid: 3, port: 4 };
        assert_eq!(header(&vsock, &vsock), [0x20, 0, 0, 0]);
    }
}
