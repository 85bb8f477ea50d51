//! Looks names up, by the system's resolver.
//!
//! getaddrinfo(3) blocks for as long as the name servers take, so each lookup runs on a thread of its own and
//! delays only its own connection. At the end of the process it is left behind.

use std::fmt;
use std::net::SocketAddr;

use dns_lookup::{AddrInfoHints, LookupError, LookupErrorKind, SockType, getaddrinfo};
use tokio::sync::{OwnedSemaphorePermit, oneshot};

use crate::logging::os_message;
use crate::socket::host_port::HostPort;

/// Why there is no address.
#[derive(Debug)]
pub struct ResolveError {
    name: String,
    reason: String,
    temporary: bool,
}

impl ResolveError {
    /// Whether the resolver itself expects another answer later (EAI_AGAIN).
    pub fn is_temporary(&self) -> bool {
        self.temporary
    }
}

impl fmt::Display for ResolveError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Failed to resolve host: {}: {}", self.name, self.reason)
    }
}

/// Every stream address of a name, in the resolver's order (gai.conf(5)), at least one.
///
/// `permit` is kept until the resolver has answered, also when nobody waits for it any more.
pub async fn resolve(
    name: &HostPort,
    permit: Option<OwnedSemaphorePermit>,
) -> Result<Vec<SocketAddr>, ResolveError> {
    let failed = |(reason, temporary)| ResolveError { name: name.to_string(), reason, temporary };
    let (host, port) = (name.host.clone(), name.port.to_string());
    let (answer, answered) = oneshot::channel();
    let lookup = move || {
        let _permit = permit;
        // Nobody may be waiting any more.
        let _ = answer.send(look_up(&host, &port));
    };
    std::thread::Builder::new()
        .name("resolve".into())
        .spawn(lookup)
        .map_err(|error| failed((format!("no thread to ask: {}", os_message(&error)), true)))?;
    let addresses = answered
        .await
        .map_err(|_| failed(("the lookup was given up".into(), false)))?
        .map_err(failed)?;
    if addresses.is_empty() {
        return Err(failed(("it has no address".into(), false)));
    }
    Ok(addresses)
}

/// The addresses, or why there are none and whether that is temporary.
fn look_up(host: &str, port: &str) -> Result<Vec<SocketAddr>, (String, bool)> {
    let hints = AddrInfoHints { socktype: SockType::Stream.into(), ..AddrInfoHints::default() };
    let found = getaddrinfo(Some(host), Some(port), Some(hints))
        .map_err(|error| (reason(&error), matches!(error.kind(), LookupErrorKind::Again)))?;
    let mut addresses = Vec::new();
    // An address of a family we don't know is no reason to miss the others.
    for address in found.flatten().map(|found| found.sockaddr) {
        if !addresses.contains(&address) {
            addresses.push(address);
        }
    }
    Ok(addresses)
}

/// gai_strerror(3)'s words, but for the one that says nothing of its cause.
fn reason(error: &LookupError) -> String {
    if matches!(error.kind(), LookupErrorKind::Service) {
        return "the port is not in services(5)".into();
    }
    let error = std::io::Error::from(LookupError::new(error.error_num()));
    let words = error.to_string();
    match words.rsplit_once(": ") {
        Some((_, words)) => words.into(),
        None => words,
    }
}
