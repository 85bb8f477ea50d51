//! What is logged where threads are forbidden, and of clients with strange names.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use crate::support::*;
use rustix::process::Signal;
use socket2::{Domain, Socket, Type};
use tempfile::TempDir;
use tokio::time::Instant;

/// A user of its own for each test, which may have one task.
fn without_threads(directory: &TempDir, user: u32) -> Option<Launch> {
    if !is_root_for("a user without threads") {
        return None;
    }
    let program: PathBuf = directory.path().join("program");
    fs::copy(OURS, &program).unwrap();
    fs::set_permissions(&program, Permissions::from_mode(0o755)).unwrap();
    fs::set_permissions(directory.path(), Permissions::from_mode(0o755)).unwrap();
    let launch = Launch::new("prlimit").args(["--nproc=1", "setpriv", "--clear-groups", "--reuid"]);
    Some(launch.arg(user).arg(program.display()))
}

#[test]
fn writes_lines_without_a_thread() {
    let directory = TempDir::new().unwrap();
    let Some(launch) = without_threads(&directory, 61_001) else { return };
    let front = Endpoint::new(Family::Tcp);
    let mut proxy = launch.arg("/no/such/socket").listener(&front).start();
    assert!(read_all(&mut front.connect()).0.is_empty());
    proxy.lines.wait_for("Failed to connect to remote host: /no/such/socket");
    proxy.signal(Signal::TERM);
    assert!(proxy.wait().success());
}

#[test]
fn fails_to_start_without_a_thread_for_metrics() {
    let directory = TempDir::new().unwrap();
    let Some(launch) = without_threads(&directory, 61_002) else { return };
    let front = Endpoint::new(Family::Tcp);
    let mut proxy = launch.args(["--metrics=127.0.0.1:0", "/x"]).listener(&front).start();
    assert_eq!(proxy.wait().code(), Some(1));
    let stderr = proxy.lines.all();
    assert!(stderr.contains("Failed to start a thread for --metrics="), "{stderr:?}");
}

#[test]
fn stuck_standard_error_delays_no_client_without_a_thread() {
    let directory = TempDir::new().unwrap();
    let Some(launch) = without_threads(&directory, 61_003) else { return };
    let (front, backend) = (Endpoint::new(Family::Tcp), echo_backend(Family::Tcp));
    let launch = launch.args(["--log-level=debug", &backend.target]).listener(&front);
    let mut proxy = launch.stderr_unread().start();
    // Two lines each: far more than a pipe takes.
    (0..1000).for_each(|_| assert_echoes(&mut front.connect()));
    let stderr = proxy.unread_stderr.take().unwrap();
    proxy.lines.collect(stderr);
    let written = || {
        assert_echoes(&mut front.connect());
        (proxy.lines.count("log lines were dropped") == 1).then_some(())
    };
    poll_until(Instant::now() + TIMEOUT, written).expect("what is dropped is counted");
    proxy.signal(Signal::TERM);
    assert!(proxy.wait().success());
    let log = proxy.lines.all();
    assert!(log.lines().all(|it| it.starts_with("Connection ") || it.ends_with('.')), "{log}");
}

#[test]
fn log_level_defaults_to_the_environment() {
    for (option, shown) in [(None, true), (Some("--log-level=info"), false)] {
        let (front, systemd) = (Endpoint::new(Family::Tcp), FakeSystemd::new());
        let launch = Launch::new(OURS).args(option).arg("/nowhere").listener(&front);
        let launch = launch.env("SYSTEMD_LOG_LEVEL", "debug").notify(&systemd);
        let mut proxy = launch.start();
        systemd.wait_for("READY=1");
        proxy.signal(Signal::TERM);
        assert!(proxy.wait().success());
        let log = proxy.lines.all();
        assert_eq!(log.contains("Serving "), shown, "{option:?}: {log}");
    }
}

#[test]
fn client_name_adds_no_field() {
    let (front, backend) = (Endpoint::new(Family::Unix), echo_backend(Family::Unix));
    let launch = Launch::new(OURS).args(["--log-level=debug", &backend.target]).listener(&front);
    let proxy = launch.start();
    // Abstract names are the machine's.
    let unique = std::process::id();
    for (name, written) in [
        (format!("\0{unique} listener=/x"), format!(r#"(client "@{unique} listener=/x", b"#)),
        (
            format!("\0{unique}\", backend \"/x"),
            format!(r#"(client "@{unique}\", backend \"/x", b"#),
        ),
        (format!("\0{unique}\nMESSAGE=x"), format!(r#"(client "@{unique}\nMESSAGE=x", b"#)),
    ] {
        let mut client = Socket::new(Domain::UNIX, Type::STREAM, None).unwrap();
        client.bind(&unix_address(name.as_bytes())).unwrap();
        client.connect(&front.address).unwrap();
        assert_echoes(&mut client);
        drop(client);
        proxy.lines.wait_for(&written);
    }
}
