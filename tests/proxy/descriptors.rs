//! Descriptors that Unix peers pass to each other through the proxy.

use std::fs::{self, Permissions};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use rustix::process::{Pid, Resource, Rlimit, Signal, prlimit};
use socket2::Socket;
use tokio::time::Instant;

use crate::support::descriptors::*;
use crate::support::*;

/// A proxy between two Unix sockets.
struct Pair {
    front: Endpoint,
    backend: Endpoint,
    proxy: Running,
}

impl Pair {
    fn start(launch: impl FnOnce(Launch) -> Launch) -> Self {
        Self::behind(Endpoint::new(Family::Unix), launch)
    }

    fn behind(front: Endpoint, launch: impl FnOnce(Launch) -> Launch) -> Self {
        let backend = Endpoint::new(Family::Unix);
        // An unprivileged proxy can connect as well.
        let path = Path::new(&backend.target);
        for (path, mode) in [(path.parent().unwrap(), 0o755), (path, 0o777)] {
            fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
        }
        let proxy = Launch::new(OURS).arg(&backend.target).listener(&front);
        let proxy = launch(proxy).start();
        Self { front, backend, proxy }
    }

    /// A client and its backend, or the two exchanged.
    fn connect(&self, is_swapped: bool) -> (Socket, Socket) {
        let client = self.front.connect();
        let served = self.backend.accept();
        if is_swapped { (served, client) } else { (client, served) }
    }

    /// Waits until no descriptor of a connection is open.
    fn wait_for_descriptors(&self, count: usize) {
        wait_for_descriptors(&self.proxy, count);
    }
}

fn wait_for_descriptors(proxy: &Running, count: usize) {
    let is_reached = || (proxy.descriptors() == count).then_some(());
    let reached = poll_until(Instant::now() + TIMEOUT, is_reached);
    assert!(reached.is_some(), "{} descriptors instead of {count}", proxy.descriptors());
}

#[test]
fn descriptors_go_both_ways_with_their_byte() {
    let pair = Pair::start(|launch| launch);
    for is_swapped in [false, true] {
        let (from, to) = pair.connect(is_swapped);
        for count in [1, 3, 253] {
            let sent = files(count);
            assert_eq!(pass(&from, b"x", &sent), Ok(1));
            let (bytes, received) = receive_passed(&to, 100).unwrap();
            assert_eq!((&bytes[..], inodes(&received)), (&b"x"[..], inodes(&sent)));
            assert_eq!(pass(&to, b"thanks", &[]), Ok(6));
            assert_eq!(receive_passed(&from, 100).unwrap().0, b"thanks");
        }
    }
}

/// A message, and where its first byte is in the stream.
struct Sent {
    at: usize,
    inodes: Vec<u64>,
}

/// Sends random messages, some with up to `most` descriptors. Returns those, and all bytes.
fn send_random(socket: &Socket, seed: u64, most: usize) -> (Vec<Sent>, Vec<u8>) {
    let (mut sent, mut all) = (Vec::new(), Vec::new());
    let dice = random_bytes(seed, 128);
    for (number, dice) in dice.chunks(8).enumerate() {
        let size = 1 + usize::from(dice[0])
            * match dice[1] % 4 {
                0 => 1,
                1 => 30,
                _ => 300,
            };
        let bytes = random_bytes(seed * 1000 + number as u64, size);
        let count = if dice[2] < 120 { usize::from(dice[3]) % (most + 1) } else { 0 };
        let files = files(count);
        let mut done = loop {
            // The client's user has a limit of descriptors in flight, too.
            match pass(socket, &bytes, &files) {
                Err(rustix::io::Errno::TOOMANYREFS) => pause(Duration::from_millis(1)),
                done => break done.unwrap(),
            }
        };
        if count > 0 {
            sent.push(Sent { at: all.len(), inodes: inodes(&files) });
        }
        while done < bytes.len() {
            done += pass(socket, &bytes[done..], &[]).unwrap();
        }
        all.extend(bytes);
    }
    socket.shutdown(std::net::Shutdown::Write).unwrap();
    (sent, all)
}

/// Receives everything, in random pieces. Returns the bytes, and each descriptor's inode with the
/// position of the first byte that came with it.
fn receive_random(socket: &Socket, seed: u64) -> (Vec<u8>, Vec<(usize, u64)>) {
    let (mut all, mut got) = (Vec::new(), Vec::new());
    for dice in random_bytes(seed, 1000).chunks(2).cycle() {
        if dice[0] < 20 {
            pause(Duration::from_micros(u64::from(dice[1]) * 10));
        }
        let (bytes, files) = receive_passed(socket, 1 + usize::from(dice[1]) * 200).unwrap();
        got.extend(inodes(&files).into_iter().map(|inode| (all.len(), inode)));
        if bytes.is_empty() {
            break;
        }
        all.extend(bytes);
    }
    (all, got)
}

fn assert_passed(
    (sent, bytes): (Vec<Sent>, Vec<u8>),
    (received, got): (Vec<u8>, Vec<(usize, u64)>),
) {
    assert!(bytes == received, "{} bytes sent, {} received", bytes.len(), received.len());
    let expected: Vec<_> =
        sent.iter().flat_map(|sent| sent.inodes.iter().map(|inode| (sent.at, *inode))).collect();
    assert_eq!(expected.len(), got.len());
    for ((at, inode), (got_at, got_inode)) in expected.into_iter().zip(got) {
        assert_eq!(inode, got_inode, "in order");
        assert!(got_at <= at, "late: with byte {got_at}, sent with byte {at}");
    }
}

/// Connections in all, so many at a time, whose messages have up to `most` descriptors.
fn pass_at_random(pair: &Pair, connections: u64, at_a_time: usize, most: usize) {
    let next = AtomicU64::new(0);
    // As many as there are threads, which start with their first connection.
    let first = [(); 2].map(|()| pair.connect(false));
    for (from, to) in &first {
        assert_eq!(pass(from, b"x", &[]), Ok(1));
        assert_eq!(receive_passed(to, 10).unwrap().0, b"x");
    }
    // Each has two sockets.
    let idle = pair.proxy.descriptors() - 4;
    drop(first);
    // One worker at a time, so that each accepts the connection of its own client.
    let connecting = Mutex::new(());
    let connect = || {
        let _turn = connecting.lock().unwrap();
        pair.connect(false)
    };
    let work = || {
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            if number >= connections {
                break;
            }
            let (client, served) = connect();
            exchange(&client, &served, number, most);
        }
    };
    thread::scope(|scope| {
        let workers: Vec<_> = (0..at_a_time).map(|_| scope.spawn(work)).collect();
        workers.into_iter().for_each(|worker| worker.join().unwrap());
    });
    pair.wait_for_descriptors(idle);
}

/// Both ends send and receive at once.
fn exchange(client: &Socket, served: &Socket, number: u64, most: usize) {
    thread::scope(|scope| {
        let there = scope.spawn(|| send_random(client, 2 * number, most));
        let back = scope.spawn(|| send_random(served, 2 * number + 1, most));
        let at_backend = scope.spawn(|| receive_random(served, 3 * number));
        let at_client = receive_random(client, 3 * number + 1);
        assert_passed(there.join().unwrap(), at_backend.join().unwrap());
        assert_passed(back.join().unwrap(), at_client);
    });
}

#[test]
fn a_thousand_connections_pass_descriptors() {
    let pair = Pair::start(|launch| launch.descriptors(20_000));
    pass_at_random(&pair, 1000, 24, 40);
}

#[test]
fn few_descriptors_are_enough() {
    for threads in ["--threads=1", "--threads=2"] {
        let pair = Pair::start(|launch| launch.descriptors(64).arg(threads));
        pass_at_random(&pair, 200, 24, 16);
        assert_eq!(pair.proxy.lines.count("resetting"), 0);
    }
}

#[test]
fn an_unprivileged_proxy_reaches_the_limit_of_descriptors_in_flight() {
    if !is_root_for("an_unprivileged_proxy_reaches_the_limit_of_descriptors_in_flight") {
        return;
    }
    // The limit is that of the user.
    let pair = Pair::start(|launch| launch.descriptors(64).user(64_001));
    pass_at_random(&pair, 1000, 8, 16);
    assert_eq!(pair.proxy.lines.count("resetting"), 0);
}

/// Whether the connection is over, without a byte more.
fn ends(socket: &Socket) -> bool {
    let (bytes, _) = read_all(&mut socket.try_clone().unwrap());
    bytes.is_empty()
}

#[test]
fn descriptors_that_stay_in_flight_end_the_connection() {
    const TEST: &str = "descriptors_that_stay_in_flight_end_the_connection";
    if !is_root_for(TEST) {
        return;
    }
    let pair = Pair::start(|launch| launch.descriptors(64).user(64_002));
    let (client, served) = pair.connect(false);
    let idle = pair.proxy.descriptors() - 2;
    let since = Instant::now();
    // Nothing receives them.
    for _ in 0..6 {
        pass(&client, b"x", &files(16)).unwrap();
    }
    let line = pair.proxy.lines.wait_for("resetting the connection");
    assert!(line.contains("too many descriptors of this user are in flight"), "{line}");
    let took = since.elapsed();
    assert!((1000..3000).contains(&took.as_millis()), "{took:?}");
    assert!(ends(&client));
    drop((client, served));
    pair.wait_for_descriptors(idle);
    // Others go on.
    let (client, served) = pair.connect(true);
    pass(&client, b"y", &files(16)).unwrap();
    assert_eq!(receive_passed(&served, 10).unwrap().1.len(), 16);
    assert_eq!(pair.proxy.lines.count("resetting"), 1);
}

#[test]
fn a_wait_for_others_ends_with_them_and_uses_no_time() {
    if !is_root_for("a_wait_for_others_ends_with_them_and_uses_no_time") {
        return;
    }
    // The last message is refused, since too many are in flight.
    for (limit, most, messages) in [(64, 16, 6), (2048, 253, 10)] {
        let pair = Pair::start(|launch| launch.descriptors(limit).user(64_003));
        let (first, first_served) = pair.connect(false);
        let others = [true, false, true].map(|is_swapped| pair.connect(is_swapped));
        for _ in 0..messages {
            pass(&first, b"x", &files(most)).unwrap();
        }
        let used = || {
            let before = pair.proxy.cpu();
            pause(Duration::from_millis(300));
            pair.proxy.cpu() - before
        };
        // They wait in the kernel, while those before them take all the room.
        let sent = files(most);
        for (from, _) in &others {
            assert_eq!(pass(from, b"y", &sent), Ok(1));
            // The end behind it must not wake the proxy again and again.
            from.shutdown(std::net::Shutdown::Write).unwrap();
        }
        let while_waiting = used();
        for _ in 0..messages {
            assert_eq!(receive_passed(&first_served, 1).unwrap().1.len(), most);
        }
        for (_, to) in &others {
            assert_eq!(inodes(&receive_passed(to, 1).unwrap().1), inodes(&sent));
        }
        let when_idle = used();
        let most = while_waiting.max(when_idle);
        assert!(most < Duration::from_millis(60), "{while_waiting:?}, then {when_idle:?}");
        assert_eq!(pair.proxy.lines.count("resetting"), 0);
    }
}

#[test]
fn a_receiver_that_takes_no_descriptors_ends_the_connection() {
    let pair = Pair::start(|launch| launch);
    for is_swapped in [false, true] {
        let (from, to) = pair.connect(is_swapped);
        if refuse_descriptors(&to).is_err() {
            return skip("a receiver that takes no descriptors", "Linux 6.16");
        }
        assert_eq!(pass(&from, b"x", &files(1)), Ok(1));
        assert!(ends(&to) && ends(&from));
    }
    pair.proxy.lines.wait_for("resetting the connection: the receiver takes none");
}

#[test]
fn a_message_with_too_many_descriptors_ends_its_connection() {
    let pair = Pair::start(|launch| launch.descriptors(64));
    let (other, other_served) = pair.connect(false);
    let idle = pair.proxy.descriptors() - 2;
    for is_swapped in [false, true] {
        let (from, to) = pair.connect(is_swapped);
        pass(&from, b"x", &files(17)).unwrap();
        assert!(ends(&to) && ends(&from));
    }
    pair.proxy
        .lines
        .wait_for("of the client, resetting the connection: there are more of them in a");
    pair.proxy
        .lines
        .wait_for("of the backend, resetting the connection: there are more of them in a");
    assert_eq!(pair.proxy.lines.count("resetting"), 2);
    pass(&other, b"x", &files(16)).unwrap();
    assert_eq!(receive_passed(&other_served, 10).unwrap().1.len(), 16);
    drop((other, other_served));
    pair.wait_for_descriptors(idle);
}

#[test]
fn a_full_table_of_descriptors_ends_the_connection() {
    let pair = Pair::start(|launch| launch.descriptors(64));
    let (client, served) = pair.connect(false);
    let open = pair.proxy.descriptors();
    let limit = Rlimit { current: Some(open as u64 + 4), maximum: Some(64) };
    let pid = Pid::from_raw(pair.proxy.pid() as i32);
    prlimit(pid, Resource::Nofile, limit).unwrap();
    pass(&client, b"x", &files(8)).unwrap();
    assert!(ends(&served) && ends(&client));
    let line = pair.proxy.lines.wait_for("resetting the connection");
    assert!(line.contains("Too many open files"), "{line}");
    pair.wait_for_descriptors(open - 2);
}

#[test]
fn a_slow_receiver_holds_up_no_other() {
    let pair = Pair::start(|launch| launch.descriptors(64));
    let stalled: Vec<_> = (0..6).map(|number| pair.connect(number % 2 == 0)).collect();
    for (from, _) in &stalled {
        from.set_nonblocking(true).unwrap();
        let is_full =
            || (0..100).any(|_| pass(from, &[1; 20_000], &files(4)).is_err()).then_some(());
        poll_until(Instant::now() + TIMEOUT, is_full).expect("it is stalled");
    }
    let (client, served) = pair.connect(false);
    for _ in 0..50 {
        let sent = files(16);
        pass(&client, b"x", &sent).unwrap();
        assert_eq!(inodes(&receive_passed(&served, 10).unwrap().1), inodes(&sent));
    }
    for (_, to) in &stalled {
        assert_eq!(receive_passed(to, 1000).unwrap().1.len(), 4);
    }
}

#[test]
fn descriptors_wait_for_a_receiver_and_nothing_overtakes_them() {
    let pair = Pair::start(|launch| launch);
    let (from, to) = pair.connect(false);
    from.set_nonblocking(true).unwrap();
    let (mut sent, mut count) = (Vec::new(), 0);
    let is_full = || match pass(&from, &random_bytes(count, 9000), &files(1)) {
        Ok(bytes) => {
            sent.extend(random_bytes(count, 9000).drain(..bytes));
            count += 1;
            None
        }
        Err(_) => Some(()),
    };
    poll_until(Instant::now() + TIMEOUT, is_full).expect("it is stalled");
    from.shutdown(std::net::Shutdown::Write).unwrap();
    let (bytes, got) = receive_random(&to, 1);
    assert!(bytes == sent);
    assert_eq!(got.len() as u64, count);
}

#[test]
fn to_other_sockets_descriptors_are_closed_and_counted() {
    let (front, backend) = (Endpoint::new(Family::Unix), Endpoint::new(Family::Tcp));
    let proxy = Launch::new(OURS).arg(&backend.target).listener(&front);
    let proxy = proxy.arg("--metrics=127.0.0.1:0").start();
    let client = front.connect();
    let served = backend.accept();
    let open = proxy.descriptors();
    for _ in 0..3 {
        pass(&client, b"bytes", &files(100)).unwrap();
        let mut bytes = [0; 5];
        std::io::Read::read_exact(&mut (&served), &mut bytes).unwrap();
        assert_eq!(&bytes, b"bytes");
    }
    wait_for_descriptors(&proxy, open);
    proxy
        .lines
        .wait_for("A Unix peer has passed descriptors, and the other side is not a Unix socket");
    assert_eq!(proxy.lines.count("has passed descriptors"), 1);
    let metrics = scrape(metrics_address(&proxy));
    assert!(metrics.contains("\nsocket_proxyd_descriptors_dropped_total 3\n"), "{metrics}");
}

#[test]
fn credentials_are_not_passed_on_and_leave_nothing_open() {
    let front = Endpoint::new(Family::Unix);
    add_credentials(&front.socket);
    // The kernel gives a client that is queued at the start its options earlier.
    let queued = front.connect();
    let pair = Pair::behind(front, |launch| launch);
    let connections = [(queued, pair.backend.accept()), pair.connect(false)];
    let open = pair.proxy.descriptors();
    for (client, served) in &connections {
        for _ in 0..3 {
            let sent = files(2);
            pass(client, b"x", &sent).unwrap();
            assert_eq!(inodes(&receive_passed(served, 10).unwrap().1), inodes(&sent));
            pass(client, b"y", &[]).unwrap();
            assert_eq!(receive_passed(served, 10).unwrap().0, b"y");
        }
    }
    pair.wait_for_descriptors(open);
}

/// Returns a socket whose last close takes a minute, since its peer does not read.
fn lingering(listener: &Endpoint) -> OwnedFd {
    let socket = listener.connect();
    socket.set_linger(Some(Duration::from_secs(60))).unwrap();
    socket.set_nonblocking(true).unwrap();
    while socket.send(&[0; 65_536]).is_ok() {}
    socket.into()
}

/// Has the proxy close sockets that linger.
fn hold_the_closer(pair: &Pair) -> Endpoint {
    let (client, served) = pair.connect(false);
    let listener = Endpoint::new(Family::Tcp);
    let lingering: Vec<_> = (0..17).map(|_| lingering(&listener)).collect();
    pair.proxy.suspend();
    pass(&client, b"x", &lingering).unwrap();
    // From now on only the message has them.
    drop(lingering);
    pair.proxy.signal(Signal::CONT);
    pair.proxy.lines.wait_for("resetting the connection: there are more of them in a message");
    assert!(ends(&client) && ends(&served));
    listener
}

#[test]
fn a_close_that_takes_long_delays_no_other_client() {
    let pair = Pair::start(|launch| launch.descriptors(64));
    let (other, other_served) = pair.connect(false);
    let _listener = hold_the_closer(&pair);
    for _ in 0..3 {
        assert_eq!(pass(&other, b"plain", &[]), Ok(5));
        assert_eq!(receive_passed(&other_served, 10).unwrap().0, b"plain");
    }
}

#[test]
fn a_close_on_the_way_to_another_socket_delays_no_other_client() {
    let (front, backend) = (Endpoint::new(Family::Unix), Endpoint::new(Family::Tcp));
    let proxy = Launch::new(OURS).arg(&backend.target).listener(&front).start();
    let (mut other, mut other_served) = (front.connect(), backend.accept());
    let (client, mut served) = (front.connect(), backend.accept());
    let listener = Endpoint::new(Family::Tcp);
    let lingering = lingering(&listener);
    proxy.suspend();
    pass(&client, b"x", &[lingering]).unwrap();
    proxy.signal(Signal::CONT);
    std::io::Read::read_exact(&mut served, &mut [0]).unwrap();
    for _ in 0..3 {
        assert_forwards(&mut other, &mut other_served);
    }
}

#[test]
fn an_unread_message_delays_no_other_client() {
    let pair = Pair::start(|launch| launch);
    let (mut other, mut other_served) = pair.connect(false);
    let (client, served) = pair.connect(false);
    let listener = Endpoint::new(Family::Tcp);
    // Until the proxy takes no more.
    while unsent(&client) == 0 {
        client.send(&[0; 4096]).unwrap();
        let is_asleep = || pair.proxy.is_asleep().then_some(());
        poll_until(Instant::now() + TIMEOUT, is_asleep).expect("the proxy waits");
    }
    pass(&client, b"x", &[lingering(&listener)]).unwrap();
    drop(served);
    for _ in 0..3 {
        assert_forwards(&mut other, &mut other_served);
    }
}

#[test]
fn a_connection_that_waits_for_room_ends_with_its_peers() {
    let pair = Pair::start(|launch| launch.descriptors(64));
    let _listener = hold_the_closer(&pair);
    let (client, served) = pair.connect(false);
    let open = pair.proxy.descriptors();
    assert_eq!(pass(&client, b"x", &files(1)), Ok(1));
    drop((client, served));
    // The client's socket, with its message, waits to be closed.
    pair.wait_for_descriptors(open - 1);
}
