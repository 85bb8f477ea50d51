//! The end of an idle time.

use tokio::time::sleep;

use crate::config::timespan::TimeSpan;
use crate::limits::ConnectionWatch;

/// Waits until no connection has been open for `span`.
///
/// The time counts from the call or from the end of the last connection.
pub async fn wait_idle(span: TimeSpan, watch: &mut ConnectionWatch) {
    let Some(span) = span.finite() else {
        return std::future::pending().await;
    };
    loop {
        watch.wait_empty().await;
        tokio::select! {
            biased;
            // Polled first: a timer that expires in the same moment must not cut off a connection
            // that was just admitted.
            () = watch.changed() => {}
            () = sleep(span) => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU32;
    use std::time::Duration;

    use tokio::time::{Instant, advance};

    use super::*;
    use crate::limits::ConnectionLimit;

    const MINUTE: Duration = Duration::from_secs(60);

    #[tokio::test(start_paused = true)]
    async fn idle_time_counts_from_the_end_of_the_last_connection() {
        let limit = ConnectionLimit::new(NonZeroU32::MIN);
        let mut watch = limit.watch();
        let start = Instant::now();
        let connections = async {
            advance(MINUTE / 2).await;
            let permit = limit.try_acquire();
            advance(MINUTE * 5).await;
            drop(permit);
        };
        let ((), ()) = tokio::join!(wait_idle(TimeSpan::new(MINUTE), &mut watch), connections);
        let idle = start.elapsed();
        assert!(idle >= MINUTE * 13 / 2 && idle < MINUTE * 7, "{idle:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_admitted_as_the_timer_expires_is_not_cut_off() {
        for _ in 0..100 {
            let limit = ConnectionLimit::new(NonZeroU32::MIN);
            let mut watch = limit.watch();
            let mut idle = std::pin::pin!(wait_idle(TimeSpan::new(MINUTE), &mut watch));
            assert!(tokio::time::timeout(MINUTE / 2, &mut idle).await.is_err());
            let permit = limit.try_acquire();
            advance(MINUTE).await;
            assert!(tokio::time::timeout(MINUTE, &mut idle).await.is_err());
            drop(permit);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn idle_time_counts_from_the_start() {
        let limit = ConnectionLimit::new(NonZeroU32::MIN);
        let start = Instant::now();
        wait_idle(TimeSpan::new(MINUTE), &mut limit.watch()).await;
        assert!(start.elapsed() >= MINUTE);
    }
}
