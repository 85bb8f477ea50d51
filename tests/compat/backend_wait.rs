//! `--backend-wait=`: clients wait until the backend is up.

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::thread;
use std::time::Duration;

use socket2::{SockAddr, Socket, Type};
use tempfile::TempDir;
use tokio::time::Instant;

use crate::Cases;
use crate::Expected::OnlyOurs;
use crate::echoes_after;
use crate::support::*;

pub(crate) fn register(cases: &mut Cases) {
    let unknown = OnlyOurs("unrecognized option");
    for family in [Family::Tcp, Family::Unix] {
        cases.add(
            format!("a client waits until the backend is up, {family}"),
            unknown,
            move |program| waits_until_up(program, family),
        );
    }
    cases.add_as_root("an address that does not answer delays no client", unknown, silent_address);
    cases.add("closes clients when the backend never comes up", unknown, never_up);
    cases.add("probes once for 200 waiting clients", unknown, one_prober);
    cases.add(
        "a waiting client that leaves makes room for the next",
        unknown,
        waiting_client_leaves,
    );
    cases.add(
        "delivers the bytes of a waiting Unix client that has closed",
        unknown,
        waiting_client_has_closed,
    );
    cases.add(
        "serves a waiting client that has half-closed",
        unknown,
        waiting_client_has_half_closed,
    );
    cases.add("closes clients at once on an error that will not pass", unknown, permanent_error);
    cases.add_as_root(
        "a client waits until the backend's socket is accessible",
        unknown,
        waits_until_permitted,
    );
}

/// An address of either family without a listener.
fn absent_backend(family: Family) -> (SockAddr, String, TempDir) {
    let directory = TempDir::new().unwrap();
    let (address, target) = match family {
        Family::Tcp => {
            let address = std::net::SocketAddr::from(([127, 0, 0, 1], free_port()));
            (address.into(), address.to_string())
        }
        Family::Unix => {
            let path = directory.path().join("backend");
            (SockAddr::unix(&path).unwrap(), path.to_str().unwrap().into())
        }
    };
    (address, target, directory)
}

fn bind_backend(address: &SockAddr) -> Socket {
    let socket = Socket::new(address.domain(), Type::STREAM, None).unwrap();
    socket.set_reuse_address(true).unwrap();
    socket.bind(address).unwrap();
    socket.listen(4096).unwrap();
    socket
}

fn started(launch: Launch) -> Running {
    let systemd = FakeSystemd::new();
    let mut proxy = launch.notify(&systemd).start();
    let ready = thread::spawn(move || {
        systemd.wait_for("READY=1");
        systemd
    });
    poll_until(Instant::now() + TIMEOUT, || {
        if !proxy.is_running() {
            panic!("{}", proxy.lines.all());
        }
        ready.is_finished().then_some(())
    });
    proxy
}

fn waits_until_up(program: &Path, family: Family) {
    let front = Endpoint::new(Family::Tcp);
    let (address, target, _directory) = absent_backend(family);
    let args = ["--backend-wait=30s", &target];
    let proxy = started(Launch::new(program).args(args).listener(&front));
    let mut client = front.connect();
    client.write_all(b"patience").unwrap();
    let printed = proxy.lines.wait_for("holding clients for up to 30s");
    assert!(printed.contains("Failed to connect to remote host"), "{printed}");
    pause(Duration::from_secs(1));
    let listener = bind_backend(&address);
    let up = Instant::now();
    // A backend that serves one connection in its life: the prober's is not wasted.
    let served = thread::spawn(move || echo(listener.accept().unwrap().0));
    echoes_after(&mut client, b"patience");
    let noticed = up.elapsed();
    assert!(noticed < Duration::from_millis(600), "noticed after {noticed:?}");
    drop(client);
    served.join().unwrap();
}

fn waits_until_permitted(program: &Path) {
    let mode = |path: &Path, mode| {
        fs::set_permissions(path, PermissionsExt::from_mode(mode)).unwrap();
    };
    let (_, _, stderr) = run(&program.into(), &["--backend-wait=30s", "x"]);
    assert!(!stderr.contains("unrecognized option"), "{stderr}");
    let front = Endpoint::new(Family::Tcp);
    let (address, target, directory) = absent_backend(Family::Unix);
    let listener = bind_backend(&address);
    mode(Path::new(&target), 0o600);
    serve_on(listener, echo);
    mode(directory.path(), 0o755);
    let args = ["--backend-wait=30s", &target];
    let proxy = started(Launch::new(program).args(args).listener(&front).unprivileged());
    let mut client = front.connect();
    client.write_all(b"patience").unwrap();
    let printed = proxy.lines.wait_for("holding clients");
    assert!(printed.contains("Permission denied"), "{printed}");
    pause(Duration::from_secs(1));
    mode(Path::new(&target), 0o666);
    let permitted = Instant::now();
    echoes_after(&mut client, b"patience");
    let noticed = permitted.elapsed();
    assert!(noticed < Duration::from_millis(600), "noticed after {noticed:?}");
}

fn silent_address(program: &Path) {
    // The first or the second address of the name.
    for silent in [1, 2] {
        silent_address_beside_a_live_one(program, silent, 3 - silent);
    }
}

fn silent_address_beside_a_live_one(program: &Path, silent: u8, live: u8) {
    let port = free_port();
    let address = |host| SockAddr::from(std::net::SocketAddr::from(([127, 0, 0, host], port)));
    let _silent = SilentAddress::new(&address(silent));
    let directory = TempDir::new().unwrap();
    let hosts = directory.path().join("hosts");
    fs::write(&hosts, "127.0.0.1 late.test\n127.0.0.2 late.test\n").unwrap();
    let front = Endpoint::new(Family::Tcp);
    let args = ["--backend-wait=30s", "--connect-timeout=30s", &format!("late.test:{port}")];
    let proxy = started(Launch::new(program).args(args).hosts(hosts).listener(&front));
    let mut client = front.connect();
    client.write_all(b"patience").unwrap();
    let printed = proxy.lines.wait_for("holding clients for up to 30s");
    assert!(printed.contains(&format!("Connecting to late.test:{port} takes long")), "{printed}");
    serve_on(bind_backend(&address(live)), echo);
    let up = Instant::now();
    echoes_after(&mut client, b"patience");
    assert_echoes(&mut front.connect());
    let noticed = up.elapsed();
    assert!(noticed < Duration::from_millis(1500), "noticed after {noticed:?}");
}

fn never_up(program: &Path) {
    let front = Endpoint::new(Family::Tcp);
    let (_, target, _directory) = absent_backend(Family::Tcp);
    let args = ["--backend-wait=2s", &target];
    let proxy = started(Launch::new(program).args(args).listener(&front));
    for _ in 0..2 {
        let start = Instant::now();
        let (bytes, end) = read_all(&mut front.connect());
        end.unwrap();
        assert!(bytes.is_empty());
        let held = start.elapsed();
        let bounds = Duration::from_millis(1500)..Duration::from_millis(3500);
        assert!(bounds.contains(&held), "closed after {held:?}");
    }
    let printed = proxy.lines.wait_for("). (--backend-wait=2s is over.)");
    assert!(printed.contains("Failed to connect to remote host"), "{printed}");
}

fn one_prober(program: &Path) {
    const CLIENTS: usize = 200;
    let front = Endpoint::new(Family::Tcp);
    let (address, target, _directory) = absent_backend(Family::Unix);
    let args = ["--backend-wait=30s", &target];
    let proxy = started(Launch::new(program).args(args).listener(&front));
    let before = proxy.cpu();
    let mut clients: Vec<_> = (0..CLIENTS).map(|_| front.connect()).collect();
    for client in &mut clients {
        client.write_all(b"patience").unwrap();
    }
    pause(Duration::from_secs(2));
    let spent = proxy.cpu() - before;
    assert!(spent < Duration::from_millis(100), "{spent:?} of CPU in the wait");
    assert_eq!(proxy.lines.count("holding clients"), 1, "logged once");
    let listener = bind_backend(&address);
    serve_on(listener, echo);
    for client in &mut clients {
        echoes_after(client, b"patience");
    }
}

fn waiting_client_leaves(program: &Path) {
    for family in [Family::Tcp, Family::Unix] {
        let front = Endpoint::new(family);
        let (_, target, _directory) = absent_backend(Family::Tcp);
        let args = ["--backend-wait=1h", "--log-level=debug", "-c1", &target];
        let proxy = started(Launch::new(program).args(args).listener(&front));
        let mut client = front.connect();
        if family == Family::Tcp {
            client.write_all(b"hello?").unwrap();
        }
        proxy.lines.wait_for("holding clients");
        let left = Instant::now();
        match family {
            Family::Tcp => reset(client),
            Family::Unix => drop(client),
        }
        proxy.lines.wait_for("Connection ended by the client before it had a backend");
        assert!(left.elapsed() < Duration::from_secs(3), "its place is held");
        // The next client gets the slot, and waits in turn.
        let next = front.connect();
        next.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
        let waiting = (&next).read(&mut [0]).expect_err("refused");
        assert_eq!(waiting.kind(), ErrorKind::WouldBlock);
    }
}

/// As `echo x | nc -U`, with a backend that is slow to start.
fn waiting_client_has_closed(program: &Path) {
    let front = Endpoint::new(Family::Unix);
    let (address, target, _directory) = absent_backend(Family::Unix);
    let args = ["--backend-wait=30s", "--log-level=debug", &target];
    let proxy = started(Launch::new(program).args(args).listener(&front));
    let mut client = front.connect();
    client.write_all(b"that was all").unwrap();
    drop(client);
    proxy.lines.wait_for("holding clients");
    pause(Duration::from_secs(2));
    let listener = bind_backend(&address);
    listener.set_nonblocking(true).unwrap();
    let accepted = poll_until(Instant::now() + TIMEOUT, || listener.accept().ok());
    let (mut served, _) = accepted.expect("the client's bytes come to the backend");
    served.set_nonblocking(false).unwrap();
    let (bytes, end) = read_all(&mut served);
    end.unwrap();
    assert_eq!(bytes, b"that was all");
}

fn waiting_client_has_half_closed(program: &Path) {
    let front = Endpoint::new(Family::Tcp);
    let (address, target, _directory) = absent_backend(Family::Tcp);
    let args = ["--backend-wait=30s", &target];
    let proxy = started(Launch::new(program).args(args).listener(&front));
    let mut client = front.connect();
    client.write_all(b"that was all").unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    proxy.lines.wait_for("holding clients");
    pause(Duration::from_millis(500));
    let listener = bind_backend(&address);
    thread::spawn(move || echo(listener.accept().unwrap().0));
    let (answer, end) = read_all(&mut client);
    end.unwrap();
    assert_eq!(answer, b"that was all");
}

fn permanent_error(program: &Path) {
    let front = Endpoint::new(Family::Tcp);
    let args = ["--backend-wait=1h", "localhost:no-such-service"];
    let proxy = started(Launch::new(program).args(args).listener(&front));
    let (bytes, end) = read_all(&mut front.connect());
    end.unwrap();
    assert!(bytes.is_empty());
    proxy.lines.wait_for("Failed to resolve host: localhost:no-such-service");
}
