//! DIAGNOSTICS of the manual: each message that tells why a connection was refused or cut is provoked, and
//! compared with what the manual says.

use std::fs;
use std::time::Duration;

use crate::support::*;
use rustix::process::{Pid, Signal, kill_process};
use socket2::Socket;
use tempfile::TempDir;

/// Provokes a message, and has the log of the proxy checked.
type Cause = fn(check: &dyn Fn(&Lines));

/// In the order of the manual.
const CAUSES: [Cause; 18] = [
    connection_limit,
    source_limit,
    passive_client,
    no_backend,
    backend_wait_over,
    idle,
    stop,
    drain_over,
    out_of_descriptors,
    command_ended,
    start_failed,
    stopped_nothing,
    not_ready,
    command_without_ready,
    command_without_listener,
    handed_over,
    reset_by_client,
    reset_by_backend,
];

#[test]
fn messages_are_those_of_the_manual() {
    let messages = messages_of_the_manual();
    assert_eq!(messages.len(), CAUSES.len(), "{messages:#?}");
    for (message, cause) in messages.iter().zip(CAUSES) {
        cause(&|lines| {
            lines.wait_for_line(&message.join("..."), |line| has_form(message, line));
        });
    }
}

fn connection_limit(check: &dyn Fn(&Lines)) {
    limit_of_one("--connections-max=1", check);
}

fn source_limit(check: &dyn Fn(&Lines)) {
    limit_of_one("--connections-max-per-source=1", check);
}

fn passive_client(check: &dyn Fn(&Lines)) {
    let options = ["--passive-from=127.0.0.0/8", "--backend-wait=1min", &free_address()];
    let (proxy, mut client) = serve_one(&options);
    assert_eq!(read_all(&mut client).0, b"");
    check(&proxy.lines);
}

fn limit_of_one(option: &str, check: &dyn Fn(&Lines)) {
    let (front, backend) = (Endpoint::new(Family::Tcp), echo_backend(Family::Tcp));
    let proxy = Launch::new(OURS).args([option, &backend.target]).listener(&front).start();
    let mut first = front.connect();
    assert_echoes(&mut first);
    assert_eq!(read_all(&mut front.connect()).0, b"");
    check(&proxy.lines);
}

fn no_backend(check: &dyn Fn(&Lines)) {
    let (proxy, mut client) = serve_one(&[&free_address()]);
    assert_eq!(read_all(&mut client).0, b"");
    check(&proxy.lines);
}

fn backend_wait_over(check: &dyn Fn(&Lines)) {
    let (proxy, mut client) = serve_one(&["--backend-wait=300ms", &free_address()]);
    assert_eq!(read_all(&mut client).0, b"");
    check(&proxy.lines);
}

fn idle(check: &dyn Fn(&Lines)) {
    let backend = echo_backend(Family::Tcp);
    let (proxy, mut client) = serve_one(&["--connection-idle-time=200ms", &backend.target]);
    assert!(is_reset(&read_all(&mut client).1));
    check(&proxy.lines);
}

fn stop(check: &dyn Fn(&Lines)) {
    stop_with_open_connection(&[], check);
}

fn drain_over(check: &dyn Fn(&Lines)) {
    stop_with_open_connection(&["--drain-time=200ms"], check);
}

fn handed_over(check: &dyn Fn(&Lines)) {
    let (front, backend) = (Endpoint::new(Family::Tcp), echo_backend(Family::Tcp));
    let systemd = FakeSystemd::with_fd_store(4);
    let launch = Launch::new(OURS).args(["--handover=restart", &backend.target]);
    let proxy = launch.listener(&front).stored_by(&systemd).start();
    systemd.wait_for("READY=1");
    assert_echoes(&mut front.connect());
    let mut client = front.connect();
    assert_echoes(&mut client);
    proxy.signal(Signal::TERM);
    check(&proxy.lines);
}

fn stop_with_open_connection(args: &[&str], check: &dyn Fn(&Lines)) {
    let backend = echo_backend(Family::Tcp);
    let (proxy, mut client) = serve_one(&[args, &[&backend.target]].concat());
    assert_echoes(&mut client);
    proxy.signal(Signal::TERM);
    assert!(is_reset(&read_all(&mut client).1));
    check(&proxy.lines);
}

fn out_of_descriptors(check: &dyn Fn(&Lines)) {
    let (front, backend) = (Endpoint::new(Family::Tcp), echo_backend(Family::Tcp));
    let launch = Launch::new(OURS).arg(&backend.target).descriptors(40);
    let proxy = launch.listener(&front).start();
    let _clients: Vec<_> = (0..60).map(|_| front.connect()).collect();
    check(&proxy.lines);
}

fn command_ended(check: &dyn Fn(&Lines)) {
    let (directory, target) = (TempDir::new().unwrap(), free_address());
    let log = directory.path().join("log");
    let (_, port) = target.rsplit_once(':').unwrap();
    let (proxy, mut client) = serve_one(&[&target, "--", "perl", APP, port, log.to_str().unwrap()]);
    proxy.lines.wait_for("perl is ready");
    // Earlier, its end would count as a failed start.
    pause(Duration::from_millis(1100));
    let started = fs::read_to_string(&log).unwrap();
    let pid = started.trim().strip_prefix("started ").unwrap().parse().unwrap();
    kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL).unwrap();
    let _ = read_all(&mut client);
    check(&proxy.lines);
}

fn start_failed(check: &dyn Fn(&Lines)) {
    let (proxy, _client) = serve_one(&["--start-command=false", &free_address()]);
    check(&proxy.lines);
}

fn stopped_nothing(check: &dyn Fn(&Lines)) {
    let backend = echo_backend(Family::Tcp);
    let options = ["--start-command=true", "--stop-command=true", "--stop-idle-time=100ms"];
    let (proxy, client) = serve_one(&[&options[..], &[&backend.target]].concat());
    drop(client);
    check(&proxy.lines);
}

fn not_ready(check: &dyn Fn(&Lines)) {
    let args = ["--backend-wait=300ms", "--ready=exec:false", &free_address()];
    let (proxy, mut client) = serve_one(&args);
    assert_eq!(read_all(&mut client).0, b"");
    check(&proxy.lines);
}

fn command_without_ready(check: &dyn Fn(&Lines)) {
    command_never_ready("--ready=notify", check);
}

fn command_without_listener(check: &dyn Fn(&Lines)) {
    command_never_ready("--ready=connect", check);
}

fn command_never_ready(ready: &str, check: &dyn Fn(&Lines)) {
    let target = free_address();
    let args = ["--backend-wait=500ms", ready, &target, "--", "sleep", "60"];
    let (proxy, mut client) = serve_one(&args);
    assert_eq!(read_all(&mut client).0, b"");
    check(&proxy.lines);
}

fn reset_by_client(check: &dyn Fn(&Lines)) {
    reset_by(|client, _| reset(client), check);
}

fn reset_by_backend(check: &dyn Fn(&Lines)) {
    reset_by(|_, served| reset(served), check);
}

fn reset_by(side: impl FnOnce(Socket, Socket), check: &dyn Fn(&Lines)) {
    let backend = Endpoint::new(Family::Tcp);
    let (proxy, client) = serve_one(&["--log-level=debug", &backend.target]);
    let served = backend.accept();
    proxy.lines.wait_for("Connection established");
    side(client, served);
    check(&proxy.lines);
}

/// Starts a proxy with these arguments, and connects a client.
fn serve_one(args: &[&str]) -> (Running, Socket) {
    let front = Endpoint::new(Family::Tcp);
    let proxy = Launch::new(OURS).args(args).listener(&front).start();
    let client = front.connect();
    (proxy, client)
}

fn free_address() -> String {
    format!("127.0.0.1:{}", free_port())
}

/// Whether a line has the pieces of a message in their order, and else only what the placeholders stand for.
fn has_form(message: &[String], line: &str) -> bool {
    let [first, middle @ .., last] = message else { return *line == message.concat() };
    let Some(mut rest) = line.strip_prefix(&**first) else { return false };
    for piece in middle {
        match rest.split_once(&**piece) {
            Some((_, behind)) => rest = behind,
            None => return false,
        }
    }
    rest.ends_with(&**last)
}

/// The messages under DIAGNOSTICS, split at their placeholders.
fn messages_of_the_manual() -> Vec<Vec<String>> {
    let manual = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/man/socket-proxyd.8"));
    let manual = manual.unwrap().replace("\\\n", "").replace("\\-", "-");
    let (_, section) = manual.split_once("\n.SS Connections that are refused or cut\n").unwrap();
    let (section, _) = section.split_once("\n.SS ").unwrap();
    let messages = section.split("\n.TP\n").skip(1).map(|entry| entry.lines().next().unwrap());
    let pieces = |message: &str| -> Vec<String> {
        let mut pieces = message.split("\\fI");
        let first = pieces.next().unwrap().to_string();
        let others = pieces.map(|piece| piece.split_once("\\fR").unwrap().1.to_string());
        std::iter::once(first).chain(others).collect()
    };
    messages.map(pieces).collect()
}
