//! Listeners opened here, for `--listen=`: addresses, and socket files that are put away again.

use std::fs::{self, File};
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::AsFd;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::time::Duration;

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use socket2::{Domain, SockAddr, Type};
use tokio::time::sleep;

use crate::config::listen_address::ListenAddress;
use crate::listen::listener::Listener;
use crate::listen::stored::{SocketFile, StoredListener};
use crate::logging::os_message;
use crate::socket::address::{Address, UnixName};
use crate::socket::host_port::{HostPort, Port};
use crate::socket::resolve::resolve;

/// The kernel lowers it to net.core.somaxconn.
const BACKLOG: i32 = 4096;

/// How long to wait for another process that is just opening a socket in the same directory.
const LOCK_ATTEMPTS: usize = 50;
const LOCK_PAUSE: Duration = Duration::from_millis(20);

/// Opens what `--listen=` asks for: one socket, or one for each address of a host; or takes it out of
/// those that the process before this one had opened and `stored`.
///
/// # Errors
/// One line that names the address.
pub async fn open(
    address: &ListenAddress,
    stored: &mut Vec<StoredListener>,
) -> Result<Vec<Listener>, String> {
    let failed = |error: io::Error| {
        let hint = match address {
            ListenAddress::Vsock(address) => address.hint(&error),
            _ => "",
        };
        format!("Failed to listen on {address}: {}{hint}.", os_message(&error))
    };
    Ok(match address {
        ListenAddress::Unix(name) => vec![open_unix(name, stored).await.map_err(failed)?],
        ListenAddress::Vsock(address) => vec![open_vsock(address, stored).map_err(failed)?],
        ListenAddress::Any(port) => vec![open_any(*port, stored).map_err(failed)?],
        ListenAddress::Host(host) => {
            let addresses = match host.literal() {
                Some(address) => vec![address],
                None => resolve(host, None)
                    .await
                    .map_err(|error| format!("Failed to listen on {address}: {error}."))?,
            };
            open_each(host, &addresses, stored).map_err(failed)?
        }
    })
}

fn open_any(port: u16, stored: &mut Vec<StoredListener>) -> io::Result<Listener> {
    // A kernel without IPv6 still has a port to offer.
    open_inet((Ipv6Addr::UNSPECIFIED, port).into(), stored).or_else(|error| {
        match Errno::from_io_error(&error) {
            Some(Errno::AFNOSUPPORT | Errno::ADDRNOTAVAIL) => {
                open_inet((Ipv4Addr::UNSPECIFIED, port).into(), stored)
            }
            _ => Err(error),
        }
    })
}

/// One listener an address; addresses that this machine does not have (`localhost` may be `::1`
/// where IPv6 is off) are left out as long as one is left.
fn open_each(
    host: &HostPort,
    addresses: &[SocketAddr],
    stored: &mut Vec<StoredListener>,
) -> io::Result<Vec<Listener>> {
    let mut listeners = Vec::new();
    let mut missing = None;
    for &address in addresses {
        match open_inet(address, stored) {
            Ok(listener) => listeners.push(listener),
            Err(error) => match Errno::from_io_error(&error) {
                Some(Errno::AFNOSUPPORT | Errno::ADDRNOTAVAIL) => missing = Some(error),
                _ => return Err(error),
            },
        }
        // Any free port is one port: the next address would get another.
        if host.port == Port::Number(0) && !listeners.is_empty() {
            break;
        }
    }
    match missing {
        Some(error) if listeners.is_empty() => Err(error),
        _ => Ok(listeners),
    }
}

fn open_inet(address: SocketAddr, stored: &mut Vec<StoredListener>) -> io::Result<Listener> {
    let is_it = |it: &Address| match it {
        Address::Inet(it) => {
            it.ip() == address.ip() && (it.port() == address.port() || address.port() == 0)
        }
        _ => false,
    };
    if let Some(stored) = take_stored(stored, is_it) {
        return reuse(stored);
    }
    let socket = socket2::Socket::new(Domain::for_address(address), Type::STREAM, None)?;
    // A restart must not wait for the last connections' TIME_WAIT.
    socket.set_reuse_address(true)?;
    if address.is_ipv6() {
        socket.set_only_v6(!address.ip().is_unspecified())?;
    }
    match socket.bind(&address.into()) {
        // By one of the process before this one, which is asked for in other words now.
        Err(error) if Errno::from_io_error(&error) == Some(Errno::ADDRINUSE) => {
            let is_in_the_way =
                |it: &Address| matches!(it, Address::Inet(it) if it.port() == address.port());
            while let Some(stored) = take_stored(stored, is_in_the_way) {
                stored.close();
            }
            socket.bind(&address.into())?;
        }
        bound => bound?,
    }
    socket.listen(BACKLOG)?;
    Listener::from_fd(socket.into(), None, None)
}

fn open_vsock(address: &Address, stored: &mut Vec<StoredListener>) -> io::Result<Listener> {
    if let Some(stored) = take_stored(stored, |it| it == address) {
        return reuse(stored);
    }
    let socket = socket2::Socket::new(Domain::VSOCK, Type::STREAM, None)?;
    socket.bind(&address.to_sockaddr()?)?;
    socket.listen(BACKLOG)?;
    Listener::from_fd(socket.into(), None, None)
}

async fn open_unix(name: &UnixName, stored: &mut Vec<StoredListener>) -> io::Result<Listener> {
    let address = Address::Unix(Some(Box::new(name.clone())));
    if let Some(stored) = take_stored(stored, |it| *it == address) {
        return reuse(stored);
    }
    let address = address.to_sockaddr()?;
    let socket = socket2::Socket::new(Domain::UNIX, Type::STREAM, None)?;
    let Some(path) = name.path() else {
        socket.bind(&address)?;
        socket.listen(BACKLOG)?;
        return Listener::from_fd(socket.into(), None, None);
    };
    // Held from the look at a stale file until we listen: two that start at once can't each take
    // the other's fresh socket for a stale one.
    let _lock = match path.parent() {
        Some(directory) => lock_directory(directory).await,
        None => None,
    };
    match socket.bind(&address) {
        Err(error) if Errno::from_io_error(&error) == Some(Errno::ADDRINUSE) => {
            if !is_stale(path, &address)? {
                return Err(error);
            }
            fs::remove_file(path)?;
            socket.bind(&address)?;
        }
        bound => bound?,
    }
    let file = SocketFile::at(path, false)?;
    socket.listen(BACKLOG)?;
    Listener::from_fd(socket.into(), None, Some(file))
}

/// A listener of the process before this one that has such an address, and is found there.
fn take_stored(
    stored: &mut Vec<StoredListener>,
    is_it: impl Fn(&Address) -> bool,
) -> Option<StoredListener> {
    let index = stored
        .iter()
        .position(|it| it.is_reachable() && it.address().is_some_and(|address| is_it(&address)))?;
    Some(stored.swap_remove(index))
}

/// Locks a directory, unless somebody else holds on to it: anybody who can read it can.
fn reuse(stored: StoredListener) -> io::Result<Listener> {
    let (fd, file) = stored.into_parts();
    Listener::from_fd(fd, None, file)
}

async fn lock_directory(directory: &Path) -> Option<File> {
    let directory = File::open(directory).ok()?;
    for _ in 0..LOCK_ATTEMPTS {
        match flock(directory.as_fd(), FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Some(directory),
            Err(Errno::WOULDBLOCK) => sleep(LOCK_PAUSE).await,
            Err(_) => return None,
        }
    }
    None
}

/// A socket file on which nobody listens.
fn is_stale(path: &Path, address: &SockAddr) -> io::Result<bool> {
    if !fs::symlink_metadata(path)?.file_type().is_socket() {
        return Err(io::Error::other("it exists and is not a socket"));
    }
    let probe = socket2::Socket::new(Domain::UNIX, Type::STREAM.nonblocking(), None)?;
    Ok(match probe.connect(address) {
        Err(error) => Errno::from_io_error(&error) == Some(Errno::CONNREFUSED),
        Ok(()) => false,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn only_a_stale_socket_file_is_replaced_and_only_our_own_removed() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let address = ListenAddress::parse(path.as_os_str()).unwrap();
        let open = async || open(&address, &mut Vec::new()).await;

        let first = open().await.unwrap();
        let error = open().await.unwrap_err();
        assert!(error.contains("Address already in use"), "{error}");

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
