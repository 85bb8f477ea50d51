//! Notifications while the queue of the service manager's socket is full, as in a daemon-reload or at boot.

use std::os::unix::net::UnixDatagram;
use std::time::Duration;

use crate::support::*;
use rustix::process::Signal;
use tokio::time::Instant;

/// Fills the manager's queue (net.unix.max_dgram_qlen).
fn fill(systemd: &FakeSystemd) {
    // The buffer of a sender may be full before the queue is: systemd makes it 512 messages long.
    loop {
        let sender = UnixDatagram::unbound().unwrap();
        sender.set_nonblocking(true).unwrap();
        let send = || sender.send_to(b"FULL=1", &systemd.path).is_ok();
        if !send() {
            return;
        }
        while send() {}
    }
}

fn start(front: &Endpoint, systemd: &FakeSystemd, args: &[&str]) -> Running {
    let launch = Launch::new(OURS).args(args).listener(front);
    launch.notify(systemd).start()
}

#[test]
fn sends_ready_late_and_serves_clients_meanwhile() {
    let (front, backend) = (Endpoint::new(Family::Tcp), echo_backend(Family::Tcp));
    let systemd = FakeSystemd::new();
    fill(&systemd);
    let proxy = start(&front, &systemd, &[&backend.target]);
    let mut client = front.connect();
    assert_echoes(&mut client);
    proxy.lines.wait_for("Failed to send READY=1 to systemd, trying again");
    systemd.wait_for("READY=1");
    systemd.wait_for("STATUS=1 of 256 connections");
    assert_echoes(&mut client);
}

#[test]
fn idle_exit_waits_until_ready_is_sent() {
    let (front, backend) = (Endpoint::new(Family::Tcp), echo_backend(Family::Tcp));
    let systemd = FakeSystemd::new();
    fill(&systemd);
    let mut proxy = start(&front, &systemd, &["--exit-idle-time=50ms", &backend.target]);
    assert_echoes(&mut front.connect());
    pause(Duration::from_secs(2));
    assert!(proxy.is_running(), "a unit whose process ends before it is ready has failed");
    systemd.wait_for("READY=1");
    assert_eq!(proxy.wait().code(), Some(0));
}

#[test]
fn client_cancels_an_idle_exit_that_waits_for_ready() {
    let (front, backend) = (Endpoint::new(Family::Tcp), echo_backend(Family::Tcp));
    let systemd = FakeSystemd::new();
    fill(&systemd);
    let mut proxy = start(&front, &systemd, &["--exit-idle-time=50ms", &backend.target]);
    assert_echoes(&mut front.connect());
    // The idle time is over, and READY=1 not sent.
    pause(Duration::from_secs(1));
    let mut client = front.connect();
    assert_echoes(&mut client);
    systemd.wait_for("READY=1");
    pause(Duration::from_millis(300));
    assert_echoes(&mut client);
    drop(client);
    assert_eq!(proxy.wait().code(), Some(0));
}

#[test]
fn stop_that_waits_for_ready_accepts_no_client() {
    let (front, backend) = (Endpoint::new(Family::Tcp), echo_backend(Family::Tcp));
    let systemd = FakeSystemd::new();
    fill(&systemd);
    let mut proxy = start(&front, &systemd, &["--log-level=debug", &backend.target]);
    assert_echoes(&mut front.connect());
    proxy.lines.wait_for("Connection closed");
    proxy.signal(Signal::TERM);
    pause(Duration::from_millis(300));
    let _client = front.connect();
    pause(Duration::from_millis(300));
    systemd.wait_for("READY=1");
    assert_eq!(proxy.wait().code(), Some(0));
    assert_eq!(proxy.lines.count("Connection established"), 1);
}

#[test]
fn status_is_sent_once_the_queue_has_room() {
    let (front, backend) = (Endpoint::new(Family::Tcp), echo_backend(Family::Tcp));
    let systemd = FakeSystemd::new();
    let _proxy = start(&front, &systemd, &[&backend.target]);
    let mut client = front.connect();
    assert_echoes(&mut client);
    systemd.wait_for("STATUS=1 of 256 connections");
    fill(&systemd);
    drop(client);
    // The status is due within a second, and cannot be sent.
    pause(Duration::from_secs(2));
    systemd.wait_for("STATUS=0 of 256 connections, 1 served");
}

#[test]
fn stop_does_not_wait_for_the_queue() {
    let (front, backend) = (Endpoint::new(Family::Tcp), echo_backend(Family::Tcp));
    let systemd = FakeSystemd::new();
    let mut proxy = start(&front, &systemd, &[&backend.target]);
    systemd.wait_for("READY=1");
    fill(&systemd);
    let start = Instant::now();
    proxy.signal(Signal::TERM);
    assert_eq!(proxy.wait().code(), Some(0));
    assert!(start.elapsed() < Duration::from_secs(1), "it took {:?}", start.elapsed());
}

#[test]
fn drain_says_that_it_stops_once_the_queue_has_room() {
    let (front, backend) = (Endpoint::new(Family::Tcp), echo_backend(Family::Tcp));
    let systemd = FakeSystemd::new();
    let mut proxy = start(&front, &systemd, &["--drain-time=1h", &backend.target]);
    let mut client = front.connect();
    assert_echoes(&mut client);
    systemd.wait_for("STATUS=1 of 256 connections");
    fill(&systemd);
    proxy.signal(Signal::TERM);
    proxy.lines.wait_for("waiting up to 1h for open connections to end");
    // Without STOPPING=1 the watchdog of WatchdogSec= would end the drain. The proxy sends
    // STATUS=Draining each second.
    let said: Vec<_> = std::iter::from_fn(|| Some(systemd.next()))
        .filter(|line| line == "STOPPING=1" || line.starts_with("STATUS=Draining"))
        .take(3)
        .collect();
    assert!(said.iter().any(|line| line == "STOPPING=1"), "{said:?}");
    drop(client);
    assert_eq!(proxy.wait().code(), Some(0));
}

#[test]
fn second_signal_ends_a_stop_that_waits_for_ready() {
    let (front, backend) = (Endpoint::new(Family::Tcp), echo_backend(Family::Tcp));
    let systemd = FakeSystemd::new();
    fill(&systemd);
    let mut proxy = start(&front, &systemd, &["--drain-time=1h", &backend.target]);
    let mut client = front.connect();
    assert_echoes(&mut client);
    proxy.signal(Signal::TERM);
    proxy.signal(Signal::INT);
    assert_eq!(proxy.wait().code(), Some(0));
}
