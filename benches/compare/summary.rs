//! The tables of BENCHMARKS.md, each found again on the page by its title.

use crate::comparison::{Comparison, Entry, Section};
use crate::goals::verdicts;
use crate::table::{Table, grouped};

const PAIRS: [(&str, &str); 4] = [
    ("tcp-tcp", "TCP to TCP"),
    ("tcp-unix", "TCP to Unix"),
    ("unix-tcp", "Unix to TCP"),
    ("unix-unix", "Unix to Unix"),
];

/// Returns the tables for which the run has figures.
pub(crate) fn tables(comparison: &Comparison) -> Vec<Table> {
    let mut tables = vec![machine(comparison)];
    tables.extend(PAIRS.map(|pair| costs(comparison, pair)));
    tables.extend([
        one_stream(comparison),
        datagrams(comparison),
        rates(comparison),
        beside_bulk(comparison),
        idle(comparison),
        options(comparison),
        goals(comparison),
    ]);
    tables.retain(|table| !table.is_empty());
    tables
}

fn machine(comparison: &Comparison) -> Table {
    let mut table = Table::new("Machine");
    let rounds = ("Rounds".into(), comparison.rounds.to_string());
    table.add(comparison.machine.to_string(), [rounds]);
    table
}

/// CPU per unit of work: all rows from TCP to TCP, and of the other pairs those that differ most.
fn costs(comparison: &Comparison, (pair, words): (&str, &str)) -> Table {
    let mut table = Table::new(words);
    for section in comparison.sections.iter().filter(|section| section.pair == pair) {
        let is_elsewhere = ["beside", "bulk-1-"].iter().any(|it| section.row.starts_with(it));
        let is_shown = pair == "tcp-tcp" || BESIDES_TCP.contains(&&*section.row);
        if is_shown && !is_elsewhere {
            let (row, symbol) = (&section.row, section.unit.symbol());
            table.add(
                format!("{row}, {symbol}"),
                section.cells(is_compared, |entry| section.cost(entry)),
            );
            let half_close = section.entries.iter().find(|it| it.option() == Some("half-close"));
            if let Some(nginx) = half_close {
                // socket-proxyd and HAProxy always pass a half-close on, nginx on request.
                let passes_on = |entry: &Entry| {
                    entry.name == "socket-proxyd" || entry.name.starts_with("HAProxy")
                };
                let mut cells = section.cells(passes_on, |entry| section.cost(entry));
                let name = nginx.name.replace(" (half-close)", "");
                cells.extend(section.cost(nginx).map(|cost| (name, cost)));
                table.add(format!("{row}, half-close, {symbol}"), cells);
            }
        }
    }
    table
}

/// CPU and rate of one connection, beside the floor.
fn one_stream(comparison: &Comparison) -> Table {
    let mut table = Table::new("One stream");
    for row in ["bulk-1-up", "bulk-1-down"] {
        for (section, words) in pairs_of(comparison, row) {
            let cell = |entry: &Entry| {
                Some(format!("{}; {:.2}", section.cost(entry)?, entry.rate()?.median))
            };
            table.add(format!("{row}, {words}"), section.cells(is_compared, cell));
        }
    }
    table
}

/// The quotient of each goal on each pair of families; stars are missed.
fn goals(comparison: &Comparison) -> Table {
    let mut table = Table::new("Goal");
    let verdicts = verdicts(comparison);
    for group in verdicts.chunk_by(|one, other| one.row == other.row) {
        let cells = group.iter().map(|verdict| {
            let star = if verdict.is_met { "" } else { " *" };
            let words = PAIRS.iter().find(|(pair, _)| *pair == verdict.pair);
            let words = words.map_or(verdict.pair, |(_, words)| words);
            (words.into(), format!("{:.2}{star}", verdict.quotient))
        });
        table.add(&group[0].row, cells);
    }
    table
}

/// CPU and rate of datagrams.
fn datagrams(comparison: &Comparison) -> Table {
    let mut table = Table::new("UDP to UDP");
    for section in comparison.sections.iter().filter(|section| section.pair == "udp-udp") {
        let (row, symbol) = (&section.row, section.unit.symbol());
        let cells = |cell: &dyn Fn(&Entry) -> Option<String>| section.cells(is_compared, cell);
        table.add(format!("{row}, {symbol}"), cells(&|entry| section.cost(entry)));
        if !row.ends_with("start") {
            table.add(format!("{row}, per second"), cells(&|entry| section.rate(entry)));
        }
    }
    table
}

const BESIDES_TCP: [&str; 7] =
    ["bulk-up", "bulk-down", "64B-100", "64B-1000", "64B-4000", "short", "bulk-600"];

fn rates(comparison: &Comparison) -> Table {
    let mut table = Table::new("Rate (TCP)");
    for row in ["64B-100", "short", "bulk-up", "bulk-down"] {
        if let Some(section) = comparison.section(row, "tcp-tcp") {
            let rate = |entry: &Entry| section.rate(entry);
            table.add(format!("{row}, per second"), section.cells(is_compared, rate));
            let p99 = |entry: &Entry| Some(grouped(entry.latency(1)?.median * 1e6));
            table.add(format!("{row}, p99 µs"), section.cells(is_compared, p99));
        }
    }
    table
}

/// The 99th percentile of small messages, and the rate of the bulk beside them.
fn beside_bulk(comparison: &Comparison) -> Table {
    let mut table = Table::new("p99 ms; GB/s");
    for row in ["beside-1", "beside-8", "beside-stalled"] {
        for (section, words) in pairs_of(comparison, row).take(2) {
            let cell = |entry: &Entry| {
                let rate = format!("{:.2}", entry.rate()?.median);
                Some(match entry.latency(1) {
                    Some(p99) => format!("{:.1}; {rate}", p99.median * 1e3),
                    None if row == "beside-stalled" => rate,
                    None => format!("none; {rate}"),
                })
            };
            table.add(format!("{row}, {words}"), section.cells(is_compared, cell));
        }
    }
    table
}

fn idle(comparison: &Comparison) -> Table {
    let mut table = Table::new("Idle (TCP)");
    if let Some(section) = comparison.section("idle-4000", "tcp-tcp") {
        let mut add = |what: &str, figure: &dyn Fn(&Entry) -> Option<f64>| {
            let cell = |entry: &Entry| figure(entry).map(grouped);
            table.add(format!("idle-4000, {what}"), section.cells(is_compared, cell));
        };
        add("descriptors", &|entry| Some(entry.held(|held| held.descriptors)?.median));
        add("resident bytes", &|entry| Some(entry.held(|held| held.resident)?.median));
        add("pipe bytes", &|entry| Some(entry.held(|held| held.pipes)?.median));
        add("failures", &|entry| Some(entry.failures() as f64));
    }
    table
}

/// What the options of socket-proxyd cost.
fn options(comparison: &Comparison) -> Table {
    let mut table = Table::new("Option");
    let mut add = |section: &Section, what: &str, cell: &dyn Fn(&Entry) -> Option<String>| {
        if section.entries.iter().any(|entry| entry.is_ours() && entry.option().is_some()) {
            let cells =
                section.entries.iter().filter(|entry| entry.is_ours()).filter_map(|entry| {
                    Some((entry.option().unwrap_or("none").to_string(), cell(entry)?))
                });
            table.add(format!("{}, {what}", section.row), cells);
        }
    };
    for (pair, words) in PAIRS {
        for section in comparison.sections.iter().filter(|section| section.pair == pair) {
            if pair == "tcp-tcp" || OPTIONS_BESIDES_TCP.contains(&(&*section.row, pair)) {
                let what = format!("{words}, {}", section.unit.symbol());
                add(section, &what, &|entry| section.cost(entry));
            }
        }
    }
    for row in ["64B-100", "64B-1000", "short"] {
        if let Some(section) = comparison.section(row, "tcp-tcp") {
            add(section, "TCP to TCP, per second", &|entry| section.rate(entry));
        }
    }
    if let Some(section) = comparison.section("idle-100", "tcp-tcp") {
        let held = |entry: &Entry, of| entry.held(of).map(|figure| grouped(figure.median));
        add(section, "descriptors", &|entry| held(entry, |held| held.descriptors));
        add(section, "resident bytes", &|entry| held(entry, |held| held.resident));
    }
    table
}

const OPTIONS_BESIDES_TCP: [(&str, &str); 3] =
    [("64B-100", "tcp-unix"), ("short", "tcp-unix"), ("bulk-up", "unix-tcp")];

fn pairs_of<'a>(
    comparison: &'a Comparison,
    row: &'a str,
) -> impl Iterator<Item = (&'a Section, &'static str)> {
    PAIRS.iter().filter_map(move |(pair, words)| Some((comparison.section(row, pair)?, *words)))
}

/// Tells a program with its default settings from one with an option, and from no proxy at all.
fn is_compared(entry: &Entry) -> bool {
    entry.option().is_none() && entry.name != "direct"
}

impl Section {
    /// Returns a cell for each contender that is shown and has one.
    fn cells(
        &self,
        is_shown: impl Fn(&Entry) -> bool,
        cell: impl Fn(&Entry) -> Option<String>,
    ) -> Vec<(String, String)> {
        let shown = self.entries.iter().filter(|entry| is_shown(entry));
        shown.filter_map(|entry| Some((entry.name.clone(), cell(entry)?))).collect()
    }

    fn cost(&self, entry: &Entry) -> Option<String> {
        Some(self.unit.number(entry.cost()?.median))
    }
}
