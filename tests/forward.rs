//! The forwarder on real sockets: every pair of families, and each test with the ends swapped.

mod support;

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::process::ExitCode;
use std::rc::Rc;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use socket_proxyd::testing::{
    self as proxy, CloseReason, Forwarder, Gauge, LoopBuffers, PassedLimits, PassedRoom,
    PipeLimits, Summary,
};
use socket2::Socket;
use support::*;
use tokio::time::Instant;

fn main() -> ExitCode {
    let mut trials = Trials::default();
    register_bytes(&mut trials);
    register_ends(&mut trials);
    register_urgent_data(&mut trials);
    trials.run()
}

fn register_bytes(t: &mut Trials) {
    everywhere(t, "forwards single bytes", single_bytes);
    for (near, far) in PAIRS {
        t.add(
            format!("forwards hundreds of megabytes each way at once, {near} to {far}"),
            move || hundreds_of_megabytes(near, far),
        );
        t.add(format!("copies without pipes, {near} to {far}"), move || {
            copies_without_pipes(near, far)
        });
    }
    for far in [Family::Tcp, Family::Unix] {
        t.add(format!("copies to a sink with little room, to {far}"), move || small_sink(far));
        t.add(format!("sends the preface first and in one write, to {far}"), move || {
            preface_first(far)
        });
    }
    t.add("a stalled TCP sink holds little unsent", stalled_sink);
    t.add("a stalled TCP sink of small pieces holds little unsent", stalled_sink_of_small_pieces);
    everywhere(t, "a stalled reader stalls its own direction only", stalled_reader);
    let name = "forwards the bytes of messages with descriptors";
    from_family(t, name, Family::Unix, messages_with_descriptors);
}

fn register_ends(t: &mut Trials) {
    everywhere(t, "a half-close leaves the other direction open", half_close);
    everywhere(t, "forwards a reset before any byte", reset_before_any_byte);
    everywhere(t, "delivers unread bytes before a reset", reset_after_unread_bytes);
    // A Unix sender whose bytes don't fit can't say that they were taken.
    let name = "forwards a reset while the reader is stalled";
    from_family(t, name, Family::Tcp, reset_to_stalled_reader);
    everywhere(t, "notices a reset after the sender's half-close", reset_after_own_half_close);
    everywhere(t, "forwards a reset after the reader's half-close", reset_after_peer_half_close);
    everywhere(t, "a close with bytes unread is a reset after a half-close", close_with_unread);
    let name = "a close with all bytes read is an end after a half-close";
    from_family(t, name, Family::Unix, close_with_all_read);
    everywhere(t, "delivers an answer before a close with the upload unread", early_answer);
    from_family(t, "a failed write lets the other direction drain", Family::Unix, failed_write);
    t.add("a reset that a write has met is not a clean end", reset_met_by_a_write);
    from_family(t, "ends after a Unix client has closed", Family::Unix, closed_unix_client);
    for far in [Family::Tcp, Family::Unix] {
        t.add(
            format!("waits a limited time for a stalled reader after a reset, to {far}"),
            move || linger_after_reset(far),
        );
    }
    t.add(
        "notices a reset while its bytes wait and the other direction has ended",
        reset_behind_waiting_bytes,
    );
    for near in [Family::Tcp, Family::Unix] {
        let name = "notices a reset while bytes wait in both directions";
        from_family(t, name, near, move |far, swapped| reset_of_stalled_peer(near, far, swapped));
    }
}

fn register_urgent_data(t: &mut Trials) {
    let name = "forwards what is behind urgent data, bytes";
    from_family(t, name, Family::Tcp, |far, swapped| urgent_data(far, false, swapped));
    for swapped in [false, true] {
        let ends = ends(Family::Tcp, Family::Tcp, swapped);
        t.add(format!("forwards what is behind urgent data, bulk, {ends}"), move || {
            urgent_data(Family::Tcp, true, swapped)
        });
    }
    t.add("forwards urgent data that comes first", urgent_data_first);
    from_family(t, "delivers urgent data before a reset", Family::Tcp, urgent_data_before_reset);
}

/// A pair of sockets with the forwarder in between: what `near` sends, `far` receives.
struct Forwarding {
    near: Socket,
    far: Socket,
    families: (Family, Family),
    forwarder: JoinHandle<Outcome>,
}

struct Outcome {
    closed: Summary,
    pipes: usize,
}

impl Forwarding {
    fn new(near: Family, far: Family, swapped: bool) -> Self {
        Self::with(near, far, swapped, 8, Vec::new())
    }

    /// When `swapped`, `near` is the backend.
    fn with(near: Family, far: Family, swapped: bool, pipes_max: usize, preface: Vec<u8>) -> Self {
        let pairs = [socket_pair(near), socket_pair(far)];
        Self::join((near, far), pairs, swapped, pipes_max, preface)
    }

    fn join(
        families: (Family, Family),
        pairs: [(Socket, Socket); 2],
        swapped: bool,
        pipes_max: usize,
        preface: Vec<u8>,
    ) -> Self {
        let limits = PipeLimits { max: pipes_max, held: 16 };
        Self::join_within(families, pairs, swapped, limits, preface)
    }

    fn limited(
        families: (Family, Family),
        pairs: [(Socket, Socket); 2],
        limits: PipeLimits,
    ) -> Self {
        Self::join_within(families, pairs, false, limits, Vec::new())
    }

    fn join_within(
        (near, far): (Family, Family),
        pairs: [(Socket, Socket); 2],
        swapped: bool,
        limits: PipeLimits,
        preface: Vec<u8>,
    ) -> Self {
        let [(near_outer, near_inner), (far_outer, far_inner)] = pairs;
        let ours = |socket: Socket, family| {
            socket.set_nonblocking(true).unwrap();
            // As the listener and the connector set it.
            socket.set_out_of_band_inline(true).unwrap();
            let family = match family {
                Family::Tcp => proxy::Family::Tcp,
                Family::Unix => proxy::Family::Unix,
            };
            proxy::Socket::register(socket.into(), family).unwrap()
        };
        let forwarder = thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .start_paused(limits.max == PAUSED)
                .build_local(Default::default())
                .unwrap();
            runtime.block_on(async {
                let carried = Arc::<proxy::ByteCounters>::default();
                let pipes = Gauge::default();
                let passed = PassedRoom::new(PassedLimits { message: 16, all: 64, threads: 1 });
                let shared = Rc::new(LoopBuffers::new(limits, pipes.clone(), passed));
                let (near, far) = (ours(near_inner, near), ours(far_inner, far));
                let (client, backend) = if swapped { (far, near) } else { (near, far) };
                let preface_len = preface.len() as u64;
                let (ours, count) = (Rc::clone(&shared), Arc::clone(&carried));
                let pair = Forwarder::new(client, backend, preface, ours, count, None, None);
                let proxy::Outcome::Closed(closed) = pair.run(|_| {}).await.unwrap() else {
                    unreachable!("no detach is requested")
                };
                let delivered = [preface_len + closed.from_client, closed.from_backend];
                assert_eq!(carried.get(), delivered);
                Outcome { closed, pipes: pipes.taken() }
            })
        });
        Self { near: near_outer, far: far_outer, families: (near, far), forwarder }
    }

    /// Sends 20 MB from `near` to `far`, and ends both directions.
    fn carry_one_way(mut self) -> Outcome {
        let message = random_bytes(3, 20_000_000);
        thread::scope(|scope| {
            scope.spawn(|| {
                (&self.near).write_all(&message).unwrap();
                self.near.shutdown(Shutdown::Write).unwrap();
            });
            assert!(read_all(&mut self.far).0 == message);
        });
        self.far.shutdown(Shutdown::Write).unwrap();
        self.forwarder.join().unwrap()
    }

    /// Waits until the forwarder has taken everything that `near` sent.
    fn wait_until_read(&self) {
        wait_until_read(&self.near);
    }
}

/// A number of pipes that also stops tokio's clock, which then jumps to the next timer whenever
/// nothing else happens.
const PAUSED: usize = 3;

fn wait_until_read(socket: &Socket) {
    let deadline = Instant::now() + TIMEOUT;
    let empty = || (unsent(socket) == 0).then_some(());
    poll_until(deadline, empty).expect("the forwarder takes what was sent");
}

/// Adds a trial for every pair of families, each end being the client once.
fn everywhere(trials: &mut Trials, name: &str, test: fn(Forwarding)) {
    for (near, far) in PAIRS {
        for swapped in [false, true] {
            let ends = ends(near, far, swapped);
            trials
                .add(format!("{name}, {ends}"), move || test(Forwarding::new(near, far, swapped)));
        }
    }
}

/// Adds a trial for pairs with one family at the near end.
fn from_family(
    trials: &mut Trials,
    name: &str,
    near: Family,
    test: impl Fn(Family, bool) + Copy + Send + 'static,
) {
    for far in [Family::Tcp, Family::Unix] {
        for swapped in [false, true] {
            let ends = ends(near, far, swapped);
            trials.add(format!("{name}, {ends}"), move || test(far, swapped));
        }
    }
}

fn ends(near: Family, far: Family, swapped: bool) -> String {
    let [first, second] = if swapped { ["backend", "client"] } else { ["client", "backend"] };
    format!("{near} {first} to {far} {second}")
}

fn delivered(outcome: &Outcome) -> u64 {
    outcome.closed.from_client + outcome.closed.from_backend
}

fn single_bytes(mut pair: Forwarding) {
    let message = random_bytes(1, 3000);
    let expected = message.clone();
    let mut near = pair.near.try_clone().unwrap();
    let writer = thread::spawn(move || {
        message.iter().for_each(|byte| near.write_all(&[*byte]).unwrap());
        near.shutdown(Shutdown::Write).unwrap();
    });
    let (received, end) = read_all(&mut pair.far);
    end.unwrap();
    assert!(received == expected);
    writer.join().unwrap();
    drop((pair.near, pair.far));
    let outcome = pair.forwarder.join().unwrap();
    assert_eq!((delivered(&outcome), outcome.pipes), (3000, 0), "no pipe for single bytes");
}

fn hundreds_of_megabytes(near: Family, far: Family) {
    const PIECE: usize = 1 << 20;
    let piece = random_bytes(2, PIECE);
    let rounds = 128;

    let pair = Forwarding::new(near, far, false);
    thread::scope(|scope| {
        for socket in [&pair.near, &pair.far] {
            let (mut writer, mut reader) =
                (socket.try_clone().unwrap(), socket.try_clone().unwrap());
            let piece = &piece;
            scope.spawn(move || {
                (0..rounds).for_each(|_| writer.write_all(piece).unwrap());
                writer.shutdown(Shutdown::Write).unwrap();
            });
            scope.spawn(move || {
                let mut buffer = vec![0; PIECE];
                for _ in 0..rounds {
                    reader.read_exact(&mut buffer).unwrap();
                    assert!(buffer == *piece);
                }
                assert_eq!(reader.read(&mut buffer).unwrap(), 0);
            });
        }
    });
    let outcome = pair.forwarder.join().unwrap();
    assert_eq!(delivered(&outcome), 2 * (rounds * PIECE) as u64);
    // From a Unix socket only until it is known to be bulk, and not at all to another.
    let are_unix = [near, far] == [Family::Unix; 2];
    assert_eq!(outcome.pipes > 0, !are_unix, "that much is spliced");
}

fn copies_without_pipes(near: Family, far: Family) {
    let pair = Forwarding::with(near, far, false, 0, Vec::new());
    assert_eq!(pair.carry_one_way().pipes, 0);
}

/// As with a send buffer that the kernel has cut to a page, short of memory for TCP, while pipes are
/// held for other directions: no pipe is taken for what a page has room for.
fn small_sink(far: Family) {
    let pairs = [socket_pair(Family::Tcp), socket_pair(far)];
    pairs[1].1.set_send_buffer_size(4608).unwrap();
    let pair = Forwarding::limited((Family::Tcp, far), pairs, PipeLimits { max: 8, held: 0 });
    assert_eq!(pair.carry_one_way().pipes, 0, "a pipe was made for {far:?}");
}

/// Hundreds of stalled receivers must not use up the kernel's memory for TCP. Each holds what its window
/// takes, and less than a megabyte behind that.
fn stalled_sink() {
    let pairs = [socket_pair(Family::Tcp), socket_pair(Family::Tcp)];
    let sink = pairs[1].1.try_clone().unwrap();
    let mut pair = Forwarding::join((Family::Tcp, Family::Tcp), pairs, false, 8, Vec::new());
    pair.near.set_write_timeout(Some(Duration::from_millis(300))).unwrap();
    let chunk = random_bytes(4, 100_000);
    while pair.near.write(&chunk).is_ok() {}
    let held = unsent(&sink);
    assert!((100_000..2_000_000).contains(&held), "{held} bytes are held");
}

/// A direction that never fills the copy buffer.
fn stalled_sink_of_small_pieces() {
    let pairs = [socket_pair(Family::Unix), socket_pair(Family::Tcp)];
    let sink = pairs[1].1.try_clone().unwrap();
    let pair = Forwarding::join((Family::Unix, Family::Tcp), pairs, false, 8, Vec::new());
    let piece = random_bytes(4, 16 * 1024);
    // Each piece is taken by itself, for as long as the sink has room.
    let is_taken = || {
        let deadline = Instant::now() + Duration::from_millis(300);
        poll_until(deadline, || (unsent(&pair.near) == 0).then_some(())).is_some()
    };
    for _ in 0..200 {
        (&pair.near).write_all(&piece).unwrap();
        if !is_taken() {
            break;
        }
    }
    let held = unsent(&sink);
    assert!((100_000..2_000_000).contains(&held), "{held} bytes are held");
}

fn stalled_reader(mut pair: Forwarding) {
    pair.near.set_write_timeout(Some(Duration::from_millis(300))).unwrap();
    let chunk = random_bytes(4, 100_000);
    let mut sent = Vec::new();
    loop {
        match pair.near.write(&chunk) {
            Ok(bytes) => sent.extend(&chunk[..bytes]),
            Err(error) if error.kind() == ErrorKind::WouldBlock => break,
            Err(error) => panic!("{error}"),
        }
        assert!(sent.len() < 100_000_000, "nothing holds the sender back");
    }
    // Far does not read, and its own bytes arrive.
    for _ in 0..100 {
        pair.far.write_all(b"the other way").unwrap();
        let mut heard = [0; 13];
        pair.near.read_exact(&mut heard).unwrap();
        assert_eq!(&heard, b"the other way");
    }
    pair.near.shutdown(Shutdown::Write).unwrap();
    let (received, end) = read_all(&mut pair.far);
    end.unwrap();
    assert!(received == sent, "{} of {}", received.len(), sent.len());
    drop(pair.far);
    pair.forwarder.join().unwrap();
}

fn half_close(mut pair: Forwarding) {
    pair.near.write_all(b"that was all").unwrap();
    pair.near.shutdown(Shutdown::Write).unwrap();
    let (received, end) = read_all(&mut pair.far);
    end.unwrap();
    assert_eq!(received, b"that was all");
    for round in 0..20 {
        let answer = random_bytes(round, 50_000);
        pair.far.write_all(&answer).unwrap();
        let mut received = vec![0; answer.len()];
        pair.near.read_exact(&mut received).unwrap();
        assert!(received == answer);
    }
    pair.far.shutdown(Shutdown::Write).unwrap();
    let (received, end) = read_all(&mut pair.near);
    end.unwrap();
    assert!(received.is_empty());
    let outcome = pair.forwarder.join().unwrap();
    assert!(outcome.closed.reason == CloseReason::Closed);
}

/// On TCP a reset; on Unix the nearest thing: a close with something unread.
fn abort(pair: &mut Forwarding) {
    if pair.families.0 == Family::Tcp {
        pair.near.set_linger(Some(Duration::ZERO)).unwrap();
    } else {
        pair.far.write_all(b"never read").unwrap();
        wait_until_read(&pair.far);
        // Taken by the forwarder; now they have to be in near's queue.
        peek_all(&pair.near, 10);
    }
}

/// Waits until so many bytes are there, and leaves them.
fn peek_all(socket: &Socket, bytes: usize) {
    let mut buffer = vec![std::mem::MaybeUninit::new(0); bytes];
    let there = || (socket.peek(&mut buffer).unwrap() == bytes).then_some(());
    poll_until(Instant::now() + TIMEOUT, there).expect("the bytes come");
}

/// Reads all that was sent before a reset, then the reset where the family has one.
fn ends_in_reset(socket: &mut Socket, family: Family, expected: &[u8]) {
    let (received, end) = read_all(socket);
    assert!(received == expected, "{} of {} bytes", received.len(), expected.len());
    assert!(family == Family::Unix || is_reset(&end), "a clean end: {end:?}");
}

fn reset_before_any_byte(mut pair: Forwarding) {
    abort(&mut pair);
    drop(pair.near);
    ends_in_reset(&mut pair.far, pair.families.1, b"");
    assert!(matches!(pair.forwarder.join().unwrap().closed.reason, CloseReason::Fault(..)));
}

fn reset_after_unread_bytes(mut pair: Forwarding) {
    // More than a buffer, less than the kernel's queues hold.
    let message = random_bytes(5, 100_000);
    pair.near.write_all(&message).unwrap();
    pair.wait_until_read();
    abort(&mut pair);
    drop(pair.near);
    ends_in_reset(&mut pair.far, pair.families.1, &message);
    pair.forwarder.join().unwrap();
}

fn reset_to_stalled_reader(far: Family, swapped: bool) {
    let mut pair = Forwarding::new(Family::Tcp, far, swapped);
    pair.near.set_write_timeout(Some(Duration::from_millis(300))).unwrap();
    let mut sent = Vec::new();
    let chunk = random_bytes(6, 100_000);
    while let Ok(bytes) = pair.near.write(&chunk) {
        sent.extend(&chunk[..bytes]);
    }
    // What the forwarder's kernel has acknowledged is the sender's no more; the rest of the
    // sender's queue goes with the reset.
    abort(&mut pair);
    drop(pair.near);
    let (received, end) = read_all(&mut pair.far);
    assert!(received.len() > 200_000 && sent.starts_with(&received));
    assert!(far == Family::Unix || is_reset(&end), "a clean end: {end:?}");
    pair.forwarder.join().unwrap();
}

fn reset_after_own_half_close(mut pair: Forwarding) {
    pair.near.write_all(b"question").unwrap();
    pair.near.shutdown(Shutdown::Write).unwrap();
    let (received, end) = read_all(&mut pair.far);
    end.unwrap();
    assert_eq!(received, b"question");
    // The forwarder no longer reads from near, and far is silent.
    abort(&mut pair);
    drop(pair.near);
    pair.forwarder.join().unwrap();
    // Far's next write fails.
    let deadline = Instant::now() + TIMEOUT;
    let failed = || pair.far.write_all(b"answer").err();
    poll_until(deadline, failed).expect("far gets an error");
}

fn reset_after_peer_half_close(mut pair: Forwarding) {
    pair.far.shutdown(Shutdown::Write).unwrap();
    assert!(read_all(&mut pair.near).0.is_empty());
    let message = random_bytes(7, 100_000);
    pair.near.write_all(&message).unwrap();
    pair.wait_until_read();
    if pair.families.0 == Family::Tcp {
        reset(pair.near);
        ends_in_reset(&mut pair.far, pair.families.1, &message);
    } else {
        drop(pair.near);
        assert!(read_all(&mut pair.far).0 == message);
    }
    pair.forwarder.join().unwrap();
}

fn close_with_unread(mut pair: Forwarding) {
    pair.near.shutdown(Shutdown::Write).unwrap();
    assert!(read_all(&mut pair.far).0.is_empty());
    pair.far.write_all(b"never read").unwrap();
    peek_all(&pair.near, 10);
    // The forwarder no longer reads from it.
    drop(pair.near);
    let reason = pair.forwarder.join().unwrap().closed.reason;
    assert!(matches!(reason, CloseReason::Fault(..)), "{reason:?}");
    if pair.families.1 == Family::Tcp {
        let is_reset = || pair.far.take_error().unwrap();
        poll_until(Instant::now() + TIMEOUT, is_reset).expect("far is reset");
    }
}

fn close_with_all_read(far: Family, swapped: bool) {
    let mut pair = Forwarding::new(Family::Unix, far, swapped);
    pair.near.shutdown(Shutdown::Write).unwrap();
    assert!(read_all(&mut pair.far).0.is_empty());
    pair.far.write_all(b"answer").unwrap();
    pair.near.read_exact(&mut [0; 6]).unwrap();
    drop(pair.near);
    let reason = pair.forwarder.join().unwrap().closed.reason;
    assert!(reason == CloseReason::Closed, "{reason:?}");
    // A Unix socket would not show a reset.
    assert!(pair.far.take_error().unwrap().is_none(), "far is reset");
}

fn early_answer(mut pair: Forwarding) {
    let answer = random_bytes(8, 60_000);
    let mut uploader = pair.far.try_clone().unwrap();
    let upload = thread::spawn(move || while uploader.write_all(&[b'u'; 10_000]).is_ok() {});
    pair.near.read_exact(&mut [0; 10_000]).unwrap();
    pair.near.write_all(&answer).unwrap();
    drop(pair.near);
    let (received, _) = read_all(&mut pair.far);
    assert!(received == answer, "{} bytes", received.len());
    upload.join().unwrap();
    drop(pair.far);
    pair.forwarder.join().unwrap();
}

fn failed_write(far: Family, swapped: bool) {
    // Only a Unix peer can stop reading without stopping to speak.

    let mut pair = Forwarding::new(Family::Unix, far, swapped);
    pair.near.shutdown(Shutdown::Read).unwrap();
    pair.far.write_all(b"to deaf ears").unwrap();
    wait_until_read(&pair.far);
    for round in 0..20 {
        let answer = random_bytes(round, 50_000);
        pair.near.write_all(&answer).unwrap();
        let mut received = vec![0; answer.len()];
        pair.far.read_exact(&mut received).unwrap();
        assert!(received == answer);
    }
    drop(pair.near);
    // Near's own end was clean, and comes before the reset for the lost bytes.
    let (received, end) = read_all(&mut pair.far);
    end.unwrap();
    assert!(received.is_empty());
    assert!(matches!(pair.forwarder.join().unwrap().closed.reason, CloseReason::Fault(..)));
}

fn reset_met_by_a_write() {
    // The kernel reports a reset once. Here the forwarder's write meets it before its read does,
    // which then looks as if it came to a FIN.
    let pairs = [socket_pair(Family::Tcp), socket_pair(Family::Tcp)];
    let (backend, client) = (pairs[0].0.try_clone().unwrap(), pairs[1].0.try_clone().unwrap());
    (&client).write_all(b"more of the upload").unwrap();
    (&backend).write_all(b"half of the answer").unwrap();
    wait_until_read(&client);
    wait_until_read(&backend);
    backend.set_linger(Some(Duration::ZERO)).unwrap();
    let [(backend_outer, inner), client_pair] = pairs;
    drop((backend, backend_outer));
    let stand_in = socket_pair(Family::Tcp).0;
    let pairs = [(stand_in, inner), client_pair];
    let mut pair = Forwarding::join((Family::Tcp, Family::Tcp), pairs, true, 8, Vec::new());
    ends_in_reset(&mut pair.far, Family::Tcp, b"half of the answer");
    pair.forwarder.join().unwrap();
}

fn closed_unix_client(far: Family, swapped: bool) {
    let mut pair = Forwarding::new(Family::Unix, far, swapped);
    pair.near.write_all(b"for your information").unwrap();
    drop(pair.near);
    let (received, end) = read_all(&mut pair.far);
    end.unwrap();
    assert_eq!(received, b"for your information");
    // Far says nothing and closes nothing.
    let outcome = pair.forwarder.join().unwrap();
    assert!(outcome.closed.reason == CloseReason::Closed);
}

fn linger_after_reset(far: Family) {
    let mut pair = Forwarding::with(Family::Tcp, far, false, PAUSED, Vec::new());
    pair.near.set_write_timeout(Some(Duration::from_millis(300))).unwrap();
    while pair.near.write(&[0; 100_000]).is_ok() {}
    reset(pair.near);
    // Far never reads; the clock is stopped and jumps, so this does not take LINGER.
    pair.forwarder.join().unwrap();
}

fn urgent_data(far: Family, bulky: bool, swapped: bool) {
    // A receive ends early in front of it, and splice never gets past it. All of it is queued
    // before the forwarder starts, so that no further edge helps. Linux 6.1 has a first window of 64 KiB.
    let pairs = [socket_pair(Family::Tcp), socket_pair(far)];
    let mut near = pairs[0].0.try_clone().unwrap();
    let before = random_bytes(10, if bulky { 50_000 } else { 5 });
    near.write_all(&before).unwrap();
    near.send_out_of_band(b"!").unwrap();
    near.write_all(b"world").unwrap();
    wait_until_read(&near);
    let mut pair = Forwarding::join((Family::Tcp, far), pairs, swapped, 8, Vec::new());
    let mut received = vec![0; before.len() + 6];
    pair.far.read_exact(&mut received).expect("what is behind the urgent byte comes, too");
    assert!(received.starts_with(&before) && received.ends_with(b"!world"));
    // And what comes later, spliced until then, with a FIN behind it.
    let more = random_bytes(11, 150_000);
    near.write_all(&more).unwrap();
    near.send_out_of_band(b"?").unwrap();
    near.write_all(b"end").unwrap();
    near.shutdown(Shutdown::Write).unwrap();
    let (received, end) = read_all(&mut pair.far);
    end.unwrap();
    assert!(received.starts_with(&more) && received.ends_with(b"?end"), "bytes are lost");
    drop((near, pair.near, pair.far));
    pair.forwarder.join().unwrap();
}

fn urgent_data_first() {
    let pairs = [socket_pair(Family::Tcp), socket_pair(Family::Tcp)];
    let near = pairs[0].0.try_clone().unwrap();
    near.send_out_of_band(b"!").unwrap();
    (&near).write_all(b"world").unwrap();
    wait_until_read(&near);
    let mut pair = Forwarding::join((Family::Tcp, Family::Tcp), pairs, false, 8, Vec::new());
    let mut received = [0; 6];
    pair.far.read_exact(&mut received).unwrap();
    assert_eq!(&received, b"!world");
    drop((near, pair.near, pair.far));
    pair.forwarder.join().unwrap();
}

/// The forwarder splices when it reaches the urgent data, which splice(2) does not pass.
fn urgent_data_before_reset(far: Family, swapped: bool) {
    let pairs = [socket_pair(Family::Tcp), socket_pair(far)];
    let mut near = pairs[0].0.try_clone().unwrap();
    let message = random_bytes(7, 40_000);
    near.write_all(&message).unwrap();
    near.send_out_of_band(b"!").unwrap();
    wait_until_read(&near);
    reset(near);
    let [(near, near_inner), far_pair] = pairs;
    drop(near);
    // The socket of this side is reset.
    let pairs = [(socket_pair(Family::Unix).0, near_inner), far_pair];
    let mut pair = Forwarding::join((Family::Tcp, far), pairs, swapped, 8, Vec::new());
    let (received, end) = read_all(&mut pair.far);
    assert!(received == [&message[..], b"!"].concat(), "{} bytes", received.len());
    assert!(is_reset(&end) || far == Family::Unix, "{end:?}");
    let summary = pair.forwarder.join().unwrap().closed;
    assert!(matches!(summary.reason, CloseReason::Fault(..)), "{summary:?}");
}

fn reset_behind_waiting_bytes() {
    let mut pair = Forwarding::with(Family::Tcp, Family::Tcp, false, PAUSED, Vec::new());
    pair.far.shutdown(Shutdown::Write).unwrap();
    assert!(read_all(&mut pair.near).0.is_empty());
    pair.near.set_write_timeout(Some(Duration::from_millis(300))).unwrap();
    while pair.near.write(&[0; 100_000]).is_ok() {}
    reset(pair.near);
    // Far never reads; the clock is stopped and jumps.
    pair.forwarder.join().unwrap();
}

fn reset_of_stalled_peer(near: Family, far: Family, swapped: bool) {
    let mut pair = Forwarding::with(near, far, swapped, PAUSED, Vec::new());
    for socket in [&mut pair.near, &mut pair.far] {
        socket.set_write_timeout(Some(Duration::from_millis(300))).unwrap();
        while socket.write(&[0; 100_000]).is_ok() {}
    }
    assert!(unsent(&pair.near) > 0 && unsent(&pair.far) > 0);
    // The forwarder's write meets it: nothing reads from near.
    reset(pair.near);
    let is_over = || pair.forwarder.is_finished().then_some(());
    poll_until(Instant::now() + TIMEOUT, is_over).expect("the reset is noticed");
    let reason = pair.forwarder.join().unwrap().closed.reason;
    assert!(matches!(reason, CloseReason::Fault(..)), "{reason:?}");
}

fn preface_first(back: Family) {
    let preface = b"PROXY UNKNOWN\r\n".to_vec();
    let mut pair = Forwarding::with(Family::Unix, back, false, 8, preface.clone());
    peek_all(&pair.far, preface.len());
    pair.near.write_all(b"hello").unwrap();
    pair.near.shutdown(Shutdown::Write).unwrap();
    assert_eq!(read_all(&mut pair.far).0, b"PROXY UNKNOWN\r\nhello");
    drop(pair.far);
    pair.forwarder.join().unwrap();
}

fn messages_with_descriptors(far: Family, swapped: bool) {
    // A receive ends early at a message with descriptors: what is behind it must not wait for an
    // edge that never comes.

    let mut pair = Forwarding::new(Family::Unix, far, swapped);
    for round in 0..50 {
        let fds = [pair.near.as_fd()];
        let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        assert!(ancillary.push(SendAncillaryMessage::ScmRights(&fds)));
        let bytes = std::io::IoSlice::new(b"with");
        let flags = SendFlags::empty();
        rustix::net::sendmsg(&pair.near, &[bytes], &mut ancillary, flags).unwrap();
        pair.near.write_all(b"without").unwrap();
        let mut received = [0; 11];
        pair.far.read_exact(&mut received).unwrap_or_else(|error| panic!("{round}: {error}"));
        assert_eq!(&received, b"withwithout");
    }
    drop((pair.near, pair.far));
    pair.forwarder.join().unwrap();
}
