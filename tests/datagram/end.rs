//! How sessions end: idle, drained, with the process.

use std::time::Duration;

use rustix::process::Signal;
use tokio::time::Instant;

use crate::peers::*;
use crate::support::*;

#[test]
fn an_idle_session_ends_and_the_next_datagram_begins_another() {
    let backend = Peer::new(Kind::Udp);
    let proxy = Proxy::start(Kind::Udp, &backend.target, &["--session-idle-time=700ms"]);
    let client = proxy.client();
    client.send(b"one").unwrap();
    let (_, first) = receive_from(&backend.socket).unwrap();
    let since = Instant::now();
    while since.elapsed() < Duration::from_millis(1400) {
        client.send(b"again").unwrap();
        assert_eq!(receive_from(&backend.socket).unwrap().1, first, "it is in use");
        pause(Duration::from_millis(300));
    }
    proxy.wait_for_sessions(0);
    let idle = since.elapsed() - Duration::from_millis(1400);
    assert!(idle < Duration::from_secs(3), "{idle:?}");
    client.send(b"two").unwrap();
    assert_ne!(receive_from(&backend.socket).unwrap().1, first);
    assert_eq!(proxy.value("sessions_total", &[]), 2);
}

#[test]
fn a_drain_serves_sessions_and_no_new_client() {
    let systemd = FakeSystemd::new();
    let backend = echo_peer(Kind::Udp);
    let words = ["--drain-time=10s", "--session-idle-time=1s", &backend.target];
    let mut proxy = Proxy::start_at(Peer::new(Kind::Udp), &words, |launch| launch.notify(&systemd));
    let (client, stranger) = (proxy.client(), proxy.client());
    // A confirmed session is in use.
    echoes(&client, b"one");
    echoes(&client, b"two");
    proxy.running.signal(Signal::TERM);
    proxy.running.lines.wait_for("waiting up to 10s for open connections to end: 1");
    echoes(&client, b"three");
    stranger.send(b"four").unwrap();
    proxy.wait_for_dropped("draining", 1);
    assert!(is_silent(&stranger));
    let since = Instant::now();
    assert_eq!(proxy.running.wait().code(), Some(0));
    assert!(since.elapsed() < Duration::from_secs(5), "the session was idle");
    proxy.running.lines.wait_for("All connections have ended.");
}

#[test]
fn a_stop_leaves_datagrams_in_the_kernel() {
    let backend = echo_peer(Kind::Udp);
    let front = Peer::new(Kind::Udp);
    let start = || Launch::new(OURS).socket(&front.socket).arg(&backend.target).start();
    let mut proxy = start();
    let client = front.client();
    echoes(&client, b"one");
    proxy.signal(Signal::TERM);
    assert_eq!(proxy.wait().code(), Some(0));
    client.send(b"two").unwrap();
    let _proxy = start();
    assert_eq!(receive(&client), b"two");
}

#[test]
fn the_socket_is_as_before_after_a_stop() {
    use std::os::fd::AsRawFd;
    let gro = |socket: &socket2::Socket| {
        let (mut value, mut length) = (-1, 4);
        let (level, name) = (libc::SOL_UDP, libc::UDP_GRO);
        // SAFETY: getsockopt(2) writes an int.
        let result = unsafe {
            let value = (&raw mut value).cast();
            libc::getsockopt(socket.as_raw_fd(), level, name, value, &raw mut length)
        };
        assert_eq!(result, 0);
        value
    };
    let backend = echo_peer(Kind::Udp);
    let mut proxy = Proxy::start(Kind::Udp, &backend.target, &[]);
    echoes(&proxy.client(), b"one");
    assert_eq!(gro(&proxy.front.socket), 1);
    proxy.running.signal(Signal::TERM);
    proxy.running.wait();
    assert_eq!(gro(&proxy.front.socket), 0, "another program may take the socket");
}

#[test]
fn an_idle_proxy_exits_beside_sessions_that_are_not_confirmed() {
    let backend = echo_peer(Kind::Udp);
    let mut proxy = Proxy::start(Kind::Udp, &backend.target, &["--exit-idle-time=700ms"]);
    let client = proxy.client();
    let since = Instant::now();
    while since.elapsed() < Duration::from_millis(1500) {
        echoes(&client, b"in use");
        pause(Duration::from_millis(300));
    }
    drop(client);
    proxy.running.signal(Signal::USR1);
    proxy.running.lines.wait_for("datagrams to the backend");
    // The session is confirmed, and so in use until it is idle for 2min.
    assert!(proxy.running.is_running());
    let proxy = Proxy::start(Kind::Udp, &backend.target, &["--exit-idle-time=700ms"]);
    let mut running = proxy.running;
    let client = proxy.front.client();
    echoes(&client, b"once");
    assert_eq!(running.wait().code(), Some(0));
    running.lines.wait_for("No connection for 700ms, exiting.");
}

#[test]
fn a_session_ends_in_time_beside_older_ones_that_go_on() {
    let backend = echo_peer(Kind::Udp);
    let proxy = Proxy::start(Kind::Udp, &backend.target, &[]);
    let stream = proxy.client();
    echoes(&stream, b"one");
    pause(Duration::from_millis(2100));
    // From now on it is a stream, which ends after 2 minutes.
    echoes(&stream, b"two");
    pause(Duration::from_millis(100));
    echoes(&proxy.client(), b"once");
    let since = Instant::now();
    assert_eq!(proxy.sessions(), 2);
    let ended = poll_until(since + Duration::from_secs(60), || {
        pause(Duration::from_millis(200));
        (proxy.sessions() == 1).then(|| since.elapsed())
    });
    let ended = ended.expect("the session ends");
    assert!(ended > Duration::from_secs(29) && ended < Duration::from_secs(36), "{ended:?}");
}
