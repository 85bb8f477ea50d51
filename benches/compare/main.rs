//! What a proxy costs: ours beside the others, each kind of work on each pair of families, in
//! interleaved rounds of one run; medians with minimum and maximum.
//!
//! `cargo bench` (see BENCHMARKS.md); `cargo bench -- --quick` is there so that CI runs all of it
//! once. The load, clients and backends, is one thread of this process; the contender is a process
//! of its own, whose CPU time is taken from /proc.

#![forbid(unsafe_code)]

mod clock;
mod contender;
#[path = "../../tests/support/fake_systemd.rs"]
#[allow(dead_code, unreachable_pub, reason = "the tests use the rest")]
mod fake_systemd;
mod load;
mod process;
mod report;
mod scrapers;
mod work;

use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use contender::{Contender, Family};
use report::Comparison;
use work::{Effort, ROWS};

const PAIRS: [(Family, Family); 3] =
    [(Family::Tcp, Family::Tcp), (Family::Tcp, Family::Unix), (Family::Unix, Family::Tcp)];

/// The command line of the benchmark.
#[derive(Debug, Parser)]
#[command(name = "cargo bench --", about = "Compares proxies, in one interleaved run.")]
struct Arguments {
    /// Only rows, pairs or contenders with one of these words in "ROW PAIR CONTENDER".
    filters: Vec<String>,
    /// Rounds.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Seconds of work in each sample.
    #[arg(long, default_value_t = 0.5)]
    seconds: f64,
    /// Everything once and short.
    #[arg(long)]
    quick: bool,
    /// One more that takes activation sockets; the target is put behind COMMAND.
    #[arg(long, value_name = "NAME=COMMAND", value_parser = read_peer)]
    peer: Vec<(String, Vec<String>)>,
    /// Where the figures go.
    #[arg(long, default_value = "target/bench/comparison.json")]
    json: PathBuf,
    /// Where the page with the plots goes.
    #[arg(long, default_value = "target/bench/comparison.html")]
    html: PathBuf,
    /// What cargo adds.
    #[arg(long, hide = true)]
    bench: bool,
}

fn read_peer(text: &str) -> Result<(String, Vec<String>), String> {
    let (name, command) = text.split_once('=').ok_or("it is NAME=COMMAND")?;
    let words: Vec<_> = command.split_whitespace().map(String::from).collect();
    if words.is_empty() { Err("COMMAND is empty".into()) } else { Ok((name.into(), words)) }
}

fn main() -> ExitCode {
    if let Some(error) = contender::launch() {
        eprintln!("bench-launcher: {error}");
        return ExitCode::FAILURE;
    }
    let arguments = Arguments::parse();
    raise_descriptor_limit();
    let (rounds, effort) = if arguments.quick {
        (1, Effort { seconds: 0.02, starts: 1, divisor: 20 })
    } else {
        (arguments.rounds.max(1), Effort { seconds: arguments.seconds, starts: 20, divisor: 1 })
    };
    let contenders = contender::installed(&arguments.peer);
    let is_root = rustix::process::geteuid().is_root();
    let mut plan = Vec::new();
    for row in ROWS.into_iter().filter(|row| is_root || row.user == contender::User::Ourselves) {
        for pair in PAIRS {
            let is_wanted = |contender: &Contender| {
                let name = format!("{} {} {}", row.name, report::pair(pair), contender.name);
                let filters = &arguments.filters;
                filters.is_empty() || filters.iter().any(|filter| name.contains(&**filter))
            };
            let mut contenders: Vec<_> = contenders.iter().collect();
            contenders.retain(|contender| row.is_for(contender) && is_wanted(contender));
            if !contenders.is_empty() {
                plan.push((row, pair, contenders));
            }
        }
    }
    let mut comparison = Comparison::default();
    let all = plan.iter().map(|(_, _, contenders)| contenders.len()).sum::<usize>() * rounds;
    let mut done = 0;
    for _ in 0..rounds {
        for (row, pair, contenders) in &mut plan {
            for contender in contenders.iter() {
                done += 1;
                let (row_name, pair_name) = (row.name, report::pair(*pair));
                progress(&format!("[{done}/{all}] {row_name} {pair_name} {}", contender.name));
                comparison.add(*row, *pair, contender, row.sample(contender, *pair, effort));
            }
            // No contender is always first, when the machine has just done something else.
            contenders.rotate_left(1);
        }
    }
    progress("");
    print!("{}", comparison.table());
    for (path, text) in
        [(&arguments.json, comparison.json(rounds)), (&arguments.html, comparison.html(rounds))]
    {
        let written = path.parent().map_or(Ok(()), std::fs::create_dir_all);
        match written.and_then(|()| std::fs::write(path, text)) {
            Ok(()) => println!("{}", path.display()),
            Err(error) => {
                eprintln!("{}: {error}", path.display());
                return ExitCode::FAILURE;
            }
        }
    }
    // Short samples of a busy machine may be poor, but ours fails no client.
    if comparison.our_failures() > 0 { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

fn progress(text: &str) {
    let mut stderr = std::io::stderr();
    if stderr.is_terminal() {
        let _ = write!(stderr, "\r\x1b[K{text}");
    }
}

/// Thousands of clients and their backends are this process's descriptors, too.
fn raise_descriptor_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit });
}
