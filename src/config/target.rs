//! Where connections go: `HOST:PORT`, `/path`, `@abstract`, `vsock:CID:PORT`.
//!
//! What is certain to fail is refused here, at start. Names are looked up for each connection, in
//! `socket/resolve.rs`.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::os::unix::ffi::OsStringExt;

use crate::socket::address::{Address, SocketKind};
use crate::socket::host_port::HostPort;

/// The port of a `HOST` without one, as in systemd-socket-proxyd(8).
const DEFAULT_PORT: &str = "80";

/// The backend as the command line names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// An address that needs no resolver.
    Address(Address),
    /// Anything for getaddrinfo(3).
    Name(HostPort),
}

impl Target {
    /// Whether connections go to an IP address.
    pub fn has_ip(&self) -> bool {
        matches!(self, Self::Name(_) | Self::Address(Address::Inet(_)))
    }

    /// Parses a TARGET argument.
    ///
    /// # Errors
    /// The reason, which follows "Invalid target ...:".
    pub fn parse(text: &OsStr) -> Result<Self, String> {
        if let Some(address) = Address::parse(text)? {
            if address.is_unspecified() {
                return Err("a backend has a CID, vsock:CID:PORT".into());
            }
            return Ok(Self::Address(address));
        }
        let text = text.to_str().ok_or("only a path can have other bytes than UTF-8")?;
        if SocketKind::split(text.as_ref()).0.is_some() {
            return Err(
                "a TARGET is reached as its sockets are, write it without udp: or dgram:".into()
            );
        }
        let is_number = text.bytes().all(|byte| byte.is_ascii_digit());
        if is_number && text.parse::<u16>().is_ok_and(|port| port != 0) {
            // As a host it would be an address in 0.0.0.0/8, which no machine has.
            return Err(format!(
                "that is a port; for a port of this machine write 127.0.0.1:{text}"
            ));
        }
        let host_port = HostPort::parse(text, Some(DEFAULT_PORT))?;
        if host_port.port == "0" {
            return Err("no backend can be reached at port 0".into());
        }
        Ok(match host_port.literal() {
            Some(address) => Self::Address(Address::Inet(address)),
            None => Self::Name(host_port),
        })
    }

    /// Returns the text of the target, with the bytes of a Unix socket's name as they are.
    pub fn to_os_string(&self) -> OsString {
        match self {
            Self::Address(Address::Path(path)) => path.clone().into(),
            Self::Address(Address::Abstract(name)) => OsString::from_vec([b"@", &**name].concat()),
            other => other.to_string().into(),
        }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(address) => address.fmt(f),
            Self::Name(host_port) => host_port.fmt(f),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::ffi::OsStrExt;

    use super::*;

    fn parse(text: &str) -> Result<Target, String> {
        Target::parse(OsStr::new(text))
    }

    #[test]
    fn text_keeps_the_bytes_of_a_name() {
        for name in [&b"/run/\xff.sock"[..], b"@\xff"].map(OsStr::from_bytes) {
            assert_eq!(Target::parse(name).unwrap().to_os_string(), name);
        }
        assert_eq!(parse("LocalHost:http").unwrap().to_os_string(), "LocalHost:http");
    }

    #[test]
    fn targets_read_and_print() {
        for (text, printed) in [
            ("localhost:80", "localhost:80"),
            ("localhost", "localhost:80"),
            ("localhost:postgresql", "localhost:postgresql"),
            ("127.0.0.1:8080", "127.0.0.1:8080"),
            ("127.0.0.1:http", "127.0.0.1:http"),
            ("[::1]:80", "[::1]:80"),
            ("[::1]", "[::1]:80"),
            ("::1:80", "[::1]:80"),
            ("fe80::1%lo:80", "[fe80::1%lo]:80"),
            ("[fe80::1%lo]:80", "[fe80::1%lo]:80"),
            ("/run/a=b.sock", "/run/a=b.sock"),
            ("@name", "@name"),
            ("vsock:3:80", "vsock:3:80"),
            ("vsock:80", "vsock:80"),
            ("0", "0:80"),
            ("2130706433", "2130706433:80"),
        ] {
            assert_eq!(parse(text).unwrap().to_string(), printed, "{text}");
        }
    }

    #[test]
    fn only_literal_addresses_go_without_the_resolver() {
        for (text, literal) in [
            ("127.0.0.1:80", true),
            ("[::1]:80", true),
            ("127.0.0.1:http", false),
            ("127.1:80", false),
            ("fe80::1%lo:80", false),
            ("localhost:80", false),
        ] {
            let target = parse(text).unwrap();
            assert_eq!(matches!(target, Target::Address(_)), literal, "{text}");
        }
    }

    #[test]
    fn refuses_targets_that_cannot_work() {
        for text in [
            "",
            ":80",
            "localhost:",
            "localhost:99999",
            "localhost:0",
            "localhost:+80",
            "localhost:+80000",
            "localhost:-1",
            " localhost:80",
            "localhost: 80",
            "::1",
            "a:b:80",
            "*:80",
            "./socket",
            "http://localhost:80",
            "2001:db8::1",
            "[::1",
            "[::1]80",
            "[localhost]:80",
            "[]:80",
            "fe80::1%a]:80",
            "@",
            "a=b:80",
            "3000",
            "unix:/run/a.sock",
            "vsock::80",
            "vsock:x:80",
            "vsock:3:4294967296",
        ] {
            assert!(parse(text).is_err(), "{text}");
        }
        assert!(parse(&format!("/{}", "x".repeat(107))).is_err());
    }
}
