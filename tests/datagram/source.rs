//! --source=client: the backend sees the client's IP address.

use socket2::Type;

use crate::peers::*;
use crate::support::*;

/// The address that the next datagram comes from, as text.
fn next_sender(backend: &Peer) -> String {
    let (datagram, from) = receive_from(&backend.socket).unwrap();
    backend.socket.send_to(&datagram, &from).unwrap();
    from.as_socket().unwrap().ip().to_string()
}

fn backend_sees_clients(network: &ClientNetwork) {
    for (address, shown, family) in [("127.0.0.1:0", 0, "IPv6"), ("[::1]:0", 1, "IPv4")] {
        let front = network.at_front(|| Peer::udp("[::]:0"));
        let backend = network.host.inside(|| Peer::udp(address));
        let port = front.port();
        let proxy = Proxy::start_in(&network.host, front, &["--source=client", &backend.target]);
        let client = network.client(Type::DGRAM, shown, port);
        for message in [&b"one"[..], b"another"] {
            client.send(message).unwrap();
            assert_eq!(next_sender(&backend), CLIENTS[shown]);
            assert_eq!(receive(&client), message);
        }
        network.client(Type::DGRAM, 1 - shown, port).send(b"refused").unwrap();
        proxy.wait_for_dropped("unreachable", 1);
        let line = proxy.running.lines.wait_for("it cannot be reached from the client's");
        assert!(line.contains(&format!("{family} address (--source=client)")), "{line}");
        proxy.assert_adds_up();
        assert_eq!(proxy.sessions(), 1);
    }
}

#[test]
fn sessions_in_a_namespace_of_their_own_come_from_clients() {
    if !is_root_for("--source=client in a network namespace") {
        return;
    }
    let network = ClientNetwork::isolated();
    network.add_any_ip();
    backend_sees_clients(&network);
}

#[test]
fn sessions_on_a_host_come_from_clients() {
    if !is_root_for("--source=client with rules") {
        return;
    }
    let network = ClientNetwork::joined();
    network.add_rules();
    backend_sees_clients(&network);
}

#[test]
fn first_datagram_of_a_session_that_waits_comes_from_the_client() {
    if !is_root_for("--source=client in a network namespace") {
        return;
    }
    let network = ClientNetwork::isolated();
    network.add_any_ip();
    let front = network.at_front(|| Peer::udp("[::]:0"));
    let port = front.port();
    let words = ["--source=client", "--backend-wait=30s", "127.0.0.1:4000"];
    let proxy = Proxy::start_in(&network.host, front, &words);
    let client = network.client(Type::DGRAM, 0, port);
    client.send(b"patience").unwrap();
    // The first probe is refused.
    proxy.wait_until("a refusal", || proxy.value("connect_errors_total", &[]) > 0);
    let backend = network.host.inside(|| Peer::udp("127.0.0.1:4000"));
    assert_eq!(next_sender(&backend), CLIENTS[0]);
    assert_eq!(receive(&client), b"patience");
}
