//! When to exit for want of connections.

use tokio::time::sleep;

use crate::config::timespan::TimeSpan;
use crate::limits::ConnectionWatch;

/// Waits until there has been no connection for `span`, counted from now or from the end of the
/// last one.
pub async fn wait_idle(span: TimeSpan, occupancy: &mut ConnectionWatch) {
    let Some(span) = span.finite() else {
        return std::future::pending().await;
    };
    loop {
        occupancy.wait_empty().await;
        tokio::select! {
            biased;
            // First: who has just been admitted is not to be cut off by a timer that expired in
            // the same moment.
            () = occupancy.turn() => {}
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
        let admission = ConnectionLimit::new(NonZeroU32::MIN);
        let mut occupancy = admission.occupancy();
        let start = Instant::now();
        let connections = async {
            advance(MINUTE / 2).await;
            let permit = admission.admit();
            advance(MINUTE * 5).await;
            drop(permit);
        };
        let ((), ()) = tokio::join!(wait_idle(TimeSpan::new(MINUTE), &mut occupancy), connections);
        let idle = start.elapsed();
        assert!(idle >= MINUTE * 13 / 2 && idle < MINUTE * 7, "{idle:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_admitted_as_the_time_runs_out_is_not_cut_off() {
        for _ in 0..100 {
            let admission = ConnectionLimit::new(NonZeroU32::MIN);
            let mut occupancy = admission.occupancy();
            let mut idle = std::pin::pin!(wait_idle(TimeSpan::new(MINUTE), &mut occupancy));
            assert!(tokio::time::timeout(MINUTE / 2, &mut idle).await.is_err());
            let permit = admission.admit();
            advance(MINUTE).await;
            assert!(tokio::time::timeout(MINUTE, &mut idle).await.is_err());
            drop(permit);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn idle_time_counts_from_the_start() {
        let admission = ConnectionLimit::new(NonZeroU32::MIN);
        let start = Instant::now();
        wait_idle(TimeSpan::new(MINUTE), &mut admission.occupancy()).await;
        assert!(start.elapsed() >= MINUTE);
    }
}
