//! Socket addresses of the three families a stream can have, and how they are written.
//!
//! The kernel's `sockaddr_storage` takes 128 bytes; a connection keeps its peer's address for its
//! whole life, so [`Address`] is the small form of it.

use std::ffi::OsStr;
use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::io::Errno;
use socket2::SockAddr;

/// What is left of `sun_path` (108 bytes, unix(7)) beside the NUL that ends a path or begins an
/// abstract name.
const UNIX_NAME_MAX: usize = 107;

/// `VMADDR_CID_ANY`, vsock(7): whatever this machine's is.
const ANY_CID: u32 = u32::MAX;

/// One end of a stream socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// IPv4 or IPv6.
    Inet(SocketAddr),
    /// A Unix socket; `None` is a client that never bound a name.
    Unix(Option<Box<UnixName>>),
    /// A virtual machine's socket, vsock(7).
    Vsock {
        /// Context identifier.
        cid: u32,
        /// Port.
        port: u32,
    },
}

impl Address {
    /// The kernel's form. Fails for an unnamed Unix socket, which cannot be bound or connected to.
    pub fn to_sockaddr(&self) -> io::Result<SockAddr> {
        match self {
            Self::Inet(address) => Ok((*address).into()),
            Self::Unix(Some(name)) => name.to_sockaddr(),
            Self::Unix(None) => Err(io::ErrorKind::AddrNotAvailable.into()),
            Self::Vsock { cid, port } => Ok(SockAddr::vsock(*cid, *port)),
        }
    }

    /// Reads the kernel's form. An address of another family is taken for an unnamed one.
    pub fn from_sockaddr(address: &SockAddr) -> Self {
        if let Some(inet) = address.as_socket() {
            Self::Inet(inet)
        } else if let Some((cid, port)) = address.as_vsock_address() {
            Self::Vsock { cid, port }
        } else if let Some(path) = address.as_pathname() {
            Self::Unix(Some(Box::new(UnixName::Path(path.into()))))
        } else if let Some(name) = address.as_abstract_namespace() {
            Self::Unix(Some(Box::new(UnixName::Abstract(name.into()))))
        } else {
            Self::Unix(None)
        }
    }

    /// Whether a listener with this address is who answers at `target`, in the same network: at the
    /// address itself, or, on all addresses, at the loopback one.
    pub fn accepts(&self, target: &Self) -> bool {
        match (self, target) {
            (Self::Inet(ours), Self::Inet(theirs)) => {
                // To connect(2) the unspecified address is the loopback one of its family.
                let to = match theirs.ip().to_canonical() {
                    IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
                    IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
                    ip => ip,
                };
                let is_at = match ours.ip().to_canonical() {
                    IpAddr::V4(at) if at.is_unspecified() => to.is_ipv4() && to.is_loopback(),
                    IpAddr::V6(at) if at.is_unspecified() => to.is_loopback(),
                    at => at == to,
                };
                ours.port() == theirs.port() && is_at
            }
            (Self::Unix(None), _) => false,
            _ => self == target,
        }
    }

    /// For the message with `error`: what may be the matter with vsock.
    pub fn hint(&self, error: &io::Error) -> &'static str {
        match (self, Errno::from_io_error(error)) {
            (Self::Vsock { .. }, Some(Errno::AFNOSUPPORT)) => {
                " (this kernel has no vsock, or RestrictAddressFamilies= forbids it)"
            }
            (Self::Vsock { .. }, Some(Errno::NODEV)) => {
                " (there is no way to that CID: the machine does not run, or vsock's transport is \
                 not loaded)"
            }
            _ => "",
        }
    }

    /// Whether it is every address that this machine has in its family.
    pub fn is_unspecified(&self) -> bool {
        match self {
            Self::Inet(address) => address.ip().to_canonical().is_unspecified(),
            Self::Unix(_) => false,
            Self::Vsock { cid, .. } => *cid == ANY_CID,
        }
    }

    /// The TCP port.
    pub fn port(&self) -> Option<u16> {
        match self {
            Self::Inet(address) => Some(address.port()),
            Self::Unix(_) | Self::Vsock { .. } => None,
        }
    }

    /// Whether it is every address of a family, and `other` is one of them. An IPv4 client of a
    /// dual-stack listener has an IPv6 address, `::ffff:a.b.c.d`.
    pub fn covers(&self, other: &Self) -> bool {
        self.is_unspecified()
            && match (self, other) {
                (Self::Inet(any), Self::Inet(other)) => {
                    any.port() == other.port() && any.is_ipv4() == other.is_ipv4()
                }
                (Self::Vsock { port: any, .. }, Self::Vsock { port: other, .. }) => any == other,
                _ => false,
            }
    }

    /// An IPv4 address as a socket of the other family has it: `::ffff:a.b.c.d` or `a.b.c.d`.
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
            Self::Unix(Some(name)) => name.fmt(f),
            Self::Unix(None) => f.write_str("unix"),
            Self::Vsock { cid: ANY_CID, port } => write!(f, "vsock::{port}"),
            Self::Vsock { cid, port } => write!(f, "vsock:{cid}:{port}"),
        }
    }
}

/// A dual-stack listener's IPv4 client, or IPv4 address, as everybody writes it: without the IPv6
/// around it.
pub fn canonical(address: SocketAddr) -> SocketAddr {
    match address.ip().to_canonical() {
        ip @ IpAddr::V4(_) => SocketAddr::new(ip, address.port()),
        // As it is: it may have a scope.
        IpAddr::V6(_) => address,
    }
}

/// A socket as selectors and messages know it.
#[derive(Clone, Debug)]
pub struct SocketLabel {
    /// The name it was passed with; none if it was opened here.
    pub name: Option<String>,
    /// Its own address.
    pub address: Address,
}

/// `name (address)` for a passed socket, the address for one opened here.
impl fmt::Display for SocketLabel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.name {
            Some(name) => write!(f, "{name} ({})", self.address),
            None => self.address.fmt(f),
        }
    }
}

/// Reads `vsock:CID:PORT`, as ListenStream= in systemd.socket(5) has it: without a CID it is any.
/// `None` for anything else, and for `vsock:80`, which stays what it is upstream, a host of that name.
///
/// # Errors
/// What is not a number, in words.
pub fn parse_vsock(text: &str) -> Option<Result<Address, String>> {
    let (cid, port) = text.strip_prefix("vsock:")?.split_once(':')?;
    let number = |text: &str| {
        let is_number = text.bytes().all(|byte| byte.is_ascii_digit());
        is_number.then(|| text.parse().ok()).flatten()
    };
    let cid_number = if cid.is_empty() { Some(ANY_CID) } else { number(cid) };
    Some(match (cid_number, number(port)) {
        (Some(cid), Some(port)) => Ok(Address::Vsock { cid, port }),
        (None, _) => Err(format!("\"{cid}\" is not a vsock CID (0 to 4294967295)")),
        (_, None) => Err(format!("\"{port}\" is not a vsock port (0 to 4294967295)")),
    })
}

/// The name of a Unix socket: 1 to 107 bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum UnixName {
    /// In the file system.
    Path(PathBuf),
    /// In the network namespace's abstract names; without the leading NUL, written as `@`.
    Abstract(Vec<u8>),
}

impl UnixName {
    /// Reads `/path` or `@abstract`; `None` for anything that begins otherwise.
    ///
    /// # Errors
    /// What is wrong with the name, in words: too long for the kernel, empty, or with a NUL.
    pub fn parse(text: &OsStr) -> Option<Result<Self, String>> {
        let (name, built) = match text.as_bytes() {
            path @ [b'/', ..] => (path, Self::Path(text.into())),
            [b'@', name @ ..] => (name, Self::Abstract(name.into())),
            _ => return None,
        };
        Some(if name.is_empty() {
            Err("the abstract name is empty".into())
        } else if name.len() > UNIX_NAME_MAX {
            Err(format!(
                "the name has {} bytes, a Unix socket's can have {UNIX_NAME_MAX}",
                name.len()
            ))
        } else if name.contains(&0) {
            Err("the name contains a NUL byte".into())
        } else {
            Ok(built)
        })
    }

    /// The path of a socket in the file system.
    pub fn path(&self) -> Option<&Path> {
        match self {
            Self::Path(path) => Some(path),
            Self::Abstract(_) => None,
        }
    }

    fn to_sockaddr(&self) -> io::Result<SockAddr> {
        match self {
            Self::Path(path) => SockAddr::unix(path),
            Self::Abstract(name) => {
                let mut path = vec![0];
                path.extend(name);
                SockAddr::unix(OsStr::from_bytes(&path))
            }
        }
    }
}

impl fmt::Display for UnixName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Path(path) => path.display().fmt(f),
            Self::Abstract(name) => write!(f, "@{}", String::from_utf8_lossy(name)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listener_answers_at_its_own_address() {
        let inet = |text: &str| Address::Inet(text.parse().unwrap());
        for (listener, target, answers) in [
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
            assert_eq!(inet(listener).accepts(&inet(target)), answers, "{listener} {target}");
        }
        let unnamed = Address::Unix(None);
        assert!(!unnamed.accepts(&unnamed));
    }

    #[test]
    fn a_wildcard_is_any_of_its_own_family() {
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
    fn unix_names_are_held_to_the_kernels_limit() {
        let parse = |text: &str| UnixName::parse(OsStr::new(text));
        let longest = format!("/{}", "x".repeat(106));
        assert!(parse(&longest).unwrap().is_ok());
        assert!(parse(&format!("{longest}x")).unwrap().is_err());
        assert!(parse(&format!("@{}", "x".repeat(107))).unwrap().is_ok());
        assert!(parse(&format!("@{}", "x".repeat(108))).unwrap().is_err());
        assert!(parse("@").unwrap().is_err());
        assert!(parse("localhost:80").is_none());
        assert!(UnixName::parse(OsStr::from_bytes(b"/not/\xff/utf-8")).unwrap().is_ok());
    }

    #[test]
    fn the_kernels_form_reads_back() {
        for text in ["/run/a.sock", "@name"] {
            let name = UnixName::parse(OsStr::new(text)).unwrap().unwrap();
            let address = Address::Unix(Some(Box::new(name)));
            let again = Address::from_sockaddr(&address.to_sockaddr().unwrap());
            assert_eq!(again, address);
            assert_eq!(again.to_string(), text);
        }
        let vsock = Address::Vsock { cid: 3, port: 80 };
        assert_eq!(Address::from_sockaddr(&vsock.to_sockaddr().unwrap()), vsock);
        assert_eq!(vsock.to_string(), "vsock:3:80");
        assert_eq!(parse_vsock("vsock:3:80").unwrap().unwrap(), vsock);
        assert_eq!(parse_vsock("vsock::80").unwrap().unwrap().to_string(), "vsock::80");
        assert!(parse_vsock("vsock:+3:80").unwrap().is_err());
    }

    #[test]
    fn a_dual_stack_client_is_written_as_ipv4() {
        let address = Address::Inet("[::ffff:127.0.0.1]:80".parse().unwrap());
        assert_eq!(address.to_string(), "127.0.0.1:80");
        let link_local = Address::Inet("[fe80::1%2]:80".parse().unwrap());
        assert_eq!(link_local.to_string(), "[fe80::1%2]:80");
    }
}
