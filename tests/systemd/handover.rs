//! `--handover=`: transfers and idle connections across restarts and kills. (All kinds of ends, and
//! damaged stores: tests/handover/.)

use std::io::{Read, Write};
use std::net::Shutdown;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use crate::container::{Container, Suite, Test};
use crate::support::*;
use socket2::{Domain, SockAddr, Socket, Type};
use tokio::time::Instant;

pub(crate) fn register(suite: &Arc<Suite>, trials: &mut Trials) {
    if let Some(missing) = Container::missing() {
        return trials.skip("systemd: handover", missing);
    }
    for (handover, ends) in [("restart", "restarts"), ("crash", "kills")] {
        suite.beside(
            trials,
            format!("large transfers survive, three {ends}, TCP to Unix"),
            move |container| survive(container, &LARGE, handover),
        );
        for case in &SMALL {
            let name = case.name;
            let name = format!("transfers and a PROXY header survive, three {ends}, {name}");
            suite.beside(trials, name, move |container| survive(container, case, handover));
        }
        let name = format!("a waiting client survives, three {ends}");
        suite.beside(trials, name, move |container| waiting(container, handover));
        let name = format!("a thousand connections survive, twenty {ends}");
        suite.alone(trials, name, move |container| thousand(container, handover));
    }
    let tests: [Test; 6] = [
        ("connections survive kills during recovery", killed_while_recovering),
        ("unknown and damaged descriptors in the store are closed", garbage),
        ("a connection that systemd has accepted survives restarts", accepted),
        ("connections survive starts that fail", failing_start),
        ("connections survive starts with too few descriptors", too_few_descriptors),
        ("a SIGTERM that systemd did not send resets connections", foreign_signal),
    ];
    for (name, test) in tests {
        suite.beside(trials, name, test);
    }
}

struct Case {
    /// The families, as the tests are named.
    name: &'static str,
    /// The units are named so.
    unit: &'static str,
    /// A port for restarts, the next one for kills; none is an abstract name.
    front: Option<u16>,
    back: Option<u16>,
    bytes: usize,
    idle: usize,
    header: Option<&'static str>,
}

const LARGE: Case = Case {
    name: "TCP to Unix",
    unit: "large",
    front: Some(6100),
    back: None,
    bytes: 120_000_000,
    idle: 20,
    header: None,
};

const SMALL: [Case; 3] = [
    Case {
        name: "Unix to TCP, v1",
        unit: "unix-tcp",
        front: None,
        back: Some(6200),
        header: Some("v1"),
        ..SMALL_TCP
    },
    SMALL_TCP,
    Case { name: "Unix to Unix, v2", unit: "unix-unix", front: None, back: None, ..SMALL_TCP },
];

const SMALL_TCP: Case = Case {
    name: "TCP to TCP, v2",
    unit: "tcp-tcp",
    front: Some(6204),
    back: Some(6206),
    bytes: 20_000_000,
    idle: 4,
    header: Some("v2"),
};

/// An address that no other test uses.
fn own_address(port: Option<u16>, unit: &str, handover: &str) -> String {
    match port {
        Some(port) => format!("127.0.0.1:{}", port + u16::from(handover == "crash")),
        None => format!("@{unit}-{handover}"),
    }
}

/// A TCP address, or an abstract name, which belongs to the network and not to the files.
fn address(text: &str) -> SockAddr {
    match text.strip_prefix('@') {
        Some(name) => SockAddr::unix(format!("\0{name}")).unwrap(),
        None => text.parse::<std::net::SocketAddr>().unwrap().into(),
    }
}

fn listen(text: &str) -> Socket {
    let address = address(text);
    let socket = Socket::new(address.domain(), Type::STREAM, None).unwrap();
    if address.domain() != Domain::UNIX {
        socket.set_reuse_address(true).unwrap();
    }
    // A process that another test starts holds the last listener between fork(2) and execve(2).
    let bound = || socket.bind(&address).ok();
    poll_until(Instant::now() + TIMEOUT, bound).unwrap_or_else(|| panic!("{text} is in use"));
    socket.listen(4096).unwrap();
    socket
}

/// Starts a proxy as the manual advises.
fn start_proxy(container: &Container, name: &str, front: &str, arguments: &str) {
    container.start_units(&[
        (
            &format!("{name}.service"),
            &format!(
                "[Unit]\nStartLimitIntervalSec=0\n\
                 [Service]\nType=notify\nDynamicUser=yes\nFileDescriptorStoreMax=4\n\
                 Restart=on-failure\nRestartSec=100ms\nLimitNOFILE=20000\n\
                 ExecStart=/usr/bin/socket-proxyd {arguments}\n"
            ),
        ),
        (
            &format!("{name}.socket"),
            &format!("[Socket]\nListenStream={front}\nBacklog=4096\nSocketMode=0666\n"),
        ),
    ]);
}

/// Replaces the process by a restart or a kill, and waits until the next one is ready.
fn replace(container: &Container, service: &str, handover: &str) {
    let before = container.show(service)["MainPID"].clone();
    match handover {
        "crash" => container.run(&["systemctl", "kill", "-s", "KILL", service]),
        _ => container.run(&["systemctl", "restart", service]),
    };
    let another = poll_until(Instant::now() + TIMEOUT, || {
        let show = container.show(service);
        (show["ActiveState"] == "active" && show["MainPID"] != before).then_some(())
    });
    assert!(another.is_some(), "{:?}", container.show(service));
}

/// Both ends of a connection through the proxy.
struct Peers {
    client: Socket,
    served: Socket,
}

#[expect(clippy::too_many_lines, reason = "one transfer from its start to its end")]
fn survive(container: &Container, case: &Case, handover: &str) {
    let Case { unit, front, back, bytes, idle, header, .. } = *case;
    let name = &format!("{unit}-{handover}");
    let service = format!("{name}.service");
    let front = &own_address(front, &format!("{unit}-front"), handover);
    let back = &own_address(back, &format!("{unit}-back"), handover);
    let backend = container.inside(|| listen(back));
    let option = header.map_or(String::new(), |version| format!("--proxy-protocol={version}"));
    let arguments = format!("--handover={handover} {option} --connections-max=100 {back}");
    start_proxy(container, name, front, &arguments);
    let established = || {
        let client = container.inside(|| connect(&address(front)));
        backend.set_read_timeout(Some(TIMEOUT)).unwrap();
        let (served, _) = backend.accept().expect("the proxy connects");
        served.set_read_timeout(Some(TIMEOUT)).unwrap();
        served.set_write_timeout(Some(TIMEOUT)).unwrap();
        let (mut client, mut served) = (client, served);
        client.write_all(b"+").unwrap();
        let header_seen = read_header(&mut served);
        assert_eq!(header_seen.is_empty(), header.is_none(), "{header_seen:?}");
        Peers { client, served }
    };
    let mut idle: Vec<_> = (0..idle).map(|_| established()).collect();
    // Two have half-closed, one on each side.
    idle[0].client.shutdown(Shutdown::Write).unwrap();
    assert_eq!(idle[0].served.read(&mut [0]).unwrap(), 0);
    idle[1].served.shutdown(Shutdown::Write).unwrap();
    assert_eq!(idle[1].client.read(&mut [0]).unwrap(), 0);

    let message = random_bytes(1, bytes);
    let transferred: Vec<(Socket, Socket)> = thread::scope(|scope| {
        let start = |(number, is_up): (usize, bool)| {
            let Peers { client, served } = established();
            // Two uploads and two downloads; one of each is read slowly.
            let (mut from, mut to) = if is_up { (client, served) } else { (served, client) };
            // Other bytes than those of the transfer beside it.
            let message = &message[number..];
            let writer = scope.spawn(move || {
                from.write_all(message).unwrap();
                from.shutdown(Shutdown::Write).unwrap();
                from
            });
            let reader = scope.spawn(move || {
                let mut buffer = vec![0; 256 * 1024];
                let mut left = message;
                loop {
                    let bytes = to.read(&mut buffer).expect("no reset, no standstill");
                    if bytes == 0 {
                        assert_eq!(left.len(), 0, "bytes are missing");
                        return to;
                    }
                    assert!(left.starts_with(&buffer[..bytes]));
                    left = &left[bytes..];
                    if number < 2 {
                        pause(Duration::from_millis(1));
                    }
                }
            });
            (writer, reader)
        };
        let transfers = [(0, true), (1, false), (2, true), (3, false)].map(start);
        for _ in 0..3 {
            replace(container, &service, handover);
            let (half, whole) = idle.split_at_mut(2);
            assert_forwards(&mut half[0].served, &mut half[0].client);
            assert_forwards(&mut half[1].client, &mut half[1].served);
            for Peers { client, served } in whole {
                assert_forwards(client, served);
                assert_forwards(served, client);
            }
        }
        transfers.map(|(from, to)| (from.join().unwrap(), to.join().unwrap())).into()
    });
    // Each end is an end to the other side, and then no connection is left.
    drop(transferred);
    for Peers { client, mut served } in idle.drain(1..) {
        drop(client);
        assert!(read_all(&mut served).1.is_ok());
    }
    drop(idle);
    container.wait_for_status(&service, "0 of 100 connections");
    replace(container, &service, handover);
    let journal = container.run(&["journalctl", "-u", &service, "-o", "cat"]);
    assert_eq!(journal.matches("Recovered connections: ").count(), 3, "{journal}");
    assert_eq!(container.show(&service)["NFileDescriptorStore"], "2");
    container.run(&["systemctl", "stop", &format!("{name}.socket"), &service]);
    assert_eq!(container.show(&service)["NFileDescriptorStore"], "0");
}

/// Reads the PROXY header, if any, and the client's first byte.
fn read_header(served: &mut Socket) -> Vec<u8> {
    let mut read = Vec::new();
    loop {
        let mut byte = [0];
        served.read_exact(&mut byte).unwrap();
        let is_whole = match read.as_slice() {
            [] => true,
            [b'P', ..] => read.ends_with(b"\r\n"),
            [.., _] if read.len() >= 16 => {
                read.len() == 16 + usize::from(u16::from_be_bytes([read[14], read[15]]))
            }
            _ => false,
        };
        if is_whole && byte == *b"+" {
            return read;
        }
        read.extend(byte);
    }
}

fn waiting(container: &Container, handover: &str) {
    let port = if handover == "crash" { 6302 } else { 6300 };
    let (front, back) = (format!("127.0.0.1:{port}"), format!("@waiting-{handover}"));
    let (name, service) = (format!("waiting-{handover}"), format!("waiting-{handover}.service"));
    let arguments = format!("--handover={handover} --backend-wait=1min --proxy-protocol=v1 {back}");
    start_proxy(container, &name, &front, &arguments);
    let mut client = container.inside(|| connect(&address(&front)));
    client.write_all(b"+").unwrap();
    container.wait_for_status(&service, "1 of 256 connections");
    for _ in 0..3 {
        replace(container, &service, handover);
    }
    let backend = container.inside(|| listen(&back));
    let (mut served, _) = backend.accept().unwrap();
    assert!(read_header(&mut served).starts_with(b"PROXY TCP4 127.0.0.1 "));
    assert_forwards(&mut served, &mut client);
    assert_forwards(&mut client, &mut served);
    client.shutdown(Shutdown::Write).unwrap();
    assert_eq!(read_all(&mut served).0, b"", "and no second header");
    container.run(&["systemctl", "stop", &format!("{name}.socket"), &service]);
}

fn thousand(container: &Container, handover: &str) {
    let port = if handover == "crash" { 6402 } else { 6400 };
    const CONNECTIONS: usize = 1000;
    const SLACK: f64 = 3.0;
    raise_descriptor_limit();
    let (front, back) = (format!("127.0.0.1:{port}"), format!("@thousand-{handover}"));
    let service = format!("thousand-{handover}.service");
    let name = format!("thousand-{handover}");
    let backend = container.inside(|| listen(&back));
    let arguments = format!("--handover={handover} --connections-max=2000 {back}");
    start_proxy(container, &name, &front, &arguments);
    serve_on(backend, echo);
    let mut all = container
        .inside(|| (0..CONNECTIONS).map(|_| connect(&address(&front))).collect::<Vec<_>>());
    all.iter_mut().for_each(assert_echoes);
    let mut measured = Vec::new();
    let mut manager_cpu = Vec::new();
    let mut longest = 0.0_f64;
    for _ in 0..20 {
        let before = container.manager_cpu();
        replace(container, &service, handover);
        manager_cpu.push((container.manager_cpu() - before).as_secs_f64());
        let show = container.show(&service);
        all.iter_mut().for_each(assert_echoes);
        measured.push(container.process(&show["MainPID"]));
    }
    manager_cpu.sort_by(f64::total_cmp);
    let median_cpu = manager_cpu[manager_cpu.len() / 2];
    assert!(median_cpu < 0.1 * SLACK, "PID 1 used {manager_cpu:?} s");
    let [first, last] = [measured[0], measured[19]];
    assert_eq!(first.descriptors, last.descriptors, "{measured:?}");
    assert!(last.resident < first.resident + first.resident / 5, "{measured:?}");
    let journal = container.run(&["journalctl", "-u", &service, "-o", "short-monotonic"]);
    let mut begun = None;
    let mut recovered = 0;
    for line in journal.lines() {
        let at = || -> f64 {
            let text = line.trim_start_matches('[').trim_start();
            text.split(']').next().unwrap().parse().unwrap()
        };
        if line.contains("Starting ") {
            begun = Some(at());
        } else if line.contains("Recovered connections: 1000.") {
            recovered += 1;
            let took = at() - begun.expect("it was started");
            assert!(took < 0.3 * SLACK, "recovered after {took} s");
            longest = longest.max(took);
        }
    }
    assert_eq!(recovered, 20, "{journal}");
    eprintln!(
        "1,000 connections, {handover}: recovered within {longest:.3} s of the start, PID 1 used \
             {median_cpu:.3} s (median of 20)"
    );
    container.run(&["systemctl", "stop", &format!("{name}.socket"), &service]);
    for mut client in all {
        assert!(is_reset(&read_all(&mut client).1), "a stop is a stop, and no end");
    }
}

fn killed_while_recovering(container: &Container) {
    let (front, back) = ("127.0.0.1:6500", "@recovering");
    let backend = container.inside(|| listen(back));
    start_proxy(container, "recovering", front, &format!("--handover=crash -c 2000 {back}"));
    serve_on(backend, echo);
    let mut all =
        container.inside(|| (0..500).map(|_| connect(&address(front))).collect::<Vec<_>>());
    all.iter_mut().for_each(assert_echoes);
    for _ in 0..3 {
        let before = container.show("recovering.service")["MainPID"].clone();
        container.run(&["systemctl", "kill", "-s", "KILL", "recovering.service"]);
        // The next process has just started.
        let another = poll_until(Instant::now() + TIMEOUT, || {
            let show = container.show("recovering.service");
            (show["MainPID"] != before && show["MainPID"] != "0").then_some(())
        });
        another.expect("it is started again");
    }
    container.run(&["systemctl", "kill", "-s", "KILL", "recovering.service"]);
    all.iter_mut().for_each(assert_echoes);
    container.run(&["systemctl", "stop", "recovering.socket", "recovering.service"]);
}

/// Stores, once, a regular file, one socket of a queue without the other, and an unknown socket.
const LITTER: &str = r#"
import array, os, socket
notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
notify.connect(os.environ["NOTIFY_SOCKET"])
def send(text, fd):
    rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))
    notify.sendmsg([text.encode()], [rights])
def store(name, fd):
    send(f"FDSTORE=1\nFDPOLL=0\nFDNAME={name}", fd)
if not os.path.exists("/run/littered"):
    open("/run/littered", "w").close()
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    store("config", os.open("/etc/passwd", os.O_RDONLY))
    store("handover-of-socket-proxyd.queue", one.fileno())
    store("peer", other.fileno())
    read, write = os.pipe()
    send("BARRIER=1", write)
    os.close(write)
    os.read(read, 1)
"#;

fn garbage(container: &Container) {
    let (front, back) = ("127.0.0.1:6600", "@garbage");
    let backend = container.inside(|| listen(back));
    serve_on(backend, echo);
    container.write("/usr/local/lib/litter.py", LITTER);
    container.start_units(&[
        (
            "garbage.service",
            &format!(
                "[Service]\nType=notify\nNotifyAccess=all\nFileDescriptorStoreMax=8\n\
                 Restart=on-failure\nExecStartPre=/usr/bin/python3 /usr/local/lib/litter.py\n\
                 ExecStart=/usr/bin/socket-proxyd --handover=crash {back}\n"
            ),
        ),
        ("garbage.socket", &format!("[Socket]\nListenStream={front}\n")),
    ]);
    let mut client = container.inside(|| connect(&address(front)));
    assert_echoes(&mut client);
    let journal = container.run(&["journalctl", "-u", "garbage.service", "-o", "cat"]);
    let strangers =
        ["not listening sockets: config, peer.", "not listening sockets: peer, config."];
    assert!(strangers.iter().any(|line| journal.contains(line)), "{journal}");
    assert!(journal.contains("Failed to read the descriptor store: it is damaged."), "{journal}");
    assert_eq!(container.show("garbage.service")["NFileDescriptorStore"], "2");
    replace(container, "garbage.service", "crash");
    assert_echoes(&mut client);
    container.run(&["systemctl", "stop", "garbage.socket", "garbage.service"]);
}

/// Without a kill: after one systemd passes the listening socket to the instance.
fn accepted(container: &Container) {
    let (front, back) = ("127.0.0.1:6700", "@accepted");
    let backend = container.inside(|| listen(back));
    serve_on(backend, echo);
    container.start_units(&[
        (
            "accepted@.service",
            &format!(
                "[Service]\nType=notify\nDynamicUser=yes\nFileDescriptorStoreMax=4\n\
                 ExecStart=/usr/bin/socket-proxyd --handover=restart {back}\n"
            ),
        ),
        ("accepted.socket", &format!("[Socket]\nListenStream={front}\nAccept=yes\n")),
    ]);
    let mut client = container.inside(|| connect(&address(front)));
    assert_echoes(&mut client);
    let list = ["systemctl", "list-units", "--plain", "--no-legend", "accepted@*"];
    let list = container.run(&list);
    let service = list.split_whitespace().next().unwrap();
    for _ in 0..3 {
        replace(container, service, "restart");
        assert_echoes(&mut client);
    }
    client.shutdown(Shutdown::Write).unwrap();
    assert!(read_all(&mut client).1.is_ok());
    container.wait_for(service, "ActiveState", "inactive");
    container.run(&["systemctl", "stop", "accepted.socket"]);
}

fn failing_start(container: &Container) {
    let (front, back) = ("127.0.0.1:6800", "@failing");
    let backend = container.inside(|| listen(back));
    serve_on(backend, echo);
    let start = || start_proxy(container, "failing", front, &format!("--handover=restart {back}"));
    start();
    let mut client = container.inside(|| connect(&address(front)));
    assert_echoes(&mut client);
    // A mistake of an administrator, corrected below.
    let wrong = "[Service]\nExecStart=\nExecStart=/usr/bin/socket-proxyd --handover=restart x=y\n";
    let drop_in = "/run/systemd/system/failing.service.d/wrong.conf";
    container.write(drop_in, wrong);
    container.reload();
    container.output(&["systemctl", "restart", "failing.service"]);
    let failed = poll_until(Instant::now() + TIMEOUT, || {
        let restarts = container.show("failing.service")["NRestarts"].parse::<u32>().unwrap();
        (restarts >= 3).then_some(())
    });
    failed.expect("it is started again and again");
    container.run(&["rm", drop_in]);
    container.reload();
    assert_echoes(&mut client);
    container.wait_for("failing.service", "ActiveState", "active");
    container.run(&["systemctl", "stop", "failing.socket", "failing.service"]);
    assert!(is_reset(&read_all(&mut client).1));
}

fn too_few_descriptors(container: &Container) {
    let (front, back) = ("127.0.0.1:6850", "@few");
    let backend = container.inside(|| listen(back));
    serve_on(backend, echo);
    start_proxy(container, "few", front, &format!("--handover=crash {back}"));
    let connect = || container.inside(|| connect(&address(front)));
    let mut clients: Vec<_> = std::iter::repeat_with(connect).take(150).collect();
    clients.iter_mut().for_each(assert_echoes);
    let drop_in = "/run/systemd/system/few.service.d/limit.conf";
    container.write(drop_in, "[Service]\nLimitNOFILE=200\n");
    container.reload();
    container.run(&["systemctl", "kill", "-s", "KILL", "few.service"]);
    let failed = poll_until(Instant::now() + TIMEOUT, || {
        let restarts = container.show("few.service")["NRestarts"].parse::<u32>().unwrap();
        (restarts >= 3).then_some(())
    });
    failed.expect("it is started again and again");
    container.run(&["rm", drop_in]);
    container.reload();
    clients.iter_mut().for_each(assert_echoes);
    let log = container.run(&["journalctl", "--no-pager", "-o", "cat", "-u", "few.service"]);
    assert!(log.contains("Failed to restore connections, which stay stored: "), "{log}");
    assert!(!log.contains("closing them"), "nothing was closed: {log}");
    let is_raw = |line: &str| ["PRIORITY=", "MESSAGE="].iter().any(|it| line.starts_with(it));
    assert!(!log.lines().any(is_raw), "entries in the journal's form: {log}");
    container.run(&["systemctl", "stop", "few.socket", "few.service"]);
}

fn foreign_signal(container: &Container) {
    let (front, back) = ("127.0.0.1:6900", "@foreign");
    let backend = container.inside(|| listen(back));
    serve_on(backend, echo);
    start_proxy(container, "foreign", front, &format!("--handover=crash {back}"));
    let mut client = container.inside(|| connect(&address(front)));
    assert_echoes(&mut client);
    container.run(&["systemctl", "kill", "-s", "TERM", "foreign.service"]);
    assert!(is_reset(&read_all(&mut client).1), "a success is not restarted");
    container.run(&["systemctl", "stop", "foreign.socket", "foreign.service"]);
}
