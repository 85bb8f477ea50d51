//! --source=client: the backend sees the client's IP address.

use std::fs;
use std::io::ErrorKind::WouldBlock;
use std::io::{Read, Write};

use socket2::{Socket, Type};
use tempfile::TempDir;

use crate::support::*;

fn launch() -> Launch {
    Launch::new(OURS).arg("--source=client")
}

/// The address of a peer, as text.
fn peer(socket: &Socket) -> String {
    socket.peer_addr().unwrap().as_socket().unwrap().ip().to_string()
}

/// Sends a client its address as the backend sees it.
fn tell_peer(mut socket: Socket) {
    let _ = socket.write_all(peer(&socket).as_bytes());
}

/// Connects, and reads what the backend tells. A refused client gets nothing.
fn ask(network: &ClientNetwork, from: usize, front: &Endpoint) -> String {
    let told = read_all(&mut network.client(Type::STREAM, from, front.port())).0;
    String::from_utf8(told).unwrap()
}

fn backend_sees_clients(network: &ClientNetwork, launch: impl Fn() -> Launch + Sync) {
    for (address, shown, family) in [("127.0.0.1:0", 0, "IPv6"), ("[::1]:0", 1, "IPv4")] {
        // Dual-stack.
        let front = network.at_front(|| Endpoint::tcp("[::]:0", 16));
        let backend = network.host.inside(|| Endpoint::tcp(address, 16));
        serve(&backend, tell_peer);
        let launch = || launch().listener(&front).arg(&backend.target).start();
        let proxy = network.host.inside(launch);
        assert_eq!(ask(network, shown, &front), CLIENTS[shown]);
        assert_eq!(ask(network, 1 - shown, &front), "");
        let line = proxy.lines.wait_for("it cannot be reached from the client's");
        assert!(line.contains(&format!("{family} address (--source=client)")), "{line}");
    }
}

#[test]
fn needs_no_privilege_in_a_namespace_of_its_own() {
    if !is_root_for("--source=client in a network namespace") {
        return;
    }
    let network = ClientNetwork::isolated();
    network.add_any_ip();
    backend_sees_clients(&network, || launch().unprivileged());
}

#[test]
fn needs_a_capability_and_rules_on_a_host() {
    if !is_root_for("--source=client with rules") {
        return;
    }
    let network = ClientNetwork::joined();
    network.add_rules();
    backend_sees_clients(&network, || launch().with_net_raw());
}

#[test]
fn start_names_what_is_missing() {
    if !is_root_for("--source=client without a capability or a route") {
        return;
    }
    let fails = |network: &ClientNetwork, launch: Launch, target: &str, expected: &str| {
        let launch = launch.args(["--listen=127.0.0.1:0", target]);
        let mut proxy = network.host.inside(|| launch.start());
        assert_eq!(proxy.wait().code(), Some(1));
        let line = proxy.lines.all();
        assert!(line.contains(expected) && line.lines().count() == 1, "{target}: {line}");
    };
    let host = ClientNetwork::joined();
    for target in ["127.0.0.1:80", "localhost:80", "203.0.113.7:80", "db.example:80"] {
        let launch = launch().unprivileged();
        fails(&host, launch, target, "AmbientCapabilities=CAP_NET_RAW");
    }
    for target in ["127.0.0.1:80", "localhost:80", "0.0.0.0:80", "127.0.0.1:http"] {
        let rule = "(Run: ip rule add from 127.0.0.0/8 iif lo table 123; ip route add";
        fails(&host, launch().with_net_raw(), target, rule);
    }
    // IPv6 needs no capability.
    let rule = "(Run: ip -6 rule add from ::1 iif lo table 123; ip -6 route add local";
    fails(&host, launch().unprivileged(), "[::1]:80", rule);

    let isolated = ClientNetwork::isolated();
    for launch in [launch().unprivileged(), launch().with_net_raw()] {
        let route = "(Run: ip route add local 0.0.0.0/0 dev lo.)";
        fails(&isolated, launch, "127.0.0.1:80", route);
    }
    let route = "(Run: ip -6 route add local ::/0 dev lo.)";
    fails(&isolated, launch().unprivileged(), "[::1]:80", route);
}

#[test]
fn unix_client_comes_from_the_proxy() {
    if !is_root_for("--source=client in a network namespace") {
        return;
    }
    let network = ClientNetwork::isolated();
    network.add_any_ip();
    let front = Endpoint::new(Family::Unix);
    let backend = network.host.inside(|| Endpoint::new(Family::Tcp));
    let launch = Launch::new(OURS).listener(&front).args(["--source=client", &backend.target]);
    let _proxy = network.host.inside(|| launch.start());
    let mut client = front.connect();
    let mut served = backend.accept();
    assert_eq!(peer(&served), "127.0.0.1");
    assert_forwards(&mut client, &mut served);
}

#[test]
fn ip_client_of_a_unix_backend_is_refused() {
    if !is_root_for("--source=client in a network namespace") {
        return;
    }
    let network = ClientNetwork::isolated();
    network.add_any_ip();
    let [tcp, other] = [(); 2].map(|()| network.at_front(|| Endpoint::tcp("[::]:0", 16)));
    let front = Endpoint::new(Family::Unix);
    let backend = Endpoint::new(Family::Unix);
    let all = [(&tcp, &backend.target), (&front, &backend.target), (&other, &"[::1]:9".into())];
    let targets = all.map(|(front, target)| format!("{}={target}", front.target));
    let launch = [&tcp, &front, &other].into_iter().fold(Launch::new(OURS), Launch::listener);
    let launch = launch.arg("--source=client").args(targets);
    let proxy = network.host.inside(|| launch.start());
    assert_eq!(ask(&network, 0, &tcp), "");
    proxy.lines.wait_for("it cannot be reached from the client's IPv4 address");
    let mut client = front.connect();
    assert_forwards(&mut client, &mut backend.accept());
}

#[test]
fn probes_come_from_the_proxy_and_reach_no_client() {
    if !is_root_for("--source=client in a network namespace") {
        return;
    }
    let network = ClientNetwork::isolated();
    network.add_any_ip();
    for (from, target, own) in [(0, "127.0.0.1:4000", "127.0.0.1"), (1, "[::1]:4000", "::1")] {
        let front = network.at_front(|| Endpoint::tcp("[::]:0", 16));
        let launch = Launch::new(OURS).listener(&front);
        let launch = launch.args(["--source=client", "--backend-wait=30s", target]);
        let proxy = network.host.inside(|| launch.start());
        let mut client = network.client(Type::STREAM, from, front.port());
        proxy.lines.wait_for("holding clients");
        let backend = network.host.inside(|| Endpoint::tcp(target, 16));
        let mut probe = backend.accept();
        assert_eq!(peer(&probe), own);
        let (bytes, end) = read_all(&mut probe);
        assert!(bytes.is_empty() && end.is_ok(), "{end:?}");
        let mut served = backend.accept();
        assert_eq!(peer(&served), CLIENTS[from]);
        assert_forwards(&mut client, &mut served);
    }
}

/// A network, and a directory with a file of hosts: both.example has an address of each family.
fn both_families() -> (ClientNetwork, TempDir) {
    let network = ClientNetwork::isolated();
    network.add_any_ip();
    let directory = TempDir::new().unwrap();
    let hosts = "127.0.0.1 both.example\n::1 both.example\n";
    fs::write(directory.path().join("hosts"), hosts).unwrap();
    (network, directory)
}

#[test]
fn name_is_tried_at_addresses_of_the_clients_family() {
    if !is_root_for("a name with addresses of both families") {
        return;
    }
    let (network, directory) = both_families();
    let front = network.at_front(|| Endpoint::tcp("[::]:0", 16));
    let launch = Launch::new(OURS).hosts(directory.path().join("hosts")).listener(&front);
    let launch = launch.args(["--source=client", "--backend-wait=1s", "both.example:4000"]);
    let proxy = network.host.inside(|| launch.start());
    let ipv6 = network.host.inside(|| Endpoint::tcp("[::1]:4000", 16));
    let mut client = network.client(Type::STREAM, 1, front.port());
    let mut served = ipv6.accept();
    assert_eq!(peer(&served), CLIENTS[1]);
    assert_forwards(&mut client, &mut served);

    // The other family says nothing about this one.
    assert_eq!(ask(&network, 0, &front), "");
    let line = proxy.lines.wait_for("(--backend-wait=1s is over.)");
    assert!(line.contains("127.0.0.1:4000: Connection refused"), "{line}");
    ipv6.socket.set_nonblocking(true).unwrap();
    assert!(ipv6.socket.accept().is_err(), "no probe goes there");

    let ipv4 = network.host.inside(|| Endpoint::tcp("127.0.0.1:4000", 16));
    serve(&ipv4, tell_peer);
    assert_eq!(ask(&network, 0, &front), CLIENTS[0]);
}

#[test]
fn client_that_cannot_connect_delays_no_other() {
    if !is_root_for("a name with addresses of both families") {
        return;
    }
    let (network, directory) = both_families();
    let [hosts, probes] = ["hosts", "probes"].map(|name| directory.path().join(name));
    let ready = format!("--ready=exec:/bin/sh -c 'echo >>{}'", probes.display());
    let backend = network.host.inside(|| Endpoint::tcp("127.0.0.1:4000", 64));
    serve(&backend, tell_peer);
    for start in [&[][..], &["--start-command=/bin/true"]] {
        fs::write(&probes, "").unwrap();
        let front = network.at_front(|| Endpoint::tcp("[::]:0", 16));
        let launch = Launch::new(OURS).hosts(hosts.clone()).listener(&front).args(start);
        let launch = launch.args(["--source=client", "--backend-wait=2s", &ready]);
        let proxy = network.host.inside(|| launch.arg("both.example:4000").start());
        assert_eq!(ask(&network, 0, &front), CLIENTS[0]);
        // Nothing listens at the address of this client's family.
        let mut refused = network.client(Type::STREAM, 1, front.port());
        refused.set_nonblocking(true).unwrap();
        let mut byte = [0];
        while matches!(refused.read(&mut byte), Err(error) if error.kind() == WouldBlock) {
            assert_eq!(ask(&network, 0, &front), CLIENTS[0]);
        }
        proxy.lines.wait_for("(--backend-wait=2s is over.)");
        assert_eq!(fs::read_to_string(&probes).unwrap().lines().count(), 1, "{start:?}");
    }
}

#[test]
fn command_inherits_no_ambient_capability() {
    if !is_root_for("an ambient capability") {
        return;
    }
    let network = ClientNetwork::joined();
    network.add_rules();
    for (source, set) in [("client", "0000000000000000"), ("proxy", "0000000000002000")] {
        let front = network.at_front(|| Endpoint::tcp("[::]:0", 16));
        let launch = Launch::new(OURS).listener(&front).with_net_raw();
        let launch = launch.arg(format!("--source={source}")).arg("127.0.0.1:4000");
        let show = "grep CapAmb /proc/self/status >&2; exec sleep 60";
        let launch = launch.args(["--", "sh", "-c", show]);
        let proxy = network.host.inside(|| launch.start());
        let _client = network.client(Type::STREAM, 0, front.port());
        let line = proxy.lines.wait_for("CapAmb");
        assert!(line.ends_with(set), "{source}: {line}");
    }
}
