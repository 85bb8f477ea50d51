//! The command line.

use std::path::Path;
use std::thread;

use tokio::time::Instant;

use crate::Cases;
use crate::Expected::{OnlyOurs, Shared};
use crate::support::*;

pub(crate) fn register(cases: &mut Cases) {
    cases.add("rejects wrong command lines in one line", Shared, wrong_command_lines);
    cases.add("prints help and version", Shared, help_and_version);
    cases.add("accepts numbers and time spans", Shared, accepted_values);
    cases.add("the last of repeated options counts", Shared, repeated_options);
    // 252 names the value as well.
    let unknown = OnlyOurs("systemd-socket-proxyd: unrecognized option '--source");
    cases.add("knows --source=client", unknown, source_client);
    cases.add("refuses invalid targets at the start", OnlyOurs("started"), wrong_at_start);
}

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
        assert!(stdout.contains("--connections-max") && stdout.lines().count() <= 50, "{stdout}");
    }
    for version in ["--version", "--vers"] {
        assert_eq!(run(&program.into(), &[version]).0, Some(0), "{version}");
    }
}

fn source_client(program: &Path) {
    let (code, _, stderr) = run(&program.into(), &["--source=client", "--help"]);
    // As after every wrong command line.
    assert!(matches!(code, Some(0 | 1)), "{code:?}");
    assert!(code == Some(0), "{stderr}");
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
        assert_echoes(&mut front.connect());
    }
}

fn repeated_options(program: &Path) {
    let (front, backend) = (Endpoint::new(Family::Tcp), echo_backend(Family::Tcp));
    let args = ["-c", "0x1", "--connections-max=8", &backend.target, "--conn=9"];
    let _proxy = Launch::new(program).args(args).listener(&front).start();
    let mut clients: Vec<_> = (0..5).map(|_| front.connect()).collect();
    clients.iter_mut().for_each(assert_echoes);
}

fn wrong_at_start(program: &Path) {
    let long = format!("/{}", "x".repeat(107));
    for target in ["", ":80", "localhost:99999", "localhost:", "::1", "[::1", "@", &long] {
        let front = Endpoint::new(Family::Tcp);
        let systemd = FakeSystemd::new();
        let mut proxy = Launch::new(program).arg(target).listener(&front).notify(&systemd).start();
        let ready = thread::spawn(move || systemd.next());
        let ended = poll_until(Instant::now() + TIMEOUT, || {
            (ready.is_finished() || !proxy.is_running()).then(|| !proxy.is_running())
        });
        assert_eq!(ended, Some(true), "started with the target {target:?}");
        assert_eq!(proxy.wait().code(), Some(1));
        let stderr = proxy.lines.all();
        assert!(stderr.contains(&format!("Invalid target {target:?}")), "{stderr}");
    }
}
