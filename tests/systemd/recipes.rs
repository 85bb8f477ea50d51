//! docs/recipes.md: each recipe's files and commands, as they are printed.

use std::io::{Read, Write};
use std::path::Path;
use std::sync::Arc;
use std::thread;

use crate::container::{Container, Suite, Test};
use crate::markdown::Section;
use crate::readme::{APPLICATION, remove, wait_for_page};
use crate::support::*;
use tokio::time::Instant;

const TESTS: [Test; 14] = [
    ("recipe shipped sets", shipped),
    ("recipe PostgreSQL", postgresql),
    ("recipe Redis", redis),
    ("recipe Podman", podman),
    ("recipe Docker", docker),
    ("recipe Without root", rootless),
    ("recipe Slow to become ready", slow),
    ("recipe Asleep while idle", frozen),
    ("recipe A machine that sleeps", machine),
    ("recipe TLS by nginx or Caddy", tls),
    ("recipe PROXY protocol", proxy_protocol),
    ("recipe Move from systemd-socket-proxyd", migration),
    ("recipe Beyond one machine", several_machines),
    ("recipe Settings of the socket unit", settings),
];

pub(crate) fn register(suite: &Arc<Suite>, trials: &mut Trials) {
    if let Some(missing) = Container::missing().or_else(missing) {
        return trials.skip("systemd: the recipes", missing);
    }
    suite.in_turn(trials, &TESTS);
    let names = trials.names();
    trials.add("each recipe has its test or a reason", move || marked(&names));
}

fn missing() -> Option<&'static str> {
    let needed = [
        ("/usr/bin/aptly", "aptly"),
        ("/usr/bin/redis-server", "redis-server"),
        ("/usr/bin/pg_ctlcluster", "postgresql"),
        ("/usr/sbin/nginx", "nginx"),
        ("/usr/sbin/haproxy", "haproxy"),
        ("/usr/bin/openssl", "openssl"),
        ("/usr/share/pam-configs/systemd", "libpam-systemd"),
    ];
    let missing = needed.into_iter().find(|(file, _)| !Path::new(file).exists());
    missing.map(|(_, name)| name).or_else(crate::units::missing)
}

fn recipe(title: &str) -> Section {
    Section::document("docs/recipes.md").below(title)
}

/// Writes the files of a recipe, and runs its commands.
fn set_up(container: &Container, title: &str) -> Section {
    let recipe = recipe(title);
    recipe.write(container);
    recipe.run(container);
    recipe
}

/// Removes the units of a recipe.
fn tear_down(container: &Container, recipe: &Section) {
    let units = [recipe.names(".socket"), recipe.names(".service")].concat();
    remove(container, &units.iter().map(|unit| &**unit).collect::<Vec<_>>());
}

fn address(port: u16) -> socket2::SockAddr {
    std::net::SocketAddr::from(([127, 0, 0, 1], port)).into()
}

/// What the units do is tested in units.rs; this is the way there.
fn shipped(container: &Container) {
    for title in [
        "### aptly",
        "### webhook",
        "### Radicale",
        "### yaq",
        "### A script",
        "### An isolated application",
        "### The client's address on a host",
    ] {
        let recipe = recipe(title);
        container.output(&["userdel", "aptly"]);
        recipe.run(container);
        let commands = recipe.blocks("sh").concat();
        let enable = commands.lines().find_map(|line| line.strip_prefix("systemctl enable --now "));
        for socket in enable.expect(title).split(' ') {
            assert_eq!(container.show(socket)["ActiveState"], "active", "{socket}");
            container.verify(socket);
            container.run(&["systemctl", "disable", "-q", "--now", socket]);
        }
    }
}

fn postgresql(container: &Container) {
    let user = "until pg_isready -qh /run/postgresql; do sleep 0.1; done; createuser app && psql -qc \
        \"set password_encryption = 'scram-sha-256'; alter user app password 'secret'\" && createdb -O app app";
    container.run(&["systemctl", "start", "postgresql.service"]);
    container.run(&["runuser", "-u", "postgres", "--", "sh", "-ec", user]);
    // The recipe's version is Debian 12's.
    let version = container.run(&["ls", "/usr/lib/postgresql"]);
    let recipe = recipe("## PostgreSQL").replacing("@15-", &format!("@{}-", version.trim()));
    let recipe = recipe.replacing("/15/", &format!("/{}/", version.trim()));
    recipe.write(container);
    recipe.run(container);
    let server = format!("postgresql@{}-main.service", version.trim());
    container.wait_for(&server, "ActiveState", "inactive");
    let address = "postgresql://app:secret@127.0.0.1/app";
    let ask = |query: &str| container.run(&["psql", "-Atc", query, address]).trim().to_string();
    assert_eq!(ask("create table kept as select 1 as one"), "SELECT 1");
    // A pool that keeps its connection is cut, and then the server stops.
    container.run(&[
        "systemd-run",
        "-q",
        "--unit=pool",
        "sh",
        "-c",
        &format!("sleep 600 | psql {address}"),
    ]);
    container.wait_for(&server, "ActiveState", "inactive");
    container.run(&["systemctl", "stop", "pool.service"]);
    assert_eq!(ask("select one from kept"), "1");
    tear_down(container, &recipe);
    container.run(&["systemctl", "stop", &server]);
}

fn redis(container: &Container) {
    let recipe = set_up(container, "## Redis");
    assert_eq!(container.show("redis-server.service")["ActiveState"], "inactive");
    let ask = |words: &[&str]| container.run(&[&["redis-cli"], words].concat()).trim().to_string();
    assert_eq!(ask(&["set", "kept", "1"]), "OK");
    let mut pool = container.inside(|| connect(&address(6379)));
    pool.write_all(b"PING\r\n").unwrap();
    let mut answer = [0; 7];
    pool.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"+PONG\r\n");
    assert!(is_reset(&read_all(&mut pool).1), "the idle connection ends");
    container.wait_for("redis-server.service", "ActiveState", "inactive");
    assert_eq!(ask(&["get", "kept"]), "1");
    tear_down(container, &recipe);
    container.run(&["systemctl", "stop", "redis-server.service"]);
}

/// Debian has it from 13 on.
const QUADLET: &str = "/usr/lib/systemd/system-generators/podman-system-generator";

fn podman(container: &Container) {
    let recipe = recipe("## Podman");
    recipe.write(container);
    // As far as the proxy meets the container. It takes a while to listen.
    let application = format!(
        "[Service]\nDynamicUser=yes\nType=exec\nExecStart=\nExecStop=\nExecStopPost=\n\
        ExecStart=/bin/sh -c 'sleep 1; {}'\n",
        APPLICATION.lines().find_map(|line| line.strip_prefix("ExecStart=")).unwrap()
    );
    if Path::new(QUADLET).exists() {
        let service = container.show("web.service");
        assert_eq!(service["FragmentPath"], "/run/systemd/generator/web.service");
        let published = " --publish 127.0.0.1:3000:80 docker.io/library/nginx:1.27 ";
        assert!(service["ExecStart"].contains(published), "{}", service["ExecStart"]);
    } else {
        container.write("/etc/systemd/system/web.service", "[Unit]\nStopWhenUnneeded=yes\n");
    }
    container.write("/etc/systemd/system/web.service.d/application.conf", &application);
    // Its commands reload systemd.
    recipe.run(container);
    for _ in 0..2 {
        wait_for_page(container, &["http://127.0.0.1:8080/"], "Directory listing");
        container.wait_for("web.service", "ActiveState", "inactive");
    }
    assert_eq!(container.show("web-proxy.socket")["ActiveState"], "active");
    let remove =
        "systemctl stop web; rm -r /etc/systemd/system/web.service* /etc/containers/systemd";
    container.run(&["sh", "-c", remove]);
    tear_down(container, &recipe);
}

/// What the recipe needs of docker(1): a container whose port answers at once, but is healthy only 2
/// seconds later.
const DOCKER: &str = r#"#!/bin/sh
case $1 in
    create) echo "$@" >/run/docker-create ;;
    start) setsid python3 /opt/slow 3000 >/dev/null 2>&1 & ;;
    stop) pkill -f '^python3 /opt/slow' ;;
esac
"#;

fn docker(container: &Container) {
    container.write("/usr/local/sbin/docker", DOCKER);
    container.write("/opt/slow", SLOW);
    container.run(&["chmod", "755", "/usr/local/sbin/docker", "/opt/slow"]);
    container.run(&["groupadd", "--system", "docker"]);
    let recipe = set_up(container, "## Docker");
    let running = || container.output(&["pgrep", "-f", "^python3 /opt/slow"]).stdout;
    for _ in 0..2 {
        let request = ["curl", "-sSf", "--max-time", "60", "http://127.0.0.1:8080/"];
        assert_eq!(container.run(&request), "served\n");
        let stopped = poll_until(Instant::now() + TIMEOUT, || running().is_empty().then_some(()));
        stopped.expect("the container stops when it is idle");
    }
    let words = container.run(&["cat", "/run/docker-create"]);
    assert!(words.ends_with("--publish=127.0.0.1:3000:80 nginx:1.27\n"), "{words}");
    tear_down(container, &recipe);
    container.run(&["rm", "/usr/local/sbin/docker"]);
}

fn rootless(container: &Container) {
    container.run(&["useradd", "--create-home", "anna"]);
    // systemd-logind 262 answers only processes of its container's cgroups.
    let loginctl = |verb| {
        let words = ["systemd-run", "--quiet", "--wait", "--pipe", "loginctl", verb, "anna"];
        container.run(&words);
    };
    loginctl("enable-linger");
    let uid = container.run(&["id", "-u", "anna"]).trim().to_string();
    container.wait_for(&format!("user@{uid}.service"), "ActiveState", "active");
    let recipe = recipe("## Without root");
    for (path, text) in recipe.files() {
        let path = path.replace('~', "/home/anna");
        container.write(&path, &text.replace("idle-time=10min", "idle-time=2s"));
    }
    container.run(&["chown", "-R", "anna:", "/home/anna"]);
    let directory = format!("XDG_RUNTIME_DIR=/run/user/{uid}");
    let as_anna = ["runuser", "-u", "anna", "--", "env", &directory];
    let commands = recipe.blocks("sh").concat();
    container.run(&[&as_anna[..], &["sh", "-exc", &commands]].concat());
    wait_for_page(container, &["http://127.0.0.1:8080/"], "Directory listing");
    let python = ["pgrep", "-u", "anna", "-f", "^/usr/bin/python3 -m http.server"];
    let stopped = poll_until(Instant::now() + TIMEOUT, || {
        container.output(&python).stdout.is_empty().then_some(())
    });
    stopped.expect("the application stops when it is idle");
    wait_for_page(container, &["http://127.0.0.1:8080/"], "Directory listing");
    loginctl("terminate-user");
    loginctl("disable-linger");
}

/// Answers at once, but is healthy only after 2 seconds.
const SLOW: &str = r#"#!/usr/bin/python3
import http.server, sys, time
start = time.monotonic()
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if time.monotonic() > start + 2 else 503)
        self.end_headers()
        self.wfile.write(b"served\n")
http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"#;

fn slow(container: &Container) {
    container.write("/opt/app/run", SLOW);
    container.run(&["chmod", "755", "/opt/app/run"]);
    let recipe = set_up(container, "## Slow to become ready");
    let running = || container.output(&["pgrep", "-f", "^/usr/bin/python3 /opt/app/run"]).stdout;
    for _ in 0..2 {
        let request = ["curl", "-sSf", "--max-time", "60", "http://127.0.0.1:8080/"];
        assert_eq!(container.run(&request), "served\n");
        let stopped = poll_until(Instant::now() + TIMEOUT, || running().is_empty().then_some(()));
        stopped.expect("the application stops when it is idle");
    }
    let service = container.show("slow.service");
    assert_eq!((&*service["ActiveState"], &*service["NRestarts"]), ("active", "0"));
    tear_down(container, &recipe);
}

fn frozen(container: &Container) {
    let recipe = set_up(container, "## Asleep while idle");
    for _ in 0..2 {
        wait_for_page(container, &["http://127.0.0.1:8080/"], "Directory listing");
        container.wait_for_status("sleepy.service", "0 of 256 connections");
        let status = || container.show("sleepy.service")["StatusText"].clone();
        let is_frozen = || status().ends_with("; python3 frozen").then_some(());
        poll_until(Instant::now() + TIMEOUT, is_frozen).expect("STATUS= says frozen");
    }
    tear_down(container, &recipe);
}

/// The machine is this one, with another address and a service that the magic packet starts.
fn machine(container: &Container) {
    container.run(&["ip", "address", "add", "192.0.2.7/32", "dev", "lo"]);
    container.write("/usr/bin/wakeonlan", "#!/bin/bash\necho >/dev/udp/127.0.0.1/9\n");
    container.run(&["chmod", "755", "/usr/bin/wakeonlan"]);
    let machine = "[Service]\nExecStart=/bin/sh -c 'socat -u UDP-RECVFROM:9 - && sleep 2 && exec python3 \
        -m http.server -b 192.0.2.7 -d /usr/share/doc 3000'\n";
    container.start_units(&[("machine.service", machine)]);
    let recipe = set_up(container, "## A machine that sleeps");
    let silent = ["socat", "-u", "-T1", "TCP:127.0.0.1:8080", "-"];
    container.output(&silent);
    let machine = ["curl", "-s", "--max-time", "1", "http://192.0.2.7:3000/"];
    assert!(!container.output(&machine).status.success(), "a silent client wakes nothing");
    wait_for_page(container, &["http://127.0.0.1:8080/"], "Directory listing");
    tear_down(container, &recipe);
    remove(container, &["machine.service"]);
    container.run(&["rm", "/usr/bin/wakeonlan"]);
}

fn tls(container: &Container) {
    let certificate = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=app.example.org \
        -keyout /etc/ssl/app.key -out /etc/ssl/app.pem";
    container.run(&["sh", "-c", certificate]);
    let recipe = set_up(container, "## TLS by nginx or Caddy");
    let url = "https://app.example.org/";
    let resolve = ["--cacert", "/etc/ssl/app.pem", "--resolve", "app.example.org:443:127.0.0.1"];
    wait_for_page(container, &[&resolve[..], &[url]].concat(), "Directory listing");
    let python = || container.output(&["pgrep", "-f", "^/usr/bin/python3 -m http.server"]).stdout;
    let stopped = poll_until(Instant::now() + TIMEOUT, || python().is_empty().then_some(()));
    stopped.expect("the application stops when it is idle");
    let request = [&["curl", "-sSf", "--max-time", "60"], &resolve[..], &[url]].concat();
    assert!(container.run(&request).contains("Directory listing"));
    container.run(&["systemctl", "stop", "nginx.service"]);
    container.run(&["rm", "/etc/nginx/conf.d/app.conf"]);
    tear_down(container, &recipe);
}

fn proxy_protocol(container: &Container) {
    let recipe = set_up(container, "## PROXY protocol to nginx");
    let request = ["--interface", "127.0.0.9", "http://127.0.0.1:8080/"];
    wait_for_page(container, &request, "Hello 127.0.0.9\n");
    container.run(&["systemctl", "stop", "nginx.service"]);
    container.run(&["rm", "/etc/nginx/conf.d/pp.conf"]);
    set_up(container, "## PROXY protocol to HAProxy");
    wait_for_page(container, &request, "Hello 127.0.0.9\n");
    container.run(&["systemctl", "stop", "haproxy.service"]);
    tear_down(container, &recipe);
}

/// Units as in systemd-socket-proxyd(8), with a service that is stopped when the proxy is.
fn migration(container: &Container) {
    let service = "[Unit]\nRequires=app.service app-proxy.socket\nAfter=app.service app-proxy.socket\n\
        [Service]\nExecStart=/lib/systemd/systemd-socket-proxyd --exit-idle-time=2s 127.0.0.1:3000\n\
        PrivateTmp=yes\n";
    let application = format!("[Unit]\nStopWhenUnneeded=yes\n{APPLICATION}");
    for (name, text) in [
        ("app.service", &*application),
        ("app-proxy.socket", "[Socket]\nListenStream=8080\n"),
        ("app-proxy.service", service),
    ] {
        container.write(&format!("/etc/systemd/system/{name}"), text);
    }
    container.reload();
    container.run(&["systemctl", "start", "app-proxy.socket"]);
    let recipe = set_up(container, "## Move from systemd-socket-proxyd");
    for _ in 0..2 {
        // Without --backend-wait= the client of a backend that is not up yet is closed.
        wait_for_page(container, &["http://127.0.0.1:8080/"], "Directory listing");
        container.wait_for("app-proxy.service", "ActiveState", "inactive");
        container.wait_for("app.service", "ActiveState", "inactive");
    }
    assert_eq!(recipe.names(".conf"), ["socket-proxyd.conf"]);
    remove(container, &["app-proxy.socket", "app-proxy.service", "app.service"]);
}

/// Starts an application and a proxy of it, on port 8080 of an address.
fn start_machine(container: &Container, address: &str) {
    let socket = format!("[Socket]\nListenStream={address}:8080\nFreeBind=yes\n");
    let service = "[Unit]\nStartLimitIntervalSec=0\n[Service]\nType=notify\nDynamicUser=yes\n\
        ExecStart=/usr/bin/socket-proxyd --handover=restart --backend-wait=30s 127.0.0.1:3000\n\
        FileDescriptorStoreMax=4\nRestart=on-failure\n";
    for (name, text) in
        [("app.service", APPLICATION), ("machine.socket", &socket), ("machine.service", service)]
    {
        container.write(&format!("/etc/systemd/system/{name}"), text);
    }
    container.reload();
    container.run(&["systemctl", "start", "app.service", "machine.socket"]);
}

/// Boots another machine, with a network to this one.
fn boot_machine(container: &Container) -> Container {
    let other = Container::boot(&Container::programs());
    container.link("10.0.0.3/24", &other, "10.0.0.2/24");
    start_machine(&other, "10.0.0.2");
    other
}

fn several_machines(container: &Container) {
    // Its address stays when the other machine is killed, and the link between them with that.
    container.run(&["ip", "addr", "add", "10.0.0.1/32", "dev", "lo"]);
    start_machine(container, "10.0.0.1");
    let other = boot_machine(container);
    set_up(container, "## Beyond one machine");
    // The balancer itself tries again only while it connects.
    let request = ["curl", "-sSf", "--max-time", "60", "--retry", "9", "--retry-all-errors"];
    let request = [&request[..], &["http://127.0.0.1:8080/"]].concat();
    let load = |count| {
        for _ in 0..count {
            assert!(container.run(&request).contains("Directory listing"));
        }
    };
    let uses = |machine: &Container| {
        let used = poll_until(Instant::now() + TIMEOUT, || {
            load(4);
            let log = machine.run(&["journalctl", "--no-pager", "-u", "app.service"]);
            log.contains("\"GET / ").then_some(())
        });
        used.expect("the balancer uses the machine");
    };
    uses(container);
    uses(&other);
    thread::scope(|scope| {
        let clients: Vec<_> = (0..4).map(|_| scope.spawn(|| load(25))).collect();
        container.run(&["systemctl", "restart", "machine.service"]);
        drop(other);
        clients.into_iter().for_each(|client| client.join().unwrap());
    });
    uses(&boot_machine(container));
    container.run(&["systemctl", "stop", "haproxy.service"]);
    remove(container, &["machine.socket", "machine.service", "app.service"]);
}

fn settings(container: &Container) {
    let service = "[Service]\nType=notify\nDynamicUser=yes\n\
        ExecStart=/usr/bin/socket-proxyd --backend-wait=30s 127.0.0.1:3000\n";
    container.write("/etc/systemd/system/app.service", APPLICATION);
    container.write("/etc/systemd/system/settings.service", service);
    set_up(container, "## Settings of the socket unit");
    container.verify("settings.socket");
    container.run(&["systemctl", "start", "app.service", "settings.socket"]);
    // Without a byte from the client the kernel does not pass the connection on.
    let mut client = container.inside(|| connect(&address(8080)));
    assert_eq!(container.show("settings.service")["ActiveState"], "inactive");
    client.write_all(b"GET / HTTP/1.0\r\n\r\n").unwrap();
    let (page, _) = read_all(&mut client);
    assert!(String::from_utf8_lossy(&page).contains("Directory listing"));
    // A client with a cookie sends its request in the first packet.
    let fast_opens = || {
        let text = container.run(&["cat", "/proc/net/netstat"]);
        let mut lines = text.lines().filter(|line| line.starts_with("TcpExt:"));
        let (names, counts) = (lines.next().unwrap(), lines.next().unwrap());
        let place = names.split(' ').position(|name| name == "TCPFastOpenPassive").unwrap();
        counts.split(' ').nth(place).unwrap().to_string()
    };
    assert_eq!(fast_opens(), "0");
    for _ in 0..2 {
        let request = ["--tcp-fastopen", "http://127.0.0.1:8080/"];
        wait_for_page(container, &request, "Directory listing");
    }
    assert_ne!(fast_opens(), "0");
    remove(container, &["settings.socket", "settings.service", "app.service"]);
}

/// Each recipe ends with the name of its test or the reason for none.
fn marked(names: &[String]) {
    let text = Section::document("docs/recipes.md");
    let headings = text.headings();
    assert!(headings.len() >= 18, "{headings:?}");
    for heading in headings {
        let marks = text.below(&heading).marks();
        assert!(heading == "## Shipped sets" || !marks.is_empty(), "{heading} has no mark");
        for mark in marks {
            if let Some(name) = mark.strip_prefix("Run by the tests: ") {
                let name = name.split(" (").next().unwrap();
                assert!(names.iter().any(|it| it == name), "{heading}: no test {name:?}");
            }
        }
    }
}
