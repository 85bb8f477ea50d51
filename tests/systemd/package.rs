//! The packages: what is in them, and the .deb in a small Debian without a compiler, with the four commands
//! of the README as they are printed there.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use crate::container::{Container, Suite};
use crate::markdown::Section;
use crate::support::*;
use tempfile::TempDir;
use tokio::time::Instant;

pub(crate) fn register(suite: &Arc<Suite>, trials: &mut Trials) {
    let fresh = (!Path::new(FRESH_DEBIAN).exists()).then_some("a small Debian");
    let made = ["deb", "rpm"].iter().all(|kind| package(kind).is_some());
    let packages = (!made).then_some("`make deb rpm`");
    if let Some(missing) = Container::missing().or(fresh).or(packages) {
        return trials.skip("systemd: the packages", missing);
    }
    suite.in_turn(
        trials,
        &[
            ("both packages hold what make install installs", contents),
            ("the four commands of the README work", four_commands),
            ("a bridge works, and a purge leaves nothing of it", bridge),
        ],
    );
}

pub(crate) fn boot() -> Container {
    let package = package("deb").unwrap();
    let name = package.file_name().unwrap().to_str().unwrap();
    let root = TempDir::new_in("/var/tmp").unwrap();
    lines("tar", &["-C", root.path().to_str().unwrap(), "-xf", FRESH_DEBIAN]);
    Container::boot_in(root, &[(package.clone(), format!("/root/{name}"))])
}

/// The package that `make test` has made last.
fn package(kind: &str) -> Option<PathBuf> {
    let target = Path::new(OURS).ancestors().nth(2)?;
    let directory = target.join(if kind == "deb" { "debian" } else { "generate-rpm" });
    let paths = fs::read_dir(directory).ok()?.filter_map(|entry| Some(entry.ok()?.path()));
    let packages = paths.filter(|path| path.extension().is_some_and(|it| it == kind));
    packages.max_by_key(|path| path.metadata().and_then(|it| it.modified()).ok())
}

/// What a program prints, line by line.
fn lines(program: &str, words: &[&str]) -> Vec<String> {
    let output = Command::new(program).args(words).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap().lines().map(String::from).collect()
}

fn contents(_: &Container) {
    let directory = TempDir::new().unwrap();
    let to = format!("DESTDIR={}", directory.path().display());
    lines("make", &["-s", "-C", ROOT, "install", "PREFIX=/usr", &to]);
    let installed =
        lines("find", &[directory.path().to_str().unwrap(), "-type", "f", "-printf", "%m /%P\n"]);
    let installed: BTreeSet<_> = installed.into_iter().collect();
    assert!(installed.contains("755 /usr/bin/socket-proxyd-units"), "{installed:?}");

    // Unpacked, since permissions in its list are words.
    let unpacked = TempDir::new().unwrap();
    let (deb, path) = (package("deb").unwrap(), unpacked.path().to_str().unwrap());
    lines("dpkg-deb", &["-x", deb.to_str().unwrap(), path]);
    let in_deb = lines("find", &[path, "-type", "f", "-printf", "%m /%P\n"]);
    // Debian compresses manuals and has one file for the licence.
    let in_deb = in_deb.iter().map(|line| line.replace(".8.gz", ".8"));
    let in_deb: BTreeSet<_> = in_deb.filter(|line| !line.ends_with("/copyright")).collect();
    assert_eq!(in_deb, installed);

    let rpm = package("rpm").unwrap();
    let words = ["-qp", "--queryformat", "[%{FILEMODES:octal} %{FILENAMES}\\n]"];
    let in_rpm = lines("rpm", &[&words[..], &[rpm.to_str().unwrap()]].concat());
    // The paths of other distributions.
    let in_rpm = in_rpm.iter().map(|line| {
        let line = line.strip_prefix("100").unwrap_or(line);
        line.replace("/zsh/site-functions/", "/zsh/vendor-completions/")
    });
    assert_eq!(in_rpm.collect::<BTreeSet<_>>(), installed);
    // No scripts, so nothing is enabled or started.
    assert_eq!(lines("rpm", &["-qp", "--scripts", rpm.to_str().unwrap()]), [""; 0]);
    let control = lines("dpkg-deb", &["-I", deb.to_str().unwrap()]);
    for script in ["preinst", "postinst", "prerm", "postrm"] {
        assert!(!control.iter().any(|line| line.contains(script)), "{control:?}");
    }
}

fn four_commands(container: &Container) {
    assert!(!container.output(&["sh", "-c", "command -v cargo gcc"]).status.success());
    let install = Section::document("README.md").below("## Install");
    let commands = install.blocks("sh").remove(0);
    // A continued line is part of the command before it.
    let count = commands.lines().count() - commands.matches("\\\n").count();
    assert_eq!(count, 4, "{commands}");
    let printed = container.run(&["sh", "-exc", &format!("cd /root\n{commands}")]);
    let next = "Next: systemctl enable --now docs-proxy.socket\n";
    assert!(printed.contains(next), "{printed}");
    assert!(printed.contains("Directory listing for /"), "{printed}");
    assert!(
        !container
            .output(&["sh", "-c", "ls /etc/systemd/system | grep -v docs-proxy | grep prox"])
            .status
            .success(),
        "no other unit is installed"
    );
    container.wait_for_status("docs-proxy.service", "0 of 256 connections, 1 served");
    for unit in ["docs-proxy.socket", "docs-proxy.service"] {
        let output = container.output(&["systemd-analyze", "verify", unit]);
        let words = String::from_utf8_lossy(&output.stderr).into_owned();
        // A small Debian has no man(1) to look into the manual with.
        let words: Vec<_> = words.lines().filter(|line| !line.contains("man ")).collect();
        assert!(words.is_empty(), "{words:?}");
    }
}

fn bridge(container: &Container) {
    let write = |options: &[&str]| {
        let printed = container.run(&[&["socket-proxyd-units", "--write"], options].concat());
        let next = printed.lines().find_map(|line| line.strip_prefix("Next: ")).unwrap();
        container.run(&["sh", "-c", next]);
    };
    container.write(
        "/etc/systemd/system/backend.service",
        "[Service]\nDynamicUser=yes\nExecStart=/usr/bin/python3 -m http.server -b 127.0.0.1 -d /usr/share/doc 3001\n",
    );
    container.run(&["systemctl", "start", "backend.service"]);
    // From TCP to a Unix socket, and from a Unix socket to TCP.
    write(&["--listen=/run/bridge.sock", "--target=127.0.0.1:3001", "inner"]);
    write(&["--listen=127.0.0.1:8081", "--target=/run/bridge.sock", "outer"]);
    let page = poll_until(Instant::now() + TIMEOUT, || {
        let output =
            container.output(&["curl", "-sS", "--max-time", "60", "http://127.0.0.1:8081/"]);
        output.status.success().then(|| String::from_utf8(output.stdout).unwrap())
    });
    assert!(page.is_some_and(|page| page.contains("Directory listing for /")));
    for unit in ["inner-proxy.service", "outer-proxy.service"] {
        container.weigh(unit);
        assert_eq!(container.show(unit)["ActiveState"], "active");
    }
    container.run(&[
        "sh",
        "-c",
        "systemctl stop '*-proxy.socket' '*-proxy.service' && dpkg --purge socket-proxyd",
    ]);
    let left = container.output(&[
        "sh",
        "-c",
        "ls -d /usr/bin/socket-proxyd* /usr/share/doc/socket-proxyd",
    ]);
    assert_eq!(String::from_utf8_lossy(&left.stdout), "");
}
