//! One suite for every program that does this job: ours and the originals, side by side.
//!
//! Each case runs against ours, against the installed systemd-socket-proxyd, and against the newest
//! one where `make test` has put it. A case that an original fails says so, with the words in which
//! it fails: a case that passes there after all, or fails otherwise, fails the suite.
//!
//! `PROXY_UNDER_TEST=/path/to/program` runs the cases against that program alone.

mod support;

use std::env;
use std::fs::{self, Permissions};
use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::fs::PermissionsExt;
use std::panic::{self, AssertUnwindSafe};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use libtest_mimic::{Arguments, Failed, Trial};
use rustix::process::Signal;
use sha2::{Digest, Sha256};
use socket2::{Domain, SockAddr, Socket, Type};
use support::*;
use tempfile::TempDir;
use tokio::time::Instant;

/// A program under test.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Subject {
    Ours,
    /// The same, with three event loops.
    Threads,
    /// Debian 12's.
    Old,
    /// 262 or later.
    New,
    /// `$PROXY_UNDER_TEST`, expected to pass everything.
    Named,
}

impl Subject {
    const fn name(self) -> &'static str {
        match self {
            Self::Ours => "ours",
            Self::Threads => "ours-3-threads",
            Self::Old => "systemd-252",
            Self::New => "systemd-262",
            Self::Named => "named",
        }
    }

    /// The program; `directory` is for one that is made here.
    fn path(self, directory: &Path) -> Option<PathBuf> {
        let path: PathBuf = match self {
            Self::Ours => OURS.into(),
            Self::Threads => {
                // A copy, which other users reach wherever the original is.
                let (path, copy) = (directory.join("three-threads"), directory.join("program"));
                fs::copy(OURS, &copy).unwrap();
                let copy = copy.display();
                let script = format!("#!/bin/sh\nexec {copy} --threads=3 \"$@\"\n");
                fs::write(&path, script).unwrap();
                fs::set_permissions(&path, Permissions::from_mode(0o755)).unwrap();
                path
            }
            Self::Old => "/lib/systemd/systemd-socket-proxyd".into(),
            Self::New => env::var_os("NEWEST_ORIGINAL")?.into(),
            Self::Named => env::var_os("PROXY_UNDER_TEST")?.into(),
        };
        path.exists().then_some(path)
    }
}

use Expected::{FailsOn, OnlyOurs, OursAlone, Shared};

/// What a case expects of the originals.
#[derive(Clone, Copy)]
enum Expected {
    /// Every program passes.
    Shared,
    /// These fail, with these words in the failure.
    FailsOn(&'static [Subject], &'static str),
    /// Only ours has what the case is about; the originals fail, with these words.
    OnlyOurs(&'static str),
    /// The originals are not asked: whether they pass depends on how busy the machine is.
    OursAlone,
}

struct Case {
    name: String,
    expected: Expected,
    test: Box<dyn Fn(&Path) + Send + Sync>,
}

fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    // The cases measure CPU and count descriptors; two at a time keeps two cores busy.
    arguments.test_threads = arguments.test_threads.or(Some(2));
    panic::set_hook(Box::new(|_| {}));
    raise_descriptor_limit();
    let in_ci = env::var_os("CI").is_some();
    let mut trials = Vec::new();
    let directory = TempDir::new().unwrap();
    // Some cases run as another user.
    fs::set_permissions(directory.path(), Permissions::from_mode(0o755)).unwrap();
    let subjects = match Subject::Named.path(directory.path()) {
        Some(_) => vec![Subject::Named],
        None => vec![Subject::Ours, Subject::Threads, Subject::Old, Subject::New],
    };
    for subject in subjects {
        let Some(path) = subject.path(directory.path()) else {
            let missing = format!("{}: all cases", subject.name());
            eprintln!("SKIPPED: {} is not installed; `make test` installs it", subject.name());
            let trial = Trial::test(missing, || Err("the program is not installed".into()));
            trials.push(trial.with_ignored_flag(!in_ci));
            continue;
        };
        let is_original = matches!(subject, Subject::Old | Subject::New);
        for case in cases() {
            if is_original && matches!(case.expected, OursAlone) {
                continue;
            }
            let path = path.clone();
            let name = format!("{}: {}", subject.name(), case.name);
            trials.push(Trial::test(name, move || judge(subject, &path, &case)));
        }
    }
    libtest_mimic::run(&arguments, trials).exit_code()
}

fn judge(subject: Subject, path: &Path, case: &Case) -> Result<(), Failed> {
    let failure = panic::catch_unwind(AssertUnwindSafe(|| (case.test)(path))).err().map(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        text.or_else(|| panic.downcast_ref::<&str>().map(|text| text.to_string()))
            .unwrap_or_default()
    });
    let expected = match case.expected {
        FailsOn(subjects, words) if subjects.contains(&subject) => Some(words),
        OnlyOurs(words) if matches!(subject, Subject::Old | Subject::New) => Some(words),
        _ => None,
    };
    match (failure, expected) {
        (None, None) => Ok(()),
        (Some(failure), Some(words)) if failure.contains(words) => Ok(()),
        (Some(failure), None) => Err(failure.into()),
        (Some(failure), Some(words)) => {
            Err(format!("expected to fail here with {words:?}, but failed with: {failure}").into())
        }
        (None, Some(words)) => {
            Err(format!("expected to fail here with {words:?}, but passed; mend the table").into())
        }
    }
}

fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    let mut case = |name: &str, expected, test: fn(&Path)| {
        let (name, test) = (name.to_string(), Box::new(test));
        cases.push(Case { name, expected, test });
    };

    case("messages of wrong command lines", Shared, wrong_command_lines);
    case("help and version", Shared, help_and_version);
    case("numbers and time spans are accepted", Shared, accepted_values);
    case("sockets meant for another process", Shared, other_pid);
    case("a datagram socket is refused", Shared, datagram_socket);
    case("several sockets, one target", Shared, several_sockets);
    let silent = FailsOn(&[Subject::Old], "a notification comes");
    case("notifications", silent, notifications);
    case("watchdog", Shared, watchdog);
    case("idle exit after the last connection", Shared, idle_exit);
    case("the last of repeated options wins", Shared, repeated_options);
    case("an unreachable backend is said, and is nobody's end", Shared, unreachable);
    case("a name is resolved", Shared, name_is_resolved);
    case("::1:80 is split at the last colon", Shared, last_colon);
    case("an abstract socket", Shared, abstract_socket);

    let one_more = FailsOn(&[Subject::Old], "was served above the cap");
    let six_each = OnlyOurs("the echo backend answers");
    case("the cap is met before the limit on descriptors", six_each, cap_with_few_descriptors);
    case("the cap is exact", one_more, exact_cap);
    case("clients above the cap wait", OnlyOurs("unrecognized option"), overflow_waits);
    case("a refused connection is said in these words", Shared, refusal_is_said);
    case("idle exit without any connection", OnlyOurs("the program exits"), idle_from_start);
    case("[::1]:80", OnlyOurs("the echo backend answers"), brackets);
    if rustix::process::geteuid().is_root() {
        case("every address of a name", OnlyOurs("only one address was tried"), every_address);
    } else {
        eprintln!("SKIPPED: every address of a name: needs root, for an /etc/hosts of its own");
    }
    case("a full Unix backlog", OnlyOurs("the echo backend answers"), full_backlog);
    let many = OnlyOurs("more than 60 ms");
    case("2,000 clients, a full Unix backlog", many, |it| {
        full_backlog_of_many(it, &["--connect-timeout=1min"])
    });
    case("2,000 held clients, a full Unix backlog", many, |it| {
        full_backlog_of_many(it, &["--backend-wait=1min"])
    });
    case("what can be known to be wrong is refused", OnlyOurs("started"), wrong_at_start);
    case("reset by the client", OnlyOurs("not a reset: Ok"), |program| reset_by(program, true));
    case("reset by the backend", OnlyOurs("not a reset: Ok"), |program| reset_by(program, false));
    let all_clean = OnlyOurs("ends were clean");
    case("an answer and a reset at once", all_clean, answer_and_reset_at_once);
    case("SIGTERM stops and resets", OnlyOurs("the last notification"), terminate);
    case("SIGINT stops", OnlyOurs("killed by a signal"), |it| stops_on(it, Signal::INT));
    case("SIGHUP stops", OnlyOurs("killed by a signal"), |it| stops_on(it, Signal::HUP));
    case("SIGHUP and SIGINT stay ignored", Shared, ignored_signals);
    case("SIGUSR1 tells of each connection", OnlyOurs("no line with"), tells_of_each);
    case("STATUS once a second", OnlyOurs("a notification comes"), status_rate);
    case("who hangs up is not news", Shared, silent_about_peers);
    case("lines have a priority under systemd", OnlyOurs("no line with"), prefixed_lines);
    case("--connect-timeout", OnlyOurs("unrecognized option"), connect_timeout);
    case("a client that leaves while dialling", OnlyOurs("unrecognized option"), leaves_early);
    case("descriptors of an idle connection", OnlyOurs("and not 2"), idle_descriptors);
    case("a vsock listener", OnlyOurs("a notification comes"), vsock_listener);
    case("PROXY v1", FailsOn(&[Subject::Old], "the option is unknown"), proxy_v1);
    case("PROXY v2", OnlyOurs("a connection to the backend"), proxy_v2);
    case("Unix clients with names of every length", Shared, names_of_every_length);
    case("PROXY v2 of a client with the longest name", OnlyOurs("a connection"), longest_name_v2);
    let as_ipv6 = OnlyOurs("instead of TCP4");
    case("PROXY v1 of a dual-stack client", as_ipv6, proxy_v1_dual_stack);
    case(
        "60 KB and a close with the upload unread",
        FailsOn(&[Subject::Old], "of 60000"),
        early_answer,
    );
    case("4,000 idle clients, 20,000 descriptors", OnlyOurs("of 4000"), idle_clients);
    case("60 clients, 40 descriptors", OnlyOurs("dropped"), few_descriptors);
    let not_raised = FailsOn(&[Subject::Old], "the echo backend answers");
    case("the soft limit on descriptors is raised", not_raised, soft_limit);
    case("quiet connections hold no pipes", OnlyOurs("held by 20 quiet"), quiet_after_bulk);
    case("stalled connections hold few pipes", OnlyOurs("pipes for 60 stalled"), stalled_bulk);
    case("a client queued at the idle deadline", Shared, queued_at_the_deadline);
    if rustix::process::geteuid().is_root() {
        let unset = OnlyOurs("no TCP_NODELAY");
        case("TCP_NODELAY on both sides, also of who came early", unset, no_delay);
    } else {
        eprintln!("SKIPPED: TCP_NODELAY on both sides: needs root, to look into the program");
    }
    if rustix::process::geteuid().is_root() {
        let spliced = OnlyOurs("ends of pipes");
        case("an unprivileged user's pipes are used up", spliced, pipes_used_up);
    } else {
        eprintln!("SKIPPED: an unprivileged user's pipes are used up: needs root");
    }
    case("--listen", OnlyOurs("no line with \"Listening"), own_listeners);
    case("--listen and passed sockets", OnlyOurs("as well"), both_kinds_of_sockets);
    case("urgent data", OnlyOurs("was lost"), urgent_data);
    case("a flood of one-byte messages with descriptors", OursAlone, |it| floods(it, true));
    case("a flood of one-byte messages", Shared, |it| floods(it, false));
    case("a stuck log is nobody's business", OnlyOurs("Failed to parse"), stuck_log);

    let unknown = OnlyOurs("unrecognized option");
    case("held until a TCP backend is up", unknown, |it| held_until_up(it, Family::Tcp));
    case("held until a Unix backend is up", unknown, |it| held_until_up(it, Family::Unix));
    case("a backend that never comes", unknown, never_up);
    case("200 held clients, one prober", unknown, one_prober);
    case("a held client that leaves gives its place back", unknown, held_client_leaves);
    case("a held Unix client that has sent and closed", unknown, held_sent_and_closed);
    case("a held client that has half-closed is served", unknown, held_half_closed);
    case("what time can't mend ends at once", unknown, not_mended_by_time);
    if rustix::process::geteuid().is_root() {
        case("held until the backend's socket may be used", unknown, held_until_permitted);
    } else {
        eprintln!("SKIPPED: held until the backend's socket may be used: needs root");
    }

    for pair @ (front, back) in PAIRS {
        let mut case = |name, expected, test: fn(&Path, (Family, Family))| {
            let name = format!("{name}, {front:?} to {back:?}");
            let test = Box::new(move |program: &Path| test(program, pair));
            cases.push(Case { name, expected, test });
        };
        case("64 KiB there and back", Shared, there_and_back);
        case("12 clients, random sizes and pauses", Shared, random_clients);
        let reply_lost = FailsOn(&[Subject::Old], "the reply after the half-close");
        case("the client ends first", reply_lost, client_ends_first);
        let upload_lost = FailsOn(&[Subject::Old], "the upload after the half-close");
        case("the backend ends first", upload_lost, backend_ends_first);
    }
    cases
}

// One peer and the others.

/// A client's answer comes at once beside two that flood, from either side. (Within 0.1 s: it took 0.5
/// to 5 s when a turn was bounded in bytes only.)
fn floods(program: &Path, with_descriptors: bool) {
    for from_client in [true, false] {
        // To TCP, where each byte costs more than the flood's: it always has more.
        let [from, to] = [Family::Unix, Family::Tcp].map(Endpoint::new);
        let (front, backend) = if from_client { (from, to) } else { (to, from) };
        let _proxy = Launch::new(program).arg(&backend.target).listener(&front).start();
        let times = beside_floods(&front, &backend, from_client, with_descriptors);
        assert!(times[7] < Duration::from_millis(100), "answers took {times:?}");
    }
}

/// On every pair of families: tests/urgent.rs.
fn urgent_data(program: &Path) {
    let [front, backend] = [Family::Tcp, Family::Tcp].map(Endpoint::new);
    let _proxy = Launch::new(program).arg(&backend.target).listener(&front).start();
    let failures = urgent::carry(&front, &backend, true, 0..20);
    assert!(failures.is_empty(), "urgent data was lost: {failures:?}");
}

// The command line.

fn wrong_command_lines(program: &Path) {
    let limit = "'--connections-max <N>'";
    let idle = "'--exit-idle-time <TIME>'";
    // What systemd says, and what clap says here; both name the option and the value.
    for (args, systemd, clap) in [
        (&[][..], "Not enough parameters.", "Not enough parameters."),
        (&["a", "b"], "Too many parameters.", "Too many parameters."),
        (&["-c", "0", "x"], "Connection limit is too low.", "Connection limit is too low."),
        (&["-c", "-1", "x"], "Failed to parse --connections-max= argument: -1", limit),
        (&["-c", "", "x"], "Failed to parse --connections-max= argument: ", limit),
        (&["-c", "09", "x"], "Failed to parse --connections-max= argument: 09", limit),
        (&["-c4294967296", "x"], "Failed to parse --connections-max= argument: 4294967296", limit),
        (&["-c", "0", "--help"], "Connection limit is too low.", "Connection limit is too low."),
        (&["-cx", "-c5", "x"], "Failed to parse --connections-max= argument: x", limit),
        (&["--c", "--he"], "Failed to parse --connections-max= argument: --he", limit),
        (&["--conn=x", "y"], "Failed to parse --connections-max= argument: x", limit),
        (&["--e=x", "y"], "Failed to parse --exit-idle-time= argument: x", idle),
        (&["x", "--exit-idle-time=-5s"], "Failed to parse --exit-idle-time= argument: -5s", idle),
        (
            &["--exit-idle-time", "3.s", "x"],
            "Failed to parse --exit-idle-time= argument: 3.s",
            idle,
        ),
        (&["--foo", "x"], "unrecognized option '--foo'", "unexpected argument '--foo'"),
        (
            &["--exit-idle-time"],
            "option '--exit-idle-time' requires an argument",
            "a value is required for '--exit-idle-time <TIME>'",
        ),
        (
            &["--help=3"],
            "option '--help' doesn't allow an argument",
            "unexpected value '3' for '--help'",
        ),
        (&["x"], "Didn't get any sockets passed in.", "Didn't get any sockets passed in."),
        (&["--", "x"], "Didn't get any sockets passed in.", "Didn't get any sockets passed in."),
    ] {
        let (code, stdout, stderr) = run(&program.into(), args);
        assert_eq!(code, Some(1), "{args:?}: {stderr}");
        assert!(stderr.contains(systemd) || stderr.contains(clap), "{args:?}: {stderr}");
        assert_eq!((stderr.lines().count(), &*stdout), (1, ""), "{args:?}: one line: {stderr}");
    }
}

fn help_and_version(program: &Path) {
    for help in ["--help", "-h", "--he"] {
        let (code, stdout, stderr) = run(&program.into(), &[help]);
        assert_eq!(code, Some(0), "{help}: {stderr}");
        assert!(stdout.contains("--connections-max") && stdout.lines().count() <= 40, "{stdout}");
    }
    for version in ["--version", "--vers"] {
        assert_eq!(run(&program.into(), &[version]).0, Some(0), "{version}");
    }
}

fn accepted_values(program: &Path) {
    let backend = echo_backend(Family::Tcp);
    for args in [
        &["-c", "0x10"][..],
        &["-c010"],
        &["--connections-max=+5"],
        &["--connections-max", "4294967295"],
        &["--conn= 5"],
        &["--exit-idle-time=1.5"],
        &["--exit-idle-time=5min 20s"],
        &["--exit-idle-time", "1M"],
        &["--exit-idle-time=infinity"],
        &["--exit=.5h"],
        &["--"],
    ] {
        let front = Endpoint::new(Family::Tcp);
        let launch = Launch::new(program).args(args).arg(&backend.target).listener(&front);
        let _proxy = launch.start();
        echoes(&mut front.connect());
    }
}

fn repeated_options(program: &Path) {
    let (front, backend) = (Endpoint::new(Family::Tcp), echo_backend(Family::Tcp));
    let args = ["-c", "0x1", "--connections-max=8", &backend.target, "--conn=9"];
    let _proxy = Launch::new(program).args(args).listener(&front).start();
    let mut clients: Vec<_> = (0..5).map(|_| front.connect()).collect();
    clients.iter_mut().for_each(echoes);
}

fn wrong_at_start(program: &Path) {
    let long = format!("/{}", "x".repeat(107));
    for target in ["", ":80", "localhost:99999", "localhost:", "::1", "[::1", "@", &long] {
        let front = Endpoint::new(Family::Tcp);
        let mut manager = Manager::new();
        let mut proxy = Launch::new(program)
            .arg(target)
            .listener(&front)
            .env("NOTIFY_SOCKET", manager.path.display())
            .start();
        let ready = thread::spawn(move || manager.next());
        let ended = poll_until(Instant::now() + PATIENCE, || {
            (ready.is_finished() || !proxy.is_running()).then(|| !proxy.is_running())
        });
        assert_eq!(ended, Some(true), "started with the target {target:?}");
        assert_eq!(proxy.wait().code(), Some(1));
        let stderr = proxy.lines.all();
        assert!(stderr.contains(&format!("Invalid target {target:?}")), "{stderr}");
    }
}

// Sockets and the service manager.

fn other_pid(program: &Path) {
    let front = Endpoint::new(Family::Tcp);
    let launch = Launch::new(program).arg("x").listener(&front).other_pid();
    let mut proxy = launch.env("LISTEN_FDNAMES", "somebody-elses").start();
    assert_eq!(proxy.wait().code(), Some(1));
    let stderr = proxy.lines.all();
    assert!(stderr.contains("Didn't get any sockets passed in."), "{stderr}");
}

fn datagram_socket(program: &Path) {
    let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let mut proxy = Launch::new(program).arg("127.0.0.1:80").socket(&socket).start();
    assert_eq!(proxy.wait().code(), Some(1));
    let stderr = proxy.lines.all();
    assert!(stderr.contains("Passed in socket is not a stream socket."), "{stderr}");
}

fn several_sockets(program: &Path) {
    let fronts = [Family::Tcp, Family::Unix, Family::Tcp].map(Endpoint::new);
    let backend = echo_backend(Family::Unix);
    let mut launch = Launch::new(program).arg(&backend.target);
    for front in &fronts {
        launch = launch.listener(front);
    }
    let _proxy = launch.start();
    for front in &fronts {
        echoes(&mut front.connect());
    }
}

fn notifications(program: &Path) {
    let (front, backend) = (Endpoint::new(Family::Tcp), echo_backend(Family::Tcp));
    let mut manager = Manager::new();
    let mut proxy = Launch::new(program)
        .args(["--exit-idle-time=100ms", &backend.target])
        .listener(&front)
        .env("NOTIFY_SOCKET", manager.path.display())
        .start();
    let mut client = front.connect();
    assert_eq!(manager.next(), "READY=1");
    assert_eq!(manager.next(), "STATUS=Processing requests...");
    echoes(&mut client);
    drop(client);
    manager.wait_for("STOPPING=1");
    manager.wait_for("STATUS=Shutting down...");
    assert_eq!(proxy.wait().code(), Some(0));
}

fn watchdog(program: &Path) {
    let (front, backend) = (Endpoint::new(Family::Tcp), echo_backend(Family::Tcp));
    let mut manager = Manager::new();
    let _proxy = Launch::new(program)
        .arg(&backend.target)
        .listener(&front)
        .env("NOTIFY_SOCKET", manager.path.display())
        .env("WATCHDOG_USEC", 200_000)
        .start();
    for _ in 0..3 {
        manager.wait_for("WATCHDOG=1");
    }
    echoes(&mut front.connect());
}

fn idle_exit(program: &Path) {
    let (front, backend) = (Endpoint::new(Family::Tcp), echo_backend(Family::Tcp));
    let args = ["--exit-idle-time=200ms", &backend.target];
    let mut proxy = Launch::new(program).args(args).listener(&front).start();
    let mut client = front.connect();
    echoes(&mut client);
    pause(Duration::from_millis(500));
    assert!(proxy.is_running(), "a connection is no idleness");
    echoes(&mut client);
    drop(client);
    assert_eq!(proxy.wait().code(), Some(0));
    // As systemd would: the socket stays, and the next client starts the next process.
    let mut client = front.connect();
    let args = ["--exit-idle-time=200ms", &backend.target];
    let _proxy = Launch::new(program).args(args).listener(&front).start();
    echoes(&mut client);
}

fn idle_from_start(program: &Path) {
    let front = Endpoint::new(Family::Tcp);
    let args = ["--exit-idle-time=200ms", "127.0.0.1:80"];
    let mut proxy = Launch::new(program).args(args).listener(&front).start();
    let deadline = Instant::now() + Duration::from_secs(3);
    let status = poll_until(deadline, || proxy.child.try_wait().unwrap());
    assert_eq!(status.expect("the program exits").code(), Some(0));
}

fn queued_at_the_deadline(program: &Path) {
    let (front, backend) = (Endpoint::new(Family::Tcp), echo_backend(Family::Tcp));
    let args = ["--exit-idle-time=300ms", &backend.target];
    let mut proxy = Launch::new(program).args(args).listener(&front).start();
    echoes(&mut front.connect());
    // Stopped over the deadline, it wakes up to an expired timer and a queued client at once.
    proxy.signal(Signal::STOP);
    pause(Duration::from_millis(500));
    let mut client = front.connect();
    proxy.signal(Signal::CONT);
    echoes(&mut client);
    drop(client);
    assert_eq!(proxy.wait().code(), Some(0));
}

fn terminate(program: &Path) {
    let (front, backend) = (Endpoint::new(Family::Tcp), Endpoint::new(Family::Tcp));
    let mut manager = Manager::new();
    let mut proxy = Launch::new(program)
        .arg(&backend.target)
        .listener(&front)
        .env("NOTIFY_SOCKET", manager.path.display())
        .start();
    let mut client = front.connect();
    let mut server = backend.accept();
    server.write_all(b"half of a download").unwrap();
    client.read_exact(&mut [0; 18]).unwrap();
    proxy.signal(Signal::TERM);
    proxy.wait();
    let (_, end) = read_all(&mut client);
    let last = {
        // A mark behind whatever the program said.
        let mark = std::os::unix::net::UnixDatagram::unbound().unwrap();
        mark.send_to(b"MARK=1", &manager.path).unwrap();
        let mut last = String::new();
        loop {
            match manager.next() {
                mark if mark == "MARK=1" => break last,
                next => last = next,
            }
        }
    };
    assert_eq!(last, "STATUS=Shutting down...", "the last notification");
    assert!(is_reset(&end), "not a reset: {end:?}");
    let (_, end) = read_all(&mut server);
    assert!(is_reset(&end), "not a reset: {end:?}");
}

fn stops_on(program: &Path, signal: Signal) {
    let front = Endpoint::new(Family::Tcp);
    let mut manager = Manager::new();
    let mut proxy = Launch::new(program)
        .args(["--exit-idle-time=1h", "127.0.0.1:80"])
        .listener(&front)
        .env("NOTIFY_SOCKET", manager.path.display())
        .start();
    assert!(front_is_served(&front));
    proxy.signal(signal);
    assert_eq!(proxy.wait().code(), Some(0), "killed by a signal");
    manager.wait_for("STOPPING=1");
}

/// As with nohup(1), and in what a shell's script starts with `&`.
fn ignored_signals(program: &Path) {
    let (front, backend) = (Endpoint::new(Family::Tcp), echo_backend(Family::Tcp));
    let launch = Launch::new(program).arg(&backend.target).listener(&front);
    let launch = launch.signals("--ignore-signal=HUP,INT");
    let mut proxy = launch.start();
    let mut client = front.connect();
    echoes(&mut client);
    proxy.signal(Signal::HUP);
    proxy.signal(Signal::INT);
    // A signal that is not ignored is handled before the next system call ends.
    (0..10).for_each(|_| echoes(&mut front.connect()));
    echoes(&mut client);
    assert!(proxy.is_running());
    proxy.signal(Signal::TERM);
    proxy.wait();
}

fn tells_of_each(program: &Path) {
    for (front_family, back) in PAIRS {
        let (front, backend) = (Endpoint::new(front_family), echo_backend(back));
        let proxy = Launch::new(program).arg(&backend.target).listener(&front).start();
        let mut clients: Vec<_> = (0..5).map(|_| front.connect()).collect();
        for (round, client) in clients.iter_mut().enumerate() {
            (0..=round).for_each(|_| echoes(client));
        }
        for times in 1..=2 {
            proxy.signal(Signal::USR1);
            proxy.lines.wait_for("Open connections: 5.");
            for round in 0..5 {
                let bytes = 14 * (round + 1);
                let line = format!(": {bytes} bytes to the backend, {bytes} bytes back");
                let said = || (proxy.lines.count(&line) == times).then_some(());
                poll_until(Instant::now() + PATIENCE, said).expect("no line with what it carried");
            }
        }
        let line = proxy.lines.wait_for("Connection of ");
        assert!(line.contains(&backend.target), "{line}");
        let has_tcp = [front_family, back].contains(&Family::Tcp);
        assert_eq!(line.contains(", idle for "), has_tcp, "{line}");
        clients.iter_mut().for_each(echoes);
    }
}

/// Waits until somebody accepts: the backend is not there, so that the client is closed.
fn front_is_served(front: &Endpoint) -> bool {
    read_all(&mut front.connect()).0.is_empty()
}

fn status_rate(program: &Path) {
    let (front, backend) = (Endpoint::new(Family::Tcp), echo_backend(Family::Tcp));
    let mut manager = Manager::new();
    let _proxy = Launch::new(program)
        .arg(&backend.target)
        .listener(&front)
        .env("NOTIFY_SOCKET", manager.path.display())
        .start();
    manager.wait_for("STATUS=Processing requests...");
    // Far more changes than messages.
    let start = Instant::now();
    thread::scope(|scope| {
        scope.spawn(|| {
            while start.elapsed() < Duration::from_secs(5) {
                echoes(&mut front.connect());
            }
        });
        manager.wait_for("STATUS=");
        for _ in 0..2 {
            let last = Instant::now();
            let status = manager.wait_for("STATUS=");
            let apart = last.elapsed();
            assert!(status.contains(" of 256, ") && status.contains(" served, "), "{status}");
            assert!(apart > Duration::from_millis(700), "{apart:?} apart");
        }
    });
}

fn silent_about_peers(program: &Path) {
    let (front, backend) = (Endpoint::new(Family::Tcp), echo_backend(Family::Tcp));
    let proxy = Launch::new(program).arg(&backend.target).listener(&front).start();
    for round in 0..30 {
        let mut client = front.connect();
        echoes(&mut client);
        if round % 2 == 0 {
            reset(client);
        }
    }
    echoes(&mut front.connect());
    let unasked = proxy.lines.count("");
    assert_eq!(unasked, 0, "lines about clients that left");
}

fn prefixed_lines(program: &Path) {
    let front = Endpoint::new(Family::Tcp);
    let target = format!("127.0.0.1:{}", free_port());
    let proxy = Launch::new(program).arg(target).listener(&front).under_systemd().start();
    assert!(front_is_served(&front));
    proxy.lines.wait_for("<4>Failed to connect to remote host");
}

/// A TCP backend that takes no notice: its backlog is full, and the kernel drops what comes.
fn black_hole() -> (Endpoint, Vec<Socket>) {
    let backend = Endpoint::with_backlog(Family::Tcp, 0);
    let mut crowd = Vec::new();
    loop {
        let socket = Socket::new(Domain::IPV4, Type::STREAM.nonblocking(), None).unwrap();
        let _ = socket.connect(&backend.address);
        crowd.push(socket);
        let last = crowd.last().unwrap();
        let established = poll_until(Instant::now() + Duration::from_millis(50), || {
            last.peer_addr().is_ok().then_some(())
        });
        if established.is_none() {
            return (backend, crowd);
        }
    }
}

fn connect_timeout(program: &Path) {
    let (backend, _crowd) = black_hole();
    let front = Endpoint::new(Family::Tcp);
    let args = ["--connect-timeout=300ms", &backend.target];
    let mut proxy = Launch::new(program).args(args).listener(&front).start();
    let start = Instant::now();
    let (bytes, end) = read_all(&mut front.connect());
    assert!(bytes.is_empty());
    if !proxy.is_running() {
        panic!("{}", proxy.lines.all());
    }
    end.unwrap();
    let took = start.elapsed();
    let bounds = Duration::from_millis(300)..Duration::from_secs(3);
    assert!(bounds.contains(&took), "{took:?}");
    let line = proxy.lines.wait_for("Failed to connect to remote host");
    assert!(line.contains("Connection timed out"), "{line}");
}

fn leaves_early(program: &Path) {
    let (backend, _crowd) = black_hole();
    let front = Endpoint::new(Family::Tcp);
    let args = ["--connect-timeout=1h", "--log-level=debug", "-c1", &backend.target];
    let mut proxy = Launch::new(program).args(args).listener(&front).start();
    let client = front.connect();
    client.send(b"hello?").unwrap();
    let taken = poll_until(Instant::now() + PATIENCE, || {
        if !proxy.is_running() {
            panic!("{}", proxy.lines.all());
        }
        (proxy.descriptors() > 10).then_some(())
    });
    taken.expect("the client is accepted");
    reset(client);
    proxy.lines.wait_for("the client has left");
}

fn idle_descriptors(program: &Path) {
    const CLIENTS: usize = 10;
    let (front, backend) = (Endpoint::new(Family::Tcp), echo_backend(Family::Tcp));
    let proxy = Launch::new(program).arg(&backend.target).listener(&front).start();
    let mut first = front.connect();
    echoes(&mut first);
    let before = proxy.descriptors();
    let mut clients: Vec<_> = (0..CLIENTS).map(|_| front.connect()).collect();
    clients.iter_mut().for_each(echoes);
    let each = (proxy.descriptors() - before) / CLIENTS;
    assert_eq!(each, 2, "{each} descriptors an idle connection, and not 2");
}

fn vsock_listener(program: &Path) {
    // Any port of any CID this machine has; nobody connects.
    let address = SockAddr::vsock(u32::MAX, u32::MAX);
    let socket = match Socket::new(Domain::VSOCK, Type::STREAM, None) {
        Ok(socket) => socket,
        Err(error) => {
            eprintln!("SKIPPED: a vsock listener: {error}");
            return;
        }
    };
    socket.bind(&address).unwrap();
    socket.listen(1).unwrap();
    let mut manager = Manager::new();
    let _proxy = Launch::new(program)
        .args(["--exit-idle-time=1s", "127.0.0.1:80"])
        .socket(&socket)
        .env("NOTIFY_SOCKET", manager.path.display())
        .start();
    manager.wait_for("STOPPING=1");
    // A name of a socket that exists is as it is written; any port of any CID again.
    let any = ["--listen=vsock::4294967295", "--log-level=debug", "127.0.0.1:80"];
    let proxy = Launch::new(program).args(any).start();
    let line = proxy.lines.wait_for("Listening on vsock::");
    let port = line.trim_start_matches("Listening on vsock::").trim_end_matches('.');
    drop(proxy);
    let selected = format!("vsock::{port}=127.0.0.1:80");
    let args = [&*format!("--listen=vsock::{port}"), "--log-level=debug", &selected];
    let proxy = Launch::new(program).args(args).start();
    proxy.lines.wait_for(&format!("Serving vsock::{port}, connections go to 127.0.0.1:80"));
    drop(proxy);
    if !Path::new("/sys/module/vsock_loopback").exists() {
        // Any other CID than the loopback one (1) is another machine's.
        eprintln!("SKIPPED: bytes over vsock: this kernel has no vsock_loopback");
        return;
    }
    let backend = Socket::new(Domain::VSOCK, Type::STREAM, None).unwrap();
    backend.bind(&address).unwrap();
    backend.listen(1).unwrap();
    let (_, target) = backend.local_addr().unwrap().as_vsock_address().unwrap();
    serve_on(backend, echo);
    let args = [format!("--listen=vsock::{port}"), format!("vsock:1:{target}")];
    let proxy = Launch::new(program).args(args).start();
    proxy.lines.wait_for("Listening on vsock::");
    echoes(&mut connect(&SockAddr::vsock(1, port.parse().unwrap())));
}

// Targets.

fn unreachable(program: &Path) {
    let front = Endpoint::new(Family::Tcp);
    let target = format!("127.0.0.1:{}", free_port());
    let mut proxy = Launch::new(program).arg(target).listener(&front).start();
    for _ in 0..3 {
        let (bytes, _) = read_all(&mut front.connect());
        assert!(bytes.is_empty());
    }
    assert!(proxy.is_running());
    let line = proxy.lines.wait_for("Failed to connect to remote host");
    assert!(line.contains("Connection refused"), "{line}");
}

fn name_is_resolved(program: &Path) {
    let (front, backend) = (Endpoint::new(Family::Tcp), echo_backend(Family::Tcp));
    let target = format!("localhost:{}", backend.port());
    let _proxy = Launch::new(program).arg(target).listener(&front).start();
    echoes(&mut front.connect());
}

fn every_address(program: &Path) {
    // The backend is first at the one address, then at the other: who tries only one fails once.
    let port = reach_by_name(program, "127.0.0.1:0");
    reach_by_name(program, &format!("127.0.0.9:{port}"));
}

fn reach_by_name(program: &Path, address: &str) -> u16 {
    let (front, backend) = (Endpoint::new(Family::Tcp), Endpoint::tcp(address, 16));
    let directory = TempDir::new().unwrap();
    let hosts = directory.path().join("hosts");
    fs::write(&hosts, "127.0.0.1 two-faced\n127.0.0.9 two-faced\n").unwrap();
    let port = backend.port();
    let launch = Launch::new(program).arg(format!("two-faced:{port}"));
    let _proxy = launch.listener(&front).hosts(hosts).start();
    let mut client = front.connect();
    client.write_all(b"which one?").unwrap();
    backend.socket.set_nonblocking(true).unwrap();
    let found =
        poll_until(Instant::now() + Duration::from_secs(5), || backend.socket.accept().ok());
    assert!(found.is_some(), "only one address was tried");
    port
}

fn ipv6_backend() -> Endpoint {
    let backend = Endpoint::tcp("[::1]:0", 16);
    serve(&backend, echo);
    backend
}

fn last_colon(program: &Path) {
    let (front, backend) = (Endpoint::new(Family::Tcp), ipv6_backend());
    let target = format!("::1:{}", backend.port());
    let _proxy = Launch::new(program).arg(target).listener(&front).start();
    echoes(&mut front.connect());
}

fn brackets(program: &Path) {
    let (front, backend) = (Endpoint::new(Family::Tcp), ipv6_backend());
    let target = format!("[::1]:{}", backend.port());
    let _proxy = Launch::new(program).arg(target).listener(&front).start();
    echoes(&mut front.connect());
}

fn abstract_socket(program: &Path) {
    let name = format!("socket-proxyd-test-{}", unique_name());
    let address = SockAddr::unix(format!("\0{name}")).unwrap();
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None).unwrap();
    socket.bind(&address).unwrap();
    socket.listen(16).unwrap();
    let handle = socket.try_clone().unwrap();
    thread::spawn(move || echo(handle.accept().unwrap().0));
    let front = Endpoint::new(Family::Unix);
    let _proxy = Launch::new(program).arg(format!("@{name}")).listener(&front).start();
    echoes(&mut front.connect());
}

/// Something that no other test has at this moment.
fn unique_name() -> String {
    format!("{}-{}", std::process::id(), free_port())
}

fn full_backlog(program: &Path) {
    let front = Endpoint::new(Family::Tcp);
    let backend = Endpoint::with_backlog(Family::Unix, 0);
    let fill = Socket::new(Domain::UNIX, Type::STREAM.nonblocking(), None).unwrap();
    fill.connect(&backend.address).unwrap();
    let probe = Socket::new(Domain::UNIX, Type::STREAM.nonblocking(), None).unwrap();
    let full = probe.connect(&backend.address).unwrap_err();
    assert_eq!(full.kind(), ErrorKind::WouldBlock, "the backlog is not full");
    let proxy = Launch::new(program).arg(&backend.target).listener(&front).start();
    let mut client = front.connect();
    client.write_all(b"patience").unwrap();
    // The proxy has met the full backlog once it has accepted the client and slept over it.
    let busy =
        poll_until(Instant::now() + PATIENCE, || (proxy.cpu() > Duration::ZERO).then_some(()));
    busy.unwrap();
    pause(Duration::from_millis(300));
    serve(&backend, echo);
    echoes_after(&mut client, b"patience");
}

/// At most 20 ms of a processor a second, at three times that here, and none is lost.
fn full_backlog_of_many(program: &Path, args: &[&str]) {
    const CLIENTS: usize = 2000;
    let front = Endpoint::new(Family::Unix);
    let backend = Endpoint::with_backlog(Family::Unix, 0);
    let fill = Socket::new(Domain::UNIX, Type::STREAM.nonblocking(), None).unwrap();
    fill.connect(&backend.address).unwrap();
    let launch = Launch::new(program).args(args).args(["-c4000", &backend.target]);
    let proxy = launch.listener(&front).start();
    let mut clients: Vec<_> = (0..CLIENTS).map(|_| front.connect()).collect();
    clients.iter_mut().for_each(|client| client.write_all(b"patience").unwrap());
    // All are in.
    let settled = || {
        let before = proxy.cpu();
        pause(Duration::from_millis(500));
        (proxy.descriptors() > CLIENTS && proxy.cpu() - before < Duration::from_millis(30))
            .then_some(())
    };
    let settled = poll_until(Instant::now() + Duration::from_secs(6), settled);
    assert!(settled.is_some(), "more than 60 ms of a processor a second");
    // One after the other, as a backend without a backlog takes them.
    let listener = backend.socket.try_clone().unwrap();
    thread::spawn(move || {
        let echo_once = |mut socket: Socket| {
            let mut bytes = [0; 8];
            let _ = socket.read_exact(&mut bytes).and_then(|()| socket.write_all(&bytes));
        };
        while let Ok((socket, _)) = listener.accept() {
            thread::spawn(move || echo_once(socket));
        }
    });
    clients.iter_mut().for_each(|client| echoes_after(client, b"patience"));
}

fn echoes_after(client: &mut Socket, sent: &[u8]) {
    let mut answer = vec![0; sent.len()];
    client.read_exact(&mut answer).expect("the echo backend answers");
    assert_eq!(answer, sent);
}

fn proxy_v1(program: &Path) {
    for (address, protocol) in [("127.0.0.1", "TCP4"), ("::1", "TCP6")] {
        let front = Endpoint::tcp(&std::net::SocketAddr::new(ip(address), 0).to_string(), 16);
        has_proxy_header(program, &front, address, protocol);
    }
    let (front, backend) = (Endpoint::new(Family::Unix), Endpoint::new(Family::Unix));
    let args = ["--proxy-protocol=v1", &backend.target];
    let _proxy = Launch::new(program).args(args).listener(&front).start();
    let client = front.connect();
    client.shutdown(Shutdown::Write).unwrap();
    let (bytes, _) = read_all(&mut backend.accept());
    assert_eq!(bytes, b"PROXY UNKNOWN\r\n");
}

fn proxy_v2(program: &Path) {
    for (address, listen) in
        [("127.0.0.1", "127.0.0.1:0"), ("::1", "[::1]:0"), ("127.0.0.1", "[::]:0")]
    {
        let front = Endpoint::tcp(listen, 16);
        let peer: std::net::SocketAddr = std::net::SocketAddr::new(ip(address), front.port());
        let client = connect(&peer.into());
        let header = v2_header_of(program, &front, &client);
        let local = client.local_addr().unwrap().as_socket().unwrap();
        let mut expected = b"\r\n\r\n\0\r\nQUIT\n\x21".to_vec();
        match (local.ip(), peer.ip()) {
            (std::net::IpAddr::V4(from), std::net::IpAddr::V4(to)) => {
                expected.extend([0x11, 0, 12]);
                expected.extend(from.octets().into_iter().chain(to.octets()));
            }
            (std::net::IpAddr::V6(from), std::net::IpAddr::V6(to)) => {
                expected.extend([0x21, 0, 36]);
                expected.extend(from.octets().into_iter().chain(to.octets()));
            }
            _ => unreachable!("both are of one family"),
        }
        expected.extend(local.port().to_be_bytes().into_iter().chain(peer.port().to_be_bytes()));
        assert_eq!(header, expected);
    }
    let front = Endpoint::new(Family::Unix);
    // A client without a name has no address: LOCAL.
    let header = v2_header_of(program, &front, &front.connect());
    assert_eq!(header, b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0");
    let directory = TempDir::new().unwrap();
    let name = directory.path().join("client");
    let client = Socket::new(Domain::UNIX, Type::STREAM, None).unwrap();
    client.bind(&SockAddr::unix(&name).unwrap()).unwrap();
    client.connect(&front.socket.local_addr().unwrap()).unwrap();
    let header = v2_header_of(program, &front, &client);
    assert_eq!(header[..16], *b"\r\n\r\n\0\r\nQUIT\n\x21\x31\0\xd8");
    assert_eq!(header.len(), 16 + 216);
    for (at, path) in [(16, name.to_str().unwrap()), (16 + 108, &front.target)] {
        let with_nul = [path.as_bytes(), b"\0"].concat();
        assert_eq!(header[at..][..with_nul.len()], with_nul);
    }
}

/// A directory, and in it a path of 108 bytes, which is all of `sun_path`.
fn longest_path() -> (TempDir, Vec<u8>) {
    let directory = TempDir::new().unwrap();
    let mut path = directory.path().as_os_str().as_encoded_bytes().to_vec();
    path.push(b'/');
    path.resize(108, b'x');
    (directory, path)
}

fn names_of_every_length(program: &Path) {
    let (front, backend) = (Endpoint::new(Family::Unix), echo_backend(Family::Unix));
    let mut proxy = Launch::new(program).arg(&backend.target).listener(&front).start();
    let mut stays = front.connect();
    echoes(&mut stays);
    let (directory, longest) = longest_path();
    let shortest = directory.path().as_os_str().len() + 2;
    let paths = (shortest..=108).map(|length| longest[..length].to_vec());
    let unique = std::process::id().to_be_bytes();
    let abstracts = (0..=103).map(|length| [b"\0", &unique[..], &vec![0xff; length]].concat());
    for name in paths.chain(abstracts) {
        let mut client = Socket::new(Domain::UNIX, Type::STREAM, None).unwrap();
        client.bind(&unix_address(&name)).unwrap();
        client.connect(&front.address).unwrap();
        echoes(&mut client);
    }
    echoes(&mut stays);
    assert!(proxy.is_running());
}

fn longest_name_v2(program: &Path) {
    let front = Endpoint::new(Family::Unix);
    let (_directory, path) = longest_path();
    let client = Socket::new(Domain::UNIX, Type::STREAM, None).unwrap();
    client.bind(&unix_address(&path)).unwrap();
    client.connect(&front.address).unwrap();
    let header = v2_header_of(program, &front, &client);
    assert_eq!(header[16..][..108], path);
}

/// What a client that says nothing makes the backend get.
fn v2_header_of(program: &Path, front: &Endpoint, client: &Socket) -> Vec<u8> {
    let backend = Endpoint::new(Family::Unix);
    let args = ["--proxy-protocol=v2", &backend.target];
    let _proxy = Launch::new(program).args(args).listener(front).start();
    client.shutdown(Shutdown::Write).unwrap();
    backend.socket.set_nonblocking(true).unwrap();
    let accepted =
        poll_until(Instant::now() + Duration::from_secs(5), || backend.socket.accept().ok());
    let (mut server, _) = accepted.expect("a connection to the backend");
    server.set_nonblocking(false).unwrap();
    let (bytes, _) = read_all(&mut server);
    bytes
}

fn proxy_v1_dual_stack(program: &Path) {
    has_proxy_header(program, &Endpoint::tcp("[::]:0", 16), "127.0.0.1", "TCP4");
}

fn has_proxy_header(program: &Path, front: &Endpoint, address: &str, protocol: &str) {
    let backend = Endpoint::new(Family::Tcp);
    let args = ["--proxy-protocol=v1", &backend.target];
    let mut proxy = Launch::new(program).args(args).listener(front).start();
    let mut client = connect(&std::net::SocketAddr::new(ip(address), front.port()).into());
    client.write_all(b"first bytes").unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    backend.socket.set_nonblocking(true).unwrap();
    let accepted = poll_until(Instant::now() + PATIENCE, || {
        assert!(
            proxy.is_running(),
            "the option is unknown, no header instead of {protocol}: {}",
            proxy.lines.all()
        );
        backend.socket.accept().ok()
    });
    let (mut server, _) = accepted.expect("a connection to the backend");
    server.set_nonblocking(false).unwrap();
    let (bytes, _) = read_all(&mut server);
    let source = client.local_addr().unwrap().as_socket().unwrap();
    let (source, source_port, port) = (source.ip(), source.port(), front.port());
    let expected =
        format!("PROXY {protocol} {source} {address} {source_port} {port}\r\nfirst bytes");
    let bytes = String::from_utf8(bytes).unwrap();
    assert!(bytes == expected, "{bytes} instead of {protocol}");
}

fn ip(text: &str) -> std::net::IpAddr {
    text.parse().unwrap()
}

// Forwarding.

fn there_and_back(program: &Path, (front, back): (Family, Family)) {
    let (front, backend) = (Endpoint::new(front), echo_backend(back));
    let _proxy = Launch::new(program).arg(&backend.target).listener(&front).start();
    let mut client = front.connect();
    let message = noise(1, 64 * 1024);
    assert!(exchange(&mut client, &message).unwrap() == message);
    echoes(&mut client);
}

fn random_clients(program: &Path, (front, back): (Family, Family)) {
    let (front, backend) = (Endpoint::new(front), echo_backend(back));
    let _proxy = Launch::new(program).arg(&backend.target).listener(&front).start();
    thread::scope(|scope| {
        for seed in 0..12 {
            let client = front.connect();
            scope.spawn(move || random_client(client, seed));
        }
    });
}

/// Sends up to 9 MB in pieces of all sizes with pauses, and compares what comes back.
fn random_client(client: Socket, seed: u64) {
    let dice = noise(seed, 4096);
    let die = |at: usize| usize::from(dice[at % 4096]) << 8 | usize::from(dice[(at + 1) % 4096]);
    let length = (die(0) * 144).min(9_000_000);
    let message = noise(seed + 100, length);
    let mut reader = client.try_clone().unwrap();
    let expected = Sha256::digest(&message);
    thread::scope(|scope| {
        scope.spawn(move || {
            let (mut sent, mut at) = (0, 2);
            while sent < message.len() {
                let piece = 1 + die(at) % [1, 100, 5000, 70_000][die(at + 2) % 4];
                let piece = piece.min(message.len() - sent);
                (&client).write_all(&message[sent..sent + piece]).unwrap();
                sent += piece;
                at += 4;
                if die(at) % 16 == 0 {
                    pause(Duration::from_micros((die(at + 1) % 2000) as u64));
                }
            }
        });
        let mut digest = Sha256::new();
        let mut buffer = vec![0; 100_000];
        let (mut left, mut at) = (length, 1);
        while left > 0 {
            let room = (1 + die(at) % buffer.len()).min(left);
            at += 3;
            let bytes = reader.read(&mut buffer[..room]).expect("no error before the end");
            assert!(bytes > 0, "the end came {left} bytes early");
            digest.update(&buffer[..bytes]);
            left -= bytes;
        }
        assert!(digest.finalize() == expected, "the bytes of client {seed} differ");
    });
}

fn client_ends_first(program: &Path, (front, back): (Family, Family)) {
    let (front, backend) = (Endpoint::new(front), Endpoint::new(back));
    let _proxy = Launch::new(program).arg(&backend.target).listener(&front).start();
    let mut client = front.connect();
    client.write_all(b"question").unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    let mut server = backend.accept();
    assert_eq!(read_all(&mut server).0, b"question");
    let answer = noise(2, 300_000);
    let _ = server.write_all(&answer);
    drop(server);
    let (received, end) = read_all(&mut client);
    assert!(received == answer, "the reply after the half-close: {} bytes", received.len());
    end.unwrap();
}

fn backend_ends_first(program: &Path, (front, back): (Family, Family)) {
    let (front, backend) = (Endpoint::new(front), Endpoint::new(back));
    let _proxy = Launch::new(program).arg(&backend.target).listener(&front).start();
    let mut client = front.connect();
    let mut server = backend.accept();
    server.write_all(b"greeting").unwrap();
    server.shutdown(Shutdown::Write).unwrap();
    assert_eq!(read_all(&mut client).0, b"greeting");
    let upload = noise(3, 300_000);
    let _ = client.write_all(&upload);
    drop(client);
    let (received, end) = read_all(&mut server);
    assert!(received == upload, "the upload after the half-close: {} bytes", received.len());
    end.unwrap();
}

fn reset_by(program: &Path, the_client: bool) {
    let (front, backend) = (Endpoint::new(Family::Tcp), Endpoint::new(Family::Tcp));
    let _proxy = Launch::new(program).arg(&backend.target).listener(&front).start();
    let client = front.connect();
    let server = backend.accept();
    let (mut one, mut other) = if the_client { (client, server) } else { (server, client) };
    let last_words = noise(4, 100_000);
    one.write_all(&last_words).unwrap();
    let mut read = vec![0; last_words.len()];
    other.read_exact(&mut read).unwrap();
    assert!(read == last_words);
    reset(one);
    let (_, end) = read_all(&mut other);
    assert!(is_reset(&end), "not a reset: {end:?}");
}

/// The reset may be there before the proxy has seen that it is connected.
fn answer_and_reset_at_once(program: &Path) {
    let (front, backend) = (Endpoint::new(Family::Tcp), Endpoint::new(Family::Tcp));
    let listener = backend.socket.try_clone().unwrap();
    thread::spawn(move || {
        while let Ok((mut socket, _)) = listener.accept() {
            let _ = socket.write_all(&[b'y'; 100]);
            reset(socket);
        }
    });
    let _proxy = Launch::new(program).arg(&backend.target).listener(&front).start();
    let mut clean = 0;
    for _ in 0..100 {
        // Several at a time, so that the proxy is late.
        let mut clients: Vec<_> = (0..20).map(|_| front.connect()).collect();
        for client in &mut clients {
            let (bytes, end) = read_all(client);
            clean += usize::from(!is_reset(&end));
            assert!(bytes.is_empty() || bytes.len() == 100, "{} bytes", bytes.len());
        }
    }
    assert_eq!(clean, 0, "of 2,000 ends were clean");
}

fn early_answer(program: &Path) {
    for round in 0..10 {
        let (front, backend) = (Endpoint::new(Family::Tcp), Endpoint::new(Family::Tcp));
        let _proxy = Launch::new(program).arg(&backend.target).listener(&front).start();
        let mut client = front.connect();
        let mut server = backend.accept();
        let mut uploader = client.try_clone().unwrap();
        // Ends with the proxy at the latest.
        thread::spawn(move || while uploader.write_all(&[b'u'; 10_000]).is_ok() {});
        let answer = noise(round, 60_000);
        server.read_exact(&mut [0; 10_000]).unwrap();
        server.write_all(&answer).unwrap();
        drop(server);
        let (received, _) = read_all(&mut client);
        assert!(received == answer, "{} of 60000 bytes arrived", received.len());
    }
}

// Limits.

fn exact_cap(program: &Path) {
    let (front, backend) = (Endpoint::new(Family::Tcp), echo_backend(Family::Tcp));
    let args = ["--connections-max=2", &backend.target];
    let _proxy = Launch::new(program).args(args).listener(&front).start();
    let mut first = front.connect();
    echoes(&mut first);
    let mut second = front.connect();
    echoes(&mut second);
    let mut third = front.connect();
    is_refused(&mut third);
    drop(first);
    let deadline = Instant::now() + PATIENCE;
    let served = poll_until(deadline, || exchange(&mut front.connect(), b"now?").ok());
    served.expect("a place that came free is given away");
    echoes(&mut second);
}

fn overflow_waits(program: &Path) {
    for front in [Family::Tcp, Family::Unix] {
        let (front, backend) = (Endpoint::new(front), echo_backend(Family::Unix));
        let args = ["--connections-max=2", "--overflow=wait", &backend.target];
        let mut proxy = Launch::new(program).args(args).listener(&front).start();
        let mut first = front.connect();
        if !answers(&mut first, &mut proxy) {
            panic!("{}", proxy.lines.all());
        }
        let mut second = front.connect();
        echoes(&mut second);
        let mut waiting: Vec<_> = (0..4).map(|_| front.connect()).collect();
        for client in &mut waiting {
            client.write_all(b"here!").unwrap();
            client.set_nonblocking(true).unwrap();
        }
        proxy.lines.wait_for("Hit connection limit, newcomers wait in the kernel");
        let before = proxy.cpu();
        pause(Duration::from_millis(500));
        assert!(proxy.cpu() - before < Duration::from_millis(50), "it waits, too");
        let served = |client: &mut Socket| match client.read(&mut [0; 5]) {
            Ok(5) => true,
            Err(error) if error.kind() == ErrorKind::WouldBlock => false,
            other => panic!("was not left to wait: {other:?}"),
        };
        assert!(!waiting.iter_mut().any(served), "served above the cap");
        echoes(&mut second);
        // One after the other, in order, and each only when another has left.
        let mut leaving = vec![first, second];
        for place in 0..waiting.len() {
            drop(leaving.remove(0));
            let deadline = Instant::now() + PATIENCE;
            poll_until(deadline, || served(&mut waiting[place]).then_some(())).expect("its turn");
            assert!(!waiting[place + 1..].iter_mut().any(served), "out of its turn");
            leaving.push(waiting[place].try_clone().unwrap());
            waiting[place].set_nonblocking(false).unwrap();
            echoes(&mut waiting[place]);
            // The last reference is the one in `leaving`.
            waiting[place] = front.connect();
            waiting[place].set_nonblocking(true).unwrap();
        }
        assert_eq!(proxy.lines.count("newcomers wait in the kernel"), 1);
    }
}

/// Whether the program serves, or has ended over an option that it does not know.
fn answers(client: &mut Socket, proxy: &mut Running) -> bool {
    client.write_all(b"hello").unwrap();
    client.set_nonblocking(true).unwrap();
    let answered = poll_until(Instant::now() + PATIENCE, || match client.read(&mut [0; 5]) {
        Ok(5) => Some(true),
        _ => (!proxy.is_running()).then_some(false),
    });
    client.set_nonblocking(false).unwrap();
    answered.expect("an answer, or an end")
}

fn cap_with_few_descriptors(program: &Path) {
    // Descriptors for the default cap and hardly more: the cap has to be what is met first.
    const CAP: usize = 256;
    let (front, backend) = (Endpoint::new(Family::Tcp), echo_backend(Family::Tcp));
    let launch = Launch::new(program).arg(&backend.target).descriptors(1024);
    let proxy = launch.listener(&front).start();
    let mut clients: Vec<_> = (0..CAP).map(|_| front.connect()).collect();
    clients.iter_mut().for_each(echoes);
    is_refused(&mut front.connect());
    proxy.lines.wait_for("Hit connection limit, refusing connection.");
}

/// Closed or reset: not served, and not left to wait either.
fn is_refused(client: &mut Socket) {
    match exchange(client, b"me too?") {
        Ok(_) => panic!("was served above the cap"),
        Err(error) => assert_ne!(error.kind(), ErrorKind::WouldBlock, "was left to wait"),
    }
}

fn refusal_is_said(program: &Path) {
    let (front, backend) = (Endpoint::new(Family::Tcp), echo_backend(Family::Tcp));
    let args = ["-c1", &backend.target];
    let proxy = Launch::new(program).args(args).listener(&front).start();
    let mut clients: Vec<_> = (0..4).map(|_| front.connect()).collect();
    echoes(&mut clients[0]);
    proxy.lines.wait_for("Hit connection limit, refusing connection.");
}

fn idle_clients(program: &Path) {
    const CLIENTS: usize = 4000;
    let (front, backend) = (Endpoint::new(Family::Tcp), Endpoint::new(Family::Tcp));
    let args = ["--connections-max=4096", &backend.target];
    let proxy = Launch::new(program).args(args).descriptors(20_000).listener(&front).start();
    echo_many(&backend);
    let before = poll_until(Instant::now() + PATIENCE, || {
        Some(proxy.descriptors()).filter(|&count| count > 4)
    });
    let mut clients: Vec<_> = (0..CLIENTS).map(|_| front.connect()).collect();
    let served = clients.iter_mut().filter_map(|client| {
        client.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        exchange(client, b"still there?").ok()
    });
    let served = served.count();
    assert_eq!(served, CLIENTS, "{served} of 4000 were served");
    let descriptors = proxy.descriptors() - before.unwrap();
    assert!(descriptors <= 2 * CLIENTS + 16, "{descriptors} descriptors of 4000 clients");
}

/// One thread for thousands of clients that speak one after the other.
fn echo_many(backend: &Endpoint) {
    let listener = backend.socket.try_clone().unwrap();
    thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            listener.set_nonblocking(true).unwrap();
            let listener = tokio::net::TcpListener::from_std(listener.into()).unwrap();
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(async move {
                    let mut buffer = [0; 256];
                    while stream.readable().await.is_ok() {
                        match stream.try_read(&mut buffer) {
                            Ok(0) => break,
                            Ok(bytes) => drop(stream.try_write(&buffer[..bytes])),
                            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                            Err(_) => break,
                        }
                    }
                });
            }
        });
    });
}

fn few_descriptors(program: &Path) {
    const CLIENTS: usize = 60;
    let (front, backend) = (Endpoint::new(Family::Tcp), echo_backend(Family::Tcp));
    let proxy = Launch::new(program).arg(&backend.target).descriptors(40).listener(&front).start();
    let mut waiting: Vec<_> = (0..CLIENTS).map(|_| front.connect()).collect();
    for client in &mut waiting {
        client.write_all(b"here!").unwrap();
        client.set_nonblocking(true).unwrap();
    }
    let mut served = Vec::new();
    let mut measured = false;
    while !waiting.is_empty() {
        let mut answered = Vec::new();
        let found = poll_until(Instant::now() + Duration::from_secs(5), || {
            waiting.retain_mut(|client| match client.read(&mut [0; 5]) {
                Ok(5) => {
                    answered.push(client.try_clone().unwrap());
                    false
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => true,
                other => panic!("a client was dropped: {other:?}"),
            });
            (!answered.is_empty()).then_some(())
        });
        found.expect("somebody who waits is served when others leave, and none is dropped");
        served.append(&mut answered);
        if !measured {
            measured = true;
            let before = proxy.cpu();
            pause(Duration::from_secs(2));
            let cpu = proxy.cpu() - before;
            assert!(cpu < Duration::from_millis(100), "{cpu:?} of CPU in 2 s, none is dropped");
            let logged = proxy.lines.count("Out of file descriptors");
            assert_eq!(logged, 1, "warnings, and none is dropped");
            // Those who were served stay as long as the others wait, and are still served.
            for client in &mut served {
                client.set_nonblocking(false).unwrap();
                echoes(client);
                client.set_nonblocking(true).unwrap();
            }
        }
        served.clear();
    }
}

fn soft_limit(program: &Path) {
    let (front, backend) = (Endpoint::new(Family::Tcp), echo_backend(Family::Tcp));
    let launch = Launch::new(program).arg(&backend.target).soft_descriptors(40);
    let _proxy = launch.listener(&front).start();
    let mut clients: Vec<_> = (0..60).map(|_| front.connect()).collect();
    clients.iter_mut().for_each(echoes);
}

fn quiet_after_bulk(program: &Path) {
    const CLIENTS: usize = 20;
    let (front, backend) = (Endpoint::new(Family::Tcp), echo_backend(Family::Tcp));
    let proxy = Launch::new(program).arg(&backend.target).listener(&front).start();
    // One for each event loop there may be.
    let mut first: Vec<_> = (0..3).map(|_| front.connect()).collect();
    first.iter_mut().for_each(echoes);
    let before = proxy.descriptors();
    let message = noise(5, 4_000_000);
    let mut clients: Vec<_> = (0..CLIENTS).map(|_| front.connect()).collect();
    for client in &mut clients {
        let mut writer = client.try_clone().unwrap();
        thread::scope(|scope| {
            scope.spawn(|| writer.write_all(&message).unwrap());
            let mut answer = vec![0; message.len()];
            client.read_exact(&mut answer).unwrap();
            assert!(answer == message);
        });
    }
    let held = proxy.descriptors() - before;
    // On each event loop one pipe for each direction of the one that was busy stays in the pool.
    assert!(held <= 2 * CLIENTS + 3 * 4, "{held} descriptors held by 20 quiet connections");
}

fn stalled_bulk(program: &Path) {
    const CLIENTS: usize = 60;
    for back in [Family::Tcp, Family::Unix] {
        let (front, backend) = (Endpoint::new(Family::Tcp), Endpoint::new(back));
        let proxy = Launch::new(program).arg(&backend.target).listener(&front).start();
        let message = noise(6, 4 * 1024 * 1024);
        let clients: Vec<_> = (0..CLIENTS).map(|_| front.connect()).collect();
        // More than the kernel holds for a receiver that takes nothing, in large pieces.
        let mut sent = vec![0; CLIENTS];
        for (client, sent) in clients.iter().zip(&mut sent) {
            client.set_send_buffer_size(64 * 1024).unwrap();
            client.set_nonblocking(true).unwrap();
            let stuck = || {
                let before = *sent;
                loop {
                    match client.send(&message[*sent % message.len()..]) {
                        Ok(bytes) => *sent += bytes,
                        Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                        Err(error) => panic!("{error}"),
                    }
                }
                (*sent == before && proxy.is_asleep()).then_some(())
            };
            poll_until(Instant::now() + PATIENCE, stuck).expect("the sender is stuck");
        }
        // Sixteen among the event loops, and those that held a remainder after all.
        let (pipes, loops) = (proxy.pipes() / 2, 1 + proxy.workers());
        assert!(pipes <= 16 + 4 * loops, "{pipes} pipes for 60 stalled connections");
        assert!(pipes >= 16 / loops * loops, "{pipes} pipes: the limit is not reached");
        // Everything arrives as soon as it is taken.
        let mut arrived: Vec<_> = (0..CLIENTS).map(|_| backend.accept()).collect();
        for client in &clients {
            client.shutdown(Shutdown::Write).unwrap();
        }
        let mut received: Vec<_> = thread::scope(|scope| {
            let read = |socket| {
                let (bytes, end) = read_all(socket);
                end.unwrap();
                assert!(bytes.chunks(message.len()).all(|piece| message.starts_with(piece)));
                bytes.len()
            };
            let readers: Vec<_> =
                arrived.iter_mut().map(|socket| scope.spawn(move || read(socket))).collect();
            readers.into_iter().map(|reader| reader.join().unwrap()).collect()
        });
        received.sort_unstable();
        sent.sort_unstable();
        assert_eq!(received, sent);
    }
}

fn pipes_used_up(program: &Path) {
    // Somebody else has spent the user's pipe-user-pages-soft (pipe(7); 1024 pipes of 16 pages):
    // what a new pipe gets is not worth splicing through, and copying carries on.
    let spend = "for (1..1100) { pipe($r, $w) or die; push @pipes, $r, $w; undef $r; undef $w } \
                 print STDERR \"spent\\n\"; sleep";
    let hog = Launch::new("/usr/bin/perl").args(["-e", spend]).descriptors(4096).unprivileged();
    let hog = hog.start();
    hog.lines.wait_for("spent");
    let (front, backend) = (Endpoint::new(Family::Tcp), echo_backend(Family::Tcp));
    let directory = TempDir::new().unwrap();
    let copy = executable_by_all(program, &directory);
    let launch = Launch::new(&copy).arg(&backend.target).listener(&front).unprivileged();
    let proxy = launch.start();
    let mut client = front.connect();
    let before = proxy.pipes();
    let message = noise(12, 20_000_000);
    let mut writer = client.try_clone().unwrap();
    thread::scope(|scope| {
        // An original may also stand still on a pipe of one page; the reader says so.
        scope.spawn(|| drop(writer.write_all(&message)));
        let mut answer = vec![0; message.len()];
        let read = client.read_exact(&mut answer);
        read.unwrap_or_else(|error| panic!("stuck between ends of pipes: {error}"));
        assert!(answer == message);
    });
    // Tried and given up; a pipe that was used would be in the pool.
    let kept = proxy.pipes().saturating_sub(before);
    assert_eq!(kept, 0, "ends of pipes while there is no quota for them");
}

/// A copy of the program where an unprivileged user may execute it.
fn executable_by_all(program: &Path, directory: &TempDir) -> PathBuf {
    let mode = || PermissionsExt::from_mode(0o755);
    let copy = directory.path().join("program");
    fs::copy(program, &copy).unwrap();
    fs::set_permissions(&copy, mode()).unwrap();
    fs::set_permissions(directory.path(), mode()).unwrap();
    copy
}

fn no_delay(program: &Path) {
    use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};
    let (front, backend) = (Endpoint::new(Family::Tcp), Endpoint::new(Family::Tcp));
    let early = front.connect();
    let proxy = Launch::new(program).arg(&backend.target).listener(&front).start();
    let first = backend.accept();
    let late = front.connect();
    let second = backend.accept();
    let process = pidfd_open(Pid::from_child(&proxy.child), PidfdFlags::empty()).unwrap();
    let mut connections = 0;
    for entry in fs::read_dir(format!("/proc/{}/fd", proxy.pid())).unwrap() {
        let number = entry.unwrap().file_name().to_str().unwrap().parse().unwrap();
        let Ok(fd) = pidfd_getfd(&process, number, PidfdGetfdFlags::empty()) else {
            continue;
        };
        let socket = Socket::from(fd);
        if socket.peer_addr().is_ok_and(|peer| peer.is_ipv4()) {
            connections += 1;
            assert!(socket.tcp_nodelay().unwrap(), "no TCP_NODELAY on {socket:?}");
        }
    }
    assert_eq!(connections, 4, "connections looked at");
    drop((early, late, first, second));
}

// Waiting for the backend.

/// An address of either family where nobody listens yet.
fn absent_backend(family: Family) -> (SockAddr, String, TempDir) {
    let directory = TempDir::new().unwrap();
    let (address, target) = match family {
        Family::Tcp => {
            let address = std::net::SocketAddr::from(([127, 0, 0, 1], free_port()));
            (address.into(), address.to_string())
        }
        Family::Unix => {
            let path = directory.path().join("backend");
            (SockAddr::unix(&path).unwrap(), path.to_str().unwrap().into())
        }
    };
    (address, target, directory)
}

fn come_up(address: &SockAddr) -> Socket {
    let socket = Socket::new(address.domain(), Type::STREAM, None).unwrap();
    socket.set_reuse_address(true).unwrap();
    socket.bind(address).unwrap();
    socket.listen(4096).unwrap();
    socket
}

fn started(launch: Launch) -> Running {
    let mut manager = Manager::new();
    let mut proxy = launch.env("NOTIFY_SOCKET", manager.path.display()).start();
    let ready = thread::spawn(move || {
        manager.wait_for("READY=1");
        manager
    });
    poll_until(Instant::now() + PATIENCE, || {
        if !proxy.is_running() {
            panic!("{}", proxy.lines.all());
        }
        ready.is_finished().then_some(())
    });
    proxy
}

fn held_until_up(program: &Path, family: Family) {
    let front = Endpoint::new(Family::Tcp);
    let (address, target, _directory) = absent_backend(family);
    let args = ["--backend-wait=30s", &target];
    let proxy = started(Launch::new(program).args(args).listener(&front));
    let mut client = front.connect();
    client.write_all(b"patience").unwrap();
    let said = proxy.lines.wait_for("holding clients for up to 30s");
    assert!(said.contains("Failed to connect to remote host"), "{said}");
    pause(Duration::from_secs(1));
    let listener = come_up(&address);
    let up = Instant::now();
    // A backend that serves one connection in its life: the prober's is not wasted.
    let served = thread::spawn(move || echo(listener.accept().unwrap().0));
    echoes_after(&mut client, b"patience");
    let noticed = up.elapsed();
    assert!(noticed < Duration::from_millis(600), "noticed after {noticed:?}");
    drop(client);
    served.join().unwrap();
}

fn held_until_permitted(program: &Path) {
    let mode = |path: &Path, mode| {
        fs::set_permissions(path, PermissionsExt::from_mode(mode)).unwrap();
    };
    let (_, _, stderr) = run(&program.into(), &["--backend-wait=30s", "x"]);
    assert!(!stderr.contains("unrecognized option"), "{stderr}");
    let front = Endpoint::new(Family::Tcp);
    let (address, target, directory) = absent_backend(Family::Unix);
    let listener = come_up(&address);
    mode(Path::new(&target), 0o600);
    serve_on(listener, echo);
    let copy = executable_by_all(program, &directory);
    let args = ["--backend-wait=30s", &target];
    let proxy = started(Launch::new(&copy).args(args).listener(&front).unprivileged());
    let mut client = front.connect();
    client.write_all(b"patience").unwrap();
    let said = proxy.lines.wait_for("holding clients");
    assert!(said.contains("Permission denied"), "{said}");
    pause(Duration::from_secs(1));
    mode(Path::new(&target), 0o666);
    let permitted = Instant::now();
    echoes_after(&mut client, b"patience");
    let noticed = permitted.elapsed();
    assert!(noticed < Duration::from_millis(600), "noticed after {noticed:?}");
}

fn never_up(program: &Path) {
    let front = Endpoint::new(Family::Tcp);
    let (_, target, _directory) = absent_backend(Family::Tcp);
    let args = ["--backend-wait=2s", &target];
    let proxy = started(Launch::new(program).args(args).listener(&front));
    for _ in 0..2 {
        let start = Instant::now();
        let (bytes, end) = read_all(&mut front.connect());
        end.unwrap();
        assert!(bytes.is_empty());
        let held = start.elapsed();
        let bounds = Duration::from_millis(1500)..Duration::from_millis(3500);
        assert!(bounds.contains(&held), "closed after {held:?}");
    }
    let said = proxy.lines.wait_for("Connection refused, for 2s");
    assert!(said.contains("Failed to connect to remote host"), "{said}");
}

fn one_prober(program: &Path) {
    const CLIENTS: usize = 200;
    let front = Endpoint::new(Family::Tcp);
    let (address, target, _directory) = absent_backend(Family::Unix);
    let args = ["--backend-wait=30s", &target];
    let proxy = started(Launch::new(program).args(args).listener(&front));
    let before = proxy.cpu();
    let mut clients: Vec<_> = (0..CLIENTS).map(|_| front.connect()).collect();
    for client in &mut clients {
        client.write_all(b"patience").unwrap();
    }
    pause(Duration::from_secs(2));
    let spent = proxy.cpu() - before;
    assert!(spent < Duration::from_millis(100), "{spent:?} of CPU in the wait");
    assert_eq!(proxy.lines.count("holding clients"), 1, "said once");
    let listener = come_up(&address);
    serve_on(listener, echo);
    for client in &mut clients {
        echoes_after(client, b"patience");
    }
}

fn held_client_leaves(program: &Path) {
    for family in [Family::Tcp, Family::Unix] {
        let front = Endpoint::new(family);
        let (_, target, _directory) = absent_backend(Family::Tcp);
        let args = ["--backend-wait=1h", "--log-level=debug", "-c1", &target];
        let proxy = started(Launch::new(program).args(args).listener(&front));
        let mut client = front.connect();
        if family == Family::Tcp {
            client.write_all(b"hello?").unwrap();
        }
        proxy.lines.wait_for("holding clients");
        let left = Instant::now();
        match family {
            Family::Tcp => reset(client),
            Family::Unix => drop(client),
        }
        proxy.lines.wait_for("the client has left");
        assert!(left.elapsed() < Duration::from_secs(3), "its place is held");
        // The next one gets the place, and is held in turn.
        let next = front.connect();
        next.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
        let waiting = (&next).read(&mut [0]).expect_err("refused");
        assert_eq!(waiting.kind(), ErrorKind::WouldBlock);
    }
}

/// As `echo x | nc -U`, with a backend that is slow to start.
fn held_sent_and_closed(program: &Path) {
    let front = Endpoint::new(Family::Unix);
    let (address, target, _directory) = absent_backend(Family::Unix);
    let args = ["--backend-wait=30s", "--log-level=debug", &target];
    let proxy = started(Launch::new(program).args(args).listener(&front));
    let mut client = front.connect();
    client.write_all(b"that was all").unwrap();
    drop(client);
    proxy.lines.wait_for("holding clients");
    pause(Duration::from_secs(2));
    let listener = come_up(&address);
    listener.set_nonblocking(true).unwrap();
    let accepted = poll_until(Instant::now() + PATIENCE, || listener.accept().ok());
    let (mut served, _) = accepted.expect("the client's bytes come to the backend");
    served.set_nonblocking(false).unwrap();
    let (bytes, end) = read_all(&mut served);
    end.unwrap();
    assert_eq!(bytes, b"that was all");
}

fn held_half_closed(program: &Path) {
    let front = Endpoint::new(Family::Tcp);
    let (address, target, _directory) = absent_backend(Family::Tcp);
    let args = ["--backend-wait=30s", &target];
    let proxy = started(Launch::new(program).args(args).listener(&front));
    let mut client = front.connect();
    client.write_all(b"that was all").unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    proxy.lines.wait_for("holding clients");
    pause(Duration::from_millis(500));
    let listener = come_up(&address);
    thread::spawn(move || echo(listener.accept().unwrap().0));
    let (answer, end) = read_all(&mut client);
    end.unwrap();
    assert_eq!(answer, b"that was all");
}

fn not_mended_by_time(program: &Path) {
    let front = Endpoint::new(Family::Tcp);
    let args = ["--backend-wait=1h", "localhost:no-such-service"];
    let proxy = started(Launch::new(program).args(args).listener(&front));
    let (bytes, end) = read_all(&mut front.connect());
    end.unwrap();
    assert!(bytes.is_empty());
    proxy.lines.wait_for("Failed to resolve host: localhost:no-such-service");
}

// Ours alone.

fn own_listeners(program: &Path) {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("front");
    let name = format!("@socket-proxyd-front-{}", unique_name());
    let backend = echo_backend(Family::Unix);
    let mut proxy = Launch::new(program)
        .args(["--listen=127.0.0.1:0", "--listen=0", "--listen=[::1]:0"])
        .arg(format!("--listen={}", path.display()))
        .arg(format!("--listen={name}"))
        .arg(&backend.target)
        .start();
    for host in ["127.0.0.1", "[::]", "[::1]"] {
        let line = proxy.lines.wait_for(&format!("Listening on {host}:"));
        let address = line.split("Listening on ").nth(1).unwrap().trim_end_matches('.');
        let address: std::net::SocketAddr = address.parse().unwrap();
        echoes(&mut connect(&address.into()));
        if host == "[::]" {
            let ipv4 = std::net::SocketAddr::new([127, 0, 0, 1].into(), address.port());
            echoes(&mut connect(&ipv4.into()));
        }
    }
    proxy.lines.wait_for(&format!("Listening on {name}."));
    echoes(&mut connect(&SockAddr::unix(&path).unwrap()));
    echoes(&mut connect(&SockAddr::unix(name.replace('@', "\0")).unwrap()));
    proxy.signal(Signal::TERM);
    assert_eq!(proxy.wait().code(), Some(0));
    assert!(!path.exists(), "the socket file stayed");
}

fn both_kinds_of_sockets(program: &Path) {
    let front = Endpoint::new(Family::Tcp);
    let args = ["--listen=127.0.0.1:0", "127.0.0.1:80"];
    let mut proxy = Launch::new(program).args(args).listener(&front).start();
    assert_eq!(proxy.wait().code(), Some(1));
    let stderr = proxy.lines.all();
    assert!(stderr.contains("--listen= as well"), "passed and opened sockets as well: {stderr}");
}

fn stuck_log(program: &Path) {
    let (front, backend) = (Endpoint::new(Family::Tcp), echo_backend(Family::Tcp));
    let mut proxy = Launch::new(program)
        .args(["--log-level=debug", &backend.target])
        .listener(&front)
        .stderr_unread()
        .start();
    if !proxy.is_running() {
        panic!("Failed to parse");
    }
    // Far more lines than the pipe and the queue hold.
    for _ in 0..3000 {
        let mut client = front.connect();
        let answered = exchange(&mut client, b"is the log read?");
        assert!(answered.is_ok(), "Failed to parse --log-level, or waits for its log");
    }
    proxy.lines.collect(proxy.unread_stderr.take().unwrap());
    let deadline = Instant::now() + PATIENCE;
    let said = poll_until(deadline, || {
        let _ = exchange(&mut front.connect(), b"one more line");
        (proxy.lines.count("log lines were dropped") > 0).then_some(())
    });
    said.expect("the number of dropped lines is logged");
}
