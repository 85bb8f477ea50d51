//! The PROXY protocol header that tells the backend who the client is.
//!
//! The format is HAProxy's proxy-protocol.txt; what is sent when is systemd-socket-proxyd's.

#![forbid(unsafe_code)]

use std::net::{IpAddr, SocketAddr};

use ppp::v1::Addresses;

use crate::address::Address;

/// A version of the header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProxyProtocol {
    /// One line of text, at most 107 bytes.
    V1,
}

impl ProxyProtocol {
    /// Reads the value of `--proxy-protocol=`.
    pub fn parse(text: &str) -> Option<Self> {
        (text == "v1").then_some(Self::V1)
    }

    /// The bytes that go to the backend ahead of the client's.
    ///
    /// `client` is the connection's peer, `listener` the address it connected to. Version 1 knows
    /// only TCP; for any other family it says so.
    pub fn header(self, client: &Address, listener: &Address) -> Vec<u8> {
        let addresses = match (client, listener) {
            (Address::Inet(client), Address::Inet(listener)) => v1_addresses(*client, *listener),
            _ => Addresses::Unknown,
        };
        addresses.to_string().into_bytes()
    }
}

/// A dual-stack listener's IPv4 client is an IPv4 client.
fn v1_addresses(client: SocketAddr, listener: SocketAddr) -> Addresses {
    match (client.ip().to_canonical(), listener.ip().to_canonical()) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            Addresses::new_tcp4(source, destination, client.port(), listener.port())
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            Addresses::new_tcp6(source, destination, client.port(), listener.port())
        }
        _ => Addresses::Unknown,
    }
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
        let unix = Address::Unix(None);
        assert_eq!(ProxyProtocol::V1.header(&unix, &unix), b"PROXY UNKNOWN\r\n");
    }
}
