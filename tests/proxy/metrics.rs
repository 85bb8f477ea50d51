//! `--metrics=`: what is counted, how scrapers are answered, and that they delay no client.

use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use crate::application::Service;
use crate::support::*;
use rustix::process::Signal;
use socket2::{Domain, SockAddr, Socket, Type};
use tempfile::TempDir;
use tokio::time::Instant;

/// A proxy that answers scrapers on a TCP port.
struct Scraped {
    proxy: Running,
    metrics: SocketAddr,
}

impl Scraped {
    fn start(launch: Launch) -> Self {
        Self::of(launch.arg("--metrics=127.0.0.1:0").start())
    }

    fn of(proxy: Running) -> Self {
        Self { metrics: metrics_address(&proxy), proxy }
    }

    fn stream(&self) -> TcpStream {
        let stream = TcpStream::connect(self.metrics).unwrap();
        stream.set_read_timeout(Some(TIMEOUT)).unwrap();
        stream
    }

    /// What is answered to one request.
    fn ask(&self, request: &str) -> String {
        ask(self.stream(), request)
    }

    fn text(&self) -> String {
        self.ask("GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
    }

    fn value(&self, series: &str) -> f64 {
        value(&self.text(), series)
    }

    /// Waits until a series has this value.
    fn wait_for(&self, series: &str, expected: f64) {
        let reached =
            poll_until(Instant::now() + TIMEOUT, || (self.value(series) == expected).then_some(()));
        assert!(reached.is_some(), "{series} is not {expected}: {}", self.text());
    }
}

fn ask(mut stream: impl Read + Write, request: &str) -> String {
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

fn value(text: &str, series: &str) -> f64 {
    let line = text.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
    line.unwrap_or_else(|| panic!("no {series} in {text}")).parse().unwrap()
}

/// Connections that were refused for this reason.
fn refused(series: impl Fn(&'static str) -> String, reason: &str) -> String {
    let series = series("socket_proxyd_connections_refused_total");
    series.replace('}', &format!(",reason=\"{reason}\"}}"))
}

fn labelled(name: &str, listener: &str, backend: &str) -> String {
    format!("{name}{{listener=\"{listener}\",backend=\"{backend}\"}}")
}

#[test]
fn counts_connections_and_bytes_by_listener_and_backend() {
    for threads in [1, 2] {
        let [web, api] = [Family::Tcp, Family::Unix].map(Endpoint::new);
        let (echo, gone) = (echo_backend(Family::Unix), Endpoint::new(Family::Tcp).target);
        let launch = Launch::new(OURS).listener(&web).listener(&api);
        let targets = [format!("web={}", echo.target), format!("api={gone}")];
        let launch = launch.env("LISTEN_FDNAMES", "web:api").args(["-c2", "--threads"]);
        let scraped = Scraped::start(launch.arg(threads).args(&targets));
        let series = |name, at: &Endpoint, named: &str, backend: &str| {
            labelled(name, &format!("{named} ({})", at.target), backend)
        };
        let web_series = |name| series(name, &web, "web", &echo.target);
        let api_series = |name| series(name, &api, "api", &gone);

        let mut clients = [web.connect(), web.connect()];
        clients.iter_mut().for_each(assert_echoes);
        scraped.wait_for(&web_series("socket_proxyd_connections_open"), 2.0);
        let third = read_all(&mut web.connect());
        assert_eq!(third.0, b"", "the connection limit is 2");
        scraped.wait_for(&refused(web_series, "limit"), 1.0);
        drop(clients);
        scraped.wait_for(&web_series("socket_proxyd_connections_open"), 0.0);
        let failed = read_all(&mut api.connect());
        assert_eq!(failed.0, b"", "there is no listener");
        scraped.wait_for(&api_series("socket_proxyd_connections_failed_total"), 1.0);

        let text = scraped.text();
        let value = |series: &str| value(&text, series);
        assert_eq!(value(&web_series("socket_proxyd_connections_total")), 2.0);
        assert_eq!(value(&api_series("socket_proxyd_connections_total")), 1.0);
        assert_eq!(value(&refused(api_series, "limit")), 0.0);
        assert_eq!(value("socket_proxyd_connections_max"), 2.0);
        let of = |backend: &str, more: &str| format!("{{backend=\"{backend}\"{more}}}");
        let connects = "socket_proxyd_connect_duration_seconds";
        assert_eq!(value(&format!("{connects}_count{}", of(&echo.target, ""))), 2.0);
        assert_eq!(value(&format!("{connects}_bucket{}", of(&echo.target, ",le=\"+Inf\""))), 2.0);
        assert!(value(&format!("{connects}_sum{}", of(&echo.target, ""))) > 0.0);
        let errors = |kind| {
            format!("socket_proxyd_connect_errors_total{}", of(&gone, &format!(",kind=\"{kind}\"")))
        };
        assert_eq!(value(&errors("refused")), 1.0);
        assert_eq!(value(&errors("timeout")), 0.0);
        let bytes = |direction| {
            let labels = of(&echo.target, &format!(",direction=\"{direction}\""));
            value(&format!("socket_proxyd_bytes_total{labels}"))
        };
        assert!(bytes("from_client") > 0.0);
        assert_eq!(bytes("from_client"), bytes("from_backend"), "an echo");
    }
}

#[test]
fn counts_waiting_clients_and_pipes() {
    let (listener, backend) = (Endpoint::new(Family::Tcp), free_port());
    let target = format!("127.0.0.1:{backend}");
    let launch = Launch::new(OURS).listener(&listener).args(["--backend-wait=1min", &target]);
    let scraped = Scraped::start(launch);
    let name = format!("unknown ({})", listener.target);
    let held = labelled("socket_proxyd_connections_waiting", &name, &target);
    let mut clients = [listener.connect(), listener.connect()];
    scraped.wait_for(&held, 2.0);
    scraped.wait_for(&labelled("socket_proxyd_connections_open", &name, &target), 2.0);
    let backend = Endpoint::tcp(&target, 16);
    let _accepted = [backend.accept(), backend.accept()];
    scraped.wait_for(&held, 0.0);
    assert_eq!(scraped.value("socket_proxyd_pipes"), 0.0);
    // Until the backend takes no more.
    clients[0].set_nonblocking(true).unwrap();
    let bulk = random_bytes(1, 1 << 20);
    let pipes = poll_until(Instant::now() + TIMEOUT, || {
        while clients[0].write(&bulk).is_ok() {}
        (scraped.value("socket_proxyd_pipes") > 0.0).then_some(())
    });
    pipes.expect("bulk goes through a pipe");
}

#[test]
fn counts_starts_of_command() {
    let (listener, port) = (Endpoint::new(Family::Tcp), free_port());
    let target = format!("127.0.0.1:{port}");
    let launch = Launch::new(OURS).listener(&listener).args([&target, "--backend-wait=1min"]);
    // The options come in front of the target, so the address of the metrics does, too.
    let launch = launch.args(["--metrics=127.0.0.1:0", "--", "/bin/false"]);
    let scraped = Scraped::of(launch.start());
    let series = |name| format!("socket_proxyd_backend_{name}_total{{backend=\"{target}\"}}");
    for _ in 0..3 {
        assert_eq!(scraped.value(&series("starts")), 0.0, "a scrape starts nothing");
    }
    let _client = listener.connect();
    let failed = poll_until(Instant::now() + TIMEOUT, || {
        let text = scraped.text();
        let [all, failed] = ["starts", "start_failures"].map(|name| value(&text, &series(name)));
        assert!(all >= failed && all - failed <= 1.0);
        (failed >= 2.0).then_some(())
    });
    failed.expect("it fails again and again");
}

#[test]
fn counts_failed_probes() {
    let (listener, backend) = (Endpoint::new(Family::Tcp), echo_backend(Family::Tcp));
    let launch = Launch::new(OURS).listener(&listener);
    let options = ["--backend-wait=1min", "--ready=exec:false", &backend.target];
    let scraped = Scraped::start(launch.args(options));
    let name = "socket_proxyd_backend_probe_failures_total";
    let series = format!("{name}{{backend=\"{}\"}}", backend.target);
    assert_eq!(scraped.value(&series), 0.0, "a scrape probes nothing");
    let _client = listener.connect();
    let several =
        poll_until(Instant::now() + TIMEOUT, || (scraped.value(&series) >= 3.0).then_some(()));
    several.expect("one failure after another");
}

#[test]
fn counts_thaws() {
    let options = ["--freeze-idle-time=100ms", "--metrics=127.0.0.1:0"];
    let service = Service::start(Family::Tcp, &options, &[]);
    let first = service.pid();
    for _ in 0..2 {
        let count = service.proxy.lines.count("Freezing perl");
        let is_frozen = || (service.proxy.lines.count("Freezing perl") > count).then_some(());
        poll_until(Instant::now() + TIMEOUT, is_frozen).expect("it freezes again");
        assert_eq!(service.pid(), first);
    }
    let scraped = Scraped::of(service.proxy);
    let text = scraped.text();
    let thaws = text.lines().find(|it| it.starts_with("socket_proxyd_backend_thaws_total{"));
    let count = thaws.and_then(|line| line.rsplit_once(' ')?.1.parse::<u32>().ok());
    assert!((2..=3).contains(&count.unwrap()), "{text}");
}

#[test]
fn answers_only_metrics_and_in_the_requested_format() {
    let (listener, backend) = (Endpoint::new(Family::Tcp), echo_backend(Family::Tcp));
    let scraped = Scraped::start(Launch::new(OURS).listener(&listener).arg(&backend.target));
    for (request, status) in [
        ("GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n", "HTTP/1.1 200 OK"),
        ("GET /metrics?x=1 HTTP/1.1\r\nHost: x\r\n\r\n", "HTTP/1.1 200 OK"),
        ("GET /metrics HTTP/1.0\r\n\r\n", "HTTP/1.0 200 OK"),
        ("HEAD /metrics HTTP/1.1\r\nHost: x\r\n\r\n", "HTTP/1.1 200 OK"),
        ("GET / HTTP/1.1\r\nHost: x\r\n\r\n", "HTTP/1.1 404 Not Found"),
        ("POST /metrics HTTP/1.1\r\nHost: x\r\n\r\n", "HTTP/1.1 405 Method Not Allowed"),
        ("nonsense\r\n\r\n", "HTTP/1.1 400 Bad Request"),
    ] {
        let answer = scraped.ask(request);
        assert!(answer.starts_with(status), "{request}: {answer}");
        let body = answer.split_once("\r\n\r\n").unwrap().1;
        let has_metrics = body.contains("socket_proxyd_build_info");
        assert_eq!(has_metrics, request.starts_with("GET /metrics"), "{request}: {answer}");
    }
    let long = "GET /metrics HTTP/1.1\r\nHost: x\r\nX: ".to_string() + &"x".repeat(100_000);
    let mut stream = scraped.stream();
    let mut start = [0; 12];
    // It may be refused before all of it is sent.
    let _ = stream.write_all(long.as_bytes());
    match stream.read_exact(&mut start) {
        Ok(()) => assert_eq!(&start, b"HTTP/1.1 431"),
        Err(error) => assert_eq!(error.kind(), ErrorKind::ConnectionReset),
    }
    let text = scraped.text();
    assert!(text.contains("content-type: text/plain; version=0.0.4; charset=utf-8"), "{text}");
    let accept = "Accept: application/openmetrics-text;version=1.0.0,text/plain;q=0.5";
    let open = scraped.ask(&format!("GET /metrics HTTP/1.1\r\nHost: x\r\n{accept}\r\n\r\n"));
    let kind = "content-type: application/openmetrics-text; version=1.0.0; charset=utf-8";
    assert!(open.contains(kind) && open.ends_with("# EOF\n"), "{open}");
}

#[test]
fn scrapers_do_not_delay_the_idle_exit() {
    let (listener, backend) = (Endpoint::new(Family::Tcp), echo_backend(Family::Tcp));
    let launch = Launch::new(OURS).listener(&listener).args(["--exit-idle-time=500ms"]);
    let mut scraped = Scraped::start(launch.arg(&backend.target));
    // Never half a second without a scraper.
    let mut scrapers = Vec::new();
    let exited = poll_until(Instant::now() + TIMEOUT, || {
        scrapers.extend(TcpStream::connect(scraped.metrics));
        scraped.proxy.child.try_wait().unwrap()
    });
    assert_eq!(exited.expect("it exits").code(), Some(0));
}

/// As nc -N does; it reads slowly.
#[test]
fn answers_a_slow_scraper_that_has_half_closed() {
    let (listener, backend) = (Endpoint::new(Family::Tcp), echo_backend(Family::Tcp));
    let scraped = Scraped::start(Launch::new(OURS).listener(&listener).arg(&backend.target));
    let mut stream = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    stream.set_recv_buffer_size(2304).unwrap();
    stream.connect(&scraped.metrics.into()).unwrap();
    stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    let (answer, end) = read_all(&mut stream);
    end.unwrap();
    let text = String::from_utf8(answer).unwrap();
    assert!(text.contains("socket_proxyd_pipes 0\n"), "{text}");
}

#[test]
fn accepts_a_passed_socket_and_a_unix_path() {
    let backend = echo_backend(Family::Tcp);
    let [clients, scrapers] = [Family::Tcp, Family::Unix].map(Endpoint::new);
    let launch = |name| {
        let launch = Launch::new(OURS).listener(&clients).listener(&scrapers);
        let metrics = format!("--metrics=fd:{name}");
        launch.env("LISTEN_FDNAMES", "web:numbers").args([&metrics, &backend.target])
    };
    let proxy = launch("numbers").start();
    proxy.lines.wait_for("Serving metrics on numbers (");
    assert_echoes(&mut clients.connect());
    let request = "GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n";
    let text = ask(UnixStream::connect(&scrapers.target).unwrap(), request);
    let name = format!("web ({})", clients.target);
    let series = labelled("socket_proxyd_connections_total", &name, &backend.target);
    assert_eq!(value(&text, &series), 1.0);
    drop(proxy);

    // Its socket unit has failed, say: clients are served.
    let proxy = launch("other").start();
    proxy.lines.wait_for(
        "Failed to serve --metrics=fd:other: systemd passed no socket of that name. (Its .socket \
         unit must be active and set FileDescriptorName=.)",
    );
    assert_echoes(&mut clients.connect());
    drop(proxy);

    let directory = TempDir::new().unwrap();
    let path = directory.path().join("metrics");
    let mut proxy = Launch::new(OURS)
        .listener(&clients)
        .args([format!("--metrics={}", path.display()), backend.target.clone()])
        .start();
    proxy.lines.wait_for("Serving metrics on /");
    let text = ask(UnixStream::connect(&path).unwrap(), request);
    assert_eq!(value(&text, "socket_proxyd_connections_max"), 256.0);
    proxy.signal(Signal::TERM);
    assert!(proxy.wait().success());
    assert!(!path.exists(), "its socket file stayed");
}

#[test]
fn answers_a_scraper_with_the_longest_name() {
    let (listener, backend) = (Endpoint::new(Family::Tcp), echo_backend(Family::Tcp));
    let directory = TempDir::new().unwrap();
    let metrics = directory.path().join("metrics");
    let option = format!("--metrics={}", metrics.display());
    let launch = Launch::new(OURS).listener(&listener).args([&option, &backend.target]);
    let proxy = launch.start();
    proxy.lines.wait_for("Serving metrics on ");
    // All of sun_path: the kernel gives its address with a NUL behind that.
    let mut path = directory.path().as_os_str().as_encoded_bytes().to_vec();
    path.push(b'/');
    path.resize(108, b'x');
    for _ in 0..2 {
        let scraper = Socket::new(Domain::UNIX, Type::STREAM, None).unwrap();
        scraper.bind(&unix_address(&path)).unwrap();
        scraper.connect(&SockAddr::unix(&metrics).unwrap()).unwrap();
        let answer = ask(scraper, "GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n");
        assert_eq!(value(&answer, "socket_proxyd_connections_max"), 256.0);
        std::fs::remove_file(std::ffi::OsStr::from_bytes(&path)).unwrap();
    }
}

#[test]
fn rejects_invalid_and_used_addresses() {
    let taken = Endpoint::new(Family::Tcp);
    let metrics = format!("--metrics={}", taken.target);
    let in_use =
        if cfg!(target_env = "musl") { "Address in use" } else { "Address already in use" };
    for (option, line) in [
        (
            "--metrics=fd:",
            "invalid value 'fd:' for '--metrics <ADDRESS>': fd: stands before the FileDescriptorName= of a passed socket",
        ),
        (
            "--metrics=vsock:1:2",
            "invalid value 'vsock:1:2' for '--metrics <ADDRESS>': it must be a TCP or Unix socket",
        ),
        (
            "--metrics=99999",
            "invalid value '99999' for '--metrics <ADDRESS>': port 99999 is above 65535",
        ),
        (&metrics, &format!("{metrics}: Failed to listen on {}: {in_use}.", taken.target)),
    ] {
        let (code, _, stderr) = run(&OURS.into(), &[option, "--listen=127.0.0.1:0", "/nowhere"]);
        // The listeners come first, and their addresses are logged.
        assert_eq!((code, stderr.lines().last()), (Some(1), Some(line)));
    }
}

/// With --listen= the passed socket is for scrapers only, and stored connections may belong to no listener.
#[test]
fn counts_restored_connections() {
    let (scrapers, systemd) = (Endpoint::new(Family::Tcp), FakeSystemd::with_fd_store(8));
    let (port, backend) = (free_port(), echo_backend(Family::Tcp));
    let listen = format!("--listen=127.0.0.1:{port}");
    let start = |listen: &str, target: &str| {
        let words = ["--metrics=fd:front", "--handover=restart", listen, target];
        let proxy = Launch::new(OURS).args(words).listener(&scrapers).stored_by(&systemd).start();
        systemd.wait_for("READY=1");
        proxy
    };
    let text = || {
        let stream = TcpStream::connect(&*scrapers.target).unwrap();
        ask(stream, "GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
    };
    let mut first = start(&listen, &backend.target);
    let mut client = connect(&SocketAddr::from(([127, 0, 0, 1], port)).into());
    assert_echoes(&mut client);
    assert_eq!(value(&text(), "socket_proxyd_handover_connections_total"), 0.0);
    first.signal(Signal::TERM);
    assert!(first.wait().success());

    let mut second = start(&listen, &backend.target);
    assert_echoes(&mut client);
    let name = format!("127.0.0.1:{port}");
    let after = text();
    let series =
        |name: &str, listener: &str, target: &str| value(&after, &labelled(name, listener, target));
    assert_eq!(value(&after, "socket_proxyd_handover_connections_total"), 1.0);
    assert_eq!(series("socket_proxyd_connections_open", &name, &backend.target), 1.0);
    assert_eq!(series("socket_proxyd_connections_total", &name, &backend.target), 0.0);
    second.signal(Signal::TERM);
    assert!(second.wait().success());

    // Its listener is no longer configured.
    let _third = start("--listen=[::1]:0", &backend.target);
    assert_echoes(&mut client);
    let after = text();
    let others = labelled("socket_proxyd_connections_open", "other", "other");
    assert_eq!(value(&after, &others), 1.0);
}

/// Bytes of answers that the kernel keeps for scrapers, and for how many of them.
fn untaken(metrics: SocketAddr) -> (usize, usize) {
    let sockets = tcp_sockets(metrics.port());
    let queued = |words: &Vec<String>| {
        let (sent, _) = words[4].split_once(':')?;
        usize::from_str_radix(sent, 16).ok().filter(|bytes| *bytes > 0)
    };
    let queues: Vec<_> = sockets.iter().filter_map(queued).collect();
    (queues.iter().sum(), queues.len())
}

/// Whether a scraper whose time is over is closed.
fn is_let_go(stream: &mut impl Read) -> bool {
    match stream.read_to_end(&mut Vec::new()) {
        Ok(_) => true,
        Err(error) => error.kind() == ErrorKind::ConnectionReset,
    }
}

/// 200 that say nothing, one that says a byte now and then, 200 that ask and never read.
#[test]
fn silent_and_stalled_scrapers_delay_no_other() {
    let _turn = busy();
    let backend = echo_backend(Family::Tcp);
    // Many listeners, so that an answer is long.
    let fronts: Vec<_> = (0..40).map(|_| Endpoint::new(Family::Tcp)).collect();
    let launch = fronts.iter().fold(Launch::new(OURS), Launch::listener);
    let targets = fronts.iter().map(|front| format!(":{}={}", front.port(), backend.target));
    let scraped = Scraped::start(launch.args(targets));
    // What the thread makes once is there.
    let answer = scraped.text().len();
    assert!(answer > 16_000);
    let (before, resident) = (scraped.proxy.descriptors(), scraped.proxy.resident());
    let mut silent: Vec<_> = (0..200).map(|_| scraped.stream()).collect();
    let mut slow = scraped.stream();
    slow.write_all(b"G").unwrap();
    let mut never_read: Vec<_> = (0..200)
        .map(|_| {
            let stream = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
            stream.set_recv_buffer_size(2304).unwrap();
            stream.connect(&scraped.metrics.into()).unwrap();
            // A scraper may be closed once its time is over.
            let _ = (&stream).write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n");
            stream
        })
        .collect();
    assert_eq!(scraped.value("socket_proxyd_connections_max"), 256.0);
    assert!(scraped.proxy.descriptors() <= before + 260, "256, and those that give way");
    let now = scraped.proxy.resident();
    let (bytes, scrapers) = untaken(scraped.metrics);
    // Linux 6.1 takes 30 kB for a scraper with so small a window. The process keeps the buffer with the rest.
    let is_in_kernel = bytes >= scrapers * answer;
    let kept = if is_in_kernel { 0 } else { scrapers * answer * 2 / 1024 };
    let most = (resident as f64 * 1.1) as usize + kept;
    assert!(now <= most, "{resident} KiB before, {now} KiB now, {answer} bytes an answer");
    assert!(scrapers > 0, "no answer waits in the kernel");
    assert!(scrapers <= 260 && bytes <= 260 * 64 * 1024, "{bytes} bytes for {scrapers}");
    // All are let go, whatever they do, and nothing stays behind.
    assert!(is_let_go(&mut slow));
    assert!(silent.iter_mut().all(is_let_go) && never_read.iter_mut().all(is_let_go));
    assert!(is_let_go(&mut scraped.stream()), "alone, after two seconds");
    assert_eq!(untaken(scraped.metrics), (0, 0));
    assert!(scraped.proxy.descriptors() <= before);
    assert_echoes(&mut fronts[0].connect());
}

/// Scrapers from one address or from many, which say nothing, and one across a network: its request comes
/// this long after its handshake.
fn answered_beside_a_flood(addresses: u8, delay: Duration) -> usize {
    let (listener, backend) = (Endpoint::new(Family::Tcp), echo_backend(Family::Tcp));
    let scraped = Scraped::start(Launch::new(OURS).listener(&listener).arg(&backend.target));
    let connect = |from: [u8; 4]| {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        socket.bind(&SocketAddr::from((from, 0)).into()).unwrap();
        socket.connect(&scraped.metrics.into()).unwrap();
        socket
    };
    let is_over = AtomicBool::new(false);
    thread::scope(|scope| {
        for thread in 0..3 {
            let (connect, is_over) = (&connect, &is_over);
            scope.spawn(move || {
                let mut silent = VecDeque::new();
                for number in 0_usize.. {
                    if is_over.load(Ordering::Relaxed) {
                        return;
                    }
                    let address = number % usize::from(addresses);
                    silent.push_back(connect([127, 9, thread, 1 + address as u8]));
                    // Far more than there are places.
                    if silent.len() > 500 {
                        reset(silent.pop_front().unwrap());
                    }
                    pause(Duration::from_millis(1));
                }
            });
        }
        let ask = || {
            let honest = connect([127, 0, 0, 2]);
            honest.set_read_timeout(Some(TIMEOUT)).unwrap();
            pause(delay);
            let asked = (&honest).write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n");
            let (answer, _) = read_all(&mut honest.try_clone().unwrap());
            asked.is_ok() && answer.starts_with(b"HTTP/1.1 200 OK")
        };
        let answered = (0..20).filter(|_| ask()).count();
        is_over.store(true, Ordering::Relaxed);
        answered
    })
}

#[test]
fn flood_from_one_address_delays_no_other() {
    let _turn = busy();
    assert_eq!(answered_beside_a_flood(1, Duration::from_millis(20)), 20);
}

#[test]
fn flood_from_many_addresses_delays_no_other() {
    let _turn = busy();
    assert_eq!(answered_beside_a_flood(250, Duration::from_millis(20)), 20);
}

/// Runs a program of Debian's package prometheus.
fn debians(program: &str) -> Option<Command> {
    let path = format!("/usr/bin/{program}");
    if !std::path::Path::new(&path).exists() {
        skip("Prometheus", &path);
        return None;
    }
    Some(Command::new(path))
}

#[test]
fn promtool_accepts_the_metrics() {
    let Some(mut promtool) = debians("promtool") else { return };
    let (listener, backend) = (Endpoint::new(Family::Tcp), echo_backend(Family::Tcp));
    let scraped = Scraped::start(Launch::new(OURS).listener(&listener).arg(&backend.target));
    assert_echoes(&mut listener.connect());
    let text = scraped.text();
    let body = text.split_once("\r\n\r\n").unwrap().1;
    let mut child = promtool
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(body.as_bytes()).unwrap();
    let Output { status, stdout, stderr } = child.wait_with_output().unwrap();
    let words = [stdout, stderr].concat();
    assert_eq!(String::from_utf8_lossy(&words), "");
    assert!(status.success());
}

/// Ended with the test.
struct Prometheus(Child);

impl Drop for Prometheus {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn prometheus_scrapes_while_clients_come_and_go() {
    let Some(mut prometheus) = debians("prometheus") else { return };
    let (listener, backend) = (Endpoint::new(Family::Tcp), echo_backend(Family::Unix));
    let scraped = Scraped::start(Launch::new(OURS).listener(&listener).arg(&backend.target));
    let directory = TempDir::new().unwrap();
    let config = directory.path().join("prometheus.yml");
    let metrics = scraped.metrics;
    let text = format!(
        "global: {{scrape_interval: 1s}}\n\
         scrape_configs: [{{job_name: proxy, static_configs: [{{targets: ['{metrics}']}}]}}]\n"
    );
    std::fs::write(&config, text).unwrap();
    let web = SocketAddr::from(([127, 0, 0, 1], free_port()));
    let child = prometheus
        .arg(format!("--config.file={}", config.display()))
        .arg(format!("--storage.tsdb.path={}", directory.path().join("data").display()))
        .arg(format!("--web.listen-address={web}"))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let _prometheus = Prometheus(child);
    // What it knows of a series.
    let query = |series: &str| -> Option<f64> {
        let mut stream = TcpStream::connect(web).ok()?;
        stream.set_read_timeout(Some(TIMEOUT)).unwrap();
        let request = format!("GET /api/v1/query?query={series} HTTP/1.0\r\n\r\n");
        stream.write_all(request.as_bytes()).ok()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).ok()?;
        let json: serde_json::Value =
            serde_json::from_str(answer.split_once("\r\n\r\n")?.1).ok()?;
        json["data"]["result"][0]["value"][1].as_str()?.parse().ok()
    };
    let mut clients = 0;
    let deadline = Instant::now() + 3 * TIMEOUT;
    let seen = poll_until(deadline, || {
        assert_echoes(&mut listener.connect());
        clients += 1;
        let all = query("sum(socket_proxyd_connections_total)")?;
        // Some of them, and some later.
        (all > 0.0 && all < f64::from(clients)).then_some(all)
    });
    let before = seen.expect("Prometheus counts connections");
    poll_until(deadline, || {
        assert_echoes(&mut listener.connect());
        (query("sum(socket_proxyd_connections_total)")? > before).then_some(())
    })
    .expect("and goes on counting");
    assert_eq!(query("up"), Some(1.0));
    assert_eq!(query("socket_proxyd_build_info"), Some(1.0));
    let types = query("count(socket_proxyd_connect_duration_seconds_bucket)").unwrap();
    assert!(types >= 2.0, "buckets: {types}");
}
