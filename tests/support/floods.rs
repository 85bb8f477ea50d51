//! Floods of messages of one byte.

use std::io::IoSlice;
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd};
use std::thread;
use std::time::Duration;

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use socket2::Socket;
use tokio::time::Instant;

use super::*;

/// Two connections flood, from their clients or from their backends. How long 15 answers to another
/// client took meanwhile, sorted.
pub fn beside_floods(
    front: &Endpoint,
    backend: &Endpoint,
    from_client: bool,
    with_descriptors: bool,
) -> Vec<Duration> {
    let floods: Vec<_> = (0..2).map(|_| (front.connect(), backend.accept())).collect();
    serve(backend, echo);
    let mut client = front.connect();
    assert_echoes(&mut client);
    let mut times: Vec<Duration> = thread::scope(|scope| {
        for (near, far) in &floods {
            let (from, to) = if from_client { (near, far) } else { (far, near) };
            scope.spawn(move || flood(from, with_descriptors));
            // Only now and then: it is not to keep the others from their processors.
            receive_at_least(to, 64 * 1024);
            scope.spawn(move || read_all(&mut to.try_clone().unwrap()));
        }
        // They are under way.
        pause(Duration::from_millis(300));
        let ask = || {
            let start = Instant::now();
            assert_echoes(&mut client);
            start.elapsed()
        };
        let times = std::iter::repeat_with(ask).take(15).collect();
        for (near, far) in &floods {
            let _ = (near.shutdown(Shutdown::Both), far.shutdown(Shutdown::Both));
        }
        times
    });
    times.sort();
    times
}

/// Sends messages of one byte, each with a descriptor if asked to, until the socket fails.
pub fn flood(socket: &Socket, with_descriptors: bool) {
    let fds = [socket.as_fd()];
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    loop {
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(!with_descriptors || control.push(SendAncillaryMessage::ScmRights(&fds)));
        let byte = [IoSlice::new(b"x")];
        match rustix::net::sendmsg(socket, &byte, &mut control, SendFlags::NOSIGNAL) {
            Ok(_) | Err(rustix::io::Errno::TOOMANYREFS) => {}
            Err(_) => return,
        }
    }
}

/// Has a socket wake its reader for so many bytes only (SO_RCVLOWAT in socket(7)).
fn receive_at_least(socket: &Socket, bytes: libc::c_int) {
    // SAFETY: setsockopt(2) reads an int.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_RCVLOWAT,
            (&raw const bytes).cast(),
            size_of_val(&bytes) as libc::socklen_t,
        )
    };
    assert_eq!(result, 0);
}
