//! What the process gives up before it serves.

mod support;

use std::env;
use std::fs::{self, File};
use std::io::ErrorKind;
use std::net::{TcpListener, TcpStream};
use std::process::Command;

use socket_proxyd::cli::{Config, Request};
use socket_proxyd::sandbox;
use support::*;
use tempfile::TempDir;

const OURS: &str = env!("CARGO_BIN_EXE_socket-proxyd");

/// The command line that the child is to be restricted by, and a port beside its target's.
const ARGUMENTS: &str = "SANDBOX_ARGUMENTS";
const OTHER_PORT: &str = "SANDBOX_OTHER_PORT";
const NEW_FILE: &str = "SANDBOX_NEW_FILE";

/// Runs `inside` in a process of its own; needs root, so that nothing else keeps it from its files.
fn run_inside(arguments: &str) -> Option<String> {
    let elsewhere = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = elsewhere.local_addr().unwrap().port();
    let directory = TempDir::new().unwrap();
    let output = Command::new(env::current_exe().unwrap())
        .env(NEW_FILE, directory.path().join("new"))
        .args(["--exact", "inside", "--nocapture"])
        .env(ARGUMENTS, arguments)
        .env(OTHER_PORT, port.to_string())
        .output()
        .unwrap();
    let stdout = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{stdout}");
    stdout.lines().find_map(|line| line.strip_prefix("inside: ").map(String::from))
}

/// Says what this process may after it has entered: only in the child.
#[test]
fn inside() {
    let Ok(arguments) = env::var(ARGUMENTS) else { return };
    let words = format!("socket-proxyd {arguments}");
    let Request::Serve(config) = Config::parse(words.split(' ').map(Into::into)).unwrap() else {
        unreachable!()
    };
    sandbox::enter(&config);
    let may = |result: std::io::Result<()>| match result {
        Ok(()) => "yes",
        Err(error) if error.kind() == ErrorKind::PermissionDenied => "no",
        Err(_) => "perhaps",
    };
    let connect = |port: u16| may(TcpStream::connect(("127.0.0.1", port)).map(drop));
    let target = arguments.rsplit(':').next().and_then(|port| port.parse().ok());
    println!(
        "inside: shadow {}, hosts {}, count {}, create {}, elsewhere {}, target {}",
        may(File::open("/etc/shadow").map(drop)),
        may(File::open("/etc/hosts").map(drop)),
        may(fs::read_dir("/proc/self/fd").map(drop)),
        may(File::create(env::var(NEW_FILE).unwrap()).map(drop)),
        connect(env::var(OTHER_PORT).unwrap().parse().unwrap()),
        target.map_or("none", connect),
    );
}

#[test]
fn it_opens_no_file_and_connects_to_its_target_only() {
    if !rustix::process::geteuid().is_root() {
        assert!(env::var_os("CI").is_none(), "root is missing");
        eprintln!("SKIPPED: what a sandbox keeps from root needs root");
        return;
    }
    let has_landlock = run_inside("/run/app").is_some_and(|it| it.contains("elsewhere no"));
    if !has_landlock {
        assert!(env::var_os("CI").is_none(), "Landlock with TCP ports is missing");
        eprintln!("SKIPPED: this kernel has no Landlock with TCP ports");
    }
    let target = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = target.local_addr().unwrap().port();
    for (arguments, may) in [
        (
            format!("127.0.0.1:{port}"),
            "shadow no, hosts no, count yes, create no, elsewhere no, target yes",
        ),
        ("/run/app".into(), "shadow no, hosts no, count yes, create no, elsewhere no, target none"),
        // Whatever its name service modules read.
        (
            format!("localhost:{port}"),
            "shadow yes, hosts yes, count yes, create no, elsewhere no, target yes",
        ),
        (
            "127.0.0.1:http".into(),
            "shadow yes, hosts yes, count yes, create no, elsewhere yes, target none",
        ),
    ] {
        if !has_landlock {
            assert!(run_inside(&arguments).is_some());
            continue;
        }
        assert_eq!(run_inside(&arguments).as_deref(), Some(may), "{arguments}");
    }
}

/// Starts the program, and waits until it is ready.
fn ready(words: &[&str]) -> Running {
    let (front, mut manager) = (Endpoint::new(Family::Tcp), Manager::new());
    let launch = Launch::new(OURS).arg("--log-level=debug").args(words).listener(&front);
    let proxy = launch.env("NOTIFY_SOCKET", manager.path.display()).start();
    manager.wait_for("READY=1");
    proxy
}

#[test]
fn the_program_enters_but_for_a_command() {
    for (words, entered) in
        [(&["127.0.0.1:9"][..], "1"), (&["127.0.0.1:9", "--", "/bin/sleep", "1000"], "0")]
    {
        let proxy = ready(words);
        let status = fs::read_to_string(format!("/proc/{}/status", proxy.pid())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("NoNewPrivs:"));
        assert_eq!(line.unwrap().trim(), entered, "{words:?}");
    }
}

#[test]
fn what_can_not_be_enforced_is_logged() {
    let reads = "Not restricting which files are read: names are looked up.";
    let ports = "Not restricting TCP ports: a target's is a name, or nsswitch.conf has a module for hosts that \
                 may need others.";
    let command = "Not restricting privileges, files and TCP ports: COMMAND would be, too.";
    for (words, lines) in [
        (&["127.0.0.1:9"][..], &[][..]),
        (&["localhost:9"], &[reads]),
        (&["127.0.0.1:discard"], &[reads, ports]),
        (&["127.0.0.1:9", "--", "/bin/sleep", "1000"], &[command]),
    ] {
        let proxy = ready(words);
        proxy.signal(rustix::process::Signal::TERM);
        let log = proxy.lines.all();
        let said: Vec<_> = log.lines().filter(|line| line.starts_with("Not restricting")).collect();
        assert_eq!(said, lines, "{words:?}");
    }
}

/// As strace(1) sees the program itself: a thread that was there before would not be restricted.
#[test]
fn the_program_is_restricted_before_it_has_a_thread() {
    let strace = "/usr/bin/strace";
    if !std::path::Path::new(strace).exists() || run_inside("/run/app").is_none() {
        assert!(env::var_os("CI").is_none(), "strace is missing");
        eprintln!("SKIPPED: this needs {strace}; `make test` installs it");
        return;
    }
    let directory = TempDir::new().unwrap();
    let (log, path) = (directory.path().join("log"), directory.path().join("metrics"));
    let (front, mut manager) = (Endpoint::new(Family::Tcp), Manager::new());
    // strace is who gets the sockets, and the program another number.
    let script =
        format!("LISTEN_PID=$$ exec {OURS} --threads=2 --metrics={} 127.0.0.1:9", path.display());
    let launch =
        Launch::new(strace).args(["-f", "-e", "trace=landlock_restrict_self,clone,clone3", "-o"]);
    let mut traced = launch
        .args([log.to_str().unwrap(), "/bin/sh", "-c", &script])
        .listener(&front)
        .env("NOTIFY_SOCKET", manager.path.display())
        .start();
    manager.wait_for("READY=1");
    assert!(path.exists(), "it may make its own socket");
    let calls = fs::read_to_string(&log).unwrap();
    let restricted = calls.find("landlock_restrict_self(").expect("it is restricted");
    let line = calls[restricted..].lines().next().unwrap();
    assert!(line.ends_with("= 0"), "{line}");
    let thread = calls.find("CLONE_THREAD").expect("metrics have a thread");
    assert!(restricted < thread, "{calls}");
    let pid = calls.split(' ').next().unwrap();
    let pid = rustix::process::Pid::from_raw(pid.parse().unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    traced.wait();
    assert!(!path.exists(), "and remove it");
}
