//! Where COMMAND is in its life: what connections wait for, and what `STATUS=` says.

use std::fmt;

/// Where COMMAND is in its life.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Phase {
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
    Occupied,
    /// Time won't mend what keeps us from the target.
    Hopeless,
}

impl Phase {
    /// Whether nothing of it is left.
    pub fn is_at_rest(self) -> bool {
        matches!(self, Self::Stopped | Self::Failed(_) | Self::Occupied | Self::Hopeless)
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stopped => f.write_str("stopped"),
            Self::Starting => f.write_str("starting"),
            Self::Ready => f.write_str("running"),
            Self::Stopping => f.write_str("stopping"),
            Self::Failed(1) => f.write_str("failed"),
            Self::Failed(times) => write!(f, "failed {times} times in a row"),
            Self::Occupied => f.write_str("its target is served by somebody else"),
            Self::Hopeless => f.write_str("its target can't be reached"),
        }
    }
}
