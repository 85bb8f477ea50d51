//! `SELECTOR=TARGET`: each socket leads to its own backend. (In a real systemd: tests/systemd/units.rs.)

use std::io::{Read, Write};

use crate::support::*;
use rustix::process::Signal;
use socket2::Socket;

/// A backend that says its name to each client, and then echoes.
fn named(family: Family, name: &'static str) -> Endpoint {
    let endpoint = Endpoint::new(family);
    serve(&endpoint, move |mut socket| {
        socket.write_all(name.as_bytes()).unwrap();
        echo(socket);
    });
    endpoint
}

fn greeting(socket: &mut Socket) -> String {
    let mut name = [0; 3];
    socket.read_exact(&mut name).expect("the backend says its name");
    String::from_utf8(name.into()).unwrap()
}

#[test]
fn each_socket_leads_to_its_own_backend() {
    for (front, back) in PAIRS {
        let fronts = [(); 3].map(|()| Endpoint::new(front));
        let (one, two) = (named(back, "one"), named(back, "two"));
        let [first, second, third] = fronts.each_ref().map(|front| &front.target);
        // By name, of which one holds two sockets; by address; by both; whatever the order.
        let by_name = [format!("web={}", one.target), format!("api={}", two.target)];
        let by_address = [
            format!("{second}={}", two.target),
            format!("{third}={}", one.target),
            format!("{first}={}", one.target),
        ];
        let by_both = [format!("api={}", two.target), by_address[1].clone(), by_address[2].clone()];
        for selections in [&by_name[..], &by_address, &by_both] {
            let launch = Launch::new(OURS).args(selections).args(["--threads=2"]);
            let launch = fronts.iter().fold(launch, |launch, front| launch.listener(front));
            let _proxy = launch.env("LISTEN_FDNAMES", "web:api:web").start();
            let mut clients = fronts.each_ref().map(Endpoint::connect);
            let names = clients.each_mut().map(greeting);
            assert_eq!(names, ["one", "two", "one"], "{selections:?}");
            clients.iter_mut().for_each(assert_echoes);
        }
    }
}

#[test]
fn selects_a_port_on_any_address() {
    let (one, two) = (named(Family::Tcp, "one"), named(Family::Unix, "two"));
    for address in ["127.0.0.1:0", "[::1]:0", "[::]:0", "0.0.0.0:0"] {
        let fronts = [address, "127.0.0.1:0"].map(|address| Endpoint::tcp(address, 16));
        let [first, second] = fronts.each_ref().map(Endpoint::port);
        let launch = Launch::new(OURS).arg(format!(":{second}={}", two.target));
        let launch = launch.arg(format!(":{first}={}", one.target));
        let _proxy = fronts.iter().fold(launch, |launch, front| launch.listener(front)).start();
        let names = fronts.each_ref().map(|front| greeting(&mut front.connect()));
        assert_eq!(names, ["one", "two"], "{address}");
    }
}

#[test]
fn selects_own_listeners_by_address() {
    let (one, two) = (named(Family::Tcp, "one"), named(Family::Unix, "two"));
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("front").display().to_string();
    let port = free_port();
    let options = [format!("--listen={path}"), format!("--listen=127.0.0.1:{port}")];
    let targets = [format!("{path}={}", one.target), format!(":{port}={}", two.target)];
    let proxy = Launch::new(OURS).args(options).args(targets).start();
    proxy.lines.wait_for(&format!("Listening on 127.0.0.1:{port}"));
    let address = socket2::SockAddr::unix(&path).unwrap();
    assert_eq!(greeting(&mut connect(&address)), "one");
    let address = std::net::SocketAddr::from(([127, 0, 0, 1], port)).into();
    assert_eq!(greeting(&mut connect(&address)), "two");
}

#[test]
fn backend_that_is_down_delays_no_other() {
    let fronts = [(); 2].map(|()| Endpoint::new(Family::Tcp));
    let (one, port) = (named(Family::Tcp, "one"), free_port());
    let launch = Launch::new(OURS).arg("--backend-wait=60s");
    let launch = launch.arg(format!("up={}", one.target)).arg(format!("down=127.0.0.1:{port}"));
    let launch = fronts.iter().fold(launch, |launch, front| launch.listener(front));
    let proxy = launch.env("LISTEN_FDNAMES", "up:down").start();
    let mut held = fronts[1].connect();
    proxy.lines.wait_for("holding clients");
    assert_eq!(greeting(&mut fronts[0].connect()), "one");
    let late = Endpoint::tcp(&format!("127.0.0.1:{port}"), 16);
    serve(&late, |mut socket| socket.write_all(b"two").unwrap());
    assert_eq!(greeting(&mut held), "two");
}

#[test]
fn limits_are_common_to_all_backends() {
    let fronts = [(); 2].map(|()| Endpoint::new(Family::Tcp));
    let (one, two) = (named(Family::Tcp, "one"), named(Family::Unix, "two"));
    let launch = Launch::new(OURS).arg("--connections-max=1");
    let launch = launch.arg(format!("a={}", one.target)).arg(format!("b={}", two.target));
    let launch = fronts.iter().fold(launch, |launch, front| launch.listener(front));
    let _proxy = launch.env("LISTEN_FDNAMES", "a:b").start();
    let mut first = fronts[0].connect();
    assert_eq!(greeting(&mut first), "one");
    assert_eq!(read_all(&mut fronts[1].connect()).0, b"", "served above the limit");
    assert_echoes(&mut first);
}

#[test]
fn logs_and_status_name_the_listener() {
    let fronts = [(); 2].map(|()| Endpoint::new(Family::Tcp));
    let one = named(Family::Tcp, "one");
    let absent = format!("127.0.0.1:{}", free_port());
    let systemd = FakeSystemd::new();
    let launch = Launch::new(OURS).arg("--log-level=debug");
    let launch = launch.arg(format!("web={}", one.target)).arg(format!("api={absent}"));
    let launch = fronts.iter().fold(launch, |launch, front| launch.listener(front));
    let launch = launch.env("LISTEN_FDNAMES", "web:api");
    let proxy = launch.notify(&systemd).start();
    let web = &fronts[0].target;
    assert_eq!(read_all(&mut fronts[1].connect()).0, b"");
    let failed = proxy.lines.wait_for("Failed to connect to remote host");
    assert!(
        failed.contains(&format!("{absent}: Connection refused (client 127.0.0.1:")),
        "{failed}"
    );
    assert!(!failed.contains("backend"), "named twice: {failed}");
    let mut clients = [fronts[0].connect(), fronts[0].connect()];
    assert_eq!(clients.each_mut().map(greeting), ["one", "one"]);
    loop {
        let status = systemd.wait_for("STATUS=2 of 256 connections, ");
        if status.ends_with(&format!("; web ({web}): 2")) {
            break;
        }
    }
    proxy.signal(Signal::USR1);
    let report = proxy.lines.wait_for(&format!(" at web ({web}): "));
    assert!(report.ends_with(&format!(", backend {}).", one.target)), "{report}");
    drop(clients);
    let closed = proxy.lines.wait_for("Connection closed after ");
    assert!(closed.contains(" to the backend, 3 bytes back (client 127.0.0.1:"), "{closed}");
    proxy.signal(Signal::TERM);
}

#[test]
fn rejects_selectors_that_do_not_fit() {
    let fronts = [Family::Tcp, Family::Unix].map(Endpoint::new);
    let [tcp, unix] = fronts.each_ref().map(|front| front.target.clone());
    let both = format!("The sockets are: web ({tcp}), web ({unix}).");
    for (targets, message) in [
        (vec![format!("{tcp}=/a")], format!("No selector selects the socket web ({unix}). {both}")),
        (
            vec!["web=/a".into(), format!("{unix}=/b")],
            format!("Both web= and {unix}= select the socket web ({unix}). {both}"),
        ),
        (
            vec!["web=/a".into(), "api=/b".into()],
            format!("Selector api= selects no socket of that name. {both}"),
        ),
        (vec!["web=/a".into(), "web=/b".into()], format!("Selector web= is given twice. {both}")),
    ] {
        let launch = Launch::new(OURS).args(&targets);
        let launch = fronts.iter().fold(launch, |launch, front| launch.listener(front));
        let mut proxy = launch.env("LISTEN_FDNAMES", "web:web").start();
        assert_eq!(proxy.wait().code(), Some(1), "{targets:?}");
        assert_eq!(proxy.lines.all(), message);
    }
}
