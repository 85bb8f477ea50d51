//! Compares what proxies cost: each kind of work on each pair of families, in interleaved rounds.
//!
//! `cargo bench` runs all of it (see BENCHMARKS.md); `cargo bench -- --quick` runs it once and short,
//! for CI. The load, clients and backends, is one thread of this process. The contender is a process
//! of its own, whose CPU time comes from /proc.

#![forbid(unsafe_code)]

mod addresses;
mod clock;
mod comparison;
mod contender;
mod datagram_stage;
mod datagrams;
#[path = "../../tests/support/fake_systemd.rs"]
#[allow(dead_code, unreachable_pub, reason = "the tests use the rest")]
mod fake_systemd;
mod load;
mod goals;
mod machine;
mod peers;
mod plot;
mod process;
mod report;
mod rows;
mod scrapers;
mod splice_loop;
mod stage;
mod summary;
mod table;

use std::error::Error;
use std::fs;
use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Parser;
use comparison::Comparison;
use contender::Contender;
use rows::ROWS;
use stage::Effort;

/// The command line of the benchmark.
#[derive(Debug, Parser)]
#[command(name = "cargo bench --", about = "Compare proxies, in one interleaved run.")]
struct Arguments {
    /// Run only what has one of these texts in "ROW PAIR CONTENDER".
    filters: Vec<String>,
    /// Run this many rounds.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Work this many seconds in each sample.
    #[arg(long, default_value_t = 0.5)]
    seconds: f64,
    /// Run everything once and short.
    #[arg(long)]
    quick: bool,
    /// Add a program that takes activation sockets; the target is appended to COMMAND.
    #[arg(long, value_name = "NAME=COMMAND", value_parser = read_peer)]
    peer: Vec<(String, Vec<String>)>,
    /// Show the figures of an earlier run, and run nothing.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["filters", "quick", "peer", "json"])]
    from: Option<PathBuf>,
    /// Write all samples to FILE.
    #[arg(long, value_name = "FILE", default_value = "target/bench/comparison.json")]
    json: PathBuf,
    /// Write a page with plots to FILE.
    #[arg(long, value_name = "FILE", default_value = "target/bench/comparison.html")]
    html: PathBuf,
    /// Write the plot of the README to FILE.
    #[arg(long, value_name = "FILE", default_value = "target/bench/cost.svg")]
    svg: PathBuf,
    /// Write the tables of BENCHMARKS.md to FILE, in place of those that FILE has.
    #[arg(long, value_name = "FILE")]
    markdown: Option<PathBuf>,
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
    contender::serve_as_command();
    let arguments = Arguments::parse();
    match compare(&arguments) {
        // Short samples of a busy machine may be poor, but socket-proxyd fails no client.
        Ok(comparison) if comparison.our_failures() > 0 => ExitCode::FAILURE,
        Ok(comparison) if arguments.is_full() && !meets_all_goals(&comparison) => ExitCode::from(2),
        Ok(_) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

impl Arguments {
    /// Whether the run is long enough, and has all rows, so that it is judged by the goals.
    fn is_full(&self) -> bool {
        !self.quick && self.filters.is_empty() && self.from.is_none()
    }
}

fn meets_all_goals(comparison: &Comparison) -> bool {
    let unjudged = goals::unjudged(comparison);
    for goal in &unjudged {
        eprintln!("{goal}: not judged. (The run has no peer for it, or was not made by root.)");
    }
    unjudged.is_empty() && goals::verdicts(comparison).iter().all(|verdict| verdict.is_met)
}

fn compare(arguments: &Arguments) -> Result<Comparison, Box<dyn Error>> {
    let comparison = match &arguments.from {
        Some(path) => serde_json::from_str(&read(path)?)
            .map_err(|error| format!("{}: {error}", path.display()))?,
        None => {
            let comparison = run(arguments);
            write(&arguments.json, &serde_json::to_string_pretty(&comparison)?)?;
            comparison
        }
    };
    print!("{}", report::terminal(&comparison));
    write(&arguments.html, &report::html(&comparison)?)?;
    if let Some(svg) = plot::cost(&comparison)? {
        write(&arguments.svg, &svg)?;
    }
    if let Some(path) = &arguments.markdown {
        let page = if path.exists() { read(path)? } else { String::new() };
        write(path, &table::refill(&page, &summary::tables(&comparison)))?;
    }
    Ok(comparison)
}

fn read(path: &Path) -> Result<String, String> {
    fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()))
}

fn write(path: &Path, text: &str) -> Result<(), String> {
    let written = path.parent().map_or(Ok(()), fs::create_dir_all);
    let written = written.and_then(|()| fs::write(path, text));
    written.map_err(|error| format!("{}: {error}", path.display()))?;
    println!("{}", path.display());
    Ok(())
}

fn run(arguments: &Arguments) -> Comparison {
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
        for &pair in row.pairs() {
            let is_wanted = |contender: &Contender| {
                let name = format!("{} {} {}", row.name, comparison::pair(pair), contender.name);
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
    let mut comparison = Comparison::new(rounds);
    let all = plan.iter().map(|(_, _, contenders)| contenders.len()).sum::<usize>() * rounds;
    let mut done = 0;
    for _ in 0..rounds {
        for (row, pair, contenders) in &mut plan {
            for contender in contenders.iter() {
                done += 1;
                let (row_name, pair_name) = (row.name, comparison::pair(*pair));
                progress(&format!("[{done}/{all}] {row_name} {pair_name} {}", contender.name));
                comparison.add(*row, *pair, contender, row.sample(contender, *pair, effort));
            }
            // Each contender is the first in its turn: the machine has just done something else.
            contenders.rotate_left(1);
        }
    }
    progress("");
    comparison
}

fn progress(text: &str) {
    let mut stderr = std::io::stderr();
    if stderr.is_terminal() {
        let _ = write!(stderr, "\r\x1b[K{text}");
    }
}

/// Allows for thousands of clients and backends, which are descriptors of this process.
fn raise_descriptor_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit });
}
