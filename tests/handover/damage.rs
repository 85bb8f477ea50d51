//! A descriptor store that is missing, damaged, or holds what the proxy does not know.

use std::os::fd::AsFd;

use rustix::process::Signal;
use socket_proxyd::testing::{Queue, Record, RecordBody, encode_message};
use socket2::Socket;

use crate::launch;
use crate::support::*;

pub(crate) fn register(trials: &mut Trials) {
    for handover in ["restart", "crash"] {
        for (stored, put, line) in DAMAGED {
            trials.add(
                format!(
                    "damaged and unknown descriptors are closed and removed, {handover}, {stored}"
                ),
                move || damage_is_removed(handover, put, line),
            );
        }
        for (store, max) in [
            ("no NOTIFY_SOCKET", None),
            ("FileDescriptorStoreMax=0", Some(0)),
            ("FileDescriptorStoreMax=1", Some(1)),
            ("FileDescriptorStoreMax=2", Some(2)),
        ] {
            trials.add(
                format!("without a store the proxy warns and serves, {handover}, {store}"),
                move || warns_without_a_store(handover, max),
            );
        }
    }
}

/// What is stored, how, and what the log line of it.
type Damaged = (&'static str, fn(&FakeSystemd), &'static str);

const DAMAGED: [Damaged; 5] = [
    ("a file as the queue", file_as_the_queue, "damaged"),
    ("one end of the queue", one_end_of_the_queue, "damaged"),
    ("sockets of another type", stream_sockets_as_the_queue, "damaged"),
    ("unknown descriptors", unknown_descriptors, "are not listening sockets: config, peer."),
    (
        "messages that are not records",
        foreign_messages,
        "restore stored connections, closing them: 3.",
    ),
];

fn file_as_the_queue(systemd: &FakeSystemd) {
    systemd.fd_store.put(&name("queue"), tempfile::tempfile().unwrap());
}

fn one_end_of_the_queue(systemd: &FakeSystemd) {
    systemd.fd_store.put(&name("sender"), open_socket());
}

fn stream_sockets_as_the_queue(systemd: &FakeSystemd) {
    let (one, other) = socket_pair(Family::Unix);
    systemd.fd_store.put(&name("queue"), one);
    systemd.fd_store.put(&name("sender"), other);
}

fn unknown_descriptors(systemd: &FakeSystemd) {
    systemd.fd_store.put("config", tempfile::tempfile().unwrap());
    systemd.fd_store.put("peer", open_socket());
}

fn foreign_messages(systemd: &FakeSystemd) {
    let queue = Queue::new().unwrap();
    let [inner, sender] = queue.ends();
    systemd.fd_store.put(&name("queue"), inner);
    systemd.fd_store.put(&name("sender"), sender);
    let socket = open_socket();
    queue.append(b"what is this", &[socket.as_fd()]).unwrap();
    queue.append(&[0; 4000], &[socket.as_fd(); 200]).unwrap();
    // A record of an unknown kind, which stands behind the header, an id and a start of one byte.
    let client = Record { id: 1, start: 0, body: RecordBody::Client(socket.as_fd()) };
    let sealed = [client.seal()];
    let (mut bytes, fds) = encode_message(&sealed);
    bytes[4 + 8 + 1] = 9;
    queue.append(&bytes, &fds).unwrap();
}

/// A socket whose peer stays open.
fn open_socket() -> Socket {
    let (one, other) = socket_pair(Family::Unix);
    std::mem::forget(other);
    one
}

fn name(end: &str) -> String {
    format!("handover-of-socket-proxyd.{end}")
}

fn damage_is_removed(handover: &str, put: fn(&FakeSystemd), line: &str) {
    let (front, backend) = (Endpoint::new(Family::Tcp), echo_backend(Family::Unix));
    let systemd = FakeSystemd::with_fd_store(8);
    put(&systemd);
    let arguments = [format!("--handover={handover}"), backend.target.clone()];
    let mut proxy = launch(&front, &arguments, &systemd);
    systemd.wait_for("READY=1");
    let mut client = front.connect();
    assert_echoes(&mut client);
    proxy.lines.wait_for(line);
    assert_eq!(systemd.fd_store.names(), [name("queue"), name("sender")]);
    // The new queue works.
    proxy.signal(Signal::TERM);
    proxy.wait();
    let _proxy = launch(&front, &arguments, &systemd);
    assert_echoes(&mut client);
}

fn warns_without_a_store(handover: &str, max: Option<usize>) {
    let (front, backend) = (Endpoint::new(Family::Tcp), echo_backend(Family::Unix));
    let launch = Launch::new(OURS)
        .args([&format!("--handover={handover}"), &backend.target])
        .listener(&front);
    let systemd = max.map(FakeSystemd::with_fd_store);
    let launch = match &systemd {
        Some(systemd) => launch.stored_by(systemd),
        None => launch,
    };
    let mut proxy = launch.start();
    assert_echoes(&mut front.connect());
    proxy.signal(Signal::TERM);
    assert_eq!(proxy.wait().code(), Some(0));
    let line = match max {
        None => "there is no NOTIFY_SOCKET",
        Some(_) => "Set FileDescriptorStoreMax=4",
    };
    let log = proxy.lines.all();
    assert!(log.matches("--handover=").count() == 1 && log.contains(line), "{log}");
    if let Some(systemd) = systemd {
        assert!(systemd.fd_store.names().is_empty(), "{:?}", systemd.fd_store.names());
    }
}
