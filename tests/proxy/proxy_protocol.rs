//! PROXY headers, read by those whose backends they are for: nginx, which logs the client's address,
//! and HAProxy, which ends a connection whose header it doesn't understand.

use std::fs;
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr};
use std::path::Path;

use crate::support::*;
use tempfile::TempDir;
use tokio::time::Instant;

/// Whether a program is installed. Otherwise says that the test is skipped.
fn is_installed(program: &str) -> bool {
    let is_installed = Path::new(program).exists();
    if !is_installed {
        skip("PROXY headers", program);
    }
    is_installed
}

/// Starts a server with this configuration, and waits until it answers at an address.
fn start_server(
    program: &str,
    flags: &[&str],
    configuration: &Path,
    address: SocketAddr,
) -> Running {
    let launch = Launch::new(program).args(flags).arg(configuration.display());
    let mut server = launch.start();
    let deadline = Instant::now() + TIMEOUT;
    let answers = poll_until(deadline, || {
        assert!(server.is_running(), "{program}: {}", server.lines.all());
        std::net::TcpStream::connect(address).ok()
    });
    answers.expect("the server answers");
    server
}

#[test]
fn nginx_logs_the_client_address() {
    let nginx = "/usr/sbin/nginx";
    if !is_installed(nginx) {
        return;
    }
    let directory = TempDir::new().unwrap();
    let (path, port) = (directory.path(), free_port());
    let (configuration, log) = (path.join("nginx.conf"), path.join("access.log"));
    let user = if rustix::process::geteuid().is_root() { "user root;" } else { "" };
    let text = format!(
        "{user} daemon off; worker_processes 1; pid {directory}/pid; error_log /dev/null crit;\n\
         events {{ worker_connections 64; }}\n\
         http {{\n  log_format client '$proxy_protocol_addr $proxy_protocol_port $request_uri';\n  \
         access_log {log} client;\n  client_body_temp_path {directory}/body;\n  \
         proxy_temp_path {directory}/proxy; fastcgi_temp_path {directory}/fastcgi;\n  \
         uwsgi_temp_path {directory}/uwsgi; scgi_temp_path {directory}/scgi;\n  \
         server {{ listen 127.0.0.1:{port} proxy_protocol; location / {{ return 200 seen; }} }}\n}}\n",
        directory = path.display(),
        log = log.display(),
    );
    fs::write(&configuration, text).unwrap();
    let target = SocketAddr::from(([127, 0, 0, 1], port));
    let _nginx = start_server(nginx, &["-c"], &configuration, target);
    for version in ["v1", "v2"] {
        for address in ["127.0.0.1", "::1"] {
            let address: IpAddr = address.parse().unwrap();
            let front = Endpoint::tcp(&SocketAddr::new(address, 0).to_string(), 16);
            let option = format!("--proxy-protocol={version}");
            let launch = Launch::new(OURS).args([&option, &target.to_string()]);
            let _proxy = launch.listener(&front).start();
            let mut client = front.connect();
            let request = format!("GET /{version} HTTP/1.0\r\n\r\n");
            client.write_all(request.as_bytes()).unwrap();
            let mut answer = String::new();
            client.read_to_string(&mut answer).unwrap();
            assert!(answer.ends_with("\r\n\r\nseen"), "{answer}");
            let port = client.local_addr().unwrap().as_socket().unwrap().port();
            let line = format!("{address} {port} /{version}\n");
            let logged = || fs::read_to_string(&log).is_ok_and(|log| log.contains(&line));
            let deadline = Instant::now() + TIMEOUT;
            let found = poll_until(deadline, || logged().then_some(()));
            found.unwrap_or_else(|| panic!("{line} in {:?}", fs::read_to_string(&log)));
        }
    }
}

#[test]
fn haproxy_accepts_clients_of_every_family() {
    let haproxy = "/usr/sbin/haproxy";
    if !is_installed(haproxy) {
        return;
    }
    let directory = TempDir::new().unwrap();
    let (configuration, port) = (directory.path().join("haproxy.cfg"), free_port());
    let backend = echo_backend(Family::Tcp);
    let text = format!(
        "defaults\n  mode tcp\n  timeout connect 10s\n  timeout client 1m\n  timeout server 1m\n\
         listen test\n  bind 127.0.0.1:{port} accept-proxy\n  server echo {}\n",
        backend.target
    );
    fs::write(&configuration, text).unwrap();
    let target = SocketAddr::from(([127, 0, 0, 1], port));
    let _haproxy = start_server(haproxy, &["-db", "-f"], &configuration, target);
    let fronts =
        || [Endpoint::new(Family::Tcp), Endpoint::tcp("[::1]:0", 16), Endpoint::new(Family::Unix)];
    for version in ["v1", "v2"] {
        for front in fronts() {
            let option = format!("--proxy-protocol={version}");
            let launch = Launch::new(OURS).args([&option, &target.to_string()]);
            let _proxy = launch.listener(&front).start();
            let answer = exchange(&mut front.connect(), b"are you there?");
            assert!(answer.is_ok_and(|it| it == b"are you there?"), "{version} {}", front.target);
        }
    }
    // Without a header it ends the connection, so that what was shown above is shown.
    let front = Endpoint::new(Family::Unix);
    let _proxy = Launch::new(OURS).arg(target).listener(&front).start();
    assert!(exchange(&mut front.connect(), b"no header\r\n").is_err());
}
