//! What is logged, and what is not.

use std::path::Path;

use rustix::process::Signal;
use tokio::time::Instant;

use crate::Cases;
use crate::Expected::{OnlyOurs, Shared};
use crate::front_is_served;
use crate::support::*;

pub(crate) fn register(cases: &mut Cases) {
    cases.add("logs an unreachable backend and serves on", Shared, unreachable);
    cases.add("logs a refused connection in the words of the original", Shared, refusal_is_logged);
    cases.add("does not log clients that disconnect", Shared, silent_about_peers);
    cases.add("logs each connection on SIGUSR1", OnlyOurs("no line with"), tells_of_each);
    cases.add(
        "prefixes lines with a priority under systemd",
        OnlyOurs("no line with"),
        prefixed_lines,
    );
    cases.add(
        "serves clients while standard error is stuck",
        OnlyOurs("Failed to parse"),
        stuck_log,
    );
}

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

fn refusal_is_logged(program: &Path) {
    let (front, backend) = (Endpoint::new(Family::Tcp), echo_backend(Family::Tcp));
    let args = ["-c1", &backend.target];
    let proxy = Launch::new(program).args(args).listener(&front).start();
    let mut clients: Vec<_> = (0..4).map(|_| front.connect()).collect();
    assert_echoes(&mut clients[0]);
    proxy.lines.wait_for("Hit connection limit, refusing connection");
}

fn silent_about_peers(program: &Path) {
    let (front, backend) = (Endpoint::new(Family::Tcp), echo_backend(Family::Tcp));
    let proxy = Launch::new(program).arg(&backend.target).listener(&front).start();
    for round in 0..30 {
        let mut client = front.connect();
        assert_echoes(&mut client);
        if round % 2 == 0 {
            reset(client);
        }
    }
    assert_echoes(&mut front.connect());
    let unasked = proxy.lines.count("");
    assert_eq!(unasked, 0, "lines about clients that left");
}

fn tells_of_each(program: &Path) {
    for (front_family, back) in PAIRS {
        let (front, backend) = (Endpoint::new(front_family), echo_backend(back));
        let proxy = Launch::new(program).arg(&backend.target).listener(&front).start();
        let mut clients: Vec<_> = (0..5).map(|_| front.connect()).collect();
        for (round, client) in clients.iter_mut().enumerate() {
            (0..=round).for_each(|_| assert_echoes(client));
        }
        for times in 1..=2 {
            proxy.signal(Signal::USR1);
            proxy.lines.wait_for("Open connections: 5.");
            for round in 0..5 {
                let bytes = 14 * (round + 1);
                let line = format!(": {bytes} bytes to the backend, {bytes} bytes back");
                let printed = || (proxy.lines.count(&line) == times).then_some(());
                poll_until(Instant::now() + TIMEOUT, printed)
                    .expect("no line with what it carried");
            }
        }
        let line = proxy.lines.wait_for("Connection of ");
        assert!(line.contains(&backend.target), "{line}");
        let has_tcp = [front_family, back].contains(&Family::Tcp);
        assert_eq!(line.contains(", idle for "), has_tcp, "{line}");
        clients.iter_mut().for_each(assert_echoes);
    }
}

fn prefixed_lines(program: &Path) {
    let front = Endpoint::new(Family::Tcp);
    let target = format!("127.0.0.1:{}", free_port());
    let proxy = Launch::new(program).arg(target).listener(&front).under_systemd().start();
    assert!(front_is_served(&front));
    proxy.lines.wait_for("<4>Failed to connect to remote host");
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
    let deadline = Instant::now() + TIMEOUT;
    let printed = poll_until(deadline, || {
        let _ = exchange(&mut front.connect(), b"one more line");
        (proxy.lines.count("log lines were dropped") > 0).then_some(())
    });
    printed.expect("the number of dropped lines is logged");
}
