//! Plays systemd's file descriptor store, as far as a proxy needs it to run with `--handover=`.

use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::thread;

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use socket2::SockRef;

/// Keeps what it is given until it is dropped.
pub(crate) struct Keeper {
    socket: UnixDatagram,
    pub(crate) path: PathBuf,
}

impl Keeper {
    pub(crate) fn start(directory: &Path) -> Self {
        let path = directory.join("notify");
        let socket = UnixDatagram::bind(&path).expect("a directory of our own");
        let inner = socket.try_clone().expect("a descriptor");
        thread::spawn(move || {
            let mut kept = Vec::new();
            let mut bytes = [0; 4096];
            loop {
                let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
                let mut control = RecvAncillaryBuffer::new(&mut space);
                let iov = &mut [IoSliceMut::new(&mut bytes)];
                match recvmsg(&inner, iov, &mut control, RecvFlags::CMSG_CLOEXEC) {
                    Ok(received) if received.bytes > 0 => {}
                    _ => return,
                }
                // What comes with anything else is closed, which is the answer to a BARRIER=1.
                if bytes.starts_with(b"FDSTORE=1") {
                    for message in control.drain() {
                        if let RecvAncillaryMessage::ScmRights(fds) = message {
                            kept.extend(fds);
                        }
                    }
                }
            }
        });
        Self { socket, path }
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        let _ = SockRef::from(&self.socket).shutdown(Shutdown::Both);
    }
}
