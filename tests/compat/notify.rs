//! Notifications to the service manager.

use std::path::Path;
use std::thread;
use std::time::Duration;

use tokio::time::Instant;

use crate::Cases;
use crate::Expected::{FailsBefore, OnlyOurs, Shared};
use crate::support::*;

pub(crate) fn register(cases: &mut Cases) {
    let silent = FailsBefore(257, "a notification comes");
    cases.add("sends READY=1, STATUS= and STOPPING=1", silent, notifications);
    cases.add("sends WATCHDOG=1", Shared, watchdog);
    cases.add("sends STATUS= once a second at most", OnlyOurs("a notification comes"), status_rate);
}

fn notifications(program: &Path) {
    let (front, backend) = (Endpoint::new(Family::Tcp), echo_backend(Family::Tcp));
    let systemd = FakeSystemd::new();
    let mut proxy = Launch::new(program)
        .args(["--exit-idle-time=100ms", &backend.target])
        .listener(&front)
        .notify(&systemd)
        .start();
    let mut client = front.connect();
    assert_eq!(systemd.next(), "READY=1");
    assert_eq!(systemd.next(), "STATUS=Processing requests...");
    assert_echoes(&mut client);
    drop(client);
    systemd.wait_for("STOPPING=1");
    systemd.wait_for("STATUS=Shutting down...");
    assert_eq!(proxy.wait().code(), Some(0));
}

fn watchdog(program: &Path) {
    let (front, backend) = (Endpoint::new(Family::Tcp), echo_backend(Family::Tcp));
    let systemd = FakeSystemd::new();
    let _proxy = Launch::new(program)
        .arg(&backend.target)
        .listener(&front)
        .notify(&systemd)
        .env("WATCHDOG_USEC", 200_000)
        .start();
    for _ in 0..3 {
        systemd.wait_for("WATCHDOG=1");
    }
    assert_echoes(&mut front.connect());
}

fn status_rate(program: &Path) {
    let (front, backend) = (Endpoint::new(Family::Tcp), echo_backend(Family::Tcp));
    let systemd = FakeSystemd::new();
    let _proxy =
        Launch::new(program).arg(&backend.target).listener(&front).notify(&systemd).start();
    systemd.wait_for("STATUS=Processing requests...");
    // Far more changes than messages.
    let start = Instant::now();
    thread::scope(|scope| {
        scope.spawn(|| {
            while start.elapsed() < Duration::from_secs(5) {
                assert_echoes(&mut front.connect());
            }
        });
        systemd.wait_for("STATUS=");
        for _ in 0..2 {
            let last = Instant::now();
            let status = systemd.wait_for("STATUS=");
            let apart = last.elapsed();
            assert!(
                status.contains(" of 256 connections, ") && status.contains(" served, "),
                "{status}"
            );
            assert!(apart > Duration::from_millis(700), "{apart:?} apart");
        }
    });
}
