//! Amounts of bytes for people.

use std::fmt;

/// Prints as `17 bytes` or `1.2 GiB`.
#[derive(Clone, Copy, Debug)]
pub struct Bytes(pub u64);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.checked_ilog2().map_or(0, |log| log as usize / 10) {
            0 => write!(f, "{} bytes", self.0),
            power => {
                let unit = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"][power - 1];
                write!(f, "{:.1} {unit}", self.0 as f64 / 1024_f64.powi(power as i32))
            }
        }
    }
}
