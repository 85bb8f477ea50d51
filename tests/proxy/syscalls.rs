//! What each steady state costs in system calls, as the theory of operation in src/forward/mod.rs says.
//!
//! Needs strace(1) and the right to use it; says so when it is skipped.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use crate::support::*;
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use tokio::time::Instant;

const STRACE: &str = "/usr/bin/strace";

/// The system calls that a process makes during `work`, counted; `None` without strace.
fn counted(process: u32, work: impl FnOnce()) -> Option<BTreeMap<String, usize>> {
    let mut counts = BTreeMap::new();
    for name in traced(process, work)? {
        *counts.entry(name).or_insert(0) += 1;
    }
    Some(counts)
}

/// The names of the system calls that a process makes during `work`, in order; `None` without strace.
fn traced(process: u32, work: impl FnOnce()) -> Option<Vec<String>> {
    if cfg!(target_env = "musl") {
        skip("system calls", "glibc: musl waits by epoll_pwait, and returns memory by munmap");
        return None;
    }
    let directory = TempDir::new().unwrap();
    let log = directory.path().join("log");
    let mut strace = Command::new(STRACE);
    strace.args(["-f", "-o"]).arg(&log).args(["-p", &process.to_string()]);
    let Ok(mut strace) = strace.stderr(Stdio::piped()).spawn() else {
        skip("system calls", "strace");
        return None;
    };
    let mut printed = String::new();
    let mut stderr = BufReader::new(strace.stderr.take().unwrap());
    while !printed.contains("attached") {
        let bytes = stderr.read_line(&mut printed).unwrap();
        assert!(bytes > 0, "strace can't attach: {printed}");
    }
    work();
    kill_process(Pid::from_child(&strace), Signal::INT).unwrap();
    strace.wait().unwrap();
    let log = fs::read_to_string(log).unwrap();
    // "123 name(arguments) = result"; what was interrupted by the attaching has no name.
    let name = |line: &str| {
        let (name, _) = line.split_once(' ')?.1.trim().split_once('(')?;
        let is_name = name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_');
        is_name.then(|| name.to_string())
    };
    Some(log.lines().filter_map(name).collect())
}

fn take(counts: &mut BTreeMap<String, usize>, names: &[&str]) -> usize {
    names.iter().filter_map(|name| counts.remove(*name)).sum()
}

#[test]
fn queued_client_comes_before_notifications() {
    let _turn = measuring();
    if !Path::new(STRACE).exists() {
        return skip("system calls", "strace");
    }
    let directory = TempDir::new().unwrap();
    let log = directory.path().join("log");
    for (front, back) in PAIRS {
        let (front, backend, systemd) =
            (Endpoint::new(front), echo_backend(back), FakeSystemd::new());
        let mut client = front.connect();
        // The tracer is the child here, so that LISTEN_PID= stays true.
        let launch = Launch::new(STRACE).args(["-D", "-f", "-o"]).arg(log.display());
        let launch = launch.args([OURS, &backend.target]).listener(&front);
        let launch = launch.notify(&systemd);
        let mut proxy = launch.env("WATCHDOG_USEC", 20_000_000).start();
        assert_echoes(&mut client);
        systemd.wait_for("WATCHDOG=1");
        proxy.signal(Signal::TERM);
        assert!(proxy.wait().success());
        let traced = || {
            let log = fs::read_to_string(&log).unwrap();
            log.contains("+++ exited with 0").then_some(log)
        };
        let log = poll_until(Instant::now() + TIMEOUT, traced).expect("the trace is written");
        let at = |text: &str| log.find(text).unwrap_or_else(|| panic!("{text}: {log}"));
        let connected =
            log[at(" accept4(")..].find(" connect(").expect("it connects") + at(" accept4(");
        assert!(connected < at("READY=1") && at("READY=1") < at("WATCHDOG=1"), "{log}");
    }
}

#[test]
fn round_trip_is_two_receives_and_two_sends() {
    const TIMES: usize = 200;
    let _turn = measuring();
    let options = ["--connection-idle-time=infinity", "--connection-idle-time=1s"];
    for (front, back, option) in
        PAIRS.into_iter().flat_map(|(front, back)| options.map(|option| (front, back, option)))
    {
        let (front, backend) = (Endpoint::new(front), echo_backend(back));
        let launch = Launch::new(OURS).args([option, &backend.target]);
        let proxy = launch.listener(&front).start();
        let mut client = front.connect();
        let message = random_bytes(1, 64);
        let mut ask =
            |times| (0..times).for_each(|_| drop(exchange(&mut client, &message).unwrap()));
        ask(10);
        let start = Instant::now();
        let Some(mut counts) = counted(proxy.pid(), || ask(TIMES)) else { return };
        // The timer for idle connections wakes the event loop four times in the idle time.
        let visits = (4.0 * start.elapsed().as_secs_f64()) as usize + 1;
        let wakes = take(&mut counts, &["write"]);
        let wakes_max = if option == "--connection-idle-time=1s" { visits } else { 0 };
        assert!(wakes <= wakes_max, "{wakes} wakes of the event loop, {option}");
        assert_eq!(take(&mut counts, &["recvfrom", "recvmsg"]), 2 * TIMES, "{counts:?}");
        assert_eq!(take(&mut counts, &["sendto"]), 2 * TIMES, "{counts:?}");
        let waits = take(&mut counts, &["epoll_wait", "restart_syscall"]);
        // One for each of the two sockets, and some that were interrupted by the tracing.
        assert!(waits <= 3 * TIMES, "{waits} waits for {TIMES} round trips");
        assert_eq!(counts, BTreeMap::new(), "and nothing else");
    }
}

#[test]
fn short_connection_has_a_fixed_list_of_calls() {
    const TIMES: usize = 50;
    let _turn = measuring();
    for (front_family, back) in PAIRS {
        let front = Endpoint::new(front_family);
        let backend = match back {
            Family::Tcp => Endpoint::tcp(&format!("127.0.0.1:{}", port_of_servers()), 4096),
            Family::Unix => Endpoint::new(back),
        };
        serve(&backend, echo);
        let proxy = Launch::new(OURS).arg(&backend.target).listener(&front).start();
        // First what is done only once: a timer, the buffers.
        let mut client = front.connect();
        assert_echoes(&mut client);
        let idle = proxy.descriptors() - 2;
        drop(client);
        let work = |times| {
            (0..times).for_each(|_| assert_echoes(&mut front.connect()));
            let over = || (proxy.descriptors() == idle).then_some(());
            poll_until(Instant::now() + TIMEOUT, over).expect("all connections are over");
        };
        work(1);
        let Some(mut counts) = counted(proxy.pid(), || work(TIMES)) else { return };
        let is_tcp = usize::from(back == Family::Tcp);
        // The last close may be under way.
        let mut per_connection = |names: &[&str], times: usize| {
            let count = take(&mut counts, names);
            let (least, most) = (times * (TIMES - 1), times * (TIMES + 1));
            assert!((least..=most).contains(&count), "{names:?}: {count} in {TIMES} connections");
        };
        // The second one finds that no other client waits.
        per_connection(&["accept4", "accept"], 2);
        per_connection(&["socket"], 1);
        per_connection(&["connect"], 1);
        // TCP_NODELAY and SO_OOBINLINE; a TCP client's are inherited, a Unix socket has the second.
        let of_unix = [front_family, back].into_iter().filter(|it| *it == Family::Unix).count();
        per_connection(&["setsockopt"], 2 * is_tcp + of_unix);
        // Its port is none that connect(2) picks, so it has not connected to itself.
        per_connection(&["getsockname"], 0);
        per_connection(&["epoll_ctl"], 4);
        per_connection(&["sendto"], 2);
        per_connection(&["shutdown"], 1);
        per_connection(&["close"], 2);
        if cfg!(debug_assertions) {
            // std looks whether a descriptor is open before it closes it.
            per_connection(&["fcntl"], 2);
        }
        // The bytes and the end of each side, and one too early at most.
        let receives = take(&mut counts, &["recvfrom", "recvmsg"]);
        assert!(receives <= 5 * (TIMES + 1), "{receives} receives in {TIMES} connections");
        let waits = take(&mut counts, &["epoll_wait", "restart_syscall"]);
        assert!(waits <= 12 * (TIMES + 1), "{waits} waits in {TIMES} connections");
        if front_family == Family::Unix {
            // One that has closed is gone altogether; whether its last bytes have arrived at the
            // backend is asked, again after a millisecond where they have not (SIOCOUTQ, a timer).
            let asked = take(&mut counts, &["ioctl", "write", "poll", "ppoll"]);
            assert!(asked <= 10 * TIMES, "{asked} times asked in {TIMES} connections");
        }
        let rest: usize = counts.values().sum();
        assert!(rest <= 8, "and nothing else, but for a timer: {counts:?}");
    }
}

/// A free port that connect(2) does not pick by default.
fn port_of_servers() -> u16 {
    let is_free = |port: &u16| std::net::TcpListener::bind(("127.0.0.1", *port)).is_ok();
    (20_000..30_000).find(is_free).unwrap()
}

#[test]
fn bulk_is_spliced() {
    const BYTES: usize = 256 * 1024 * 1024;
    let _turn = busy();
    // A few clients that read nothing cost the others nothing.
    for (back, stalled) in [(Family::Tcp, 0), (Family::Unix, 0), (Family::Tcp, 20)] {
        let (front, backend) = (Endpoint::new(Family::Tcp), Endpoint::new(back));
        let proxy = Launch::new(OURS).arg(&backend.target).listener(&front).start();
        let _stalled: Vec<_> = (0..stalled)
            .map(|_| {
                let (mut client, served) = (front.connect(), backend.accept());
                client.set_write_timeout(Some(Duration::from_millis(100))).unwrap();
                while client.write(&[0; 64 * 1024]).is_ok() {}
                (client, served)
            })
            .collect();
        let (mut client, mut taken) = (front.connect(), backend.accept());
        let message = random_bytes(2, 1024 * 1024);
        let mut carry = |bytes: usize| {
            thread::scope(|scope| {
                scope.spawn(|| {
                    (0..bytes / message.len()).for_each(|_| client.write_all(&message).unwrap());
                });
                let (mut buffer, mut left) = (vec![0; 1024 * 1024], bytes);
                while left > 0 {
                    let bytes = taken.read(&mut buffer).unwrap();
                    assert!(bytes > 0, "the proxy has ended it");
                    left -= bytes;
                }
            });
        };
        // After this it is known to be bulk, and has its pipe.
        carry(BYTES / 8);
        let Some(mut counts) = counted(proxy.pid(), || carry(BYTES)) else { return };
        let splices = take(&mut counts, &["splice"]);
        // Two for each step, and the ones that find nothing or no room.
        assert!(BYTES / splices > 32 * 1024, "{splices} for {BYTES} bytes");
        let received = take(&mut counts, &["recvfrom", "recvmsg"]);
        assert!(received * 64 * 1024 < BYTES / 8, "{received} pieces were copied");
    }
}

#[test]
fn a_queue_of_clients_is_accepted_in_small_turns() {
    const CLIENTS: usize = 200;
    for (front, back) in PAIRS {
        let (front, backend) = (Endpoint::new(front), echo_backend(back));
        let proxy = Launch::new(OURS).arg(&backend.target).listener(&front).start();
        let mut client = front.connect();
        assert_echoes(&mut client);
        let names = traced(proxy.pid(), || {
            proxy.suspend();
            let _queued: Vec<_> = (0..CLIENTS).map(|_| front.connect()).collect();
            client.write_all(b"a message").unwrap();
            proxy.signal(Signal::CONT);
            client.read_exact(&mut [0; 9]).unwrap();
        });
        let Some(names) = names else { return };
        // The queued clients send nothing: the first bytes sent are the message.
        let before = names.iter().take_while(|name| *name != "sendto");
        let accepted = before.filter(|name| *name == "accept4").count();
        assert!(accepted <= 16, "{accepted} clients come before a message");
    }
}

#[test]
fn held_clients_are_released_in_small_turns() {
    const CLIENTS: usize = 200;
    for front in [Family::Tcp, Family::Unix] {
        let (front, directory) = (Endpoint::new(front), TempDir::new().unwrap());
        let path = directory.path().join("backend");
        let target = path.display().to_string();
        let launch = Launch::new(OURS).args(["--backend-wait=1min", &target]).listener(&front);
        let systemd = FakeSystemd::new();
        let proxy = launch.env("NOTIFY_SOCKET", systemd.path.display()).start();
        let _held: Vec<_> = (0..CLIENTS).map(|_| front.connect()).collect();
        systemd.wait_for(&format!("STATUS={CLIENTS} of 256 connections"));
        let names = traced(proxy.pid(), || {
            let backend = UnixListener::bind(&path).unwrap();
            (0..CLIENTS).for_each(|_| drop(backend.accept().unwrap()));
        });
        let Some(names) = names else { return };
        let rounds = names.split(|name| name.contains("wait"));
        let released = |calls: &[String]| calls.iter().filter(|name| *name == "connect").count();
        let most = rounds.map(released).max().unwrap();
        assert!(most <= 16, "{most} clients are released at a time");
    }
}
