//! Pauses between attempts: each is twice as long as the one before, up to a maximum.

use std::time::Duration;

#[derive(Clone, Debug)]
pub struct Backoff {
    next: Duration,
    max: Duration,
}

impl Backoff {
    pub const fn new(first: Duration, max: Duration) -> Self {
        Self { next: first, max }
    }

    /// Returns how long to wait before the next attempt.
    pub fn next(&mut self) -> Duration {
        let pause = self.next;
        self.next = self.nth(1);
        pause
    }

    /// Returns the pause that `others` precede.
    pub fn nth(&self, others: u32) -> Duration {
        self.next.saturating_mul(2_u32.saturating_pow(others)).min(self.max)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_the_maximum() {
        let mut backoff = Backoff::new(Duration::from_millis(5), Duration::from_millis(12));
        let pauses = [(); 4].map(|()| backoff.next().as_millis());
        assert_eq!(pauses, [5, 10, 12, 12]);
    }
}
