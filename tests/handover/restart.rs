//! Connections survive the restart of the process and carry on as they were.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr};
use std::thread;
use std::time::Duration;

use rustix::process::Signal;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::time::Instant;

use crate::support::*;
use crate::{End, MODES, Mode, Proxy, established, launch, stored};

pub(crate) fn register(trials: &mut Trials) {
    for mode in MODES {
        for (front, back) in PAIRS {
            let pair = (front, back);
            for threads in [1, 2] {
                trials.add(
                format!("every byte arrives and idle connections live on, {mode}, {front} to {back}, {threads} threads"),
                move || every_byte_arrives(mode, pair, threads),
            );
            }
            for (swapped, first) in [(false, "the client"), (true, "the backend")] {
                trials.add(
                format!("an end stays an end and a reset a reset, {mode}, {front} to {back}, {first} closes"),
                move || ends_and_resets_stay_what_they_are(mode, pair, swapped),
            );
            }
            for version in ["v1", "v2"] {
                trials.add(
                    format!("the PROXY header is sent once, {mode}, {front} to {back}, {version}"),
                    move || header_is_sent_once(mode, pair, version),
                );
            }
            trials.add(
                format!(
                    "a waiting client is connected by the next process, {mode}, {front} to {back}"
                ),
                move || waiting_client_is_connected(mode, pair),
            );
        }
        for threads in [1, 3] {
            trials.add(
                format!(
                    "no connection is lost on the way to its event loop, {mode}, {threads} threads"
                ),
                move || no_connection_is_lost_on_the_way(mode, threads),
            );
        }
        if mode.end == End::Stopped {
            let handover = mode.handover;
            trials.add(
                format!("an idle exit stores no connection, --handover={handover}"),
                move || idle_exit_stores_no_connection(handover),
            );
        }
        trials.add(format!("bytes sent before a reset arrive, {mode}"), move || {
            bytes_before_a_reset_arrive(mode)
        });
        trials.add(format!("bytes sent before both ends arrive, {mode}"), move || {
            bytes_before_both_ends_arrive(mode)
        });
        trials.add(
            format!("a connection keeps its backend when TARGET changes, {mode}"),
            move || connection_keeps_its_backend(mode),
        );
        trials.add(format!("a stop for good resets connections, {mode}"), move || {
            a_stop_for_good_resets(mode)
        });
        trials.add(format!("urgent data is forwarded, {mode}"), move || {
            urgent_data_is_forwarded(mode)
        });
    }
    trials.add("a kill ends connections with --handover=restart", kill_ends);
    trials.add("--handover= can change between restarts", mode_can_change);
    for mode in MODES {
        trials
            .add(format!("buffered bytes are stored where no file may grow, {mode}"), move || {
                buffered_bytes_need_no_file(mode)
            });
    }
    for handover in ["restart", "crash"] {
        trials.add(
            format!("the answer to a half-closed MPTCP client arrives whole, {handover}"),
            move || half_closed_mptcp_client(handover),
        );
    }
}

fn every_byte_arrives(
    Mode { handover, end }: Mode,
    (front, back): (Family, Family),
    threads: usize,
) {
    const BYTES: usize = 24_000_000;

    let (front, backend) = (Endpoint::new(front), Endpoint::new(back));
    let options = [format!("--handover={handover}"), format!("--threads={threads}")];
    let mut proxy = Proxy::start(&front, &[&options[0], &options[1], &backend.target]);
    let connect = || established(&front, &backend);
    let mut idle: Vec<_> = (0..5).map(|_| connect()).collect();
    // One client has half-closed.
    idle[0].0.shutdown(Shutdown::Write).unwrap();
    assert_eq!(idle[0].1.read(&mut [0]).unwrap(), 0);
    let (mut up, mut down, mut slow) = (connect(), connect(), connect());
    let message = random_bytes(5, BYTES);
    let received = thread::scope(|scope| {
        let message = &message;
        let transfers = [
            scope.spawn(move || {
                let reader = scope.spawn(move || read_all(&mut up.1));
                up.0.write_all(message).unwrap();
                up.0.shutdown(Shutdown::Write).unwrap();
                reader.join().unwrap()
            }),
            scope.spawn(move || {
                let reader = scope.spawn(move || read_all(&mut down.0));
                down.1.write_all(message).unwrap();
                down.1.shutdown(Shutdown::Write).unwrap();
                reader.join().unwrap()
            }),
            // Read only once the last process runs.
            scope.spawn(move || {
                let writer = scope.spawn(move || {
                    slow.1.write_all(message).unwrap();
                    drop(slow.1);
                });
                let mut first = vec![0; 1_000_000];
                slow.0.read_exact(&mut first).unwrap();
                thread::park();
                let (rest, end) = read_all(&mut slow.0);
                writer.join().unwrap();
                first.extend(rest);
                (first, end)
            }),
        ];
        for _ in 0..3 {
            proxy.replace(end);
            for (client, served) in &mut idle[1..] {
                assert_forwards(client, served);
                assert_forwards(served, client);
            }
            let (client, served) = &mut idle[0];
            assert_forwards(served, client);
        }
        transfers[2].thread().unpark();
        transfers.map(|it| it.join().unwrap())
    });
    for (bytes, end) in received {
        end.unwrap();
        assert!(bytes == message, "{} bytes", bytes.len());
    }
    for (client, mut served) in idle {
        drop(client);
        assert!(read_all(&mut served).1.is_ok());
    }
    let _ = proxy.running.lines.wait_for("Recovered connections: ");
}

fn ends_and_resets_stay_what_they_are(
    Mode { handover, end }: Mode,
    (front_family, back): (Family, Family),
    swapped: bool,
) {
    let (front, backend) = (Endpoint::new(front_family), Endpoint::new(back));
    let handover = format!("--handover={handover}");
    let mut proxy = Proxy::start(&front, &[&handover, &backend.target]);
    let connect = || {
        let (client, served) = established(&front, &backend);
        if swapped { (served, client) } else { (client, served) }
    };
    let near = if swapped { back } else { front_family };
    let ends_well = |(one, mut other): (Socket, Socket)| {
        drop(one);
        let (bytes, end) = read_all(&mut other);
        assert!(bytes.is_empty() && end.is_ok(), "{end:?}");
    };
    let is_cut = |(one, mut other): (Socket, Socket)| {
        one.set_linger(Some(Duration::ZERO)).unwrap();
        drop(one);
        let (_, end) = read_all(&mut other);
        let both_tcp = (front_family, back) == (Family::Tcp, Family::Tcp);
        assert_eq!(is_reset(&end), both_tcp, "{near:?} {end:?}");
    };
    // In the first process.
    ends_well(connect());
    is_cut(connect());
    let [one, other, between] = [connect(), connect(), connect()];
    proxy.replace(end);
    ends_well(one);
    is_cut(other);
    // Between two processes.
    proxy.stop(end);
    let (one, mut other) = between;
    one.set_linger(Some(Duration::ZERO)).unwrap();
    drop(one);
    proxy.running = launch(&front, &proxy.arguments, &proxy.systemd);
    let (_, ended) = read_all(&mut other);
    let both_tcp = (front_family, back) == (Family::Tcp, Family::Tcp);
    assert_eq!(is_reset(&ended), both_tcp, "{near:?} {ended:?}");
    drop(other);
    proxy.systemd.wait_for("READY=1");
    proxy.wait_until_stored(0);
    proxy.replace(end);
    assert_eq!(proxy.running.lines.count("Recovered"), 0);
}

fn bytes_before_a_reset_arrive(Mode { handover, end }: Mode) {
    let (front, backend) = (Endpoint::new(Family::Tcp), Endpoint::new(Family::Tcp));
    let handover = format!("--handover={handover}");
    let mut proxy = Proxy::start(&front, &[&handover, &backend.target]);
    let (mut client, mut served) = established(&front, &backend);
    // More than the sockets between them hold.
    let message = random_bytes(4, 12_000_000);
    let answer = message.clone();
    let writer = thread::spawn(move || {
        let written = served.write_all(&answer);
        reset(served);
        written
    });
    let mut first = vec![0; 1000];
    client.read_exact(&mut first).unwrap();
    proxy.replace(end);
    let (rest, ended) = read_all(&mut client);
    writer.join().unwrap().unwrap();
    first.extend(rest);
    assert!(is_reset(&ended), "{ended:?}");
    assert!(message.starts_with(&first));
}

/// Both directions of the client's socket have ended, and the kernel still has bytes for it.
fn bytes_before_both_ends_arrive(Mode { handover, end }: Mode) {
    let (front, backend) = (Endpoint::new(Family::Tcp), Endpoint::new(Family::Unix));
    let handover = format!("--handover={handover}");
    let mut proxy = Proxy::start(&front, &[&handover, &backend.target]);
    let (mut client, mut served) = established(&front, &backend);
    let message = random_bytes(5, 200_000);
    served.write_all(&message).unwrap();
    let deadline = Instant::now() + TIMEOUT;
    let is_delivered = || (unsent(&served) == 0 && proxy.running.is_asleep()).then_some(());
    poll_until(deadline, is_delivered).expect("the proxy takes all bytes");
    // What the client has sent is not delivered.
    proxy.running.suspend();
    client.write_all(&random_bytes(6, 20_000)).unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    wait_for_state(front.port(), CLOSE_WAIT);
    // It is not closed as long as the child of another test has a copy, before its exec.
    served.shutdown(Shutdown::Both).unwrap();
    proxy.running.signal(Signal::CONT);
    wait_for_state(front.port(), LAST_ACK);
    proxy.replace(end);
    let (received, _) = read_all(&mut client);
    assert!(received == message, "{} of {} bytes", received.len(), message.len());
}

/// Waits until a connection accepted at this port is in the state.
fn wait_for_state(port: u16, state: &str) {
    let is_in = || tcp_sockets(port).iter().any(|words| words[3] == state).then_some(());
    poll_until(Instant::now() + TIMEOUT, is_in).unwrap_or_else(|| panic!("state {state}"));
}

/// An end has come. The number is that of `enum tcp_states` of the kernel.
const CLOSE_WAIT: &str = "08";

/// An end has come, and the own one is sent and not acknowledged.
const LAST_ACK: &str = "09";

fn a_stop_for_good_resets(Mode { handover, end }: Mode) {
    let (front, backend) = (Endpoint::new(Family::Tcp), Endpoint::new(Family::Tcp));
    let handover = format!("--handover={handover}");
    let mut proxy = Proxy::start(&front, &[&handover, &backend.target]);
    let [first, second] = [established(&front, &backend), established(&front, &backend)];
    proxy.replace(end);
    // A restored connection that ends by itself ends cleanly.
    let (client, mut served) = first;
    drop(client);
    assert!(read_all(&mut served).1.is_ok());
    drop(served);
    proxy.running.lines.wait_for("Connection closed");
    proxy.stop(end);
    let log = proxy.running.lines.all();
    let says = log.contains("Stopping, left open connections with systemd: 1.");
    assert_eq!(says, end == End::Stopped, "{log}");
    // As systemd does when the service is not started again.
    proxy.systemd.fd_store.clear();
    let (mut client, mut served) = second;
    assert!(is_reset(&read_all(&mut client).1));
    assert!(is_reset(&read_all(&mut served).1));
}

/// Passive connections, on both event loops, do not keep the process from an idle exit.
fn idle_exit_stores_no_connection(handover: &str) {
    let (front, backend) = (Endpoint::new(Family::Tcp), echo_backend(Family::Unix));
    let handover = format!("--handover={handover}");
    let mut active = front.connect();
    let options = ["--threads=2", "--passive-from=127.0.0.9", "--exit-idle-time=100ms"];
    let arguments: Vec<_> =
        [&*handover].into_iter().chain(options).chain([&*backend.target]).collect();
    let mut proxy = Proxy::start(&front, &arguments);
    assert_echoes(&mut active);
    let mut passive = [(); 3].map(|()| connect_from("127.0.0.9", &front.address));
    passive.iter_mut().for_each(assert_echoes);
    drop(active);
    assert!(proxy.running.wait().success());
    assert_eq!(stored(&proxy.systemd), 0);
    for client in &mut passive {
        assert!(is_reset(&read_all(client).1));
    }
}

fn kill_ends() {
    let (front, backend) = (Endpoint::new(Family::Tcp), Endpoint::new(Family::Tcp));
    let mut proxy = Proxy::start(&front, &["--handover=restart", &backend.target]);
    let (mut client, mut served) = established(&front, &backend);
    proxy.replace(End::Killed);
    // The kernel closes them. It does not know that they are incomplete.
    assert_eq!(read_all(&mut client).0, b"");
    assert_eq!(read_all(&mut served).0, b"");
    assert_eq!(proxy.running.lines.count("Recovered"), 0);
}

fn header_is_sent_once(
    Mode { handover, end }: Mode,
    (front, back): (Family, Family),
    version: &str,
) {
    let (front, backend) = (Endpoint::new(front), Endpoint::new(back));
    let handover = format!("--handover={handover}");
    let version = format!("--proxy-protocol={version}");
    let mut proxy = Proxy::start(&front, &[&handover, &version, &backend.target]);
    let (mut client, mut served) = (front.connect(), backend.accept());
    client.write_all(b"one").unwrap();
    let mut bytes = Vec::new();
    while !bytes.ends_with(b"one") {
        let mut byte = [0];
        served.read_exact(&mut byte).unwrap();
        bytes.extend(byte);
    }
    proxy.replace(end);
    client.write_all(b"two").unwrap();
    proxy.replace(end);
    client.shutdown(Shutdown::Write).unwrap();
    let (rest, ended) = read_all(&mut served);
    ended.unwrap();
    bytes.extend(rest);
    let header = bytes.strip_suffix(b"onetwo").expect("all bytes, behind the header");
    let count = |start: &[u8]| header.windows(start.len()).filter(|it| *it == start).count();
    assert_eq!(count(b"PROXY ") + count(b"\r\n\r\n\0\r\nQUIT\n"), 1, "{header:?}");
}

fn waiting_client_is_connected(Mode { handover, end }: Mode, (front, back): (Family, Family)) {
    let (front, absent) = (Endpoint::new(front), Endpoint::new(back));
    let address = absent.address.clone();
    let target = absent.target.clone();
    let handover = format!("--handover={handover}");
    let arguments = [&handover, "--proxy-protocol=v1", "--backend-wait=1min", &target];
    // The backend closes; its address stays free.
    absent.socket.shutdown(Shutdown::Both).unwrap();
    let directory = match back {
        Family::Tcp => {
            drop(absent);
            None
        }
        Family::Unix => Some(absent),
    };
    let mut proxy = Proxy::start(&front, &arguments);
    let mut client = front.connect();
    client.write_all(b"first words").unwrap();
    proxy.running.lines.wait_for("holding clients");
    proxy.replace(end);
    proxy.running.lines.wait_for("Recovered connections: 1.");
    proxy.running.lines.wait_for("holding clients");
    if let Some(path) = address.as_pathname() {
        std::fs::remove_file(path).unwrap();
    }
    let backend = Socket::new(address.domain(), Type::STREAM, None).unwrap();
    backend.set_reuse_address(true).unwrap();
    backend.bind(&address).unwrap();
    backend.listen(16).unwrap();
    let (mut served, _) = backend.accept().unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    let (bytes, ended) = read_all(&mut served);
    ended.unwrap();
    let text = String::from_utf8(bytes).unwrap();
    assert!(text.starts_with("PROXY ") && text.ends_with("\r\nfirst words"), "{text:?}");
    assert_eq!(text.matches("PROXY").count(), 1);
    drop(directory);
}

fn connection_keeps_its_backend(Mode { handover, end }: Mode) {
    let front = Endpoint::new(Family::Tcp);
    let (before, after) = (Endpoint::new(Family::Tcp), Endpoint::new(Family::Unix));
    let handover = format!("--handover={handover}");
    let mut proxy = Proxy::start(&front, &[&handover, &before.target]);
    let (mut client, mut served) = established(&front, &before);
    proxy.arguments = vec![handover, after.target.clone(), "--threads=2".into()];
    proxy.replace(end);
    assert_forwards(&mut client, &mut served);
    let (mut new_client, mut elsewhere) = (front.connect(), after.accept());
    assert_forwards(&mut new_client, &mut elsewhere);
    assert_forwards(&mut served, &mut client);
}

fn mode_can_change() {
    let (front, backend) = (Endpoint::new(Family::Tcp), Endpoint::new(Family::Unix));
    let mut proxy = Proxy::start(&front, &["--handover=restart", &backend.target]);
    let (mut client, mut served) = (front.connect(), backend.accept());
    for (handover, end) in [
        ("crash", End::Stopped),
        ("crash", End::Killed),
        ("restart", End::Killed),
        ("restart", End::Stopped),
        ("crash", End::Stopped),
        ("never", End::Killed),
    ] {
        // Bytes are under way, as many as the sockets hold.
        let message = random_bytes(1, 300_000);
        let writer = {
            let (mut client, message) = (client.try_clone().unwrap(), message.clone());
            thread::spawn(move || client.write_all(&message).unwrap())
        };
        let mut read = vec![0; message.len()];
        served.read_exact(&mut read[..1]).unwrap();
        proxy.arguments[0] = format!("--handover={handover}");
        proxy.replace(end);
        if handover == "never" {
            proxy
                .running
                .lines
                .wait_for("Closing the stored connections, because --handover= is never.");
            drop(writer);
            assert!(proxy.systemd.fd_store.names().is_empty());
            drop(client);
            return;
        }
        served.read_exact(&mut read[1..]).unwrap();
        writer.join().unwrap();
        assert!(read == message);
        assert_forwards(&mut served, &mut client);
    }
}

/// An MPTCP socket counts a FIN as a byte that can be read.
fn half_closed_mptcp_client(handover: &str) {
    let socket = || Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::MPTCP));
    let Ok(listener) = socket() else {
        return skip("an MPTCP client", "a kernel with MPTCP");
    };
    listener.bind(&"127.0.0.1:0".parse::<SocketAddr>().unwrap().into()).unwrap();
    listener.listen(16).unwrap();

    let backend = Endpoint::new(Family::Tcp);
    let systemd = FakeSystemd::with_fd_store(4);
    let arguments = [format!("--handover={handover}"), backend.target.clone()];
    let launch = Launch::new(OURS).args(&arguments).socket(&listener);
    let _proxy = launch.stored_by(&systemd).start();
    let mut client = socket().unwrap();
    client.connect(&listener.local_addr().unwrap()).unwrap();
    client.write_all(b"a question").unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    let mut served = backend.accept();
    assert_eq!(read_all(&mut served).0, b"a question");
    let answer = random_bytes(1, 1_000_000);
    served.write_all(&answer).unwrap();
    drop(served);
    // Both directions are over before the client reads.
    pause(Duration::from_millis(300));
    let (received, end) = read_all(&mut client);
    assert!(received == answer, "{handover}: {} bytes, {end:?}", received.len());
}

fn urgent_data_is_forwarded(Mode { handover, end }: Mode) {
    let (front, backend) = (Endpoint::new(Family::Tcp), Endpoint::new(Family::Unix));
    let handover = format!("--handover={handover}");
    let mut proxy = Proxy::start(&front, &[&handover, &backend.target]);
    let (mut client, mut served) = established(&front, &backend);
    client.write_all(b"before").unwrap();
    client.send_out_of_band(b"!").unwrap();
    client.write_all(b"after").unwrap();
    let mut read = [0; 12];
    served.read_exact(&mut read).unwrap();
    assert_eq!(&read, b"before!after");
    if end == End::Stopped {
        proxy.replace(end);
        assert_forwards(&mut client, &mut served);
    } else {
        // Its bytes may be in the process, so that it is not stored.
        proxy.stop(end);
        assert!(read_all(&mut served).0.is_empty());
        proxy.running = launch(&front, &proxy.arguments, &proxy.systemd);
        proxy.systemd.wait_for("READY=1");
        assert_eq!(proxy.running.lines.count("Recovered"), 0);
    }
}

fn no_connection_is_lost_on_the_way(Mode { handover, end }: Mode, threads: usize) {
    let (front, backend) = (Endpoint::new(Family::Tcp), echo_backend(Family::Unix));
    let handover = format!("--handover={handover}");
    let threads = format!("--threads={threads}");
    let arguments = [&handover, &threads, "--connections-max=2000", &backend.target];
    let mut proxy = Proxy::start(&front, &arguments);
    let mut all = Vec::new();
    for _ in 0..10 {
        // The proxy finds the clients and the signal at the same time.
        proxy.running.suspend();
        for _ in 0..50 {
            let mut client = front.connect();
            client.write_all(b"?").unwrap();
            all.push(client);
        }
        proxy.running.signal(if end == End::Stopped { Signal::TERM } else { Signal::CONT });
        proxy.running.signal(Signal::CONT);
        proxy.replace(end);
    }
    let answers = all.iter_mut().map(|client| client.read_exact(&mut [0]));
    let lost: Vec<_> = answers.filter_map(Result::err).collect();
    // A kill may come between accept(2) and the store.
    let most = if end == End::Killed { 10 } else { 0 };
    assert!(lost.len() <= most, "{} of {} are lost: {lost:?}", lost.len(), all.len());
}

fn buffered_bytes_need_no_file(Mode { handover, end }: Mode) {
    let (front, backend) = (Endpoint::new(Family::Tcp), Endpoint::new(Family::Unix));
    let systemd = FakeSystemd::with_fd_store(8);
    let start = || {
        let launch = Launch::new(OURS).arg(format!("--handover={handover}")).arg(&backend.target);
        let running = launch.without_files().listener(&front).stored_by(&systemd).start();
        systemd.wait_for("READY=1");
        running
    };
    let mut proxy = start();
    let (mut idle, mut stalled) = (established(&front, &backend), established(&front, &backend));
    // Messages below the copy buffer's size are copied, so the last is buffered in memory.
    stalled.0.set_nonblocking(true).unwrap();
    let mut sent = Vec::new();
    let message = random_bytes(7, 20_000);
    let all_is_full = || {
        let written = stalled.0.write(&message).unwrap_or(0);
        sent.extend_from_slice(&message[..written]);
        (written == 0 && proxy.is_asleep()).then_some(())
    };
    poll_until(Instant::now() + TIMEOUT, all_is_full).expect("the buffers fill up");
    match end {
        End::Stopped => proxy.signal(Signal::TERM),
        End::Killed => proxy.signal(Signal::KILL),
    }
    let status = proxy.wait();
    assert_eq!(status.code().is_some(), end == End::Stopped, "{status}: {}", proxy.lines.all());
    let _proxy = start();
    assert_forwards(&mut idle.0, &mut idle.1);
    stalled.0.set_nonblocking(false).unwrap();
    stalled.0.shutdown(Shutdown::Write).unwrap();
    let (received, result) = read_all(&mut stalled.1);
    result.unwrap();
    assert!(received == sent, "{} of {} bytes", received.len(), sent.len());
}
