//! The addresses of `--listen=` and `--metrics=`.

use std::ffi::OsStr;
use std::fmt;
use std::os::unix::ffi::OsStrExt;

use crate::socket::address::{Address, DatagramKind, SocketKind};
use crate::socket::host_port::HostPort;

/// The value of `--listen=`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListenAddress {
    pub kind: SocketKind,
    pub place: ListenPlace,
}

/// Where a socket listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ListenPlace {
    /// A port on every address of the machine, IPv6 and IPv4, as `ListenStream=PORT` has it.
    Any(u16),
    /// A port on each address of a host.
    Host(HostPort),
    /// A Unix or vsock address.
    Address(Address),
}

impl ListenAddress {
    /// Parses `PORT`, `HOST:PORT`, `[V6]:PORT`, `/path`, `@abstract`, `vsock:CID:PORT` or
    /// `vsock::PORT`. For datagrams `udp:` stands before the first three, and `dgram:` before a
    /// Unix socket.
    ///
    /// # Errors
    /// The reason.
    pub fn parse(text: impl AsRef<OsStr>) -> Result<Self, String> {
        let (kind, text) = SocketKind::split(text.as_ref());
        let place = ListenPlace::parse(text)?;
        let is_unix =
            matches!(place, ListenPlace::Address(Address::Path(_) | Address::Abstract(_)));
        match (kind, &place) {
            (Some(DatagramKind::Udp), ListenPlace::Address(_)) => {
                Err("udp: stands before PORT or HOST:PORT; a Unix socket is dgram:/path".into())
            }
            (Some(DatagramKind::Unix), _) if !is_unix => {
                Err("dgram: stands before /path or @abstract; UDP is udp:PORT".into())
            }
            (kind, _) => {
                Ok(Self { kind: kind.map_or(SocketKind::Stream, |_| SocketKind::Datagram), place })
            }
        }
    }

    /// Whether the kernel picks the port.
    pub fn has_any_port(&self) -> bool {
        match &self.place {
            ListenPlace::Any(port) => *port == 0,
            ListenPlace::Host(host_port) => host_port.port == "0",
            ListenPlace::Address(_) => false,
        }
    }
}

impl ListenPlace {
    fn parse(text: &OsStr) -> Result<Self, String> {
        if let Some(address) = Address::parse(text)? {
            return Ok(Self::Address(address));
        }
        let text = text.to_str().ok_or("only a path can have other bytes than UTF-8")?;
        let is_number =
            |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
        if let Some(port) = text.strip_prefix(':').filter(|port| is_number(port)) {
            return Err(format!("a port on every address is written without the colon, {port}"));
        }
        if is_number(text) {
            let port = text.parse().map_err(|_| format!("port {text} is above 65535"))?;
            return Ok(Self::Any(port));
        }
        HostPort::parse(text, None).map(Self::Host)
    }
}

impl fmt::Display for ListenAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let is_unix = matches!(self.place, ListenPlace::Address(_));
        write!(f, "{}{}", self.kind.prefix(is_unix), self.place)
    }
}

impl fmt::Display for ListenPlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Any(port) => port.fmt(f),
            Self::Host(host_port) => host_port.fmt(f),
            Self::Address(address) => address.fmt(f),
        }
    }
}

/// The value of `--metrics=`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MetricsAddress {
    /// The proxy opens the socket.
    Open(ListenAddress),
    /// systemd passes the socket with this `FileDescriptorName=`.
    Passed(String),
}

impl MetricsAddress {
    /// Parses `fd:NAME`, or an address as `--listen=` takes it. Datagrams and vsock are refused: no
    /// scraper speaks them.
    ///
    /// # Errors
    /// The reason.
    pub fn parse(text: impl AsRef<OsStr>) -> Result<Self, String> {
        let text = text.as_ref();
        match text.as_bytes().strip_prefix(b"fd:") {
            Some(b"") => Err("fd: stands before the FileDescriptorName= of a passed socket".into()),
            Some(name) => Ok(Self::Passed(String::from_utf8_lossy(name).into())),
            None => {
                let address = ListenAddress::parse(text)?;
                let is_vsock = matches!(address.place, ListenPlace::Address(Address::Vsock { .. }));
                match is_vsock || address.kind == SocketKind::Datagram {
                    true => Err("it must be a TCP or Unix socket".into()),
                    false => Ok(Self::Open(address)),
                }
            }
        }
    }
}

impl fmt::Display for MetricsAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Open(address) => address.fmt(f),
            Self::Passed(name) => write!(f, "fd:{name}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn listen_addresses_read_and_print() {
        for text in
            ["8080", "localhost:8080", "[::1]:8080", "/run/a.sock", "@a", "vsock:3:7", "vsock::7"]
        {
            assert_eq!(ListenAddress::parse(text).unwrap().to_string(), text);
        }
        for text in ["", "99999", "localhost", "[::1]", ":80", "@"] {
            assert!(ListenAddress::parse(text).is_err(), "{text}");
        }
    }
}
