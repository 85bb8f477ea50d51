//! What a run shows: a table for the terminal, and a page with plots.

use std::error::Error;
use std::fmt::Write;

use crate::comparison::{Comparison, Entry, Section};
use crate::goals::{to_the_best, verdicts};
use crate::plot;
use crate::rows::Unit;
use crate::table::{Table, grouped};

/// Returns everything, for the terminal.
pub(crate) fn terminal(comparison: &Comparison) -> String {
    let mut text = String::new();
    for section in &comparison.sections {
        text.push_str(&format!("\n{}\n{}", section.title(), section.table().text()));
        if let Some(quotients) = to_the_best(section) {
            text.push_str(&format!("  {quotients}\n"));
        }
    }
    text.push_str("\nGoals\n");
    for verdict in verdicts(comparison) {
        let word = if verdict.is_met { "met" } else { "MISSED" };
        text.push_str(&format!(
            "  {} on {}: {:.2} of {}, {word}\n",
            verdict.row, verdict.pair, verdict.quotient, verdict.than
        ));
    }
    text
}

/// Returns everything as one page, which loads no other file.
pub(crate) fn html(comparison: &Comparison) -> Result<String, Box<dyn Error>> {
    let mut page = String::from(HEAD);
    write!(
        page,
        "<h1>What a proxy costs</h1><p>{}. Rounds: {}; bars are medians, lines go from the least to the \
         most. Shorter is better.</p>",
        comparison.machine, comparison.rounds
    )?;
    for section in &comparison.sections {
        let (plot, table) = (plot::section(section)?, section.table().html());
        write!(page, "<h2>{}</h2>{plot}{table}", section.title())?;
    }
    page.push_str("</body></html>\n");
    Ok(page)
}

const HEAD: &str = "<!DOCTYPE html>
<html lang='en'><head><meta charset='utf-8'><title>What a proxy costs</title><style>
body { font: 15px/1.4 sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; color: #222 }
h2 { font-size: 1.05em; margin: 2em 0 .4em } svg { display: block; max-width: 100% }
table { border-collapse: collapse; font-size: 13px; margin-top: .4em }
td { text-align: right; padding: .1em .8em } td:first-child { text-align: left }
</style></head><body>
";

impl Section {
    fn title(&self) -> String {
        format!("{} {}: {}", self.row, self.pair, self.about)
    }

    fn table(&self) -> Table {
        let mut table = Table::new("");
        for entry in &self.entries {
            let held = self.held(entry);
            let cells = if held.is_empty() { self.costs(entry) } else { held };
            let failures = ("failures", entry.failures().to_string());
            let cells = cells.into_iter().chain([failures]);
            table.add(&entry.name, cells.map(|(column, cell)| (column.to_string(), cell)));
        }
        table
    }

    fn held(&self, entry: &Entry) -> Vec<(&'static str, String)> {
        let held = [
            ("descriptors", entry.held(|held| held.descriptors)),
            ("resident bytes", entry.held(|held| held.resident)),
            ("pipe bytes", entry.held(|held| held.pipes)),
        ];
        held.into_iter().filter_map(|(name, it)| Some((name, grouped(it?.median)))).collect()
    }

    fn costs(&self, entry: &Entry) -> Vec<(&'static str, String)> {
        let cost = entry.cost().map(|cost| {
            let [median, least, most] =
                [cost.median, cost.least, cost.most].map(|seconds| self.unit.number(seconds));
            format!("{median} ({least} to {most})")
        });
        let p = |percentile| entry.latency(percentile).map(|it| grouped(it.median * 1e6));
        let cells = [
            (self.unit.words(), cost),
            ("per second", self.rate(entry)),
            ("p50 µs", p(0)),
            ("p99 µs", p(1)),
            ("p999 µs", p(2)),
        ];
        cells.into_iter().filter_map(|(name, cell)| Some((name, cell?))).collect()
    }

    pub(crate) fn rate(&self, entry: &Entry) -> Option<String> {
        let rate = entry.rate()?.median;
        match self.unit {
            Unit::Start | Unit::Answer => None,
            Unit::Gigabyte => Some(format!("{rate:.2} GB")),
            Unit::RoundTrip | Unit::Connection | Unit::Datagram => Some(grouped(rate)),
        }
    }
}
