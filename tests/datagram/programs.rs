//! Real programs over the proxy: dnsmasq, dig, dnsperf, unbound, logger.

use std::fs;
use std::process::{Child, Command, Stdio};

use tempfile::TempDir;
use tokio::time::Instant;

use crate::peers::*;
use crate::support::*;

/// A program that ends with the test.
struct Server(Child);

impl Server {
    fn start(words: &[&str]) -> Self {
        let mut command = Command::new(words[0]);
        Self(command.args(&words[1..]).stdin(Stdio::null()).spawn().unwrap())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn output(words: &[&str]) -> String {
    let output = Command::new(words[0]).args(&words[1..]).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{words:?}: {text}");
    text
}

const DNSMASQ: &str = "/usr/sbin/dnsmasq";
const DIG: &str = "/usr/bin/dig";
const DNSPERF: &str = "/usr/bin/dnsperf";

/// A DNS server as COMMAND, for both kinds of sockets on one port.
#[test]
fn dnsmasq_starts_for_the_first_query_and_answers_over_udp_and_tcp() {
    const TEST: &str = "dnsmasq_starts_for_the_first_query_and_answers_over_udp_and_tcp";
    if !are_installed_for(TEST, &[DNSMASQ, DIG, DNSPERF]) {
        return;
    }
    let (front, stream) = Peer::udp_and_tcp("127.0.0.1");
    let (port, own) = (front.port(), unused_address());
    let (own_ip, own_port) = (own.ip(), own.port());
    let options = format!(
        "--keep-in-foreground --conf-file=/dev/null --pid-file= --user=root --no-resolv --no-hosts \
         --address=/example.test/192.0.2.7 --listen-address={own_ip} --bind-interfaces --port={own_port}"
    );
    let target = own.to_string();
    let words = ["--stop-idle-time=2s", "--connections-max=2000", &target, "--", DNSMASQ];
    let words: Vec<_> = words.into_iter().chain(options.split_whitespace()).collect();
    let proxy = Proxy::start_at(front, &words, |launch| launch.listener(&stream));
    let port = port.to_string();
    // Without another try.
    let dig = [DIG, "@127.0.0.1", "-p", &port, "+short", "+tries=1", "+time=10", "a.example.test"];
    for over in ["+notcp", "+tcp", "+notcp"] {
        assert_eq!(output(&[&dig[..], &[over]].concat()), "192.0.2.7\n", "{over}");
    }
    proxy.running.lines.wait_for("Starting dnsmasq, ");
    let directory = TempDir::new().unwrap();
    let queries = directory.path().join("queries");
    fs::write(&queries, (0..1000).map(|it| format!("n{it}.example.test A\n")).collect::<String>())
        .unwrap();
    for mode in ["udp", "tcp"] {
        // dnsmasq ends a connection after 100 queries.
        let perf = [DNSPERF, "-s", "127.0.0.1", "-p", &port, "-m", mode, "-n", "1", "-c", "20"];
        let report = output(&[&perf[..], &["-d", queries.to_str().unwrap()]].concat());
        let lost = report.lines().find(|line| line.contains("Queries lost:"));
        assert!(lost.is_some_and(|line| line.contains(" 0 (0.00%)")), "{mode}: {report}");
        let code = report.lines().find(|line| line.contains("Response codes:"));
        assert!(code.is_some_and(|line| line.contains("NOERROR 1000")), "{mode}: {report}");
    }
    assert_eq!(proxy.value("datagrams_dropped_total", &[]), 0);
    assert_eq!(proxy.value("backend_starts_total", &[]), 1);
}

/// unbound(8) reads the header of each datagram, and of each connection.
#[test]
fn unbound_sees_the_client_by_the_proxy_protocol() {
    const TEST: &str = "unbound_sees_the_client_by_the_proxy_protocol";
    const UNBOUND: &str = "/usr/sbin/unbound";
    if !are_installed_for(TEST, &[UNBOUND, DIG]) {
        return;
    }
    let (directory, own) = (TempDir::new().unwrap(), unused_address());
    let (own_ip, own_port) = (own.ip(), own.port());
    let (config, log) = (directory.path().join("conf"), directory.path().join("log"));
    let text = format!(
        "server:\n interface: {own_ip}@{own_port}\n proxy-protocol-port: {own_port}\n username: \"\"\n \
         chroot: \"\"\n pidfile: \"\"\n use-syslog: no\n logfile: \"{}\"\n log-queries: yes\n \
         do-daemonize: no\n directory: \"{}\"\n local-zone: \"test.\" static\n \
         local-data: \"example.test. A 192.0.2.8\"\n access-control: 127.0.0.10/32 refuse\n\
         remote-control:\n control-enable: no\n",
        log.display(),
        directory.path().display()
    );
    fs::write(&config, text).unwrap();
    let check = Command::new("/usr/sbin/unbound-checkconf").arg(&config).output().unwrap();
    if String::from_utf8_lossy(&check.stderr).contains("unknown keyword 'proxy-protocol-port'") {
        return skip(TEST, "unbound 1.17");
    }
    let _server = Server::start(&[UNBOUND, "-c", config.to_str().unwrap(), "-d"]);
    let (front, stream) = Peer::udp_and_tcp("[::]");
    let (port, target) = (front.port(), own.to_string());
    let words = ["--proxy-protocol=v2", "--backend-wait=20s", &target];
    let proxy = Proxy::start_at(front, &words, |launch| launch.listener(&stream));
    let port = port.to_string();
    let ask = |client: &str, server: &str, over: &str| {
        let server = format!("@{server}");
        let to = [DIG, &server, "-b", client, "-p", &port, over, "+tries=1", "+time=10"];
        output(&[&to[..], &["example.test"]].concat())
    };
    for over in ["+notcp", "+tcp"] {
        for (client, server) in [("127.0.0.9", "127.0.0.1"), ("::1", "::1")] {
            let answer = ask(client, server, over);
            assert!(answer.contains("192.0.2.8"), "{client} {over}: {answer}");
        }
        let refused = ask("127.0.0.10", "127.0.0.1", over);
        assert!(refused.contains("status: REFUSED"), "{over}: {refused}");
    }
    let logged = || {
        let log = fs::read_to_string(&log).unwrap();
        let is_logged =
            |client: &str| log.matches(&format!(" {client} example.test.")).count() == 2;
        (is_logged("127.0.0.9") && is_logged("::1")).then_some(())
    };
    assert!(poll_until(Instant::now() + TIMEOUT, logged).is_some(), "{log:?}");
    drop(proxy);
}

/// logger(1) writes to a Unix datagram socket, and names none of its own.
#[test]
fn logger_reaches_a_syslog_server() {
    const LOGGER: &str = "/usr/bin/logger";
    if !are_installed_for("logger_reaches_a_syslog_server", &[LOGGER]) {
        return;
    }
    for back in KINDS {
        let backend = Peer::new(back);
        let proxy = Proxy::start(Kind::Unix, &backend.target, &[]);
        for number in 0..20 {
            let message = format!("message {number}");
            output(&[LOGGER, "--socket", &proxy.front.target, "--socket-errors=on", &message]);
            let received = String::from_utf8(receive(&backend.socket)).unwrap();
            assert!(received.ends_with(&message), "{received}");
        }
        assert_eq!(proxy.sessions(), 1);
    }
}
