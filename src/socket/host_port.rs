//! `HOST:PORT` and `[V6]:PORT`, parsed and printed. The module `resolve` looks names up.

use std::fmt;
use std::net::{Ipv6Addr, SocketAddr};

/// A host and a port as written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostPort {
    /// A name or an address, without brackets; not empty.
    pub host: String,
    /// A number without leading zeros, or a name from services(5).
    pub port: String,
}

impl HostPort {
    /// Parses `HOST:PORT`, split at the last colon, or `[V6]:PORT`. With a default port, `HOST` and
    /// `[V6]` are valid as well.
    ///
    /// # Errors
    /// A message that says what is wrong.
    pub fn parse(text: &str, default_port: Option<&str>) -> Result<Self, String> {
        let (host, port) = if let Some(rest) = text.strip_prefix('[') {
            let (host, rest) = rest.split_once(']').ok_or("there is no ] after the [")?;
            if !is_ipv6(host) {
                return Err(format!("\"{host}\" is not an IPv6 address"));
            }
            match rest.strip_prefix(':') {
                Some(port) => (host, Some(port)),
                None if rest.is_empty() => (host, None),
                None => return Err("after ] there can only be :PORT".into()),
            }
        } else if let Some((host, port)) = text.rsplit_once(':') {
            if host.contains(':') && !is_ipv6(host) {
                return Err(if is_ipv6(text) {
                    format!("an IPv6 address is written [{text}] or [{text}]:PORT")
                } else {
                    format!("\"{host}\" is neither a name nor an address")
                });
            }
            (host, Some(port))
        } else {
            (text, None)
        };
        if host.is_empty() {
            return Err(match port {
                Some(port) if !port.is_empty() => {
                    format!("the host is empty; for a port of this machine write 127.0.0.1:{port}")
                }
                _ => "the host is empty".into(),
            });
        }
        if text.contains(char::is_whitespace) {
            return Err("there is white space in it".into());
        }
        if host.contains('/') {
            let why = "a host has no slash; a path begins with one, and a COMMAND follows after --";
            return Err(why.into());
        }
        if host.contains('=') {
            return Err("a host has no =".into());
        }
        if host == "*" {
            // getaddrinfo(3) reads * as the loopback address.
            return Err("* is not a host; for every address use --listen=PORT".into());
        }
        let port = port.or(default_port).ok_or("there is no port")?;
        Ok(Self { host: host.into(), port: parse_port(port)? })
    }

    /// Returns the address, if the host is an address and the port a number.
    pub fn literal(&self) -> Option<SocketAddr> {
        Some(SocketAddr::new(self.host.parse().ok()?, self.port.parse().ok()?))
    }
}

impl fmt::Display for HostPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

fn parse_port(text: &str) -> Result<String, String> {
    let is_number = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
    let is_signed = text.strip_prefix(['+', '-']).is_some_and(is_number);
    match text.parse::<u16>() {
        // getaddrinfo(3) would read +80000 as 14464.
        _ if is_signed => Err(format!("port {text} is neither a number nor a name")),
        Ok(number) => Ok(number.to_string()),
        Err(_) if text.is_empty() => Err("the port is empty".into()),
        Err(_) if text.contains('/') => Err("a port has no slash; a path begins with one".into()),
        Err(_) if is_number(text) => Err(format!("port {text} is above 65535")),
        Err(_) => Ok(text.into()),
    }
}

/// Returns whether `host` is an IPv6 address, perhaps with a scope (`fe80::1%eth0`).
///
/// Only getaddrinfo(3) can read the scope. A `]` would end the address in `[V6]:PORT`.
fn is_ipv6(host: &str) -> bool {
    let (address, scope) = host.split_once('%').unwrap_or((host, ""));
    address.parse::<Ipv6Addr>().is_ok() && !scope.contains(']')
}
