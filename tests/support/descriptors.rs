//! Descriptors that Unix peers pass to each other.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::{MemfdFlags, fstat, memfd_create};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

/// New files.
pub fn files(count: usize) -> Vec<OwnedFd> {
    (0..count).map(|_| memfd_create(c"passed", MemfdFlags::CLOEXEC).unwrap()).collect()
}

pub fn inodes(files: &[OwnedFd]) -> Vec<u64> {
    files.iter().map(|file| fstat(file).unwrap().st_ino).collect()
}

/// Sends bytes, and descriptors with the first of them. Returns how many bytes were sent.
pub fn pass(socket: impl AsFd, bytes: &[u8], files: &[OwnedFd]) -> Result<usize, Errno> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let files: Vec<BorrowedFd<'_>> = files.iter().map(AsFd::as_fd).collect();
    if !files.is_empty() {
        assert!(control.push(SendAncillaryMessage::ScmRights(&files)));
    }
    sendmsg(socket, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL)
}

/// Receives at most so many bytes, and the descriptors that come with them.
pub fn receive_passed(socket: impl AsFd, most: usize) -> Result<(Vec<u8>, Vec<OwnedFd>), Errno> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut bytes = vec![0; most];
    let iov = &mut [IoSliceMut::new(&mut bytes)];
    let received = recvmsg(socket, iov, &mut control, RecvFlags::CMSG_CLOEXEC)?.bytes;
    bytes.truncate(received);
    let mut files = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(fds) = message {
            files.extend(fds);
        }
    }
    Ok((bytes, files))
}

/// Has the kernel refuse descriptors for a socket: SO_PASSRIGHTS, Linux 6.16.
pub fn refuse_descriptors(socket: &impl AsRawFd) -> std::io::Result<()> {
    const SO_PASSRIGHTS: i32 = 83;
    set_socket_option(socket, SO_PASSRIGHTS, 0)
}

/// Lets the kernel add credentials, a label and since Linux 6.5 a pidfd to what a socket receives, and
/// to what the connections of a listener receive.
pub fn add_credentials(socket: &impl AsRawFd) {
    const SO_PASSPIDFD: i32 = 76;
    for option in [libc::SO_PASSCRED, libc::SO_PASSSEC] {
        set_socket_option(socket, option, 1).unwrap();
    }
    match set_socket_option(socket, SO_PASSPIDFD, 1) {
        Err(error) if error.raw_os_error() == Some(libc::ENOPROTOOPT) => {}
        result => result.unwrap(),
    }
}

fn set_socket_option(socket: &impl AsRawFd, option: i32, value: i32) -> std::io::Result<()> {
    // SAFETY: setsockopt(2) reads an int.
    let result = unsafe {
        let (fd, length) = (socket.as_raw_fd(), size_of_val(&value) as libc::socklen_t);
        libc::setsockopt(fd, libc::SOL_SOCKET, option, (&raw const value).cast(), length)
    };
    if result == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
}
