//! Which steps a flow takes.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use rustix::io::{ioctl_fionbio, ioctl_fionread};
use rustix::net::{RecvFlags, sockopt};

use super::*;

fn tcp_pair() -> [TcpStream; 2] {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let peer = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    [peer, listener.accept().unwrap().0]
}

fn endpoint(fd: impl Into<OwnedFd>, family: Family) -> Endpoint {
    let fd = fd.into();
    ioctl_fionbio(&fd, true).unwrap();
    let mut end = Endpoint::new(Socket::register(fd, family).unwrap());
    end.readable = true;
    end
}

/// Sends bytes, and waits until all of them are there.
fn arrive(mut peer: &TcpStream, near: &TcpStream, bytes: usize) {
    peer.write_all(&vec![7; bytes]).unwrap();
    near.set_nonblocking(false).unwrap();
    let mut buffer = vec![0; bytes];
    let flags = RecvFlags::PEEK | RecvFlags::WAITALL;
    assert_eq!(rustix::net::recv(near, &mut buffer[..], flags).unwrap().0, bytes);
    near.set_nonblocking(true).unwrap();
}

/// Moves all that is there. Returns how many bytes.
fn drive(flow: &mut Flow, [source, sink]: &mut [Endpoint; 2], shared: &LoopBuffers) -> u64 {
    source.readable = true;
    let before = flow.delivered;
    let step = flow.drive(source, sink, &mut usize::MAX.clone(), shared);
    assert!(matches!(step, Ok(Step::Blocked)));
    flow.delivered - before
}

#[tokio::test]
async fn a_turn_ends_with_its_budget() {
    let [(mut client, near), (far, _backend)] = [(); 2].map(|()| UnixStream::pair().unwrap());
    (0..5).for_each(|_| client.write_all(&[0; COPY_SIZE]).unwrap());
    let mut source = endpoint(near, Family::Unix);
    let mut sink = endpoint(far, Family::Unix);
    let (mut flow, mut budget) = (Flow::default(), 3 * COPY_SIZE);
    let step = flow.drive(&mut source, &mut sink, &mut budget, &LoopBuffers::for_tests(1));
    assert!(matches!(step, Ok(Step::Moved)));
    assert_eq!((budget, flow.delivered), (0, 3 * COPY_SIZE as u64));
}

#[tokio::test]
async fn beside_many_stalled_flows_tcp_takes_small_steps() {
    const ALL: usize = 50_000;
    for (family, stalled, held, expected) in [
        (Family::Tcp, 64, 0, 24 * 1024),
        (Family::Tcp, 63, 0, ALL),
        (Family::Tcp, 64, 1, ALL),
        (Family::Unix, 64, 0, ALL),
    ] {
        let shared = LoopBuffers::for_tests(held);
        let _stalled: Vec<_> = (0..stalled).map(|_| shared.stalled.take()).collect();
        let (_peer, far): (OwnedFd, OwnedFd) = match family {
            Family::Tcp => tcp_pair().map(OwnedFd::from).into(),
            _ => UnixStream::pair().map(|(peer, far)| (peer.into(), far.into())).unwrap(),
        };
        sockopt::set_socket_send_buffer_size(&far, 200_000).unwrap();
        let [client, near] = tcp_pair();
        arrive(&client, &near, ALL);
        let mut source = endpoint(near.try_clone().unwrap(), Family::Tcp);
        let mut sink = endpoint(far, family);
        let mode = Mode::Splice { bytes: 0, was_little: false };
        let mut flow = Flow { mode, ..Flow::default() };
        let step = flow.splice_bulk(&mut source, &mut sink, usize::MAX, &shared);
        assert!(matches!(step, Ok(Step::Moved)));
        assert_eq!(ALL - ioctl_fionread(&near).unwrap() as usize, expected, "{family:?}");
    }
}

#[tokio::test]
async fn a_full_buffer_begins_bulk_and_an_empty_socket_ends_it() {
    let mut source = endpoint(UnixStream::pair().unwrap().0, Family::Unix);
    let splice = Mode::Splice { bytes: 0, was_little: false };
    for (mode, bytes, drained, is_bulky) in [
        (Mode::Copy, 100, false, true),
        (Mode::Copy, 99, false, false),
        (Mode::Copy, 99, true, false),
        (splice, 100, false, true),
        (splice, 99, false, true),
        (splice, 99, true, false),
    ] {
        let mut flow = Flow { mode, ..Flow::default() };
        let received = Received { bytes, drained, lost_descriptors: false };
        assert!(flow.account_received(Ok(received), 100, &mut source).is_continue());
        assert_eq!((flow.is_bulky(), source.readable), (is_bulky, !drained), "{mode:?}");
    }
}

#[tokio::test]
async fn a_flow_splices_from_a_full_buffer_until_two_little_bursts() {
    let ([client, near], (far, mut backend)) = (tcp_pair(), UnixStream::pair().unwrap());
    let source = endpoint(near.try_clone().unwrap(), Family::Tcp);
    let mut ends = [source, endpoint(far, Family::Unix)];
    let (mut flow, shared) = (Flow::default(), LoopBuffers::for_tests(1));
    for (number, (bytes, is_bulky)) in [
        (10, false),
        (40_000, true),
        (BULK_MIN, true),
        (BULK_MIN, true),
        (10, true),
        (BULK_MIN, true),
        (10, true),
        (10, false),
    ]
    .into_iter()
    .enumerate()
    {
        arrive(&client, &near, bytes);
        assert_eq!(drive(&mut flow, &mut ends, &shared), bytes as u64);
        backend.read_exact(&mut vec![0; bytes]).unwrap();
        assert_eq!(flow.is_bulky(), is_bulky, "burst {number}");
    }
}

#[tokio::test]
async fn a_stored_pipe_grows_only_for_bulk() {
    let ([client, near], (far, _backend)) = (tcp_pair(), UnixStream::pair().unwrap());
    let source = endpoint(near.try_clone().unwrap(), Family::Tcp);
    let mut ends = [source, endpoint(far, Family::Unix)];
    let (mut flow, shared) = (Flow::default(), LoopBuffers::for_tests(1));
    flow.use_stored_pipe(&shared).unwrap();
    arrive(&client, &near, 10);
    assert_eq!(drive(&mut flow, &mut ends, &shared), 10);
    assert!(!flow.is_bulky());
    let Buffered::StoredPipe(pipe) = &mut flow.buffered else { panic!("it is stored") };
    pipe.grow();
    assert!(flow.is_bulky());
}
