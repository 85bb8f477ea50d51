//! `--drain-time=`: after a signal new clients are refused, and open connections have time to end. (In a
//! real systemd: tests/systemd/drop_in.rs.)

use std::io::{ErrorKind, Read, Write};
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use crate::support::*;
use rustix::process::Signal;
use socket2::{Domain, SockAddr, Socket, Type};
use tempfile::TempDir;
use tokio::time::Instant;

fn start(front: &Endpoint, backend: &Endpoint, time: &str, systemd: &FakeSystemd) -> Running {
    Launch::new(OURS)
        .args([&format!("--drain-time={time}"), "--threads=2", &backend.target])
        .listener(front)
        .notify(systemd)
        .start()
}

#[test]
fn transfer_ends_and_new_clients_wait_for_the_next_process() {
    const BYTES: usize = 50_000_000;
    for (front, back) in PAIRS {
        let (front, backend, systemd) =
            (Endpoint::new(front), Endpoint::new(back), FakeSystemd::new());
        let mut proxy = start(&front, &backend, "60s", &systemd);
        let (mut client, mut served) = (front.connect(), backend.accept());
        let message = random_bytes(7, BYTES);
        let received = thread::scope(|scope| {
            let (sent, go_on) = message.split_at(1_000_000);
            let reader = scope.spawn(move || (read_all(&mut client), client));
            served.write_all(sent).unwrap();
            proxy.signal(Signal::TERM);
            systemd.wait_for("STOPPING=1");
            assert_eq!(systemd.next(), "EXTEND_TIMEOUT_USEC=30000000");
            assert_eq!(systemd.next(), "STATUS=Draining, 1 connection is left, for up to 1min");
            let mut new_client = front.connect();
            new_client.write_all(b"are you there?").unwrap();
            served.write_all(go_on).unwrap();
            drop(served);
            let (received, client) = reader.join().unwrap();
            // Until then the client is served, and the new client waits.
            new_client.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
            assert_eq!(new_client.read(&mut [0]).unwrap_err().kind(), ErrorKind::WouldBlock);
            new_client.set_read_timeout(Some(TIMEOUT)).unwrap();
            drop(client);
            systemd.wait_for("STATUS=Shutting down...");
            assert_eq!(proxy.wait().code(), Some(0));
            let _next = start(&front, &backend, "60s", &systemd);
            let mut served = backend.accept();
            served.read_exact(&mut [0; 14]).expect("the new client's bytes");
            received
        });
        received.1.unwrap();
        assert!(received.0 == message, "{} bytes", received.0.len());
    }
}

#[test]
fn resets_what_is_left_after_the_drain_time() {
    for (front_family, back) in PAIRS {
        let (front, backend) = (Endpoint::new(front_family), Endpoint::new(back));
        let systemd = FakeSystemd::new();
        let mut proxy = start(&front, &backend, "2s", &systemd);
        let first = (front.connect(), backend.accept());
        let (mut client, mut served) = (front.connect(), backend.accept());
        systemd.wait_for("READY=1");
        let start = Instant::now();
        proxy.signal(Signal::INT);
        systemd.wait_for("STATUS=Draining, 2 connections are left, for up to 2s");
        // SIGUSR1 logs the connections that are left.
        proxy.signal(Signal::USR1);
        proxy.lines.wait_for("Open connections: 2.");
        proxy.lines.wait_for("to the backend");
        drop(first);
        systemd.wait_for("STATUS=Draining, 1 connection is left, for up to 1s");
        for (socket, family) in [(&mut client, front_family), (&mut served, back)] {
            let (bytes, end) = read_all(socket);
            assert!(bytes.is_empty() && is_reset(&end) == (family == Family::Tcp), "{end:?}");
        }
        assert_eq!(proxy.wait().code(), Some(0));
        let took = start.elapsed();
        assert!(took > Duration::from_secs(2) && took < Duration::from_secs(5), "{took:?}");
        proxy.lines.wait_for("resetting open connections: 1.");
    }
}

#[test]
fn held_clients_count_as_open() {
    let (front, systemd) = (Endpoint::new(Family::Tcp), FakeSystemd::new());
    let target = format!("127.0.0.1:{}", free_port());
    let options = ["--drain-time=60s", "--backend-wait=60s", &target];
    let mut proxy = Launch::new(OURS).args(options).listener(&front).notify(&systemd).start();
    let mut client = front.connect();
    proxy.lines.wait_for("holding clients");
    proxy.signal(Signal::TERM);
    systemd.wait_for("STATUS=Draining, 1 connection is left");
    let backend = Endpoint::tcp(&target, 16);
    let mut served = backend.accept();
    assert_forwards(&mut client, &mut served);
    drop((client, served));
    assert_eq!(proxy.wait().code(), Some(0));
}

#[test]
fn second_signal_ends_the_drain() {
    for (second, ends) in [(Signal::TERM, true), (Signal::INT, true), (Signal::HUP, false)] {
        let (front, backend) = (Endpoint::new(Family::Tcp), Endpoint::new(Family::Unix));
        let systemd = FakeSystemd::new();
        let mut proxy = start(&front, &backend, "infinity", &systemd);
        let (mut client, mut served) = (front.connect(), backend.accept());
        systemd.wait_for("READY=1");
        proxy.signal(Signal::TERM);
        systemd.wait_for("STATUS=Draining, 1 connection is left");
        proxy.signal(second);
        if ends {
            assert_eq!(proxy.wait().code(), Some(0));
            assert!(is_reset(&read_all(&mut client).1));
        } else {
            // systemd's SendSIGHUP= sends one right behind SIGTERM.
            systemd.wait_for("STATUS=Draining, 1 connection is left");
            served.write_all(b"x").unwrap();
            client.read_exact(&mut [0]).expect("it is still served");
            drop((client, served));
            assert_eq!(proxy.wait().code(), Some(0));
        }
    }
}

#[test]
fn own_listeners_are_closed_during_the_drain() {
    let backend = echo_backend(Family::Unix);
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("front");
    let tcp = std::net::SocketAddr::from(([127, 0, 0, 1], free_port()));
    for address in [SockAddr::unix(&path).unwrap(), tcp.into()] {
        let listen = match address.as_socket() {
            Some(address) => address.to_string(),
            None => path.display().to_string(),
        };
        let mut proxy = Launch::new(OURS)
            .args([&format!("--listen={listen}"), "--drain-time=60s", &backend.target])
            .start();
        // Logged although no manager waits here: a unit like this would be killed early.
        proxy.lines.wait_for("Failed to ask systemd to wait for --drain-time=1min");
        proxy.lines.wait_for("Listening on");
        let mut client = connect(&address);
        assert_echoes(&mut client);
        proxy.signal(Signal::TERM);
        proxy.lines.wait_for("Stopping, waiting up to 1min for open connections to end: 1.");
        let refused = || {
            let new_client =
                Socket::new(Domain::from(i32::from(address.family())), Type::STREAM, None);
            new_client.unwrap().connect(&address).is_err().then_some(())
        };
        poll_until(Instant::now() + TIMEOUT, refused).expect("new clients are refused");
        assert_echoes(&mut client);
        drop(client);
        assert_eq!(proxy.wait().code(), Some(0));
    }
    assert!(!path.exists(), "the socket file stays");
}

/// The proxy with an application behind it; the latter's log.
fn on_demand(front: &Endpoint, options: &[&str], settings: &[&str]) -> (Running, TempDir, PathBuf) {
    let (port, directory) = (free_port(), TempDir::new().unwrap());
    let (log, target) = (directory.path().join("log"), format!("127.0.0.1:{port}"));
    let launch = Launch::new(OURS).args(options).args([&target, "--", "perl", APP]);
    let launch = launch.args([&port.to_string(), log.to_str().unwrap()]).args(settings);
    (launch.listener(front).start(), directory, log)
}

/// What the application says its pid is.
fn ask_pid(client: &mut Socket) -> String {
    client.write_all(b"pid\n").unwrap();
    let mut answer = [0; 32];
    let length = client.read(&mut answer).unwrap();
    assert!(length > 0, "the client is answered");
    String::from_utf8(answer[..length].to_vec()).unwrap()
}

#[test]
fn command_runs_until_its_connections_have_ended() {
    let front = Endpoint::new(Family::Tcp);
    let (mut proxy, _directory, log) = on_demand(&front, &["--drain-time=60s"], &[]);
    let mut client = front.connect();
    let first = ask_pid(&mut client);
    proxy.signal(Signal::TERM);
    proxy.lines.wait_for("Stopping, waiting up to 1min for open connections to end: 1.");
    assert_eq!(ask_pid(&mut client), first);
    drop(client);
    proxy.lines.wait_for("All connections have ended.");
    assert_eq!(proxy.wait().code(), Some(0));
    let log = std::fs::read_to_string(log).unwrap();
    assert!(log.contains("asked "), "COMMAND was told to stop: {log}");
}

#[test]
fn client_cancels_idle_exit() {
    let front = Endpoint::new(Family::Tcp);
    let options = ["--exit-idle-time=100ms", "--drain-time=60s"];
    let (mut proxy, _directory, log) = on_demand(&front, &options, &["down=2"]);
    ask_pid(&mut front.connect());
    // COMMAND is being stopped, for the exit, when a client comes and then the signal.
    let asked = || std::fs::read_to_string(&log).unwrap().contains("asked ").then_some(());
    poll_until(Instant::now() + TIMEOUT, asked).expect("COMMAND is told to stop");
    let before = proxy.descriptors();
    let mut client = front.connect();
    let is_in = || (proxy.descriptors() > before).then_some(());
    poll_until(Instant::now() + TIMEOUT, is_in).expect("the client is accepted");
    proxy.signal(Signal::TERM);
    ask_pid(&mut client);
    drop(client);
    assert_eq!(proxy.wait().code(), Some(0));
}
