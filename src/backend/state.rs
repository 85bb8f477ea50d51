//! The state of a backend that the proxy starts, which connections wait for and `STATUS=` shows.

use std::fmt;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum BackendState {
    #[default]
    Stopped,
    /// Started, or about to be, and not ready yet.
    Starting,
    Ready,
    /// COMMAND's processes are stopped where they are, until they are needed.
    Frozen,
    /// COMMAND was asked to stop or has exited, and some of its processes are left.
    Stopping,
    /// COMMAND exited before it was ready or right after, this many times in a row.
    Failed(u32),
    /// Another process serves the target.
    AddressInUse,
    /// The target cannot be reached because of a permanent error.
    Unreachable,
}

impl BackendState {
    /// Whether no process of COMMAND is left.
    pub fn is_inactive(self) -> bool {
        matches!(self, Self::Stopped | Self::Failed(_) | Self::AddressInUse | Self::Unreachable)
    }
}

impl fmt::Display for BackendState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stopped => f.write_str("stopped"),
            Self::Starting => f.write_str("starting"),
            Self::Ready => f.write_str("running"),
            Self::Frozen => f.write_str("frozen"),
            Self::Stopping => f.write_str("stopping"),
            Self::Failed(1) => f.write_str("failed"),
            Self::Failed(times) => write!(f, "failed {times} times in a row"),
            Self::AddressInUse => f.write_str("not started, another process serves its target"),
            Self::Unreachable => f.write_str("not started, its target cannot be reached"),
        }
    }
}
