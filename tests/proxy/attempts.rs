//! Attempts to connect to a backend that does not answer, with an address that does beside it.

use std::fs;
use std::io::ErrorKind;
use std::net::SocketAddr;
use std::time::Duration;

use crate::support::*;
use tempfile::TempDir;
use tokio::time::Instant;

#[test]
fn take_a_bounded_number_of_descriptors() {
    let addresses = [(); 6].map(|()| SocketAddr::from(([127, 0, 0, 1], free_port())));
    let _silent = addresses.map(|address| SilentAddress::new(&address.into()));
    let fronts = addresses.map(|_| Endpoint::new(Family::Tcp));
    let launch = fronts.iter().fold(Launch::new(OURS), Launch::listener);
    let targets = fronts.iter().zip(addresses).map(|(it, to)| format!("{}={to}", it.target));
    let proxy = launch.arg("--backend-wait=1min").args(targets).start();
    proxy.lines.wait_for(&format!("connections go to {}", addresses[5]));
    let before = proxy.descriptors();
    let _clients = fronts.each_ref().map(Endpoint::connect);
    proxy.lines.wait_for("takes long, holding clients");
    pause(Duration::from_secs(3));
    // Two for each connection, one for the prober of each target, and the places for watched
    // addresses.
    let taken = proxy.descriptors() - before;
    assert!(taken <= 6 * 2 + 6 + 4, "{taken} descriptors");
}

#[test]
fn answer_to_one_client_serves_all() {
    if !is_root_for("a name with an address that does not answer") {
        return;
    }
    raise_descriptor_limit();
    // The resolver decides about the order of the addresses.
    for [silent, backend] in [["127.0.0.1", "127.0.0.2"], ["127.0.0.2", "127.0.0.1"]] {
        answer_serves_all(silent, backend);
    }
}

#[test]
fn few_descriptors_cut_no_client() {
    if !is_root_for("a name with an address that does not answer") {
        return;
    }
    for [silent, backend] in [["127.0.0.1", "127.0.0.2"], ["127.0.0.2", "127.0.0.1"]] {
        let port = free_port();
        let silent: SocketAddr = format!("{silent}:{port}").parse().unwrap();
        let _silent = SilentAddress::new(&silent.into());
        // It accepts slowly, so that its kernel drops some SYNs and attempts take a second.
        let backend = Endpoint::tcp(&format!("{backend}:{port}"), 5);
        std::thread::spawn(move || {
            while let Ok((client, _)) = backend.socket.accept() {
                std::thread::spawn(move || echo(client));
                pause(Duration::from_millis(1));
            }
        });
        let directory = TempDir::new().unwrap();
        let hosts = directory.path().join("hosts");
        fs::write(&hosts, "127.0.0.2 two.test\n127.0.0.1 two.test\n").unwrap();
        let front = Endpoint::new(Family::Tcp);
        let options = ["--connections-max=1000", "--backend-wait=1min"];
        let launch = Launch::new(OURS).listener(&front).hosts(hosts).descriptors(256);
        let proxy = launch.args(options).arg(format!("two.test:{port}")).start();
        // Each holds its socket, that of its own attempt, and none beside.
        let clients: Vec<_> = (0..400)
            .map(|_| {
                let mut client = front.connect();
                std::thread::spawn(move || exchange(&mut client, b"me, too?"))
            })
            .collect();
        for client in clients {
            // With a backlog as short as this, some still wait when the test ends.
            let answer = client.join().unwrap();
            let is_cut = answer.as_ref().is_err_and(|it| it.kind() != ErrorKind::WouldBlock);
            assert!(!is_cut, "{answer:?}: {}", proxy.lines.all());
        }
        assert_eq!(proxy.lines.count("Too many open files"), 0);
    }
}

fn answer_serves_all(silent: &str, backend: &str) {
    const CLIENTS: usize = 600;
    let port = free_port();
    let silent: SocketAddr = format!("{silent}:{port}").parse().unwrap();
    let _silent = SilentAddress::new(&silent.into());
    let backend = Endpoint::tcp(&format!("{backend}:{port}"), 4096);
    serve(&backend, echo);
    let directory = TempDir::new().unwrap();
    let hosts = directory.path().join("hosts");
    fs::write(&hosts, "127.0.0.2 two.test\n127.0.0.1 two.test\n").unwrap();
    let front = Endpoint::new(Family::Tcp);
    let target = format!("two.test:{port}");
    let options = ["--connections-max=1000", "--backend-wait=1min", &target];
    let launch = Launch::new(OURS).listener(&front).hosts(hosts).args(options);
    let _proxy = launch.start();
    let start = Instant::now();
    let mut clients: Vec<_> = (0..CLIENTS).map(|_| front.connect()).collect();
    clients.iter_mut().for_each(assert_echoes);
    // One lookup and one connection of the prober serve all, and not one client each.
    let took = start.elapsed();
    assert!(took < Duration::from_secs(20), "{CLIENTS} clients took {took:?}");
}

#[test]
fn reach_a_command_whose_name_has_an_address_that_does_not_answer() {
    if !is_root_for("a name with an address that does not answer") {
        return;
    }
    let port = free_port();
    let _silent = SilentAddress::new(&SocketAddr::from(([127, 0, 0, 2], port)).into());
    let directory = TempDir::new().unwrap();
    let (hosts, log) = (directory.path().join("hosts"), directory.path().join("log"));
    fs::write(&hosts, "127.0.0.1 late.test\n127.0.0.2 late.test\n").unwrap();
    let front = Endpoint::new(Family::Tcp);
    let options = ["--connect-timeout=30s", &format!("late.test:{port}"), "--", "perl", APP];
    let launch = Launch::new(OURS).listener(&front).hosts(hosts).args(options);
    let launch = launch.args([&*port.to_string(), log.to_str().unwrap(), "up=1"]);
    let _proxy = launch.start();
    let start = Instant::now();
    let mut client = front.connect();
    let answer = exchange(&mut client, b"pid\n");
    assert!(answer.is_ok(), "{answer:?}");
    let took = start.elapsed();
    assert!(took < Duration::from_secs(6), "ready after {took:?}");
}
