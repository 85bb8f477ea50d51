//! The guard of COMMAND: its failures, and the processes that it stops.

use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use rustix::process::Signal;
use tempfile::TempDir;

use crate::application::{Service, wait_for_end};
use crate::support::*;

/// Runs the guard alone. Returns its exit code and what it logs.
fn guard(control: impl Into<Stdio>, notify: &Path) -> (Option<i32>, String) {
    let mut guard = Command::new(OURS);
    guard.arg0("proxyd-guard").stdin(control).env("NOTIFY_SOCKET", notify);
    let output = guard.output().unwrap();
    (output.status.code(), String::from_utf8(output.stderr).unwrap())
}

#[test]
fn guard_tells_its_own_failure_from_a_proxy_that_is_gone() {
    let runtime = TempDir::new().unwrap();
    let directory = runtime.path().join("socket-proxyd-x");
    fs::create_dir(&directory).unwrap();
    let notify = directory.join("notify");
    fs::write(&notify, "").unwrap();
    // Its standard input is not a socket.
    let (code, log) = guard(Stdio::null(), &notify);
    assert!(code == Some(1) && log.contains("Failed to guard COMMAND: "), "{code:?}: {log}");
    assert!(notify.exists());
    // The proxy is gone before it has sent COMMAND.
    let (proxy, control) = UnixStream::pair().unwrap();
    drop(proxy);
    assert_eq!(guard(OwnedFd::from(control), &notify), (Some(0), String::new()));
    assert!(!directory.exists(), "the proxy's socket is removed");
}

#[test]
fn application_behind_a_shell_is_asked_once() {
    // The shell ends at SIGTERM, and the application takes its time.
    let program = ["sh", "-c", "perl \"$@\"; true", "sh", APP];
    let options = ["--stop-idle-time=200ms"];
    let service = Service::start_as(Family::Tcp, &options, &program, &["down=1"], |it| it);
    let app = service.pid();
    wait_for_end(app);
    assert_eq!(service.logged_pids("asked"), [app]);
}

#[test]
fn zombie_in_the_group_does_not_keep_the_guard() {
    // Its parent, which has left the group, does not reap it.
    let script = r#"perl -e 'my $child = fork; die unless defined $child;
            if (!$child) { sleep 600; exit }
            setpgrp(0, 0) or die;
            open my $log, ">>", $ARGV[0] or die; print $log "parent $$\n"; close $log;
            sleep 600' "$3" &
        exec perl "$@""#;
    let program = ["sh", "-c", script, "sh", APP];
    let service = Service::start_as(Family::Tcp, &[], &program, &[], |it| it);
    service.pid();
    let parent = service.wait_for_pid("parent");
    service.proxy.signal(Signal::KILL);
    wait_for_end(parent);
    service.proxy.lines.wait_for("sh has not stopped in time, killing it.");
    assert_eq!(service.proxy.lines.count("killing it"), 1);
}

#[test]
fn only_ready_says_that_command_is_ready() {
    let script = "systemd-notify --status=starting; exec perl \"$@\"";
    let program = ["sh", "-c", script, "sh", APP];
    let options = ["--ready=notify"];
    let service = Service::start_as(Family::Tcp, &options, &program, &["ready=0.5"], |it| it);
    // And not "not ready".
    service.pid();
}
