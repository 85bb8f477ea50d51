//! How much a connection moves before the other connections of its event loop have their turn.
//!
//! An event loop gives each connection that is ready one turn, then it looks for new events. So the
//! turns of a round add up to what a small message waits. Only a sender and a receiver of this machine
//! are fast enough to use up a turn.

#![forbid(unsafe_code)]

use std::cell::Cell;

/// Bytes of a turn while no other connection runs. Smaller turns wake sender and receiver more often
/// and cost a tenth of their rate (BENCHMARKS.md).
const ALONE: usize = 8 * 1024 * 1024;

/// Bytes of all turns of a round together, while several connections run, and of one of them.
const ROUND: usize = 8 * 1024 * 1024;
const MOST: usize = 1024 * 1024;
const LEAST: usize = 256 * 1024;

/// Turns in a row without another connection's after which a connection counts as alone: a client that
/// sends a message now and then is not to meet a large turn.
const ALONE_AFTER: u32 = 256;

/// The turns on one event loop.
#[derive(Debug)]
pub(crate) struct Turns {
    taken: Cell<u64>,
    /// The last ones, of one and the same connection.
    in_a_row: Cell<u32>,
}

impl Default for Turns {
    fn default() -> Self {
        Self { taken: Cell::default(), in_a_row: Cell::new(ALONE_AFTER) }
    }
}

impl Turns {
    /// Begins a turn of the connection whose last one had the number `last`, which it replaces. Returns
    /// how many bytes each of its directions may move.
    pub(crate) fn begin(&self, last: &mut u64) -> usize {
        let others = self.taken.get() - *last;
        // A connection that is new has had no turn.
        let is_first = *last == 0;
        self.taken.set(self.taken.get() + 1);
        *last = self.taken.get();
        if others == 0 {
            let in_a_row = self.in_a_row.get().saturating_add(1);
            self.in_a_row.set(in_a_row);
            if in_a_row > ALONE_AFTER { ALONE } else { MOST }
        } else {
            self.in_a_row.set(0);
            if is_first { LEAST } else { (ROUND / (others as usize + 1)).clamp(LEAST, MOST) }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_connection_alone_has_large_turns_and_many_share_a_round() {
        let turns = Turns::default();
        let mut bulk = 0;
        assert_eq!(turns.begin(&mut bulk), ALONE);
        assert_eq!(turns.begin(&mut bulk), ALONE);
        let mut message = 0;
        turns.begin(&mut message);
        // One message, and turns are small for a while.
        (0..ALONE_AFTER).for_each(|_| assert_eq!(turns.begin(&mut bulk), MOST));
        assert_eq!(turns.begin(&mut bulk), MOST);
        assert_eq!(turns.begin(&mut bulk), ALONE);
        let mut sixteen = [0; 16];
        for _ in 0..2 {
            for last in &mut sixteen {
                turns.begin(last);
            }
        }
        assert_eq!(turns.begin(&mut sixteen[0]), ROUND / 16);
        let mut hundreds = [0; 300];
        for _ in 0..2 {
            for last in &mut hundreds {
                turns.begin(last);
            }
        }
        assert_eq!(turns.begin(&mut hundreds[0]), LEAST);
    }
}
