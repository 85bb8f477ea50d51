//! `--proxy-protocol=`, and the names that clients have.

use std::io::Write;
use std::net::Shutdown;
use std::path::Path;
use std::time::Duration;

use socket2::{Domain, SockAddr, Socket, Type};
use tempfile::TempDir;
use tokio::time::Instant;

use crate::Cases;
use crate::Expected::{FailsBefore, OnlyOurs, Shared};
use crate::support::*;

pub(crate) fn register(cases: &mut Cases) {
    let unknown = FailsBefore(258, "the option is unknown");
    cases.add("sends a PROXY v1 header", unknown, proxy_v1);
    let as_ipv6 = OnlyOurs("instead of TCP4");
    cases.add("sends a PROXY v1 header for a dual-stack client", as_ipv6, proxy_v1_dual_stack);
    cases.add("sends a PROXY v2 header", OnlyOurs("a connection to the backend"), proxy_v2);
    cases.add(
        "sends the longest Unix name in a PROXY v2 header",
        OnlyOurs("a connection"),
        longest_name_v2,
    );
    cases.add("serves Unix clients with names of every length", Shared, names_of_every_length);
}

fn proxy_v1(program: &Path) {
    for (address, protocol) in [("127.0.0.1", "TCP4"), ("::1", "TCP6")] {
        let front = Endpoint::tcp(&std::net::SocketAddr::new(ip(address), 0).to_string(), 16);
        has_proxy_header(program, &front, address, protocol);
    }
    let (front, backend) = (Endpoint::new(Family::Unix), Endpoint::new(Family::Unix));
    let args = ["--proxy-protocol=v1", &backend.target];
    let _proxy = Launch::new(program).args(args).listener(&front).start();
    let client = front.connect();
    client.shutdown(Shutdown::Write).unwrap();
    let (bytes, _) = read_all(&mut backend.accept());
    assert_eq!(bytes, b"PROXY UNKNOWN\r\n");
}

fn proxy_v1_dual_stack(program: &Path) {
    has_proxy_header(program, &Endpoint::tcp("[::]:0", 16), "127.0.0.1", "TCP4");
}

fn proxy_v2(program: &Path) {
    for (address, listen) in
        [("127.0.0.1", "127.0.0.1:0"), ("::1", "[::1]:0"), ("127.0.0.1", "[::]:0")]
    {
        let front = Endpoint::tcp(listen, 16);
        let peer: std::net::SocketAddr = std::net::SocketAddr::new(ip(address), front.port());
        let client = connect(&peer.into());
        let header = v2_header_of(program, &front, &client);
        let local = client.local_addr().unwrap().as_socket().unwrap();
        let mut expected = b"\r\n\r\n\0\r\nQUIT\n\x21".to_vec();
        match (local.ip(), peer.ip()) {
            (std::net::IpAddr::V4(from), std::net::IpAddr::V4(to)) => {
                expected.extend([0x11, 0, 12]);
                expected.extend(from.octets().into_iter().chain(to.octets()));
            }
            (std::net::IpAddr::V6(from), std::net::IpAddr::V6(to)) => {
                expected.extend([0x21, 0, 36]);
                expected.extend(from.octets().into_iter().chain(to.octets()));
            }
            _ => unreachable!("both are of one family"),
        }
        expected.extend(local.port().to_be_bytes().into_iter().chain(peer.port().to_be_bytes()));
        assert_eq!(header, expected);
    }
    let front = Endpoint::new(Family::Unix);
    // A client without a name has no address: LOCAL.
    let header = v2_header_of(program, &front, &front.connect());
    assert_eq!(header, b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0");
    let directory = TempDir::new().unwrap();
    let name = directory.path().join("client");
    let client = Socket::new(Domain::UNIX, Type::STREAM, None).unwrap();
    client.bind(&SockAddr::unix(&name).unwrap()).unwrap();
    client.connect(&front.socket.local_addr().unwrap()).unwrap();
    let header = v2_header_of(program, &front, &client);
    assert_eq!(header[..16], *b"\r\n\r\n\0\r\nQUIT\n\x21\x31\0\xd8");
    assert_eq!(header.len(), 16 + 216);
    for (at, path) in [(16, name.to_str().unwrap()), (16 + 108, &front.target)] {
        let with_nul = [path.as_bytes(), b"\0"].concat();
        assert_eq!(header[at..][..with_nul.len()], with_nul);
    }
}

fn longest_name_v2(program: &Path) {
    let front = Endpoint::new(Family::Unix);
    let (_directory, path) = longest_path();
    let client = Socket::new(Domain::UNIX, Type::STREAM, None).unwrap();
    client.bind(&unix_address(&path)).unwrap();
    client.connect(&front.address).unwrap();
    let header = v2_header_of(program, &front, &client);
    assert_eq!(header[16..][..108], path);
}

fn names_of_every_length(program: &Path) {
    let (front, backend) = (Endpoint::new(Family::Unix), echo_backend(Family::Unix));
    let mut proxy = Launch::new(program).arg(&backend.target).listener(&front).start();
    let mut stays = front.connect();
    assert_echoes(&mut stays);
    let (directory, longest) = longest_path();
    let shortest = directory.path().as_os_str().len() + 2;
    let paths = (shortest..=108).map(|length| longest[..length].to_vec());
    let unique = std::process::id().to_be_bytes();
    let abstracts = (0..=103).map(|length| [b"\0", &unique[..], &vec![0xff; length]].concat());
    for name in paths.chain(abstracts) {
        let mut client = Socket::new(Domain::UNIX, Type::STREAM, None).unwrap();
        client.bind(&unix_address(&name)).unwrap();
        client.connect(&front.address).unwrap();
        assert_echoes(&mut client);
    }
    assert_echoes(&mut stays);
    assert!(proxy.is_running());
}

/// A directory, and in it a path of 108 bytes, which is all of `sun_path`.
fn longest_path() -> (TempDir, Vec<u8>) {
    let directory = TempDir::new().unwrap();
    let mut path = directory.path().as_os_str().as_encoded_bytes().to_vec();
    path.push(b'/');
    path.resize(108, b'x');
    (directory, path)
}

/// What a client that says nothing makes the backend get.
fn v2_header_of(program: &Path, front: &Endpoint, client: &Socket) -> Vec<u8> {
    let backend = Endpoint::new(Family::Unix);
    let args = ["--proxy-protocol=v2", &backend.target];
    let _proxy = Launch::new(program).args(args).listener(front).start();
    client.shutdown(Shutdown::Write).unwrap();
    backend.socket.set_nonblocking(true).unwrap();
    let accepted =
        poll_until(Instant::now() + Duration::from_secs(5), || backend.socket.accept().ok());
    let (mut server, _) = accepted.expect("a connection to the backend");
    server.set_nonblocking(false).unwrap();
    let (bytes, _) = read_all(&mut server);
    bytes
}

fn has_proxy_header(program: &Path, front: &Endpoint, address: &str, protocol: &str) {
    let backend = Endpoint::new(Family::Tcp);
    let args = ["--proxy-protocol=v1", &backend.target];
    let mut proxy = Launch::new(program).args(args).listener(front).start();
    let mut client = connect(&std::net::SocketAddr::new(ip(address), front.port()).into());
    client.write_all(b"first bytes").unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    backend.socket.set_nonblocking(true).unwrap();
    let accepted = poll_until(Instant::now() + TIMEOUT, || {
        assert!(
            proxy.is_running(),
            "the option is unknown, no header instead of {protocol}: {}",
            proxy.lines.all()
        );
        backend.socket.accept().ok()
    });
    let (mut server, _) = accepted.expect("a connection to the backend");
    server.set_nonblocking(false).unwrap();
    let (bytes, _) = read_all(&mut server);
    let source = client.local_addr().unwrap().as_socket().unwrap();
    let (source, source_port, port) = (source.ip(), source.port(), front.port());
    let expected =
        format!("PROXY {protocol} {source} {address} {source_port} {port}\r\nfirst bytes");
    let bytes = String::from_utf8(bytes).unwrap();
    assert!(bytes == expected, "{bytes} instead of {protocol}");
}

fn ip(text: &str) -> std::net::IpAddr {
    text.parse().unwrap()
}
