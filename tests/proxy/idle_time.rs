//! `--connection-idle-time=`: an idle connection is closed, a busy one is not.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::thread;
use std::time::Duration;

use crate::support::*;
use rustix::process::Signal;
use socket2::Socket;
use tokio::time::Instant;

const TIME: Duration = Duration::from_secs(1);

/// Two seconds are promised for one; three times the slack.
const LATE: Duration = Duration::from_secs(4);

fn start(front: &Endpoint, backend: &Endpoint) -> Running {
    let options = ["--connection-idle-time=1s", "--threads=2", &backend.target];
    Launch::new(OURS).args(options).listener(front).start()
}

/// Waits until the connection has ended, as the closing of an idle one looks on this family.
fn ends(socket: &mut Socket, family: Family, since: Instant) {
    let (bytes, end) = read_all(socket);
    let took = since.elapsed();
    assert!(bytes.is_empty() && took >= TIME && took < LATE, "after {took:?}: {end:?}");
    match family {
        Family::Tcp => assert!(is_reset(&end), "not a reset: {end:?}"),
        Family::Unix => end.expect("a Unix socket just ends"),
    }
}

#[test]
fn busy_connection_outlives_an_idle_one() {
    let _turn = measuring();
    thread::scope(|scope| {
        for (front, back) in PAIRS {
            scope.spawn(move || busy_and_quiet(front, back));
        }
    });
}

fn busy_and_quiet(front_family: Family, back: Family) {
    let (front, backend) = (Endpoint::new(front_family), Endpoint::new(back));
    let proxy = start(&front, &backend);
    thread::scope(|scope| {
        let (mut client, mut served) = (front.connect(), backend.accept());
        // Bytes flow one way, then the other way, then not at all.
        scope.spawn(move || {
            let mut last = Instant::now();
            for round in 0..12 {
                pause(TIME / 4);
                last = Instant::now();
                let (from, to) = match round {
                    0..6 => (&mut client, &mut served),
                    _ => (&mut served, &mut client),
                };
                from.write_all(b"x").unwrap();
                let mut byte = [0];
                to.read_exact(&mut byte).expect("a busy one is let alone");
            }
            ends(&mut client, front_family, last);
            ends(&mut served, back, last);
        });
        // Never sends anything.
        let since = Instant::now();
        let (mut client, mut served) = (front.connect(), backend.accept());
        ends(&mut client, front_family, since);
        ends(&mut served, back, since);
        // Is half-closed, and waits for the answer.
        let since = Instant::now();
        let (mut client, mut served) = (front.connect(), backend.accept());
        client.write_all(b"?").unwrap();
        client.shutdown(Shutdown::Write).unwrap();
        ends(&mut client, front_family, since);
        let (bytes, end) = read_all(&mut served);
        assert_eq!(bytes, b"?");
        end.expect("the half-close came long before");
    });
    proxy.lines.wait_for("Connection was idle for 1s, closing it (client ");
}

#[test]
fn stalled_reader_is_idle() {
    let _turn = measuring();
    for (front_family, back) in PAIRS {
        // More than all buffers between take; made before the idle time runs.
        let message = random_bytes(1, 64 * 1024 * 1024);
        let (front, backend) = (Endpoint::new(front_family), Endpoint::new(back));
        let _proxy = start(&front, &backend);
        let (mut client, _served) = (front.connect(), backend.accept());
        let since = Instant::now();
        let error = client.write_all(&message).expect_err("the backend does not read");
        let took = since.elapsed();
        assert!(took >= TIME && took < LATE, "after {took:?}: {error}");
    }
}

#[test]
fn slow_reader_is_not_idle() {
    // More than a whole buffer of a Unix socket. Before Linux 6.5 spliced bytes fill one up to 544 KiB: 17
    // fragments of eight pages.
    let step = if linux_is_before((6, 5)) { 600_000 } else { 100_000 };
    let _turn = measuring();
    thread::scope(|scope| {
        for (front, back) in PAIRS {
            scope.spawn(move || {
                let (front, backend) = (Endpoint::new(front), Endpoint::new(back));
                let _proxy = start(&front, &backend);
                let message = random_bytes(2, 15 * step);
                let (mut client, mut served) = (front.connect(), backend.accept());
                // The sender has sent everything and closed before the client reads.
                let sent = message.clone();
                scope.spawn(move || served.write_all(&sent).unwrap());
                let mut received = vec![0; message.len()];
                for piece in received.chunks_mut(step) {
                    pause(TIME * 3 / 10);
                    client.read_exact(piece).expect("a reader that takes some is not idle");
                }
                assert!(received == message);
                assert_eq!(read_all(&mut client).0, b"");
            });
        }
    });
}

#[test]
fn unread_bytes_of_a_reset_wait_no_longer() {
    let _turn = measuring();
    let (front, backend) = (Endpoint::new(Family::Tcp), Endpoint::new(Family::Tcp));
    let proxy = start(&front, &backend);
    // More than the backend's side takes, which waits to be received when the sender is reset.
    let message = random_bytes(3, 4_000_000);
    let (mut client, _served) = (front.connect(), backend.accept());
    client.write_all(&message).unwrap();
    // Its pipe may come later, and stays for the next.
    let without_pipes = || proxy.descriptors() - proxy.pipes();
    let before = without_pipes();
    let since = Instant::now();
    reset(client);
    let over = || (without_pipes() <= before - 2).then_some(());
    poll_until(Instant::now() + TIMEOUT, over).expect("it ends");
    assert!(since.elapsed() < LATE, "{:?}", since.elapsed());
}

#[test]
fn waiting_client_is_not_idle() {
    let _turn = measuring();
    let front = Endpoint::new(Family::Tcp);
    let target = format!("127.0.0.1:{}", free_port());
    let options = ["--connection-idle-time=100ms", "--backend-wait=60s", &target];
    let proxy = Launch::new(OURS).args(options).listener(&front).start();
    let mut client = front.connect();
    proxy.lines.wait_for("holding clients");
    pause(Duration::from_millis(500));
    let backend = Endpoint::tcp(&target, 16);
    let mut served = backend.accept();
    client.write_all(b"x").unwrap();
    let since = Instant::now();
    let (bytes, end) = read_all(&mut served);
    assert_eq!(bytes, b"x");
    assert!(is_reset(&end) && since.elapsed() < LATE, "{end:?}");
    proxy.signal(Signal::TERM);
}
