//! `--keepalive=`: the timer on both sides, and a peer that vanishes.

use std::io::{BufRead, BufReader};
use std::process::Command;
use std::time::Duration;

use crate::support::*;
use tokio::time::Instant;

/// What ss(8) says of the connections with one of these ports on a side.
fn timers(filter: &str) -> Vec<String> {
    let ss = Command::new("ss").args(["-tnoH", "state", "established", filter]).output().unwrap();
    String::from_utf8(ss.stdout).unwrap().lines().map(String::from).collect()
}

#[test]
fn sets_the_timer_on_both_sides() {
    let (front, backend) = (Endpoint::new(Family::Tcp), echo_backend(Family::Tcp));
    // One is queued before the proxy starts, and inherits nothing.
    let mut early = front.connect();
    let launch = Launch::new(OURS).args(["--keepalive=30s", &backend.target]);
    let _proxy = launch.listener(&front).start();
    assert_echoes(&mut early);
    let mut late = front.connect();
    assert_echoes(&mut late);
    let ours = [format!("sport = :{}", front.port()), format!("dport = :{}", backend.port())];
    for filter in ours {
        let lines = timers(&filter);
        assert_eq!(lines.len(), 2, "{lines:?}");
        for line in lines {
            assert!(line.contains("timer:(keepalive,"), "{filter}: {line}");
        }
    }
}

#[test]
fn notices_a_peer_that_vanishes() {
    let _turn = measuring();
    if !is_root_for("a peer that vanishes") {
        return;
    }
    let connect = "use Socket; socket(S, PF_INET, SOCK_STREAM, 0) or die; <STDIN>; $| = 1; \
                   connect(S, pack_sockaddr_in(4000, inet_aton('192.0.2.1'))) or die $!; \
                   print \"connected\\n\"; sleep";
    let (home, mut peer) =
        (NetworkNamespace::new(), NetworkNamespace::start(&["perl", "-e", connect]));
    home.run(&format!("ip link add here type veth peer name there netns {}", peer.pid()));
    home.run("ip address add 192.0.2.1/24 dev here");
    home.run("ip link set here up");
    peer.run("ip address add 192.0.2.2/24 dev there");
    peer.run("ip link set there up");
    let backend = Endpoint::new(Family::Unix);
    let proxy = home.inside(|| {
        let options = ["--listen=192.0.2.1:4000", "--keepalive=1s", &backend.target];
        Launch::new(OURS).args(options).start()
    });
    proxy.lines.wait_for("Listening on");
    drop(peer.process.stdin.take());
    let mut line = String::new();
    BufReader::new(peer.process.stdout.take().unwrap()).read_line(&mut line).unwrap();
    assert_eq!(line, "connected\n");
    let mut connection = backend.accept();
    peer.run("ip link set there down");
    let start = Instant::now();
    // TIME and nine seconds, and three times the second to which they are exact.
    connection.set_read_timeout(Some(Duration::from_secs(13))).unwrap();
    let (bytes, end) = read_all(&mut connection);
    let took = start.elapsed();
    assert!(bytes.is_empty() && took < Duration::from_secs(13), "after {took:?}: {end:?}");
    assert!(took > Duration::from_secs(7), "nine probes were not waited for: {took:?}");
}
