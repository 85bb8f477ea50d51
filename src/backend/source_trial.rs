//! What `--source=client` needs of the machine, tried once at the start.
//!
//! Answers can be tried only where the proxy can listen at the backend's address. It does so for
//! loopback addresses.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::time::Duration;

use rustix::io::Errno;
use socket2::{Domain, Socket, Type};
use tokio::time::timeout;

use crate::backend::connect::try_connect;
use crate::backend::source::{ClientSources, IpFamily, SourceAddress};
use crate::config::target::Target;
use crate::logging::os_message;
use crate::socket::address::Address;

/// Tries to connect from the addresses of clients.
///
/// # Errors
/// One line that names the capability or the route that is missing.
pub async fn try_sources(targets: impl Iterator<Item = &Target>) -> Result<ClientSources, String> {
    let sources = ClientSources { is_transparent: is_transparent_allowed() };
    let trials: BTreeSet<_> = targets.flat_map(trials).collect();
    for trial in trials {
        trial.run(sources).await.map_err(|error| match Errno::from_io_error(&error) {
            Some(
                Errno::ADDRNOTAVAIL
                | Errno::NETUNREACH
                | Errno::HOSTUNREACH
                | Errno::TIMEDOUT
                | Errno::INVAL,
            ) => trial.missing(sources),
            _ => {
                let error = os_message(&error);
                format!("--source=client: Failed to connect from {}: {error}.", trial.client())
            }
        })?;
    }
    Ok(sources)
}

/// Whether this process may set IP_TRANSPARENT. For IPv6 it needs the same capabilities.
fn is_transparent_allowed() -> bool {
    let ipv4 = Socket::new(Domain::IPV4, Type::STREAM, None);
    let ipv6 = || Socket::new(Domain::IPV6, Type::STREAM, None);
    match ipv4 {
        Ok(socket) => socket.set_ip_transparent_v4(true).is_ok(),
        Err(_) => ipv6().is_ok_and(|socket| socket.set_ip_transparent_v6(true).is_ok()),
    }
}

/// An attempt to use an address that this machine does not have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Trial {
    family: IpFamily,
    /// Where the backend listens, if that is a loopback address.
    loopback: Option<IpAddr>,
}

/// Returns the trials for a target.
fn trials(target: &Target) -> Vec<Trial> {
    let name = match target {
        Target::Address(Address::Inet(address)) => return vec![Trial::of(*address)],
        Target::Address(_) => return Vec::new(),
        Target::Name(name) => name,
    };
    let localhost = [IpAddr::from(Ipv4Addr::LOCALHOST), Ipv6Addr::LOCALHOST.into()];
    // The port may be a name, and the host an address with an interface.
    let host = name.host.split('%').next().and_then(|host| host.parse::<IpAddr>().ok());
    match host {
        Some(ip) => vec![Trial::of((ip, 0).into())],
        None if name.host.eq_ignore_ascii_case("localhost") => {
            localhost.map(|ip| Trial::of((ip, 0).into())).into()
        }
        None => [IpFamily::V4, IpFamily::V6].map(|family| Trial { family, loopback: None }).into(),
    }
}

impl Trial {
    fn of(target: SocketAddr) -> Self {
        let destination = SourceAddress::destination(target);
        let loopback = Some(destination.ip()).filter(IpAddr::is_loopback);
        Self { family: IpFamily::of(destination), loopback }
    }

    /// Returns the address to connect from, one of those for documentation (RFC 5737, RFC 3849).
    fn client(self) -> IpAddr {
        match self.family {
            IpFamily::V4 => Ipv4Addr::new(192, 0, 2, 1).into(),
            IpFamily::V6 => Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1).into(),
        }
    }

    async fn run(self, sources: ClientSources) -> io::Result<()> {
        let lacks_family = |error: &io::Error| {
            matches!(Errno::from_io_error(error), Some(Errno::AFNOSUPPORT | Errno::ADDRNOTAVAIL))
        };
        let Some(from) = sources.of(&Address::Inet((self.client(), 0).into())) else {
            return Ok(());
        };
        let Some(loopback) = self.loopback else {
            let domain = match self.family {
                IpFamily::V4 => Domain::IPV4,
                IpFamily::V6 => Domain::IPV6,
            };
            let destination = SocketAddr::from((self.client(), 0)).into();
            return match Socket::new(domain, Type::STREAM, None) {
                Ok(socket) => from.bind(&socket, &destination),
                Err(error) if lacks_family(&error) => Ok(()),
                Err(error) => Err(error),
            };
        };
        let listener = match TcpListener::bind((loopback, 0)) {
            Ok(listener) => listener,
            // Then no backend listens there either.
            Err(error) if lacks_family(&error) => return Ok(()),
            Err(error) => return Err(error),
        };
        let address = Address::Inet(listener.local_addr()?);
        let connected = timeout(TRIAL_TIME, try_connect(&address, Some(&from))).await;
        connected.map_or_else(|_| Err(Errno::TIMEDOUT.into()), |connected| connected.map(drop))
    }

    /// Returns the message for a failed trial: what is missing.
    fn missing(self, sources: ClientSources) -> String {
        let Self { family, .. } = self;
        // IPv6 needs no capability.
        let lacks_capability = family == IpFamily::V4 && !sources.is_transparent;
        if has_only_loopback() {
            let route = match family {
                IpFamily::V4 => "ip route add local 0.0.0.0/0 dev lo",
                IpFamily::V6 => "ip -6 route add local ::/0 dev lo",
            };
            format!(
                "--source=client needs a route that makes every {family} address local to this network \
                 namespace. (Run: {route}.)"
            )
        } else if lacks_capability {
            "--source=client needs CAP_NET_RAW to connect from the IPv4 addresses of clients. (Set \
             AmbientCapabilities=CAP_NET_RAW.)"
                .into()
        } else {
            let routes = match family {
                IpFamily::V4 => {
                    "ip rule add from 127.0.0.0/8 iif lo table 123; \
                     ip route add local 0.0.0.0/0 dev lo table 123"
                }
                IpFamily::V6 => {
                    "ip -6 rule add from ::1 iif lo table 123; \
                     ip -6 route add local ::/0 dev lo table 123"
                }
            };
            format!(
                "--source=client needs a route for the answers to {family} addresses of clients. (Run: \
                 {routes}.)"
            )
        }
    }
}

/// Whether this network namespace leads nowhere: it has no interface but `lo` and the devices that
/// tunnel modules add to each namespace (net.core.fb_tunnels_only_for_init_net).
fn has_only_loopback() -> bool {
    // Not /sys/class/net, which shows the namespace of the mount.
    let Ok(devices) = fs::read_to_string("/proc/self/net/dev") else { return false };
    let mut names =
        devices.lines().filter_map(|line| line.split_once(':')).map(|(name, _)| name.trim());
    names.all(|name| name == "lo" || FALLBACK_TUNNELS.contains(&name))
}

const FALLBACK_TUNNELS: [&str; 9] =
    ["tunl0", "gre0", "gretap0", "erspan0", "ip_vti0", "ip6_vti0", "sit0", "ip6tnl0", "ip6gre0"];

/// How long a trial waits for an answer.
const TRIAL_TIME: Duration = Duration::from_secs(1);
