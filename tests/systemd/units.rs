//! The shipped units, each with the system that it is for: cold, warm, stopped when idle, started again,
//! killed and back. The only change to the units: 10 idle minutes are 2 seconds.

use std::io::{Read, Write};
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use crate::container::{Container, Suite, Test};
use crate::support::*;
use tokio::time::Instant;

pub(crate) fn register(suite: &Arc<Suite>, trials: &mut Trials) {
    if let Some(missing) = Container::missing().or_else(missing) {
        return trials.skip("systemd: the shipped units", missing);
    }
    let tests: [Test; 14] = [
        ("systemd-analyze security finds the shipped proxies hardened", hardened),
        ("aptly runs on demand", aptly),
        ("webhook runs on demand", webhook),
        ("Radicale runs on demand", radicale),
        ("a killed proxy leaves COMMAND to KillMode=", killed_proxy),
        ("two yaq daemons run on demand", yaqd),
        ("two yaq daemons run on demand behind one proxy", several_targets),
        ("one proxy tells two sockets apart by their names", named_sockets),
        ("a program that a script starts runs on demand", script),
        ("the example on-demand-command works", on_demand_command),
        ("the example on-demand-service works", on_demand_service),
        ("the example dns serves UDP and TCP on demand", dns),
        ("the example isolated has a network of its own", isolated),
        ("connections of the example steady outlive the proxy", steady),
    ];
    for (name, test) in tests {
        suite.beside(trials, name, test);
    }
    // systemd-analyze reads all units, and a test beside it may be writing one.
    suite.alone(trials, "systemd-analyze verify accepts the shipped units", verify);
}

pub(crate) fn files() -> [(PathBuf, String); 1] {
    [(APP.into(), "/usr/local/lib/app.pl".into())]
}

pub(crate) fn missing() -> Option<&'static str> {
    let needed = [
        ("/usr/bin/aptly", "aptly"),
        ("/usr/bin/webhook", "webhook"),
        ("/usr/bin/radicale", "radicale"),
        ("/usr/sbin/dnsmasq", "dnsmasq-base"),
        ("/usr/bin/dig", "bind9-dnsutils"),
        ("/opt/yaq/bin/yaqc", "yaqd-core, yaqd-fakes, yaqc"),
    ];
    let missing = needed.into_iter().find(|(file, _)| !Path::new(file).exists());
    missing.map(|(_, name)| name)
}

pub(crate) fn prepare(container: &Container) {
    container.run(&["useradd", "--system", "aptly"]);
    let shorter = "cd /etc/systemd/system && grep -l idle-time=10min *.service | wc -l && \
        sed -i s/idle-time=10min/idle-time=2s/ *.service";
    assert_eq!(container.run(&["sh", "-c", shorter]).trim(), "10", "units with an idle time");
    // The virtual environment was made at another path.
    let shebang = "sed -i '1s|^#!.*/bin/python.*|#!/opt/yaq/bin/python3|' /opt/yaq/bin/yaq*";
    container.run(&["sh", "-c", shebang]);
    container.write("/usr/local/bin/hook", "#!/bin/sh\necho \"Hello $1, from user $(id -u).\"\n");
    container.write(
        "/etc/webhook.conf",
        r#"[{"id": "hello", "execute-command": "/usr/local/bin/hook",
             "include-command-output-in-response": true,
             "pass-arguments-to-command": [{"source": "payload", "name": "name"}]}]"#,
    );
    // Any user name is accepted. The container cannot resolve "localhost".
    let config = "[server]\nhosts = 127.0.0.1:5232\n[auth]\ntype = none\n";
    container.write("/etc/radicale/config", config);
    // Debian's package leaves this to the administrator.
    container.run(&["chown", "-R", "radicale:", "/var/lib/radicale"]);
    container.write(
        "/usr/local/bin/program",
        "#!/bin/sh\nexec perl /usr/local/lib/app.pl \"$@\" up=5 down=1.5\n",
    );
    container.run(&["chmod", "755", "/usr/local/bin/hook", "/usr/local/bin/program"]);
    container.reload();
}

/// What DynamicUser= gives (systemd.exec(5)).
const DYNAMIC_USERS: RangeInclusive<u32> = 61_184..=65_519;

/// An application that its units start and stop.
struct System<'a> {
    container: &'a Container,
    socket: &'a str,
    /// The proxy's unit.
    proxy: &'a str,
    /// The application's command line begins so.
    application: &'a str,
}

impl System<'_> {
    /// The application's processes.
    fn processes(&self) -> Vec<String> {
        let pattern = format!("^{}", self.application);
        let output = self.container.output(&["pgrep", "-f", &pattern]).stdout;
        String::from_utf8(output).unwrap().lines().map(String::from).collect()
    }

    /// From cold to killed and back. `request` is a client, which has to be answered.
    fn lives(&self, request: impl Fn()) {
        let Self { container, socket, .. } = self;
        container.run(&["systemctl", "start", socket]);
        assert_eq!(self.processes(), [""; 0], "nothing runs before the first client");
        request();
        let first = self.processes();
        assert_ne!(first, [""; 0], "{} is not what runs", self.application);
        request();
        // A process that it had forked may have ended.
        let warm = self.processes();
        assert!(
            !warm.is_empty() && warm.iter().all(|it| first.contains(it)),
            "{warm:?} not {first:?}"
        );
        self.stops();
        request();
        let again = self.processes();
        assert_ne!(again, first);
        for process in &again {
            container.run(&["kill", "-KILL", process]);
        }
        again.iter().for_each(|process| self.stops_being(process));
        request();
        assert_ne!(self.processes(), [""; 0]);
        self.stops();
        request();
    }

    /// Waits until the application is stopped because it is idle.
    fn stops(&self) {
        let stopped =
            poll_until(Instant::now() + TIMEOUT, || self.processes().is_empty().then_some(()));
        stopped.unwrap_or_else(|| panic!("{} still runs", self.application));
        let socket = self.container.show(self.socket);
        assert!(["listening", "running"].contains(&&*socket["SubState"]), "{}", socket["SubState"]);
        // Neither a kill nor a stop made the unit fail.
        assert_ne!(self.container.show(self.proxy)["ActiveState"], "failed");
    }

    /// Waits for the end of a process.
    fn stops_being(&self, process: &str) {
        let gone = poll_until(Instant::now() + TIMEOUT, || {
            (!self.processes().iter().any(|it| it == process)).then_some(())
        });
        gone.unwrap_or_else(|| panic!("process {process} still runs"));
    }

    /// Waits until the application is being stopped, and sends a request.
    fn answers_in_the_stop_window(&self, request: impl Fn()) {
        request();
        let dying = self.processes();
        let times = || {
            let journal = self.container.run(&["journalctl", "-u", self.proxy, "--no-pager"]);
            journal.matches("Stopping ").count()
        };
        let before = times();
        let stopping = poll_until(Instant::now() + TIMEOUT, || (times() > before).then_some(()));
        stopping.expect("the proxy says that it stops the application");
        request();
        let next = self.processes();
        assert!(!next.is_empty() && !dying.iter().any(|process| next.contains(process)));
    }
}

fn curl(container: &Container, words: &[&str]) -> String {
    container.run(&[&["curl", "-sS", "--fail", "--max-time", "60"], words].concat())
}

fn verify(container: &Container) {
    let is_unit = |path: &String| path.ends_with(".socket") || path.ends_with(".service");
    let files = Container::files().into_iter().map(|(_, path)| path).filter(is_unit);
    let units: Vec<_> =
        files.filter_map(|path| Some(path.rsplit_once('/')?.1.to_string())).collect();
    assert!(units.len() >= 18, "{units:?}");
    for unit in units {
        // A template is what its instances are.
        let unit = unit.replace("@.", "@fake-continuous-hardware.");
        container.verify(&unit);
    }
}

/// Each unit that runs the proxy.
fn hardened(container: &Container) {
    let find = "cd /etc/systemd/system && grep -l 'ExecStart=/usr/bin/socket-proxyd' *.service";
    let units = container.run(&["sh", "-c", find]);
    assert!(units.lines().count() >= 10, "{units}");
    for unit in units.lines() {
        container.weigh(unit);
    }
}

fn aptly(container: &Container) {
    let api = "http://127.0.0.1:8080/api";
    let system = System {
        container,
        socket: "aptly-proxy.socket",
        proxy: "aptly-proxy.service",
        application: "/usr/bin/aptly api serve -listen=unix",
    };
    let url = format!("{api}/version");
    system.lives(|| {
        let version = curl(container, &[&url]);
        assert!(version.contains("\"Version\":\"1."), "{version}");
    });
    // A package of more than 1 MB, of bytes that don't compress.
    let build = "mkdir -p /tmp/pkg/DEBIAN /tmp/pkg/usr/share/bulky && cd /tmp && \
        head -c 1500000 /dev/urandom >pkg/usr/share/bulky/bytes && \
        printf 'Package: bulky\\nVersion: 1.0\\nArchitecture: all\\nMaintainer: nobody <nobody@example.org>\\nDescription: bytes\\n' >pkg/DEBIAN/control && \
        dpkg-deb --build pkg bulky_1.0_all.deb >/dev/null && stat -c %s bulky_1.0_all.deb";
    let size: u64 = container.run(&["sh", "-c", build]).trim().parse().unwrap();
    assert!(size > 1_000_000);
    let json = "Content-Type: application/json";
    let created =
        curl(container, &["-H", json, "-d", r#"{"Name": "bridge"}"#, &format!("{api}/repos")]);
    assert!(created.contains("\"Name\":\"bridge\""), "{created}");
    let file = "file=@/tmp/bulky_1.0_all.deb";
    let uploaded = curl(container, &["-F", file, &format!("{api}/files/incoming")]);
    assert!(uploaded.contains("incoming/bulky_1.0_all.deb"), "{uploaded}");
    let added = curl(container, &["-X", "POST", &format!("{api}/repos/bridge/file/incoming")]);
    assert!(added.contains("bulky_1.0_all added"), "{added}");
    let listed = curl(container, &[&format!("{api}/repos/bridge/packages")]);
    assert!(listed.contains("bulky 1.0"), "{listed}");
    let details = curl(container, &[&format!("{api}/repos/bridge/packages?format=details")]);
    assert!(details.contains(&format!("\"Size\":\"{size}\"")), "{details}");

    let service = container.show("aptly-proxy.service");
    assert!(service["StatusText"].contains("served"), "{}", service["StatusText"]);
    assert_ne!(service["User"], "root");
}

fn webhook(container: &Container) {
    let system = System {
        container,
        socket: "webhook-on-demand.socket",
        proxy: "webhook-on-demand.service",
        application: "/usr/bin/webhook",
    };
    let call = |name: &str| {
        let payload = format!("{{\"name\": \"{name}\"}}");
        let json = "Content-Type: application/json";
        curl(container, &["-H", json, "-d", &payload, "http://127.0.0.1:9000/hooks/hello"])
    };
    // Each of the requests is 30 at a time.
    let request = || {
        thread::scope(|scope| {
            let calls = (0..30).map(|number| {
                scope.spawn(move || {
                    let answer = call(&format!("n{number}"));
                    let user = answer.strip_prefix(&format!("Hello n{number}, from user "));
                    let user = user.and_then(|user| user.strip_suffix(".\n")?.parse().ok());
                    assert!(user.is_some_and(|it| DYNAMIC_USERS.contains(&it)), "{answer}");
                })
            });
            calls.collect::<Vec<_>>().into_iter().for_each(|call| call.join().unwrap());
        });
        assert_eq!(system.processes().len(), 1, "one webhook for all");
    };
    system.lives(request);
    system.answers_in_the_stop_window(request);
}

fn radicale(container: &Container) {
    let system = System {
        container,
        socket: "radicale-proxy.socket",
        proxy: "radicale-proxy.service",
        // Debian 11 runs the module.
        application: "(/usr/bin/)?python3 (/usr/bin/|-m )radicale",
    };
    let ask = |method: &str, path: &str, more: &[&str]| {
        let url = format!("http://127.0.0.1:8082/anna/{path}");
        let status = ["-o", "/dev/null", "-w", "%{http_code}", "-u", "anna:", "-X", method, &url];
        container.run(&[&["curl", "-sS", "--max-time", "60"], &status[..], more].concat())
    };
    let event = "BEGIN:VCALENDAR\r\nVERSION:2.0\r\nPRODID:test\r\nBEGIN:VEVENT\r\nUID:one\r\n\
        DTSTAMP:20260101T000000Z\r\nDTSTART:20260101T000000Z\r\nSUMMARY:One\r\nEND:VEVENT\r\n\
        END:VCALENDAR\r\n";
    let put = ["-H", "Content-Type: text/calendar", "--data-binary", event];
    // Cold, and a collection a life.
    let lives = std::cell::Cell::new(0);
    let request = || {
        let collection = format!("calendar{}/", lives.replace(lives.get() + 1));
        let item = format!("{collection}one.ics");
        assert_eq!(ask("MKCALENDAR", &collection, &[]), "201");
        assert_eq!(ask("PUT", &item, &put), "201");
        assert_eq!(ask("GET", &item, &[]), "200");
        assert_eq!(ask("PROPFIND", &collection, &["-H", "Depth: 1"]), "207");
    };
    system.lives(request);
    thread::scope(|scope| {
        for _ in 0..20 {
            scope.spawn(|| assert_eq!(ask("GET", "calendar0/one.ics", &[]), "200"));
        }
    });
}

/// The name of the yaq daemon that answers at a port.
fn yaq_name(container: &Container, port: &str) -> String {
    let name = container.run(&["/opt/yaq/bin/python3", "/opt/yaq/bin/yaqc", port]);
    name.trim().into()
}

fn yaqd(container: &Container) {
    let name = |port| yaq_name(container, port);
    for (daemon, kind, port) in [
        ("stage", "fake-continuous-hardware", "38401"),
        ("wheel", "fake-discrete-hardware", "38402"),
    ] {
        let system = System {
            container,
            socket: &format!("yaqd-{daemon}.socket"),
            proxy: &format!("yaqd-{daemon}.service"),
            application: &format!(
                "/opt/yaq/bin/python3 /opt/yaq/bin/yaqd-{kind} --config /etc/yaqd/{daemon}"
            ),
        };
        let request = || assert_eq!(name(port), daemon);
        system.lives(request);
        system.answers_in_the_stop_window(request);
    }
    // Both at a time.
    assert_eq!(["38401", "38402"].map(name), ["stage", "wheel"]);
}

fn several_targets(container: &Container) {
    let names = || ["38501", "38502", "38501"].map(|port| yaq_name(container, port));
    let system = System {
        container,
        socket: "daemons.socket",
        proxy: "daemons.service",
        application: "/opt/yaq/bin/python3 /opt/yaq/bin/yaqd-fake-.* --config /etc/yaqd/fake-",
    };
    system.lives(|| assert_eq!(names(), ["first", "second", "first"]));
}

fn named_sockets(container: &Container) {
    let daemon = |name: &str, kind: &str, port: u16| {
        container.write(&format!("/etc/yaqd/{name}.toml"), &format!("[{name}]\nport = {port}\n"));
        let unit = format!(
            "[Service]\nDynamicUser=yes\nStateDirectory={name}\nEnvironment=HOME=/var/lib/{name}\n\
             ExecStart=/opt/yaq/bin/yaqd-{kind} --config /etc/yaqd/{name}.toml\n"
        );
        container.write(&format!("/run/systemd/system/{name}.service"), &unit);
    };
    daemon("left", "fake-continuous-hardware", 39_601);
    daemon("right", "fake-discrete-hardware", 39_602);
    let socket = |port: u16, name: &str| {
        format!(
            "[Socket]\nListenStream=127.0.0.1:{port}\nFileDescriptorName={name}\n\
             Service=both.service\n"
        )
    };
    container.start_units(&[
        (
            "both.service",
            "[Unit]\nRequires=a.socket b.socket\nWants=left.service right.service\n\
             [Service]\nType=notify\nSockets=a.socket b.socket\nDynamicUser=yes\n\
             ExecStart=/usr/bin/socket-proxyd --backend-wait=60s to-the-right=127.0.0.1:39602 \
             to-the-left=127.0.0.1:39601\n",
        ),
        ("a.socket", &socket(38_601, "to-the-left")),
        ("b.socket", &socket(38_602, "to-the-right")),
    ]);
    container.run(&["systemctl", "start", "a.socket"]);
    let names = ["38601", "38602", "38601"].map(|port| yaq_name(container, port));
    assert_eq!(names, ["left", "right", "left"]);
    let service = container.show("both.service");
    assert_eq!((&*service["ActiveState"], &*service["NRestarts"]), ("active", "0"));
}

fn script(container: &Container) {
    let system = System {
        container,
        socket: "script.socket",
        proxy: "script.service",
        application: "perl /usr/local/lib/app.pl",
    };
    let address = std::net::SocketAddr::from(([127, 0, 0, 1], 8085)).into();
    let pid = || {
        let mut client = container.inside(|| connect(&address));
        client.write_all(b"pid\n").unwrap();
        client.shutdown(std::net::Shutdown::Write).unwrap();
        let (answer, end) = read_all(&mut client);
        end.unwrap();
        String::from_utf8(answer).unwrap().trim().to_string()
    };
    let request = || assert_eq!([pid()], *system.processes());
    system.lives(request);
    system.answers_in_the_stop_window(request);
    container.wait_for("script.service", "ActiveState", "active");
    let journal = container.run(&["journalctl", "-u", "script.service", "--no-pager"]);
    assert!(journal.contains("Preparing.") && journal.contains("Cleaned up."), "{journal}");

    // Killed, the proxy takes the program with it, and the next client starts both.
    let before = pid();
    let kill = ["systemctl", "kill", "--kill-who=main", "--signal=KILL", "script.service"];
    container.run(&kill);
    system.stops_being(&before);
    assert_ne!(pid(), before);
    // Stopped, it waits for the program.
    let before = pid();
    container.run(&["systemctl", "stop", "script.socket", "script.service"]);
    assert!(!system.processes().contains(&before));
    assert_eq!(container.show("script.service")["Result"], "success");
}

fn on_demand_command(container: &Container) {
    let system = System {
        container,
        socket: "on-demand.socket",
        proxy: "on-demand.service",
        application: "/usr/bin/python3 -m http.server .* 18083",
    };
    let request = || {
        let page = curl(container, &["http://127.0.0.1:8083/"]);
        assert!(page.contains("Directory listing"), "{page}");
    };
    system.lives(request);
    system.answers_in_the_stop_window(request);
}

fn on_demand_service(container: &Container) {
    let system = System {
        container,
        socket: "app-proxy.socket",
        proxy: "app-proxy.service",
        application: "/usr/bin/python3 -m http.server .* 18084",
    };
    let url = "http://127.0.0.1:8084/";
    let request = || {
        let page = curl(container, &[url]);
        assert!(page.contains("Directory listing"), "{page}");
    };
    system.lives(request);

    // One that can't start fails its clients and nothing else, and is served again once it can.
    let broken = "/run/systemd/system/app.service.d/broken.conf";
    container.write(broken, "[Service]\nExecStart=\nExecStart=/bin/false\n");
    let impatient =
        "sed -i s/backend-wait=90s/backend-wait=3s/ /etc/systemd/system/app-proxy.service";
    container.run(&["sh", "-c", impatient]);
    system.stops();
    container.wait_for("app-proxy.service", "ActiveState", "inactive");
    container.reload();
    thread::scope(|scope| {
        for _ in 0..30 {
            scope.spawn(|| {
                let words = ["curl", "-sS", "--max-time", "60", url];
                assert!(!container.output(&words).status.success());
            });
        }
    });
    assert_ne!(container.show("app-proxy.socket")["ActiveState"], "failed");
    container.run(&["rm", broken]);
    container.reload();
    request();
}

fn dns(container: &Container) {
    let system = System {
        container,
        socket: "dns.socket",
        proxy: "dns.service",
        application: "/usr/sbin/dnsmasq --keep-in-foreground",
    };
    // dnsmasq answers this itself. The first datagram is the only one.
    let ask = |over: &str| {
        let dig = ["dig", "@127.0.0.153", "+tries=1", "+time=10", "+short", over];
        let version = container.run(&[&dig[..], &["chaos", "txt", "version.bind"]].concat());
        assert!(version.contains("dnsmasq"), "{over}: {version}");
    };
    system.lives(|| ask("+notcp"));
    system.answers_in_the_stop_window(|| ask("+notcp"));
    ask("+tcp");
    let journal = container.run(&["journalctl", "-u", "dns.service", "--no-pager"]);
    assert!(journal.contains("Starting dnsmasq, "), "{journal}");
}

fn isolated(container: &Container) {
    container.run(&["systemctl", "start", "isolated-proxy.socket"]);
    let url = "http://127.0.0.1:8081/api/version";
    let version = container.run(&["curl", "-sSf", "--max-time", "60", url]);
    assert!(version.contains("Version"), "{version}");
    // Only through the proxy: the application's port 8080 is not the machine's, where the other
    // test's bridge may listen.
    let pid = &container.show("isolated-app.service")["MainPID"];
    let own = container.run(&["readlink", &format!("/proc/{pid}/ns/net")]);
    assert_ne!(own, container.run(&["readlink", "/proc/1/ns/net"]));
    let proxy = &container.show("isolated-proxy.service")["MainPID"];
    assert_eq!(own, container.run(&["readlink", &format!("/proc/{proxy}/ns/net")]));
}

fn steady(container: &Container) {
    let mut client = container.inside(|| {
        serve(&Endpoint::tcp("127.0.0.1:18086", 16), echo);
        container.run(&["systemctl", "start", "steady.socket"]);
        connect(&std::net::SocketAddr::from(([127, 0, 0, 1], 8086)).into())
    });
    assert_echoes(&mut client);
    // More often than systemd starts a service within 10 seconds by default.
    for round in 0..8 {
        let before = container.show("steady.service")["MainPID"].clone();
        if round % 2 == 0 {
            container.run(&["systemctl", "kill", "-s", "KILL", "steady.service"]);
        } else {
            container.run(&["systemctl", "restart", "steady.service"]);
        }
        assert_echoes(&mut client);
        assert_ne!(container.show("steady.service")["MainPID"], before);
    }
    assert_eq!(container.show("steady.service")["NFileDescriptorStore"], "2");
    container.run(&["systemctl", "stop", "steady.service"]);
    assert!(read_all(&mut client).0.is_empty());
}

/// systemd.kill(5): with `mixed`, systemd kills what a main process that has ended leaves behind. Otherwise
/// the guard gives COMMAND 3 seconds.
fn killed_proxy(container: &Container) {
    let program =
        "trap \"\" TERM; perl /usr/local/lib/app.pl {} /dev/null & while :; do sleep 60; done";
    for (mode, port, has_time) in [("control-group", 38_611, true), ("mixed", 38_612, false)] {
        let (service, socket) = (format!("killed-{mode}.service"), format!("killed-{mode}.socket"));
        let backend = (port + 100).to_string();
        let unit = format!(
            "[Service]\nType=notify\nKillMode={mode}\n\
             ExecStart=/usr/bin/socket-proxyd 127.0.0.1:{backend} -- /bin/sh -c '{}'\n",
            program.replace("{}", &backend)
        );
        let listener = format!("[Socket]\nListenStream=127.0.0.1:{port}\n");
        container.start_units(&[(&*service, &*unit), (&*socket, &*listener)]);
        let address = std::net::SocketAddr::from(([127, 0, 0, 1], port)).into();
        let mut client = container.inside(|| connect(&address));
        client.write_all(b"pid\n").unwrap();
        client.read_exact(&mut [0]).unwrap();
        container.run(&["systemctl", "kill", "--kill-who=main", "--signal=KILL", &service]);
        container.wait_for(&service, "ActiveState", "failed");
        let shown = container.show(&service);
        let [killed, ended] = ["ActiveExit", "InactiveEnter"]
            .map(|it| shown[&format!("{it}TimestampMonotonic")].parse::<u64>().unwrap());
        let time = Duration::from_micros(ended - killed);
        assert_eq!(time >= Duration::from_millis(2900), has_time, "KillMode={mode}: {time:?}");
    }
}
