//! --wake-on=data: a client is served from its first byte on, and gives way to others before.

use std::io::Write;
use std::time::Duration;

use rustix::process::Signal;
use socket2::Socket;
use tokio::time::Instant;

use crate::application::{Service, pid, wait_for_end};
use crate::support::*;

const OPTION: &str = "--wake-on=data";

#[test]
fn silent_clients_start_nothing_and_lock_nobody_out() {
    raise_descriptor_limit();
    for (overflow, threads) in [("--overflow=refuse", "1"), ("--overflow=wait", "2")] {
        let options = [OPTION, overflow, &format!("--threads={threads}")];
        let service = Service::start(Family::Tcp, &options, &[]);
        let before = descriptors_at_rest(&service.proxy);
        for batch in 0..4 {
            let silent: Vec<_> = (0..2500).map(|_| service.connect()).collect();
            assert_eq!(service.logged_pids("started"), [], "{batch}: they start nothing");
            drop(silent);
        }
        let least = || (service.proxy.descriptors() <= before).then_some(());
        poll_until(Instant::now() + TIMEOUT, least).expect("none of them is left");

        let silent: Vec<_> = (0..1000).map(|_| service.connect()).collect();
        let mut talking: Vec<_> = (0..100).map(|_| service.connect()).collect();
        for client in &mut talking {
            client.write_all(b"pid\n").unwrap();
        }
        let app = pid(&mut service.connect());
        assert_eq!(service.logged_pids("started"), [app]);
        assert_eq!(service.proxy.lines.count("Hit connection limit"), 0, "{overflow}");
        drop(silent);
    }
}

/// The descriptors of a proxy that has started and has no connection.
fn descriptors_at_rest(proxy: &Running) -> usize {
    let is_asleep = || proxy.is_asleep().then_some(());
    poll_until(Instant::now() + TIMEOUT, is_asleep).expect("the proxy has started");
    proxy.descriptors()
}

/// Waits until this many connections are open.
fn wait_until_open(proxy: &Running, connections: usize) {
    let line = format!("Open connections: {connections}.");
    let is_open = || {
        proxy.signal(Signal::USR1);
        (proxy.lines.count(&line) > 0).then_some(())
    };
    descriptors_at_rest(proxy);
    poll_until(Instant::now() + TIMEOUT, is_open).expect(&line);
}

/// A proxy in front of an echo backend.
fn echo_proxy(front: &Endpoint, backend: &Endpoint, options: &[&str]) -> Running {
    Launch::new(OURS).listener(front).args(options).arg(&backend.target).start()
}

#[test]
fn first_byte_wakes_and_arrives() {
    for (front, backend) in PAIRS {
        for threads in ["--threads=1", "--threads=3"] {
            let (front, backend) = (Endpoint::new(front), echo_backend(backend));
            let proxy = echo_proxy(&front, &backend, &[OPTION, threads]);
            let mut clients: Vec<_> = (0..10).map(|_| front.connect()).collect();
            wait_until_open(&proxy, 10);
            proxy.lines.wait_for("The client has not sent a byte");
            for client in &mut clients {
                assert_echoes(client);
                assert_echoes(client);
            }
            // The byte may be there when the client is accepted.
            proxy.suspend();
            let mut client = front.connect();
            client.write_all(b"are you there?").unwrap();
            proxy.signal(Signal::CONT);
            let mut answer = [0; 14];
            std::io::Read::read_exact(&mut client, &mut answer).unwrap();
            assert_eq!(&answer, b"are you there?");
        }
    }
}

#[test]
fn client_that_ends_without_a_byte_is_closed() {
    for family in [Family::Tcp, Family::Unix] {
        let service = Service::start(Family::Tcp, &[OPTION], &[]);
        let before = descriptors_at_rest(&service.proxy);
        let mut client = service.connect();
        client.shutdown(std::net::Shutdown::Write).unwrap();
        assert_eq!(read_all(&mut client).0, b"", "{family}");
        reset(service.connect());
        let least = || (service.proxy.descriptors() <= before).then_some(());
        poll_until(Instant::now() + TIMEOUT, least).expect("none of them is left");
        assert_eq!(service.logged_pids("started"), []);
    }
}

#[test]
fn silent_clients_postpone_nothing_and_are_reset() {
    let options = [OPTION, "--stop-idle-time=500ms"];
    let service = Service::start(Family::Tcp, &options, &[]);
    let app = service.pid();
    let mut silent = service.connect();
    wait_for_end(app);
    assert!(is_reset(&read_all(&mut silent).1));
    assert_ne!(service.pid(), app);

    let (front, backend) = (Endpoint::new(Family::Tcp), echo_backend(Family::Tcp));
    let mut proxy = echo_proxy(&front, &backend, &[OPTION, "--exit-idle-time=500ms"]);
    let mut silent = front.connect();
    assert_eq!(proxy.wait().code(), Some(0));
    assert!(is_reset(&read_all(&mut silent).1));
}

#[test]
fn silent_clients_are_handed_over() {
    for (handover, signal) in
        [("restart", Signal::TERM), ("crash", Signal::TERM), ("crash", Signal::KILL)]
    {
        let (front, backend) = (Endpoint::new(Family::Tcp), echo_backend(Family::Tcp));
        let systemd = FakeSystemd::with_fd_store(8);
        let start = || {
            let launch = Launch::new(OURS).listener(&front).stored_by(&systemd);
            let launch = launch.args([OPTION, &format!("--handover={handover}")]);
            let running = launch.arg(&backend.target).start();
            systemd.wait_for("READY=1");
            running
        };
        let mut proxy = start();
        let mut clients: Vec<Socket> = (0..5).map(|_| front.connect()).collect();
        wait_until_open(&proxy, 5);
        proxy.signal(signal);
        proxy.wait();
        let proxy = start();
        proxy.lines.wait_for("Recovered connections: 5.");
        pause(Duration::from_millis(100));
        for client in &mut clients {
            assert_echoes(client);
        }
    }
}
