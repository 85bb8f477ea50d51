//! Messages that may repeat without end are let through a few times.

use std::sync::Mutex;
use std::time::Duration;

use tokio::time::Instant;

/// Lets a repeating message through a few times, and counts the rest.
#[derive(Debug)]
pub struct RateLimit {
    burst: u32,
    interval: Duration,
    /// The start of the interval, and the messages in it.
    state: Mutex<Option<(Instant, u32)>>,
}

impl RateLimit {
    /// Lets at most `burst` messages through in an `interval`.
    pub const fn new(burst: u32, interval: Duration) -> Self {
        Self { burst, interval, state: Mutex::new(None) }
    }

    /// Returns how many messages were suppressed since the last one, if a message may pass now.
    pub fn pass(&self) -> Option<u32> {
        let mut state = self.state.lock().ok()?;
        let now = Instant::now();
        let (start, count, suppressed) = match *state {
            Some((start, count)) if now - start < self.interval => (start, count, 0),
            Some((_, count)) => (now, 0, count.saturating_sub(self.burst)),
            None => (now, 0, 0),
        };
        *state = Some((start, count.saturating_add(1)));
        (count < self.burst).then_some(suppressed)
    }
}

/// Logs a message that may repeat without end, if its rate limit lets it pass.
///
/// `rate_limited!(LIMIT, warn, client = address, listener, "No {}.", what())` logs two fields, by
/// their `Display`. Fields and arguments are evaluated only if the message passes.
macro_rules! rate_limited {
    (
        $limit:expr,
        $level:ident,
        $($field:ident $(= $value:expr)?,)*
        $text:literal $($arguments:tt)*
    ) => {
        if let Some(suppressed) = $limit.pass() {
            $($(let $field = &$value;)?)*
            tracing::$level!(suppressed, $(%$field,)* $text $($arguments)*);
        }
    };
}
pub(crate) use rate_limited;

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn repeating_messages_are_suppressed_and_counted() {
        let limit = RateLimit::new(2, Duration::from_secs(10));
        let passed = (0..100).filter(|_| limit.pass().is_some()).count();
        assert_eq!(passed, 2);
        tokio::time::advance(Duration::from_secs(11)).await;
        assert_eq!(limit.pass(), Some(98));
        tokio::time::advance(Duration::from_secs(11)).await;
        assert_eq!(limit.pass(), Some(0));
    }

    #[test]
    fn fields_are_evaluated_only_if_the_message_passes() {
        static ONCE: RateLimit = RateLimit::new(1, Duration::from_secs(3600));
        let mut evaluated = 0;
        for _ in 0..3 {
            let mut client = || {
                evaluated += 1;
                "client"
            };
            rate_limited!(ONCE, debug, client = client(), "Refused.");
        }
        assert_eq!(evaluated, 1);
    }
}
