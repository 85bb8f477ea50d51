//! What the proxy's Unix peers see of it.

use std::io::{ErrorKind, Read, Write};

use crate::support::*;

#[test]
fn backend_sees_the_proxy_as_its_peer() {
    let (front, backend) = (Endpoint::new(Family::Unix), Endpoint::new(Family::Unix));
    let proxy = Launch::new(OURS).arg(&backend.target).listener(&front).start();
    let _client = front.connect();
    let peer = rustix::net::sockopt::socket_peercred(backend.accept()).unwrap();
    assert_eq!(peer.pid.as_raw_nonzero().get() as u32, proxy.pid());
}

#[test]
fn client_with_unread_bytes_sees_a_reset() {
    let (front, backend) = (Endpoint::new(Family::Unix), Endpoint::new(Family::Tcp));
    let _proxy = Launch::new(OURS).arg(&backend.target).listener(&front).start();
    let mut client = front.connect();
    let served = backend.accept();
    // More than the backend and the sockets between them take.
    client.set_nonblocking(true).unwrap();
    let message = random_bytes(1, 1 << 20);
    let is_stalled = || match client.write(&message) {
        Err(error) if error.kind() == ErrorKind::WouldBlock => Some(()),
        _ => None,
    };
    poll_until(tokio::time::Instant::now() + TIMEOUT, is_stalled).expect("the client is stalled");
    client.set_nonblocking(false).unwrap();
    reset(served);
    let error = client.read(&mut [0]).expect_err("not the end of the bytes");
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
}
