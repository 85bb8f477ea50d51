//! Why a backend was not reached, and which of these errors keep a client waiting.

use std::fmt;
use std::io;

use rustix::io::Errno;

use crate::backend::source::IpFamily;
use crate::config::target::Target;
use crate::counters::ConnectErrorKind;
use crate::logging::os_message;
use crate::socket::address::Address;
use crate::socket::resolve::ResolveError;

/// Why there is no connection.
#[derive(Debug)]
pub enum ConnectError {
    /// The name has no address.
    Resolve(ResolveError),
    /// No address accepted. This is the last one with a transient error, or else the last one.
    Connect(Address, io::Error),
    /// The target has no address of the family of the client, whose address it is to see.
    Family(Target, IpFamily),
}

/// Why a backend does not answer.
#[derive(Debug)]
pub enum CheckError {
    /// It may answer later. The text says why it does not now.
    NotYet(String),
    Permanent(ConnectError),
}

impl From<ConnectError> for CheckError {
    fn from(error: ConnectError) -> Self {
        match error.is_transient() {
            true => Self::NotYet(error.to_string()),
            false => Self::Permanent(error),
        }
    }
}

impl ConnectError {
    /// Returns the system's message, without the address.
    pub fn reason(&self) -> String {
        match self {
            Self::Resolve(error) => error.to_string(),
            Self::Connect(_, error) => os_message(error),
            Self::Family(..) => self.to_string(),
        }
    }

    pub fn kind(&self) -> ConnectErrorKind {
        match self {
            Self::Resolve(_) => ConnectErrorKind::Resolve,
            Self::Connect(_, error) => errno_kind(error),
            Self::Family(..) => ConnectErrorKind::Other,
        }
    }

    /// Whether a Unix backend listens but has no room for another client (EAGAIN).
    pub fn is_full_backlog(&self) -> bool {
        self.kind() == ConnectErrorKind::Backlog
    }

    /// Whether the backend may just not be up yet. A name that does not exist and what a sandbox
    /// forbids (EPERM) are permanent. EACCES is transient: the mode of a Unix socket is often set
    /// only after bind(2).
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Resolve(error) => error.is_temporary,
            Self::Connect(_, error) => matches!(
                Errno::from_io_error(error),
                Some(
                    Errno::CONNREFUSED
                        | Errno::NOENT
                        | Errno::AGAIN
                        | Errno::ACCESS
                        | Errno::NETUNREACH
                        | Errno::HOSTUNREACH
                        | Errno::ADDRNOTAVAIL
                        | Errno::TIMEDOUT
                        // The backend came up and went down during the handshake. Over vsock: no
                        // process listens.
                        | Errno::CONNRESET
                        // Over vsock: the virtual machine does not seem to run.
                        | Errno::NODEV
                        // The system is short of descriptors or memory.
                        | Errno::MFILE
                        | Errno::NFILE
                        | Errno::NOMEM
                        | Errno::NOBUFS
                )
            ),
            Self::Family(..) => false,
        }
    }
}

impl fmt::Display for ConnectError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Resolve(error) => error.fmt(f),
            Self::Connect(address, error) => {
                let (reason, hint) = (os_message(error), address.hint(error));
                let backlog = if self.is_full_backlog() { " (its backlog is full)" } else { "" };
                write!(f, "Failed to connect to remote host: {address}: {reason}{hint}{backlog}")
            }
            Self::Family(target, family) => {
                write!(f, "Failed to connect to remote host: {target}: ")?;
                write!(
                    f,
                    "it cannot be reached from the client's {family} address (--source=client)"
                )
            }
        }
    }
}

/// Returns the kind of an error of connect(2) or socket(2).
pub fn errno_kind(error: &io::Error) -> ConnectErrorKind {
    match Errno::from_io_error(error) {
        Some(Errno::CONNREFUSED) => ConnectErrorKind::Refused,
        Some(Errno::TIMEDOUT) => ConnectErrorKind::Timeout,
        Some(
            Errno::NETUNREACH
            | Errno::HOSTUNREACH
            | Errno::NETDOWN
            | Errno::HOSTDOWN
            | Errno::ADDRNOTAVAIL
            | Errno::NODEV,
        ) => ConnectErrorKind::Unreachable,
        Some(Errno::NOENT) => ConnectErrorKind::NotFound,
        Some(Errno::AGAIN) => ConnectErrorKind::Backlog,
        // EAFNOSUPPORT: RestrictAddressFamilies= forbids the family.
        Some(Errno::ACCESS | Errno::PERM | Errno::AFNOSUPPORT) => ConnectErrorKind::Denied,
        Some(Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM) => {
            ConnectErrorKind::Resources
        }
        _ => ConnectErrorKind::Other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `--backend-wait=` in socket-proxyd(8) has the same list.
    #[test]
    fn backends_that_are_not_up_yet_are_waited_for() {
        let is_transient = |errno: Errno| {
            let address = Address::Vsock { cid: 3, port: 80 };
            ConnectError::Connect(address, io::Error::from(errno)).is_transient()
        };
        let transient = [
            Errno::CONNREFUSED,
            Errno::CONNRESET,
            Errno::TIMEDOUT,
            Errno::NETUNREACH,
            Errno::HOSTUNREACH,
            Errno::ADDRNOTAVAIL,
            Errno::NOENT,
            Errno::ACCESS,
            Errno::AGAIN,
            Errno::NODEV,
            Errno::MFILE,
            Errno::NOBUFS,
        ];
        assert!(transient.into_iter().all(is_transient));
        let permanent = [Errno::PERM, Errno::AFNOSUPPORT, Errno::PROTOTYPE, Errno::INVAL];
        assert!(!permanent.into_iter().any(is_transient));
    }
}
