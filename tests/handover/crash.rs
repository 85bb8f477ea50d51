//! What a kill finds half done, and what `--handover=crash` costs others.

use std::io::Write;
use std::time::Duration;

use rustix::process::Signal;
use tokio::time::Instant;

use crate::support::*;
use crate::{End, MODES, Mode, Proxy, established, launch, queue, stored};

pub(crate) fn register(trials: &mut Trials) {
    for (backend_resets, end) in [(false, "the client's"), (true, "the backend's")] {
        trials
            .add(format!("a reset that was read and not stored stays a reset, {end}"), move || {
                unstored_reset_stays_a_reset(backend_resets)
            });
    }
    for mode in MODES {
        for threads in [1, 2] {
            trials.add(
                format!("a kill during recovery loses nothing, {mode}, {threads} threads"),
                move || kill_during_recovery(mode, threads),
            );
        }
    }
    for (backend_wait, when) in [("0", "at once"), ("300ms", "after a wait")] {
        for end in [End::Killed, End::Stopped] {
            trials.add(
                format!("a refused request is not delivered later, {when}, {end:?}"),
                move || refused_stays_refused(backend_wait, end),
            );
        }
    }
    for (from_client, end) in [(true, "clients"), (false, "backends")] {
        for (with_descriptors, kind) in [(false, "bytes"), (true, "descriptors")] {
            trials.add(
                format!("a flood of one-byte messages delays no other client, {kind} from {end}"),
                move || flood_delays_no_other_client(from_client, with_descriptors),
            );
        }
    }
}

fn unstored_reset_stays_a_reset(backend_resets: bool) {
    let [front, backend] = [Family::Tcp, Family::Tcp].map(Endpoint::new);
    let mut proxy = Proxy::start(&front, &["--handover=crash", &backend.target]);
    let (mut client, mut served) = established(&front, &backend);
    assert_forwards(&mut client, &mut served);
    assert_forwards(&mut served, &mut client);
    proxy.stop(End::Killed);
    let (mut resets, mut stays) = if backend_resets { (served, client) } else { (client, served) };
    resets.write_all(b"a part").unwrap();
    reset(resets);
    // As the process may have done before the kill.
    let queue = queue(&proxy.systemd);
    for message in queue.messages() {
        for fd in message.unwrap().fds {
            let _ = socket2::SockRef::from(&fd).take_error();
        }
    }
    proxy.running = launch(&front, &proxy.arguments, &proxy.systemd);
    proxy.systemd.wait_for("READY=1");
    let (bytes, end) = read_all(&mut stays);
    assert_eq!(bytes, b"a part");
    assert!(is_reset(&end), "{end:?}");
}

fn refused_stays_refused(backend_wait: &str, end: End) {
    let [front, backend] = [Family::Unix; 2].map(Endpoint::new);
    let wait = format!("--backend-wait={backend_wait}");
    let mut proxy = Proxy::start(&front, &["--handover=crash", &wait, &backend.target]);
    // An older connection, so that the record of the next is not the first in the queue.
    let (_client, _served) = established(&front, &backend);
    std::fs::remove_file(&backend.target).unwrap();
    // It has sent its request before it is refused.
    proxy.running.suspend();
    let mut refused = front.connect();
    refused.write_all(b"POST /pay").unwrap();
    proxy.running.signal(Signal::CONT);
    assert_eq!(read_all(&mut refused).0, b"", "there is no backend");
    let again = Endpoint::unix(backend.target.as_ref(), 16);
    proxy.replace(end);
    proxy.running.lines.wait_for("Recovered connections: 1.");
    let (mut client, mut served) = (front.connect(), again.accept());
    assert_forwards(&mut client, &mut served);
}

fn kill_during_recovery(Mode { handover, end }: Mode, threads: usize) {
    let (front, backend) = (Endpoint::new(Family::Tcp), Endpoint::new(Family::Unix));
    let handover = format!("--handover={handover}");
    let threads = format!("--threads={threads}");
    let arguments = [&handover, "--connections-max=2000", &threads, &backend.target];
    let mut proxy = Proxy::start(&front, &arguments);
    let mut all: Vec<_> = (0..300).map(|_| established(&front, &backend)).collect();
    proxy.stop(end);
    let stored_before = stored(&proxy.systemd);
    assert_eq!(stored_before, all.len());
    for _ in 0..3 {
        // While the process reads the store. Its descriptors show that; a reader here would move the read
        // position that both share.
        proxy.running = launch(&front, &proxy.arguments, &proxy.systemd);
        let is_reading = || {
            let links = std::fs::read_dir(format!("/proc/{}/fd", proxy.running.pid()));
            (links.unwrap().count() > 40).then_some(())
        };
        poll_until(Instant::now() + TIMEOUT, is_reading).unwrap();
        proxy.running.suspend();
        if handover == "--handover=restart" && stored(&proxy.systemd) < all.len() {
            // It has read all records and is emptying the store: the recovery is over.
            proxy.running.signal(Signal::CONT);
            proxy.stop(End::Stopped);
        } else {
            proxy.stop(End::Killed);
        }
    }
    proxy.running = launch(&front, &proxy.arguments, &proxy.systemd);
    proxy.running.lines.wait_for("Recovered connections: 300.");
    proxy.systemd.wait_for("STATUS=300 of 2000 connections, 0 served, 0 bytes; 300 recovered");
    for (client, served) in &mut all {
        assert_forwards(client, served);
        assert_forwards(served, client);
    }
}

/// Within 0.1 s, as in tests/compat/flood.rs.
fn flood_delays_no_other_client(from_client: bool, with_descriptors: bool) {
    let [from, to] = [Family::Unix, Family::Tcp].map(Endpoint::new);
    let (front, backend) = if from_client { (from, to) } else { (to, from) };
    let _proxy = Proxy::start(&front, &["--handover=crash", &backend.target]);
    let times = floods::beside_floods(&front, &backend, from_client, with_descriptors);
    assert!(times[7] < Duration::from_millis(100), "answers took {times:?}");
}
