//! How the program ends: idle, or by a signal.

use std::io::{Read, Write};
use std::path::Path;
use std::time::Duration;

use rustix::process::Signal;
use tokio::time::Instant;

use crate::Cases;
use crate::Expected::{OnlyOurs, Shared};
use crate::front_is_served;
use crate::support::*;

pub(crate) fn register(cases: &mut Cases) {
    cases.add("exits when idle after the last connection", Shared, idle_exit);
    cases.add(
        "exits when idle without any connection",
        OnlyOurs("the program exits"),
        idle_from_start,
    );
    cases.add("serves a client queued at the idle deadline", Shared, queued_at_the_deadline);
    cases.add("SIGTERM stops and resets", OnlyOurs("the last notification"), terminate);
    let killed = OnlyOurs("killed by a signal");
    cases.add("SIGINT stops", killed, |program| stops_on(program, Signal::INT));
    cases.add("SIGHUP stops", killed, |program| stops_on(program, Signal::HUP));
    cases.add("SIGHUP and SIGINT stay ignored", Shared, ignored_signals);
}

fn idle_exit(program: &Path) {
    let (front, backend) = (Endpoint::new(Family::Tcp), echo_backend(Family::Tcp));
    let args = ["--exit-idle-time=200ms", &backend.target];
    let mut proxy = Launch::new(program).args(args).listener(&front).start();
    let mut client = front.connect();
    assert_echoes(&mut client);
    pause(Duration::from_millis(500));
    assert!(proxy.is_running(), "an open connection is not idle");
    assert_echoes(&mut client);
    drop(client);
    assert_eq!(proxy.wait().code(), Some(0));
    // As systemd would: the socket stays, and the next client starts the next process.
    let mut client = front.connect();
    let args = ["--exit-idle-time=200ms", &backend.target];
    let _proxy = Launch::new(program).args(args).listener(&front).start();
    assert_echoes(&mut client);
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
    assert_echoes(&mut front.connect());
    // Stopped over the deadline, it wakes up to an expired timer and a queued client at once.
    proxy.suspend();
    pause(Duration::from_millis(500));
    let mut client = front.connect();
    proxy.signal(Signal::CONT);
    assert_echoes(&mut client);
    drop(client);
    assert_eq!(proxy.wait().code(), Some(0));
}

fn terminate(program: &Path) {
    let (front, backend) = (Endpoint::new(Family::Tcp), Endpoint::new(Family::Tcp));
    let systemd = FakeSystemd::new();
    let mut proxy =
        Launch::new(program).arg(&backend.target).listener(&front).notify(&systemd).start();
    let mut client = front.connect();
    let mut server = backend.accept();
    server.write_all(b"half of a download").unwrap();
    client.read_exact(&mut [0; 18]).unwrap();
    proxy.signal(Signal::TERM);
    proxy.wait();
    let (_, end) = read_all(&mut client);
    let last = {
        // A mark behind what the program sent.
        let mark = std::os::unix::net::UnixDatagram::unbound().unwrap();
        mark.send_to(b"MARK=1", &systemd.path).unwrap();
        let mut last = String::new();
        loop {
            match systemd.next() {
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
    let systemd = FakeSystemd::new();
    let mut proxy = Launch::new(program)
        .args(["--exit-idle-time=1h", "127.0.0.1:80"])
        .listener(&front)
        .notify(&systemd)
        .start();
    assert!(front_is_served(&front));
    proxy.signal(signal);
    assert_eq!(proxy.wait().code(), Some(0), "killed by a signal");
    systemd.wait_for("STOPPING=1");
}

/// As with nohup(1), and in what a shell's script starts with `&`.
fn ignored_signals(program: &Path) {
    let (front, backend) = (Endpoint::new(Family::Tcp), echo_backend(Family::Tcp));
    let launch = Launch::new(program).arg(&backend.target).listener(&front);
    let launch = launch.signals("--ignore-signal=HUP,INT");
    let mut proxy = launch.start();
    let mut client = front.connect();
    assert_echoes(&mut client);
    proxy.signal(Signal::HUP);
    proxy.signal(Signal::INT);
    // A signal that is not ignored is handled before the next system call ends.
    (0..10).for_each(|_| assert_echoes(&mut front.connect()));
    assert_echoes(&mut client);
    assert!(proxy.is_running());
    proxy.signal(Signal::TERM);
    proxy.wait();
}
