//! --passive-from=: clients that are served while the backend is up, and start and postpone nothing.

use std::fs;
use std::time::Duration;

use rustix::process::Pid;
use socket2::Socket;
use tempfile::TempDir;
use tokio::time::Instant;

use crate::application::{Service, pid, wait_for_end};
use crate::support::*;

/// The address of passive clients.
const MONITOR: &str = "127.0.0.9";

const OPTION: &str = "--passive-from=192.0.2.0/24,127.0.0.9";

fn monitor(service: &Service) -> Socket {
    connect_from(MONITOR, &service.front)
}

fn is_refused(client: &mut Socket) {
    let (bytes, end) = read_all(client);
    assert!(bytes.is_empty() && !is_reset(&end), "{end:?}");
}

fn served(client: &mut Socket) -> Pid {
    pid(client)
}

#[test]
fn passive_client_starts_nothing_and_postpones_nothing() {
    for family in [Family::Tcp, Family::Unix] {
        let options = [OPTION, "--stop-idle-time=1s"];
        let service = Service::start(family, &options, &[]);
        is_refused(&mut monitor(&service));
        assert_eq!(service.logged_pids("started"), [], "it starts nothing");

        let mut client = service.connect();
        let app = served(&mut client);
        let mut first = monitor(&service);
        assert_eq!(served(&mut first), app, "it is served while COMMAND runs");
        drop(client);
        let left = Instant::now();
        // An open connection, and further ones.
        while left.elapsed() < Duration::from_millis(700) {
            assert_eq!(served(&mut monitor(&service)), app);
        }
        wait_for_end(app);
        let idle = left.elapsed();
        assert!(idle > Duration::from_millis(900) && idle < Duration::from_secs(3), "{idle:?}");
        assert!(is_reset(&read_all(&mut first).1), "what is not in use is reset");
        is_refused(&mut monitor(&service));
        assert_eq!(service.logged_pids("started"), [app]);
        service.proxy.lines.wait_for("Backend is not ready, refusing passive client");
        assert_ne!(service.pid(), app);
    }
}

#[test]
fn passive_client_thaws_nothing() {
    let options = [OPTION, "--freeze-idle-time=300ms", "--threads=2"];
    let service = Service::start(Family::Tcp, &options, &[]);
    let app = service.pid();
    let mut monitors = [monitor(&service), monitor(&service), monitor(&service)];
    for monitor in &mut monitors {
        assert_eq!(served(monitor), app);
    }
    service.proxy.lines.wait_for("Freezing perl, no connection for 300ms.");
    for monitor in &mut monitors {
        assert!(is_reset(&read_all(monitor).1));
    }
    is_refused(&mut monitor(&service));
    assert_eq!(service.proxy.lines.count("Thawing"), 0);
    assert_eq!(service.pid(), app);
}

#[test]
fn passive_client_is_held_while_another_has_command_start() {
    let service = Service::start(Family::Tcp, &[OPTION], &["up=1"]);
    let mut client = service.connect();
    service.wait_for_pid("started");
    let mut monitor = monitor(&service);
    assert_eq!(served(&mut monitor), served(&mut client));
}

#[test]
fn passive_client_is_served_after_the_client_that_started_command_has_left() {
    let options = [OPTION, "--backend-wait=20s", "--log-level=debug"];
    let service = Service::start(Family::Tcp, &options, &["up=2"]);
    let client = service.connect();
    let app = service.wait_for_pid("started");
    // A FIN alone would leave it waiting.
    reset(client);
    service.proxy.lines.wait_for("Connection ended by the client before it had a backend");
    assert_eq!(served(&mut monitor(&service)), app);
}

#[test]
fn passive_client_has_the_backend_probed() {
    let (front, backend) = (Endpoint::new(Family::Tcp), echo_backend(Family::Tcp));
    let args = [OPTION, "--backend-wait=5s", "--ready=exec:true", &backend.target];
    let _proxy = Launch::new(OURS).listener(&front).args(args).start();
    assert_echoes(&mut connect_from(MONITOR, &front.address));
}

#[test]
fn passive_clients_cause_one_probe_at_a_time() {
    let (front, backend) = (Endpoint::new(Family::Tcp), echo_backend(Family::Tcp));
    let directory = TempDir::new().unwrap();
    let probes = directory.path().join("probes");
    let probe = format!("--ready=exec:sh -c 'echo >> {}; exit 1'", probes.display());
    let args = [OPTION, "--backend-wait=20s", &probe, &backend.target];
    let _proxy = Launch::new(OURS).listener(&front).args(args).start();
    let mut clients: Vec<_> = (0..50).map(|_| connect_from(MONITOR, &front.address)).collect();
    assert!(clients.iter_mut().all(|client| read_all(client).0.is_empty()));
    let probes = fs::read(&probes).unwrap().len();
    assert!(probes <= 10, "{probes} probes for 50 clients");
}

#[test]
fn passive_client_does_not_postpone_the_idle_exit() {
    let (front, backend) = (Endpoint::new(Family::Tcp), echo_backend(Family::Tcp));
    let args = [OPTION, "--exit-idle-time=1s", &backend.target];
    let mut proxy = Launch::new(OURS).listener(&front).args(args).start();
    let mut monitor = connect_from(MONITOR, &front.address);
    assert_echoes(&mut monitor);
    assert_eq!(proxy.wait().code(), Some(0));
    assert!(is_reset(&read_all(&mut monitor).1));
}

#[test]
fn passive_client_of_a_backend_that_is_down_is_refused() {
    let (front, gone) = (Endpoint::new(Family::Tcp), format!("127.0.0.1:{}", free_port()));
    let args = [OPTION, "--backend-wait=1min", &gone];
    let proxy = Launch::new(OURS).listener(&front).args(args).start();
    is_refused(&mut connect_from(MONITOR, &front.address));
    // While another client waits, a passive one waits as well.
    let mut client = front.connect();
    proxy.lines.wait_for("holding clients");
    let mut monitor = connect_from(MONITOR, &front.address);
    let backend = Endpoint::tcp(&gone, 16);
    serve(&backend, echo);
    assert_echoes(&mut client);
    assert_echoes(&mut monitor);
}

#[test]
fn passive_clients_do_not_keep_each_other_waiting() {
    let (front, gone) = (Endpoint::new(Family::Tcp), format!("127.0.0.1:{}", free_port()));
    let args = [OPTION, "--backend-wait=infinity", &gone];
    let proxy = Launch::new(OURS).listener(&front).args(args).start();
    let client = front.connect();
    proxy.lines.wait_for("holding clients");
    let mut monitors = [(); 2].map(|()| connect_from(MONITOR, &front.address));
    // The client that kept the prober running leaves by a reset.
    client.set_linger(Some(Duration::ZERO)).unwrap();
    drop(client);
    monitors.iter_mut().for_each(is_refused);
    is_refused(&mut connect_from(MONITOR, &front.address));
    proxy.lines.wait_for("Backend is not ready, refusing passive client");
}

#[test]
fn unix_clients_can_be_passive_and_count_for_the_limit() {
    let (front, backend) = (Endpoint::new(Family::Unix), echo_backend(Family::Tcp));
    let args = ["--passive-from=unix", "--exit-idle-time=500ms", "-c1", &backend.target];
    let mut proxy = Launch::new(OURS).listener(&front).args(args).start();
    let mut client = front.connect();
    assert_echoes(&mut client);
    is_refused(&mut front.connect());
    assert_eq!(proxy.wait().code(), Some(0));
}
