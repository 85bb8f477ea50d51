//! Runs a simulation for each seed, on all processors.

use std::convert::Infallible;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;
use std::{env, process, thread};

use tokio::time::Instant;

use crate::descriptors;
use crate::support::{TIMEOUT, poll_until};

/// When a seed counts as endless. Most take milliseconds, and all together wait for two processors.
const SEED_MAX: Duration = Duration::from_secs(120);

/// Runs a simulation for each seed, or for the one in `SEED`. Each thread has its own, and a table
/// of descriptors of its own, in which a seed leaves nothing behind.
pub fn run<S: FnMut(u64)>(simulation: impl Fn() -> S + Sync) {
    let number = |name| env::var(name).ok().map(|text| text.parse::<u64>().expect(name));
    let seeds = match number("SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..number("SEEDS").unwrap_or(2_000),
    };
    let (next, failed) = (AtomicU64::new(seeds.start), Mutex::new(Vec::new()));
    let work = |running: &Mutex<Option<(u64, Instant)>>| {
        descriptors::own_table();
        let mut simulate = simulation();
        let before = descriptors::open();
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= seeds.end {
                break;
            }
            *running.lock().unwrap() = Some((seed, Instant::now()));
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
            *running.lock().unwrap() = None;
        }
    };
    // Most of the time they wait for the kernel.
    let threads = 4 * thread::available_parallelism().map_or(1, usize::from);
    let threads = threads.min((seeds.end - seeds.start) as usize);
    let running: Vec<_> = (0..threads).map(|_| Mutex::new(None)).collect();
    let (working, all_ended) = mpsc::channel::<Infallible>();
    thread::scope(|scope| {
        for running in &running {
            let working = working.clone();
            scope.spawn(move || {
                let _working = working;
                work(running);
            });
        }
        drop(working);
        while all_ended.recv_timeout(Duration::from_secs(1)) == Err(RecvTimeoutError::Timeout) {
            for (seed, start) in running.iter().filter_map(|it| *it.lock().unwrap()) {
                if start.elapsed() > SEED_MAX {
                    eprintln!("Seed {seed} does not end: SEED={seed} replays it.");
                    // Nothing else stops a thread that runs in circles.
                    process::abort();
                }
            }
        }
    });
    let failed = failed.into_inner().unwrap();
    assert!(failed.is_empty(), "failed seeds: {failed:?}");
}
