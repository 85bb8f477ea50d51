//! `--listen=`: which sockets are opened, and what happens when one breaks.

use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;

use crate::support::*;
use rustix::process::Signal;
use tempfile::TempDir;

/// Listens on a port of a name that has two addresses. Returns the addresses of the listeners.
fn two_faced(port: u16, listeners: usize) -> Vec<SocketAddr> {
    let directory = TempDir::new().unwrap();
    let hosts = directory.path().join("hosts");
    fs::write(&hosts, "127.0.0.1 two-faced\n127.0.0.9 two-faced\n").unwrap();
    let backend = echo_backend(Family::Unix);
    let listen = format!("--listen=two-faced:{port}");
    let mut proxy = Launch::new(OURS).args([&listen, &backend.target]).hosts(hosts).start();
    let address = |host| {
        let line = proxy.lines.wait_for(&format!("Listening on {host}:"));
        line.split("Listening on ").nth(1).unwrap().trim_end_matches('.').parse().unwrap()
    };
    let addresses: Vec<SocketAddr> =
        ["127.0.0.1", "127.0.0.9"].into_iter().take(listeners).map(address).collect();
    addresses.iter().for_each(|address| assert_echoes(&mut connect(&(*address).into())));
    proxy.signal(Signal::TERM);
    assert!(proxy.wait().success());
    assert_eq!(proxy.lines.all().matches("Listening on ").count(), listeners);
    addresses
}

#[test]
fn opens_every_address_of_a_name() {
    if is_root_for("a name with two addresses") {
        let port = free_port();
        let addresses = two_faced(port, 2);
        assert!(addresses.iter().all(|address| address.port() == port));
    }
}

#[test]
fn opens_port_0_on_the_first_address_only() {
    if is_root_for("a name with two addresses") {
        assert_ne!(two_faced(0, 1)[0].port(), 0);
    }
}

#[test]
fn umask_is_the_mode_of_a_socket_file() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("front");
    let script = "umask 027 && exec \"$0\" \"$@\"";
    let listen = format!("--listen={}", path.display());
    let launch = Launch::new("/bin/sh").args(["-c", script, OURS, &listen, "/nowhere"]);
    let proxy = launch.start();
    proxy.lines.wait_for("Listening on ");
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o750);
}

#[test]
fn backlog_is_4096_or_what_the_kernel_allows() {
    let port = free_port();
    let listen = format!("--listen=127.0.0.1:{port}");
    let proxy = Launch::new(OURS).args([&listen, "/nowhere"]).start();
    proxy.lines.wait_for("Listening on ");
    let allowed = fs::read_to_string("/proc/sys/net/core/somaxconn").unwrap();
    let allowed: u32 = allowed.trim().parse().unwrap();
    let ss = Command::new("ss").args(["-ltnH", &format!("sport = :{port}")]).output().unwrap();
    let line = String::from_utf8(ss.stdout).unwrap();
    // State, Recv-Q and Send-Q, which for a listener is its backlog.
    let backlog = line.split_whitespace().nth(2).unwrap();
    assert_eq!(backlog, allowed.min(4096).to_string(), "{line}");
}

#[test]
fn exits_with_1_when_a_listener_breaks() {
    let front = Endpoint::new(Family::Tcp);
    let systemd = FakeSystemd::new();
    let mut proxy = Launch::new(OURS).arg("/nowhere").listener(&front).notify(&systemd).start();
    systemd.wait_for("READY=1");
    front.socket.shutdown(std::net::Shutdown::Both).unwrap();
    assert_eq!(proxy.wait().code(), Some(1));
    let stderr = proxy.lines.all();
    assert!(stderr.contains("Failed to accept on unknown (127.0.0.1:"), "{stderr}");
}
