//! Socket addresses of IP, Unix and vsock, parsed and printed.
//!
//! A connection keeps its peer's address for its whole life. The kernel's `sockaddr_storage` takes
//! 128 bytes, so [`Address`] is smaller.

use std::ffi::OsStr;
use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::io::Errno;
use socket2::SockAddr;

/// The address of a socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    Inet(SocketAddr),
    /// A Unix socket in the file system.
    Path(PathBuf),
    /// A Unix socket's abstract name, without the leading NUL that is written as `@`.
    Abstract(Vec<u8>),
    /// A Unix socket without a name, as most clients have.
    Unnamed,
    /// A context identifier and a port (vsock(7)).
    Vsock {
        cid: u32,
        port: u32,
    },
}

impl Address {
    /// Parses `/path`, `@abstract`, and `vsock:CID:PORT` or `vsock::PORT` as ListenStream= in
    /// systemd.socket(5) has them.
    ///
    /// Returns `None` for anything else. `vsock:80` is a host and a port, as in
    /// systemd-socket-proxyd.
    ///
    /// # Errors
    /// A message about what is not a number, or a name that is empty or too long.
    pub fn parse(text: &OsStr) -> Result<Option<Self>, String> {
        let (name, address) = match text.as_bytes() {
            path @ [b'/', ..] => (path, Self::Path(text.into())),
            [b'@', name @ ..] => (name, Self::Abstract(name.into())),
            _ => return text.to_str().map_or(Ok(None), parse_vsock),
        };
        if name.is_empty() {
            Err("the abstract name is empty".into())
        } else if name.len() > UNIX_NAME_MAX {
            Err(format!(
                "the name has {} bytes, a Unix socket's can have {UNIX_NAME_MAX}",
                name.len()
            ))
        } else {
            Ok(Some(address))
        }
    }

    /// Whether it is the address of a Unix socket.
    pub fn is_unix(&self) -> bool {
        matches!(self, Self::Path(_) | Self::Abstract(_) | Self::Unnamed)
    }

    /// Fails for an unnamed Unix socket, which bind(2) and connect(2) cannot take.
    pub fn to_sockaddr(&self) -> io::Result<SockAddr> {
        match self {
            Self::Inet(address) => Ok((*address).into()),
            Self::Path(path) => SockAddr::unix(path),
            Self::Abstract(name) => SockAddr::unix(OsStr::from_bytes(&[b"\0", &**name].concat())),
            Self::Unnamed => Err(io::ErrorKind::AddrNotAvailable.into()),
            Self::Vsock { cid, port } => Ok(SockAddr::vsock(*cid, *port)),
        }
    }

    /// Converts an address of the kernel. One of an unknown family becomes `Unnamed`.
    pub fn from_sockaddr(address: &SockAddr) -> Self {
        if let Some(inet) = address.as_socket() {
            Self::Inet(inet)
        } else if let Some((cid, port)) = address.as_vsock_address() {
            Self::Vsock { cid, port }
        } else if let Some(path) = address.as_pathname() {
            Self::Path(path.into())
        } else if let Some(name) = address.as_abstract_namespace() {
            Self::Abstract(name.into())
        } else {
            Self::Unnamed
        }
    }

    /// Returns whether a listener with this address accepts connections to `target`.
    ///
    /// Both are in the same network namespace. An unspecified listener address counts only for the
    /// loopback target: which other addresses this machine has is not known.
    pub fn accepts(&self, target: &Self) -> bool {
        match (self, target) {
            (Self::Inet(listener), Self::Inet(target)) => {
                // connect(2) reads the unspecified address as the loopback address of its family.
                let to = match target.ip().to_canonical() {
                    IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
                    IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
                    ip => ip,
                };
                let accepts = match listener.ip().to_canonical() {
                    IpAddr::V4(at) if at.is_unspecified() => to.is_ipv4() && to.is_loopback(),
                    IpAddr::V6(at) if at.is_unspecified() => to.is_loopback(),
                    at => at == to,
                };
                accepts && listener.port() == target.port()
            }
            (Self::Unnamed, _) => false,
            _ => self == target,
        }
    }

    /// Returns a likely cause of an error, to be appended to the message.
    pub fn hint(&self, error: &io::Error) -> &'static str {
        match (self, Errno::from_io_error(error)) {
            (Self::Vsock { .. }, Some(Errno::AFNOSUPPORT)) => {
                " (this kernel has no vsock, or RestrictAddressFamilies= forbids it)"
            }
            (Self::Vsock { .. }, Some(Errno::NODEV)) => {
                " (there is no way to that CID: the machine does not run, or vsock's transport is \
                 not loaded)"
            }
            (Self::Path(_), Some(Errno::ACCESS)) => {
                " (the proxy's user may not use it, see SupplementaryGroups=)"
            }
            (_, Some(Errno::AFNOSUPPORT)) => " (RestrictAddressFamilies= may forbid it)",
            _ => "",
        }
    }

    /// Returns whether the address stands for all addresses of this machine in its family.
    pub fn is_unspecified(&self) -> bool {
        match self {
            Self::Inet(address) => address.ip().to_canonical().is_unspecified(),
            Self::Vsock { cid, .. } => *cid == ANY_CID,
            _ => false,
        }
    }

    pub fn port(&self) -> Option<u16> {
        match self {
            Self::Inet(address) => Some(address.port()),
            _ => None,
        }
    }

    /// Returns the path of a Unix socket in the file system.
    pub fn path(&self) -> Option<&Path> {
        match self {
            Self::Path(path) => Some(path),
            _ => None,
        }
    }

    /// Returns where a TCP client comes from, as far as limits tell clients apart.
    pub fn source(&self) -> Option<Source> {
        let Self::Inet(address) = self else { return None };
        let (ip, scope) = match canonical(*address) {
            SocketAddr::V6(address) if address.ip().is_unicast_link_local() => {
                ((*address.ip()).into(), address.scope_id())
            }
            SocketAddr::V6(address) => {
                (Ipv6Addr::from_bits(address.ip().to_bits() >> 64 << 64).into(), 0)
            }
            SocketAddr::V4(address) => ((*address.ip()).into(), 0),
        };
        Some(Source { ip, scope })
    }

    /// Returns whether this is the unspecified address of the family of `address`, with its port.
    ///
    /// An IPv4 client of a dual-stack listener has an IPv6 address, `::ffff:a.b.c.d`.
    pub fn covers(&self, address: &Self) -> bool {
        let is_same_port = match (self, address) {
            (Self::Inet(any), Self::Inet(address)) => {
                any.port() == address.port() && any.is_ipv4() == address.is_ipv4()
            }
            (Self::Vsock { port: any, .. }, Self::Vsock { port, .. }) => any == port,
            _ => false,
        };
        is_same_port && self.is_unspecified()
    }

    /// Converts an IPv4 address between `a.b.c.d` and `::ffff:a.b.c.d`.
    pub fn in_other_family(&self) -> Option<Self> {
        let Self::Inet(address) = self else { return None };
        let ip = match address.ip() {
            IpAddr::V4(ip) => ip.to_ipv6_mapped().into(),
            IpAddr::V6(ip) => ip.to_ipv4_mapped()?.into(),
        };
        Some(Self::Inet(SocketAddr::new(ip, address.port())))
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Inet(address) => canonical(*address).fmt(f),
            Self::Path(path) => path.display().fmt(f),
            Self::Abstract(name) => write!(f, "@{}", String::from_utf8_lossy(name)),
            Self::Unnamed => f.write_str("unix"),
            Self::Vsock { cid: ANY_CID, port } => write!(f, "vsock::{port}"),
            Self::Vsock { cid, port } => write!(f, "vsock:{cid}:{port}"),
        }
    }
}

/// Converts `::ffff:a.b.c.d`, an IPv4 client of a dual-stack listener, to `a.b.c.d`.
pub fn canonical(address: SocketAddr) -> SocketAddr {
    match address.ip().to_canonical() {
        ip @ IpAddr::V4(_) => SocketAddr::new(ip, address.port()),
        // `address` may have a scope, which its IP does not have.
        IpAddr::V6(_) => address,
    }
}

/// An IPv4 address, the /64 of an IPv6 address, or a link-local address and its interface. One
/// machine may have any number of addresses in a /64.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Source {
    ip: IpAddr,
    scope: u32,
}

/// What a socket carries (socket(2)).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SocketKind {
    Stream,
    Datagram,
}

/// The sockets for datagrams, by the word that stands before their addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DatagramKind {
    /// `udp:`
    Udp,
    /// `dgram:`
    Unix,
}

impl SocketKind {
    /// Splits `udp:` or `dgram:` off.
    pub fn split(text: &OsStr) -> (Option<DatagramKind>, &OsStr) {
        let bytes = text.as_bytes();
        let rest = |prefix: &str| bytes.strip_prefix(prefix.as_bytes()).map(OsStr::from_bytes);
        match (rest(UDP), rest(DGRAM)) {
            (Some(rest), _) => (Some(DatagramKind::Udp), rest),
            (_, Some(rest)) => (Some(DatagramKind::Unix), rest),
            _ => (None, text),
        }
    }

    /// Returns what stands before the address of a socket.
    pub fn prefix(self, is_unix: bool) -> &'static str {
        match (self, is_unix) {
            (Self::Stream, _) => "",
            (Self::Datagram, false) => UDP,
            (Self::Datagram, true) => DGRAM,
        }
    }
}

const UDP: &str = "udp:";
const DGRAM: &str = "dgram:";

/// What selectors and messages call a socket.
#[derive(Clone, Debug)]
pub struct SocketLabel {
    /// The `FileDescriptorName=` of a passed socket.
    pub name: Option<String>,
    pub kind: SocketKind,
    pub address: Address,
}

/// `name (address)` for a passed socket, the address for a socket opened by `--listen=`.
impl fmt::Display for SocketLabel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, kind, address } = self;
        let prefix = kind.prefix(!matches!(address, Address::Inet(_)));
        match name {
            Some(name) => write!(f, "{name} ({prefix}{address})"),
            None => write!(f, "{prefix}{address}"),
        }
    }
}

fn parse_vsock(text: &str) -> Result<Option<Address>, String> {
    let Some((cid, port)) = text.strip_prefix("vsock:").and_then(|rest| rest.split_once(':'))
    else {
        return Ok(None);
    };
    let number = |text: &str| text.parse().ok().filter(|_| !text.starts_with('+'));
    let cid_number = if cid.is_empty() { Some(ANY_CID) } else { number(cid) };
    match (cid_number, number(port)) {
        (Some(cid), Some(port)) => Ok(Some(Address::Vsock { cid, port })),
        (None, _) => Err(format!("\"{cid}\" is not a vsock CID (0 to 4294967295)")),
        (_, None) => Err(format!("\"{port}\" is not a vsock port (0 to 4294967295)")),
    }
}

/// `sun_path` has 108 bytes (unix(7)). A NUL ends a path or begins an abstract name.
const UNIX_NAME_MAX: usize = 107;

/// `VMADDR_CID_ANY` in vsock(7): the context identifier of this machine, whatever it is.
const ANY_CID: u32 = u32::MAX;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listener_accepts_connections_to_its_own_address() {
        let inet = |text: &str| Address::Inet(text.parse().unwrap());
        for (listener, target, accepts) in [
            ("127.0.0.1:80", "127.0.0.1:80", true),
            ("127.0.0.1:80", "127.0.0.1:81", false),
            ("[::]:80", "127.0.0.1:80", true),
            ("[::]:80", "[::1]:80", true),
            ("0.0.0.0:80", "[::1]:80", false),
            ("127.0.0.2:80", "0.0.0.0:80", false),
            ("127.0.0.1:80", "[::]:80", false),
            ("[::ffff:127.0.0.1]:80", "127.0.0.1:80", true),
            ("0.0.0.0:80", "192.0.2.1:80", false),
            ("127.0.0.1:80", "0.0.0.0:80", true),
        ] {
            assert_eq!(inet(listener).accepts(&inet(target)), accepts, "{listener} {target}");
        }
        let unnamed = Address::Unnamed;
        assert!(!unnamed.accepts(&unnamed));
    }

    #[test]
    fn an_unspecified_address_covers_its_own_family() {
        let inet = |text: &str| Address::Inet(text.parse().unwrap());
        for (any, other, covers) in [
            ("0.0.0.0:80", "127.0.0.1:80", true),
            ("0.0.0.0:80", "127.0.0.1:81", false),
            ("[::]:80", "127.0.0.1:80", false),
            ("[::]:80", "[::ffff:127.0.0.1]:80", true),
            ("0.0.0.0:80", "[::ffff:127.0.0.1]:80", false),
            ("[::]:80", "[::1]:80", true),
            ("127.0.0.1:80", "127.0.0.1:80", false),
        ] {
            assert_eq!(inet(any).covers(&inet(other)), covers, "{any} {other}");
        }
        let (ipv4, mapped) = (inet("127.0.0.1:80"), inet("[::ffff:127.0.0.1]:80"));
        assert_eq!(ipv4.in_other_family().as_ref(), Some(&mapped));
        assert_eq!(mapped.in_other_family(), Some(ipv4));
        assert_eq!(inet("[::1]:80").in_other_family(), None);
    }

    #[test]
    fn unix_names_longer_than_sun_path_are_refused() {
        let parse = |text: &str| Address::parse(OsStr::new(text));
        let longest = format!("/{}", "x".repeat(106));
        assert!(parse(&longest).is_ok_and(|it| it.is_some()));
        assert!(parse(&format!("{longest}x")).is_err());
        assert!(parse(&format!("@{}", "x".repeat(107))).is_ok_and(|it| it.is_some()));
        assert!(parse(&format!("@{}", "x".repeat(108))).is_err());
        assert!(parse("@").is_err());
        assert_eq!(parse("localhost:80"), Ok(None));
        assert!(Address::parse(OsStr::from_bytes(b"/not/\xff/utf-8")).is_ok_and(|it| it.is_some()));
        assert_eq!(Address::parse(OsStr::from_bytes(b"\xff")), Ok(None));
    }

    #[test]
    fn addresses_survive_the_conversion_to_sockaddr() {
        for text in ["/run/a.sock", "@name"] {
            let address = Address::parse(OsStr::new(text)).unwrap().unwrap();
            let again = Address::from_sockaddr(&address.to_sockaddr().unwrap());
            assert_eq!(again, address);
            assert_eq!(again.to_string(), text);
        }
        let vsock = Address::Vsock { cid: 3, port: 80 };
        assert_eq!(Address::from_sockaddr(&vsock.to_sockaddr().unwrap()), vsock);
        assert_eq!(vsock.to_string(), "vsock:3:80");
        assert_eq!(size_of::<Address>(), size_of::<SocketAddr>());
        assert_eq!(parse_vsock("vsock:3:80").unwrap().unwrap(), vsock);
        assert_eq!(parse_vsock("vsock::80").unwrap().unwrap().to_string(), "vsock::80");
        assert!(parse_vsock("vsock:+3:80").is_err());
    }

    #[test]
    fn an_ipv4_client_of_a_dual_stack_listener_prints_as_ipv4() {
        let address = Address::Inet("[::ffff:127.0.0.1]:80".parse().unwrap());
        assert_eq!(address.to_string(), "127.0.0.1:80");
        let link_local = Address::Inet("[fe80::1%2]:80".parse().unwrap());
        assert_eq!(link_local.to_string(), "[fe80::1%2]:80");
    }
}
