//! The limits on sessions, and floods.

use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use rustix::net::sockopt;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::time::Instant;

use crate::peers::*;
use crate::support::*;

#[test]
fn a_session_that_is_not_confirmed_gives_way_and_a_confirmed_one_never() {
    let backend = echo_peer(Kind::Udp);
    let proxy = Proxy::start(Kind::Udp, &backend.target, &["--connections-max=3"]);
    let confirmed: Vec<_> = (0..2).map(|_| proxy.client()).collect();
    for client in &confirmed {
        echoes(client, b"one");
        echoes(client, b"two");
    }
    for number in 0..10 {
        echoes(&proxy.client(), &[number]);
    }
    assert_eq!((proxy.sessions(), proxy.value("sessions_evicted_total", &[])), (3, 9));
    for client in &confirmed {
        echoes(client, b"three");
    }
    let third = proxy.client();
    echoes(&third, b"one");
    echoes(&third, b"two");
    let fourth = proxy.client();
    fourth.send(b"no room").unwrap();
    proxy.wait_for_dropped("limit", 1);
    assert!(is_silent(&fourth));
    echoes(&third, b"three");
    proxy.running.lines.wait_for("Hit connection limit, dropping datagrams of a new client");
    proxy.assert_adds_up();
}

#[test]
fn connections_and_sessions_share_the_limit() {
    let (streams, backend) = (echo_backend(Family::Tcp), echo_peer(Kind::Udp));
    let stream = Endpoint::new(Family::Tcp);
    let front = Peer::new(Kind::Udp);
    let words = [
        "--connections-max=2".to_string(),
        format!("udp:{}={}", front.target, backend.target),
        format!("{}={}", stream.target, streams.target),
    ];
    let words: Vec<_> = words.iter().map(|word| &**word).collect();
    let proxy = Proxy::start_at(front, &words, |launch| launch.listener(&stream));
    let (client, other) = (proxy.client(), proxy.client());
    echoes(&client, b"one");
    echoes(&other, b"one");
    // Each connection takes the place of a session.
    let mut connections = [stream.connect(), stream.connect()];
    connections.iter_mut().for_each(assert_echoes);
    assert_eq!((proxy.sessions(), proxy.value("sessions_evicted_total", &[])), (0, 2));
    client.send(b"no room").unwrap();
    proxy.wait_for_dropped("limit", 1);
    let [first, mut second] = connections;
    drop(first);
    proxy.wait_until("one connection", || proxy.value("connections_open", &[]) == 1);
    echoes(&client, b"one");
    echoes(&client, b"two");
    // A confirmed session gives way to no connection.
    assert!(read_all(&mut stream.connect()).0.is_empty());
    assert_echoes(&mut second);
    echoes(&client, b"three");
}

#[test]
fn a_source_has_a_limit_of_its_own() {
    let backend = echo_peer(Kind::Udp);
    let front = Peer::udp("0.0.0.0:0");
    let port = front.port();
    let words = ["--connections-max-per-source=2", &backend.target];
    let proxy = Proxy::start_at(front, &words, |launch| launch);
    let from = |ip: &str| {
        let client = Peer::udp(&format!("{ip}:0")).socket;
        client.connect(&SocketAddr::from((Ipv4Addr::LOCALHOST, port)).into()).unwrap();
        client
    };
    let clients = [from("127.0.0.5"), from("127.0.0.5"), from("127.0.0.6")];
    clients.iter().for_each(|client| echoes(client, b"served"));
    from("127.0.0.5").send(b"one too many").unwrap();
    proxy.wait_for_dropped("source_limit", 1);
    clients.iter().for_each(|client| echoes(client, b"still"));
}

#[test]
fn a_source_at_its_limit_ends_no_session_of_others() {
    let backend = echo_peer(Kind::Udp);
    let front = Peer::udp("0.0.0.0:0");
    let port = front.port();
    let words = [
        "--connections-max=2",
        "--overflow=wait",
        "--connections-max-per-source=1",
        &backend.target,
    ];
    let proxy = Proxy::start_at(front, &words, |launch| launch);
    let from = |ip: &str| {
        let client = Peer::udp(&format!("{ip}:0")).socket;
        client.connect(&SocketAddr::from((Ipv4Addr::LOCALHOST, port)).into()).unwrap();
        client
    };
    let clients = [from("127.0.0.5"), from("127.0.0.6")];
    clients.iter().for_each(|client| echoes(client, b"served"));
    from("127.0.0.6").send(b"one too many").unwrap();
    proxy.wait_for_dropped("source_limit", 1);
    assert_eq!((proxy.sessions(), proxy.value("sessions_evicted_total", &[])), (2, 0));
}

#[test]
fn descriptors_bound_the_sessions() {
    let backend = echo_peer(Kind::Udp);
    let words = ["--connections-max=100000", &backend.target];
    let proxy = Proxy::start_at(Peer::new(Kind::Udp), &words, |launch| launch.descriptors(400));
    let confirmed = proxy.client();
    echoes(&confirmed, b"one");
    echoes(&confirmed, b"two");
    for number in 0..600_u16 {
        echoes(&proxy.client(), &number.to_be_bytes());
    }
    assert!(proxy.running.descriptors() <= 400);
    assert!(proxy.value("sessions_evicted_total", &[]) > 300);
    echoes(&confirmed, b"three");
    proxy.assert_adds_up();
}

#[test]
fn sources_without_an_answer_are_dropped() {
    if !is_root_for("sources_without_an_answer_are_dropped") {
        return;
    }
    let namespace = NetworkNamespace::new();
    namespace.run("ip link set lo up");
    let (backend, front) = namespace.inside(|| (echo_peer(Kind::Udp), Peer::udp("127.0.0.1:0")));
    let port = front.port();
    let proxy = Proxy::start_in(&namespace, front, &[&backend.target]);
    namespace.inside(|| {
        let raw = raw_socket();
        send_from(&raw, Ipv4Addr::new(127, 0, 0, 9), 0, port, b"port 0");
        send_from(&raw, Ipv4Addr::new(127, 0, 0, 9), 7, port, b"a client");
    });
    proxy.wait_for_dropped("source", 1);
}

/// A socket for packets with headers of our own (raw(7)).
fn raw_socket() -> Socket {
    let raw = Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::from(libc::IPPROTO_RAW)));
    raw.expect("this test needs root")
}

/// Sends a UDP datagram from a made-up source.
fn send_from(raw: &Socket, source: Ipv4Addr, source_port: u16, port: u16, payload: &[u8]) {
    let mut packet = Vec::with_capacity(28 + payload.len());
    let length = (8 + payload.len()) as u16;
    // Version and header length; the kernel fills in the lengths, the identification and the sum.
    packet.extend([0x45, 0, 0, 0, 0, 0, 0, 0, 64, libc::IPPROTO_UDP as u8, 0, 0]);
    packet.extend(source.octets());
    packet.extend(Ipv4Addr::LOCALHOST.octets());
    packet.extend([source_port, port, length].map(u16::to_be_bytes).concat());
    // Without a checksum.
    packet.extend([0, 0]);
    packet.extend(payload);
    let to = SocketAddr::from((Ipv4Addr::LOCALHOST, 0)).into();
    while raw.send_to(&packet, &to).is_err() {}
}

/// The datagrams of a flood.
const MADE_UP: &[u8] = b"made up";

/// What the flood does to 50 clients with confirmed sessions.
struct Loss {
    asked: u64,
    answered: u64,
}

/// Asks by 50 clients, again and again, until the flood is over. Waits for their answers for
/// `patience` before they ask again.
fn talk(clients: &[Socket], patience: Duration, is_over: &AtomicBool) -> Loss {
    clients.iter().for_each(|client| client.set_nonblocking(true).unwrap());
    let mut loss = Loss { asked: 0, answered: 0 };
    let receive_all = |until: Instant, expected: u64| {
        let mut answered = 0;
        while answered < expected && Instant::now() < until {
            let received = clients.iter().filter(|client| receive_from(client).is_ok()).count();
            answered += received as u64;
            if received == 0 {
                pause(Duration::from_millis(1));
            }
        }
        answered
    };
    while !is_over.load(Ordering::Relaxed) {
        for client in clients {
            client.send(b"is anybody there?").unwrap();
        }
        loss.asked += clients.len() as u64;
        let left = loss.asked - loss.answered;
        loss.answered += receive_all(Instant::now() + patience, left);
    }
    // What comes late.
    let left = loss.asked - loss.answered;
    loss.answered += receive_all(Instant::now() + Duration::from_secs(1), left);
    loss
}

/// What waits in a socket's queue, in bytes of the kernel's memory, and how many datagrams were lost
/// because it was full: SO_MEMINFO (linux/sock_diag.h).
fn queue(socket: &Socket) -> (u32, u64) {
    let mut memory = [0_u32; libc::SK_MEMINFO_DROPS as usize + 1];
    let mut length = size_of_val(&memory) as libc::socklen_t;
    // SAFETY: the kernel writes at most `length` bytes to `memory`, which is that long.
    let result = unsafe {
        let memory = memory.as_mut_ptr().cast();
        let (level, name) = (libc::SOL_SOCKET, libc::SO_MEMINFO);
        libc::getsockopt(socket.as_raw_fd(), level, name, memory, &mut length)
    };
    assert_eq!(result, 0);
    let value = |index: i32| memory[index as usize];
    (value(libc::SK_MEMINFO_RMEM_ALLOC), value(libc::SK_MEMINFO_DROPS).into())
}

#[derive(Clone, Copy, PartialEq)]
enum Pace {
    /// As fast as they go.
    None,
    /// Never more than the listener's queue has room for.
    ByQueue,
}

/// 50 clients talk beside a flood of so many datagrams from made-up sources.
fn flood(datagrams: u32, pace: Pace) {
    let beside_no_other = busy();
    let namespace = NetworkNamespace::new();
    for command in ["ip link set lo up", "sysctl -qw net.ipv4.conf.all.rp_filter=0"] {
        namespace.run(command);
    }
    let (backend, front) = namespace.inside(|| (Peer::new(Kind::Udp), Peer::udp("127.0.0.1:0")));
    // It is not what is tested: its queue has room, and it answers only the clients.
    sockopt::set_socket_recv_buffer_size_force(&backend.socket, 1 << 26).unwrap();
    answer_some(&backend.socket, |datagram| datagram != MADE_UP);
    let (port, target) = (front.port(), backend.target.clone());
    let address = front.address.clone();
    let listener = front.socket.try_clone().unwrap();
    let words = ["--connections-max=1000", &target];
    let proxy = Proxy::start_in(&namespace, front, &words);
    let clients: Vec<_> = namespace.inside(|| {
        let client = || {
            let client = datagram_socket(&address);
            client.connect(&address).unwrap();
            echoes(&client, b"one");
            echoes(&client, b"two");
            client
        };
        std::iter::repeat_with(client).take(50).collect()
    });
    let before = proxy.running.resident();
    let is_over = AtomicBool::new(false);
    let (clients, is_over) = (&clients, &is_over);
    let loss = thread::scope(|scope| {
        // Where nothing is lost they ask again when all are answered.
        let patience = if pace == Pace::None { Duration::from_millis(50) } else { TIMEOUT };
        let talking = scope.spawn(move || talk(clients, patience, is_over));
        namespace.inside(|| {
            let raw = raw_socket();
            for number in 0..datagrams {
                // 100,000 sources.
                let source = Ipv4Addr::from_bits(0x0a00_0000 + number % 100_000);
                send_from(&raw, source, 1000 + (number / 100_000) as u16 % 100, port, MADE_UP);
                if pace == Pace::ByQueue && number % 50 == 0 {
                    // Of 208 KiB; 50 datagrams take 38 KiB, and as much those of the clients.
                    let has_room = || (queue(&listener).0 < 64 * 1024).then_some(());
                    poll_until(Instant::now() + TIMEOUT, has_room).expect("the queue gets empty");
                }
            }
        });
        is_over.store(true, Ordering::Relaxed);
        talking.join().unwrap()
    });
    let after = proxy.running.resident();
    drop(beside_no_other);
    assert!(after < before + 16 * 1024, "{before} KiB, then {after} KiB");
    let (_, by_queue) = queue(&listener);
    let lost = loss.asked - loss.answered;
    eprintln!("{datagrams} datagrams: {} asked, {lost} lost, {by_queue} by the queue", loss.asked);
    if pace == Pace::ByQueue {
        assert_eq!((lost, by_queue), (0, 0), "of {}", loss.asked);
    }
    assert!(lost <= by_queue);
    // The made-up sessions gave way or end by themselves, and none of the confirmed has.
    for reason in ["held", "too_long", "error", "truncated", "limit"] {
        let labels = ["from_client", &format!("reason=\"{reason}\"")];
        assert_eq!(proxy.value("datagrams_dropped_total", &labels), 0, "{reason}");
    }
    let received = proxy.value("datagrams_received_total", &["from_client"]);
    assert_eq!(received + by_queue, u64::from(datagrams) + loss.asked + 100);
    let since = Instant::now();
    let gone = || (proxy.sessions() <= 50).then_some(());
    let gone = poll_until(since + Duration::from_secs(60), gone);
    assert!(gone.is_some() && since.elapsed() < Duration::from_secs(35));
}

#[test]
fn a_flood_from_made_up_sources_does_not_end_confirmed_sessions() {
    if is_root_for("a_flood_from_made_up_sources_does_not_end_confirmed_sessions") {
        flood(1_000_000, Pace::None);
    }
}

#[test]
fn a_paced_flood_loses_nothing() {
    if is_root_for("a_paced_flood_loses_nothing") {
        flood(100_000, Pace::ByQueue);
    }
}
