//! TARGET, and the connect to it.

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::path::Path;
use std::thread;
use std::time::Duration;

use socket2::{Domain, SockAddr, Socket, Type};
use tempfile::TempDir;
use tokio::time::Instant;

use crate::Expected::{OnlyOurs, Shared};
use crate::support::*;
use crate::{Cases, echoes_after, unique_name};

pub(crate) fn register(cases: &mut Cases) {
    cases.add("resolves a host name", Shared, name_is_resolved);
    cases.add("splits ::1:80 at the last colon", Shared, last_colon);
    cases.add("accepts [::1]:80", OnlyOurs("the echo backend answers"), brackets);
    cases.add("connects to an abstract socket", Shared, abstract_socket);
    let first_only = OnlyOurs("only one address was tried");
    cases.add_as_root("tries every address of a name", first_only, every_address);
    cases.add(
        "gives up after --connect-timeout=",
        OnlyOurs("unrecognized option"),
        connect_timeout,
    );
    cases.add(
        "notices a client that leaves during the connect",
        OnlyOurs("unrecognized option"),
        leaves_early,
    );
    cases.add("waits for a full Unix backlog", OnlyOurs("the echo backend answers"), full_backlog);
    let many = OnlyOurs("more than 60 ms");
    cases.add("2,000 clients wait for a full Unix backlog", many, |program| {
        full_backlog_of_many(program, &["--connect-timeout=1min"])
    });
    cases.add("2,000 clients wait for a full Unix backlog with --backend-wait=", many, |program| {
        full_backlog_of_many(program, &["--backend-wait=1min"])
    });
}

fn name_is_resolved(program: &Path) {
    let (front, backend) = (Endpoint::new(Family::Tcp), echo_backend(Family::Tcp));
    let target = format!("localhost:{}", backend.port());
    let _proxy = Launch::new(program).arg(target).listener(&front).start();
    assert_echoes(&mut front.connect());
}

fn every_address(program: &Path) {
    // First at one address, then at the other: a program that tries only one fails once.
    let port = reach_by_name(program, "127.0.0.1:0");
    reach_by_name(program, &format!("127.0.0.9:{port}"));
}

fn reach_by_name(program: &Path, address: &str) -> u16 {
    let (front, backend) = (Endpoint::new(Family::Tcp), Endpoint::tcp(address, 16));
    let directory = TempDir::new().unwrap();
    let hosts = directory.path().join("hosts");
    fs::write(&hosts, "127.0.0.1 two-faced\n127.0.0.9 two-faced\n").unwrap();
    let port = backend.port();
    let launch = Launch::new(program).arg(format!("two-faced:{port}"));
    let _proxy = launch.listener(&front).hosts(hosts).start();
    let mut client = front.connect();
    client.write_all(b"which one?").unwrap();
    backend.socket.set_nonblocking(true).unwrap();
    let found =
        poll_until(Instant::now() + Duration::from_secs(5), || backend.socket.accept().ok());
    assert!(found.is_some(), "only one address was tried");
    port
}

fn ipv6_backend() -> Endpoint {
    let backend = Endpoint::tcp("[::1]:0", 16);
    serve(&backend, echo);
    backend
}

fn last_colon(program: &Path) {
    let (front, backend) = (Endpoint::new(Family::Tcp), ipv6_backend());
    let target = format!("::1:{}", backend.port());
    let _proxy = Launch::new(program).arg(target).listener(&front).start();
    assert_echoes(&mut front.connect());
}

fn brackets(program: &Path) {
    let (front, backend) = (Endpoint::new(Family::Tcp), ipv6_backend());
    let target = format!("[::1]:{}", backend.port());
    let _proxy = Launch::new(program).arg(target).listener(&front).start();
    assert_echoes(&mut front.connect());
}

fn abstract_socket(program: &Path) {
    let name = format!("socket-proxyd-test-{}", unique_name());
    let address = SockAddr::unix(format!("\0{name}")).unwrap();
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None).unwrap();
    socket.bind(&address).unwrap();
    socket.listen(16).unwrap();
    let handle = socket.try_clone().unwrap();
    thread::spawn(move || echo(handle.accept().unwrap().0));
    let front = Endpoint::new(Family::Unix);
    let _proxy = Launch::new(program).arg(format!("@{name}")).listener(&front).start();
    assert_echoes(&mut front.connect());
}

/// A TCP backend whose backlog is full, so that the kernel drops new connections.
fn black_hole() -> (Endpoint, Vec<Socket>) {
    let backend = Endpoint::with_backlog(Family::Tcp, 0);
    let mut crowd = Vec::new();
    loop {
        let socket = Socket::new(Domain::IPV4, Type::STREAM.nonblocking(), None).unwrap();
        let _ = socket.connect(&backend.address);
        crowd.push(socket);
        let last = crowd.last().unwrap();
        let established = poll_until(Instant::now() + Duration::from_millis(50), || {
            last.peer_addr().is_ok().then_some(())
        });
        if established.is_none() {
            return (backend, crowd);
        }
    }
}

fn connect_timeout(program: &Path) {
    let (backend, _crowd) = black_hole();
    let front = Endpoint::new(Family::Tcp);
    let args = ["--connect-timeout=300ms", &backend.target];
    let mut proxy = Launch::new(program).args(args).listener(&front).start();
    let start = Instant::now();
    let mut client = front.connect();
    // Of an original, which refuses the option, the listener ends with the process.
    drop(front);
    let (bytes, end) = read_all(&mut client);
    assert!(bytes.is_empty());
    if end.is_err() {
        proxy.wait();
        panic!("{}", proxy.lines.all());
    }
    let took = start.elapsed();
    let bounds = Duration::from_millis(300)..Duration::from_secs(3);
    assert!(bounds.contains(&took), "{took:?}");
    let line = proxy.lines.wait_for("Failed to connect to remote host");
    assert!(line.contains(" timed out"), "{line}");
}

fn leaves_early(program: &Path) {
    let (backend, _crowd) = black_hole();
    let front = Endpoint::new(Family::Tcp);
    let args = ["--connect-timeout=1h", "--log-level=debug", "-c1", &backend.target];
    let mut proxy = Launch::new(program).args(args).listener(&front).start();
    let client = front.connect();
    client.send(b"hello?").unwrap();
    let taken = poll_until(Instant::now() + TIMEOUT, || {
        if !proxy.is_running() {
            panic!("{}", proxy.lines.all());
        }
        (proxy.descriptors() > 10).then_some(())
    });
    taken.expect("the client is accepted");
    reset(client);
    proxy.lines.wait_for("Connection ended by the client before it had a backend");
}

fn full_backlog(program: &Path) {
    let front = Endpoint::new(Family::Tcp);
    let backend = Endpoint::with_backlog(Family::Unix, 0);
    let fill = Socket::new(Domain::UNIX, Type::STREAM.nonblocking(), None).unwrap();
    fill.connect(&backend.address).unwrap();
    let probe = Socket::new(Domain::UNIX, Type::STREAM.nonblocking(), None).unwrap();
    let full = probe.connect(&backend.address).unwrap_err();
    assert_eq!(full.kind(), ErrorKind::WouldBlock, "the backlog is not full");
    let proxy = Launch::new(program).arg(&backend.target).listener(&front).start();
    let mut client = front.connect();
    client.write_all(b"patience").unwrap();
    // The proxy has met the full backlog once it has accepted the client and slept over it.
    let sleeps = || (proxy.cpu() > Duration::ZERO && proxy.is_asleep()).then_some(());
    poll_until(Instant::now() + TIMEOUT, sleeps).expect("the proxy sleeps");
    pause(Duration::from_millis(300));
    serve(&backend, echo);
    echoes_after(&mut client, b"patience");
}

/// At most 20 ms of a processor a second, at three times that here, and none is lost.
fn full_backlog_of_many(program: &Path, args: &[&str]) {
    const CLIENTS: usize = 2000;
    let front = Endpoint::new(Family::Unix);
    let backend = Endpoint::with_backlog(Family::Unix, 0);
    let fill = Socket::new(Domain::UNIX, Type::STREAM.nonblocking(), None).unwrap();
    fill.connect(&backend.address).unwrap();
    let launch = Launch::new(program).args(args).args(["-c4000", &backend.target]);
    let proxy = launch.listener(&front).start();
    let mut clients: Vec<_> = (0..CLIENTS).map(|_| front.connect()).collect();
    clients.iter_mut().for_each(|client| client.write_all(b"patience").unwrap());
    // All clients are accepted.
    let settled = || {
        let before = proxy.cpu();
        pause(Duration::from_millis(500));
        (proxy.descriptors() > CLIENTS && proxy.cpu() - before < Duration::from_millis(30))
            .then_some(())
    };
    let settled = poll_until(Instant::now() + Duration::from_secs(6), settled);
    assert!(settled.is_some(), "more than 60 ms of a processor a second");
    // One after the other, as a backend without a backlog takes them.
    let listener = backend.socket.try_clone().unwrap();
    thread::spawn(move || {
        let echo_once = |mut socket: Socket| {
            let mut bytes = [0; 8];
            let _ = socket.read_exact(&mut bytes).and_then(|()| socket.write_all(&bytes));
        };
        while let Ok((socket, _)) = listener.accept() {
            thread::spawn(move || echo_once(socket));
        }
    });
    clients.iter_mut().for_each(|client| echoes_after(client, b"patience"));
}
