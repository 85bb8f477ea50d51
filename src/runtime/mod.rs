//! Event loops, threads with one, and panics as values.

#[expect(unsafe_code, reason = "sigaction(2) before main(), pre_exec(3)")]
pub mod dispositions;

use std::future::poll_fn;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::pin;
use std::sync::mpsc::sync_channel;
use std::task::Poll;
use std::thread::{self, JoinHandle};

use tokio::runtime::{Builder, LocalRuntime};

/// An event loop for the thread that asks for it.
///
/// # Errors
/// epoll_create1(2)'s, eventfd(2)'s and the like.
pub fn event_loop() -> io::Result<LocalRuntime> {
    Builder::new_current_thread().enable_all().build_local(Default::default())
}

/// Starts a thread with an event loop for this life, and waits until it has it.
///
/// # Errors
/// clone(2)'s, and those of [`event_loop`].
pub fn start_thread(
    name: &str,
    life: impl AsyncFnOnce() + Send + 'static,
) -> io::Result<JoinHandle<()>> {
    let (made, is_made) = sync_channel(1);
    let live = move || {
        let event_loop = match event_loop() {
            Ok(event_loop) => event_loop,
            Err(error) => return drop(made.send(Err(error))),
        };
        let _ = made.send(Ok(()));
        event_loop.block_on(life());
    };
    let handle = thread::Builder::new().name(name.into()).spawn(live)?;
    is_made.recv().map_err(|_| io::Error::other("it has panicked"))??;
    Ok(handle)
}

/// Waits for a future, or for its panic, which is `None`; the panic hook has logged it.
pub async fn catch_panic<T>(future: impl Future<Output = T>) -> Option<T> {
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
            accepted.push(catch_panic(accept(round)).await);
        }
        assert_eq!(accepted, [Some(0), None, Some(2)]);
    }
}
