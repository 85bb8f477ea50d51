//! How much is stored, and what happens beyond that.

use std::io::{Read, Write};
use std::time::Duration;

use rustix::process::Signal;
use socket_proxyd::testing::{Queue, record_ids};
use socket2::Socket;
use tokio::time::Instant;

use crate::support::*;
use crate::{End, MODES, Mode, Proxy, established, launch, queue, stored};

pub(crate) fn register(trials: &mut Trials) {
    trials.add("the default queue holds 2,000 connections", default_queue_holds_thousands);
    for limit in [128, 256] {
        trials.add(
            format!("every admitted connection survives a restart, LimitNOFILE={limit}"),
            move || every_admitted_connection_survives(limit),
        );
    }
    for mode in MODES {
        trials.add(
            format!("a restart needs no more descriptors than the start, {mode}"),
            move || restart_needs_no_more_descriptors(mode),
        );
        trials.add(
            format!("a start with too few descriptors leaves connections stored, {mode}"),
            move || too_few_descriptors(mode),
        );
        for overflow in ["refuse", "wait"] {
            trials.add(
                format!(
                    "restored connections count towards the limit, {mode}, --overflow={overflow}"
                ),
                move || restored_connections_count(mode, overflow),
            );
        }
        trials.add(format!("the store does not leak, {mode}"), move || store_does_not_leak(mode));
    }
    trials
        .add("no more is stored than the next process can open", stores_no_more_than_can_be_opened);
    trials.add("with a full store new connections are served and not stored", full_store);
}

/// The queue as it is without privileges, by default.
const DEFAULT_WMEM_MAX: usize = 212_992;

fn systemd_with_queue(bytes: usize) -> FakeSystemd {
    let systemd = FakeSystemd::with_fd_store(8);
    let queue = Queue::new().unwrap();
    for (end, fd) in ["queue", "sender"].into_iter().zip(queue.ends()) {
        rustix::net::sockopt::set_socket_send_buffer_size(fd, bytes).unwrap();
        systemd.fd_store.put(&format!("handover-of-socket-proxyd.{end}"), fd);
    }
    systemd
}

fn default_queue_holds_thousands() {
    const CONNECTIONS: usize = 2000;
    raise_descriptor_limit();
    let (front, backend) = (Endpoint::new(Family::Tcp), echo_backend(Family::Unix));
    let systemd = systemd_with_queue(DEFAULT_WMEM_MAX);
    let mut all: Vec<Socket> = Vec::new();
    // Modes may follow each other; each stores records of its own.
    for (handover, end) in
        [("crash", End::Killed), ("crash", End::Stopped), ("restart", End::Stopped)]
    {
        let arguments = [format!("--handover={handover}"), "-c3000".into(), backend.target.clone()];
        let mut proxy = launch(&front, &arguments, &systemd);
        systemd.wait_for("READY=1");
        while all.len() < CONNECTIONS {
            all.push(front.connect());
            assert_echoes(all.last_mut().unwrap());
        }
        for _ in 0..200 {
            assert_echoes(&mut front.connect());
        }
        all.iter_mut().for_each(assert_echoes);
        proxy.signal(if end == End::Stopped { Signal::TERM } else { Signal::KILL });
        proxy.wait();
        let log = proxy.lines.all();
        assert!(!log.contains("Failed to store"), "{log}");
    }
    let arguments = ["--handover=crash".into(), "-c3000".into(), backend.target.clone()];
    let proxy = launch(&front, &arguments, &systemd);
    proxy.lines.wait_for(&format!("Recovered connections: {CONNECTIONS}."));
    all.iter_mut().for_each(assert_echoes);
    assert_eq!(proxy.lines.count("store"), 0);
}

fn restart_needs_no_more_descriptors(Mode { handover, end }: Mode) {
    let (front, backend) = (Endpoint::new(Family::Tcp), echo_backend(Family::Unix));
    let arguments = [format!("--handover={handover}"), "-c100".into(), backend.target.clone()];
    let systemd = FakeSystemd::with_fd_store(4);
    let launch = || {
        let launch = Launch::new(OURS).args(&arguments).listener(&front);
        launch.descriptors(1024).stored_by(&systemd).start()
    };
    let mut proxy = launch();
    let mut all: Vec<_> = (0..90).map(|_| front.connect()).collect();
    all.iter_mut().for_each(assert_echoes);
    for _ in 0..3 {
        proxy.signal(if end == End::Stopped { Signal::TERM } else { Signal::KILL });
        proxy.wait();
        proxy = launch();
        all.iter_mut().for_each(assert_echoes);
        let mut new_clients: Vec<_> = (0..10).map(|_| front.connect()).collect();
        new_clients.iter_mut().for_each(assert_echoes);
    }
    assert_eq!(proxy.lines.count("Out of"), 0);
}

/// Connections that need all descriptors of the limit.
fn every_admitted_connection_survives(limit: usize) {
    let (front, backend) = (Endpoint::new(Family::Tcp), echo_backend(Family::Unix));
    let systemd = FakeSystemd::with_fd_store(4);
    let launch = || {
        let launch = Launch::new(OURS).args(["--handover=restart", &backend.target]);
        let running = launch.descriptors(limit).listener(&front).stored_by(&systemd).start();
        systemd.wait_for("READY=1");
        running
    };
    let mut proxy = launch();
    let mut served = Vec::new();
    loop {
        let mut client = front.connect();
        client.write_all(b"!").unwrap();
        client.set_nonblocking(true).unwrap();
        let is_served = || match client.read(&mut [0]) {
            Ok(1) => Some(true),
            _ => (proxy.lines.count("Out of file descriptors") > 0).then_some(false),
        };
        if !poll_until(Instant::now() + TIMEOUT, is_served).expect("it is served or waits") {
            break;
        }
        client.set_nonblocking(false).unwrap();
        served.push(client);
    }
    assert!(served.len() > limit / 8, "{} connections", served.len());
    proxy.signal(Signal::TERM);
    proxy.wait();
    let _proxy = launch();
    served.iter_mut().for_each(assert_echoes);
}

fn too_few_descriptors(Mode { handover, end }: Mode) {
    let (front, backend) = (Endpoint::new(Family::Tcp), echo_backend(Family::Unix));
    let arguments = [format!("--handover={handover}"), "-c100".into(), backend.target.clone()];
    let systemd = FakeSystemd::with_fd_store(4);
    let launch = |descriptors| {
        let launch = Launch::new(OURS).args(&arguments).listener(&front);
        launch.descriptors(descriptors).stored_by(&systemd).start()
    };
    let mut proxy = launch(1024);
    let mut all: Vec<_> = (0..90).map(|_| front.connect()).collect();
    all.iter_mut().for_each(assert_echoes);
    proxy.signal(if end == End::Stopped { Signal::TERM } else { Signal::KILL });
    proxy.wait();
    for descriptors in [100, 150] {
        let mut proxy = launch(descriptors);
        assert_eq!(proxy.wait().code(), Some(1));
        let stderr = proxy.lines.all();
        let line = format!("RLIMIT_NOFILE={descriptors} leaves no room for their");
        assert!(stderr.contains(&line) && stderr.contains("stay stored"), "{stderr}");
        assert!(!stderr.contains("closing them"), "{stderr}");
    }
    let proxy = launch(1024);
    proxy.lines.wait_for("Recovered connections: 90.");
    all.iter_mut().for_each(assert_echoes);
}

/// Buffered bytes are stored in descriptors of their own, more than the process had open.
fn stores_no_more_than_can_be_opened() {
    const CONNECTIONS: usize = 100;
    let (front, backend) = (Endpoint::new(Family::Tcp), Endpoint::new(Family::Unix));
    front.socket.set_recv_buffer_size(8192).unwrap();
    front.socket.set_send_buffer_size(8192).unwrap();
    let arguments = ["--handover=restart".into(), "-c150".into(), backend.target.clone()];
    let systemd = FakeSystemd::with_fd_store(4);
    let launch = || {
        let launch = Launch::new(OURS).args(&arguments).listener(&front);
        launch.descriptors(300).stored_by(&systemd).start()
    };
    let mut proxy = launch();
    let mut all: Vec<_> = (0..CONNECTIONS).map(|_| (front.connect(), backend.accept())).collect();
    for (client, served) in &mut all {
        for socket in [client, served] {
            socket.set_write_timeout(Some(Duration::from_millis(20))).unwrap();
            while socket.write(&[0; 16 * 1024]).is_ok() {}
        }
    }
    proxy.signal(Signal::TERM);
    assert!(proxy.wait().success());
    proxy.lines.wait_for("Failed to store open connections, resetting them: ");
    let proxy = launch();
    proxy.lines.wait_for("Recovered connections: ");
    drop(all);
    let (mut client, mut served) = (front.connect(), backend.accept());
    assert_forwards(&mut client, &mut served);
}

fn full_store() {
    let (front, backend) = (Endpoint::new(Family::Tcp), Endpoint::new(Family::Unix));
    let systemd = systemd_with_queue(2304);
    let arguments = ["--handover=crash".into(), backend.target.clone()];
    let proxy = launch(&front, &arguments, &systemd);
    systemd.wait_for("READY=1");
    let mut all: Vec<_> = (0..100).map(|_| established(&front, &backend)).collect();
    all.iter_mut().for_each(|(client, served)| assert_forwards(served, client));
    assert_eq!(proxy.lines.count("the descriptor store is full"), 1);
    proxy.signal(Signal::KILL);
    drop(proxy);
    let entry = stored(&systemd);
    assert!((1..60).contains(&entry), "{entry}");
    let _proxy = launch(&front, &arguments, &systemd);
    systemd.wait_for("READY=1");
    let mut live = 0;
    for (mut client, mut served) in all {
        let mut answer = [0];
        let is_live = served.write_all(b"?").is_ok() && matches!(client.read(&mut answer), Ok(1));
        live += usize::from(is_live);
    }
    assert_eq!(live, entry);
}

fn restored_connections_count(Mode { handover, end }: Mode, overflow: &str) {
    let (front, backend) = (Endpoint::new(Family::Tcp), Endpoint::new(Family::Unix));
    let arguments = [
        &format!("--handover={handover}"),
        "--connections-max=3",
        &format!("--overflow={overflow}"),
        &backend.target,
    ];
    let mut proxy = Proxy::start(&front, &arguments);
    let mut all: Vec<_> = (0..3).map(|_| established(&front, &backend)).collect();
    proxy.arguments[1] = "--connections-max=2".into();
    proxy.replace(end);
    let mut new_client = front.connect();
    if overflow == "refuse" {
        assert_eq!(read_all(&mut new_client).0, b"");
    } else {
        new_client.write_all(b"hello").unwrap();
    }
    all.iter_mut().for_each(|(client, served)| assert_forwards(served, client));
    all.truncate(1);
    if overflow == "refuse" {
        let served = poll_until(Instant::now() + TIMEOUT, || {
            let mut client = front.connect();
            backend.socket.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
            let (mut served, _) = backend.socket.accept().ok()?;
            assert_forwards(&mut client, &mut served);
            Some(())
        });
        served.expect("there is a place again");
    } else {
        backend.accept().read_exact(&mut [0; 5]).expect("the new client");
    }
}

fn store_does_not_leak(Mode { handover, end }: Mode) {
    let (front, backend) = (Endpoint::new(Family::Tcp), echo_backend(Family::Tcp));
    let handover = format!("--handover={handover}");
    let mut proxy = Proxy::start(&front, &[&handover, "--connections-max=300", &backend.target]);
    let mut idle: Vec<_> = (0..100).map(|_| front.connect()).collect();
    idle.iter_mut().for_each(assert_echoes);
    let mut held = Vec::new();
    for _ in 0..8 {
        for _ in 0..100 {
            assert_echoes(&mut front.connect());
        }
        proxy.stop(end);
        // Twice the open connections, and those that were closing at the end.
        let payloads = queue(&proxy.systemd).payloads().unwrap();
        let records: usize = payloads.iter().map(|text| record_ids(text).unwrap().len()).sum();
        assert!(records <= 2 * 200 + 32, "{records} records");
        proxy.running = launch(&front, &proxy.arguments, &proxy.systemd);
        proxy.systemd.wait_for("READY=1");
        idle.iter_mut().for_each(assert_echoes);
        held.push(proxy.running.descriptors());
    }
    // The last short connections may still be closing.
    let [first, last] = [held[1], held[7]];
    assert!(last <= first + 12, "{held:?}");
}
