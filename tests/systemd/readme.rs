//! The README: its blocks and commands, as they are printed. `make demo` is run by tests/packaging/, and
//! the four commands after `make deb` by package.rs.

use std::io::Write;
use std::path::Path;
use std::sync::Arc;

use crate::container::{Container, Suite};
use crate::markdown::Section;
use crate::support::*;
use tokio::time::Instant;

pub(crate) fn register(suite: &Arc<Suite>, trials: &mut Trials) {
    let aptly = (!Path::new("/usr/bin/aptly").exists()).then_some("aptly");
    if let Some(missing) = Container::missing().or(aptly) {
        return trials.skip("systemd: the blocks of the README", missing);
    }
    suite.in_turn(
        trials,
        &[
            ("README: the proxy replaces systemd-socket-proxyd", replace),
            ("README: an application starts on demand", on_demand),
            ("README: a bridge keeps connections over a restart", bridge),
        ],
    );
}

/// A container for the README and the recipes, with the shipped units where a package puts them.
pub(crate) fn boot() -> Container {
    let root = Path::new(ROOT);
    let mut files = Container::programs();
    files.push((root.join("units"), "/usr/share/doc/socket-proxyd/examples".into()));
    let aptly = root.join("units/aptly/aptly-api.service");
    files.push((aptly, "/etc/systemd/system/aptly-api.service".into()));
    let container = Container::boot(&files);
    container.run(&["sed", "-i", "/^StopWhenUnneeded/d", "/etc/systemd/system/aptly-api.service"]);
    container.run(&["useradd", "--system", "aptly"]);
    container.reload();
    container
}

/// Waits until a page at a URL contains `text`.
pub(crate) fn wait_for_page(container: &Container, words: &[&str], text: &str) {
    let mut page = String::new();
    let found = poll_until(Instant::now() + TIMEOUT, || {
        let output = container.output(&[&["curl", "-sS", "--max-time", "60"], words].concat());
        page = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into();
        page.contains(text).then_some(())
    });
    let journal = || container.run(&["journalctl", "--no-pager", "-n", "40"]);
    assert!(found.is_some(), "{words:?}: {page}\n{}", journal());
}

/// Stops units and removes their files before the next test.
pub(crate) fn remove(container: &Container, units: &[&str]) {
    for unit in units {
        container.run(&["systemctl", "disable", "-q", "--now", unit]);
        container.output(&["systemctl", "reset-failed", unit]);
        let path = format!("/etc/systemd/system/{unit}");
        container.run(&["rm", "-rf", &path, &format!("{path}.d")]);
    }
    container.reload();
}

/// A unit of an application at port 3000, as users have one.
pub(crate) const APPLICATION: &str = "[Service]\nDynamicUser=yes\nExecStart=/usr/bin/python3 -m \
    http.server -b 127.0.0.1 -d /usr/share/doc 3000\n[Install]\nWantedBy=multi-user.target\n";

const URL: &str = "http://127.0.0.1:8080/";

fn program(container: &Container, unit: &str) -> String {
    let pid = &container.show(unit)["MainPID"];
    container.run(&["readlink", &format!("/proc/{pid}/exe")]).trim().into()
}

fn replace(container: &Container) {
    let section = Section::document("README.md").below("## Replace systemd-socket-proxyd");
    let original = "/lib/systemd/systemd-socket-proxyd 127.0.0.1:3000";
    assert!(section.inline("systemd-socket-proxyd 127").ends_with("127.0.0.1:3000"));
    // As in systemd-socket-proxyd(8).
    let service = format!(
        "[Unit]\nRequires=app.service app-proxy.socket\nAfter=app.service app-proxy.socket\n\
         [Service]\nExecStart={original}\nPrivateTmp=yes\n"
    );
    for (name, text) in [
        ("app.service", APPLICATION),
        ("app-proxy.socket", "[Socket]\nListenStream=8080\n[Install]\nWantedBy=sockets.target\n"),
        ("app-proxy.service", &service),
    ] {
        container.write(&format!("/etc/systemd/system/{name}"), text);
    }
    container.reload();
    container.run(&["systemctl", "start", "app-proxy.socket"]);
    wait_for_page(container, &["--retry", "20", "--retry-all-errors", URL], "Directory listing");
    let before = program(container, "app-proxy.service");
    assert!(before.ends_with("systemd-socket-proxyd"), "{before}");
    section.write(container);
    section.run(container);
    wait_for_page(container, &[URL], "Directory listing");
    assert_eq!(program(container, "app-proxy.service"), "/usr/bin/socket-proxyd");
    remove(container, &["app-proxy.socket", "app-proxy.service", "app.service"]);
}

fn on_demand(container: &Container) {
    let readme = Section::document("README.md");
    let section = readme.below("## Start an application on demand");
    section.write(container);
    section.run(container);
    wait_for_page(container, &[URL], "Directory listing");
    let watch = readme.below("## Watch it");
    let status = container.run(&["sh", "-c", &watch.inline("systemctl status")]);
    assert!(status.contains("served"), "{status}");
    container.run(&["sh", "-c", &watch.inline("systemctl kill -s USR1")]);
    assert_eq!(container.show("app.service")["ActiveState"], "active");
    let python = || container.output(&["pgrep", "-f", "^/usr/bin/python3 -m http.server"]).stdout;
    let stopped = poll_until(Instant::now() + TIMEOUT, || python().is_empty().then_some(()));
    stopped.expect("the application stops when it is idle");
    wait_for_page(container, &[URL], "Directory listing");
    remove(container, &["app.socket", "app.service"]);
}

fn bridge(container: &Container) {
    let readme = Section::document("README.md");
    container.run(&["systemctl", "start", "aptly-api.service"]);
    let section = readme.below("## Bridge a TCP port to a Unix socket");
    section.run(container);
    wait_for_page(container, &["http://127.0.0.1:8080/api/version"], "Version");

    readme.below("## Restart without losing a connection").write(container);
    let restart = || container.run(&["systemctl", "restart", "api-proxy.service"]);
    // The restart that adds the option.
    restart();
    let address = std::net::SocketAddr::from(([127, 0, 0, 1], 8080)).into();
    let mut client = container.inside(|| connect(&address));
    client.write_all(b"GET /api/version HTTP/1.1\r\nHost: test\r\n").unwrap();
    container.wait_for_status("api-proxy.service", "1 ");
    for _ in 0..3 {
        restart();
    }
    client.write_all(b"Connection: close\r\n\r\n").unwrap();
    let (answer, end) = read_all(&mut client);
    end.unwrap();
    assert!(String::from_utf8_lossy(&answer).contains("\"Version\""), "{answer:?}");
    remove(container, &["api-proxy.socket", "api-proxy.service"]);

    let command = section.inline("socket-proxyd --listen=127");
    let run = ["systemd-run", "-q", "--unit=plain", "-p", "Group=aptly", "sh", "-c", &command];
    container.run(&run);
    wait_for_page(container, &["http://127.0.0.1:8080/api/version"], "Version");
    container.run(&["systemctl", "stop", "plain.service", "aptly-api.service"]);
}
