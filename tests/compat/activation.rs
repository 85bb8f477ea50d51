//! Listeners: passed, or opened by `--listen=`.

use std::net::UdpSocket;
use std::path::Path;
use std::time::Duration;

use rustix::process::Signal;
use socket2::{Domain, SockAddr, Socket, Type};
use tempfile::TempDir;
use tokio::time::Instant;

use crate::Cases;
use crate::Expected::{OnlyOurs, Shared};
use crate::support::*;
use crate::unique_name;

pub(crate) fn register(cases: &mut Cases) {
    cases.add("ignores sockets meant for another process", Shared, other_pid);
    cases.add(
        "serves a datagram socket",
        OnlyOurs("Passed in socket is not a stream socket."),
        datagram_socket,
    );
    cases.add("serves several sockets with one target", Shared, several_sockets);
    cases.add("serves a vsock listener", OnlyOurs("a notification comes"), vsock_listener);
    cases.add("listens where --listen= says", OnlyOurs("no line with \"Listening"), own_listeners);
    cases.add(
        "refuses --listen= beside passed sockets",
        OnlyOurs("as well"),
        both_kinds_of_sockets,
    );
}

fn other_pid(program: &Path) {
    let front = Endpoint::new(Family::Tcp);
    let launch = Launch::new(program).arg("x").listener(&front).other_pid();
    let mut proxy = launch.env("LISTEN_FDNAMES", "of-another").start();
    assert_eq!(proxy.wait().code(), Some(1));
    let stderr = proxy.lines.all();
    assert!(stderr.contains("Didn't get any sockets passed in."), "{stderr}");
}

fn datagram_socket(program: &Path) {
    let [front, backend, client] = [(); 3].map(|()| UdpSocket::bind("127.0.0.1:0").unwrap());
    let target = backend.local_addr().unwrap();
    let mut proxy = Launch::new(program).arg(target).socket(&front).start();
    client.send_to(b"a datagram", front.local_addr().unwrap()).unwrap();
    backend.set_read_timeout(Some(Duration::from_millis(10))).unwrap();
    let mut buffer = [0; 100];
    let received = poll_until(Instant::now() + TIMEOUT, || {
        assert!(proxy.is_running(), "{}", proxy.lines.all());
        backend.recv(&mut buffer).ok()
    });
    assert_eq!(&buffer[..received.expect("a datagram comes")], b"a datagram");
}

fn several_sockets(program: &Path) {
    let fronts = [Family::Tcp, Family::Unix, Family::Tcp].map(Endpoint::new);
    let backend = echo_backend(Family::Unix);
    let mut launch = Launch::new(program).arg(&backend.target);
    for front in &fronts {
        launch = launch.listener(front);
    }
    let _proxy = launch.start();
    for front in &fronts {
        assert_echoes(&mut front.connect());
    }
}

fn vsock_listener(program: &Path) {
    // Any port of any CID of this machine; no client connects.
    let address = SockAddr::vsock(u32::MAX, u32::MAX);
    let socket = match Socket::new(Domain::VSOCK, Type::STREAM, None) {
        Ok(socket) => socket,
        Err(error) => {
            eprintln!("SKIPPED: a vsock listener: {error}");
            return;
        }
    };
    socket.bind(&address).unwrap();
    socket.listen(1).unwrap();
    let systemd = FakeSystemd::new();
    let _proxy = Launch::new(program)
        .args(["--exit-idle-time=1s", "127.0.0.1:80"])
        .socket(&socket)
        .notify(&systemd)
        .start();
    systemd.wait_for("STOPPING=1");
    // A name of a socket that exists is as it is written; any port of any CID again.
    let any = ["--listen=vsock::4294967295", "--log-level=debug", "127.0.0.1:80"];
    let proxy = Launch::new(program).args(any).start();
    let line = proxy.lines.wait_for("Listening on vsock::");
    let port = line.trim_start_matches("Listening on vsock::").trim_end_matches('.');
    drop(proxy);
    let selected = format!("vsock::{port}=127.0.0.1:80");
    let args = [&*format!("--listen=vsock::{port}"), "--log-level=debug", &selected];
    let proxy = Launch::new(program).args(args).start();
    proxy.lines.wait_for(&format!("Serving vsock::{port}, connections go to 127.0.0.1:80"));
    drop(proxy);
    if !Path::new("/sys/module/vsock_loopback").exists() {
        // Any other CID than the loopback one (1) is another machine's.
        eprintln!("SKIPPED: bytes over vsock: this kernel has no vsock_loopback");
        return;
    }
    let backend = Socket::new(Domain::VSOCK, Type::STREAM, None).unwrap();
    backend.bind(&address).unwrap();
    backend.listen(1).unwrap();
    let (_, target) = backend.local_addr().unwrap().as_vsock_address().unwrap();
    serve_on(backend, echo);
    let args = [format!("--listen=vsock::{port}"), format!("vsock:1:{target}")];
    let proxy = Launch::new(program).args(args).start();
    proxy.lines.wait_for("Listening on vsock::");
    assert_echoes(&mut connect(&SockAddr::vsock(1, port.parse().unwrap())));
}

fn own_listeners(program: &Path) {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("front");
    let name = format!("@socket-proxyd-front-{}", unique_name());
    let backend = echo_backend(Family::Unix);
    let mut proxy = Launch::new(program)
        .args(["--listen=127.0.0.1:0", "--listen=0", "--listen=[::1]:0"])
        .arg(format!("--listen={}", path.display()))
        .arg(format!("--listen={name}"))
        .arg(&backend.target)
        .start();
    for host in ["127.0.0.1", "[::]", "[::1]"] {
        let line = proxy.lines.wait_for(&format!("Listening on {host}:"));
        let address = line.split("Listening on ").nth(1).unwrap().trim_end_matches('.');
        let address: std::net::SocketAddr = address.parse().unwrap();
        assert_echoes(&mut connect(&address.into()));
        if host == "[::]" {
            let ipv4 = std::net::SocketAddr::new([127, 0, 0, 1].into(), address.port());
            assert_echoes(&mut connect(&ipv4.into()));
        }
    }
    proxy.lines.wait_for(&format!("Listening on {name}."));
    assert_echoes(&mut connect(&SockAddr::unix(&path).unwrap()));
    assert_echoes(&mut connect(&SockAddr::unix(name.replace('@', "\0")).unwrap()));
    proxy.signal(Signal::TERM);
    assert_eq!(proxy.wait().code(), Some(0));
    assert!(!path.exists(), "the socket file stayed");
}

fn both_kinds_of_sockets(program: &Path) {
    let front = Endpoint::new(Family::Tcp);
    let args = ["--listen=127.0.0.1:0", "127.0.0.1:80"];
    let mut proxy = Launch::new(program).args(args).listener(&front).start();
    assert_eq!(proxy.wait().code(), Some(1));
    let stderr = proxy.lines.all();
    assert!(stderr.contains("--listen= as well"), "passed and opened sockets as well: {stderr}");
}
