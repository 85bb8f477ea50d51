//! How much a bulky connection moves before the other connections of its event loop have their
//! turn.
//!
//! An event loop gives each connection that is ready one turn, then it polls for new events. So a
//! small message waits for the turns of a round. Only a sender and a receiver on this machine are
//! fast enough to use up a turn.

use std::cell::Cell;

/// The turns on one event loop.
#[derive(Debug)]
pub struct Turns {
    /// Turns of bulky connections so far.
    taken: Cell<u64>,
    /// Turns of bulky connections since the last turn of another connection.
    in_a_row: Cell<u32>,
}

impl Default for Turns {
    fn default() -> Self {
        Self { taken: Cell::default(), in_a_row: Cell::new(ALONE_AFTER) }
    }
}

impl Turns {
    /// Begins a turn of a connection that carries messages. Returns how many bytes each of its
    /// directions may move.
    pub fn begin_message(&self) -> usize {
        self.in_a_row.set(0);
        TURN_MAX
    }

    /// Begins a turn of a bulky connection whose last one had the number `last`, which it replaces.
    /// Returns how many bytes each of its directions may move.
    pub fn begin_bulk(&self, last: &mut u64) -> usize {
        let in_a_row = self.in_a_row.get().saturating_add(1);
        self.in_a_row.set(in_a_row);
        // The turns since the last one of this connection, the new one included.
        let connections = (self.taken.get() - *last + 1) as usize;
        let is_first = *last == 0;
        self.taken.set(self.taken.get() + 1);
        *last = self.taken.get();
        match in_a_row {
            _ if in_a_row > ALONE_AFTER => BULK_ALONE,
            _ if is_first => TURN_MIN,
            _ => (ROUND / connections).clamp(TURN_MIN, TURN_MAX),
        }
    }
}

/// Bytes of a turn while only bulk runs. Smaller turns wake sender and receiver more often and cost
/// a tenth of their rate (BENCHMARKS.md).
const BULK_ALONE: usize = 8 * 1024 * 1024;

/// Bytes that the bulk turns of one round share while messages are carried as well.
const ROUND: usize = 1024 * 1024;

/// The most and the fewest bytes of such a turn.
const TURN_MAX: usize = 256 * 1024;
const TURN_MIN: usize = 64 * 1024;

/// Bulk turns in a row after which there is only bulk. So many that a message now and then does not
/// meet a large turn.
const ALONE_AFTER: u32 = 256;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn turns_are_large_for_bulk_alone_and_shared_beside_messages() {
        let turns = Turns::default();
        let mut bulk = [0; 8];
        for _ in 0..2 {
            for last in &mut bulk {
                assert_eq!(turns.begin_bulk(last), BULK_ALONE);
            }
        }
        turns.begin_message();
        // One message, and turns are small for a while.
        for turn in 0..ALONE_AFTER as usize {
            assert_eq!(turns.begin_bulk(&mut bulk[turn % 8]), ROUND / 8);
        }
        assert_eq!(turns.begin_bulk(&mut bulk[0]), BULK_ALONE);
        let mut hundreds = [0; 300];
        for _ in 0..2 {
            turns.begin_message();
            for last in &mut hundreds {
                turns.begin_bulk(last);
            }
        }
        turns.begin_message();
        assert_eq!(turns.begin_bulk(&mut hundreds[0]), TURN_MIN);
        // The first turn of a connection, when few have had one.
        let young = Turns::default();
        young.begin_message();
        let mut only = 0;
        assert_eq!(young.begin_bulk(&mut only), TURN_MIN);
        assert_eq!(young.begin_bulk(&mut only), TURN_MAX);
        // One alone beside messages.
        turns.begin_message();
        assert_eq!(turns.begin_bulk(&mut hundreds[0]), TURN_MAX);
    }
}
