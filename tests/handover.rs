//! `--handover=`: connections outlive a restart of the proxy, and its death. (In a real systemd:
//! tests/handover_systemd.rs.)

mod support;

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr};
use std::os::fd::AsFd;
use std::thread;
use std::time::Duration;

use support::keeper::Keeper;
use rustix::process::Signal;
use socket_proxyd::testing::{Queue, Record, RecordBody, encode_message, record_ids, replay};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};
use support::*;
use tokio::time::Instant;

/// How the process ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Told,
    Killed,
}

/// What `--handover=` says, and an end that it is about.
const WAYS: [(&str, End); 3] =
    [("restart", End::Told), ("crash", End::Told), ("crash", End::Killed)];

struct Proxy<'a> {
    front: &'a Endpoint,
    arguments: Vec<String>,
    keeper: Keeper,
    running: Running,
}

impl<'a> Proxy<'a> {
    fn start(front: &'a Endpoint, arguments: &[&str]) -> Self {
        let arguments: Vec<_> = arguments.iter().map(ToString::to_string).collect();
        let keeper = Keeper::new(8);
        let running = launch(front, &arguments, &keeper);
        keeper.wait_for("READY=1");
        Self { front, arguments, keeper, running }
    }

    /// Another process in the place of this one.
    fn again(&mut self, end: End) {
        self.end(end);
        self.running = launch(self.front, &self.arguments, &self.keeper);
        self.keeper.wait_for("READY=1");
    }

    fn end(&mut self, end: End) {
        match end {
            End::Told => self.running.signal(Signal::TERM),
            End::Killed => self.running.signal(Signal::KILL),
        }
        let status = self.running.wait();
        assert_eq!(status.code().is_some(), end == End::Told, "{}", self.running.lines.all());
    }

    /// Records that count in the store. The proxy stands still meanwhile: its place in the queue is that of
    /// whoever reads it.
    fn stored(&self) -> usize {
        self.running.signal(Signal::STOP);
        let stands = || {
            let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.running.pid()));
            stat.unwrap().rsplit_once(") ").unwrap().1.starts_with('T').then_some(())
        };
        poll_until(Instant::now() + PATIENCE, stands).unwrap();
        let records = stored(&self.keeper);
        self.running.signal(Signal::CONT);
        records
    }

    /// Waits until the store holds this many records.
    fn wait_until_stored(&self, records: usize) {
        let mut last = 0;
        let reached = poll_until(Instant::now() + PATIENCE, || {
            last = self.stored();
            (last == records).then_some(())
        });
        assert!(reached.is_some(), "{last} records are stored, and not {records}");
    }
}

fn launch(front: &Endpoint, arguments: &[String], keeper: &Keeper) -> Running {
    let launch = Launch::new(OURS).args(["--log-level=debug"]).args(arguments).listener(front);
    keeper.launch(launch, 1).start()
}

/// Records that count in the queue.
fn stored(keeper: &Keeper) -> usize {
    let queue = queue(keeper);
    replay(&queue.payloads().unwrap(), queue.messages()).unwrap().records.len()
}

fn queue(keeper: &Keeper) -> Queue {
    let [inner, sender] =
        ["queue", "sender"].map(|end| keeper.get(&format!("handover-of-socket-proxyd.{end}")));
    Queue::from_ends(inner, sender)
}

#[test]
fn every_byte_arrives_and_quiet_connections_live_on() {
    const BYTES: usize = 24_000_000;
    for (front, back) in PAIRS {
        for (handover, end) in WAYS {
            for threads in ["--threads=1", "--threads=2"] {
                eprintln!("{front:?} to {back:?}, {handover}, {end:?}, {threads}");
                let (front, backend) = (Endpoint::new(front), Endpoint::new(back));
                let handover = format!("--handover={handover}");
                let mut proxy = Proxy::start(&front, &[&handover, threads, &backend.target]);
                let connect = || joined(&front, &backend);
                let mut quiet: Vec<_> = (0..5).map(|_| connect()).collect();
                // One of them has ended its sending.
                quiet[0].0.shutdown(Shutdown::Write).unwrap();
                assert_eq!(quiet[0].1.read(&mut [0]).unwrap(), 0);
                let (mut up, mut down, mut slow) = (connect(), connect(), connect());
                let message = noise(5, BYTES);
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
                        // Nobody reads before the last process is there.
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
                        proxy.again(end);
                        for (client, served) in &mut quiet[1..] {
                            passes(client, served);
                            passes(served, client);
                        }
                        let (client, served) = &mut quiet[0];
                        passes(served, client);
                    }
                    transfers[2].thread().unpark();
                    transfers.map(|it| it.join().unwrap())
                });
                for (bytes, end) in received {
                    end.unwrap();
                    assert!(bytes == message, "{} bytes", bytes.len());
                }
                for (client, mut served) in quiet {
                    drop(client);
                    assert!(read_all(&mut served).1.is_ok());
                }
                let _ = proxy.running.lines.wait_for("Recovered connections: ");
            }
        }
    }
}

/// A connection that has been used: whoever is only being dialled for is dialled for again.
fn joined(front: &Endpoint, backend: &Endpoint) -> (Socket, Socket) {
    let (mut client, mut served) = (front.connect(), backend.accept());
    passes(&mut client, &mut served);
    (client, served)
}

fn passes(from: &mut Socket, to: &mut Socket) {
    from.write_all(b"are you there?").unwrap();
    let mut read = [0; 14];
    to.read_exact(&mut read).unwrap();
    assert_eq!(&read, b"are you there?");
}

/// (Within 0.1 s, as in the black-box suite.)
#[test]
fn a_flood_of_one_byte_messages_holds_up_nobody() {
    for (from_client, with_descriptors) in
        [(true, false), (false, false), (true, true), (false, true)]
    {
        let [from, to] = [Family::Unix, Family::Tcp].map(Endpoint::new);
        let (front, backend) = if from_client { (from, to) } else { (to, from) };
        let _proxy = Proxy::start(&front, &["--handover=crash", &backend.target]);
        let times = beside_floods(&front, &backend, from_client, with_descriptors);
        assert!(times[7] < Duration::from_millis(100), "answers took {times:?}");
    }
}

#[test]
fn an_end_is_an_end_and_a_reset_is_a_reset() {
    for (front_family, back) in PAIRS {
        for (handover, end) in WAYS {
            for swapped in [false, true] {
                let (front, backend) = (Endpoint::new(front_family), Endpoint::new(back));
                let handover = format!("--handover={handover}");
                let mut proxy = Proxy::start(&front, &[&handover, &backend.target]);
                let connect = || {
                    let (client, served) = joined(&front, &backend);
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
                // Before, in a process of its own and taken over.
                ends_well(connect());
                is_cut(connect());
                let [one, other, between] = [connect(), connect(), connect()];
                proxy.again(end);
                ends_well(one);
                is_cut(other);
                // While there is no process.
                proxy.end(end);
                let (one, mut other) = between;
                one.set_linger(Some(Duration::ZERO)).unwrap();
                drop(one);
                proxy.running = launch(&front, &proxy.arguments, &proxy.keeper);
                let (_, ended) = read_all(&mut other);
                let both_tcp = (front_family, back) == (Family::Tcp, Family::Tcp);
                assert_eq!(is_reset(&ended), both_tcp, "{near:?} {ended:?}");
                drop(other);
                proxy.keeper.wait_for("READY=1");
                proxy.wait_until_stored(0);
                proxy.again(end);
                assert_eq!(proxy.running.lines.count("Recovered"), 0);
            }
        }
    }
}

#[test]
fn a_reset_that_was_taken_and_not_stored_is_a_reset() {
    for backend_resets in [true, false] {
        let [front, backend] = [Family::Tcp, Family::Tcp].map(Endpoint::new);
        let mut proxy = Proxy::start(&front, &["--handover=crash", &backend.target]);
        let (mut client, mut served) = joined(&front, &backend);
        passes(&mut client, &mut served);
        passes(&mut served, &mut client);
        proxy.end(End::Killed);
        let (mut resets, mut stays) =
            if backend_resets { (served, client) } else { (client, served) };
        resets.write_all(b"a part").unwrap();
        reset(resets);
        // As the process did in its last moment.
        let queue = queue(&proxy.keeper);
        for message in queue.messages() {
            for fd in message.unwrap().fds {
                let _ = socket2::SockRef::from(&fd).take_error();
            }
        }
        proxy.running = launch(&front, &proxy.arguments, &proxy.keeper);
        proxy.keeper.wait_for("READY=1");
        let (bytes, end) = read_all(&mut stays);
        assert_eq!(bytes, b"a part");
        assert!(is_reset(&end), "the backend resets: {backend_resets}, {end:?}");
    }
}

#[test]
fn what_the_backend_said_before_a_reset_arrives() {
    for (handover, end) in WAYS {
        let (front, backend) = (Endpoint::new(Family::Tcp), Endpoint::new(Family::Tcp));
        let handover = format!("--handover={handover}");
        let mut proxy = Proxy::start(&front, &[&handover, &backend.target]);
        let (mut client, mut served) = joined(&front, &backend);
        // More than the sockets between them take.
        let message = noise(4, 12_000_000);
        let answer = message.clone();
        let writer = thread::spawn(move || {
            let written = served.write_all(&answer);
            reset(served);
            written
        });
        let mut first = vec![0; 1000];
        client.read_exact(&mut first).unwrap();
        proxy.again(end);
        let (rest, ended) = read_all(&mut client);
        writer.join().unwrap().unwrap();
        first.extend(rest);
        assert!(is_reset(&ended), "{ended:?}");
        assert!(message.starts_with(&first));
    }
}

#[test]
fn a_header_reaches_the_backend_once() {
    for (front, back) in PAIRS {
        for (handover, end) in WAYS {
            for version in ["v1", "v2"] {
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
                proxy.again(end);
                client.write_all(b"two").unwrap();
                proxy.again(end);
                client.shutdown(Shutdown::Write).unwrap();
                let (rest, ended) = read_all(&mut served);
                ended.unwrap();
                bytes.extend(rest);
                let header = bytes.strip_suffix(b"onetwo").expect("all bytes, behind the header");
                let count =
                    |start: &[u8]| header.windows(start.len()).filter(|it| *it == start).count();
                assert_eq!(count(b"PROXY ") + count(b"\r\n\r\n\0\r\nQUIT\n"), 1, "{header:?}");
            }
        }
    }
}

#[test]
fn who_is_held_is_dialled_for_again() {
    for (front, back) in PAIRS {
        for (handover, end) in WAYS {
            let (front, place) = (Endpoint::new(front), Endpoint::new(back));
            let address = place.address.clone();
            let target = place.target.clone();
            let handover = format!("--handover={handover}");
            let arguments = [&handover, "--proxy-protocol=v1", "--backend-wait=1min", &target];
            // Its backend goes, and its place stays free.
            place.socket.shutdown(Shutdown::Both).unwrap();
            let directory = match back {
                Family::Tcp => {
                    drop(place);
                    None
                }
                Family::Unix => Some(place),
            };
            let mut proxy = Proxy::start(&front, &arguments);
            let mut client = front.connect();
            client.write_all(b"first words").unwrap();
            proxy.running.lines.wait_for("holding clients");
            proxy.again(end);
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
    }
}

#[test]
fn a_connection_keeps_the_backend_that_it_has() {
    for (handover, end) in WAYS {
        let front = Endpoint::new(Family::Tcp);
        let (before, after) = (Endpoint::new(Family::Tcp), Endpoint::new(Family::Unix));
        let handover = format!("--handover={handover}");
        let mut proxy = Proxy::start(&front, &[&handover, &before.target]);
        let (mut client, mut served) = joined(&front, &before);
        proxy.arguments = vec![handover, after.target.clone(), "--threads=2".into()];
        proxy.again(end);
        passes(&mut client, &mut served);
        let (mut newcomer, mut elsewhere) = (front.connect(), after.accept());
        passes(&mut newcomer, &mut elsewhere);
        passes(&mut served, &mut client);
    }
}

#[test]
fn who_is_held_stays_with_the_listener_of_its_family() {
    let wildcard = |address: &str, domain| {
        let address: SocketAddr = address.parse().unwrap();
        let socket = Socket::new(domain, Type::STREAM, None).unwrap();
        if address.is_ipv6() {
            socket.set_only_v6(true).unwrap();
        }
        socket.bind(&address.into()).unwrap();
        socket.listen(16).unwrap();
        socket
    };
    for (handover, end) in WAYS {
        let six = wildcard("[::]:0", Domain::IPV6);
        let port = six.local_addr().unwrap().as_socket().unwrap().port();
        let four = wildcard(&format!("0.0.0.0:{port}"), Domain::IPV4);
        let backends = [free_port(), free_port()];
        let keeper = Keeper::new(8);
        let launch = || {
            let launch = Launch::new(OURS).socket(&six).socket(&four);
            let handover = format!("--handover={handover}");
            let launch = launch.args([&*handover, "--backend-wait=1min"]);
            let launch = launch.arg(format!("[::]:{port}=127.0.0.1:{}", backends[0]));
            let launch = launch.arg(format!("0.0.0.0:{port}=127.0.0.1:{}", backends[1]));
            let running = keeper.launch(launch, 2).start();
            keeper.wait_for("READY=1");
            running
        };
        let mut proxy = launch();
        let clients = [format!("[::1]:{port}"), format!("127.0.0.1:{port}")].map(|address| {
            let client = connect(&address.parse::<SocketAddr>().unwrap().into());
            (&client).write_all(address.as_bytes()).unwrap();
            proxy.lines.wait_for(&format!(
                "Failed to connect to remote host: 127.0.0.1:{}",
                backends[usize::from(address.starts_with('1'))]
            ));
            (client, address)
        });
        proxy.signal(if end == End::Told { Signal::TERM } else { Signal::KILL });
        proxy.wait();
        proxy = launch();
        proxy.lines.wait_for("Recovered connections: 2.");
        proxy.signal(Signal::USR1);
        for (client, listener, backend) in
            [("[::1]", "[::]", backends[0]), ("127.0.0.1", "0.0.0.0", backends[1])]
        {
            let line = proxy.lines.wait_for(&format!("yet. client={client}"));
            assert!(line.contains(&format!("({listener}:{port})")), "{line}");
            assert!(line.contains(&format!("backend=127.0.0.1:{backend}")), "{line}");
        }
        for ((mut client, address), port) in clients.into_iter().zip(backends) {
            let backend = Endpoint::tcp(&format!("127.0.0.1:{port}"), 16);
            let mut served = backend.accept();
            let mut read = vec![0; address.len()];
            served.read_exact(&mut read).unwrap();
            assert_eq!(String::from_utf8(read).unwrap(), address);
            passes(&mut served, &mut client);
        }
    }
}

#[test]
fn one_way_follows_the_other() {
    let (front, backend) = (Endpoint::new(Family::Tcp), Endpoint::new(Family::Unix));
    let mut proxy = Proxy::start(&front, &["--handover=restart", &backend.target]);
    let (mut client, mut served) = (front.connect(), backend.accept());
    for (handover, end) in [
        ("crash", End::Told),
        ("crash", End::Killed),
        ("restart", End::Killed),
        ("restart", End::Told),
        ("crash", End::Told),
        ("never", End::Killed),
    ] {
        // Something is under way, as far as it fits into the sockets.
        let message = noise(1, 300_000);
        let writer = {
            let (mut client, message) = (client.try_clone().unwrap(), message.clone());
            thread::spawn(move || client.write_all(&message).unwrap())
        };
        let mut read = vec![0; message.len()];
        served.read_exact(&mut read[..1]).unwrap();
        proxy.arguments[0] = format!("--handover={handover}");
        proxy.again(end);
        if handover == "never" {
            proxy.running.lines.wait_for("Closing what was stored, since --handover=never.");
            drop(writer);
            assert!(proxy.keeper.names().is_empty());
            drop(client);
            return;
        }
        served.read_exact(&mut read[1..]).unwrap();
        writer.join().unwrap();
        assert!(read == message);
        passes(&mut served, &mut client);
    }
}

#[test]
fn newcomers_wait_at_a_socket_that_was_opened_here() {
    for family in [Family::Tcp, Family::Unix] {
        for (handover, end) in WAYS {
            let backend = Endpoint::new(Family::Tcp);
            let directory = tempfile::TempDir::new().unwrap();
            let (listen, address) = place(family, &directory);
            let arguments = [
                format!("--handover={handover}"),
                format!("--listen={listen}"),
                backend.target.clone(),
            ];
            let keeper = Keeper::new(4);
            let launch = || keeper.launch(Launch::new(OURS).args(&arguments), 0).start();
            let mut proxy = launch();
            keeper.wait_for("READY=1");
            let (mut client, mut served) = (connect(&address), backend.accept());
            passes(&mut client, &mut served);
            for _ in 0..3 {
                match end {
                    End::Told => proxy.signal(Signal::TERM),
                    End::Killed => proxy.signal(Signal::KILL),
                }
                proxy.wait();
                let mut newcomer = connect(&address);
                newcomer.write_all(b"hello").unwrap();
                proxy = launch();
                let mut served_too = backend.accept();
                served_too.read_exact(&mut [0; 5]).unwrap();
                passes(&mut client, &mut served);
                keeper.wait_for("READY=1");
            }
            assert_eq!(keeper.names().len(), 2, "nothing but the queue");
            proxy.signal(Signal::TERM);
            proxy.wait();
        }
    }
}

#[test]
fn killed_while_it_recovers_it_loses_nothing() {
    for ((handover, end), threads) in WAYS.into_iter().flat_map(|way| [(way, "1"), (way, "2")]) {
        let (front, backend) = (Endpoint::new(Family::Tcp), Endpoint::new(Family::Unix));
        let handover = format!("--handover={handover}");
        let threads = format!("--threads={threads}");
        let arguments = [&handover, "--connections-max=2000", &threads, &backend.target];
        let mut proxy = Proxy::start(&front, &arguments);
        let mut all: Vec<_> = (0..300).map(|_| joined(&front, &backend)).collect();
        proxy.end(end);
        let stored_before = stored(&proxy.keeper);
        assert_eq!(stored_before, all.len());
        for _ in 0..3 {
            // While it reads the store, as far as one can tell from outside: not at its place in the
            // queue, which is that of whoever reads it.
            proxy.running = launch(&front, &proxy.arguments, &proxy.keeper);
            let is_reading = || {
                let links = std::fs::read_dir(format!("/proc/{}/fd", proxy.running.pid()));
                (links.unwrap().count() > 40).then_some(())
            };
            poll_until(Instant::now() + PATIENCE, is_reading).unwrap();
            // Whoever has taken all of it is not recovering any more.
            proxy.running.signal(Signal::STOP);
            if handover == "--handover=restart" && stored(&proxy.keeper) == 0 {
                // It has taken all of them, and is not recovering any more.
                proxy.running.signal(Signal::CONT);
                proxy.end(End::Told);
            } else {
                proxy.end(End::Killed);
            }
        }
        proxy.running = launch(&front, &proxy.arguments, &proxy.keeper);
        proxy.running.lines.wait_for("Recovered connections: 300.");
        proxy.keeper.wait_for("STATUS=300 connections of 2000, 0 served, 0 bytes; 300 recovered");
        for (client, served) in &mut all {
            passes(client, served);
            passes(served, client);
        }
    }
}

#[test]
fn a_start_that_fails_leaves_what_is_stored() {
    for family in [Family::Tcp, Family::Unix] {
        for (handover, end) in WAYS {
            let backend = Endpoint::new(Family::Tcp);
            let directory = tempfile::TempDir::new().unwrap();
            let (listen, address) = place(family, &directory);
            let handover = format!("--handover={handover}");
            let listen = format!("--listen={listen}");
            let keeper = Keeper::new(4);
            let launch =
                |arguments: &[&str]| keeper.launch(Launch::new(OURS).args(arguments), 0).start();
            let right = [&*handover, &listen, &backend.target];
            let mut proxy = launch(&right);
            keeper.wait_for("READY=1");
            let joined = || {
                let (mut client, mut served) = (connect(&address), backend.accept());
                passes(&mut client, &mut served);
                (client, served)
            };
            let (mut client, mut served) = joined();
            end_by(&mut proxy, end);
            // Nothing leads from the one socket that there is.
            for _ in 0..5 {
                let wrong = [&*handover, &listen, "other=/nowhere"];
                assert_eq!(launch(&wrong).wait().code(), Some(1));
            }
            let mut newcomer = connect(&address);
            newcomer.write_all(b"hello").unwrap();
            let mut proxy = launch(&right);
            let mut newcomers_backend = backend.accept();
            newcomers_backend.read_exact(&mut [0; 5]).unwrap();
            passes(&mut client, &mut served);
            passes(&mut served, &mut client);
            // And then nothing is started any more.
            end_by(&mut proxy, end);
            assert_eq!(launch(&[&handover, &listen, "other=/nowhere"]).wait().code(), Some(1));
            keeper.clear();
            assert!(is_reset(&read_all(&mut served).1));
        }
    }
}

/// Where a listener may be opened.
fn place(family: Family, directory: &tempfile::TempDir) -> (String, SockAddr) {
    let path = directory.path().join("socket");
    match family {
        Family::Tcp => {
            let address = format!("127.0.0.1:{}", free_port());
            (address.clone(), address.parse::<SocketAddr>().unwrap().into())
        }
        Family::Unix => (path.display().to_string(), SockAddr::unix(&path).unwrap()),
    }
}

fn end_by(proxy: &mut Running, end: End) {
    proxy.signal(if end == End::Told { Signal::TERM } else { Signal::KILL });
    proxy.wait();
}

#[test]
fn a_place_is_asked_for_in_other_words() {
    for (handover, end) in WAYS {
        let backend = Endpoint::new(Family::Unix);
        let port = free_port();
        let handover = format!("--handover={handover}");
        let keeper = Keeper::new(4);
        let launch = |handover: &str, listen: &str| {
            let arguments = [handover, &format!("--listen={listen}"), &backend.target];
            let running = keeper.launch(Launch::new(OURS).args(arguments), 0).start();
            keeper.wait_for("READY=1");
            running
        };
        let address = SocketAddr::from(([127, 0, 0, 1], port)).into();
        let mut proxy = launch(&handover, &format!("127.0.0.1:{port}"));
        let (mut client, mut served) = (connect(&address), backend.accept());
        passes(&mut client, &mut served);
        for listen in [format!("{port}"), format!("localhost:{port}"), format!("127.0.0.1:{port}")]
        {
            end_by(&mut proxy, end);
            proxy = launch(&handover, &listen);
            passes(&mut client, &mut served);
            let (mut newcomer, mut newcomers_backend) = (connect(&address), backend.accept());
            passes(&mut newcomer, &mut newcomers_backend);
        }
        // And without the option at once.
        end_by(&mut proxy, end);
        let _proxy = launch("--handover=never", &format!("127.0.0.1:{port}"));
        assert!(is_reset(&read_all(&mut client).1));
        let (mut newcomer, mut newcomers_backend) = (connect(&address), backend.accept());
        passes(&mut newcomer, &mut newcomers_backend);
    }
}

#[test]
fn a_stop_is_a_reset_and_no_end() {
    for (handover, end) in WAYS {
        let (front, backend) = (Endpoint::new(Family::Tcp), Endpoint::new(Family::Tcp));
        let handover = format!("--handover={handover}");
        let mut proxy = Proxy::start(&front, &[&handover, &backend.target]);
        let [first, second] = [joined(&front, &backend), joined(&front, &backend)];
        proxy.again(end);
        // Once it has been taken over, its own end is one.
        let (client, mut served) = first;
        drop(client);
        assert!(read_all(&mut served).1.is_ok());
        drop(served);
        proxy.running.lines.wait_for("Connection closed");
        proxy.end(end);
        let log = proxy.running.lines.all();
        let says = log.contains("Stopping, left open connections with systemd: 1.");
        assert_eq!(says, end == End::Told, "{log}");
        // As systemd does when nothing is started again.
        proxy.keeper.clear();
        let (mut client, mut served) = second;
        assert!(is_reset(&read_all(&mut client).1));
        assert!(is_reset(&read_all(&mut served).1));
    }
}

/// The store as it is without privileges, by default.
const DEFAULT_WMEM_MAX: usize = 212_992;

fn keeper_with_queue(bytes: usize) -> Keeper {
    let keeper = Keeper::new(8);
    let queue = Queue::new().unwrap();
    for (end, fd) in ["queue", "sender"].into_iter().zip(queue.ends()) {
        rustix::net::sockopt::set_socket_send_buffer_size(fd, bytes).unwrap();
        keeper.put(&format!("handover-of-socket-proxyd.{end}"), fd);
    }
    keeper
}

#[test]
fn by_default_the_store_holds_thousands() {
    const CONNECTIONS: usize = 2000;
    raise_descriptor_limit();
    let (front, backend) = (Endpoint::new(Family::Tcp), echo_backend(Family::Unix));
    let keeper = keeper_with_queue(DEFAULT_WMEM_MAX);
    let mut all: Vec<Socket> = Vec::new();
    // Also one way after the other, with forms and pipes of their own.
    for (handover, end) in [("crash", End::Killed), ("crash", End::Told), ("restart", End::Told)] {
        let arguments = [format!("--handover={handover}"), "-c3000".into(), backend.target.clone()];
        let mut proxy = launch(&front, &arguments, &keeper);
        keeper.wait_for("READY=1");
        while all.len() < CONNECTIONS {
            all.push(front.connect());
            echoes(all.last_mut().unwrap());
        }
        for _ in 0..200 {
            echoes(&mut front.connect());
        }
        all.iter_mut().for_each(echoes);
        proxy.signal(if end == End::Told { Signal::TERM } else { Signal::KILL });
        proxy.wait();
        let log = proxy.lines.all();
        assert!(!log.contains("store is full") && !log.contains("not stored"), "{log}");
    }
    let arguments = ["--handover=crash".into(), "-c3000".into(), backend.target.clone()];
    let proxy = launch(&front, &arguments, &keeper);
    proxy.lines.wait_for(&format!("Recovered connections: {CONNECTIONS}."));
    all.iter_mut().for_each(echoes);
    assert_eq!(proxy.lines.count("store"), 0);
}

#[test]
fn few_descriptors_are_enough_again() {
    for (handover, end) in WAYS {
        let (front, backend) = (Endpoint::new(Family::Tcp), echo_backend(Family::Unix));
        let arguments = [format!("--handover={handover}"), "-c100".into(), backend.target.clone()];
        let keeper = Keeper::new(4);
        let launch = || {
            let launch = Launch::new(OURS).args(&arguments).listener(&front);
            keeper.launch(launch.descriptors(1024), 1).start()
        };
        let mut proxy = launch();
        let mut all: Vec<_> = (0..90).map(|_| front.connect()).collect();
        all.iter_mut().for_each(echoes);
        for _ in 0..3 {
            proxy.signal(if end == End::Told { Signal::TERM } else { Signal::KILL });
            proxy.wait();
            proxy = launch();
            all.iter_mut().for_each(echoes);
            let mut newcomers: Vec<_> = (0..10).map(|_| front.connect()).collect();
            newcomers.iter_mut().for_each(echoes);
        }
        assert_eq!(proxy.lines.count("Out of"), 0);
    }
}

#[test]
fn too_few_descriptors_leave_what_is_stored() {
    for (handover, end) in WAYS {
        let (front, backend) = (Endpoint::new(Family::Tcp), echo_backend(Family::Unix));
        let arguments = [format!("--handover={handover}"), "-c100".into(), backend.target.clone()];
        let keeper = Keeper::new(4);
        let launch = |descriptors| {
            let launch = Launch::new(OURS).args(&arguments).listener(&front);
            keeper.launch(launch.descriptors(descriptors), 1).start()
        };
        let mut proxy = launch(1024);
        let mut all: Vec<_> = (0..90).map(|_| front.connect()).collect();
        all.iter_mut().for_each(echoes);
        proxy.signal(if end == End::Told { Signal::TERM } else { Signal::KILL });
        proxy.wait();
        for descriptors in [100, 150] {
            let mut proxy = launch(descriptors);
            assert_eq!(proxy.wait().code(), Some(1));
            let stderr = proxy.lines.all();
            let line = format!("RLIMIT_NOFILE={descriptors} leaves no room for the stored");
            assert!(stderr.contains(&line) && stderr.contains("stay stored"), "{stderr}");
            assert!(!stderr.contains("closing them"), "{stderr}");
        }
        let proxy = launch(1024);
        proxy.lines.wait_for("Recovered connections: 90.");
        all.iter_mut().for_each(echoes);
    }
}

/// Buffered bytes have descriptors of their own: what is stored may need more than the process had.
#[test]
fn no_more_is_stored_than_the_next_process_can_open() {
    const CONNECTIONS: usize = 100;
    let (front, backend) = (Endpoint::new(Family::Unix), Endpoint::new(Family::Unix));
    let arguments = ["--handover=restart".into(), "-c150".into(), backend.target.clone()];
    let keeper = Keeper::new(4);
    let launch = || {
        let launch = Launch::new(OURS).args(&arguments).listener(&front);
        keeper.launch(launch.descriptors(300), 1).start()
    };
    let mut proxy = launch();
    let mut all: Vec<_> = (0..CONNECTIONS).map(|_| (front.connect(), backend.accept())).collect();
    for (client, served) in &mut all {
        for socket in [client, served] {
            socket.set_write_timeout(Some(Duration::from_millis(20))).unwrap();
            while socket.write(&[0; 16 * 1024]).is_ok() {}
        }
    }
    proxy.signal(Signal::TERM);
    assert!(proxy.wait().success());
    proxy.lines.wait_for("Open connections could not be stored, resetting them: ");
    let proxy = launch();
    proxy.lines.wait_for("Recovered connections: ");
    drop(all);
    let (mut client, mut served) = (front.connect(), backend.accept());
    passes(&mut client, &mut served);
}

/// The answer to a client that has half-closed: an MPTCP socket counts its FIN as a byte that can be read.
#[test]
fn the_answer_to_a_half_closed_mptcp_client_arrives_whole() {
    let socket = || Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::MPTCP));
    let Ok(listener) = socket() else {
        assert!(std::env::var_os("CI").is_none(), "MPTCP is missing");
        return eprintln!("SKIPPED: this kernel has no MPTCP");
    };
    listener.bind(&"127.0.0.1:0".parse::<SocketAddr>().unwrap().into()).unwrap();
    listener.listen(16).unwrap();
    for handover in ["restart", "crash"] {
        let backend = Endpoint::new(Family::Tcp);
        let keeper = Keeper::new(4);
        let arguments = [format!("--handover={handover}"), backend.target.clone()];
        let launch = Launch::new(OURS).args(&arguments).socket(&listener);
        let _proxy = keeper.launch(launch, 1).start();
        let mut client = socket().unwrap();
        client.connect(&listener.local_addr().unwrap()).unwrap();
        client.write_all(b"a question").unwrap();
        client.shutdown(Shutdown::Write).unwrap();
        let mut served = backend.accept();
        assert_eq!(read_all(&mut served).0, b"a question");
        let answer = noise(1, 1_000_000);
        served.write_all(&answer).unwrap();
        drop(served);
        // Both directions are over before the client reads.
        pause(Duration::from_millis(300));
        let (received, end) = read_all(&mut client);
        assert!(received == answer, "{handover}: {} bytes, {end:?}", received.len());
    }
}

#[test]
fn what_is_no_connection_is_closed_and_removed() {
    let file = || tempfile::tempfile().unwrap();
    let name = |end: &str| format!("handover-of-socket-proxyd.{end}");
    let (one, other) = socket_pair(Family::Unix);
    type Put<'a> = &'a dyn Fn(&Keeper);
    let cases: [(&str, Put<'_>); 5] = [
        ("damaged", &|keeper| keeper.put(&name("queue"), file())),
        ("damaged", &|keeper| keeper.put(&name("sender"), &one)),
        ("damaged", &|keeper| {
            keeper.put(&name("queue"), &one);
            keeper.put(&name("sender"), &other);
        }),
        ("closing it: config, peer.", &|keeper| {
            keeper.put("config", file());
            keeper.put("peer", &one);
        }),
        ("can't be taken back, closing them: 3.", &|keeper| {
            let queue = Queue::new().unwrap();
            let [inner, sender] = queue.ends();
            keeper.put(&name("queue"), inner);
            keeper.put(&name("sender"), sender);
            queue.append(b"what is this", &[one.as_fd()]).unwrap();
            queue.append(&[0; 4000], &[one.as_fd(); 200]).unwrap();
            // A socket without its counterpart, in its own form.
            let client = Record { id: 1, start: 0, body: RecordBody::Client(one.as_fd()) };
            let encoded = client.encode();
            let (mut bytes, fds) = encode_message(std::slice::from_ref(&encoded));
            bytes[4 + 36] = 3;
            queue.append(&bytes, &fds).unwrap();
        }),
    ];
    for handover in ["restart", "crash"] {
        for (says, put) in &cases {
            let (front, backend) = (Endpoint::new(Family::Tcp), echo_backend(Family::Unix));
            let keeper = Keeper::new(8);
            put(&keeper);
            let arguments = [format!("--handover={handover}"), backend.target.clone()];
            let mut proxy = launch(&front, &arguments, &keeper);
            keeper.wait_for("READY=1");
            let mut client = front.connect();
            echoes(&mut client);
            proxy.lines.wait_for(says);
            assert_eq!(keeper.names(), [name("queue"), name("sender")]);
            // And it does what it is for.
            proxy.signal(Signal::TERM);
            proxy.wait();
            let _proxy = launch(&front, &arguments, &keeper);
            echoes(&mut client);
        }
    }
}

#[test]
fn a_stranger_is_no_listener_beside_one_that_was_opened() {
    let backend = echo_backend(Family::Unix);
    let keeper = Keeper::new(8);
    keeper.put("config", tempfile::tempfile().unwrap());
    let listen = format!("127.0.0.1:{}", free_port());
    let launch = Launch::new(OURS).args([
        "--handover=crash",
        &format!("--listen={listen}"),
        &backend.target,
    ]);
    let proxy = keeper.launch(launch, 0).start();
    proxy.lines.wait_for("closing it: config.");
    keeper.wait_for("READY=1");
    echoes(&mut connect(&listen.parse::<SocketAddr>().unwrap().into()));
}

#[test]
fn without_a_store_it_warns_and_serves() {
    for handover in ["restart", "crash"] {
        for max in [None, Some(0), Some(1), Some(2)] {
            let (front, backend) = (Endpoint::new(Family::Tcp), echo_backend(Family::Unix));
            let launch = Launch::new(OURS)
                .args([&format!("--handover={handover}"), &backend.target])
                .listener(&front);
            let keeper = max.map(Keeper::new);
            let launch = match &keeper {
                Some(keeper) => keeper.launch(launch, 1),
                None => launch,
            };
            let mut proxy = launch.start();
            echoes(&mut front.connect());
            proxy.signal(Signal::TERM);
            assert_eq!(proxy.wait().code(), Some(0));
            let says = match max {
                None => "there is no NOTIFY_SOCKET",
                Some(_) => "set FileDescriptorStoreMax=4",
            };
            let log = proxy.lines.all();
            assert!(log.matches("--handover=").count() == 1 && log.contains(says), "{log}");
            if let Some(keeper) = keeper {
                assert!(keeper.names().is_empty(), "{:?}", keeper.names());
            }
        }
    }
}

#[test]
fn a_full_store_takes_no_more_and_all_are_served() {
    let (front, backend) = (Endpoint::new(Family::Tcp), Endpoint::new(Family::Unix));
    let keeper = keeper_with_queue(2304);
    let arguments = ["--handover=crash".into(), backend.target.clone()];
    let proxy = launch(&front, &arguments, &keeper);
    keeper.wait_for("READY=1");
    let mut all: Vec<_> = (0..100).map(|_| joined(&front, &backend)).collect();
    all.iter_mut().for_each(|(client, served)| passes(served, client));
    assert_eq!(proxy.lines.count("The store is full"), 1);
    proxy.signal(Signal::KILL);
    drop(proxy);
    let entry = stored(&keeper);
    assert!((1..60).contains(&entry), "{entry}");
    let _proxy = launch(&front, &arguments, &keeper);
    keeper.wait_for("READY=1");
    let mut live = 0;
    for (mut client, mut served) in all {
        let mut answer = [0];
        let is_live = served.write_all(b"?").is_ok() && matches!(client.read(&mut answer), Ok(1));
        live += usize::from(is_live);
    }
    assert_eq!(live, entry);
}

#[test]
fn those_that_come_back_count() {
    for overflow in ["refuse", "wait"] {
        for (handover, end) in WAYS {
            let (front, backend) = (Endpoint::new(Family::Tcp), Endpoint::new(Family::Unix));
            let arguments = [
                &format!("--handover={handover}"),
                "--connections-max=3",
                &format!("--overflow={overflow}"),
                &backend.target,
            ];
            let mut proxy = Proxy::start(&front, &arguments);
            let mut all: Vec<_> = (0..3).map(|_| joined(&front, &backend)).collect();
            proxy.arguments[1] = "--connections-max=2".into();
            proxy.again(end);
            let mut newcomer = front.connect();
            if overflow == "refuse" {
                assert_eq!(read_all(&mut newcomer).0, b"");
            } else {
                newcomer.write_all(b"hello").unwrap();
            }
            all.iter_mut().for_each(|(client, served)| passes(served, client));
            all.truncate(1);
            if overflow == "refuse" {
                let served = poll_until(Instant::now() + PATIENCE, || {
                    let mut client = front.connect();
                    backend.socket.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
                    let (mut served, _) = backend.socket.accept().ok()?;
                    passes(&mut client, &mut served);
                    Some(())
                });
                served.expect("there is a place again");
            } else {
                backend.accept().read_exact(&mut [0; 5]).expect("the newcomer");
            }
        }
    }
}

#[test]
fn urgent_data_is_carried_all_the_same() {
    for (handover, end) in WAYS {
        let (front, backend) = (Endpoint::new(Family::Tcp), Endpoint::new(Family::Unix));
        let handover = format!("--handover={handover}");
        let mut proxy = Proxy::start(&front, &[&handover, &backend.target]);
        let (mut client, mut served) = joined(&front, &backend);
        client.write_all(b"before").unwrap();
        client.send_out_of_band(b"!").unwrap();
        client.write_all(b"after").unwrap();
        let mut read = [0; 12];
        served.read_exact(&mut read).unwrap();
        assert_eq!(&read, b"before!after");
        if end == End::Told {
            proxy.again(end);
            passes(&mut client, &mut served);
        } else {
            // It is not stored any more, since its bytes are in the process now and then.
            proxy.end(end);
            assert!(read_all(&mut served).0.is_empty());
            proxy.running = launch(&front, &proxy.arguments, &proxy.keeper);
            proxy.keeper.wait_for("READY=1");
            assert_eq!(proxy.running.lines.count("Recovered"), 0);
        }
    }
}

#[test]
fn it_grows_with_nothing_but_what_lives() {
    for (handover, end) in WAYS {
        let (front, backend) = (Endpoint::new(Family::Tcp), echo_backend(Family::Tcp));
        let handover = format!("--handover={handover}");
        let mut proxy =
            Proxy::start(&front, &[&handover, "--connections-max=300", &backend.target]);
        let mut quiet: Vec<_> = (0..100).map(|_| front.connect()).collect();
        quiet.iter_mut().for_each(echoes);
        let mut held = Vec::new();
        for _ in 0..8 {
            for _ in 0..100 {
                echoes(&mut front.connect());
            }
            proxy.end(end);
            // Those that were on their way out at the end, and twice what lives.
            let payloads = queue(&proxy.keeper).payloads().unwrap();
            let records: usize = payloads.iter().map(|text| record_ids(text).unwrap().len()).sum();
            assert!(records <= 2 * 200 + 32, "{records} records");
            proxy.running = launch(&front, &proxy.arguments, &proxy.keeper);
            proxy.keeper.wait_for("READY=1");
            quiet.iter_mut().for_each(echoes);
            held.push(proxy.running.descriptors());
        }
        // The last of those that came and went may still be on their way out.
        let [first, last] = [held[1], held[7]];
        assert!(last <= first + 12, "{held:?}");
    }
}

#[test]
fn nobody_is_lost_on_the_way_to_its_event_loop() {
    for (handover, end) in WAYS {
        for threads in ["--threads=1", "--threads=3"] {
            let (front, backend) = (Endpoint::new(Family::Tcp), echo_backend(Family::Unix));
            let handover = format!("--handover={handover}");
            let arguments = [&handover, threads, "--connections-max=2000", &backend.target];
            let mut proxy = Proxy::start(&front, &arguments);
            let mut all = Vec::new();
            for _ in 0..10 {
                // It finds them, and what ends it, at the same time.
                proxy.running.signal(Signal::STOP);
                for _ in 0..50 {
                    let mut client = front.connect();
                    client.write_all(b"?").unwrap();
                    all.push(client);
                }
                proxy.running.signal(if end == End::Told { Signal::TERM } else { Signal::CONT });
                proxy.running.signal(Signal::CONT);
                proxy.again(end);
            }
            let mut lost = 0;
            for client in &mut all {
                lost += usize::from(client.read_exact(&mut [0]).is_err());
            }
            // Between accept(2) and the store there is a moment.
            let most = if end == End::Killed { 10 } else { 0 };
            assert!(
                lost <= most,
                "{lost} of {} are lost, {handover}, {end:?}, {threads}",
                all.len()
            );
        }
    }
}
