//! Connections between Unix sockets whose peers pass descriptors.

use socket2::Socket;
use tokio::time::Instant;

use crate::support::descriptors::*;
use crate::support::*;
use crate::{End, Proxy};

pub fn register(trials: &mut Trials) {
    for is_swapped in [false, true] {
        let side = if is_swapped { "backend" } else { "client" };
        trials.add(format!("descriptors wait for the next process, of a {side}"), move || {
            descriptors_wait_for_the_next_process(is_swapped);
        });
    }
    trials.add("a stored connection carries no descriptors", stored_connections_carry_none);
    trials.add("credentials are no descriptors of a stored connection", credentials_are_none);
}

fn assert_forwards_plain(from: &Socket, to: &Socket) {
    for (from, to) in [(from, to), (to, from)] {
        assert_eq!(pass(from, b"plain", &[]), Ok(5));
        assert_eq!(receive_passed(to, 10).unwrap().0, b"plain");
    }
}

fn connect(front: &Endpoint, backend: &Endpoint, is_swapped: bool) -> (Socket, Socket) {
    let client = front.connect();
    let served = backend.accept();
    if is_swapped { (served, client) } else { (client, served) }
}

fn descriptors_wait_for_the_next_process(is_swapped: bool) {
    let (front, backend) = (Endpoint::new(Family::Unix), Endpoint::new(Family::Unix));
    let mut proxy = Proxy::start(&front, &["--handover=restart", &backend.target]);
    let (from, to) = connect(&front, &backend, is_swapped);
    assert_forwards_plain(&from, &to);
    from.set_nonblocking(true).unwrap();
    let (mut sent, mut all) = (Vec::new(), Vec::new());
    let is_full = || {
        let (file, message) = (files(3), random_bytes(all.len() as u64, 9000));
        let Ok(bytes) = pass(&from, &message, &file) else { return Some(()) };
        sent.extend(inodes(&file));
        all.extend(&message[..bytes]);
        None
    };
    poll_until(Instant::now() + TIMEOUT, is_full).expect("it is stalled");
    for _ in 0..2 {
        proxy.replace(End::Stopped);
    }
    let (mut bytes, mut got) = (Vec::new(), Vec::new());
    while bytes.len() < all.len() {
        let (more, files) = receive_passed(&to, 5000).unwrap();
        bytes.extend(more);
        got.extend(inodes(&files));
    }
    assert!(bytes == all);
    assert_eq!(got, sent);
    from.set_nonblocking(false).unwrap();
    assert_forwards_plain(&from, &to);
    let open = proxy.running.descriptors();
    drop((from, to));
    // The last that were passed on may have been open when they were counted.
    let is_closed = || (proxy.running.descriptors() + 2 <= open).then_some(());
    poll_until(Instant::now() + TIMEOUT, is_closed).expect("nothing stays open");
}

/// Bytes of stored connections never leave the kernel, and descriptors cannot stay with them.
fn stored_connections_carry_none() {
    let (front, backend) = (Endpoint::new(Family::Unix), Endpoint::new(Family::Unix));
    let mut proxy = Proxy::start(&front, &["--handover=crash", &backend.target]);
    let (other, other_served) = connect(&front, &backend, false);
    for is_swapped in [false, true] {
        let (from, to) = connect(&front, &backend, is_swapped);
        assert_forwards_plain(&from, &to);
        assert_eq!(pass(&from, b"x", &files(2)), Ok(1));
        for end in [to, from] {
            let (bytes, _) = read_all(&mut end.try_clone().unwrap());
            assert!(bytes.is_empty());
        }
    }
    let line = proxy.running.lines.wait_for("of the client, resetting the connection");
    assert!(line.contains("--handover=restart"), "{line}");
    proxy.running.lines.wait_for("of the backend, resetting the connection");
    assert_eq!(proxy.running.lines.count("resetting"), 2);
    proxy.replace(End::Killed);
    assert_forwards_plain(&other, &other_served);
    proxy.wait_until_stored(1);
}

/// A listener may have the kernel add control messages to everything.
fn credentials_are_none() {
    let (front, backend) = (Endpoint::new(Family::Unix), Endpoint::new(Family::Unix));
    add_credentials(&front.socket);
    let mut proxy = Proxy::start(&front, &["--handover=crash", &backend.target]);
    let (client, served) = connect(&front, &backend, false);
    assert_forwards_plain(&client, &served);
    proxy.replace(End::Killed);
    assert_forwards_plain(&client, &served);
    assert_eq!(pass(&client, b"x", &files(1)), Ok(1));
    proxy.running.lines.wait_for("of the client, resetting the connection");
}
