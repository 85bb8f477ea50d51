//! A backend on demand: COMMAND, `--start-command=`, `--backend-wait=`.

use std::fs;
use std::thread;
use std::time::Duration;

use rustix::process::{Pid, test_kill_process};
use socket2::Socket;
use tempfile::TempDir;
use tokio::time::Instant;

use crate::peers::*;
use crate::support::*;

/// The application of app.pl.
const APP: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/datagram/app.pl");

/// The proxy with an application that it starts.
struct Service {
    proxy: Proxy,
    directory: TempDir,
}

impl Service {
    /// As COMMAND.
    fn start(front: Kind, back: Kind, options: &[&str], settings: &[&str]) -> Self {
        let (directory, target) = Self::place(back);
        let log = directory.path().join("log");
        let words = [options, &[&target, "--", "perl", APP, &target, log.to_str().unwrap()]];
        let words = [&words.concat()[..], settings].concat();
        let proxy = Proxy::start_at(Peer::new(front), &words, |launch| launch);
        Self { proxy, directory }
    }

    /// A directory for the application, and an address that no other test has.
    fn place(back: Kind) -> (TempDir, String) {
        let directory = TempDir::new().unwrap();
        fs::write(directory.path().join("log"), "").unwrap();
        let target = match back {
            Kind::Unix => directory.path().join("app").to_str().unwrap().to_string(),
            _ => unused_address().to_string(),
        };
        (directory, target)
    }

    /// What the application has logged behind a word.
    fn logged(&self, word: &str) -> Vec<String> {
        let log = fs::read_to_string(self.directory.path().join("log")).unwrap();
        let lines = log.lines().filter_map(|line| line.strip_prefix(word));
        lines.map(|rest| rest.trim().to_string()).collect()
    }

    fn wait_for(&self, word: &str, count: usize) {
        let reached = || (self.logged(word).len() >= count).then_some(());
        let reached = poll_until(Instant::now() + TIMEOUT, reached);
        assert!(reached.is_some(), "not {count} {word}: {:?}", self.logged(""));
    }

    /// The PID of the application that answers.
    fn ask(&self, client: &Socket, question: &str) -> Pid {
        client.send(question.as_bytes()).unwrap();
        answered(client, question)
    }
}

/// The PID in the next answer, which is to this question.
fn answered(client: &Socket, question: &str) -> Pid {
    let answer = String::from_utf8(receive(client)).unwrap();
    let (pid, rest) = answer.split_once(' ').unwrap();
    assert_eq!(rest, question);
    Pid::from_raw(pid.parse().unwrap()).unwrap()
}

fn wait_for_end(pid: Pid) {
    let ended = || test_kill_process(pid).is_err().then_some(());
    poll_until(Instant::now() + TIMEOUT, ended).expect("the process ends");
}

/// The datagrams that a client sends while the application starts.
fn burst(client: &Socket, count: usize) -> Vec<String> {
    let questions: Vec<_> = (0..count).map(|number| format!("question {number}")).collect();
    for question in &questions {
        client.send(question.as_bytes()).unwrap();
    }
    questions
}

#[test]
fn a_datagram_starts_command_and_nothing_is_lost() {
    for (front, back) in [(Kind::Udp, Kind::Udp), (Kind::Udp6, Kind::Unix), (Kind::Unix, Kind::Udp)]
    {
        for (option, settings) in [
            ("--ready=connect", &["up=0.4"][..]),
            ("--ready=notify", &["up=0.1", "ready=0.4"]),
            ("--ready=exec:sh -c 'sleep 0.3'", &[]),
        ] {
            let service = Service::start(front, back, &[option], settings);
            assert_eq!(service.logged("started"), [""; 0], "nothing is started before");
            let clients: Vec<_> = (0..5).map(|_| service.proxy.client()).collect();
            // As many as a Unix queue has room for.
            let questions: Vec<_> = clients.iter().map(|client| burst(client, 2)).collect();
            for (client, questions) in clients.iter().zip(questions) {
                for question in questions {
                    answered(client, &question);
                }
            }
            assert_eq!(service.logged("got").len(), 10, "{front} {back} {option}: once each");
            assert_eq!(service.logged("started").len(), 1);
            service.proxy.assert_adds_up();
            assert_eq!(service.proxy.value("datagrams_dropped_total", &[]), 0);
        }
    }
}

#[test]
fn a_session_holds_sixteen_datagrams_the_newest() {
    let service = Service::start(Kind::Udp, Kind::Udp, &[], &["up=0.5"]);
    let client = service.proxy.client();
    let questions = burst(&client, 20);
    for question in &questions[4..] {
        answered(&client, question);
    }
    assert_eq!(service.proxy.dropped("held"), 4);
    service.proxy.assert_adds_up();
}

#[test]
fn an_idle_command_stops_and_only_confirmed_sessions_are_in_use() {
    let service = Service::start(Kind::Udp, Kind::Udp, &["--stop-idle-time=700ms"], &[]);
    let client = service.proxy.client();
    let first = service.ask(&client, "is anybody there?");
    // One question and its answer are no use.
    wait_for_end(first);
    service.proxy.wait_for_sessions(0);
    let second = service.ask(&client, "again");
    assert_ne!(first, second);
    // The second datagram confirms the session, which is in use from then on.
    let since = Instant::now();
    while since.elapsed() < Duration::from_millis(1800) {
        assert_eq!(service.ask(&client, "still there?"), second);
        pause(Duration::from_millis(900));
    }
    assert_eq!(service.ask(&client, "still there?"), second);
}

#[test]
fn command_that_dies_is_started_again_for_the_next_datagram() {
    let service = Service::start(Kind::Udp, Kind::Udp, &[], &["up=0.2"]);
    let client = service.proxy.client();
    let first = service.ask(&client, "one");
    pause(Duration::from_millis(1100));
    rustix::process::kill_process(first, rustix::process::Signal::KILL).unwrap();
    wait_for_end(first);
    service.proxy.running.lines.wait_for("The next client starts it again.");
    // The proxy knows that it has ended, and holds what comes.
    assert_ne!(service.ask(&client, "two"), first);
    assert_eq!(service.logged("started").len(), 2);
}

#[test]
fn a_frozen_command_thaws_for_a_datagram() {
    let service = Service::start(Kind::Udp, Kind::Udp, &["--freeze-idle-time=500ms"], &[]);
    let client = service.proxy.client();
    let first = service.ask(&client, "one");
    service.proxy.running.lines.wait_for("Freezing perl, no connection for 500ms.");
    service.proxy.wait_for_sessions(0);
    assert_eq!(service.ask(&client, "two"), first);
    service.proxy.running.lines.wait_for("Thawing perl for a client.");
}

#[test]
fn a_passive_client_starts_nothing() {
    let options = ["--passive-from=127.0.0.0/8", "--stop-idle-time=700ms"];
    let front = Peer::udp("[::]:0");
    let (directory, target) = Service::place(Kind::Udp);
    let log = directory.path().join("log");
    let words = [&target, "--", "perl", APP, &target, log.to_str().unwrap()];
    let words = [&options[..], &words].concat();
    let port = front.port();
    let proxy = Proxy::start_at(front, &words, |launch| launch);
    let service = Service { proxy, directory };
    let passive = client_of(format!("127.0.0.1:{port}").parse().unwrap());
    passive.send(b"is anybody there?").unwrap();
    service.proxy.wait_for_dropped("passive", 1);
    assert!(service.logged("started").is_empty());
    let client = client_of(format!("[::1]:{port}").parse().unwrap());
    let app = service.ask(&client, "wake up");
    for _ in 0..3 {
        assert_eq!(service.ask(&passive, "me too"), app);
    }
    // It keeps nothing running.
    wait_for_end(app);
    passive.send(b"and now?").unwrap();
    service.proxy.wait_for_dropped("passive", 2);
    assert_eq!(service.logged("started").len(), 1);
}

#[test]
fn a_start_command_runs_for_the_first_datagram() {
    let (directory, target) = Service::place(Kind::Udp);
    let path = |name: &str| directory.path().join(name).to_str().unwrap().to_string();
    let (log, pid) = (path("log"), path("pid"));
    let start = format!(
        "--start-command=sh -c 'perl {APP} {target} {log} up=0.3 >/dev/null 2>&1 & echo $! >{pid}'"
    );
    let stop = format!("--stop-command=sh -c 'kill $(cat {pid})'");
    let words = [&start, &stop, "--stop-idle-time=1s", &target];
    let proxy = Proxy::start_at(Peer::new(Kind::Udp), &words, |launch| launch);
    let service = Service { proxy, directory };
    let client = service.proxy.client();
    let questions = burst(&client, 5);
    let pids: Vec<_> = questions.iter().map(|question| answered(&client, question)).collect();
    service.wait_for("asked", 1);
    wait_for_end(pids[0]);
    assert_ne!(service.ask(&client, "again"), pids[0]);
    service.wait_for("asked", 2);
}

#[test]
fn a_session_waits_for_a_backend_that_something_else_starts() {
    for back in KINDS {
        let backend = Peer::new(back);
        let gone = backend.address.clone();
        let target = backend.target.clone();
        let proxy = Proxy::start(Kind::Udp, &target, &["--backend-wait=10s"]);
        let directory = backend.close();
        let client = proxy.client();
        let questions = burst(&client, 5);
        proxy.wait_until("waiting", || proxy.value("sessions_waiting", &[]) == 1);
        let socket = datagram_socket(&gone);
        thread::scope(|scope| {
            scope.spawn(|| {
                pause(Duration::from_millis(300));
                socket.bind(&gone).unwrap();
            });
        });
        for question in questions {
            assert_eq!(receive(&socket), question.as_bytes(), "{back}");
        }
        proxy.assert_adds_up();
        drop(directory);
    }
}

#[test]
fn a_wait_that_ends_drops_what_is_held() {
    let backend = Peer::new(Kind::Udp);
    let target = backend.target.clone();
    drop(backend);
    let proxy = Proxy::start(Kind::Udp, &target, &["--backend-wait=500ms"]);
    let client = proxy.client();
    burst(&client, 3);
    let line = proxy.running.lines.wait_for("(--backend-wait=500ms is over.)");
    assert!(line.contains("Connection refused"), "{line}");
    proxy.wait_for_sessions(0);
    assert_eq!(proxy.dropped("unreachable"), 3);
    proxy.assert_adds_up();
}

#[test]
fn the_other_address_of_a_name_is_tried() {
    if !is_root_for("the_other_address_of_a_name_is_tried") {
        return;
    }
    let directory = TempDir::new().unwrap();
    let hosts = directory.path().join("hosts");
    let backend = Peer::udp("127.0.0.7:0");
    fs::write(&hosts, "127.0.0.6 two.test\n127.0.0.7 two.test\n").unwrap();
    let target = format!("two.test:{}", backend.port());
    for options in [&[][..], &["--backend-wait=5s"]] {
        let words = [options, &[&target]].concat();
        let proxy =
            Proxy::start_at(Peer::new(Kind::Udp), &words, |launch| launch.hosts(hosts.clone()));
        let client = proxy.client();
        for question in burst(&client, 3) {
            assert_eq!(receive(&backend.socket), question.as_bytes());
        }
    }
}

#[test]
fn a_passive_client_is_served_while_a_connection_uses_command() {
    let (directory, target) = Service::place(Kind::Udp);
    let log = directory.path().join("log");
    let (front, stream) = (Peer::new(Kind::Udp), Endpoint::new(Family::Tcp));
    // The application listens on TCP last.
    let place = target.replace(':', "/");
    let ready = format!("--ready=exec:bash -c 'exec 3<>/dev/tcp/{place}'");
    let words = [
        "--passive-from=127.0.0.9",
        &ready,
        &target,
        "--",
        "perl",
        APP,
        &target,
        log.to_str().unwrap(),
        "tcp=1",
    ];
    let passive = Peer::udp("127.0.0.9:0").socket;
    passive.connect(&front.address).unwrap();
    let proxy = Proxy::start_at(front, &words, |launch| launch.listener(&stream));
    let service = Service { proxy, directory };
    passive.send(b"too early").unwrap();
    service.proxy.wait_for_dropped("passive", 1);
    let mut connection = stream.connect();
    let mut greeting = [0; 5];
    std::io::Read::read_exact(&mut connection, &mut greeting).unwrap();
    service.ask(&passive, "is anybody there?");
    assert_eq!(service.logged("started").len(), 1);
}

#[test]
fn a_refused_datagram_delays_no_connection() {
    let backend = Endpoint::new(Family::Tcp);
    serve(&backend, |mut socket| {
        let mut request = [0; 1024];
        if std::io::Read::read(&mut socket, &mut request).is_ok() {
            let answer = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
            let _ = std::io::Write::write_all(&mut socket, answer);
        }
    });
    let stream = Endpoint::new(Family::Tcp);
    let words = ["--backend-wait=15s", "--ready=http:/", &backend.target];
    let proxy = Proxy::start_at(Peer::new(Kind::Udp), &words, |launch| launch.listener(&stream));
    let request = || {
        let since = Instant::now();
        let mut client = stream.connect();
        std::io::Write::write_all(&mut client, b"GET / HTTP/1.1\r\n\r\n").unwrap();
        assert!(read_all(&mut client).0.starts_with(b"HTTP/1.1 200"));
        since.elapsed()
    };
    request();
    proxy.client().send(b"nothing listens here").unwrap();
    proxy.wait_until("waiting", || proxy.value("sessions_waiting", &[]) == 1);
    for _ in 0..5 {
        let took = request();
        assert!(took < Duration::from_secs(3), "{took:?}");
        pause(Duration::from_millis(100));
    }
}

#[test]
fn a_session_that_holds_nothing_does_not_find_the_backend_up() {
    let backend = Peer::new(Kind::Udp);
    let (target, address) = (backend.target.clone(), backend.address.clone());
    drop(backend);
    let proxy = Proxy::start(Kind::Unix, &target, &["--backend-wait=20s"]);
    let client = proxy.client();
    // Longer than what a session may hold.
    client.send(&[1; 70_000]).unwrap();
    proxy.wait_for_dropped("held", 1);
    pause(Duration::from_millis(500));
    assert_eq!(proxy.value("datagrams_delivered_total", &[]), 0);
    client.send(b"now").unwrap();
    proxy.wait_until("waiting", || proxy.value("sessions_waiting", &[]) == 1);
    let socket = datagram_socket(&address);
    socket.bind(&address).unwrap();
    assert_eq!(receive(&socket), b"now");
    proxy.assert_adds_up();
}

#[test]
fn datagrams_that_come_while_command_stops_are_for_the_next_run() {
    let options = ["--stop-idle-time=300ms"];
    let service = Service::start(Kind::Udp, Kind::Udp, &options, &["down=1", "up=0.3"]);
    let first = service.ask(&service.proxy.client(), "first");
    service.wait_for("asked", 1);
    let clients: Vec<_> = (0..5).map(|_| service.proxy.client()).collect();
    for client in &clients {
        client.send(b"second").unwrap();
    }
    for client in &clients {
        assert_ne!(answered(client, "second"), first);
    }
    assert_eq!(service.logged("got second").len(), 5);
}

#[test]
fn a_datagram_that_cannot_be_sent_fails_no_other_client() {
    let backend = Peer::new(Kind::Udp);
    let (target, address) = (backend.target.clone(), backend.address.clone());
    drop(backend);
    let front = Peer::udp("[::]:0");
    let port = front.port();
    let words = ["--backend-wait=20s", &target];
    let proxy = Proxy::start_at(front, &words, |launch| launch);
    // It fits into a datagram of IPv6, and into none of IPv4.
    let long = client_of(format!("[::1]:{port}").parse().unwrap());
    long.send(&[1; 65_520]).unwrap();
    let clients: Vec<_> = (0..5)
        .map(|_| {
            let client = client_of(format!("127.0.0.1:{port}").parse().unwrap());
            client.send(b"short").unwrap();
            client
        })
        .collect();
    proxy.wait_until("too long", || proxy.dropped("too_long") == 1);
    let socket = datagram_socket(&address);
    socket.bind(&address).unwrap();
    answer(&socket, |datagram| datagram);
    for client in &clients {
        assert_eq!(receive(client), b"short");
    }
}

#[test]
fn sessions_without_room_for_what_they_hold_starve_no_other() {
    let options = ["--ready=connect"];
    let service = Service::start(Kind::Udp, Kind::Udp, &options, &["up=0.5"]);
    let clients: Vec<_> = (0..40).map(|_| service.proxy.client()).collect();
    for (client, sessions) in clients.iter().zip(1..) {
        // 40 of them are more than a listener holds. Its socket's queue is not to be the limit.
        client.send(&[b'x'; 50_000]).unwrap();
        service.proxy.wait_for_sessions(sessions);
    }
    let last = service.proxy.client();
    last.send(b"the last").unwrap();
    answered(&last, "the last");
}

#[test]
fn a_proxy_that_exits_when_idle_waits_with_its_clients() {
    let backend = Peer::new(Kind::Udp);
    let (target, address) = (backend.target.clone(), backend.address.clone());
    drop(backend);
    let options = ["--backend-wait=20s", "--exit-idle-time=500ms"];
    let proxy = Proxy::start(Kind::Udp, &target, &options);
    let client = proxy.client();
    client.send(b"held").unwrap();
    pause(Duration::from_millis(1500));
    let socket = datagram_socket(&address);
    socket.bind(&address).unwrap();
    assert_eq!(receive(&socket), b"held");
}

#[test]
fn a_session_with_nothing_to_hold_keeps_nothing_running() {
    let backend = Peer::new(Kind::Udp);
    let options = ["--backend-wait=infinity", "--exit-idle-time=500ms", "--proxy-protocol=v2"];
    let proxy = Proxy::start(Kind::Udp, &backend.target, &options);
    let Proxy { mut running, front, .. } = proxy;
    // With its header it is too long.
    front.client().send(&[1; 65_500]).unwrap();
    assert_eq!(running.wait().code(), Some(0));
}

#[test]
fn a_datagram_comes_once_after_ready_by_notification() {
    for settings in [["up=0.1", "ready=0"], ["up=0.1", "ready=0.05"], ["up=0.1", "ready=0.15"]] {
        let service = Service::start(Kind::Udp, Kind::Udp, &["--ready=notify"], &settings);
        let client = service.proxy.client();
        service.ask(&client, "once");
        assert!(is_silent(&client), "{settings:?}");
        assert_eq!(service.logged("got"), ["once"]);
    }
}
