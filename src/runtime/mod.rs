//! Event loops, threads that run one, pauses between attempts, and panics as values.

pub mod backoff;
#[expect(unsafe_code, reason = "sigaction(2) before main(), pre_exec(3)")]
pub mod dispositions;

use std::future::poll_fn;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::pin;
use std::sync::mpsc::sync_channel;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::task::Poll;
use std::thread::{self, JoinHandle};

use tokio::runtime::{Builder, LocalRuntime};

/// Creates an event loop for the calling thread.
///
/// # Errors
/// Those of epoll_create1(2) and eventfd(2).
pub fn event_loop() -> io::Result<LocalRuntime> {
    Builder::new_current_thread().enable_all().build_local(Default::default())
}

/// Starts a thread that runs `life` on an event loop of its own.
///
/// Returns once the event loop exists.
///
/// # Errors
/// Those of clone(2) and of [`event_loop`].
pub fn start_thread(
    name: &str,
    life: impl AsyncFnOnce() + Send + 'static,
) -> io::Result<JoinHandle<()>> {
    let (sender, is_ready) = sync_channel(1);
    let run = move || match event_loop() {
        Ok(event_loop) => {
            let _ = sender.send(Ok(()));
            event_loop.block_on(life());
        }
        Err(error) => drop(sender.send(Err(error))),
    };
    let handle = thread::Builder::new().name(name.into()).spawn(run)?;
    is_ready.recv().map_err(|_| io::Error::other("the thread panicked"))??;
    Ok(handle)
}

/// Locks a mutex, even if a thread has panicked with the lock.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Waits for a future. Returns `None` if it panics; the panic hook has logged the panic by then.
pub async fn catch_panic<T>(future: impl Future<Output = T>) -> Option<T> {
    let mut future = pin!(future);
    // A future that has panicked is not polled again: its half-done state is only dropped.
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
    async fn a_panic_becomes_none_and_later_calls_succeed() {
        let accept = async |round: u32| {
            yield_now().await;
            assert_ne!(round, 1, "a bug");
            round
        };
        let mut accepted = Vec::new();
        for round in 0..3 {
            accepted.push(catch_panic(accept(round)).await);
        }
        assert_eq!(accepted, [Some(0), None, Some(2)]);
    }
}
