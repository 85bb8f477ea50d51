//! COMMAND: started for the first client, stopped after the last, and never left behind.
//!
//! The application is tests/support/app.pl, which takes time to listen and to stop.

use std::ffi::OsStr;
use std::fs::{self, Permissions};
use std::io::{Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

use crate::application::{Service, ask, is_running, pid, wait_for_end};
use crate::support::*;
use rustix::process::{Pid, Resource, Rlimit, Signal, kill_process, prlimit};
use socket2::{Domain, SockAddr, Socket, Type};
use tempfile::TempDir;
use tokio::time::Instant;

fn on_demand(family: Family) {
    let service = Service::start(family, &["--stop-idle-time=1s"], &["up=1.5", "down=1.5"]);
    pause(Duration::from_millis(300));
    assert_eq!(service.logged_pids("started"), [], "nothing runs before the first client");

    let mut client = service.connect();
    let first = pid(&mut client);
    assert_eq!(service.logged_pids("started"), [first]);
    assert_eq!(pid(&mut service.connect()), first, "warm");
    pause(Duration::from_secs(2));
    assert_eq!(pid(&mut client), first, "in use for longer than the idle time");
    let left = Instant::now();
    drop(client);

    // While it stops, it still listens and would answer.
    assert_eq!(service.wait_for_pid("asked"), first);
    let idle = left.elapsed();
    assert!(idle > Duration::from_millis(900), "stopped after {idle:?}");
    assert!(is_running(first));
    let second = service.pid();
    assert_ne!(second, first, "no client goes to the one that stops");
    assert!(!is_running(first));

    kill_process(second, Signal::KILL).unwrap();
    wait_for_end(second);
    let third = service.pid();
    assert_eq!(service.logged_pids("started"), [first, second, third]);

    let took = wait_for_end(third);
    assert!(took < Duration::from_secs(6), "idle for {took:?} and still there");
    assert_ne!(service.pid(), third);
}

#[test]
fn runs_on_demand_over_tcp() {
    on_demand(Family::Tcp);
}

#[test]
fn runs_on_demand_over_unix() {
    on_demand(Family::Unix);
}

#[test]
fn command_ends_when_the_proxy_is_killed() {
    // The application itself, one behind a script, and one with a child in a session of its own.
    let script = ["sh", "-c", "perl \"$@\"; true", "sh", APP];
    for (program, settings) in
        [(&["perl", APP][..], &["down=1.5"][..]), (&script, &["down=1.5"]), (&script, &["stray=1"])]
    {
        let service = Service::start_as(Family::Tcp, &[], program, settings, |launch| launch);
        let mut all = vec![service.pid()];
        all.extend(service.logged_pids("stray"));
        assert_eq!(all.len(), if settings == ["stray=1"] { 2 } else { 1 });
        service.proxy.signal(Signal::KILL);
        for pid in all {
            let took = wait_for_end(pid);
            assert!(took < Duration::from_secs(5), "{program:?}: gone after {took:?}");
        }
    }
}

#[test]
fn command_that_ignores_sigterm_ends_when_the_proxy_is_killed() {
    let service = Service::start(Family::Tcp, &[], &["keep=1"]);
    let app = service.pid();
    service.proxy.signal(Signal::KILL);
    let took = wait_for_end(app);
    let (least, most) = (Duration::from_secs(2), Duration::from_secs(5));
    assert!(took > least && took < most, "it is given 3 s, not {took:?}");
}

#[test]
fn command_ends_when_the_guard_is_killed() {
    let service = Service::start(Family::Tcp, &[], &["fork=1"]);
    let mut client = service.connect();
    let child = pid(&mut client);
    let guard = service.guards()[0];
    let name = fs::read_to_string(format!("/proc/{guard}/comm")).unwrap();
    assert_eq!(name, "proxyd-guard\n");
    kill_process(guard, Signal::KILL).unwrap();
    wait_for_end(child);
    wait_for_end(service.logged_pids("parent")[0]);
    assert_ne!(service.pid(), child, "the next client starts it again");
}

#[test]
fn command_ends_when_proxy_and_guard_are_killed() {
    let service = Service::start(Family::Tcp, &[], &[]);
    let app = service.pid();
    let guard = service.guards()[0];
    // The guard can do nothing: it is stopped before the proxy is killed.
    kill_process(guard, Signal::STOP).unwrap();
    service.proxy.signal(Signal::KILL);
    kill_process(guard, Signal::KILL).unwrap();
    wait_for_end(app);
}

#[test]
fn clients_of_a_dying_command_are_served_by_the_next() {
    let service = Service::start(Family::Tcp, &[], &[]);
    let mut dying = service.pid();
    for _ in 0..5 {
        // Dead, and still thought to be ready.
        service.proxy.suspend();
        let mut clients: Vec<_> = (0..10).map(|_| service.connect()).collect();
        kill_process(dying, Signal::KILL).unwrap();
        wait_for_end(dying);
        service.proxy.signal(Signal::CONT);
        let next = pid(&mut clients[0]);
        assert_ne!(next, dying);
        for client in &mut clients[1..] {
            assert_eq!(pid(client), next);
        }
        dying = next;
    }
}

#[test]
fn stop_waits_for_command() {
    // To the proxy alone, as with KillMode=mixed, or to all processes of the unit.
    for to_all in [false, true] {
        let mut service = Service::start(Family::Tcp, &[], &["down=0.5"]);
        let app = service.pid();
        if to_all {
            kill_process(app, Signal::TERM).unwrap();
            kill_process(service.guards()[0], Signal::TERM).unwrap();
        }
        service.proxy.signal(Signal::TERM);
        assert_eq!(service.proxy.wait().code(), Some(0));
        assert!(!is_running(app), "the proxy has waited for it");
        assert_eq!(service.logged_pids("started"), [app]);
        assert_eq!(service.logged_pids("asked")[0], app);
    }
}

#[test]
fn connections_last_until_command_has_stopped() {
    let mut service = Service::start(Family::Tcp, &[], &["down=2"]);
    let mut client = service.connect();
    let app = pid(&mut client);
    service.proxy.signal(Signal::TERM);
    assert_eq!(service.wait_for_pid("asked"), app);
    assert_eq!(pid(&mut client), app, "it can finish its work");
    assert_eq!(read_all(&mut client).0, b"");
    assert_eq!(service.proxy.wait().code(), Some(0));
    service.proxy.lines.wait_for("Stopping perl.");
}

#[test]
fn command_that_does_not_stop_is_killed_with_its_group() {
    let settings = ["keep=1", "fork=1"];
    let service = Service::start(Family::Tcp, &["--stop-idle-time=100ms"], &settings);
    let child = service.pid();
    let parent = service.logged_pids("parent")[0];
    let line = service.proxy.lines.wait_for("Stopping perl, ");
    assert!(line.contains("no connection for 100ms"), "{line}");
    let start = Instant::now();
    // A client in the window waits for the next one.
    let second = service.pid();
    let took = start.elapsed();
    let (least, most) = (Duration::from_millis(9500), Duration::from_secs(16));
    assert!(took > least && took < most, "it is given 10 s, not {took:?}");
    service.proxy.lines.wait_for("perl has not stopped in time, killing it.");
    assert!(!is_running(child) && !is_running(parent));
    assert_ne!(second, child);
}

#[test]
fn processes_below_others_outside_the_group_are_asked_to_stop() {
    // The application is the child of a shell in a session of its own, which passes no signal on.
    let script = "setsid sh -c 'perl \"$@\"; :' sh \"$@\" & wait";
    let program = ["sh", "-c", script, "sh", APP];
    let options = ["--stop-idle-time=200ms"];
    let service = Service::start_as(Family::Tcp, &options, &program, &["down=1"], |it| it);
    let app = service.pid();
    wait_for_end(app);
    assert_eq!(service.logged_pids("asked"), [app], "SIGTERM came first");
    assert_eq!(service.proxy.lines.count("killing it"), 0);
}

#[test]
fn processes_outside_the_group_are_stopped() {
    // The application itself in a session of its own, and a child that does nothing.
    for (program, settings) in [
        (&["sh", "-c", "setsid perl \"$@\" & wait", "sh", APP][..], &[][..]),
        (&["perl", APP], &["stray=1"]),
    ] {
        let options = ["--stop-idle-time=200ms"];
        let service = Service::start_as(Family::Tcp, &options, program, settings, |it| it);
        let mut after_the_first = None;
        for _ in 0..3 {
            let mut all = vec![service.pid()];
            all.extend(service.logged_pids("stray").last());
            for pid in all {
                wait_for_end(pid);
            }
            let patience = Instant::now() + TIMEOUT;
            poll_until(patience, || service.guards().is_empty().then_some(())).expect("no guard");
            let least = *after_the_first.get_or_insert_with(|| service.proxy.descriptors());
            let at_most = || (service.proxy.descriptors() <= least).then_some(());
            poll_until(patience, at_most).expect("no run leaves descriptors open");
        }
        assert_eq!(service.logged_pids("started").len(), 3);
    }
}

#[test]
fn two_hundred_clients_start_one_process() {
    let _turn = measuring();
    raise_descriptor_limit();
    for (family, threads) in [(Family::Tcp, "1"), (Family::Unix, "1"), (Family::Tcp, "3")] {
        let service = Service::start(family, &[&format!("--threads={threads}")], &["up=2"]);
        let mut clients: Vec<_> = (0..200).map(|_| service.connect()).collect();
        for client in &mut clients {
            client.write_all(b"pid\n").unwrap();
        }
        let first = service.wait_for_pid("started");
        let before = service.proxy.cpu();
        pause(Duration::from_millis(1500));
        let spent = service.proxy.cpu() - before;
        assert!(spent < Duration::from_millis(100), "{spent:?} of CPU in the wait");
        for client in &mut clients {
            let mut answer = Vec::new();
            let mut byte = [0];
            while client.read(&mut byte).unwrap() == 1 && byte[0] != b'\n' {
                answer.push(byte[0]);
            }
            assert_eq!(String::from_utf8(answer).unwrap(), first.as_raw_nonzero().to_string());
        }
        assert_eq!(service.logged_pids("started"), [first]);
    }
}

#[test]
fn command_inherits_nothing_of_the_proxy() {
    let systemd = FakeSystemd::new();
    let service = Service::start_as(Family::Unix, &[], &["perl", APP], &[], |launch| {
        let given = fs::File::open("/etc/hostname").unwrap();
        let launch = launch.socket(&given).env("LISTEN_FDS", 1);
        let launch = launch.soft_descriptors(500).env("LISTEN_FDNAMES", "front");
        launch.notify(&systemd).env("WATCHDOG_USEC", 20_000_000)
    });
    let mut client = service.connect();
    let environment = ask(&mut client, "environment");
    for name in ["LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "NOTIFY_SOCKET", "WATCHDOG_USEC"] {
        assert!(!environment.split(' ').any(|set| set == name), "{name} in {environment}");
    }
    assert!(environment.contains("PATH"), "{environment}");
    assert_eq!(ask(&mut client, "stdin"), "/dev/null");
    assert_eq!(ask(&mut client, "descriptors"), "500", "the soft limit is as it was");
    let files = ask(&mut client, "files");
    // Its listener and the client.
    let sockets = files.split(' ').filter(|file| file.starts_with("socket:")).count();
    assert!(!files.contains("/etc/hostname"), "not what the proxy was given by mistake: {files}");
    assert_eq!(sockets, 2, "{files}");
    assert!(!files.contains("anon_inode"), "{files}");
    let app = pid(&mut client);
    let [ours, theirs] = [service.proxy.pid().to_string(), app.to_string()].map(|process| {
        let directory = PathBuf::from("/proc").join(process);
        let user = fs::metadata(&directory).unwrap().uid();
        (fs::read_link(directory.join("cwd")).unwrap(), user)
    });
    assert_eq!(ours, theirs, "working directory and user");
    let link = |fd| fs::read_link(format!("/proc/{}/fd/{fd}", service.proxy.pid())).unwrap();
    for fd in [1, 2] {
        let theirs = link(fd).to_str().unwrap().to_string();
        assert!(files.split(' ').any(|file| file == theirs), "{theirs} in {files}");
    }
}

/// What the kernel says of a process's signals: those that it ignores, and those that it blocks.
pub fn signals(status: &str) -> [u64; 2] {
    ["SigIgn:", "SigBlk:"].map(|name| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        // 32 and 33 are the C library's own, which it does not let a program change.
        u64::from_str_radix(line.trim(), 16).unwrap() & !(3 << 31)
    })
}

#[test]
fn command_gets_the_original_signal_dispositions() {
    let cases: [(&[&str], [u64; 2]); 3] = [
        (&[], [0, 0]),
        // SIGPIPE is 13, as systemd ignores it by default; SIGHUP 1, as nohup(1) does.
        (&["--ignore-signal=PIPE", "--ignore-signal=HUP"], [1 << 12 | 1, 0]),
        // SIGUSR2 is 12, SIGUSR1 10.
        (&["--ignore-signal=USR2", "--block-signal=USR1,USR2"], [1 << 11, 1 << 11 | 1 << 9]),
    ];
    for (options, expected) in cases {
        // Perl ignores SIGFPE, and dash blocks nothing.
        let script = format!("cat /proc/self/status >\"$2.status\"; exec perl {APP} \"$@\"");
        let program = ["bash", "-c", &script, "bash"];
        let mut service = Service::start_as(Family::Tcp, &[], &program, &[], |launch| {
            options.iter().fold(launch, |launch, option| launch.signals(option))
        });
        service.pid();
        let status = fs::read_to_string(service.directory.path().join("log.status")).unwrap();
        assert_eq!(signals(&status), expected, "{options:?}");
        service.proxy.signal(Signal::TERM);
        assert!(service.proxy.wait().success());
    }
}

#[test]
fn blocked_sigterm_stops_the_proxy() {
    let (front, backend) = (Endpoint::new(Family::Tcp), echo_backend(Family::Tcp));
    let launch = Launch::new(OURS).listener(&front).arg(&backend.target);
    let mut proxy = launch.signals("--block-signal=TERM").start();
    assert_echoes(&mut front.connect());
    proxy.signal(Signal::TERM);
    assert!(proxy.wait().success());
}

#[test]
fn clients_wait_for_ready() {
    for family in [Family::Tcp, Family::Unix] {
        let service = Service::start(family, &["--ready=notify"], &["ready=0.7"]);
        let mut clients: Vec<_> = (0..5).map(|_| service.connect()).collect();
        let first = service.wait_for_pid("started");
        for client in &mut clients {
            assert_eq!(pid(client), first, "and not \"not ready\"");
        }
        assert_ne!(ask(&mut clients[0], "notify"), "");
    }
}

#[test]
fn ignores_ready_from_other_processes() {
    let runtime = TempDir::new().unwrap();
    let service = Service::start_as(
        Family::Tcp,
        &["--ready=notify", "--backend-wait=2s"],
        &["perl", APP],
        &["ready=600"],
        |launch| launch.env("RUNTIME_DIRECTORY", runtime.path().display()),
    );
    let mut client = service.connect();
    client.write_all(b"pid\n").unwrap();
    service.wait_for_pid("started");
    let socket: PathBuf = fs::read_dir(runtime.path()).unwrap().next().unwrap().unwrap().path();
    // With the longest name there is: all of sun_path.
    let mut name = runtime.path().as_os_str().as_encoded_bytes().to_vec();
    name.push(b'/');
    name.resize(108, b'x');
    let stranger = Socket::new(Domain::UNIX, Type::DGRAM, None).unwrap();
    stranger.bind(&unix_address(&name)).unwrap();
    stranger.send_to(b"READY=1", &SockAddr::unix(socket.join("notify")).unwrap()).unwrap();
    fs::remove_file(OsStr::from_bytes(&name)).unwrap();
    let line = service.proxy.lines.wait_for("Ignoring a notification");
    assert!(line.contains(&std::process::id().to_string()), "{line}");
    assert_eq!(read_all(&mut client).0, b"", "closed at the deadline, unserved");
    service.proxy.signal(Signal::TERM);
    let mut service = service;
    service.proxy.wait();
    assert_eq!(fs::read_dir(runtime.path()).unwrap().count(), 0, "nothing is left of the socket");
}

#[test]
fn accepts_ready_from_a_process_that_has_exited() {
    let script = r#"perl "$@" &
        while ! test -e "$3.go"; do sleep 0.05; done
        perl -MSocket -e 'socket my $s, AF_UNIX, SOCK_DGRAM, 0; send $s, "READY=1", 0,
            pack_sockaddr_un($ENV{NOTIFY_SOCKET}) or die' && echo "sent $$" >>"$3"
        wait"#;
    let options = ["--ready=notify", "--backend-wait=10s"];
    let program = ["sh", "-c", script, "sh", APP];
    let service = Service::start_as(Family::Tcp, &options, &program, &[], |launch| launch);
    let mut client = service.connect();
    client.write_all(b"pid\n").unwrap();
    let app = service.wait_for_pid("started");
    // The proxy reads the message long after its sender was reaped.
    service.proxy.suspend();
    fs::write(service.directory.path().join("log.go"), "").unwrap();
    service.wait_for_pid("sent");
    service.proxy.signal(Signal::CONT);
    let mut answer = [0; 20];
    let bytes = client.read(&mut answer).expect("READY=1 is heard");
    assert_eq!(std::str::from_utf8(&answer[..bytes]).unwrap().trim(), app.to_string());
}

#[test]
fn starts_after_the_hard_limit_on_descriptors_was_lowered() {
    let service = Service::start(Family::Tcp, &["--stop-idle-time=100ms"], &[]);
    let first = service.pid();
    wait_for_end(first);
    let limit = Rlimit { current: Some(300), maximum: Some(300) };
    let proxy = Pid::from_raw(service.proxy.pid().try_into().unwrap());
    prlimit(proxy, Resource::Nofile, limit).unwrap();
    assert_ne!(service.pid(), first);
}

/// A process of another user that sends READY=1 as often as it can.
fn flood(socket: &Path, user: u32) -> Child {
    let script = "use Socket; socket my $s, AF_UNIX, SOCK_DGRAM, 0 or die; \
                  my $to = pack_sockaddr_un($ARGV[0]); \
                  print \"flooding\\n\"; close STDOUT; \
                  while (1) { if (!fork) { send $s, 'READY=1', 0, $to; exit } wait }";
    let mut flood = Command::new("setpriv");
    flood.args(["--reuid", &user.to_string(), "--clear-groups", "perl", "-e", script]).arg(socket);
    let mut flood = flood.stdout(Stdio::piped()).spawn().unwrap();
    let mut printed = String::new();
    flood.stdout.take().unwrap().read_to_string(&mut printed).unwrap();
    assert_eq!(printed, "flooding\n");
    flood
}

#[test]
fn flood_of_ready_costs_little_and_hides_none() {
    let _turn = busy();
    if !is_root_for("a flood of READY=1 by other users") {
        return;
    }
    let runtime = TempDir::new().unwrap();
    fs::set_permissions(runtime.path(), Permissions::from_mode(0o755)).unwrap();
    let service = Service::start_as(
        Family::Tcp,
        &["--ready=notify", "--backend-wait=10s"],
        &["perl", APP],
        &["ready=2"],
        |launch| launch.env("RUNTIME_DIRECTORY", runtime.path().display()),
    );
    let mut client = service.connect();
    client.write_all(b"pid\n").unwrap();
    let app = service.wait_for_pid("started");
    let socket = fs::read_dir(runtime.path()).unwrap().next().unwrap().unwrap().path();
    // More users than are counted separately.
    let mut floods: Vec<_> =
        (1..=10).map(|user| flood(&socket.join("notify"), 60_000 + user)).collect();
    let cost = || {
        let (before, start) = (service.proxy.cpu(), Instant::now());
        pause(Duration::from_secs(1));
        (service.proxy.cpu() - before).as_secs_f64() / start.elapsed().as_secs_f64()
    };
    let waiting = cost();
    let mut answer = [0; 20];
    let bytes = client.read(&mut answer).expect("COMMAND's own READY=1 is heard");
    assert_eq!(std::str::from_utf8(&answer[..bytes]).unwrap().trim(), app.to_string());
    let ready = cost();
    for flood in &mut floods {
        flood.kill().unwrap();
        flood.wait().unwrap();
    }
    // It took most of a processor.
    assert!(waiting < 0.3 && ready < 0.3, "{waiting} of a processor, and {ready} when it is ready");
}

#[test]
fn killed_proxy_leaves_no_notify_socket() {
    // While COMMAND starts, while it is ready, and before it was ever started.
    for ready in [Some("ready=600"), Some("ready=0"), None] {
        let runtime = TempDir::new().unwrap();
        let mut service = Service::start_as(
            Family::Tcp,
            &["--ready=notify", "--log-level=debug"],
            &["perl", APP],
            &[ready.unwrap_or("ready=0")],
            |launch| launch.env("RUNTIME_DIRECTORY", runtime.path().display()),
        );
        service.proxy.lines.wait_for("Serving");
        let _client = ready.map(|ready| {
            let mut client = service.connect();
            if ready == "ready=0" {
                pid(&mut client);
            } else {
                service.wait_for_pid("started");
            }
            client
        });
        service.proxy.signal(Signal::KILL);
        service.proxy.wait();
        let left = || fs::read_dir(runtime.path()).unwrap().next().is_none().then_some(());
        let gone = poll_until(Instant::now() + TIMEOUT, left);
        assert!(gone.is_some(), "{ready:?}: the directory of the socket is left");
    }
}

#[test]
fn accepts_ready_from_systemd_notify() {
    // systemd-notify(1) is another process, which waits until it is heard and then goes.
    let script = format!(
        "perl {APP} \"$@\" & sleep 0.3; setsid systemd-notify --ready && \
         echo \"notified $$\" >>\"$2\"; wait"
    );
    let program = ["sh", "-c", &script, "sh"];
    let service = Service::start_as(Family::Tcp, &["--ready=notify"], &program, &[], |it| it);
    let start = Instant::now();
    let app = service.pid();
    assert_eq!(service.logged_pids("started"), [app]);
    service.wait_for_pid("notified");
    let took = start.elapsed();
    assert!(took < Duration::from_secs(4), "systemd-notify gives up after 5 s, and took {took:?}");
}

#[test]
fn reads_notifications_after_ready() {
    let service = Service::start(Family::Tcp, &["--ready=notify"], &["ready=0"]);
    let mut client = service.connect();
    // More than a socket queues (net.unix.max_dgram_qlen).
    for _ in 0..1000 {
        assert_eq!(ask(&mut client, "status"), "sent");
    }
}

#[test]
fn backs_off_after_exit_on_ready() {
    for status in ["0", "1"] {
        let script = format!("echo \"started $$\" >>\"$2\"; systemd-notify --ready; exit {status}");
        let program = ["sh", "-c", &script, "sh"];
        let options = ["--ready=notify", "--backend-wait=2s"];
        let service = Service::start_as(Family::Tcp, &options, &program, &[], |it| it);
        assert_eq!(read_all(&mut service.connect()).0, b"");
        let starts = service.logged_pids("started").len();
        assert!((2..=5).contains(&starts), "{starts} starts in 2 s");
        let words = format!("as soon as it was ready (exit status: {status})");
        let line = service.proxy.lines.wait_for(&words);
        assert_eq!(line.contains("must stay in the foreground"), status == "0", "{line}");
        service.proxy.lines.wait_for("(Failure 2 in a row");
    }
}

#[test]
fn closes_clients_at_once_on_a_permanent_error() {
    let front = Endpoint::new(Family::Tcp);
    let directory = TempDir::new().unwrap();
    let socket = directory.path().join("datagram");
    let _not_a_stream = UnixDatagram::bind(&socket).unwrap();
    let target = socket.to_str().unwrap();
    let proxy = Launch::new(OURS).listener(&front).args([target, "--", "sleep", "60"]).start();
    let start = Instant::now();
    for _ in 0..10 {
        assert_eq!(read_all(&mut front.connect()).0, b"");
    }
    let took = start.elapsed();
    assert!(took < Duration::from_secs(5), "ten clients in {took:?}");
    let line = proxy.lines.wait_for("Failed to connect to remote host");
    assert!(line.contains("Protocol wrong type for socket"), "{line}");
}

#[test]
fn logs_what_clients_wait_for() {
    let silent = Service::start(Family::Tcp, &["--ready=notify", "--backend-wait=1s"], &[]);
    assert_eq!(read_all(&mut silent.connect()).0, b"");
    silent.proxy.lines.wait_for("perl runs, but has not sent READY=1 (client 127.0.0.1:");
    assert!(is_running(silent.wait_for_pid("started")), "one that is never ready is left running");

    let options = ["--stop-idle-time=100ms", "--backend-wait=1s"];
    let slow = Service::start(Family::Tcp, &options, &["down=4"]);
    slow.pid();
    slow.wait_for_pid("asked");
    assert_eq!(read_all(&mut slow.connect()).0, b"");
    slow.proxy.lines.wait_for("perl is still stopping (client 127.0.0.1:");

    let elsewhere = Service::start(Family::Tcp, &["--backend-wait=1s"], &["up=60"]);
    assert_eq!(read_all(&mut elsewhere.connect()).0, b"");
    elsewhere.proxy.lines.wait_for("Connection refused, but perl runs (client 127.0.0.1:");

    let program = ["sh", "-c", "sleep 60 >/dev/null 2>&1 &", "sh"];
    let options = ["--backend-wait=1s"];
    let forking = Service::start_as(Family::Tcp, &options, &program, &[], |it| it);
    assert_eq!(read_all(&mut forking.connect()).0, b"");
    forking.proxy.lines.wait_for("(exit status: 0), but must stay in the foreground");
}

#[test]
fn backs_off_after_exit_before_ready() {
    let systemd = FakeSystemd::new();
    let options = ["--backend-wait=2s", "--log-level=debug"];
    let program = ["sh", "-c", "echo \"started $$\" >>\"$2\"; exit 3", "sh"];
    let mut service =
        Service::start_as(Family::Tcp, &options, &program, &[], |launch| launch.notify(&systemd));
    let start = Instant::now();
    let mut client = service.connect();
    assert_eq!(read_all(&mut client).0, b"");
    let held = start.elapsed();
    let slack = Duration::from_millis(3 * 500);
    assert!(
        held > Duration::from_millis(1500) && held < Duration::from_secs(2) + slack,
        "{held:?}"
    );
    // At 0, 100, 300, 700 and 1500 ms, at the earliest.
    let starts = service.logged_pids("started").len();
    assert!((2..=5).contains(&starts), "{starts} starts in 2 s");
    service
        .proxy
        .lines
        .wait_for("sh has ended before it was ready (exit status: 3). (Failure 2 in");
    let line = service.proxy.lines.wait_for("). (--backend-wait=2s is over.)");
    assert!(line.contains("before it was ready"), "{line}");
    let status = systemd.wait_for("STATUS=0 of 256 connections");
    assert!(status.contains("; sh failed "), "{status}");
    // Without a waiting client it is not started again.
    pause(Duration::from_secs(1));
    let starts = service.logged_pids("started").len();
    pause(Duration::from_secs(3));
    assert_eq!(service.logged_pids("started").len(), starts);
    assert!(service.proxy.is_running());
}

#[test]
fn refuses_a_target_that_is_served_already() {
    for family in [Family::Tcp, Family::Unix] {
        let other = Endpoint::new(family);
        let directory = TempDir::new().unwrap();
        let log = directory.path().join("log");
        let front = Endpoint::new(Family::Tcp);
        let proxy = Launch::new(OURS)
            .listener(&front)
            .args(["--backend-wait=1s", &other.target, "--", "touch", log.to_str().unwrap()])
            .start();
        serve(&other, echo);
        let mut client = front.connect();
        client.write_all(b"hello there.").unwrap();
        assert_eq!(read_all(&mut client).0, b"", "not served by the other backend");
        let words =
            format!("Failed to start touch: another process serves {} already", other.target);
        proxy.lines.wait_for(&words);
        assert!(!log.exists(), "it was not started");
    }
}

#[test]
fn idle_exit_stops_command_first() {
    let options = ["--exit-idle-time=500ms"];
    let mut service = Service::start(Family::Tcp, &options, &["down=1.5"]);
    let first = service.pid();
    // A client that comes while it is being stopped cancels the exit.
    assert_eq!(service.wait_for_pid("asked"), first);
    let second = service.pid();
    assert_ne!(second, first);
    service.proxy.lines.wait_for("No connection for 500ms, exiting.");
    assert_eq!(service.proxy.wait().code(), Some(0));
    assert!(!is_running(second));
    assert_eq!(service.logged_pids("asked"), [first, second]);
}

#[test]
fn shorter_idle_time_acts_first() {
    let options = ["--exit-idle-time=2s", "--stop-idle-time=200ms"];
    let mut service = Service::start(Family::Tcp, &options, &[]);
    let first = service.pid();
    wait_for_end(first);
    assert!(service.proxy.is_running(), "stopped, and the proxy lives on");
    assert_eq!(service.proxy.wait().code(), Some(0));
}

#[test]
fn second_signal_does_not_wait_for_command() {
    let mut service = Service::start(Family::Tcp, &[], &["keep=1"]);
    let app = service.pid();
    service.proxy.signal(Signal::TERM);
    pause(Duration::from_millis(500));
    assert!(service.proxy.is_running() && is_running(app), "it is given its 10 s");
    service.proxy.signal(Signal::INT);
    assert_eq!(service.proxy.wait().code(), Some(0));
    wait_for_end(app);
}

#[test]
fn connections_end_with_command() {
    let service = Service::start(Family::Tcp, &[], &[]);
    let mut client = service.connect();
    let app = pid(&mut client);
    let reader = thread::spawn(move || read_all(&mut client).0);
    kill_process(app, Signal::KILL).unwrap();
    assert_eq!(reader.join().unwrap(), b"");
    let line = service.proxy.lines.wait_for("perl has ended");
    assert!(line.contains("signal: 9 (SIGKILL)"), "{line}");
    assert_eq!(service.logged_pids("started"), [app], "no client needs it now");
}

#[test]
fn rejects_wrong_command_lines() {
    let port = free_port().to_string();
    let target = format!("127.0.0.1:{port}");
    let listen = "--listen=127.0.0.1:0";
    for (args, message) in [
        (&["--stop-idle-time=1s", &target][..], "--stop-idle-time= needs a COMMAND"),
        (&["--freeze-idle-time=1s", &target], "--freeze-idle-time= needs a COMMAND"),
        (&["--min-run-time=1s", &target], "--min-run-time= needs a COMMAND"),
        (&["--busy=notify", &target], "--busy=notify needs a COMMAND"),
        (
            &["--freeze-idle-time=5s", "--stop-idle-time=5s", &target, "--", "sh"],
            "--freeze-idle-time= must be less than --stop-idle-time= and --exit-idle-time=",
        ),
        (
            &["--freeze-idle-time=5s", "--exit-idle-time=4s", &target, "--", "sh"],
            "--freeze-idle-time= must be less than --stop-idle-time= and --exit-idle-time=",
        ),
        (&["--ready=connect", &target], "--ready= needs a COMMAND"),
        (
            &["--ready=maybe", &target, "--", "sh"],
            "invalid value 'maybe' for '--ready <MODE>': it is not connect, notify, http:PATH or",
        ),
        (&[&target, "--"], "There is no COMMAND after --. (Write TARGET -- COMMAND [ARG...].)"),
        (&[&target, "--", ""], "There is no COMMAND after --"),
        (&["a", "b", "--", "sh"], "Too many parameters: one COMMAND serves one TARGET"),
        (&["--", "a", "b"], "Too many parameters."),
        (&["--backend-wait=0", &target, "--", "sh"], "--backend-wait=0 leaves COMMAND or"),
        (&[&target, "--", "no-such-thing"], "COMMAND \"no-such-thing\": it is not in $PATH."),
        (&[&target, "--", "/etc/passwd"], "COMMAND \"/etc/passwd\": it is not executable"),
    ] {
        let args: Vec<_> = [listen].iter().chain(args).copied().collect();
        let (code, stdout, stderr) = run(&OURS.into(), &args);
        assert_eq!((code, &*stdout), (Some(1), ""), "{args:?}: {stderr}");
        assert!(stderr.contains(message) && stderr.lines().count() == 1, "{args:?}: {stderr}");
    }
    let (_, _, stderr) = run(&OURS.into(), &["--", &target, "--", "no-such-thing"]);
    assert!(stderr.contains("no-such-thing"), "both kinds of --: {stderr}");
}

#[test]
fn rejects_its_own_listener_as_target() {
    let port = free_port();
    let listen = format!("--listen=127.0.0.1:{port}");
    let target = format!("127.0.0.1:{port}");
    let (code, _, stderr) = run(&OURS.into(), &[&listen, &target, "--", "sh"]);
    assert_eq!(code, Some(1));
    assert!(stderr.contains(&format!("{listen} takes the address of TARGET {target}")), "{stderr}");
    let (code, _, stderr) = run(&OURS.into(), &[&listen, &target]);
    assert_eq!(code, Some(1));
    assert!(stderr.contains(&format!("{listen} leads to itself, TARGET {target}")), "{stderr}");
}

#[test]
fn processes_outside_the_group_get_sigterm() {
    // The group takes its 10 s; processes outside it have time of their own after that.
    let script = "setsid sh -c 'trap \"sleep 1; echo ended $$ >>$1; exit\" TERM; \
        while :; do sleep 0.1; done' sh \"$2\" & trap '' TERM; exec perl \"$0\" \"$@\"";
    let program = ["sh", "-c", script, APP];
    let options = ["--stop-idle-time=100ms"];
    let service = Service::start_as(Family::Tcp, &options, &program, &["keep=1"], |it| it);
    service.pid();
    service.wait_for_pid("ended");
}

#[test]
fn fails_without_a_directory_for_the_notify_socket() {
    // The first of these that is set counts.
    let names = ["RUNTIME_DIRECTORY", "XDG_RUNTIME_DIR", "TMPDIR"];
    for (index, name) in names.into_iter().enumerate() {
        let front = Endpoint::new(Family::Tcp);
        let launch = Launch::new(OURS).listener(&front);
        let launch = launch.args(["--ready=notify", "127.0.0.1:1", "--", "sh"]);
        let launch = names[..index].iter().fold(launch, |launch, name| launch.env(name, ""));
        let mut proxy = launch.env(name, "/no/such/place").start();
        assert_eq!(proxy.wait().code(), Some(1), "{name}");
        let stderr = proxy.lines.all();
        let line = "Failed to open a socket for --ready=notify or --busy=notify in /no/such/place: No such";
        assert!(stderr.contains(line), "{name}: {stderr}");
    }
}

#[test]
fn sets_no_new_privs_only_without_command() {
    for (words, forbidden) in
        [(&["127.0.0.1:9"][..], "1"), (&["127.0.0.1:9", "--", "/bin/sleep", "1000"], "0")]
    {
        let (front, systemd) = (Endpoint::new(Family::Tcp), FakeSystemd::new());
        let launch = Launch::new(OURS).args(words).listener(&front);
        let proxy = launch.notify(&systemd).start();
        systemd.wait_for("READY=1");
        let status = fs::read_to_string(format!("/proc/{}/status", proxy.pid())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("NoNewPrivs:"));
        assert_eq!(line.unwrap().trim(), forbidden, "{words:?}");
    }
}
