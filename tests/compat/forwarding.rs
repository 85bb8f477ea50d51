//! Bytes, ends and resets, both ways.

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::path::Path;
use std::thread;
use std::time::Duration;

use socket2::Socket;
use tokio::time::Instant;

use crate::Cases;
use crate::Expected::{FailsBefore, OnlyOurs, OursAlone, Shared};
use crate::support::*;

pub(crate) fn register(cases: &mut Cases) {
    for pair @ (front, back) in PAIRS {
        let mut case = |name: &str, expected, test: fn(&Path, (Family, Family))| {
            cases.add(format!("{name}, {front} to {back}"), expected, move |program| {
                test(program, pair)
            });
        };
        case("echoes 64 KiB", Shared, there_and_back);
        case("serves 12 clients with random sizes and pauses", Shared, random_clients);
        let reply_lost = FailsBefore(258, "the reply after the half-close");
        case("forwards the reply after the client's half-close", reply_lost, client_ends_first);
        let upload_lost = FailsBefore(258, "the upload after the half-close");
        case("forwards the upload after the backend's half-close", upload_lost, backend_ends_first);
    }
    let clean = OnlyOurs("not a reset: Ok");
    cases.add("forwards a reset by the client", clean, |program| reset_by(program, true));
    cases.add("forwards a reset by the backend", clean, |program| reset_by(program, false));
    let all_clean = OnlyOurs("ends were clean");
    cases.add(
        "an answer with a reset behind it has no clean end",
        all_clean,
        answer_and_reset_at_once,
    );
    let cut = FailsBefore(258, "of 60000");
    cases.add("delivers 60 KB before a close with the upload unread", cut, early_answer);
    cases.add("forwards urgent data", OnlyOurs("was lost"), urgent_data);
    for (name, is_swapped) in [("the backend", false), ("the client", true)] {
        let name = format!("passes descriptors between Unix sockets, to {name}");
        cases.add(name, OnlyOurs("0 of 3 descriptors came"), move |program| {
            descriptors(program, is_swapped)
        });
    }
    cases.add("a flood of one-byte messages delays no other client", Shared, |program| {
        floods(program, false)
    });
    cases.add("a flood of descriptors delays no other client", OursAlone, |program| {
        floods(program, true)
    });
    cases.add_as_root("sets TCP_NODELAY on both sides", OnlyOurs("no TCP_NODELAY"), no_delay);
}

fn there_and_back(program: &Path, (front, back): (Family, Family)) {
    let (front, backend) = (Endpoint::new(front), echo_backend(back));
    let _proxy = Launch::new(program).arg(&backend.target).listener(&front).start();
    let mut client = front.connect();
    let message = random_bytes(1, 64 * 1024);
    assert!(exchange(&mut client, &message).unwrap() == message);
    assert_echoes(&mut client);
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
    let dice = random_bytes(seed, 4096);
    let die = |at: usize| usize::from(dice[at % 4096]) << 8 | usize::from(dice[(at + 1) % 4096]);
    let length = (die(0) * 144).min(9_000_000);
    let message = random_bytes(seed + 100, length);
    let mut reader = client.try_clone().unwrap();
    thread::scope(|scope| {
        scope.spawn(|| {
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
        let mut buffer = vec![0; 100_000];
        let (mut left, mut at) = (length, 1);
        while left > 0 {
            let room = (1 + die(at) % buffer.len()).min(left);
            at += 3;
            let bytes = reader.read(&mut buffer[..room]).expect("no error before the end");
            assert!(bytes > 0, "the end came {left} bytes early");
            let expected = &message[length - left..][..bytes];
            assert!(buffer[..bytes] == *expected, "the bytes of client {seed} differ");
            left -= bytes;
        }
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
    let answer = random_bytes(2, 300_000);
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
    let upload = random_bytes(3, 300_000);
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
    let last_words = random_bytes(4, 100_000);
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
        let clients: Vec<_> = (0..20).map(|_| front.try_connect()).collect();
        for client in clients {
            // With one processor the reset may come before connect(2) returns.
            if client.as_ref().is_err_and(|it| it.kind() == ErrorKind::ConnectionReset) {
                continue;
            }
            let (bytes, end) = read_all(&mut client.unwrap());
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
        let answer = random_bytes(round, 60_000);
        server.read_exact(&mut [0; 10_000]).unwrap();
        server.write_all(&answer).unwrap();
        drop(server);
        let (received, _) = read_all(&mut client);
        assert!(received == answer, "{} of 60000 bytes arrived", received.len());
    }
}

/// On every pair of families: tests/urgent.rs.
fn urgent_data(program: &Path) {
    let [front, backend] = [Family::Tcp, Family::Tcp].map(Endpoint::new);
    let _proxy = Launch::new(program).arg(&backend.target).listener(&front).start();
    let failures = urgent::carry(&front, &backend, true, 0..20);
    assert!(failures.is_empty(), "urgent data was lost: {failures:?}");
}

fn descriptors(program: &Path, is_swapped: bool) {
    let [front, backend] = [Family::Unix, Family::Unix].map(Endpoint::new);
    let proxy = Launch::new(program).arg(&backend.target).listener(&front).start();
    let (client, served) = (front.connect(), backend.accept());
    let (mut from, mut to) = if is_swapped { (served, client) } else { (client, served) };
    // With the pipes that a program has for a connection.
    assert_forwards(&mut from, &mut to);
    assert_forwards(&mut to, &mut from);
    let open = proxy.descriptors();
    let files = descriptors::files(3);
    assert_eq!(descriptors::pass(&from, b"bytes", &files), Ok(5));
    let (bytes, passed) = descriptors::receive_passed(&to, 100).unwrap();
    // The bytes come whatever becomes of the descriptors, and none stays open in between.
    assert_eq!(&bytes, b"bytes");
    assert_forwards(&mut to, &mut from);
    assert_forwards(&mut from, &mut to);
    // Ours closes them on another thread.
    let are_closed = || (proxy.descriptors() == open).then_some(());
    assert!(poll_until(Instant::now() + TIMEOUT, are_closed).is_some());
    let came = passed.len();
    assert_eq!(
        descriptors::inodes(&passed),
        descriptors::inodes(&files),
        "{came} of 3 descriptors came"
    );
}

/// A client's answer comes at once beside two that flood, from either side. (Within 0.1 s: it took 0.5
/// to 5 s when a turn was bounded in bytes only.)
fn floods(program: &Path, with_descriptors: bool) {
    for from_client in [true, false] {
        // To TCP, where each byte costs more than the flood's: it always has more.
        let [from, to] = [Family::Unix, Family::Tcp].map(Endpoint::new);
        let (front, backend) = if from_client { (from, to) } else { (to, from) };
        let _proxy = Launch::new(program).arg(&backend.target).listener(&front).start();
        let times = floods::beside_floods(&front, &backend, from_client, with_descriptors);
        assert!(times[7] < Duration::from_millis(100), "answers took {times:?}");
    }
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
