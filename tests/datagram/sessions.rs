//! What a session carries, and between which sockets.

use std::net::SocketAddr;
use std::time::Duration;

use rustix::net::sockopt;
use socket2::{SockRef, Socket};

use crate::peers::*;
use crate::support::*;

#[test]
fn datagrams_of_every_size_pass_whole_between_all_families() {
    for front in KINDS {
        for back in KINDS {
            let backend = echo_peer(back);
            let proxy = Proxy::start(front, &backend.target, &[]);
            let client = proxy.client();
            let largest = match (front, back) {
                (Kind::Unix, Kind::Unix) => 200_000,
                (Kind::Udp6, Kind::Udp6) => 65_527,
                _ => 65_507,
            };
            for size in [1, 0, 64, 1200, 1500, 9000, 0, 65_000, largest, 7] {
                echoes(&client, &random_bytes(size as u64, size));
            }
            assert_eq!(proxy.sessions(), 1, "{front} {back}");
            proxy.assert_adds_up();
            assert_eq!(proxy.value("datagrams_delivered_total", &[]), 20);
        }
    }
}

#[test]
fn what_the_other_family_cannot_carry_is_counted_not_cut() {
    let backend = echo_peer(Kind::Udp);
    let proxy = Proxy::start(Kind::Unix, &backend.target, &[]);
    let client = proxy.client();
    client.send(&[1; 65_508]).unwrap();
    proxy.wait_for_dropped("too_long", 1);
    client.send(&[1; 200_000]).unwrap();
    proxy.wait_for_dropped("too_long", 2);
    echoes(&client, b"the session goes on");
    proxy.assert_adds_up();
}

#[test]
fn longer_than_the_buffer_is_counted_not_cut() {
    let backend = echo_peer(Kind::Unix);
    let proxy = Proxy::start(Kind::Unix, &backend.target, &[]);
    let client = proxy.client();
    sockopt::set_socket_send_buffer_size_force(&client, 2_000_000).expect("this test needs root");
    client.send(&vec![1; 262_145]).unwrap();
    proxy.wait_for_dropped("truncated", 1);
    echoes(&client, b"the session goes on");
}

#[test]
fn each_client_has_a_session_of_its_own() {
    let backend = Peer::new(Kind::Udp);
    let proxy = Proxy::start(Kind::Udp, &backend.target, &[]);
    let clients: Vec<_> = (0..5).map(|_| proxy.client()).collect();
    let mut sources = Vec::new();
    for (number, client) in clients.iter().enumerate() {
        client.send(&[number as u8]).unwrap();
        let (datagram, from) = receive_from(&backend.socket).unwrap();
        assert_eq!(datagram, [number as u8]);
        assert!(!sources.contains(&from));
        sources.push(from);
    }
    for (number, source) in sources.iter().enumerate().rev() {
        backend.socket.send_to(&[number as u8; 3], source).unwrap();
    }
    for (number, client) in clients.iter().enumerate() {
        assert_eq!(receive(client), [number as u8; 3]);
        assert!(client.send(&[]).is_ok() && receive(&backend.socket).is_empty());
    }
    assert_eq!(proxy.sessions(), 5);
}

#[test]
fn answers_leave_from_the_address_that_was_asked() {
    let backend = Peer::new(Kind::Udp);
    for (listens, asked) in [
        ("0.0.0.0:0", &["127.0.0.1", "127.0.0.2", "127.1.2.3"][..]),
        ("[::]:0", &["127.0.0.3", "::1", "127.0.0.1"]),
    ] {
        let front = Peer::udp(listens);
        let port = front.port();
        let proxy = Proxy::start_at(front, &[&backend.target], |launch| launch);
        // One socket, which is not connected, so that it sees where answers come from.
        let unspecified = if asked.contains(&"::1") { "[::]:0" } else { "0.0.0.0:0" };
        let client = Peer::udp(unspecified).socket;
        let mut sessions = Vec::new();
        for ip in asked {
            let mut to = SocketAddr::new(ip.parse().unwrap(), port);
            if let (true, SocketAddr::V4(v4)) = (listens == "[::]:0", to) {
                to = SocketAddr::new(v4.ip().to_ipv6_mapped().into(), port);
            }
            client.send_to(ip.as_bytes(), &to.into()).unwrap();
            let (datagram, session) = receive_from(&backend.socket).unwrap();
            assert_eq!(datagram, ip.as_bytes());
            sessions.push((to, session));
        }
        for (to, session) in sessions.iter().rev() {
            backend.socket.send_to(to.to_string().as_bytes(), session).unwrap();
            let (datagram, from) = receive_from(&client).unwrap();
            assert_eq!(datagram, to.to_string().as_bytes());
            assert_eq!(from.as_socket(), Some(*to), "it came from elsewhere");
        }
        assert_eq!(proxy.sessions(), asked.len() as u64);
    }
}

fn tos(socket: &Socket, tos: u32, is_ipv6: bool) {
    let socket = SockRef::from(socket);
    if is_ipv6 { socket.set_tclass_v6(tos).unwrap() } else { socket.set_tos_v4(tos).unwrap() }
}

/// Receives a datagram, and its type of service.
fn receive_tos(socket: &Socket) -> u8 {
    use std::io::IoSliceMut;
    let mut bytes = [0; 100];
    let mut control = [0_u64; 16];
    let fd = std::os::fd::AsRawFd::as_raw_fd(socket);
    let mut iovec = IoSliceMut::new(&mut bytes);
    // SAFETY: the header points to buffers of the given lengths.
    unsafe {
        let mut header: libc::msghdr = std::mem::zeroed();
        header.msg_iov = (&raw mut iovec).cast();
        header.msg_iovlen = 1;
        header.msg_control = control.as_mut_ptr().cast();
        header.msg_controllen = size_of_val(&control) as _;
        assert!(libc::recvmsg(fd, &raw mut header, 0) >= 0, "{}", std::io::Error::last_os_error());
        let first = libc::CMSG_FIRSTHDR(&raw const header);
        assert!(!first.is_null(), "there is no type of service");
        *libc::CMSG_DATA(first)
    }
}

#[test]
fn type_of_service_and_ecn_pass_both_ways() {
    for (front, back) in [
        (Kind::Udp, Kind::Udp),
        (Kind::Udp6, Kind::Udp6),
        (Kind::Udp, Kind::Udp6),
        (Kind::Udp6, Kind::Udp),
    ] {
        let backend = Peer::new(back);
        let proxy = Proxy::start(front, &backend.target, &[]);
        let client = proxy.client();
        let [client_is_v6, backend_is_v6] = [front, back].map(|kind| kind == Kind::Udp6);
        for (socket, is_v6) in [(&client, client_is_v6), (&backend.socket, backend_is_v6)] {
            let socket = SockRef::from(socket);
            if is_v6 {
                socket.set_recv_tclass_v6(true).unwrap();
            } else {
                socket.set_recv_tos_v4(true).unwrap();
            }
        }
        // Plain, ECT(1), ECT(0), CE; expedited forwarding with ECT(0).
        for value in [0, 1, 2, 3, 0xba, 0] {
            tos(&client, value, client_is_v6);
            client.send(b"there").unwrap();
            assert_eq!(u32::from(receive_tos(&backend.socket)), value, "{front} {back}");
        }
        client.send(b"again").unwrap();
        let (_, session) = receive_from(&backend.socket).unwrap();
        for value in [3, 2, 0xba, 0] {
            tos(&backend.socket, value, backend_is_v6);
            backend.socket.send_to(b"back", &session).unwrap();
            assert_eq!(u32::from(receive_tos(&client)), value, "{front} {back}");
        }
        drop(proxy);
    }
}

/// Sends `bytes` as one buffer of segments (UDP_SEGMENT).
fn send_segments(socket: &Socket, bytes: &[u8], segment: u16) {
    let fd = std::os::fd::AsRawFd::as_raw_fd(socket);
    let value = i32::from(segment);
    // SAFETY: setsockopt(2) reads an int.
    let set = unsafe {
        libc::setsockopt(fd, libc::SOL_UDP, libc::UDP_SEGMENT, (&raw const value).cast(), 4)
    };
    assert_eq!(set, 0);
    socket.send(bytes).unwrap();
}

#[test]
fn segments_keep_their_sizes() {
    for (front, back) in [(Kind::Udp, Kind::Udp), (Kind::Udp6, Kind::Udp), (Kind::Udp, Kind::Unix)]
    {
        for options in [&[][..], &["--proxy-protocol=v2"]] {
            let backend = echo_peer(back);
            let proxy = Proxy::start(front, &backend.target, options);
            let client = proxy.client();
            let header = match (options.is_empty(), front) {
                (true, _) => 0,
                (false, Kind::Udp6) => 52,
                _ => 28,
            };
            // For an echo over a Unix socket few enough for its queue.
            let bytes = random_bytes(7, 5 * 1200 + 200);
            send_segments(&client, &bytes, 1200);
            for segment in bytes.chunks(1200) {
                let answer = receive(&client);
                assert_eq!(&answer[header..], segment, "{front} {back} {options:?}");
            }
            proxy.assert_adds_up();
            assert_eq!(proxy.value("datagrams_delivered_total", &[]), 12);
        }
    }
}

#[test]
fn senders_without_a_name_share_a_session_that_is_one_way() {
    let backend = Peer::new(Kind::Unix);
    let proxy = Proxy::start(Kind::Unix, &backend.target, &[]);
    for number in 0..3 {
        let client = datagram_socket(&proxy.front.address);
        client.send_to(&[number], &proxy.front.address).unwrap();
        let (datagram, from) = receive_from(&backend.socket).unwrap();
        assert_eq!(datagram, [number]);
        assert!(from.as_pathname().is_none() && from.as_abstract_namespace().is_none());
    }
    assert_eq!(proxy.sessions(), 1);
    let named = proxy.client();
    named.send(b"named").unwrap();
    let (_, from) = receive_from(&backend.socket).unwrap();
    backend.socket.send_to(b"answer", &from).unwrap();
    assert_eq!(receive(&named), b"answer");
    assert_eq!(proxy.sessions(), 2);
}

#[test]
fn descriptors_in_unix_datagrams_are_not_opened() {
    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
    let backend = echo_peer(Kind::Unix);
    let proxy = Proxy::start(Kind::Unix, &backend.target, &[]);
    let client = proxy.client();
    echoes(&client, b"first");
    let before = proxy.running.descriptors();
    let fds = [std::os::fd::AsFd::as_fd(&client); 20];
    for _ in 0..5 {
        let mut space = vec![std::mem::MaybeUninit::uninit(); 1024];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
        let bytes = [std::io::IoSlice::new(b"with descriptors")];
        sendmsg(&client, &bytes, &mut control, SendFlags::empty()).unwrap();
        assert_eq!(receive(&client), b"with descriptors");
    }
    assert_eq!(proxy.running.descriptors(), before);
}

#[test]
fn a_restarted_backend_gets_the_datagram_that_was_refused() {
    for front in KINDS {
        for back in KINDS {
            let backend = Peer::new(back);
            let proxy = Proxy::start(front, &backend.target, &[]);
            let client = proxy.client();
            client.send(b"before").unwrap();
            let (_, session) = receive_from(&backend.socket).unwrap();
            backend.socket.send_to(b"answer", &session).unwrap();
            assert_eq!(receive(&client), b"answer");
            let backend = backend.restart();
            // What was sent while nothing listened is lost. What meets its error is not.
            client.send(b"after").unwrap();
            assert_eq!(receive(&backend.socket), b"after", "{front} {back}");
            assert_eq!(proxy.sessions(), 1);
        }
    }
}

#[test]
fn a_backend_that_is_down_costs_no_session() {
    let backend = Peer::new(Kind::Udp);
    let (target, address) = (backend.target.clone(), backend.address.clone());
    drop(backend);
    let proxy = Proxy::start(Kind::Udp, &target, &[]);
    let client = proxy.client();
    for number in 0..3 {
        client.send(&[number]).unwrap();
    }
    proxy.running.lines.wait_for("Failed to send to remote host: ");
    proxy.wait_until("three sent", || proxy.value("datagrams_delivered_total", &[]) == 3);
    let backend = datagram_socket(&address);
    backend.bind(&address).unwrap();
    client.send(b"now").unwrap();
    assert_eq!(receive(&backend), b"now");
    assert_eq!(proxy.sessions(), 1);
}

#[test]
fn a_unix_client_that_does_not_read_delays_no_other() {
    if !is_root_for("a_unix_client_that_does_not_read_delays_no_other") {
        return;
    }
    let backend = Peer::new(Kind::Unix);
    answer(&backend.socket, |datagram| datagram.repeat(60_000));
    let proxy = Proxy::start(Kind::Unix, &backend.target, &[]);
    let (deaf, client) = (proxy.client(), proxy.client());
    for _ in 0..20 {
        deaf.send(b"x").unwrap();
        pause(Duration::from_millis(10));
    }
    for _ in 0..10 {
        client.send(b"y").unwrap();
        assert_eq!(receive(&client).len(), 60_000);
    }
}

#[test]
fn a_name_of_the_listener_makes_no_loop() {
    let port = unused_port();
    let proxy = Launch::new(OURS)
        .arg(format!("--listen=udp:127.0.0.1:{port}"))
        .arg("--log-level=debug")
        .arg(format!("localhost:{port}"))
        .start();
    proxy.lines.wait_for("Listening on");
    let client = client_of(([127, 0, 0, 1], port).into());
    client.send(b"round and round").unwrap();
    proxy.lines.wait_for("Session begun");
    pause(Duration::from_millis(300));
    assert_eq!(proxy.lines.count("Session begun"), 1);
}
