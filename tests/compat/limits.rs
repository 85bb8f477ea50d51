//! Connections, descriptors and pipes.

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::Duration;

use socket2::Socket;
use tokio::time::Instant;

use crate::Cases;
use crate::Expected::{FailsBefore, OnlyOurs, OursAlone};
use crate::support::*;

pub(crate) fn register(cases: &mut Cases) {
    let one_more = FailsBefore(258, "was served above the limit");
    cases.add("the connection limit is exact", one_more, exact_limit);
    cases.add(
        "reaches the connection limit before that of descriptors",
        OursAlone,
        limit_with_few_descriptors,
    );
    cases.add(
        "clients above the limit wait with --overflow=wait",
        OnlyOurs("unrecognized option"),
        overflow_waits,
    );
    cases.add(
        "serves 4,000 idle clients with 20,000 descriptors",
        OnlyOurs("of 4000"),
        idle_clients,
    );
    cases.add("serves 60 clients with 40 descriptors", OnlyOurs("dropped"), few_descriptors);
    let not_raised = FailsBefore(258, "the echo backend answers");
    cases.add("raises the soft limit of descriptors", not_raised, soft_limit);
    cases.add("an idle connection has two descriptors", OnlyOurs("and not 2"), idle_descriptors);
    cases.add("idle connections hold no pipes", OnlyOurs("held by 20 idle"), idle_after_bulk);
    cases.add("stalled connections hold few pipes", OnlyOurs("pipes for 60 stalled"), stalled_bulk);
    let spliced = OnlyOurs("ends of pipes");
    cases.add_as_root("copies when the pipes of its user are used up", spliced, pipes_used_up);
}

fn exact_limit(program: &Path) {
    let (front, backend) = (Endpoint::new(Family::Tcp), echo_backend(Family::Tcp));
    let args = ["--connections-max=2", &backend.target];
    let _proxy = Launch::new(program).args(args).listener(&front).start();
    let mut first = front.connect();
    assert_echoes(&mut first);
    let mut second = front.connect();
    assert_echoes(&mut second);
    let mut third = front.connect();
    is_refused(&mut third);
    drop(first);
    let deadline = Instant::now() + TIMEOUT;
    let served = poll_until(deadline, || exchange(&mut front.connect(), b"now?").ok());
    served.expect("a place that came free is given away");
    assert_echoes(&mut second);
}

fn limit_with_few_descriptors(program: &Path) {
    // Descriptors for the default limit and hardly more.
    const LIMIT: usize = 256;
    let (front, backend) = (Endpoint::new(Family::Tcp), echo_backend(Family::Tcp));
    let launch = Launch::new(program).arg(&backend.target).descriptors(1024);
    let proxy = launch.listener(&front).start();
    let mut clients: Vec<_> = (0..LIMIT).map(|_| front.connect()).collect();
    clients.iter_mut().for_each(assert_echoes);
    is_refused(&mut front.connect());
    proxy.lines.wait_for("Hit connection limit, refusing connection");
}

/// Asserts that a client is closed or reset: neither served nor left to wait.
fn is_refused(client: &mut Socket) {
    match exchange(client, b"me too?") {
        Ok(_) => panic!("was served above the limit"),
        Err(error) => assert_ne!(error.kind(), ErrorKind::WouldBlock, "was left to wait"),
    }
}

fn overflow_waits(program: &Path) {
    for front in [Family::Tcp, Family::Unix] {
        let (front, backend) = (Endpoint::new(front), echo_backend(Family::Unix));
        let args = ["--connections-max=2", "--overflow=wait", &backend.target];
        let mut proxy = Launch::new(program).args(args).listener(&front).start();
        let mut first = front.connect();
        if !answers(&mut first, &mut proxy) {
            panic!("{}", proxy.lines.all());
        }
        let mut second = front.connect();
        assert_echoes(&mut second);
        let mut waiting: Vec<_> = (0..4).map(|_| front.connect()).collect();
        for client in &mut waiting {
            client.write_all(b"here!").unwrap();
            client.set_nonblocking(true).unwrap();
        }
        proxy.lines.wait_for("Hit connection limit, new clients wait in the kernel");
        let before = proxy.cpu();
        pause(Duration::from_millis(500));
        assert!(proxy.cpu() - before < Duration::from_millis(50), "it waits, too");
        let served = |client: &mut Socket| match client.read(&mut [0; 5]) {
            Ok(5) => true,
            Err(error) if error.kind() == ErrorKind::WouldBlock => false,
            other => panic!("was not left to wait: {other:?}"),
        };
        assert!(!waiting.iter_mut().any(served), "served above the limit");
        assert_echoes(&mut second);
        // They are served in order, each when another client has left.
        let mut leaving = vec![first, second];
        for place in 0..waiting.len() {
            drop(leaving.remove(0));
            let deadline = Instant::now() + TIMEOUT;
            poll_until(deadline, || served(&mut waiting[place]).then_some(())).expect("its turn");
            assert!(!waiting[place + 1..].iter_mut().any(served), "out of its turn");
            leaving.push(waiting[place].try_clone().unwrap());
            waiting[place].set_nonblocking(false).unwrap();
            assert_echoes(&mut waiting[place]);
            // The last reference is the one in `leaving`.
            waiting[place] = front.connect();
            waiting[place].set_nonblocking(true).unwrap();
        }
        assert_eq!(proxy.lines.count("new clients wait in the kernel"), 1);
    }
}

/// Whether the program serves. Otherwise it has ended because of an unknown option.
fn answers(client: &mut Socket, proxy: &mut Running) -> bool {
    client.write_all(b"hello").unwrap();
    client.set_nonblocking(true).unwrap();
    let answered = poll_until(Instant::now() + TIMEOUT, || match client.read(&mut [0; 5]) {
        Ok(5) => Some(true),
        _ => (!proxy.is_running()).then_some(false),
    });
    client.set_nonblocking(false).unwrap();
    answered.expect("an answer, or an end")
}

fn idle_clients(program: &Path) {
    const CLIENTS: usize = 4000;
    let (front, backend) = (Endpoint::new(Family::Tcp), Endpoint::new(Family::Tcp));
    let args = ["--connections-max=4096", &backend.target];
    let proxy = Launch::new(program).args(args).descriptors(20_000).listener(&front).start();
    echo_many(&backend);
    let before = poll_until(Instant::now() + TIMEOUT, || {
        Some(proxy.descriptors()).filter(|&count| count > 4)
    });
    let mut clients: Vec<_> = (0..CLIENTS).map(|_| front.connect()).collect();
    let served = clients.iter_mut().filter_map(|client| {
        client.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        exchange(client, b"still there?").ok()
    });
    let served = served.count();
    assert_eq!(served, CLIENTS, "{served} of 4000 were served");
    let descriptors = proxy.descriptors() - before.unwrap();
    assert!(descriptors <= 2 * CLIENTS + 16, "{descriptors} descriptors of 4000 clients");
}

/// One thread for thousands of clients that speak one after the other.
fn echo_many(backend: &Endpoint) {
    let listener = backend.socket.try_clone().unwrap();
    thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            listener.set_nonblocking(true).unwrap();
            let listener = tokio::net::TcpListener::from_std(listener.into()).unwrap();
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(async move {
                    let mut buffer = [0; 256];
                    while stream.readable().await.is_ok() {
                        match stream.try_read(&mut buffer) {
                            Ok(0) => break,
                            Ok(bytes) => drop(stream.try_write(&buffer[..bytes])),
                            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                            Err(_) => break,
                        }
                    }
                });
            }
        });
    });
}

fn few_descriptors(program: &Path) {
    const CLIENTS: usize = 60;
    let (front, backend) = (Endpoint::new(Family::Tcp), echo_backend(Family::Tcp));
    let proxy = Launch::new(program).arg(&backend.target).descriptors(40).listener(&front).start();
    let mut waiting: Vec<_> = (0..CLIENTS).map(|_| front.connect()).collect();
    for client in &mut waiting {
        client.write_all(b"here!").unwrap();
        client.set_nonblocking(true).unwrap();
    }
    let mut served = Vec::new();
    let mut measured = false;
    while !waiting.is_empty() {
        let mut answered = Vec::new();
        let found = poll_until(Instant::now() + Duration::from_secs(5), || {
            waiting.retain_mut(|client| match client.read(&mut [0; 5]) {
                Ok(5) => {
                    answered.push(client.try_clone().unwrap());
                    false
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => true,
                other => panic!("a client was dropped: {other:?}"),
            });
            (!answered.is_empty()).then_some(())
        });
        found.expect("a waiting client is served when others leave, and none is dropped");
        served.append(&mut answered);
        if !measured {
            measured = true;
            let before = proxy.cpu();
            pause(Duration::from_secs(2));
            let cpu = proxy.cpu() - before;
            assert!(cpu < Duration::from_millis(100), "{cpu:?} of CPU in 2 s, none is dropped");
            let logged = proxy.lines.count("Out of file descriptors");
            assert_eq!(logged, 1, "warnings, and none is dropped");
            // Served clients stay open while the others wait, and are still served.
            for client in &mut served {
                client.set_nonblocking(false).unwrap();
                assert_echoes(client);
                client.set_nonblocking(true).unwrap();
            }
        }
        served.clear();
    }
}

fn soft_limit(program: &Path) {
    let (front, backend) = (Endpoint::new(Family::Tcp), echo_backend(Family::Tcp));
    let launch = Launch::new(program).arg(&backend.target).soft_descriptors(40);
    let _proxy = launch.listener(&front).start();
    let mut clients: Vec<_> = (0..60).map(|_| front.connect()).collect();
    clients.iter_mut().for_each(assert_echoes);
}

fn idle_descriptors(program: &Path) {
    const CLIENTS: usize = 10;
    let (front, backend) = (Endpoint::new(Family::Tcp), echo_backend(Family::Tcp));
    let proxy = Launch::new(program).arg(&backend.target).listener(&front).start();
    let mut first = front.connect();
    assert_echoes(&mut first);
    let before = proxy.descriptors();
    let mut clients: Vec<_> = (0..CLIENTS).map(|_| front.connect()).collect();
    clients.iter_mut().for_each(assert_echoes);
    let each = (proxy.descriptors() - before) / CLIENTS;
    assert_eq!(each, 2, "{each} descriptors an idle connection, and not 2");
}

fn idle_after_bulk(program: &Path) {
    const CLIENTS: usize = 20;
    let (front, backend) = (Endpoint::new(Family::Tcp), echo_backend(Family::Tcp));
    let proxy = Launch::new(program).arg(&backend.target).listener(&front).start();
    // One for each event loop there may be.
    let mut first: Vec<_> = (0..3).map(|_| front.connect()).collect();
    first.iter_mut().for_each(assert_echoes);
    let before = proxy.descriptors();
    let message = random_bytes(5, 4_000_000);
    let mut clients: Vec<_> = (0..CLIENTS).map(|_| front.connect()).collect();
    for client in &mut clients {
        let mut writer = client.try_clone().unwrap();
        thread::scope(|scope| {
            scope.spawn(|| writer.write_all(&message).unwrap());
            let mut answer = vec![0; message.len()];
            client.read_exact(&mut answer).unwrap();
            assert!(answer == message);
        });
    }
    let held = proxy.descriptors() - before;
    // On each event loop one pipe for each direction of the one that was busy stays in the pool.
    assert!(held <= 2 * CLIENTS + 3 * 4, "{held} descriptors held by 20 idle connections");
}

fn stalled_bulk(program: &Path) {
    const CLIENTS: usize = 60;
    for back in [Family::Tcp, Family::Unix] {
        let (front, backend) = (Endpoint::new(Family::Tcp), Endpoint::new(back));
        let proxy = Launch::new(program).arg(&backend.target).listener(&front).start();
        let message = random_bytes(6, 4 * 1024 * 1024);
        let clients: Vec<_> = (0..CLIENTS).map(|_| front.connect()).collect();
        // More than the kernel holds for a receiver that takes nothing, in large pieces.
        let mut sent = vec![0; CLIENTS];
        for (client, sent) in clients.iter().zip(&mut sent) {
            client.set_send_buffer_size(64 * 1024).unwrap();
            client.set_nonblocking(true).unwrap();
            let stuck = || {
                let before = *sent;
                loop {
                    match client.send(&message[*sent % message.len()..]) {
                        Ok(bytes) => *sent += bytes,
                        Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                        Err(error) => panic!("{error}"),
                    }
                }
                (*sent == before && proxy.is_asleep()).then_some(())
            };
            poll_until(Instant::now() + TIMEOUT, stuck).expect("the sender is stuck");
        }
        // Sixteen among the event loops, and those that hold a remainder.
        let (pipes, loops) = (proxy.pipes() / 2, 1 + proxy.workers());
        assert!(pipes <= 16 + 4 * loops, "{pipes} pipes for 60 stalled connections");
        assert!(pipes >= 16 / loops * loops, "{pipes} pipes: the limit is not reached");
        // Everything arrives as soon as it is taken.
        let mut arrived: Vec<_> = (0..CLIENTS).map(|_| backend.accept()).collect();
        for client in &clients {
            client.shutdown(Shutdown::Write).unwrap();
        }
        let mut received: Vec<_> = thread::scope(|scope| {
            let read = |socket| {
                let (bytes, end) = read_all(socket);
                end.unwrap();
                assert!(bytes.chunks(message.len()).all(|piece| message.starts_with(piece)));
                bytes.len()
            };
            let readers: Vec<_> =
                arrived.iter_mut().map(|socket| scope.spawn(move || read(socket))).collect();
            readers.into_iter().map(|reader| reader.join().unwrap()).collect()
        });
        received.sort_unstable();
        sent.sort_unstable();
        assert_eq!(received, sent);
    }
}

fn pipes_used_up(program: &Path) {
    // Another process has used up the user's pipe-user-pages-soft (pipe(7); 1024 pipes of 16 pages). A new
    // pipe is too small to splice through, so that bytes are copied.
    let spend = "for (1..1100) { pipe($r, $w) or die; push @pipes, $r, $w; undef $r; undef $w } \
                 print STDERR \"spent\\n\"; sleep";
    // The end of another case's process would give its pipes back.
    static USER: AtomicU32 = AtomicU32::new(64_100);
    let user = USER.fetch_add(1, Ordering::Relaxed);
    let hog = Launch::new("/usr/bin/perl").args(["-e", spend]).descriptors(4096).user(user);
    let hog = hog.start();
    hog.lines.wait_for("spent");
    let (front, backend) = (Endpoint::new(Family::Tcp), echo_backend(Family::Tcp));
    let launch = Launch::new(program).arg(&backend.target).listener(&front).user(user);
    let proxy = launch.start();
    let mut client = front.connect();
    let before = proxy.pipes();
    let message = random_bytes(12, 20_000_000);
    let mut writer = client.try_clone().unwrap();
    thread::scope(|scope| {
        // An original may also stand still on a pipe of one page; the reader says so.
        scope.spawn(|| drop(writer.write_all(&message)));
        let mut answer = vec![0; message.len()];
        let read = client.read_exact(&mut answer);
        read.unwrap_or_else(|error| panic!("stuck between ends of pipes: {error}"));
        assert!(answer == message);
    });
    // A pipe that was used would be in the pool.
    let kept = proxy.pipes().saturating_sub(before);
    assert_eq!(kept, 0, "ends of pipes while there is no quota for them");
}
