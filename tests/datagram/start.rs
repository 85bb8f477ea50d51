//! Which sockets are taken, and which are refused.

use std::process::ExitStatus;

use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use socket2::{Domain, Socket, Type};
use tempfile::TempDir;

use crate::peers::*;
use crate::support::*;

fn fails(launch: Launch) -> String {
    let mut proxy = launch.start();
    let status: ExitStatus = proxy.wait();
    assert_eq!(status.code(), Some(1));
    proxy.lines.all()
}

#[test]
fn streams_and_datagrams_share_a_process_and_a_target() {
    let (streams, backend) = (echo_backend(Family::Tcp), echo_peer(Kind::Udp));
    let stream = Endpoint::new(Family::Tcp);
    let front = Peer::new(Kind::Udp);
    let by_kind = format!("udp:{}={}", front.target, backend.target);
    let by_address = format!("{}={}", stream.target, streams.target);
    let proxy = Proxy::start_at(front, &[&by_kind, &by_address], |launch| launch.listener(&stream));
    echoes(&proxy.client(), b"a datagram");
    assert_echoes(&mut stream.connect());
    assert_eq!((proxy.sessions(), proxy.value("connections_total", &[])), (1, 1));
}

#[test]
fn a_selector_with_a_kind_goes_before_one_without() {
    let streams = echo_backend(Family::Tcp);
    let (front, stream) = Peer::udp_and_tcp("127.0.0.1");
    let backend = echo_peer(Kind::Unix);
    let [all, udp] = [
        format!(":{}={}", stream.port(), streams.target),
        format!("udp::{}={}", stream.port(), backend.target),
    ];
    let proxy = Proxy::start_at(front, &[&all, &udp], |launch| launch.listener(&stream));
    echoes(&proxy.client(), b"a datagram");
    assert_echoes(&mut stream.connect());
}

#[test]
fn the_proxy_opens_datagram_sockets() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("socket");
    let (udp, unix) = (echo_peer(Kind::Udp), echo_peer(Kind::Unix));
    let port = unused_port();
    let name = format!("@socket-proxyd-test-{}", std::process::id());
    let mut proxy = Launch::new(OURS)
        .arg(format!("--listen=udp:{port}"))
        .arg(format!("--listen=dgram:{}", path.display()))
        .arg(format!("--listen=dgram:{name}"))
        .arg(format!("--listen=udp:localhost:{}", unused_port()))
        .arg(format!("udp::{port}={}", udp.target))
        .arg(format!("dgram:{}={}", path.display(), unix.target))
        .arg(format!("dgram:{name}={}", udp.target))
        .arg(format!("udp:127.0.0.1:{port}={}", udp.target))
        .start();
    // The last selector selects nothing: the line names all sockets.
    assert_eq!(proxy.wait().code(), Some(1));
    let line = proxy.lines.all();
    assert!(line.contains(&format!("udp:[::]:{port}, dgram:{}, ", path.display())), "{line}");
    assert!(!path.exists(), "the socket file is removed");

    let proxy = Launch::new(OURS)
        .arg(format!("--listen=udp:{port}"))
        .arg(format!("--listen=dgram:{}", path.display()))
        .arg(format!("--listen=dgram:{name}"))
        .arg(&udp.target)
        .start();
    proxy.lines.wait_for(&format!("Listening on udp:[::]:{port}."));
    proxy.lines.wait_for(&format!("Listening on dgram:{name}."));
    for address in ["127.0.0.1", "[::1]"] {
        echoes(&client_of(format!("{address}:{port}").parse().unwrap()), b"over UDP");
    }
    let front = socket2::SockAddr::unix(&path).unwrap();
    let client = datagram_socket(&front);
    rustix::net::bind(&client, &rustix::net::SocketAddrUnix::new_unnamed()).unwrap();
    client.connect(&front).unwrap();
    echoes(&client, b"over a Unix socket");
    drop(proxy);
}

#[test]
fn what_cannot_be_a_session_is_refused_at_the_start() {
    let target = "127.0.0.1:9";
    let start = |socket: &dyn Fn(Launch) -> Launch| socket(Launch::new(OURS)).arg(target);

    let socket = Socket::new(Domain::UNIX, Type::SEQPACKET, None).unwrap();
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("socket");
    socket.bind(&socket2::SockAddr::unix(&path).unwrap()).unwrap();
    socket.listen(5).unwrap();
    let error = fails(start(&|launch| launch.socket(&socket)));
    assert_eq!(error, "Passed in socket is not a stream socket.");

    let client = echo_peer(Kind::Udp).client();
    let error = fails(start(&|launch| launch.socket(&client)));
    assert!(error.starts_with("Passed in socket unknown is connected: "), "{error}");
    let (one, _other) =
        socketpair(AddressFamily::UNIX, SocketType::DGRAM, SocketFlags::CLOEXEC, None).unwrap();
    let error = fails(start(&|launch| launch.socket(&one)));
    assert!(error.starts_with("Passed in socket unknown is connected: "), "{error}");

    let front = Peer::new(Kind::Udp);
    let v1 = fails(start(&|it| it.socket(&front.socket)).arg("--proxy-protocol=v1"));
    assert!(v1.contains("--proxy-protocol=v1 cannot be combined"), "{v1}");
    let vsock = fails(Launch::new(OURS).socket(&front.socket).arg("vsock:3:53"));
    assert!(vsock.contains("TARGET vsock:3:53 cannot be reached from"), "{vsock}");
    let vsock = format!("{}=vsock:3:53", front.target);
    let vsock = fails(Launch::new(OURS).socket(&front.socket).arg(vsock));
    assert!(vsock.contains("TARGET vsock:3:53 cannot be reached from"), "{vsock}");
    let free = Peer::new(Kind::Udp).target.clone();
    let listen = format!("--listen=udp:{free}");
    let itself = fails(Launch::new(OURS).args([&listen, &free]));
    assert!(itself.contains(&format!("{listen} leads to itself")), "{itself}");

    for (option, reason) in [
        ("--listen=udp:/run/a", "a Unix socket is dgram:/path"),
        ("--listen=dgram:53", "UDP is udp:PORT"),
        ("--listen=udp:vsock:2:53", "udp: stands before PORT or HOST:PORT"),
        ("--session-idle-time=infinity", "it must be a time, not infinity"),
        ("--session-idle-time=0", "it must be more than 0"),
        ("--metrics=udp:9100", "it must be a TCP or Unix socket"),
    ] {
        let error = fails(Launch::new(OURS).args([option, target]));
        assert!(error.contains(reason), "{option}: {error}");
    }
    let error = fails(Launch::new(OURS).args(["udp:127.0.0.1:53"]));
    assert!(error.contains("write it without udp: or dgram:"), "{error}");
}
