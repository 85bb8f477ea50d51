//! Sets of clients, the value of `--passive-from=`.

use std::net::IpAddr;
use std::str::FromStr;

use ipnet::IpNet;

use crate::socket::address::{Address, canonical};

/// Networks, and perhaps the clients of Unix sockets.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ClientSet {
    networks: Vec<IpNet>,
    has_unix: bool,
}

impl ClientSet {
    pub fn contains(&self, client: &Address) -> bool {
        match client {
            Address::Inet(address) => {
                let ip = canonical(*address).ip();
                self.networks.iter().any(|network| network.contains(&ip))
            }
            Address::Path(_) | Address::Abstract(_) | Address::Unnamed => self.has_unix,
            Address::Vsock { .. } => false,
        }
    }
}

/// Parses addresses, networks as ADDRESS/PREFIX, and `unix`, with commas between them.
impl FromStr for ClientSet {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut set = Self::default();
        for word in text.split(',') {
            let address = || word.parse().ok().map(|ip: IpAddr| IpNet::from(ip));
            match word.parse().ok().or_else(address) {
                Some(network) => set.networks.push(canonical_network(network)),
                None if word == "unix" => set.has_unix = true,
                None => {
                    return Err(format!(
                        "\"{word}\" is not an address, a network (10.0.0.0/8) or unix"
                    ));
                }
            }
        }
        Ok(set)
    }
}

/// Converts a network of `::ffff:a.b.c.d` addresses to one of IPv4, as clients are compared.
fn canonical_network(network: IpNet) -> IpNet {
    let v4_prefix = network.prefix_len().checked_sub(96);
    match (network.addr().to_canonical(), v4_prefix) {
        (IpAddr::V4(ip), Some(prefix)) if network.addr().is_ipv6() => {
            IpNet::new(IpAddr::V4(ip), prefix).unwrap_or(network)
        }
        _ => network,
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use super::*;

    #[test]
    fn contains_clients_by_address_network_and_family() {
        let set: ClientSet = "10.0.0.0/8,192.0.2.1,fd00::/8,::1,unix".parse().unwrap();
        let client = |text: &str| Address::Inet(text.parse::<SocketAddr>().unwrap());
        for inside in ["10.1.2.3:1", "[::ffff:10.1.2.3]:1", "192.0.2.1:9", "[fd12::1]:1", "[::1]:1"]
        {
            assert!(set.contains(&client(inside)), "{inside}");
        }
        for outside in ["11.0.0.1:1", "192.0.2.2:1", "[2001:db8::1]:1", "127.0.0.1:1"] {
            assert!(!set.contains(&client(outside)), "{outside}");
        }
        assert!(set.contains(&Address::Unnamed));
        assert!(!set.contains(&Address::Vsock { cid: 2, port: 1 }));
        assert!(!"10.0.0.0/8".parse::<ClientSet>().unwrap().contains(&Address::Unnamed));
    }

    #[test]
    fn a_network_of_mapped_addresses_is_one_of_ipv4() {
        let client = |text: &str| Address::Inet(text.parse::<SocketAddr>().unwrap());
        let set: ClientSet = "::ffff:10.0.0.0/104,::ffff:192.0.2.1".parse().unwrap();
        for inside in ["10.1.2.3:1", "[::ffff:10.1.2.3]:1", "192.0.2.1:1"] {
            assert!(set.contains(&client(inside)), "{inside}");
        }
        assert!(!set.contains(&client("11.0.0.1:1")));
        let all: ClientSet = "::ffff:0:0/96".parse().unwrap();
        assert!(all.contains(&client("11.0.0.1:1")) && !all.contains(&client("[::1]:1")));
    }

    #[test]
    fn refuses_what_is_no_network() {
        for wrong in ["", "10.0.0.0/33", "10.0.0", "localhost", "10.0.0.1,", "unix "] {
            assert!(wrong.parse::<ClientSet>().is_err(), "{wrong:?}");
        }
    }
}
