//! What the manuals show, and what the unit writer writes: every example is run as it is printed, and every
//! case of tests/packaging/golden/ is verified and weighed.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use crate::container::{Container, Suite};
use crate::support::*;
use tokio::time::Instant;

pub(crate) fn register(suite: &Arc<Suite>, trials: &mut Trials) {
    let aptly = (!Path::new("/usr/bin/aptly").exists()).then_some("aptly");
    if let Some(missing) = Container::missing().or(aptly) {
        return trials.skip("systemd: the manuals and the unit writer", missing);
    }
    suite.in_turn(
        trials,
        &[
            ("systemd-analyze accepts what the unit writer writes", written),
            ("COMMAND gets its arguments as they were given", arguments),
            ("a short idle time closes no port", short_idle),
            ("without its metrics socket the proxy serves clients", lost_metrics),
            ("a generated unit starts and stops a backend by commands", commands),
            ("systemctl starts and stops a unit as the commands of a proxy", systemctl),
            ("the unit writer leaves a mask below /run", masked),
            ("the examples of both manuals work", examples),
        ],
    );
}

pub(crate) fn boot() -> Container {
    let mut files = Container::programs();
    let aptly = Path::new(ROOT).join("units/aptly/aptly-api.service");
    files.push((aptly, "/etc/systemd/system/aptly-api.service".into()));
    let container = Container::boot(&files);
    stand_in_for_docker(&container);
    container
}

/// Puts a program in the place of docker(1): the members of a group ask a daemon, which is root, to
/// start and stop `web`.
fn stand_in_for_docker(container: &Container) {
    container.run(&["groupadd", "--system", "docker"]);
    let client = "#!/bin/sh\necho \"$@\" | socat -t60 - UNIX-CONNECT:/run/docker.sock\n";
    container.write("/usr/local/bin/docker", client);
    container.run(&["chmod", "755", "/usr/local/bin/docker"]);
    container.start_units(&[
        (
            "docker@.service",
            "[Service]\nStandardInput=socket\nExecStart=/bin/sh -c 'read verb name; systemctl \"$verb\" \"$name\"'\n",
        ),
        (
            "web.service",
            "[Service]\nExecStart=/usr/bin/python3 -m http.server -b 127.0.0.1 -d /usr/share/doc 38822\n",
        ),
        (
            "docker.socket",
            "[Socket]\nListenStream=/run/docker.sock\nSocketGroup=docker\nSocketMode=0660\nAccept=yes\n",
        ),
    ]);
}

/// Verifies units and weighs those that run the proxy.
fn check(container: &Container, units: &[&str]) {
    for unit in units {
        container.verify(unit);
        if unit.ends_with("-proxy.service") {
            container.weigh(unit);
        }
    }
}

fn written(container: &Container) {
    // systemd finds units here as well.
    let directory = "/run/systemd/system";
    for case in fs::read_dir(Path::new(ROOT).join("tests/packaging/golden")).unwrap() {
        let arguments = fs::read_to_string(case.unwrap().path().join("arguments")).unwrap();
        // Cases share unit names, so each case is removed before the next.
        let words = ["socket-proxyd-units", "--write", directory, "--force"];
        let printed = container.run(&[&words[..], &arguments.lines().collect::<Vec<_>>()].concat());
        let written: Vec<_> =
            printed.lines().filter_map(|line| line.strip_prefix("Wrote ")).collect();
        assert!(written.len() >= 2, "{printed}");
        let names = written.iter().filter_map(|path| path.strip_prefix("/run/systemd/system/"));
        let units: Vec<_> = names.filter(|name| !name.contains('/')).collect();
        let _reloading = container.not_reloading();
        container.run(&["systemctl", "daemon-reload"]);
        check(container, &units);
        container.run(&[&["rm"], &written[..]].concat());
        container.run(&["systemctl", "daemon-reload"]);
    }
}

fn arguments(container: &Container) {
    let script = "#!/bin/sh\nfor word; do printf '<%s>' \"$word\"; done >\"$STATE_DIRECTORY/words\"\nexec sleep 60\n";
    container.write("/usr/local/bin/words", script);
    container.run(&["chmod", "755", "/usr/local/bin/words"]);
    let words =
        ["100%", "$HOME", "${HOME}", "two words", "it's", "\"", "\\", ";", "", "%%", "a\nb", "é"];
    let name = "strange: 100% it's @1";
    let command = ["--", "/usr/local/bin/words"];
    let options = ["--listen=127.0.0.1:38701", "--target=127.0.0.1:38702", "--write", name];
    let all = [&["socket-proxyd-units"], &options[..], &command[..], &words[..]].concat();
    let printed = container.run(&all);
    let next = printed.lines().find_map(|line| line.strip_prefix("Next: ")).unwrap();
    // The program writes its arguments there.
    let unit = "strange:\\x20100\\x25\\x20it\\x27s\\x20\\x401-proxy.service";
    let drop_in = format!("/etc/systemd/system/{unit}.d/state.conf");
    container.write(&drop_in, "[Service]\nStateDirectory=words\n");
    {
        let _reloading = container.not_reloading();
        container.run(&["systemctl", "daemon-reload"]);
        container.run(&["sh", "-c", next]);
    }
    let address = std::net::SocketAddr::from(([127, 0, 0, 1], 38701)).into();
    let _client = container.inside(|| connect(&address));
    let expected: String = words.iter().map(|word| format!("<{word}>")).collect();
    let mut got = String::new();
    let written = poll_until(Instant::now() + TIMEOUT, || {
        let output = container.output(&["cat", "/var/lib/words/words"]);
        got = String::from_utf8_lossy(&output.stdout).into();
        (got == expected).then_some(())
    });
    assert!(written.is_some(), "{got:?} and not {expected:?}");
    container.run(&["systemctl", "stop", unit, &unit.replace(".service", ".socket")]);
}

/// Writes units and runs the command that the unit writer prints.
fn set_up(container: &Container, words: &[&str]) {
    let printed = container.run(&[&["socket-proxyd-units", "--write"], words].concat());
    let next = printed.lines().find_map(|line| line.strip_prefix("Next: ")).unwrap();
    let _reloading = container.not_reloading();
    container.run(&["systemctl", "daemon-reload"]);
    container.run(&["sh", "-c", next]);
}

fn address(port: u16) -> socket2::SockAddr {
    std::net::SocketAddr::from(([127, 0, 0, 1], port)).into()
}

/// An echo at a port of the container's.
fn echo_inside(container: &Container, port: u16) {
    serve(&container.inside(|| Endpoint::tcp(&format!("127.0.0.1:{port}"), 16)), echo);
}

fn short_idle(container: &Container) {
    echo_inside(container, 38802);
    let words = ["--listen=127.0.0.1:38801", "--target=127.0.0.1:38802", "--idle=100ms", "quick"];
    set_up(container, &words);
    let starts = || container.show("quick-proxy.service")["InvocationID"].clone();
    let mut all = std::collections::HashSet::new();
    for _ in 0..12 {
        assert_echoes(&mut container.inside(|| connect(&address(38801))));
        all.insert(starts());
        container.wait_for("quick-proxy.service", "ActiveState", "inactive");
    }
    assert!(all.len() >= 10, "it was started for nearly each: {}", all.len());
    for _ in 0..100 {
        assert_echoes(&mut container.inside(|| connect(&address(38801))));
        pause(std::time::Duration::from_millis(90));
    }
    assert_eq!(container.show("quick-proxy.socket")["Result"], "success");
    container.run(&["systemctl", "disable", "--now", "quick-proxy.socket"]);
}

fn lost_metrics(container: &Container) {
    echo_inside(container, 38812);
    let taken = container.inside(|| Endpoint::tcp("127.0.0.1:38813", 1));
    let options = ["--listen=127.0.0.1:38811", "--target=127.0.0.1:38812"];
    let words = [&options[..], &["--metrics=127.0.0.1:38813", "--write", "lost"]].concat();
    container.run(&[&["socket-proxyd-units"], &words[..]].concat());
    {
        let _reloading = container.not_reloading();
        container.run(&["systemctl", "daemon-reload"]);
        container.run(&["systemctl", "start", "lost-proxy.socket"]);
    }
    let mut client = container.inside(|| connect(&address(38811)));
    assert_echoes(&mut client);
    let log = container.run(&["journalctl", "--no-pager", "-u", "lost-proxy.service"]);
    assert!(log.contains("systemd passed no socket of that name"), "{log}");
    drop(taken);
    container.run(&["systemctl", "stop", "lost-proxy.service"]);
    container.run(&["systemctl", "start", "lost-metrics.socket"]);
    let mut client = container.inside(|| connect(&address(38811)));
    assert_echoes(&mut client);
    let metrics = ["curl", "-sSf", "--max-time", "20", "http://127.0.0.1:38813/metrics"];
    assert!(container.run(&metrics).contains("socket_proxyd_connections_open"));
    container.run(&["systemctl", "stop", "lost-metrics.socket"]);
    assert_echoes(&mut client);
    container.run(&["systemctl", "stop", "lost-proxy.socket", "lost-proxy.service"]);
}

fn commands(container: &Container) {
    let words = [
        "--listen=127.0.0.1:38821",
        "--target=127.0.0.1:38822",
        "--start-command=docker start web",
        "--stop-command=docker stop web",
        "--ready=http:/",
        "--idle=1s",
        "--group=docker",
        "box",
    ];
    set_up(container, &words);
    let serves = || {
        container.run(&["curl", "-sSf", "--max-time", "60", "http://127.0.0.1:38821/"]);
        container.wait_for("web.service", "ActiveState", "active");
    };
    let proxy = "box-proxy.service";
    for _ in 0..2 {
        container.wait_for("web.service", "ActiveState", "inactive");
        serves();
    }
    container.wait_for("web.service", "ActiveState", "inactive");
    container.wait_for(proxy, "ActiveState", "active");
    // As the comment says, the backend outlives the proxy unless a drop-in has the line.
    for (has_line, state) in [(false, "active"), (true, "inactive")] {
        if has_line {
            let unit = container.run(&["cat", &format!("/etc/systemd/system/{proxy}")]);
            let line = unit.lines().find_map(|line| line.strip_prefix("#ExecStopPost=")).unwrap();
            let drop_in = format!("/etc/systemd/system/{proxy}.d/stop.conf");
            container.write(&drop_in, &format!("[Service]\nExecStopPost={line}\n"));
            let _reloading = container.not_reloading();
            container.run(&["systemctl", "daemon-reload"]);
        }
        serves();
        container.run(&["systemctl", "stop", proxy]);
        assert_eq!(container.show("web.service")["ActiveState"], state);
    }
    container.run(&["systemctl", "disable", "--now", "box-proxy.socket"]);
}

fn systemctl(container: &Container) {
    let backend = "site.service";
    container.start_units(&[
        (
            "by-systemctl.service",
            "[Service]\nType=notify\nExecStart=/usr/bin/socket-proxyd --ready=http:/ --stop-idle-time=1s \\\n  \
             '--start-command=systemctl start site' '--stop-command=systemctl stop site' 127.0.0.1:38832\n",
        ),
        (
            backend,
            "[Service]\nExecStart=/usr/bin/python3 -m http.server -b 127.0.0.1 -d /usr/share/doc 38832\n",
        ),
        ("by-systemctl.socket", "[Socket]\nListenStream=127.0.0.1:38831\n"),
    ]);
    let serves = || {
        container.run(&["curl", "-sSf", "--max-time", "60", "http://127.0.0.1:38831/"]);
        container.wait_for(backend, "ActiveState", "active");
    };
    for _ in 0..2 {
        container.wait_for(backend, "ActiveState", "inactive");
        serves();
    }
    container.wait_for(backend, "ActiveState", "inactive");
    // The proxy is restarted while the backend runs, and the next one stops it.
    serves();
    container.run(&["systemctl", "restart", "by-systemctl.service"]);
    serves();
    container.wait_for(backend, "ActiveState", "inactive");
    container.wait_for_status("by-systemctl.service", "0 of 256 connections, 1 served");
    container.run(&["systemctl", "stop", "by-systemctl.socket", "by-systemctl.service"]);
}

fn masked(container: &Container) {
    container.run(&["systemctl", "mask", "--runtime", "masked-proxy.socket"]);
    let words = ["socket-proxyd-units", "--listen=1", "--target=/a", "--write", "masked"];
    let output = container.output(&words);
    let printed = String::from_utf8_lossy(&output.stderr);
    assert!(printed.contains("/run/systemd/system/masked-proxy.socket is a mask"), "{printed}");
    assert!(!output.status.success());
    container.run(&["systemctl", "unmask", "--runtime", "masked-proxy.socket"]);
}

/// The examples of a manual, as a reader sees them: what stands between .nf and .fi.
fn shown(manual: &str) -> Vec<String> {
    let text = fs::read_to_string(Path::new(ROOT).join("man").join(manual)).unwrap();
    let (_, text) = text.split_once("\n.SH EXAMPLES\n").unwrap();
    let (text, _) = text.split_once("\n.SH ").unwrap();
    let blocks = text.split(".nf\n").skip(1);
    let blocks = blocks.map(|block| block.split_once(".fi").unwrap().0);
    blocks.map(|block| block.replace("\\-", "-").replace("\\e", "\\")).collect()
}

/// The files of an example, each behind its name.
fn files(example: &str) -> Vec<(&str, String)> {
    let mut files: Vec<(&str, String)> = Vec::new();
    let mut is_file = false;
    for line in example.lines() {
        if let Some(title) = line.strip_prefix("# ") {
            let name = title.split(' ').next().unwrap();
            is_file = [".socket", ".service", ".conf"].iter().any(|it| name.ends_with(it));
            if is_file {
                files.push((name, String::new()));
            }
        } else if is_file {
            let text = &mut files.last_mut().unwrap().1;
            text.push_str(line);
            text.push('\n');
        }
    }
    files
}

/// Waits until a request is answered at a socket.
fn answers(container: &Container, example: &str, listen: &str) {
    let url = match listen {
        address if address.contains(':') => format!("http://{address}/"),
        port => format!("http://127.0.0.1:{port}/"),
    };
    let place = match listen {
        path if path.starts_with('/') => vec!["--unix-socket", path, "http://localhost/"],
        _ => vec![&*url],
    };
    let curl = ["curl", "-s", "--max-time", "60", "-o", "/dev/null", "-w", "%{http_code}"];
    let mut code = String::new();
    let answered = poll_until(Instant::now() + TIMEOUT, || {
        let output = container.output(&[&curl[..], &place].concat());
        code = String::from_utf8(output.stdout).unwrap();
        output.status.success().then_some(())
    });
    let journal = || container.run(&["journalctl", "--no-pager", "-n", "40"]);
    assert!(answered.is_some(), "{listen}: {code}, with\n{example}\n{}", journal());
    assert!(["200", "301", "404"].contains(&&*code), "{listen}: {code}");
}

#[expect(clippy::too_many_lines, reason = "the examples of the manuals, one after the other")]
fn examples(container: &Container) {
    container.run(&["useradd", "--system", "aptly"]);
    container.run(&["useradd", "--system", "app"]);
    // As the first lines of the unit say, so that it always runs.
    let aptly = "/etc/systemd/system/aptly-api.service";
    container.run(&["sed", "-i", "/^StopWhenUnneeded/d", aptly]);
    let serve = |port| {
        format!(
            "[Service]\nDynamicUser=yes\n\
             ExecStart=/usr/bin/python3 -m http.server -b 127.0.0.1 -d /usr/share/doc {port}\n\
             [Install]\nWantedBy=multi-user.target\n"
        )
    };
    container.start_units(&[
        ("other.service", &serve(3001)),
        (
            "admin.service",
            "[Service]\nGroup=app\nRuntimeDirectory=app\nExecStart=/usr/bin/socat \
             UNIX-LISTEN:/run/app/admin.sock,fork,mode=660 TCP:127.0.0.1:3001\n",
        ),
    ]);
    container.run(&["systemctl", "start", "other.service"]);
    let app = "/etc/systemd/system/app.service";
    for example in shown("socket-proxyd.8") {
        let mut files = files(&example);
        if !files.iter().any(|(name, _)| *name == "app.service") {
            // The user's application, where the example does not show it.
            container.write(app, &serve(3000));
        }
        let ours = ["http.server", "Wants=app.service", "start app.service"];
        let is_ours = |text: &str| ours.iter().any(|words| text.contains(words));
        {
            let _reloading = container.not_reloading();
            for (name, text) in &files {
                container.write(&format!("/etc/systemd/system/{name}"), text);
            }
            container.run(&["systemctl", "daemon-reload"]);
            if !is_ours(&example) {
                container.run(&["systemctl", "start", "app.service"]);
            }
            if example.contains("/run/aptly/") {
                container.run(&["systemctl", "start", "aptly-api.service"]);
            }
        }
        if files.is_empty() {
            container.run(&[
                "systemd-run",
                "-q",
                "--collect",
                "--unit=shown",
                "sh",
                "-c",
                &example,
            ]);
            files.push(("shown.service", "ListenStream=127.0.0.1:8080".into()));
        }
        let mut sockets: Vec<_> = files.iter().map(|(name, _)| *name).collect();
        sockets.retain(|name| name.ends_with(".socket"));
        if !sockets.is_empty() {
            let _reloading = container.not_reloading();
            container.run(&[&["systemctl", "start"], &sockets[..]].concat());
        }
        for (_, text) in &files {
            for listen in text.lines().filter_map(|line| line.strip_prefix("ListenStream=")) {
                answers(container, &example, listen);
            }
        }
        clean_up(container, &files.iter().map(|(name, _)| *name).collect::<Vec<_>>());
    }
    container.write(app, &serve(3000));
    for example in shown("socket-proxyd-units.8") {
        {
            let _reloading = container.not_reloading();
            container.run(&["systemctl", "daemon-reload"]);
            let needs = if example.contains("app.service") || example.contains("http.server") {
                "app.service"
            } else {
                container.run(&["systemctl", "start", "app.service"]);
                "aptly-api.service"
            };
            container.run(&["systemctl", "enable", needs]);
            if needs == "aptly-api.service" {
                container.run(&["systemctl", "start", needs]);
            }
            container.run(&["sh", "-ec", &example]);
        }
        let words = example.split_whitespace();
        for listen in words.filter_map(|word| word.strip_prefix("--listen=")) {
            answers(container, &example, listen);
        }
        if let Some(metrics) =
            example.split_whitespace().find_map(|it| it.strip_prefix("--metrics="))
        {
            let url = format!("http://{metrics}/metrics");
            let text = container.run(&["curl", "-sSf", "--max-time", "60", &url]);
            assert!(text.contains("socket_proxyd_connections_total{"), "{text}");
        }
        let words = example.split_whitespace();
        let sockets: Vec<_> = words
            .filter(|word| word.ends_with("-proxy.socket") || word.ends_with("-metrics.socket"))
            .collect();
        let service = sockets[0].replace(".socket", ".service");
        let units = [&sockets[..], &[&service]].concat();
        check(container, &units);
        container.run(&[&["systemctl", "disable"], &sockets[..]].concat());
        let drop_in = format!("app.service.d/{}", service.replace(".service", ".conf"));
        clean_up(container, &[&units[..], &[&drop_in]].concat());
    }
}

/// Stops and removes units before the next example.
fn clean_up(container: &Container, files: &[&str]) {
    let _reloading = container.not_reloading();
    let mut units = files.to_vec();
    units.retain(|name| !name.contains('@') && !name.ends_with(".conf"));
    // The sockets first, so that no client starts a service again.
    units.sort_by_key(|name| !name.ends_with(".socket"));
    for unit in units.iter().copied().chain(["app.service"]) {
        container.run(&["systemctl", "stop", unit]);
    }
    for file in files {
        container.run(&["rm", "-f", &format!("/etc/systemd/system/{file}")]);
    }
    container.run(&["systemctl", "daemon-reload"]);
}
