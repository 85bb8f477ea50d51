//! `--threads=`: when threads start, how connections are spread over them, and how they end.
//!
//! That everything else is as with one thread is shown in tests/compat/, whose cases run with
//! three of them, too.

use std::collections::BTreeSet;
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::process::Command;

use crate::support::*;
use rustix::process::Signal;
use socket2::Socket;
use tempfile::TempDir;
use tokio::time::Instant;

fn start(threads: &str, backend: &Endpoint, front: &Endpoint) -> Running {
    let launch = Launch::new(OURS).arg(format!("--threads={threads}"));
    launch.arg(&backend.target).listener(front).start()
}

/// How many descriptors each event loop watches, in ascending order.
fn watched(proxy: &Running) -> Vec<usize> {
    let directory = fs::read_dir(format!("/proc/{}/fdinfo", proxy.pid())).unwrap();
    // A loop has two descriptors, with the same in each.
    let loops: BTreeSet<Vec<String>> = directory
        .filter_map(|entry| fs::read_to_string(entry.unwrap().path()).ok())
        .map(|info| {
            info.lines().filter(|line| line.starts_with("tfd:")).map(String::from).collect()
        })
        .filter(|watched: &Vec<_>| !watched.is_empty())
        .collect();
    let mut watched: Vec<_> = loops.iter().map(Vec::len).collect();
    watched.sort_unstable();
    watched
}

/// A client that is being served.
fn client(front: &Endpoint) -> Socket {
    let mut client = front.connect();
    assert_echoes(&mut client);
    client
}

#[test]
fn starts_threads_when_there_is_work() {
    for (front, back) in PAIRS {
        let (front, backend) = (Endpoint::new(front), echo_backend(back));
        let proxy = start("3", &backend, &front);
        let mut clients = Vec::new();
        for expected in [0, 1, 2, 2, 2] {
            clients.push(client(&front));
            assert_eq!(proxy.workers(), expected, "with {} clients", clients.len());
        }
        clients.iter_mut().for_each(assert_echoes);
        // One after the other they are served by the main thread.
        let idle = proxy.descriptors() - 2 * clients.len();
        drop(clients);
        let over = || (proxy.descriptors() == idle).then_some(());
        poll_until(Instant::now() + TIMEOUT, over).expect("all connections are over");
        let before = watched(&proxy);
        let _client = client(&front);
        let after = watched(&proxy);
        assert_eq!(after[..2], before[..2], "the threads' loops are as they were");
        assert_eq!(after[2], before[2] + 2, "the main loop has the connection");
    }
}

#[test]
fn spreads_connections_evenly() {
    let (front, backend) = (Endpoint::new(Family::Tcp), echo_backend(Family::Unix));
    let proxy = start("3", &backend, &front);
    let clients: Vec<_> = (0..3).map(|_| client(&front)).collect();
    let one_each = watched(&proxy);
    let more: Vec<_> = (0..27).map(|_| client(&front)).collect();
    let ten_each = watched(&proxy);
    for (one, ten) in one_each.iter().zip(&ten_each) {
        assert_eq!(ten - one, 2 * 9, "{one_each:?} {ten_each:?}");
    }
    drop((clients, more));
}

#[test]
fn signal_resets_the_connections_of_all_threads() {
    let (front, backend) = (Endpoint::new(Family::Tcp), echo_backend(Family::Tcp));
    let mut proxy = start("4", &backend, &front);
    let clients: Vec<_> = (0..8).map(|_| client(&front)).collect();
    assert_eq!(proxy.workers(), 3);
    proxy.signal(Signal::TERM);
    assert!(proxy.wait().success());
    for mut client in clients {
        assert!(is_reset(&read_all(&mut client).1));
    }
}

#[test]
fn probe_goes_to_a_waiting_client() {
    let (front, port) = (Endpoint::new(Family::Tcp), free_port());
    let address = format!("127.0.0.1:{port}");
    let launch = Launch::new(OURS).args(["--threads=2", "--backend-wait=20s"]);
    let proxy = launch.arg(&address).listener(&front).start();
    // The first begins to probe, on the main thread; the second waits on the other, and stays.
    let first = front.connect();
    proxy.lines.wait_for("holding clients");
    let mut second = front.connect();
    poll_until(Instant::now() + TIMEOUT, || (proxy.workers() == 1).then_some(())).unwrap();
    // A probe has one more for a moment.
    let (mut seen, mut before) = (0, 0);
    let settled = || {
        let now = proxy.descriptors();
        seen = if now == before { seen + 1 } else { 0 };
        before = now;
        (seen == 20).then_some(now)
    };
    let both = poll_until(Instant::now() + TIMEOUT, settled).unwrap();
    reset(first);
    let left = || (proxy.descriptors() == both - 1).then_some(());
    poll_until(Instant::now() + TIMEOUT, left).expect("the first has left");
    // A backend that serves once.
    let backend = Endpoint::tcp(&address, 1);
    let served = std::thread::spawn(move || {
        let connection = backend.accept();
        drop(backend);
        echo(connection);
    });
    assert_echoes(&mut second);
    drop(second);
    served.join().unwrap();
}

#[test]
fn serves_without_a_refused_thread() {
    if !is_root_for("a user without threads") {
        return;
    }
    let (front, backend) = (Endpoint::new(Family::Tcp), echo_backend(Family::Tcp));
    let directory = TempDir::new().unwrap();
    fs::set_permissions(directory.path(), Permissions::from_mode(0o755)).unwrap();
    let program = directory.path().join("program");
    fs::copy(OURS, &program).unwrap();
    // The main thread, one that logs, and one more. Root would not be refused.
    let user = ["--reuid=54321", "--regid=54321", "--clear-groups", "prlimit"];
    let launch = Launch::new("/usr/bin/setpriv").args(user).args(["--nproc=3:100", "--"]);
    let launch = launch.arg(program.display());
    let args = ["--threads=8", "--log-level=debug", &backend.target];
    let proxy = launch.args(args).listener(&front).start();
    proxy.lines.wait_for("Serving");
    let clients: Vec<_> = (0..2).map(|_| client(&front)).collect();
    assert_eq!(proxy.workers(), 1);
    let before = watched(&proxy);
    let more: Vec<_> = (0..24).map(|_| client(&front)).collect();
    proxy.lines.wait_for("Failed to start a thread, serving with");
    for (before, after) in before.iter().zip(watched(&proxy)) {
        assert!(after >= before + 2 * 6, "{before} and then {after}");
    }
    // Once threads are allowed, one is started after 10 seconds.
    let pid = proxy.pid().to_string();
    let mut prlimit = Command::new("/usr/bin/setpriv");
    prlimit.args(user).args(["--nproc=100", "--pid", &pid]);
    assert!(prlimit.status().unwrap().success());
    let start = Instant::now();
    let mut late = Vec::new();
    let started = poll_until(start + TIMEOUT, || {
        late.push(client(&front));
        late.truncate(100);
        (proxy.workers() > 1).then_some(())
    });
    started.expect("a thread is started");
    drop((clients, more, late));
}

#[test]
fn rejects_invalid_numbers() {
    for number in ["0", "-1", "257", "two", ""] {
        let option = format!("--threads={number}");
        let (code, _, stderr) = run(&OURS.into(), &[&option, "/a"]);
        assert_eq!(code, Some(1), "{number}: {stderr}");
        assert!(stderr.contains("'--threads <N>'") && stderr.lines().count() == 1, "{stderr}");
    }
}
