//! `--source=client`: the shipped sets isolated and source-client, and what `socket-proxyd-units --isolate`
//! writes. Servers that know nothing of a proxy log the addresses of clients beyond a cable.

use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use crate::container::{Container, Suite, Test};
use crate::support::*;
use tokio::time::Instant;

const TESTS: [Test; 5] = [
    ("servers in the example isolated log the addresses of clients", isolated),
    ("servers behind the example source-client log the addresses of clients", host),
    ("a COMMAND of the example source-client inherits no capability", command),
    ("the examples isolated and source-client name what is missing", missing_parts),
    ("servers in generated isolated units log the addresses of clients", generated),
];

pub(crate) fn register(suite: &Arc<Suite>, trials: &mut Trials) {
    if let Some(missing) = Container::missing().or_else(missing) {
        return trials.skip("systemd: --source=client", missing);
    }
    suite.in_turn(trials, &TESTS);
}

fn missing() -> Option<&'static str> {
    let needed = [
        ("/usr/sbin/ip", "iproute2"),
        ("/usr/sbin/nginx", "nginx"),
        ("/usr/sbin/sshd", "openssh-server"),
        ("/usr/bin/ssh", "openssh-client"),
        ("/usr/sbin/dnsmasq", "dnsmasq-base"),
        ("/usr/bin/dig", "bind9-dnsutils"),
    ];
    let missing = needed.into_iter().find(|(file, _)| !Path::new(file).exists());
    missing.map(|(_, name)| name)
}

pub(crate) fn boot() -> Container {
    let container = Container::boot(&Container::files());
    container.write("/etc/hosts", "127.0.0.1 localhost\n::1 localhost\n");
    // Drop-ins make servers of these.
    for unit in [ON_HOST.server, "own.service"] {
        container.write(&format!("/run/systemd/system/{unit}"), "[Service]\n");
    }
    container.run(&["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", "/etc/server.key"]);
    container
}

/// A server that logs its clients, at a PORT of both loopback addresses.
struct Server {
    /// The settings of its service.
    settings: &'static str,
    /// What a client runs. HOST is ADDRESS as a URL has it.
    client: &'static str,
    /// A part of the line for the client at ADDRESS.
    line: &'static str,
}

const SERVERS: [Server; 3] = [
    Server {
        settings: "DynamicUser=yes\nRuntimeDirectory=server\n\
                   ExecStart=/usr/sbin/nginx -c /etc/server-PORT.conf\n",
        client: "curl -sS --max-time 20 http://HOST:PORT/",
        line: "ADDRESS - - [",
    },
    Server {
        settings: "DynamicUser=no\nRuntimeDirectory=sshd\n\
                   ExecStart=/usr/sbin/sshd -D -e -f /dev/null -h /etc/server.key -o UsePAM=no \
                   -o ListenAddress=127.0.0.1:PORT -o ListenAddress=[::1]:PORT\n",
        client: "ssh -F none -o BatchMode=yes -o StrictHostKeyChecking=no \
                 -o UserKnownHostsFile=/dev/null -p PORT absent@ADDRESS",
        line: "Invalid user absent from ADDRESS port ",
    },
    // Over UDP.
    Server {
        settings: "DynamicUser=yes\n\
                   ExecStart=/usr/sbin/dnsmasq --keep-in-foreground --conf-file=/dev/null --pid-file= \
                   --user= --no-resolv --no-hosts --address=/example.test/192.0.2.53 --port=PORT \
                   --listen-address=127.0.0.1,::1 --bind-interfaces --log-queries --log-facility=-\n",
        client: "dig +tries=1 +time=20 -p PORT @ADDRESS example.test",
        line: "query[A] example.test from ADDRESS",
    },
];

const NGINX: &str = "\
daemon off;
pid /run/server/pid;
error_log stderr;
events {}
http {
    access_log syslog:server=unix:/dev/log,nohostname;
    client_body_temp_path /run/server/body;
    proxy_temp_path /run/server/proxy;
    fastcgi_temp_path /run/server/fastcgi;
    uwsgi_temp_path /run/server/uwsgi;
    scgi_temp_path /run/server/scgi;
    server {
        listen 127.0.0.1:PORT;
        listen [::1]:PORT;
        return 200;
    }
}
";

/// Units that a server is put into.
struct Units<'a> {
    /// The port of clients, for TCP and UDP.
    port: u16,
    socket: &'a str,
    proxy: &'a str,
    /// The service of the server, and where it listens.
    server: &'a str,
    server_port: u16,
    /// Whether the proxy starts the server.
    is_on_demand: bool,
}

impl Units<'_> {
    /// Runs each server, and asserts that it logs the address of a client of each IP family.
    fn log_clients(&self, container: &Container) {
        let clients = Clients::of(container);
        let port = self.server_port.to_string();
        container.write(&format!("/etc/server-{port}.conf"), &NGINX.replace("PORT", &port));
        for server in SERVERS {
            let drop_in = format!("/run/systemd/system/{}.d/server.conf", self.server);
            let settings = server.settings.replace("PORT", &port);
            container.write(&drop_in, &format!("[Service]\nExecStart=\n{settings}"));
            container.reload();
            self.stop(container);
            if !self.is_on_demand {
                container.run(&["systemctl", "start", self.server]);
            }
            container.run(&["systemctl", "start", self.socket]);
            for (from, to) in CLIENTS.into_iter().zip(HOST) {
                let printed = clients.run(server.client, to, self.port);
                let line = server.line.replace("ADDRESS", from);
                wait_for_line(container, self.server, &line, &printed);
            }
        }
    }

    fn stop(&self, container: &Container) {
        container.run(&["systemctl", "stop", self.socket, self.proxy, self.server]);
    }
}

/// Clients beyond a cable, which ends with them.
struct Clients(NetworkNamespace);

impl Clients {
    fn of(container: &Container) -> Self {
        Self(container.clients())
    }

    /// Runs a client, and returns what it prints.
    fn run(&self, line: &str, address: &str, port: u16) -> String {
        let host = if address.contains(':') { format!("[{address}]") } else { address.into() };
        let line = line.replace("HOST", &host).replace("ADDRESS", address);
        let line = line.replace("PORT", &port.to_string());
        let words: Vec<_> = line.split_whitespace().collect();
        let output = self.0.inside(|| Command::new(words[0]).args(&words[1..]).output().unwrap());
        let bytes = [output.stdout, output.stderr].concat();
        format!("{line}\n{}", String::from_utf8_lossy(&bytes))
    }
}

impl Drop for Clients {
    fn drop(&mut self) {
        // The end of a namespace takes a while.
        self.0.run("ip link delete cable");
    }
}

/// Waits for a line in the journal of a unit.
fn wait_for_line(container: &Container, unit: &str, line: &str, printed: &str) {
    let mut journal = String::new();
    let found = poll_until(Instant::now() + TIMEOUT, || {
        journal = container.run(&["journalctl", "--no-pager", "-o", "cat", "-u", unit]);
        journal.contains(line).then_some(())
    });
    assert!(found.is_some(), "{unit}: no {line:?} after {printed}\nin\n{journal}");
}

/// Asserts that a unit runs as a dynamic user with these capabilities, and passes none on.
fn assert_privileges(container: &Container, unit: &str, capabilities: &str) {
    let pid = &container.show(unit)["MainPID"];
    let status = container.run(&["cat", &format!("/proc/{pid}/status")]);
    let value = |name: &str| {
        let values = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        values.split_whitespace().next().unwrap().to_string()
    };
    assert_ne!(value("Uid:"), "0", "{unit}");
    assert_eq!(value("CapPrm:"), capabilities, "{unit}");
    assert_eq!(value("CapAmb:"), NONE, "{unit}");
}

const NONE: &str = "0000000000000000";
const NET_RAW: &str = "0000000000002000";

/// Writes a drop-in of this test's.
fn drop_in(container: &Container, unit: &str, text: &str) {
    container.write(&format!("/run/systemd/system/{unit}.d/test.conf"), text);
    container.reload();
}

fn remove_drop_ins(container: &Container) {
    container.run(&["sh", "-c", "rm -rf /run/systemd/system/*.d"]);
    container.reload();
}

fn isolated(container: &Container) {
    let units = Units {
        port: 38801,
        socket: "isolated-proxy.socket",
        proxy: "isolated-proxy.service",
        server: "isolated-app.service",
        server_port: 8080,
        is_on_demand: true,
    };
    let ports = "[Socket]\nListenStream=\nListenStream=38801\nListenDatagram=38801\n";
    drop_in(container, units.socket, ports);
    units.log_clients(container);
    assert_privileges(container, units.proxy, NONE);
    // The namespace of the proxy has the routes already.
    container.run(&["systemctl", "restart", units.server]);
    container.run(&["systemctl", "restart", units.proxy]);
    units.stop(container);
    // An application that cannot start leaves neither a namespace nor routes to the proxy.
    drop_in(container, units.server, "[Service]\nExecStartPre=false\n");
    container.run(&["systemctl", "start", units.proxy]);
    units.stop(container);
    remove_drop_ins(container);
}

const ON_HOST: Units<'static> = Units {
    port: 8087,
    socket: "source-client.socket",
    proxy: "source-client.service",
    server: "server.service",
    server_port: 18087,
    is_on_demand: false,
};

fn host(container: &Container) {
    let rules = |family: &str| container.run(&["ip", family, "rule"]);
    let [ipv4, ipv6] = ["-4", "-6"].map(rules);
    drop_in(container, ON_HOST.socket, "[Socket]\nListenDatagram=8087\n");
    // As some distributions have it.
    container.run(&["sysctl", "-qw", "net.ipv4.conf.all.rp_filter=1"]);
    ON_HOST.log_clients(container);
    assert_privileges(container, ON_HOST.proxy, NET_RAW);
    ON_HOST.stop(container);
    assert_ne!([rules("-4"), rules("-6")], [&*ipv4, &*ipv6]);
    container.run(&["systemctl", "restart", "source-client-routes.service"]);
    container.run(&["systemctl", "stop", "source-client-routes.service"]);
    assert_eq!([rules("-4"), rules("-6")], [ipv4, ipv6]);
    for family in ["-4", "-6"] {
        let routes = container.output(&["ip", family, "route", "show", "table", "123"]);
        assert_eq!(String::from_utf8_lossy(&routes.stdout), "");
    }
    remove_drop_ins(container);
}

fn command(container: &Container) {
    let text = "[Service]\nMemoryDenyWriteExecute=no\nExecStart=\nExecStart=/usr/bin/socket-proxyd \
                --source=client localhost:18087 -- \
                sh -c 'grep Cap /proc/self/status; exec python3 -m http.server -b :: 18087'\n";
    drop_in(container, ON_HOST.proxy, text);
    container.run(&["systemctl", "start", ON_HOST.socket]);
    let clients = Clients::of(container);
    for (from, to) in CLIENTS.into_iter().zip(HOST) {
        let printed = clients.run("curl -sS --max-time 20 http://HOST:PORT/", to, ON_HOST.port);
        wait_for_line(container, ON_HOST.proxy, &format!("{from} - - ["), &printed);
    }
    for set in ["CapPrm", "CapAmb"] {
        wait_for_line(container, ON_HOST.proxy, &format!("{set}:\t{NONE}"), "COMMAND");
    }
    container.run(&["systemctl", "stop", ON_HOST.socket, ON_HOST.proxy]);
    remove_drop_ins(container);
}

fn missing_parts(container: &Container) {
    // A host with a network, unlike a namespace that has only lo.
    let _clients = Clients::of(container);
    let isolated = "isolated-proxy.service";
    for (changed, setting, service, message) in [
        (
            "source-client.service",
            "AmbientCapabilities=",
            "source-client.service",
            "--source=client needs CAP_NET_RAW to connect from the IPv4 addresses of clients. (Set \
             AmbientCapabilities=CAP_NET_RAW.)",
        ),
        (
            "source-client-routes.service",
            "ExecStart=\nExecStart=true",
            "source-client.service",
            "--source=client needs a route for the answers to IPv4 addresses of clients. (Run: ip rule \
             add from 127.0.0.0/8 iif lo table 123; ip route add local 0.0.0.0/0 dev lo table 123.)",
        ),
        (
            isolated,
            "ExecStartPre=",
            isolated,
            "--source=client needs a route that makes every IPv4 address local to this network namespace. \
             (Run: ip route add local 0.0.0.0/0 dev lo.)",
        ),
        // IPv6 is the second command.
        (
            isolated,
            "ExecStartPre=\nExecStartPre=+ip route replace local 0.0.0.0/0 dev lo",
            isolated,
            "--source=client needs a route that makes every IPv6 address local to this network namespace. \
             (Run: ip -6 route add local ::/0 dev lo.)",
        ),
    ] {
        container.run(&["systemctl", "stop", "source-client-routes.service"]);
        drop_in(container, changed, &format!("[Service]\n{setting}\n"));
        let words = ["systemctl", "start", service];
        assert!(!container.output(&words).status.success(), "{changed}: {setting}");
        // Without -u: the process may be gone before journald looks for its unit.
        let is_logged = || {
            let journal = container.run(&["journalctl", "--no-pager", "-o", "cat"]);
            journal.contains(message).then_some(())
        };
        let logged = poll_until(Instant::now() + TIMEOUT, is_logged);
        assert!(logged.is_some(), "no {message:?} with {setting}");
        remove_drop_ins(container);
        container.run(&["systemctl", "reset-failed", service]);
    }
    let sockets = ["isolated-proxy.socket", "source-client.socket", "isolated-app.service"];
    container.run(&[&["systemctl", "stop"], &sockets[..]].concat());
}

fn generated(container: &Container) {
    let units = Units {
        port: 38811,
        socket: "own-proxy.socket",
        proxy: "own-proxy.service",
        server: "own.service",
        server_port: 38812,
        is_on_demand: true,
    };
    let write = |words: &[&str]| {
        let write = ["socket-proxyd-units", "--write", "--isolate"];
        container.run(&[&write[..], words].concat());
    };
    let (tcp, udp, target) = ("--listen=38811", "--listen=udp:38811", "--target=localhost:38812");
    write(&[tcp, udp, target, "--service=own", "--source=client", "own"]);
    units.log_clients(container);
    assert_privileges(container, units.proxy, NONE);

    // Without the option, all clients are the proxy.
    write(&[tcp, udp, "--target=127.0.0.1:38812", "--service=own", "own"]);
    container.reload();
    units.stop(container);
    container.run(&["systemctl", "start", units.socket]);
    {
        let clients = Clients::of(container);
        let printed = clients.run(SERVERS[2].client, HOST[0], units.port);
        let line = "query[A] example.test from 127.0.0.1";
        wait_for_line(container, units.server, line, &printed);
    }
    units.stop(container);
    remove_drop_ins(container);

    let words = ["--listen=38821", "--target=localhost:38822", "--source=client", "direct", "--"];
    let program = ["/usr/bin/python3", "-m", "http.server", "-b", "::", "38822"];
    write(&[&words[..], &program[..]].concat());
    container.reload();
    container.run(&["systemctl", "start", "direct-proxy.socket"]);
    let clients = Clients::of(container);
    for (from, to) in CLIENTS.into_iter().zip(HOST) {
        let printed = clients.run("curl -sS --max-time 20 http://HOST:PORT/", to, 38821);
        wait_for_line(container, "direct-proxy.service", &format!("{from} - - ["), &printed);
    }
    assert_privileges(container, "direct-proxy.service", NONE);
    container.run(&["systemctl", "stop", "direct-proxy.socket", "direct-proxy.service"]);
}
