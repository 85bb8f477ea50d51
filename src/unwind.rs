//! A panic as a value, so that a bug that one peer meets does not end the process for all others.

#![forbid(unsafe_code)]

use std::future::poll_fn;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::pin;
use std::task::Poll;

/// Waits for a future, or for its panic, which is `None`; the panic hook has logged it.
pub(crate) async fn catch<T>(future: impl Future<Output = T>) -> Option<T> {
    let mut future = pin!(future);
    // A future that has panicked is not polled again, so that what it left half done is only dropped.
    poll_fn(|cx| match catch_unwind(AssertUnwindSafe(|| future.as_mut().poll(cx))) {
        Ok(poll) => poll.map(Some),
        Err(_) => Poll::Ready(None),
    })
    .await
}

#[cfg(test)]
mod tests {
    use tokio::task::yield_now;

    use super::*;

    #[tokio::test]
    async fn a_panic_is_none_and_what_comes_after_it_goes_on() {
        let accept = async |round: u32| {
            yield_now().await;
            assert_ne!(round, 1, "a bug");
            round
        };
        let mut accepted = Vec::new();
        for round in 0..3 {
            accepted.push(catch(accept(round)).await);
        }
        assert_eq!(accepted, [Some(0), None, Some(2)]);
    }
}
