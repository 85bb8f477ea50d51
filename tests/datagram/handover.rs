//! `--handover=`: sessions that outlive the process.

use rustix::process::Signal;

use crate::peers::*;
use crate::support::*;

struct Restarts {
    systemd: FakeSystemd,
    front: Peer,
    words: Vec<String>,
}

impl Restarts {
    fn new(front: Kind, target: &str, mode: &str) -> Self {
        let words = [format!("--handover={mode}"), target.into()].into();
        Self { systemd: FakeSystemd::with_fd_store(4), front: Peer::new(front), words }
    }

    fn start(&self) -> Running {
        let launch = Launch::new(OURS).socket(&self.front.socket);
        let proxy = launch.args(&self.words).stored_by(&self.systemd).start();
        self.systemd.wait_for("READY=1");
        proxy
    }
}

#[test]
fn sessions_go_on_after_a_restart() {
    for (front, back) in
        [(Kind::Udp, Kind::Udp), (Kind::Unix, Kind::Unix), (Kind::Udp6, Kind::Unix)]
    {
        for mode in ["restart", "crash"] {
            let backend = Peer::new(back);
            let restarts = Restarts::new(front, &backend.target, mode);
            let mut proxy = restarts.start();
            let clients: Vec<_> = (0..20).map(|_| restarts.front.client()).collect();
            let mut sessions = Vec::new();
            for client in &clients {
                client.send(b"one").unwrap();
                let (_, session) = receive_from(&backend.socket).unwrap();
                backend.socket.send_to(b"two", &session).unwrap();
                assert_eq!(receive(client), b"two");
                client.send(b"three").unwrap();
                assert_eq!(receive(&backend.socket), b"three");
                sessions.push(session);
            }
            for round in 0..3_u8 {
                if mode == "restart" {
                    proxy.signal(Signal::TERM);
                    assert_eq!(proxy.wait().code(), Some(0));
                } else {
                    proxy.signal(Signal::KILL);
                    proxy.wait();
                }
                // Both ways while there is no proxy.
                let (client, session) = (&clients[0], &sessions[0]);
                client.send(&[round, 1]).unwrap();
                backend.socket.send_to(&[round, 2], session).unwrap();
                proxy = restarts.start();
                proxy.lines.wait_for("Recovered connections: 20.");
                let (datagram, from) = receive_from(&backend.socket).unwrap();
                assert_eq!((datagram, &from), (vec![round, 1], session), "{front} {back} {mode}");
                assert_eq!(receive(client), [round, 2]);
                for (client, session) in clients.iter().zip(&sessions) {
                    client.send(b"again").unwrap();
                    let (datagram, from) = receive_from(&backend.socket).unwrap();
                    assert_eq!((&datagram[..], &from), (&b"again"[..], session));
                    backend.socket.send_to(b"answer", session).unwrap();
                    assert_eq!(receive(client), b"answer");
                }
            }
        }
    }
}

#[test]
fn a_crash_keeps_confirmed_sessions_only() {
    let backend = Peer::new(Kind::Udp);
    let restarts = Restarts::new(Kind::Udp, &backend.target, "crash");
    let mut proxy = restarts.start();
    let [confirmed, other] = [restarts.front.client(), restarts.front.client()];
    let ask = |client: &socket2::Socket| {
        client.send(b"one").unwrap();
        let (_, session) = receive_from(&backend.socket).unwrap();
        backend.socket.send_to(b"two", &session).unwrap();
        assert_eq!(receive(client), b"two");
        session
    };
    ask(&confirmed);
    let (first, second) = (ask(&confirmed), ask(&other));
    proxy.signal(Signal::KILL);
    proxy.wait();
    let proxy = restarts.start();
    proxy.lines.wait_for("Recovered connections: 1.");
    assert_eq!(ask(&confirmed), first);
    assert_ne!(ask(&other), second);
}

/// A proxy that opens its socket, and what it lives through.
struct Opened {
    mode: &'static str,
    systemd: FakeSystemd,
    backend: Peer,
    port: u16,
}

impl Opened {
    fn new(mode: &'static str) -> Self {
        let (systemd, backend) = (FakeSystemd::with_fd_store(4), echo_peer(Kind::Udp));
        Self { mode, systemd, backend, port: Peer::new(Kind::Udp).port() }
    }

    fn start(&self, host: &str) -> Running {
        let launch = Launch::new(OURS).arg(format!("--listen=udp:{host}:{}", self.port));
        let launch = launch.arg(format!("--handover={}", self.mode)).arg(&self.backend.target);
        let proxy = launch.stored_by(&self.systemd).start();
        self.systemd.wait_for("READY=1");
        proxy
    }

    fn stop(&self, proxy: &mut Running) {
        proxy.signal(if self.mode == "restart" { Signal::TERM } else { Signal::KILL });
        proxy.wait();
    }

    fn client(&self) -> socket2::Socket {
        client_of(([127, 0, 0, 1], self.port).into())
    }
}

#[test]
fn sockets_that_the_proxy_opened_outlive_it() {
    for opened in ["restart", "crash"].map(Opened::new) {
        let mut proxy = opened.start("127.0.0.1");
        let client = opened.client();
        for _ in 0..3 {
            echoes(&client, b"one");
            echoes(&client, b"two");
            opened.stop(&mut proxy);
            // The kernel keeps it.
            client.send(b"three").unwrap();
            proxy = opened.start("127.0.0.1");
            assert_eq!(receive(&client), b"three", "{}", opened.mode);
        }
    }
}

#[test]
fn a_socket_that_the_proxy_opened_can_have_another_address_of_its_port() {
    for opened in ["restart", "crash"].map(Opened::new) {
        for host in ["127.0.0.1", "0.0.0.0", "127.0.0.1"] {
            let mut proxy = opened.start(host);
            echoes(&opened.client(), b"one");
            opened.stop(&mut proxy);
        }
    }
}

#[test]
fn a_restored_session_leaves_a_target_that_is_gone() {
    let (old, new) = (echo_peer(Kind::Udp), echo_peer(Kind::Udp));
    let gone = Peer::new(Kind::Udp);
    let mut restarts = Restarts::new(Kind::Udp, &gone.target, "restart");
    let mut proxy = restarts.start();
    let client = restarts.front.client();
    client.send(b"one").unwrap();
    receive(&gone.socket);
    proxy.signal(Signal::TERM);
    proxy.wait();
    drop((gone, old));
    restarts.words[1] = new.target.clone();
    let proxy = restarts.start();
    proxy.lines.wait_for("Recovered connections: 1.");
    client.send(b"lost with its error").unwrap();
    proxy.lines.wait_for("Connection refused");
    echoes(&client, b"two");
}

#[test]
fn sessions_of_a_socket_that_is_gone_are_counted_as_lost() {
    let backend = echo_peer(Kind::Udp);
    let mut restarts = Restarts::new(Kind::Udp, &backend.target, "restart");
    let mut proxy = restarts.start();
    let client = restarts.front.client();
    echoes(&client, b"one");
    proxy.signal(Signal::TERM);
    proxy.wait();
    restarts.front = Peer::new(Kind::Udp);
    let proxy = restarts.start();
    proxy.lines.wait_for("Failed to restore sessions of datagrams: 1.");
    echoes(&restarts.front.client(), b"two");
}
