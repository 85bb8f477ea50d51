//! Units that were written for systemd-socket-proxyd, the journal, names.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, UdpSocket};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use crate::IN_ITS_PLACE;
use crate::container::{Container, Suite, Test};
use crate::support::*;
use socket2::Socket;
use tokio::time::Instant;

pub(crate) fn register(suite: &Arc<Suite>, trials: &mut Trials) {
    if let Some(missing) = Container::missing() {
        return trials.skip("systemd: drop-in for systemd-socket-proxyd", missing);
    }
    let tests: [Test; 11] = [
        ("time spans mean what systemd-analyze says", time_spans),
        ("runs a unit written for systemd-socket-proxyd", drop_in),
        ("a stop waits for connections to end", drain),
        ("serves one connection a process with Accept=yes", accepted),
        ("journal entries have fields", journal),
        ("accepts a service name as a port", service_name),
        ("a slow resolver delays only its own connection", slow_resolver),
        ("waits for one address while the other's family is missing", missing_family),
        ("does not spin when accept4(2) is forbidden", forbidden_accept),
        ("does not hold clients when connect(2) is forbidden", forbidden_connect),
        ("does not connect to itself", self_connection),
    ];
    for (name, test) in tests {
        suite.beside(trials, name, test);
    }
}

fn time_spans(_: &Container) {
    use socket_proxyd::testing::TimeSpan;
    let numbers = ["", "5", "0", "007", "+12", "99999", "1844674407370955161", "-1"];
    let fractions = ["", ".", ".5", ".0000005", ".999999999999"];
    let units = ["", "s", " sec", "ms", "us", "m", " min", "h", "d", "w", "M", "y", "months", "ns"];
    let tails = ["", " 3s", "4", " infinity", ".5"];
    let dice = random_bytes(9, 4 * 400);
    let drawn = dice.chunks(4).map(|die| {
        let pick = |words: &[&'static str], at: usize| words[usize::from(die[at]) % words.len()];
        [pick(&numbers, 0), pick(&fractions, 1), pick(&units, 2), pick(&tails, 3)].concat()
    });
    let chosen =
        [" infinity ", "infinity", "584541y", "584542y", "5 .5", "12.34.56", "", " ", "5mins"];
    for text in chosen.into_iter().map(String::from).chain(drawn) {
        let output = Command::new("systemd-analyze").args(["timespan", "--", &text]).output();
        let output = output.unwrap();
        // "Original: ...", then "      μs: 5000000"; the largest number is infinity.
        let stdout = String::from_utf8(output.stdout).unwrap();
        let systemds = output.status.success().then(|| {
            let micros = stdout.lines().find_map(|line| line.trim().strip_prefix("μs: "));
            micros.unwrap().parse::<u64>().unwrap()
        });
        let ours = text.parse::<TimeSpan>().ok().map(|span| {
            span.finite().map_or(u64::MAX, |span| u64::try_from(span.as_micros()).unwrap())
        });
        assert_eq!(ours, systemds, "{text:?}");
    }
}

fn drop_in(container: &Container) {
    const FRONT: u16 = 7100;
    let front = SocketAddr::from(([127, 0, 0, 1], FRONT));
    let backend = container.inside(|| {
        let backend = Endpoint::tcp("127.0.0.1:7101", 16);
        serve(&backend, echo);
        backend
    });
    container.start_units(&[
        (
            "drop-in.service",
            &format!(
                "[Unit]\nRequires=drop-in.socket\nAfter=drop-in.socket\n\
                 [Service]\nType=notify\nDynamicUser=yes\nPrivateTmp=yes\n\
                 SystemCallFilter=@system-service\n\
                 ExecStart={IN_ITS_PLACE} --connections-max=1 --exit-idle-time=1s {}\n",
                backend.target
            ),
        ),
        ("drop-in.socket", &format!("[Socket]\nListenStream={front}\n")),
    ]);
    let connect = || container.inside(|| connect(&front.into()));

    let mut first = connect();
    assert_echoes(&mut first);
    let message = random_bytes(1, 64 * 1024);
    assert!(exchange(&mut first, &message).unwrap() == message);
    let service = container.show("drop-in.service");
    assert_eq!(service["ActiveState"], "active", "Type=notify: READY=1 came");
    let process = service["MainPID"].clone();
    let user: u32 = service["UID"].parse().unwrap();
    assert!((61_184..=65_519).contains(&user), "DynamicUser= gives one of those, not {user}");
    container.wait_for("drop-in.service", "StatusText", "1 of 1 connections, 0 served, 128.0 KiB");

    let mut second = connect();
    let refused = exchange(&mut second, b"me too?").expect_err("served above the limit of 1");
    assert_ne!(refused.kind(), ErrorKind::WouldBlock, "left to wait above the limit of 1");
    drop(first);
    let deadline = Instant::now() + TIMEOUT;
    let served = poll_until(deadline, || exchange(&mut connect(), b"now?").ok());
    served.expect("served once the first has left");

    container.wait_for("drop-in.service", "ActiveState", "inactive");
    let service = container.show("drop-in.service");
    assert_eq!((&*service["Result"], &*service["ExecMainStatus"]), ("success", "0"));
    container.wait_for("drop-in.socket", "SubState", "listening");
    assert_echoes(&mut connect());
    let again = container.show("drop-in.service");
    assert_ne!(again["MainPID"], process, "another process");
    container.run(&["systemctl", "stop", "drop-in.socket", "drop-in.service"]);
    assert_eq!(container.show("drop-in.service")["Result"], "success");
}

fn drain(container: &Container) {
    const BYTES: usize = 50_000_000;
    let front = SocketAddr::from(([127, 0, 0, 1], 7900));
    let backend = container.inside(|| Endpoint::tcp("127.0.0.1:7901", 16));
    container.start_units(&[
        (
            "drain.service",
            &format!(
                "[Service]\nType=notify\nDynamicUser=yes\nTimeoutStopSec=2s\nWatchdogSec=2s\n\
                 ExecStart={IN_ITS_PLACE} --drain-time=1min {}\n",
                backend.target
            ),
        ),
        ("drain.socket", &format!("[Socket]\nListenStream={front}\n")),
    ]);
    let connect = || container.inside(|| connect(&front.into()));
    let mut client = connect();
    let mut served = backend.accept();
    let process = container.show("drain.service")["MainPID"].clone();
    let message = random_bytes(5, BYTES);
    let (sent, rest) = message.split_at(BYTES / 2);
    let not_reloading = container.not_reloading();
    let stopped = thread::scope(|scope| {
        let reader = scope.spawn(move || (read_all(&mut client), client));
        served.write_all(sent).unwrap();
        let stop = scope.spawn(|| container.output(&["systemctl", "stop", "drain.service"]));
        container.wait_for("drain.service", "ActiveState", "deactivating");
        let status = container.show("drain.service")["StatusText"].clone();
        let mut new_client = connect();
        new_client.write_all(b"are you there?").unwrap();
        // Twice what TimeoutStopSec= and WatchdogSec= allow.
        pause(Duration::from_secs(4));
        let later = container.show("drain.service")["StatusText"].clone();
        assert!(status.starts_with("Draining, 1 connection is left, for up to "), "{status}");
        assert_ne!(status, later, "it counts down");
        served.write_all(rest).unwrap();
        drop(served);
        let ((bytes, end), client) = reader.join().unwrap();
        end.unwrap();
        assert!(bytes == message, "{} bytes", bytes.len());
        drop(client);
        let stopped = stop.join().unwrap();
        let mut served = backend.accept();
        served.read_exact(&mut [0; 14]).expect("the new client's bytes");
        drop(new_client);
        stopped
    });
    drop(not_reloading);
    assert!(stopped.status.success(), "{stopped:?}");
    container.wait_for("drain.service", "ActiveState", "active");
    let service = container.show("drain.service");
    assert_ne!(service["MainPID"], process, "another process");
    assert_eq!((&*service["Result"], &*service["NRestarts"]), ("success", "0"));
    let journal = container.run(&["journalctl", "-u", "drain.service", "--no-pager"]);
    // systemd ignores files that the container's cgroups do not have.
    let failed =
        journal.lines().any(|it| it.contains("Failed") && !it.ends_with("No data available"));
    assert!(!journal.contains("timed out") && !failed, "{journal}");
    container.run(&["systemctl", "stop", "drain.socket", "drain.service"]);
}

fn accepted(container: &Container) {
    let backend = container.inside(|| {
        let backend = Endpoint::tcp("127.0.0.1:8001", 16);
        serve(&backend, echo);
        backend
    });
    // With StandardInput=socket alone, standard output and error are the client as well.
    for (form, port, settings) in [
        ("accept", 8002, "Type=notify\n"),
        ("inetd", 8003, "StandardInput=socket\n"),
        ("inetd-notify", 8004, "Type=notify\nStandardInput=socket\nStandardError=journal\n"),
    ] {
        let unit = |name: &str, port: u16, target: &str| {
            container.start_units(&[
                (
                    &*format!("{name}@.service"),
                    &format!(
                        "[Service]\nDynamicUser=yes\n{settings}\
                         ExecStart={IN_ITS_PLACE} --log-level=debug {target}\n"
                    ),
                ),
                (
                    &*format!("{name}.socket"),
                    &format!("[Socket]\nListenStream=127.0.0.1:{port}\nAccept=yes\n"),
                ),
            ]);
        };
        unit(form, port, &backend.target);
        let address = SocketAddr::from(([127, 0, 0, 1], port));
        let connect = |address: SocketAddr| container.inside(|| connect(&address.into()));
        let mut clients = [(); 3].map(|()| connect(address));
        clients.iter_mut().for_each(assert_echoes);
        let socket = format!("{form}.socket");
        container.wait_for(&socket, "NConnections", "3");
        for client in &mut clients {
            client.shutdown(std::net::Shutdown::Write).unwrap();
            let (bytes, end) = read_all(client);
            assert!(bytes.is_empty() && end.is_ok(), "{bytes:?} {end:?}");
        }
        container.wait_for(&socket, "NConnections", "0");

        let lost = format!("{form}-lost");
        unit(&lost, port + 10, "127.0.0.1:8009");
        let mut client = connect(SocketAddr::from(([127, 0, 0, 1], port + 10)));
        let (bytes, _) = read_all(&mut client);
        assert_eq!(bytes, b"", "the client gets no messages");
        let name = if form == "accept" { "connection" } else { "stdin" };
        // journald may look for the unit of a process when that has ended.
        let listener = format!("\"LISTENER\":\"{name} (127.0.0.1:{})\"", port + 10);
        let printed = poll_until(Instant::now() + TIMEOUT, || {
            let journal = container.run(&["journalctl", "-o", "json", "--no-pager"]);
            let mut lines = journal.lines().filter(|line| line.contains(&listener));
            lines.find(|line| line.contains("Failed to connect to remote host")).map(String::from)
        });
        let printed = printed.expect("the journal has the message");
        assert!(printed.contains("\"PRIORITY\":\"4\""), "{printed}");
        container.wait_for(&format!("{lost}.socket"), "NConnections", "0");
        let failed = ["systemctl", "list-units", "--failed", "--plain", "--no-legend"];
        let failed = container.run(&failed);
        assert!(!failed.contains(form), "{failed}");
    }
}

fn journal(container: &Container) {
    let unit = |name: &str, target: &str| {
        format!(
            "[Service]\nType=notify\nDynamicUser=yes\nSockets={name}.socket\n\
             ExecStart={IN_ITS_PLACE} --log-level=debug {target}\n"
        )
    };
    let backend = container.inside(|| {
        let backend = Endpoint::tcp("127.0.0.1:7201", 16);
        serve(&backend, echo);
        backend
    });
    container.start_units(&[
        ("good.service", &unit("good", &backend.target)),
        ("bad.service", &unit("bad", "127.0.0.1:7202")),
        ("bad.socket", "[Socket]\nListenStream=127.0.0.1:7204\nFileDescriptorName=wrong-way\n"),
        ("good.socket", "[Socket]\nListenStream=127.0.0.1:7203\nFileDescriptorName=way-in\n"),
    ]);
    container.run(&["systemctl", "start", "bad.socket"]);
    let connect = |port| {
        let address = SocketAddr::from(([127, 0, 0, 1], port));
        container.inside(|| connect(&address.into()))
    };
    let mut client = connect(7203);
    assert_echoes(&mut client);
    let name = client.local_addr().unwrap().as_socket().unwrap().to_string();
    drop(client);
    let entry = |unit: &str, message: &str| {
        let deadline = Instant::now() + TIMEOUT;
        let found = poll_until(deadline, || {
            let lines = container.run(&["journalctl", "-u", unit, "-o", "json", "--no-pager"]);
            lines.lines().find(|line| line.contains(message)).map(String::from)
        });
        found.unwrap_or_else(|| panic!("no {message:?} in the journal of {unit}"))
    };
    let closed = entry("good.service", "Connection closed");
    for field in [
        &format!("\"CLIENT\":\"{name}\""),
        "\"LISTENER\":\"way-in (127.0.0.1:7203)\"",
        "\"BACKEND\":\"127.0.0.1:7201\"",
        "\"BYTES_FROM_CLIENT\":\"14\"",
        "\"BYTES_FROM_BACKEND\":\"14\"",
        "\"DURATION_USEC\":\"",
        "\"PRIORITY\":\"7\"",
        "\"SYSLOG_IDENTIFIER\":\"socket-proxyd\"",
    ] {
        assert!(closed.contains(field), "no {field} in {closed}");
    }
    assert_eq!(read_all(&mut connect(7204)).0, b"");
    let failed = entry("bad.service", "Failed to connect to remote host");
    for field in [
        "\"PRIORITY\":\"4\"",
        "\"LISTENER\":\"wrong-way (127.0.0.1:7204)\"",
        "Connection refused (client 127.0.0.1:",
        // BACKEND_UNREACHABLE in src/logging/message_id.rs.
        "\"MESSAGE_ID\":\"0d2a00026ad2fba7e138e2f7e91c3af7\"",
    ] {
        assert!(failed.contains(field), "no {field} in {failed}");
    }

    // A kernel without vsock, or a sandbox: the connection's error, not the start's.
    container.start_units(&[
        (
            "vsock.service",
            &(unit("vsock", "vsock:3:80") + "RestrictAddressFamilies=AF_UNIX AF_INET\n"),
        ),
        ("vsock.socket", "[Socket]\nListenStream=127.0.0.1:7205\n"),
    ]);
    assert_eq!(read_all(&mut connect(7205)).0, b"");
    let failed = entry("vsock.service", "Failed to connect to remote host: vsock:3:80");
    let words = "Address family not supported by protocol (this kernel has no vsock, or ";
    assert!(failed.contains(words), "{failed}");
    assert_eq!(container.show("vsock.service")["ActiveState"], "active");
}

fn service_name(container: &Container) {
    let _backend = container.inside(|| {
        let backend = Endpoint::tcp("127.0.0.1:5432", 16);
        serve(&backend, echo);
        backend
    });
    let add = "grep -q ^postgresql /etc/services || echo postgresql 5432/tcp >>/etc/services";
    container.run(&["sh", "-c", add]);
    container.start_units(&[
        (
            "named.service",
            &format!("[Service]\nType=notify\nExecStart={IN_ITS_PLACE} localhost:postgresql\n"),
        ),
        ("named.socket", "[Socket]\nListenStream=127.0.0.1:7300\n"),
    ]);
    let front = SocketAddr::from(([127, 0, 0, 1], 7300));
    assert_echoes(&mut container.inside(|| connect(&front.into())));
}

fn slow_resolver(container: &Container) {
    // A name server that is not there costs its resolver the whole timeout.
    if cfg!(target_env = "musl") {
        return eprintln!("SKIPPED: a slow resolver: this is the resolver of musl");
    }
    let server = container.inside(|| {
        let backend = Endpoint::tcp("127.0.0.1:7401", 16);
        serve(&backend, echo);
        UdpSocket::bind("127.0.0.1:53").unwrap()
    });
    thread::spawn(move || answer_names(&server));
    container.write("/etc/resolv.conf", "nameserver 127.0.0.1\noptions timeout:30 attempts:1\n");
    let lookup = "sed -i -e '/^hosts:/d' -e '/^services:/d' /etc/nsswitch.conf && \
        printf 'hosts: files dns\\nservices: files\\n' >>/etc/nsswitch.conf";
    container.run(&["sh", "-c", lookup]);
    container.start_units(&[
        (
            "slow.service",
            &format!("[Service]\nType=notify\nExecStart={IN_ITS_PLACE} backend.test:7401\n"),
        ),
        ("slow.socket", "[Socket]\nListenStream=127.0.0.1:7400\n"),
    ]);
    let front = SocketAddr::from(([127, 0, 0, 1], 7400));
    // The name server swallows the first lookup and answers the others.
    let mut stuck = container.inside(|| connect(&front.into()));
    stuck.write_all(b"hello?").unwrap();
    let deadline = Instant::now() + TIMEOUT;
    let asked = poll_until(deadline, || QUESTIONS.load(Ordering::SeqCst).ge(&2).then_some(()));
    asked.expect("the first lookup is under way");
    let mut quick = container.inside(|| connect(&front.into()));
    assert_echoes(&mut quick);
    stuck.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
    let waiting = stuck.read(&mut [0; 6]).unwrap_err();
    assert_eq!(waiting.kind(), ErrorKind::WouldBlock, "the stuck one is still held");

    // The resolver fails temporarily; the client waits.
    container.start_units(&[
        (
            "later.service",
            &format!(
                "[Service]\nType=notify\n\
                 ExecStart={IN_ITS_PLACE} --backend-wait=60s later.test:7401\n"
            ),
        ),
        ("later.socket", "[Socket]\nListenStream=127.0.0.1:7402\n"),
    ]);
    let later = SocketAddr::from(([127, 0, 0, 1], 7402));
    let mut held = container.inside(|| connect(&later.into()));
    held.write_all(b"are you there?").unwrap();
    let printed = poll_until(Instant::now() + TIMEOUT, || {
        let journal = container.run(&["journalctl", "-u", "later.service", "--no-pager"]);
        journal.contains("Failed to resolve host: later.test:7401").then_some(journal)
    });
    let journal = printed.expect("the first failure is logged");
    assert!(journal.contains("Temporary failure in name resolution, holding clients"), "{journal}");
    RESOLVES_LATER.store(true, Ordering::SeqCst);
    let mut answer = [0; 14];
    held.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"are you there?");

    // The thread in getaddrinfo() has most of its 30 s before it.
    let start = Instant::now();
    container.run(&["systemctl", "stop", "slow.socket", "slow.service"]);
    let took = start.elapsed();
    assert!(took < Duration::from_secs(9), "the stop took {took:?}");
    assert_eq!(container.show("slow.service")["Result"], "success");
}

/// Questions for `backend.test` that the name server has seen.
static QUESTIONS: AtomicUsize = AtomicUsize::new(0);

/// Whether the name server knows `later.test` by now.
static RESOLVES_LATER: AtomicBool = AtomicBool::new(false);

/// A name server that never answers the first lookup (an A and an AAAA question), and to all others
/// says 127.0.0.1; of `later.test` it says at first that it can't say (SERVFAIL).
fn answer_names(server: &UdpSocket) {
    let mut packet = [0; 512];
    while let Ok((length, client)) = server.recv_from(&mut packet) {
        let question = &packet[..length];
        let is_of_backend = question.windows(8).any(|label| label == b"\x07backend");
        if is_of_backend && QUESTIONS.fetch_add(1, Ordering::SeqCst) < 2 {
            continue;
        }
        let wants_ipv4 = question[12..].windows(4).any(|end| end == [0, 1, 0, 1]);
        let mut answer = question[..length].to_vec();
        // A response, recursion available, without error (RFC 1035, 4.1.1).
        answer[2] = 0x81;
        answer[3] = 0x80;
        if question.windows(6).any(|label| label == b"\x05later") {
            answer[3] |= if RESOLVES_LATER.load(Ordering::SeqCst) { 0 } else { 2 };
        }
        // No additional records: the question's EDNS is cut off with them.
        answer[10..12].fill(0);
        let end = 12 + question[12..].iter().position(|&byte| byte == 0).unwrap() + 5;
        answer.truncate(end);
        if wants_ipv4 && answer[3] & 0xf == 0 {
            answer[7] = 1;
            // The question's name, type A, class IN, one minute, four bytes.
            answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 127, 0, 0, 1]);
        }
        let _ = server.send_to(&answer, client);
    }
}

fn missing_family(container: &Container) {
    // One address is not up yet, and the family of the other is missing. The client waits.
    container.write("/etc/hosts", "127.0.0.1 localhost mixed\n::1 mixed\n");
    container.start_units(&[
        (
            "mixed.service",
            &format!(
                "[Service]\nType=notify\nRestrictAddressFamilies=AF_UNIX AF_INET\n\
                 ExecStart={IN_ITS_PLACE} --backend-wait=30s mixed:7701\n"
            ),
        ),
        ("mixed.socket", "[Socket]\nListenStream=127.0.0.1:7700\n"),
    ]);
    let front = SocketAddr::from(([127, 0, 0, 1], 7700));
    let mut client: Socket = container.inside(|| connect(&front.into()));
    client.write_all(b"are you there?").unwrap();
    let deadline = Instant::now() + TIMEOUT;
    let held = poll_until(deadline, || {
        let journal = container.run(&["journalctl", "-u", "mixed.service", "--no-pager"]);
        journal.contains("Connection refused, holding clients").then_some(())
    });
    held.expect("the client is held");
    let _backend = container.inside(|| {
        let backend = Endpoint::tcp("127.0.0.1:7701", 16);
        serve(&backend, echo);
        backend
    });
    let mut answer = [0; 14];
    client.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"are you there?");
}

fn forbidden_accept(container: &Container) {
    container.start_units(&[
        (
            "forbidden.service",
            &format!(
                "[Service]\nType=notify\nSystemCallFilter=~accept4\nSystemCallErrorNumber=EPERM\n\
                 ExecStart={IN_ITS_PLACE} 127.0.0.1:1\n"
            ),
        ),
        ("forbidden.socket", "[Socket]\nListenStream=127.0.0.1:7600\n"),
    ]);
    let front = SocketAddr::from(([127, 0, 0, 1], 7600));
    let _client: Socket = container.inside(|| connect(&front.into()));
    container.wait_for("forbidden.service", "ActiveState", "active");
    let process = container.show("forbidden.service")["MainPID"].clone();
    let cpu = || -> u64 {
        let times = container.run(&["cat", &format!("/proc/{process}/schedstat")]);
        times.split(' ').next().unwrap().parse().unwrap()
    };
    let before = cpu();
    pause(Duration::from_secs(1));
    let spent = Duration::from_nanos(cpu() - before);
    assert!(spent < Duration::from_millis(50), "{spent:?} of CPU in 1 s: a busy loop");
    let journal = container.run(&["journalctl", "-u", "forbidden.service", "--no-pager"]);
    let warnings = journal.lines().filter(|line| line.contains("Failed to accept")).count();
    assert_eq!(warnings, 1, "{journal}");
    container.run(&["systemctl", "stop", "forbidden.socket", "forbidden.service"]);
    assert_eq!(container.show("forbidden.service")["Result"], "success");
}

fn forbidden_connect(container: &Container) {
    // A sandbox does not change with time, so that no client waits.
    container.start_units(&[
        (
            "sandbox.service",
            &format!(
                "[Service]\nType=notify\nNotifyAccess=all\n\
                 SystemCallFilter=~connect\nSystemCallErrorNumber=EPERM\n\
                 ExecStart={IN_ITS_PLACE} --backend-wait=60s 127.0.0.1:1\n"
            ),
        ),
        ("sandbox.socket", "[Socket]\nListenStream=127.0.0.1:7800\n"),
    ]);
    let front = SocketAddr::from(([127, 0, 0, 1], 7800));
    for _ in 0..3 {
        let mut client: Socket = container.inside(|| connect(&front.into()));
        assert_eq!(read_all(&mut client).0, b"", "closed in time");
    }
    assert_eq!(container.show("sandbox.service")["ActiveState"], "active");
}

fn self_connection(container: &Container) {
    // Two local ports to choose from, and no listener at the target: every second attempt gets the target's
    // own port, and TCP connects it to itself.
    for target in ["127.0.0.1:40000", "[::1]:40000", "0.0.0.0:40000", "[::]:40000"] {
        connects_to_itself(container, target, 200, 1);
    }
    // Repeated attempts of a waiting client; also with a COMMAND that does not listen.
    for held in ["127.0.0.1:40000", "127.0.0.1:40000 -- /bin/sleep 60"] {
        connects_to_itself(container, &format!("--backend-wait=10s {held}"), 1, 5);
    }
}

/// Connects `clients` at a time, `times` times.
fn connects_to_itself(container: &Container, arguments: &str, times: usize, clients: usize) {
    container.start_units(&[
        (
            "itself.service",
            &format!(
                "[Service]\nType=notify\nPrivateNetwork=yes\nExecStart={IN_ITS_PLACE} {arguments}\n\
                 ExecStartPre=/sbin/sysctl -qw net.ipv4.ip_local_port_range=\"40000 40003\"\n"
            ),
        ),
        ("itself.socket", "[Socket]\nListenStream=127.0.0.1:7500\nBacklog=512\n"),
    ]);
    let front = SocketAddr::from(([127, 0, 0, 1], 7500));
    for _ in 0..times {
        let mut clients: Vec<Socket> =
            (0..clients).map(|_| container.inside(|| connect(&front.into()))).collect();
        for client in &mut clients {
            let answer = exchange(client, b"is it me?");
            assert!(answer.is_err(), "a client was echoed its own bytes by {arguments}");
        }
    }
    assert_eq!(container.show("itself.service")["ActiveState"], "active");
    container.run(&["systemctl", "stop", "itself.socket", "itself.service"]);
}
