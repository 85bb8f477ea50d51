//! `--ready=http:` and `--ready=exec:`: clients wait for a backend that accepts before it can serve.

use std::fs;
use std::io::{Read, Write};
use std::net::SocketAddr;
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::command::signals;
use crate::support::*;
use socket2::{SockAddr, Socket};
use tempfile::TempDir;
use tokio::time::Instant;

/// A backend that accepts at once, and answers 503 until it is ready.
struct Backend {
    endpoint: Endpoint,
    /// What was asked, up to the empty line.
    requests: Arc<Mutex<Vec<Vec<u8>>>>,
}

impl Backend {
    fn start(endpoint: Endpoint, time: Duration) -> Self {
        Self::answering(endpoint, time, "200 OK\r\n")
    }

    /// `answer` has the status and the headers of a backend that is ready.
    fn answering(endpoint: Endpoint, time: Duration, answer: &str) -> Self {
        let (requests, ready, answer) = (Arc::default(), Instant::now() + time, answer.to_string());
        let heard: Arc<Mutex<Vec<Vec<u8>>>> = Arc::clone(&requests);
        serve(&endpoint, move |mut socket| {
            let mut request = Vec::new();
            let mut buffer = [0; 4096];
            while !(contains(&request, b"GET ") && request.ends_with(b"\r\n\r\n")) {
                match socket.read(&mut buffer) {
                    Ok(bytes) if bytes > 0 => request.extend_from_slice(&buffer[..bytes]),
                    _ => return,
                }
            }
            heard.lock().unwrap().push(request);
            let is_ready = Instant::now() >= ready;
            let answer = if is_ready { &*answer } else { "503 Service Unavailable\r\n" };
            let _ = socket.write_all(format!("HTTP/1.1 {answer}\r\n").as_bytes());
        });
        Self { endpoint, requests }
    }

    /// The requests for a path.
    fn requests(&self, path: &str) -> Vec<Vec<u8>> {
        let line = format!("GET {path} ");
        let mut requests = self.requests.lock().unwrap().clone();
        requests.retain(|request| contains(request, line.as_bytes()));
        requests
    }
}

fn contains(bytes: &[u8], part: &[u8]) -> bool {
    bytes.windows(part.len()).any(|window| window == part)
}

/// Starts a proxy for this backend.
fn proxy(options: &[&str], target: &str) -> (Running, Endpoint) {
    let front = Endpoint::new(Family::Tcp);
    let launch = Launch::new(OURS).listener(&front).args(options).arg(target);
    (launch.start(), front)
}

fn request(front: &SockAddr) -> Socket {
    let mut client = connect(front);
    client.write_all(b"GET / HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n").unwrap();
    client
}

/// Returns the status that a client gets.
fn status(client: &mut Socket) -> String {
    let answer = String::from_utf8(read_all(client).0).unwrap();
    answer.split(' ').nth(1).unwrap_or_default().into()
}

fn get(front: &SockAddr) -> String {
    status(&mut request(front))
}

const WAIT: &str = "--backend-wait=30s";
const HEALTH: &str = "--ready=http:/health?full=1";

#[test]
fn first_client_is_served_as_soon_as_the_backend_is_ready() {
    for family in [Family::Tcp, Family::Unix] {
        let backend = Backend::start(Endpoint::new(family), Duration::from_secs(3));
        let (_plain, plain) = proxy(&[WAIT], &backend.endpoint.target);
        assert_eq!(get(&plain.address), "503");
        let (proxy, front) = proxy(&[WAIT, HEALTH], &backend.endpoint.target);
        assert_eq!(get(&front.address), "200");
        let said = "GET /health?full=1: 503 Service Unavailable, holding clients for up to 30s.";
        proxy.lines.wait_for(&format!("{} is not ready: {said}", backend.endpoint.target));
        let probes = backend.requests("/health?full=1");
        assert!((10..=16).contains(&probes.len()), "{} probes", probes.len());
        let probe = String::from_utf8(probes[0].clone()).unwrap();
        let host = if family == Family::Tcp { &*backend.endpoint.target } else { "localhost" };
        assert!(probe.starts_with("GET /health?full=1 HTTP/1.1\r\n"), "{probe}");
        assert!(probe.contains(&format!("\r\nHost: {host}\r\n")), "{probe}");
        assert!(probe.contains("\r\nConnection: close\r\n"), "{probe}");
        assert_eq!(get(&front.address), "200");
        assert_eq!(backend.requests("/health?full=1").len(), probes.len(), "it is known to be");
        assert_eq!(backend.requests("/").len(), 3, "each client has a connection of its own");
    }
}

#[test]
fn two_hundred_clients_cause_one_probe_at_a_time() {
    let _turn = measuring();
    raise_descriptor_limit();
    for (family, threads) in [(Family::Tcp, "1"), (Family::Unix, "1"), (Family::Tcp, "4")] {
        let backend = Backend::start(Endpoint::new(family), Duration::from_secs(3));
        let threads = format!("--threads={threads}");
        let (proxy, front) = proxy(&[WAIT, HEALTH, &threads], &backend.endpoint.target);
        let before = proxy.cpu();
        let mut clients: Vec<_> = (0..200).map(|_| request(&front.address)).collect();
        for client in &mut clients {
            assert_eq!(status(client), "200");
        }
        let spent = proxy.cpu() - before;
        let probes = backend.requests("/health?full=1").len();
        assert!((10..=16).contains(&probes), "{probes} probes");
        // 0.15 s, and three times as much in a debug build beside other tests.
        let most = if cfg!(debug_assertions) { 450 } else { 150 };
        assert!(spent < Duration::from_millis(most), "{spent:?} of CPU");
        assert_eq!(proxy.lines.count("holding clients"), 1, "logged once");
    }
}

#[test]
fn redirect_counts_and_is_not_followed() {
    let answer = "302 Found\r\nLocation: /elsewhere\r\n";
    let backend = Backend::answering(Endpoint::new(Family::Tcp), Duration::ZERO, answer);
    let (_proxy, front) = proxy(&[WAIT, "--ready=http:/health"], &backend.endpoint.target);
    assert_eq!(get(&front.address), "302");
    assert_eq!(backend.requests("/elsewhere").len(), 0);
}

#[test]
fn answer_of_more_than_16_kib_is_no_answer() {
    let answer = format!("200 OK\r\nX-Long: {}\r\n", "x".repeat(16 * 1024));
    let backend = Backend::answering(Endpoint::new(Family::Tcp), Duration::ZERO, &answer);
    let options = ["--backend-wait=500ms", "--ready=http:/"];
    let (proxy, front) = proxy(&options, &backend.endpoint.target);
    assert_eq!(get(&front.address), "");
    let line = proxy.lines.wait_for(". (--backend-wait=500ms is over.)");
    assert!(line.contains("is not ready: GET /: message head is too large"), "{line}");
}

#[test]
fn probe_sends_a_proxy_header_without_an_address() {
    for (version, header) in
        [("v1", &b"PROXY UNKNOWN\r\n"[..]), ("v2", b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0")]
    {
        for family in [Family::Tcp, Family::Unix] {
            let backend = Backend::start(Endpoint::new(family), Duration::ZERO);
            let option = format!("--proxy-protocol={version}");
            let (_proxy, front) = proxy(&[WAIT, HEALTH, &option], &backend.endpoint.target);
            assert_eq!(get(&front.address), "200");
            let probes = backend.requests("/health?full=1");
            let start = [header, b"GET /health"].concat();
            assert!(probes[0].starts_with(&start), "{}", probes[0].escape_ascii());
        }
    }
}

#[test]
fn backend_that_was_down_is_probed_again() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("app");
    let first = Backend::start(Endpoint::unix(&path, 64), Duration::ZERO);
    let (proxy, front) = proxy(&[WAIT, "--ready=http:/health"], path.to_str().unwrap());
    assert_eq!([get(&front.address), get(&front.address)], ["200", "200"]);
    assert_eq!(first.requests("/health").len(), 1);
    fs::remove_file(&path).unwrap();
    let mut client = request(&front.address);
    let printed = proxy.lines.wait_for("holding clients");
    assert!(printed.contains("No such file or directory"), "{printed}");
    let second = Backend::start(Endpoint::unix(&path, 64), Duration::from_millis(700));
    assert_eq!(status(&mut client), "200");
    assert!(second.requests("/health").len() > 1);
}

#[test]
fn unused_backend_is_probed_again() {
    let start = || {
        let backend = Backend::start(Endpoint::new(Family::Tcp), Duration::ZERO);
        let (proxy, front) = proxy(&[WAIT, "--ready=http:/health"], &backend.endpoint.target);
        (backend, proxy, front)
    };
    let (unused, used) = (start(), start());
    let mut open = used.2.connect();
    for (backend, _, front) in [&unused, &used] {
        assert_eq!(get(&front.address), "200");
        assert_eq!(backend.requests("/health").len(), 1);
    }
    pause(Duration::from_millis(10_500));
    for ((backend, _, front), probes) in [(&unused, 2), (&used, 1)] {
        assert_eq!([get(&front.address), get(&front.address)], ["200", "200"]);
        assert_eq!(backend.requests("/health").len(), probes);
    }
    open.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    assert_eq!(status(&mut open), "200");
}

#[test]
fn address_that_does_not_answer_delays_no_probe() {
    if !is_root_for("a name with an address that does not answer") {
        return;
    }
    let port = free_port();
    let _silent = SilentAddress::new(&SocketAddr::from(([127, 0, 0, 1], port)).into());
    let endpoint = Endpoint::tcp(&format!("127.0.0.2:{port}"), 64);
    let backend = Backend::start(endpoint, Duration::from_millis(500));
    let directory = TempDir::new().unwrap();
    let hosts = directory.path().join("hosts");
    fs::write(&hosts, "127.0.0.1 late.test\n127.0.0.2 late.test\n").unwrap();
    let front = Endpoint::new(Family::Tcp);
    let launch = Launch::new(OURS).listener(&front).hosts(hosts).args([WAIT, HEALTH]);
    let _proxy = launch.arg(format!("late.test:{port}")).start();
    let start = Instant::now();
    assert_eq!(get(&front.address), "200");
    let took = start.elapsed();
    assert!(took < Duration::from_secs(5), "after {took:?}");
    let probe = String::from_utf8(backend.requests("/health?full=1")[0].clone()).unwrap();
    assert!(probe.contains(&format!("Host: late.test:{port}\r\n")), "{probe}");
}

/// An application that answers 503 for a second.
const APPLICATION: &str = "use IO::Socket::INET; my $start = time; \
    my $server = IO::Socket::INET->new(LocalAddr => $ARGV[0], Listen => 64, ReuseAddr => 1); \
    while (my $client = $server->accept) { \
        while (<$client>) { $path = $1 if m{^GET (\\S+)}; last if /^\\r\\n/ } \
        kill KILL => $$ if $path eq '/end'; \
        print $client time > $start + 1 ? \"HTTP/1.1 200 $$\\r\\n\\r\\n\" \
            : \"HTTP/1.1 503 Not yet\\r\\n\\r\\n\"; \
    }";

#[test]
fn command_is_ready_when_a_probe_succeeds() {
    let (front, target) = (Endpoint::new(Family::Tcp), format!("127.0.0.1:{}", free_port()));
    let launch = Launch::new(OURS).listener(&front).arg("--ready=http:/health");
    let proxy = launch.args([&*target, "--", "perl", "-e", APPLICATION, &target]).start();
    let mut processes = Vec::new();
    for _ in 0..2 {
        let mut clients: Vec<_> = (0..20).map(|_| request(&front.address)).collect();
        for client in &mut clients {
            let answer = String::from_utf8(read_all(client).0).unwrap();
            let process = answer.strip_prefix("HTTP/1.1 200 ").map(|it| it.trim().to_string());
            processes.push(process.unwrap_or_else(|| panic!("{answer:?}")));
        }
        proxy.lines.wait_for("perl is ready after ");
        // Earlier, its end would count as a failed start.
        pause(Duration::from_secs(1));
        connect(&front.address).write_all(b"GET /end HTTP/1.1\r\n\r\n").unwrap();
        proxy.lines.wait_for("perl has ended");
    }
    processes.dedup();
    assert_eq!(processes.len(), 2, "both were ready: {processes:?}");
    let after = |time| proxy.lines.count(&format!("perl is ready after {time}"));
    assert_eq!(after(""), 2);
    assert_eq!(after("1.") + after("2."), 2, "neither was as soon as it accepted");
}

#[test]
fn command_that_a_probe_finds_unready_is_named() {
    let (front, target) = (Endpoint::new(Family::Tcp), format!("127.0.0.1:{}", free_port()));
    let launch =
        Launch::new(OURS).listener(&front).args(["--backend-wait=1s", "--ready=exec:false"]);
    let proxy = launch.args([&target, "--", "sleep", "60"]).start();
    assert_eq!(get(&front.address), "");
    let line = proxy.lines.wait_for(". (--backend-wait=1s is over.)");
    assert!(line.contains("is not ready: false: exit status: 1, but sleep runs"), "{line}");
}

/// Runs a probe that writes to a file, in front of an echo backend.
fn exec(script: &str, launch: impl FnOnce(Launch) -> Launch) -> (Running, Endpoint, TempDir) {
    let (front, directory) = (Endpoint::new(Family::Tcp), TempDir::new().unwrap());
    let file = directory.path().join("file");
    let option = format!("--ready=exec:sh -c '{script}' \"{}\"", file.display());
    let backend = echo_backend(Family::Tcp);
    let proxy = Launch::new(OURS).listener(&front).args([WAIT, &option, &backend.target]);
    (launch(proxy).start(), front, directory)
}

#[test]
fn probe_command_gets_target_and_nothing_of_the_proxy() {
    let systemd = FakeSystemd::new();
    let script = "env >$0; readlink /proc/self/fd/* >>$0; cat /proc/self/status >>$0";
    let (_proxy, front, directory) = exec(script, |launch| {
        let given = fs::File::open("/etc/hostname").unwrap();
        let launch = launch.socket(&given).env("LISTEN_FDS", 1);
        let launch = launch.notify(&systemd).env("WATCHDOG_USEC", 20_000_000);
        launch.signals("--ignore-signal=PIPE").signals("--ignore-signal=HUP")
    });
    assert_echoes(&mut front.connect());
    let text = fs::read_to_string(directory.path().join("file")).unwrap();
    assert!(text.contains("\nTARGET=127.0.0.1:") && text.contains("PATH="), "{text}");
    for name in ["LISTEN_PID=", "LISTEN_FDS=", "NOTIFY_SOCKET=", "WATCHDOG_USEC="] {
        assert!(!text.contains(name), "{name} in {text}");
    }
    assert!(!text.contains("socket:") && !text.contains("/etc/hostname"), "{text}");
    assert!(text.contains("\n/dev/null\n"), "standard input: {text}");
    assert_eq!(signals(&text), [1 << 12 | 1, 0], "SIGPIPE and SIGHUP");
    assert!(text.contains("\nNoNewPrivs:\t0\n"), "{text}");
}

#[test]
fn probe_command_that_hangs_is_killed_with_its_children() {
    let script = "sleep 60 & echo $$ $! >>$0; wait";
    let (proxy, front, directory) = exec(script, |launch| launch);
    let _client = front.connect();
    let started = Instant::now();
    let line = proxy.lines.wait_for("holding clients");
    let took = started.elapsed();
    assert!(line.contains("is not ready: sh: no answer within 2s, "), "{line}");
    assert!(took > Duration::from_secs(2) && took < Duration::from_secs(4), "after {took:?}");
    let text = fs::read_to_string(directory.path().join("file")).unwrap();
    for process in text.lines().next().unwrap().split(' ') {
        let ended = || (!is_alive(process)).then_some(());
        poll_until(Instant::now() + Duration::from_secs(1), ended).expect("it is killed");
    }
}

#[test]
fn probe_command_leaves_no_children() {
    let (_proxy, front, directory) = exec("sleep 60 & echo $! >>$0", |launch| launch);
    assert_echoes(&mut front.connect());
    let text = fs::read_to_string(directory.path().join("file")).unwrap();
    let ended = || (!is_alive(text.trim())).then_some(());
    poll_until(Instant::now() + Duration::from_secs(1), ended).expect("it is killed");
}

#[test]
fn probe_command_ends_with_the_last_client() {
    let (_proxy, front, directory) = exec("echo $$ >>$0; sleep 60", |launch| launch);
    let client = front.connect();
    let file = directory.path().join("file");
    let pid = || fs::read_to_string(&file).ok().filter(|text| text.ends_with('\n'));
    let process = poll_until(Instant::now() + TIMEOUT, pid).unwrap();
    reset(client);
    let ended = || (!is_alive(process.trim())).then_some(());
    poll_until(Instant::now() + Duration::from_secs(1), ended).expect("it is killed");
    assert_eq!(fs::read_to_string(&file).unwrap(), process, "and not started again");
}

/// Whether a process runs. A zombie does not.
fn is_alive(process: &str) -> bool {
    let stat = fs::read_to_string(format!("/proc/{process}/stat"));
    stat.is_ok_and(|stat| !stat.rsplit_once(')').unwrap().1.starts_with(" Z"))
}

#[test]
fn clients_wait_until_postgresql_accepts_queries() {
    let Some(postgres) = Postgres::start() else { return };
    let socket = postgres.directory.path().join(".s.PGSQL.5432");
    let probe = format!("--ready=exec:pg_isready -qh '{}'", postgres.directory.path().display());
    let plain = proxy(&[WAIT], socket.to_str().unwrap());
    let refused = postgres.log_in(&plain.1);
    assert_eq!(refused.first(), Some(&b'E'), "{}", refused.escape_ascii());
    let (proxy, front) = proxy(&[WAIT, &probe], socket.to_str().unwrap());
    let mut client = postgres.startup_packet(&front);
    proxy.lines.wait_for("is not ready: pg_isready: exit status: 1, holding clients");
    postgres.run(&["pg_ctl", "promote", "-w"]);
    let mut answer = [0];
    client.read_exact(&mut answer).unwrap();
    assert_eq!(answer, *b"R", "AuthenticationOk");
}

/// A server that recovers, and so accepts connections only to refuse them, until it is promoted.
struct Postgres {
    directory: TempDir,
}

impl Postgres {
    fn start() -> Option<Self> {
        let programs = fs::read_dir("/usr/lib/postgresql").ok();
        if programs.is_none() || !is_root_for("PostgreSQL") {
            skip("--ready=exec:", "postgresql");
            return None;
        }
        let directory = TempDir::new().unwrap();
        let status = Command::new("chown").arg("postgres").arg(directory.path()).status();
        assert!(status.unwrap().success());
        let this = Self { directory };
        this.run(&["initdb", "-A", "trust", "-U", "postgres", "--no-sync"]);
        let data = this.directory.path().join("data");
        fs::write(data.join("standby.signal"), "").unwrap();
        let settings = format!(
            "listen_addresses = ''\nunix_socket_directories = '{}'\nhot_standby = off\nfsync = off\n",
            this.directory.path().display()
        );
        fs::write(data.join("postgresql.auto.conf"), settings).unwrap();
        this.run(&["pg_ctl", "start", "-W", "-l", "/dev/null"]);
        Some(this)
    }

    /// Runs a program of the server as its user.
    fn run(&self, words: &[&str]) {
        let data = self.directory.path().join("data");
        let mut programs = fs::read_dir("/usr/lib/postgresql").unwrap();
        let program = programs.next().unwrap().unwrap().path().join("bin").join(words[0]);
        let mut command = Command::new("setpriv");
        command.args(["--reuid=postgres", "--regid=postgres", "--clear-groups"]);
        command.arg(program).args(&words[1..]).env("PGDATA", data).current_dir("/");
        let output = command.output().unwrap();
        assert!(output.status.success(), "{words:?}: {output:?}");
    }

    fn startup_packet(&self, front: &Endpoint) -> Socket {
        let parameters = b"user\0postgres\0database\0postgres\0\0";
        let length = (8 + parameters.len()) as u32;
        let mut client = front.connect();
        let version = 3_u32 << 16;
        let packet = [&length.to_be_bytes(), &version.to_be_bytes(), &parameters[..]].concat();
        client.write_all(&packet).unwrap();
        client
    }

    /// Returns the answer of a server that refuses.
    fn log_in(&self, front: &Endpoint) -> Vec<u8> {
        read_all(&mut self.startup_packet(front)).0
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        self.run(&["pg_ctl", "stop", "-m", "immediate"]);
    }
}

#[test]
fn rejects_wrong_values() {
    for (args, message) in [
        (&["--ready=http:x"][..], "PATH must begin with /"),
        (&["--ready=exec:sh 'a"], "a quote is not closed"),
        (&["--ready=exec:no-such-thing -q"], "\"no-such-thing\": it is not in $PATH"),
        (&["--ready=exec:/etc/passwd"], "it is not executable"),
        (&["--ready=notify"], "--ready=notify needs a COMMAND"),
    ] {
        let args = [&["--backend-wait=1s"], args, &["127.0.0.1:1"]].concat();
        let (code, stdout, stderr) = run(&OURS.into(), &args);
        assert_eq!((code, &*stdout), (Some(1), ""), "{args:?}: {stderr}");
        assert!(stderr.contains(message) && stderr.lines().count() == 1, "{args:?}: {stderr}");
    }
    for option in ["--ready=connect", "--ready=http:/", "--ready=exec:true"] {
        let (code, _, stderr) = run(&OURS.into(), &[option, "127.0.0.1:1"]);
        assert_eq!(code, Some(1));
        assert_eq!(
            stderr,
            "--ready= needs a COMMAND, a --start-command=, or a --backend-wait= above 0."
        );
    }
}
