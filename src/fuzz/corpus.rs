//! Runs each target on the inputs of `fuzz/corpus`, and on mutations of them.
//!
//! An input that fails is printed with its seed. `FUZZ_SEED=N cargo test --lib fuzz::` runs the
//! mutation with this seed again, and `FUZZ_RUNS=N` sets the number of mutations.

use std::path::Path;
use std::time::Duration;
use std::{env, fs, thread};

use tokio::time::Instant;

use crate::fuzz;

/// Mutations of a test, and the time after which no more begin.
const RUNS: u64 = 20_000;
const TIME: Duration = Duration::from_millis(600);

/// Runs a target. The inputs are the same on each run.
fn run(name: &str, target: fn(&[u8])) {
    let fuzz = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz");
    if !fuzz.exists() {
        // A package of the crate has no corpus.
        return eprintln!("skipped: there is no {fuzz:?}");
    }
    let directory = fuzz.join("corpus").join(name);
    let entries = fs::read_dir(&directory).unwrap_or_else(|why| panic!("{directory:?}: {why}"));
    let mut paths: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    let inputs: Vec<_> = paths.iter().map(|path| fs::read(path).unwrap()).collect();
    for (path, bytes) in paths.iter().zip(&inputs) {
        try_one(target, format!("{path:?}"), bytes);
    }
    let number = |name| env::var(name).ok().map(|text| text.parse::<u64>().expect(name));
    let (seeds, time) = match (number("FUZZ_SEED"), number("FUZZ_RUNS")) {
        (Some(seed), _) => (seed..=seed, Duration::MAX),
        (None, Some(runs)) => (1..=runs, Duration::MAX),
        (None, None) => (1..=RUNS, TIME),
    };
    let start = Instant::now();
    for seed in seeds.take_while(|_| start.elapsed() < time) {
        try_one(target, format!("FUZZ_SEED={seed}"), &Mutator(seed).mutation(&inputs));
    }
}

fn try_one(target: fn(&[u8]), origin: String, bytes: &[u8]) {
    let input = Input { origin, bytes };
    target(bytes);
    drop(input);
}

/// Prints the input if the target panics.
struct Input<'a> {
    origin: String,
    bytes: &'a [u8],
}

impl Drop for Input<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("{}: \"{}\"", self.origin, self.bytes.escape_ascii());
        }
    }
}

/// A generator of pseudo-random numbers, with its seed: splitmix64.
struct Mutator(u64);

impl Mutator {
    fn below(&mut self, sides: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((mixed ^ (mixed >> 31)) % sides.max(1) as u64) as usize
    }

    /// Returns one of the inputs after one to eight changes.
    fn mutation(&mut self, inputs: &[Vec<u8>]) -> Vec<u8> {
        let mut bytes = inputs[self.below(inputs.len())].clone();
        for _ in 0..=self.below(8) {
            let (at, len) = (self.below(bytes.len() + 1), bytes.len());
            let end = at + self.below(len - at + 1).min(16);
            match self.below(6) {
                0 if at < len => bytes[at] ^= 1 << self.below(8),
                1 => bytes.insert(at, self.below(256) as u8),
                2 => drop(bytes.drain(at..end)),
                3 => {
                    let other = &inputs[self.below(inputs.len())];
                    let from = self.below(other.len() + 1);
                    bytes.splice(at.., other[from..].iter().copied());
                }
                4 => {
                    let word = WORDS[self.below(WORDS.len())];
                    bytes.splice(at..end, word.iter().copied());
                }
                _ => {
                    let copy = bytes[at..end].to_vec();
                    let to = self.below(len + 1);
                    bytes.splice(to..to, copy);
                }
            }
        }
        bytes
    }
}

/// Words that the readers look for.
const WORDS: [&[u8]; 40] = [
    b"\0",
    b"\n",
    b"\r\n",
    b" ",
    b"=",
    b":",
    b",",
    b"/",
    b"@",
    b"--",
    b"-",
    b"%",
    b"$",
    b"\\",
    b"\"",
    b"'",
    b";",
    b"[::1]",
    b"[",
    b"]",
    b"0",
    b"65535",
    b"4294967295",
    b"18446744073709551615",
    b"infinity",
    b"min",
    b".5",
    b"udp:",
    b"dgram:",
    b"vsock:",
    b"unix",
    b"/32",
    b"::ffff:127.0.0.1",
    b"fe80::1%lo",
    b"127.0.0.1:80",
    b"READY=1",
    b"sp\x04\x01",
    b"\xff",
    b"\xc3\xa4",
    b"HTTP/1.1",
];

/// Makes a test of each target.
macro_rules! targets {
    ($($target:ident),* $(,)?) => {
        $(#[test]
        fn $target() {
            run(stringify!($target), fuzz::$target);
        })*
    };
}

targets!(
    addresses,
    backend_answer,
    command_line,
    control_messages,
    metrics_request,
    notification,
    number,
    passive_from,
    selectors,
    session_keys,
    socket_address,
    stored_message,
    stored_queue,
    time_span,
);

#[test]
fn exec_words() {
    run("exec_words", |bytes| fuzz::exec_words(bytes, &fuzz::PLAIN));
}

#[test]
fn unit_writer() {
    run("unit_writer", |bytes| fuzz::unit_writer(bytes, &fuzz::PLAIN));
}
