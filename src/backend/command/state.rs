//! Where COMMAND is in its life: what connections wait for, and what `STATUS=` says.

use std::fmt;

/// Where COMMAND is in its life.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CommandState {
    /// Nothing runs.
    #[default]
    Stopped,
    /// It was started and is not ready yet.
    Starting,
    /// It serves.
    Ready,
    /// It was asked to end, or has ended, and something of it is left.
    Stopping,
    /// It has ended before it was ready, or at once after, this many times in a row.
    Failed(u32),
    /// Somebody else serves its target.
    AddressInUse,
    /// Time won't mend what keeps us from the target.
    Unreachable,
}

impl CommandState {
    /// Whether nothing of it is left.
    pub fn is_inactive(self) -> bool {
        matches!(self, Self::Stopped | Self::Failed(_) | Self::AddressInUse | Self::Unreachable)
    }
}

impl fmt::Display for CommandState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stopped => f.write_str("stopped"),
            Self::Starting => f.write_str("starting"),
            Self::Ready => f.write_str("running"),
            Self::Stopping => f.write_str("stopping"),
            Self::Failed(1) => f.write_str("failed"),
            Self::Failed(times) => write!(f, "failed {times} times in a row"),
            Self::AddressInUse => f.write_str("its target is served by somebody else"),
            Self::Unreachable => f.write_str("its target can't be reached"),
        }
    }
}
