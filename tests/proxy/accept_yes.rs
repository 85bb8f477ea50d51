//! A connection that was passed instead of a listener: `Accept=yes`, and inetd's descriptor 0. (In a
//! real systemd: tests/systemd/drop_in.rs.)

use std::io::Write;
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use crate::support::*;
use rustix::process::Signal;
use socket2::Socket;
use tokio::time::Instant;

/// A client, and the other end as it was accepted.
fn accepted(family: Family) -> (Socket, Socket) {
    let front = Endpoint::new(family);
    (front.connect(), front.accept())
}

#[test]
fn serves_one_connection_and_exits() {
    for (front, back) in PAIRS {
        let (mut client, passed) = accepted(front);
        let backend = echo_backend(back);
        let systemd = FakeSystemd::new();
        // Options about many connections have no effect.
        let options = ["--threads=2", "-c1", "--overflow=wait", "--exit-idle-time=1ms"];
        let launch = Launch::new(OURS).args(options).arg(&backend.target).socket(&passed);
        let launch = launch.notify(&systemd);
        let mut proxy = launch.env("LISTEN_FDNAMES", "connection").start();
        drop(passed);
        assert_eq!(systemd.next(), "READY=1");
        for _ in 0..3 {
            assert_echoes(&mut client);
        }
        let message = random_bytes(3, 3_000_000);
        let answer = std::thread::scope(|scope| {
            let mut writer = client.try_clone().unwrap();
            let message = &message;
            scope.spawn(move || {
                writer.write_all(message).unwrap();
                writer.shutdown(Shutdown::Write).unwrap();
            });
            read_all(&mut client)
        });
        answer.1.unwrap();
        assert!(answer.0 == message, "{} bytes", answer.0.len());
        systemd.wait_for("STOPPING=1");
        assert_eq!(proxy.wait().code(), Some(0));
        assert_eq!(proxy.lines.all(), "");
    }
}

#[test]
fn forwards_a_reset_and_exits_with_success() {
    for back in [Family::Tcp, Family::Unix] {
        let (client, passed) = accepted(Family::Tcp);
        let backend = Endpoint::new(back);
        let mut proxy = Launch::new(OURS).arg(&backend.target).socket(&passed).start();
        drop(passed);
        let mut served = backend.accept();
        reset(client);
        let (_, end) = read_all(&mut served);
        assert_eq!(is_reset(&end), back == Family::Tcp, "{end:?}");
        assert_eq!(proxy.wait().code(), Some(0));
    }
}

#[test]
fn sends_ready_even_if_the_connection_fails() {
    // systemd takes an exit without READY=1 for a failure (Type=notify).
    for target in ["/nonexistent", "127.0.0.1:1"] {
        for is_gone in [false, true] {
            let (client, passed) = accepted(Family::Tcp);
            let client = if is_gone {
                reset(client);
                None
            } else {
                Some(client)
            };
            let systemd = FakeSystemd::new();
            let launch = Launch::new(OURS).arg(target).socket(&passed);
            let mut proxy = launch.notify(&systemd).start();
            drop(passed);
            assert_eq!(systemd.next(), "READY=1", "{target} {is_gone}");
            systemd.wait_for("STOPPING=1");
            assert_eq!(proxy.wait().code(), Some(0), "{}", proxy.lines.all());
            drop(client);
        }
    }
}

#[test]
fn logs_an_unreachable_backend_and_exits_with_success() {
    let (mut client, passed) = accepted(Family::Tcp);
    let launch = Launch::new(OURS).arg("127.0.0.1:1").socket(&passed);
    let mut proxy = launch.env("LISTEN_FDNAMES", "connection").start();
    drop(passed);
    assert_eq!(read_all(&mut client).0, b"");
    proxy.lines.wait_for("Failed to connect to remote host: 127.0.0.1:1: Connection refused");
    assert_eq!(proxy.wait().code(), Some(0));
}

#[test]
fn sigterm_resets_the_connection_and_stops() {
    let (mut client, passed) = accepted(Family::Tcp);
    let backend = Endpoint::new(Family::Tcp);
    let mut proxy = Launch::new(OURS).arg(&backend.target).socket(&passed).start();
    drop(passed);
    let mut served = backend.accept();
    proxy.signal(Signal::TERM);
    assert!(is_reset(&read_all(&mut client).1) && is_reset(&read_all(&mut served).1));
    assert_eq!(proxy.wait().code(), Some(0));
}

#[test]
fn applies_options() {
    let (client, passed) = accepted(Family::Tcp);
    let backend = Endpoint::new(Family::Unix);
    let selection = format!("connection={}", backend.target);
    let launch = Launch::new(OURS).args(["--proxy-protocol=v1", "--keepalive=30s", &selection]);
    let launch = launch.arg("--connection-idle-time=200ms").socket(&passed);
    let mut proxy = launch.env("LISTEN_FDNAMES", "connection").start();
    let mut served = backend.accept();
    // The same socket, seen from here.
    assert!(passed.tcp_nodelay().unwrap() && passed.out_of_band_inline().unwrap());
    assert_eq!(passed.tcp_keepalive_time().unwrap(), Duration::from_secs(30));
    assert!(passed.keepalive().unwrap());
    drop(passed);
    let port = |address: std::io::Result<socket2::SockAddr>| address.unwrap().as_socket().unwrap();
    let (from, to) = (port(client.local_addr()), port(client.peer_addr()));
    let (header, _) = read_all(&mut served);
    let expected = format!("PROXY TCP4 127.0.0.1 127.0.0.1 {} {}\r\n", from.port(), to.port());
    assert_eq!(String::from_utf8(header).unwrap(), expected);
    assert_eq!(proxy.wait().code(), Some(0));
    proxy.lines.wait_for("Connection was idle for 200ms");
}

#[test]
fn rejects_invalid_combinations() {
    let (_client, passed) = accepted(Family::Tcp);
    let front = Endpoint::new(Family::Tcp);
    for (launch, message) in [
        (
            Launch::new(OURS).arg("/a").listener(&front).socket(&passed),
            "Passed in socket connection is connected, and must be the only one.",
        ),
        (
            Launch::new(OURS).args(["/a", "--", "sh"]).socket(&passed),
            "COMMAND needs one process that serves all connections, and only one connection was passed in.",
        ),
        (
            Launch::new(OURS).args(["--listen=127.0.0.1:0", "/a"]).socket(&passed),
            "Got sockets passed in and --listen= as well",
        ),
        (
            Launch::new(OURS).args(["--metrics=127.0.0.1:0", "/a"]).socket(&passed),
            "--metrics= needs one process that serves all connections, and only one connection was passed in.",
        ),
        (
            Launch::new(OURS).arg("web=/a").socket(&passed),
            "Selector web= selects no socket of that name. The sockets are: ",
        ),
    ] {
        let mut proxy = launch.env("LISTEN_FDNAMES", "x:connection").start();
        assert_eq!(proxy.wait().code(), Some(1), "{message}");
        let stderr = proxy.lines.all();
        let stderr = stderr.replace("socket x is", "socket connection is");
        let lines = stderr.lines().filter(|line| !line.starts_with("Serving metrics on "));
        let stderr = lines.collect::<Vec<_>>().join("\n");
        assert!(stderr.starts_with(message) && stderr.lines().count() == 1, "{stderr}");
    }
}

/// The program with a socket as its descriptor 0, and as 1 and 2 if there is nothing else for them.
fn inetd(socket: Socket, others: Option<(Stdio, Stdio)>, args: &[&str]) -> Child {
    let copy = || Stdio::from(socket.as_fd().try_clone_to_owned().unwrap());
    let (stdout, stderr) = others.unwrap_or_else(|| (copy(), copy()));
    let mut command = Command::new(OURS);
    command.args(args).stdin(copy()).stdout(stdout).stderr(stderr);
    for name in ["LISTEN_FDS", "LISTEN_PID", "NOTIFY_SOCKET", "JOURNAL_STREAM"] {
        command.env_remove(name);
    }
    command.spawn().unwrap()
}

fn exit_code(child: &mut Child) -> Option<i32> {
    let ended = || child.try_wait().unwrap();
    let status = poll_until(Instant::now() + TIMEOUT, ended);
    if status.is_none() {
        let _ = child.kill();
    }
    status.expect("it exits").code()
}

#[test]
fn inetd_client_gets_only_what_the_backend_sends() {
    for (front, back) in PAIRS {
        let (mut client, passed) = accepted(front);
        let backend = Endpoint::new(back);
        let mut proxy = inetd(passed, None, &["--log-level=debug", &backend.target]);
        let mut served = backend.accept();
        for fd in 0..3 {
            let file = std::fs::read_link(format!("/proc/{}/fd/{fd}", proxy.id())).unwrap();
            assert_eq!(file.to_str(), Some("/dev/null"), "descriptor {fd}");
        }
        served.write_all(b"the whole answer").unwrap();
        drop(served);
        let (bytes, end) = read_all(&mut client);
        end.unwrap();
        assert_eq!(String::from_utf8(bytes).unwrap(), "the whole answer");
        drop(client);
        assert_eq!(exit_code(&mut proxy), Some(0));
    }
    // Whatever there is to complain of.
    for (args, code) in [
        (&["--log-level=debug", "127.0.0.1:1"][..], 0),
        (&["--connections-max=x", "127.0.0.1:1"], 1),
        (&["--no-such-option", "127.0.0.1:1"], 1),
        (&["127.0.0.1:1", "--", "true"], 1),
        (&["a=/a", "b=/b"], 1),
        (&["--listen=127.0.0.1:0", "127.0.0.1:1"], 1),
        (&[], 1),
    ] {
        let (mut client, passed) = accepted(Family::Tcp);
        let mut proxy = inetd(passed, None, args);
        assert_eq!(exit_code(&mut proxy), Some(code), "{args:?}");
        assert_eq!(read_all(&mut client).0, b"", "{args:?}");
    }
}

#[test]
fn logs_to_a_separate_standard_error() {
    let (mut client, passed) = accepted(Family::Tcp);
    let others = Some((Stdio::null(), Stdio::piped()));
    let mut proxy = inetd(passed, others, &["stdin=127.0.0.1:1"]);
    let lines = Lines::default();
    lines.collect(proxy.stderr.take().unwrap());
    assert_eq!(read_all(&mut client).0, b"");
    lines.wait_for("127.0.0.1:1: Connection refused (client 127.0.0.1:");
    assert_eq!(exit_code(&mut proxy), Some(0));
}

#[test]
fn serves_a_listener_on_descriptor_0() {
    let (front, backend) = (Endpoint::new(Family::Tcp), echo_backend(Family::Unix));
    let socket = front.socket.try_clone().unwrap();
    let args = ["--exit-idle-time=500ms", &backend.target];
    let mut proxy = inetd(socket, None, &args);
    for _ in 0..3 {
        assert_echoes(&mut front.connect());
    }
    assert_eq!(exit_code(&mut proxy), Some(0));
}

fn refuses(socket: Socket, words: &str) {
    let others = Some((Stdio::null(), Stdio::piped()));
    let mut proxy = inetd(socket, others, &["127.0.0.1:1"]);
    let lines = Lines::default();
    lines.collect(proxy.stderr.take().unwrap());
    lines.wait_for(words);
    assert_eq!(exit_code(&mut proxy), Some(1));
}

#[test]
fn refuses_a_socket_without_a_client_on_descriptor_0() {
    // No address: a socketpair(2), as sshd and many others have it.
    let (_ours, theirs) = Socket::pair(socket2::Domain::UNIX, socket2::Type::STREAM, None).unwrap();
    refuses(theirs, "Didn't get any sockets passed in.");
    // No client either: it never was connected.
    let unconnected = Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    refuses(unconnected, "Passed in socket is not a stream socket.");
}

#[test]
fn ignores_descriptor_0_beside_passed_sockets() {
    let (front, backend) = (Endpoint::new(Family::Tcp), echo_backend(Family::Unix));
    let (_client, connection) = accepted(Family::Tcp);
    // The shell moves the second socket to descriptor 0.
    let script = "exec \"$0\" \"$@\" <&4 4<&-";
    let launch = Launch::new("/bin/sh").args(["-c", script, OURS, &backend.target]);
    let launch = launch.listener(&front).socket(&connection).env("LISTEN_FDS", 1);
    let proxy = launch.start();
    assert_echoes(&mut front.connect());
    let file = |path: String| std::fs::read_link(path).unwrap();
    let ours = file(format!("/proc/self/fd/{}", connection.as_raw_fd()));
    assert_eq!(file(format!("/proc/{}/fd/0", proxy.pid())), ours, "not replaced by /dev/null");
}
