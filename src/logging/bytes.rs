//! Amounts of bytes for people.

use std::fmt;

/// Prints as `17 bytes` or `1.2 GiB`.
#[derive(Clone, Copy, Debug)]
pub struct Bytes(pub u64);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(bytes) = self;
        let mut amount = *bytes as f64;
        let mut units = ["KiB", "MiB", "GiB", "TiB", "PiB"].iter();
        let mut unit = None;
        while amount >= 1024.0
            && let Some(next) = units.next()
        {
            amount /= 1024.0;
            unit = Some(next);
        }
        match unit {
            Some(unit) => write!(f, "{amount:.1} {unit}"),
            None => write!(f, "{bytes} bytes"),
        }
    }
}
