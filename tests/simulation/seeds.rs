//! Runs a simulation for each seed, on all processors.

use std::env;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use tokio::time::Instant;

use crate::descriptors;
use crate::support::{TIMEOUT, poll_until};

/// Runs a simulation for each seed, or for the one in `SEED`. Each thread has its own, and a table
/// of descriptors of its own, in which a seed leaves nothing behind.
pub fn run<S: FnMut(u64)>(simulation: impl Fn() -> S + Sync) {
    let number = |name| env::var(name).ok().map(|text| text.parse::<u64>().expect(name));
    let seeds = match number("SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..number("SEEDS").unwrap_or(2_000),
    };
    let (next, failed) = (AtomicU64::new(seeds.start), Mutex::new(Vec::new()));
    let work = || {
        descriptors::own_table();
        let mut simulate = simulation();
        let before = descriptors::open();
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= seeds.end {
                break;
            }
            let simulation = AssertUnwindSafe(|| {
                simulate(seed);
                // The thread that closes passed descriptors takes its time.
                let deadline = Instant::now() + TIMEOUT;
                poll_until(deadline, || (descriptors::open() == before).then_some(()));
                assert_eq!(descriptors::open(), before, "descriptors are left open");
            });
            if catch_unwind(simulation).is_err() {
                eprintln!("This was seed {seed}: SEED={seed} replays it.");
                failed.lock().unwrap().push(seed);
                next.store(seeds.end, Ordering::Relaxed);
            }
        }
    };
    thread::scope(|scope| {
        // Most of the time they wait for the kernel.
        let threads = 4 * thread::available_parallelism().map_or(1, usize::from);
        (0..threads.min((seeds.end - seeds.start) as usize)).for_each(|_| drop(scope.spawn(work)));
    });
    let failed = failed.into_inner().unwrap();
    assert!(failed.is_empty(), "failed seeds: {failed:?}");
}
