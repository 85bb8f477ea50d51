//! Name lookups by the system's resolver.
//!
//! getaddrinfo(3) blocks for as long as the name servers take. So each lookup runs on its own
//! thread and delays only its own connection. The process exits without waiting for these threads.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::thread;

use dns_lookup::{AddrInfoHints, LookupError, LookupErrorKind, SockType, getaddrinfo};
use rustix::io::Errno;
use tokio::sync::{OwnedSemaphorePermit, oneshot};

use crate::logging::os_message;
use crate::socket::host_port::HostPort;

/// Returns every stream address of a name, at least one, in the resolver's order (gai.conf(5)).
///
/// The lookup holds `permit` until the resolver has answered, even when the caller stops waiting.
/// If the name `may_appear`, a name that does not exist is a temporary error.
pub async fn resolve(
    name: &HostPort,
    permit: Option<OwnedSemaphorePermit>,
    may_appear: bool,
) -> Result<Vec<SocketAddr>, ResolveError> {
    let HostPort { host, port } = name.clone();
    let (sender, answer) = oneshot::channel();
    let lookup = move || {
        let _permit = permit;
        // An error says that the caller has stopped waiting.
        let _ = sender.send(look_up(&host, &port, may_appear));
    };
    let answer = match thread::Builder::new().name("resolve".into()).spawn(lookup) {
        Ok(_) => answer.await.unwrap_or_else(|_| Err(("the lookup failed".into(), false))),
        Err(error) => Err((format!("no thread to ask: {}", os_message(&error)), true)),
    };
    answer.map_err(|(reason, is_temporary)| ResolveError {
        name: name.to_string(),
        reason,
        is_temporary,
    })
}

#[derive(Debug)]
pub struct ResolveError {
    name: String,
    reason: String,
    /// Whether a later lookup may succeed.
    pub is_temporary: bool,
}

impl fmt::Display for ResolveError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Failed to resolve host: {}: {}", self.name, self.reason)
    }
}

/// Returns the addresses, or the reason why there are none and whether it is temporary.
fn look_up(host: &str, port: &str, may_appear: bool) -> Result<Vec<SocketAddr>, (String, bool)> {
    let hints = AddrInfoHints { socktype: SockType::Stream.into(), ..AddrInfoHints::default() };
    let found = getaddrinfo(Some(host), Some(port), Some(hints));
    let found = found.map_err(|error| describe(error, may_appear))?;
    let mut addresses = Vec::new();
    // `flatten` leaves out addresses of unknown families.
    for address in found.flatten().map(|found| found.sockaddr) {
        if !addresses.contains(&address) {
            addresses.push(address);
        }
    }
    if addresses.is_empty() { Err(("it has no address".into(), false)) } else { Ok(addresses) }
}

/// Returns the message of gai_strerror(3), except for EAI_SERVICE, whose message hides the cause,
/// and whether a later lookup may succeed: the resolver says so, or it lacked descriptors or
/// memory.
fn describe(error: LookupError, may_appear: bool) -> (String, bool) {
    if matches!(error.kind(), LookupErrorKind::Service) {
        return ("the port is not in services(5)".into(), false);
    }
    let is_temporary = match error.kind() {
        LookupErrorKind::Again | LookupErrorKind::Memory => true,
        LookupErrorKind::NoName | LookupErrorKind::NoData => may_appear,
        _ => false,
    };
    // EAI_SYSTEM has an errno.
    let error = io::Error::from(error);
    let lacks_resources = matches!(
        Errno::from_io_error(&error),
        Some(Errno::MFILE | Errno::NFILE | Errno::NOMEM | Errno::NOBUFS)
    );
    let message = error.to_string();
    // dns-lookup puts its own words in front.
    let message = message.rsplit_once(": ").map_or(message.as_str(), |(_, reason)| reason);
    (message.to_string(), is_temporary || lacks_resources)
}
