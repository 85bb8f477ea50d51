//! --connections-max-per-source=: as many connections of one client, and no more.

use std::thread;

use tokio::time::Instant;

use crate::support::*;

/// Connections that were served and have ended.
fn ended(proxy: &Running) -> usize {
    proxy.lines.count("Connection closed after")
        + proxy.lines.count("Connection ended by the client after")
}

#[test]
fn limit_of_a_source_is_exact() {
    for options in [&["--threads=4"][..], &["--threads=1", "--overflow=wait"]] {
        let (front, backend) = (Endpoint::new(Family::Tcp), echo_backend(Family::Tcp));
        let launch = Launch::new(OURS).listener(&front).args(options);
        let proxy = launch
            .args(["--log-level=debug", "--connections-max-per-source=7", &backend.target])
            .start();
        let mut served_before = 0;
        for _ in 0..3 {
            let mut clients = Vec::new();
            thread::scope(|scope| {
                let threads: Vec<_> = (0..50)
                    .map(|number| {
                        let source = ["127.0.0.2", "127.0.0.3"][number % 2];
                        let front = &front;
                        scope.spawn(move || {
                            let mut client = connect_from(source, &front.address);
                            let is_served = exchange(&mut client, b"me?").is_ok();
                            is_served.then_some((source, client))
                        })
                    })
                    .collect();
                clients.extend(threads.into_iter().filter_map(|it| it.join().unwrap()));
            });
            for source in ["127.0.0.2", "127.0.0.3"] {
                let served = clients.iter().filter(|(from, _)| *from == source).count();
                assert_eq!(served, 7, "{source} {options:?}");
            }
            assert_echoes(&mut connect_from("127.0.0.4", &front.address));
            drop(clients);
            served_before += 15;
            let all_ended = || (ended(&proxy) == served_before).then_some(());
            poll_until(Instant::now() + TIMEOUT, all_ended).expect("all connections end");
        }
        let line = proxy.lines.wait_for("Hit connection limit for one source, refusing connection");
        assert!(line.contains("(client 127.0.0."), "{line}");
    }
}
