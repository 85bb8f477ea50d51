//! --start-command= and --stop-command=: a backend that is not a child of the proxy.
//!
//! The commands are shell scripts that start and stop the application of tests/support/app.pl in a
//! session of its own.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use tokio::time::Instant;

use crate::application::{ask, is_running, pid, wait_for_end};
use crate::support::*;

/// An application that scripts start and stop, and the scripts.
struct External {
    directory: TempDir,
    target: String,
    port: String,
}

impl External {
    fn new() -> Self {
        let port = free_port().to_string();
        let external =
            Self { directory: TempDir::new().unwrap(), target: format!("127.0.0.1:{port}"), port };
        for script in ["start", "stop"] {
            fs::write(external.path(script), "").unwrap();
        }
        let log = external.path("log");
        fs::write(&log, "").unwrap();
        external.write_start("");
        external.write_stop("");
        external
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Lines that come before the application is started.
    fn write_start(&self, before: &str) {
        let (log, runs) = (self.path("log"), self.path("runs"));
        let text = format!(
            "echo start >>{runs}\n{before}\nsetsid perl {APP} {} {} up=0.2 </dev/null >/dev/null 2>&1 &\n",
            self.port,
            log.display(),
            runs = runs.display()
        );
        fs::write(self.path("start"), text).unwrap();
    }

    fn write_stop(&self, before: &str) {
        let (log, runs) = (self.path("log"), self.path("runs"));
        let text = format!(
            "echo stop >>{runs}\n{before}\nkill $(sed -n 's/^started //p' {log} | tail -n 1)\n",
            log = log.display(),
            runs = runs.display()
        );
        fs::write(self.path("stop"), text).unwrap();
    }

    fn proxy(&self, front: &Endpoint, options: &[&str]) -> Running {
        self.launch(front, options).start()
    }

    fn launch(&self, front: &Endpoint, options: &[&str]) -> Launch {
        let line = |name: &str| format!("--{name}-command=sh {}", self.path(name).display());
        let launch = Launch::new(OURS).listener(front).args([line("start"), line("stop")]);
        launch.args(options).arg(&self.target)
    }

    fn started(&self) -> Vec<Pid> {
        let log = fs::read_to_string(self.path("log")).unwrap();
        let pids = log.lines().filter_map(|line| line.strip_prefix("started ")?.parse().ok());
        pids.map(|pid| Pid::from_raw(pid).unwrap()).collect()
    }

    /// How often the scripts have run.
    fn runs(&self, name: &str) -> usize {
        let runs = fs::read_to_string(self.path("runs")).unwrap_or_default();
        runs.lines().filter(|line| *line == name).count()
    }
}

impl Drop for External {
    fn drop(&mut self) {
        for pid in self.started() {
            let _ = kill_process(pid, Signal::KILL);
        }
    }
}

#[test]
fn commands_start_and_stop_the_backend() {
    let (external, front) = (External::new(), Endpoint::new(Family::Tcp));
    let proxy = external.proxy(&front, &["--stop-idle-time=500ms"]);
    let mut client = front.connect();
    let first = pid(&mut client);
    assert_eq!(external.started(), [first], "cold");
    assert_eq!(pid(&mut front.connect()), first, "warm");
    pause(Duration::from_secs(1));
    assert!(is_running(first), "in use");
    drop(client);
    wait_for_end(first);
    proxy.lines.wait_for("Running sh, no connection for 500ms.");
    let second = pid(&mut front.connect());
    assert_ne!(second, first, "again");
    assert_eq!((external.runs("start"), external.runs("stop")), (2, 1));
    proxy.lines.wait_for(&format!("{} is ready after", external.target));
}

#[test]
fn ignored_sigchld_hides_no_exit() {
    let (external, front) = (External::new(), Endpoint::new(Family::Tcp));
    let launch = external.launch(&front, &["--ready=exec:true"]);
    let _proxy = launch.signals("--ignore-signal=CHLD").start();
    pid(&mut front.connect());
    assert_eq!(external.runs("start"), 1);
}

#[test]
fn backend_outlives_the_proxy_and_is_stopped_by_the_next() {
    let (external, front) = (External::new(), Endpoint::new(Family::Tcp));
    for signal in [Signal::TERM, Signal::KILL] {
        let mut proxy = external.proxy(&front, &[]);
        let app = pid(&mut front.connect());
        proxy.signal(signal);
        proxy.wait();
        assert!(is_running(app), "{signal:?}");
        // The next process has started nothing, and stops it.
        let _next = external.proxy(&front, &["--stop-idle-time=500ms"]);
        wait_for_end(app);
    }
    assert_eq!((external.runs("start"), external.runs("stop")), (2, 2));
}

#[test]
fn two_hundred_clients_run_one_command() {
    raise_descriptor_limit();
    for threads in ["--threads=1", "--threads=3"] {
        let (external, front) = (External::new(), Endpoint::new(Family::Tcp));
        let _proxy = external.proxy(&front, &[threads]);
        let mut clients: Vec<_> = (0..200).map(|_| front.connect()).collect();
        let app = pid(&mut clients[0]);
        for client in &mut clients[1..] {
            assert_eq!(pid(client), app);
        }
        assert_eq!(external.runs("start"), 1);
    }
}

#[test]
fn command_that_fails_is_run_again() {
    let (external, front) = (External::new(), Endpoint::new(Family::Tcp));
    external.write_start(&format!(
        "test $(grep -c start {}) -gt 2 || exit 3",
        external.path("runs").display()
    ));
    let proxy = external.proxy(&front, &[]);
    let app = pid(&mut front.connect());
    assert_eq!(external.started(), [app]);
    assert_eq!(external.runs("start"), 3);
    proxy
        .lines
        .wait_for("sh has failed (exit status: 3). (Failure 1 in a row, next attempt in 100ms.)");
    proxy.lines.wait_for("Failure 2 in a row, next attempt in 200ms.");
}

#[test]
fn client_of_a_command_that_hangs_is_closed_in_time() {
    let (external, front) = (External::new(), Endpoint::new(Family::Tcp));
    let ended = external.path("ended");
    external
        .write_start(&format!("trap 'echo > {}; exit' TERM; sleep 600 & wait", ended.display()));
    let mut proxy = external.proxy(&front, &["--backend-wait=1s"]);
    assert_eq!(read_all(&mut front.connect()).0, b"");
    proxy.lines.wait_for("sh has not returned (client ");
    proxy.signal(Signal::TERM);
    assert_eq!(proxy.wait().code(), Some(0));
    assert!(ended.exists(), "the command got SIGTERM");
    let log = proxy.lines.all();
    assert!(!log.contains("Failure"), "a stop is no failure: {log}");
}

#[test]
fn backend_that_ended_unseen_is_started_again() {
    let (external, front) = (External::new(), Endpoint::new(Family::Tcp));
    let _proxy = external.proxy(&front, &[]);
    let mut last = pid(&mut front.connect());
    for _ in 0..3 {
        kill_process(last, Signal::KILL).unwrap();
        wait_for_end(last);
        let mut clients: Vec<_> = (0..20).map(|_| front.connect()).collect();
        let next = pid(&mut clients[0]);
        assert_ne!(next, last);
        assert!(clients[1..].iter_mut().all(|client| pid(client) == next));
        last = next;
    }
    assert_eq!(external.runs("start"), 4);
}

#[test]
fn backend_that_runs_already_is_not_started() {
    let (external, front) = (External::new(), Endpoint::new(Family::Tcp));
    let other = Endpoint::tcp(&external.target, 16);
    serve(&other, echo);
    let _proxy = external.proxy(&front, &[]);
    assert_echoes(&mut front.connect());
    assert_eq!(external.runs("start"), 0);
}

#[test]
fn probe_that_says_yes_for_a_dead_backend_starts_it() {
    let (external, front) = (External::new(), Endpoint::new(Family::Tcp));
    let proxy = external.proxy(&front, &["--ready=exec:true"]);
    let before = proxy.cpu();
    let first = pid(&mut front.connect());
    kill_process(first, Signal::KILL).unwrap();
    wait_for_end(first);
    assert_ne!(pid(&mut front.connect()), first);
    assert_eq!(external.runs("start"), 2);
    let spent = proxy.cpu() - before;
    assert!(spent < Duration::from_millis(500), "{spent:?} of CPU");
}

#[test]
fn idle_exit_waits_for_the_stop_command() {
    for exit in ["--exit-idle-time=700ms", "--exit-idle-time=500ms"] {
        let (external, front) = (External::new(), Endpoint::new(Family::Tcp));
        external.write_stop("sleep 1");
        let mut proxy = external.proxy(&front, &["--stop-idle-time=500ms", exit]);
        let app = pid(&mut front.connect());
        assert_eq!(proxy.wait().code(), Some(0));
        wait_for_end(app);
        assert_eq!(external.runs("stop"), 1, "{exit}");
    }
}

#[test]
fn stop_command_that_fails_is_one_error() {
    let (external, front) = (External::new(), Endpoint::new(Family::Tcp));
    let flag = external.path("may_stop");
    external.write_stop(&format!("test -e {} || exit 4", flag.display()));
    let proxy = external.proxy(&front, &["--stop-idle-time=300ms"]);
    let app = pid(&mut front.connect());
    let line = format!("sh has failed (exit status: 4). ({} still answers.)", external.target);
    proxy.lines.wait_for(&line);
    assert_eq!(pid(&mut front.connect()), app, "it is still served");
    fs::write(&flag, "").unwrap();
    wait_for_end(app);
}

#[test]
fn idle_exit_comes_after_a_stop_command_that_failed() {
    let (external, front) = (External::new(), Endpoint::new(Family::Tcp));
    external.write_stop("exit 4");
    let options = ["--stop-idle-time=100ms", "--exit-idle-time=1500ms"];
    let mut proxy = external.proxy(&front, &options);
    pid(&mut front.connect());
    assert_eq!(proxy.wait().code(), Some(0));
    assert!((1..=3).contains(&external.runs("stop")), "{} runs", external.runs("stop"));
}

#[test]
fn proxy_and_systemd_wait_for_the_stop_command() {
    for handover in ["never", "restart"] {
        let (external, front) = (External::new(), Endpoint::new(Family::Tcp));
        let done = external.path("done");
        external.write_stop(&format!("sleep 1; echo > {}", done.display()));
        let options = [&format!("--handover={handover}"), "--stop-idle-time=100ms"];
        let systemd = FakeSystemd::with_fd_store(4);
        let mut proxy = external.launch(&front, &options).stored_by(&systemd).start();
        pid(&mut front.connect());
        proxy.lines.wait_for("Running sh, no connection for 100ms.");
        proxy.signal(Signal::TERM);
        // 93 seconds: longer than a command may take to end.
        systemd.wait_for("EXTEND_TIMEOUT_USEC=93000000");
        assert_eq!(proxy.wait().code(), Some(0));
        assert!(done.exists(), "--handover={handover}");
    }
}

#[test]
fn name_may_exist_only_while_the_backend_runs() {
    if !is_root_for("a name that exists only while the backend runs") {
        return;
    }
    let (mut external, front) = (External::new(), Endpoint::new(Family::Tcp));
    external.target = format!("app.test:{}", external.port);
    let hosts = external.path("hosts");
    fs::write(&hosts, "\n").unwrap();
    let set = |line: &str| format!("echo '{line}' > {}", hosts.display());
    external.write_start(&set("127.0.0.1 app.test"));
    external.write_stop(&set(""));
    let launch = external.launch(&front, &["--stop-idle-time=200ms"]);
    let _proxy = launch.hosts(hosts.clone()).start();
    for _ in 0..2 {
        let app = pid(&mut front.connect());
        wait_for_end(app);
    }
    assert_eq!((external.runs("start"), external.runs("stop")), (2, 2));
    // The name vanishes with the backend, unseen by the proxy.
    let app = pid(&mut front.connect());
    kill_process(app, Signal::KILL).unwrap();
    fs::write(&hosts, "\n").unwrap();
    wait_for_end(app);
    assert_ne!(pid(&mut front.connect()), app);
}

#[test]
fn passive_client_waits_with_one_whose_start_failed() {
    let (external, front) = (External::new(), Endpoint::new(Family::Tcp));
    let flag = external.path("may_start");
    external.write_start(&format!(
        "sleep 0.5; test -e {0} || {{ echo > {0}; exit 1; }}",
        flag.display()
    ));
    let _proxy = external.proxy(&front, &["--passive-from=127.0.0.9", "--backend-wait=30s"]);
    let mut client = front.connect();
    let mut monitor = connect_from("127.0.0.9", &front.address);
    let app = pid(&mut client);
    assert_eq!(pid(&mut monitor), app);
}

#[test]
fn client_that_comes_during_a_stop_waits() {
    let (external, front) = (External::new(), Endpoint::new(Family::Tcp));
    external.write_stop("sleep 1");
    let proxy = external.proxy(&front, &["--stop-idle-time=200ms"]);
    let first = pid(&mut front.connect());
    proxy.lines.wait_for("Running sh, no connection for 200ms.");
    let start = Instant::now();
    let second = pid(&mut front.connect());
    assert!(start.elapsed() > Duration::from_millis(500));
    assert_ne!(second, first);
}

#[test]
fn min_run_time_and_passive_clients_hold() {
    let (external, front) = (External::new(), Endpoint::new(Family::Tcp));
    let options = ["--stop-idle-time=100ms", "--min-run-time=2s", "--passive-from=127.0.0.9"];
    let _proxy = external.proxy(&front, &options);
    let mut monitor = connect_from("127.0.0.9", &front.address);
    assert_eq!(read_all(&mut monitor).0, b"");
    assert_eq!(external.runs("start"), 0, "a passive client starts nothing");
    let start = Instant::now();
    let app = pid(&mut front.connect());
    assert_eq!(pid(&mut connect_from("127.0.0.9", &front.address)), app);
    wait_for_end(app);
    assert!(start.elapsed() > Duration::from_millis(1900));
}

#[test]
fn rejects_wrong_command_lines() {
    for (args, message) in [
        (
            &["--start-command=", "/a"][..],
            "invalid value '' for '--start-command <LINE>': it names no",
        ),
        (
            &["--start-command=no-such-thing x", "/a"],
            "Failed to execute --start-command=\"no-such-thing\"",
        ),
        (&["--start-command=sh -c 'x", "/a"], "a quote is not closed"),
        (&["--start-command=true", "/a", "--", "sh"], "--start-command= cannot be combined with"),
        (&["--stop-command=true", "/a"], "--stop-command= needs a --start-command=."),
        (
            &["--start-command=true", "--stop-idle-time=1s", "/a"],
            "--stop-idle-time= needs a COMMAND or a --stop-command=.",
        ),
        (&["--start-command=true", "--backend-wait=0", "/a"], "--backend-wait=0 leaves"),
        (
            &["--start-command=true", "--freeze-idle-time=1", "/a"],
            "--freeze-idle-time= needs a COM",
        ),
        (&["--start-command=true", ":1=/a", ":2=/b"], "--start-command= serves one TARGET."),
    ] {
        let args: Vec<_> = ["--listen=127.0.0.1:0"].iter().chain(args).copied().collect();
        let (code, stdout, stderr) = run(&OURS.into(), &args);
        assert_eq!((code, &*stdout), (Some(1), ""), "{args:?}: {stderr}");
        assert!(stderr.contains(message) && stderr.lines().count() == 1, "{args:?}: {stderr}");
    }
}

/// podman with a storage of its own. Neither the systemd of the machine nor its control groups of
/// version 2 are needed.
fn podman(storage: &Path) -> String {
    let [root, run] = ["root", "run"].map(|name| storage.join(name).display().to_string());
    format!(
        "podman --root {root} --runroot {run} --cgroup-manager=cgroupfs --runtime /usr/sbin/runc \
         --events-backend=file"
    )
}

fn shell(line: &str) -> String {
    let output = Command::new("sh").args(["-c", line]).output().unwrap();
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text).into_owned();
    assert!(output.status.success(), "{line}: {text}");
    text
}

#[test]
fn podman_starts_and_stops_a_container() {
    if !is_root_for("podman") || !are_installed_for("podman", &[FRESH_DEBIAN]) {
        return;
    }
    let (storage, port) = (TempDir::new().unwrap(), free_port());
    let podman = podman(storage.path());
    shell(&format!("{podman} import {FRESH_DEBIAN} fresh"));
    let log = storage.path().join("log");
    fs::write(&log, "").unwrap();
    let limits = "--ulimit nofile=1024:1024 --ulimit nproc=1000:1000";
    let mounts = format!("-v {APP}:/app.pl:ro -v {}:/log", log.display());
    shell(&format!(
        "{podman} create --name web --network=host {limits} {mounts} fresh perl /app.pl {port} /log"
    ));
    let front = Endpoint::new(Family::Tcp);
    let start = || {
        let launch = Launch::new(OURS).listener(&front);
        let launch = launch.arg(format!("--start-command={podman} start web"));
        let launch = launch.arg(format!("--stop-command={podman} stop -t 5 web"));
        launch.args(["--stop-idle-time=1s", &format!("127.0.0.1:{port}")]).start()
    };
    let is_running = || shell(&format!("{podman} ps")).contains("perl /app.pl");
    let proxy = start();
    let mut client = front.connect();
    let first = ask(&mut client, "pid");
    assert!(first.parse::<u32>().is_ok(), "cold: {first}");
    assert_eq!(ask(&mut front.connect(), "pid"), first, "warm");
    assert!(is_running());
    drop(client);
    let stopped = || (!is_running()).then_some(());
    poll_until(Instant::now() + TIMEOUT, stopped).expect("it stops when it is idle");
    assert!(!ask(&mut front.connect(), "pid").is_empty(), "again");
    drop(proxy);
    // The next process finds it running, and stops it.
    assert!(is_running());
    let _next = start();
    poll_until(Instant::now() + TIMEOUT, stopped).expect("it stops when it is idle");
    shell(&format!("{podman} rm -f web && {podman} rmi -f fresh"));
}
