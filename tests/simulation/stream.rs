//! The bytes of one direction: each place has a byte of its own, so that a lost, doubled or moved
//! byte is found.

use std::sync::LazyLock;

use crate::support::random_bytes;

/// The bytes that one peer sends.
#[derive(Clone, Copy)]
pub struct Stream(usize);

impl Stream {
    pub fn new(seed: u64) -> Self {
        Self(seed as usize % PERIOD)
    }

    /// Returns at most [`PERIOD`] bytes from a place on.
    pub fn bytes(self, from: u64, length: usize) -> &'static [u8] {
        let start = (self.0 + from as usize) % PERIOD;
        &TABLE[start..start + length.min(PERIOD)]
    }
}

/// A prime number: no buffer of ours or of the kernel's is a multiple of it.
const PERIOD: usize = 524_287;

static TABLE: LazyLock<Vec<u8>> = LazyLock::new(|| random_bytes(1, PERIOD).repeat(2));
