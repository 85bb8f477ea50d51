//! Sockets that `--listen=` opens, and the socket files that it replaces and removes.

use std::fs::{self, File};
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::time::Duration;

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use socket2::{Domain, SockAddr, SockRef, Socket, Type};
use tokio::time::sleep;

use crate::config::listen_address::{ListenAddress, ListenPlace};
use crate::listen::stored::{SocketFile, StoredListener};
use crate::logging::os_message;
use crate::socket::address::{Address, SocketKind};
use crate::socket::resolve::resolve;

/// A socket that listens or, for datagrams, is bound; and its socket file.
pub type OpenedSocket = (OwnedFd, Option<SocketFile>);

/// Opens one socket, or one for each address of a host.
///
/// Sockets of the previous process are taken out of `stored` and reused.
///
/// # Errors
/// A line for the log that names the address.
pub async fn open(
    address: &ListenAddress,
    stored: &mut Vec<StoredListener>,
) -> Result<Vec<OpenedSocket>, String> {
    let kind = address.kind;
    let opened = match &address.place {
        ListenPlace::Address(address) => {
            open_named(kind, address, stored).await.map(|socket| vec![socket])
        }
        ListenPlace::Any(port) => {
            // The IPv6 listener is dual-stack. A kernel without IPv6 gets an IPv4 listener.
            let addresses =
                [(Ipv6Addr::UNSPECIFIED, *port).into(), (Ipv4Addr::UNSPECIFIED, *port).into()];
            open_each(kind, &addresses, true, stored)
        }
        ListenPlace::Host(host) => {
            let addresses = match host.literal() {
                Some(address) => vec![address],
                None => resolve(host, None, false)
                    .await
                    .map_err(|error| format!("Failed to listen on {address}: {error}."))?,
            };
            // With port 0 the kernel would choose another port for each address.
            open_each(kind, &addresses, host.port == "0", stored)
        }
    };
    opened.map_err(|error| {
        let hint = match &address.place {
            ListenPlace::Address(address) => address.hint(&error),
            _ => "",
        };
        format!("Failed to listen on {address}: {}{hint}.", os_message(&error))
    })
}

/// Opens a socket on each of `addresses`, or only on the first that this machine has. Skips those
/// that it does not have: `localhost`, for example, may be `::1` where IPv6 is off.
///
/// # Errors
/// The machine has none of the addresses, or one cannot be used.
fn open_each(
    kind: SocketKind,
    addresses: &[SocketAddr],
    only_first: bool,
    stored: &mut Vec<StoredListener>,
) -> io::Result<Vec<OpenedSocket>> {
    let mut opened = Vec::new();
    let mut missing = None;
    for &address in addresses {
        match open_inet(kind, address, stored) {
            Ok(socket) if only_first => return Ok(vec![socket]),
            Ok(socket) => opened.push(socket),
            Err(error) => match Errno::from_io_error(&error) {
                Some(Errno::AFNOSUPPORT | Errno::ADDRNOTAVAIL) => missing = Some(error),
                _ => return Err(error),
            },
        }
    }
    match missing {
        Some(error) if opened.is_empty() => Err(error),
        _ => Ok(opened),
    }
}

fn open_inet(
    kind: SocketKind,
    address: SocketAddr,
    stored: &mut Vec<StoredListener>,
) -> io::Result<OpenedSocket> {
    let has_port = |found: &Address| found.port() == Some(address.port());
    let is_same = |found: &Address| {
        let Address::Inet(mut found) = *found else { return false };
        if address.port() == 0 {
            found.set_port(0);
        }
        found == address
    };
    if let Some(stored) = take_stored(kind, stored, is_same) {
        if kind == SocketKind::Datagram {
            stored.take_address()?;
        }
        return Ok(reuse(stored));
    }
    let socket = Socket::new(Domain::for_address(address), socket_type(kind), None)?;
    if kind == SocketKind::Stream {
        // Without this a restart fails with EADDRINUSE while old connections are in TIME_WAIT. With
        // it another process could bind a UDP socket to the same address.
        socket.set_reuse_address(true)?;
    }
    if address.is_ipv6() {
        socket.set_only_v6(!address.ip().is_unspecified())?;
    }
    bind(&socket, &address.into(), || {
        // The previous process may hold another address of the same port.
        while let Some(stored) = take_stored(kind, stored, has_port) {
            match kind {
                SocketKind::Stream => stored.close(),
                SocketKind::Datagram => {
                    stored.share_address()?;
                    socket.set_reuse_address(true)?;
                }
            }
        }
        Ok(())
    })?;
    if kind == SocketKind::Datagram {
        socket.set_reuse_address(false)?;
    }
    listen(kind, socket, None)
}

/// Opens a Unix or vsock address.
async fn open_named(
    kind: SocketKind,
    address: &Address,
    stored: &mut Vec<StoredListener>,
) -> io::Result<OpenedSocket> {
    if let Some(stored) = take_stored(kind, stored, |found| found == address) {
        return Ok(reuse(stored));
    }
    let sockaddr = address.to_sockaddr()?;
    let socket = Socket::new(sockaddr.domain(), socket_type(kind), None)?;
    let Some(path) = address.path() else {
        socket.bind(&sockaddr)?;
        return listen(kind, socket, None);
    };
    // Held until the socket listens. Otherwise two processes that start at once could each take the
    // other's new socket for a stale one.
    let _lock = lock_directory(path).await;
    bind(&socket, &sockaddr, || match is_stale(kind, path, &sockaddr)? {
        true => fs::remove_file(path),
        false => Ok(()),
    })?;
    let file = SocketFile::at(path)?;
    file.unlinks_on_drop.set(true);
    listen(kind, socket, Some(file))
}

/// Binds a socket. If the address is in use, calls `free_address` and tries once more.
fn bind(
    socket: &Socket,
    address: &SockAddr,
    free_address: impl FnOnce() -> io::Result<()>,
) -> io::Result<()> {
    match socket.bind(address) {
        Err(error) if Errno::from_io_error(&error) == Some(Errno::ADDRINUSE) => {
            free_address()?;
            socket.bind(address)
        }
        bound => bound,
    }
}

fn listen(kind: SocketKind, socket: Socket, file: Option<SocketFile>) -> io::Result<OpenedSocket> {
    if kind == SocketKind::Stream {
        socket.listen(BACKLOG)?;
    }
    Ok((socket.into(), file))
}

fn socket_type(kind: SocketKind) -> Type {
    match kind {
        SocketKind::Stream => Type::STREAM,
        SocketKind::Datagram => Type::DGRAM,
    }
}

/// Takes a reachable socket out of `stored` whose address matches.
fn take_stored(
    kind: SocketKind,
    stored: &mut Vec<StoredListener>,
    matches: impl Fn(&Address) -> bool,
) -> Option<StoredListener> {
    let is_match = |listener: &StoredListener| {
        let is_kind = SockRef::from(&listener.fd).r#type().ok() == Some(socket_type(kind));
        is_kind
            && listener.is_reachable()
            && listener.address().is_some_and(|address| matches(&address))
    };
    let index = stored.iter().position(is_match)?;
    Some(stored.swap_remove(index))
}

/// Uses a stored socket. Its socket file stays until the start has succeeded.
fn reuse(stored: StoredListener) -> OpenedSocket {
    let file = stored.socket_file();
    (stored.fd, file)
}

/// Locks the directory of a path, but gives up after a second: any process that can read it can
/// hold the lock.
async fn lock_directory(path: &Path) -> Option<File> {
    let directory = File::open(path.parent()?).ok()?;
    for _ in 0..LOCK_ATTEMPTS {
        match flock(&directory, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Some(directory),
            Err(Errno::WOULDBLOCK) => sleep(LOCK_PAUSE).await,
            Err(_) => return None,
        }
    }
    None
}

/// Returns whether no process listens on a socket file.
fn is_stale(kind: SocketKind, path: &Path, address: &SockAddr) -> io::Result<bool> {
    if !fs::symlink_metadata(path)?.file_type().is_socket() {
        return Err(io::Error::other("it exists and is not a socket"));
    }
    let probe = Socket::new(Domain::UNIX, socket_type(kind).nonblocking(), None)?;
    let refused = |error: io::Error| Errno::from_io_error(&error) == Some(Errno::CONNREFUSED);
    Ok(probe.connect(address).is_err_and(refused))
}

/// The kernel lowers this to net.core.somaxconn.
const BACKLOG: i32 = 4096;

const LOCK_ATTEMPTS: usize = 50;
const LOCK_PAUSE: Duration = Duration::from_millis(20);

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn replaces_only_stale_socket_files_and_removes_only_its_own() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let address = ListenAddress::parse(path.as_os_str()).unwrap();
        let open = async || open(&address, &mut Vec::new()).await;

        let first = open().await.unwrap();
        let error = open().await.unwrap_err();
        assert!(error.contains("in use"), "{error}");

        fs::rename(&path, directory.path().join("moved")).unwrap();
        let second = open().await.unwrap();
        drop(first);
        assert!(path.exists(), "the second's file went with the first");
        drop(second);
        assert!(!path.exists(), "its own file stayed");

        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        assert!(path.exists(), "std leaves a stale file");
        drop(open().await.unwrap());

        fs::write(&path, "not a socket").unwrap();
        assert!(open().await.is_err());
        assert!(path.exists());
    }
}
