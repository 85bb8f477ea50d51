//! What is shown: a table, JSON, and a page with plots.

use std::fmt::Write;

use serde_json::{Value, json};

use crate::contender::{Contender, Family};
use crate::process::Holdings;
use crate::work::{Row, Sample, Work};

/// A pair of families in words.
pub(crate) fn pair((front, back): (Family, Family)) -> &'static str {
    match (front, back) {
        (Family::Tcp, Family::Tcp) => "tcp-tcp",
        (Family::Tcp, Family::Unix) => "tcp-unix",
        (Family::Unix, Family::Tcp) => "unix-tcp",
        (Family::Unix, Family::Unix) => "unix-unix",
    }
}

/// All samples, in the order in which they came first.
#[derive(Default)]
pub(crate) struct Comparison {
    sections: Vec<Section>,
}

struct Section {
    row: Row,
    pair: (Family, Family),
    entries: Vec<(String, Vec<Sample>)>,
}

/// A figure over all rounds.
#[derive(Clone, Copy)]
struct Figure {
    median: f64,
    least: f64,
    most: f64,
}

impl Figure {
    fn of(values: impl Iterator<Item = Option<f64>>) -> Option<Self> {
        let mut values: Vec<f64> = values.collect::<Option<_>>()?;
        values.sort_by(f64::total_cmp);
        Some(Self { median: values[values.len() / 2], least: values[0], most: *values.last()? })
    }

    fn json(self) -> Value {
        json!({ "median": self.median, "min": self.least, "max": self.most })
    }
}

/// A contender's figures in a section.
struct Summary<'a> {
    name: &'a str,
    rate: Figure,
    cost: Option<Figure>,
    latency: Option<[Figure; 3]>,
    failures: u64,
    held: Option<[Figure; 3]>,
}

impl Section {
    fn summaries<'a>(&'a self) -> Vec<Summary<'a>> {
        let summary = |(name, samples): &'a (String, Vec<Sample>)| {
            let figure = |of: &dyn Fn(&Sample) -> Option<f64>| Figure::of(samples.iter().map(of));
            let latency = |at: usize| figure(&|it| it.latency.map(|all| all[at]));
            let held = |of: fn(&Holdings) -> usize| figure(&|it| it.held.map(|it| of(&it) as f64));
            let three = |[a, b, c]: [Option<Figure>; 3]| Some([a?, b?, c?]);
            Some(Summary {
                name,
                rate: figure(&|it| Some(it.rate))?,
                cost: figure(&|it| it.cost),
                latency: three([latency(0), latency(1), latency(2)]),
                failures: samples.iter().map(|it| it.failures).sum(),
                held: three([
                    held(|it| it.descriptors),
                    held(|it| it.resident),
                    held(|it| it.pipes),
                ]),
            })
        };
        self.entries.iter().filter_map(summary).collect()
    }

    fn title(&self) -> String {
        format!("{} {}: {}", self.row.name, pair(self.pair), self.row.about)
    }

    /// What the cost is measured in.
    fn unit(&self) -> String {
        match self.row.work {
            Work::Activation => "ms, exec to answer".into(),
            Work::BulkUp(_) | Work::BulkDown(_) => "CPU s/GB".into(),
            Work::Short => "CPU us/connection".into(),
            _ => format!("CPU {}/round trip", self.row.unit),
        }
    }

    fn in_units(&self, seconds: f64) -> f64 {
        match self.row.work {
            Work::Activation => seconds * 1e3,
            _ => seconds / self.row.scale,
        }
    }
}

/// Where the bars of a plot begin.
const LEFT: f64 = 190.0;

fn is_ours(name: &str) -> bool {
    name.starts_with("socket-proxyd")
}

impl Comparison {
    pub(crate) fn add(
        &mut self,
        row: Row,
        pair: (Family, Family),
        contender: &Contender,
        sample: Sample,
    ) {
        let section =
            self.sections.iter().position(|it| it.row.name == row.name && it.pair == pair);
        let section = section.unwrap_or_else(|| {
            self.sections.push(Section { row, pair, entries: Vec::new() });
            self.sections.len() - 1
        });
        let entries = &mut self.sections[section].entries;
        match entries.iter_mut().find(|(name, _)| *name == contender.name) {
            Some((_, samples)) => samples.push(sample),
            None => entries.push((contender.name.clone(), vec![sample])),
        }
    }

    /// Connections or answers that ours failed.
    pub(crate) fn our_failures(&self) -> u64 {
        let entries = self.sections.iter().flat_map(|section| &section.entries);
        let ours = entries.filter(|(name, _)| is_ours(name));
        ours.flat_map(|(_, samples)| samples).map(|sample| sample.failures).sum()
    }

    /// For the terminal.
    pub(crate) fn table(&self) -> String {
        let mut text = String::new();
        for section in &self.sections {
            let _ = writeln!(text, "\n{}", section.title());
            if section.entries.iter().any(|(_, samples)| samples.iter().any(|it| it.held.is_some()))
            {
                let _ = writeln!(
                    text,
                    "  {:26}{:>12}{:>14}{:>14}{:>10}",
                    "", "descriptors", "RSS bytes", "pipe bytes", "failures"
                );
            } else {
                let _ = writeln!(
                    text,
                    "  {:26}{:>30}{:>12}{:>10}{:>10}{:>10}{:>10}",
                    "",
                    section.unit(),
                    "a second",
                    "p50 us",
                    "p99 us",
                    "p999 us",
                    "failures"
                );
            }
            for summary in section.summaries() {
                let _ = writeln!(text, "  {:26}{}", summary.name, section.cells(&summary).concat());
            }
        }
        text
    }

    /// For programs.
    pub(crate) fn json(&self, rounds: usize) -> String {
        let sections = self.sections.iter().map(|section| {
            let contenders = section.summaries().into_iter().map(|it| {
                json!({
                    "name": it.name,
                    "rate": it.rate.json(),
                    "cost_seconds": it.cost.map(Figure::json),
                    "latency_seconds": it.latency.map(|latency| json!({
                        "p50": latency[0].json(),
                        "p99": latency[1].json(),
                        "p999": latency[2].json(),
                    })),
                    "failures": it.failures,
                    "each_connection": it.held.map(|held| json!({
                        "descriptors": held[0].json(),
                        "resident_bytes": held[1].json(),
                        "pipe_bytes": held[2].json(),
                    })),
                })
            });
            json!({
                "row": section.row.name,
                "about": section.row.about,
                "pair": pair(section.pair),
                "contenders": contenders.collect::<Vec<_>>(),
            })
        });
        let all = json!({ "rounds": rounds, "rows": sections.collect::<Vec<_>>() });
        format!("{all:#}\n")
    }

    /// For people, in a browser: one file, with nothing to load.
    pub(crate) fn html(&self, rounds: usize) -> String {
        let mut page = String::from(HEAD);
        let _ = writeln!(
            page,
            "<h1>What a proxy costs</h1><p>Medians of {rounds} interleaved rounds on this machine; \
             the line through a bar goes from the least to the most. Shorter is better.</p>"
        );
        for section in &self.sections {
            let _ = writeln!(page, "<h2>{}</h2>{}", section.title(), section.plot());
        }
        page.push_str("</body></html>\n");
        page
    }
}

impl Section {
    fn cells(&self, summary: &Summary<'_>) -> Vec<String> {
        if let Some([descriptors, resident, pipes]) = summary.held {
            return vec![
                format!("{:>12.0}", descriptors.median),
                format!("{:>14.0}", resident.median),
                format!("{:>14.0}", pipes.median),
                format!("{:>10}", summary.failures),
            ];
        }
        let cost = summary.cost.map_or_else(String::new, |cost| {
            let [median, least, most] =
                [cost.median, cost.least, cost.most].map(|it| self.in_units(it));
            format!("{median:.2} ({least:.2} to {most:.2})")
        });
        let latency = |at: usize| {
            summary.latency.map_or_else(String::new, |all| format!("{:.0}", all[at].median * 1e6))
        };
        let rate = match self.row.work {
            Work::BulkUp(_) | Work::BulkDown(_) => format!("{:.2} GB", summary.rate.median),
            Work::Activation => String::new(),
            _ => format!("{:.0}", summary.rate.median),
        };
        vec![
            format!("{cost:>30}"),
            format!("{rate:>12}"),
            format!("{:>10}", latency(0)),
            format!("{:>10}", latency(1)),
            format!("{:>10}", latency(2)),
            format!("{:>10}", summary.failures),
        ]
    }

    /// A bar a contender: its cost, or what a connection holds.
    fn plot(&self) -> String {
        let summaries = self.summaries();
        let bars: Vec<_> = summaries
            .iter()
            .filter_map(|it| {
                let figure = it.held.map(|held| held[1]).or(it.cost)?;
                Some((it.name, figure, it.held.is_some()))
            })
            .collect();
        let longest =
            bars.iter().map(|(_, figure, _)| figure.most).fold(f64::MIN_POSITIVE, f64::max);
        let length = |value: f64| value / longest * 460.0;
        let height = bars.len() * 26 + 8;
        let mut plot = format!("<svg width='800' height='{height}' role='img'>");
        for (number, (name, figure, is_held)) in bars.iter().enumerate() {
            let top = number * 26 + 4;
            let (middle, class) = (top + 9, if is_ours(name) { "ours" } else { "other" });
            let shown = if *is_held {
                format!("{:.0} bytes of RSS each", figure.median)
            } else {
                format!("{:.2} {}", self.in_units(figure.median), self.unit())
            };
            let _ = write!(
                plot,
                "<text x='{}' y='{}' text-anchor='end'>{name}</text>\
                 <rect x='{LEFT}' y='{top}' height='18' width='{:.1}' class='{class}'/>\
                 <line x1='{:.1}' x2='{:.1}' y1='{middle}' y2='{middle}'/>\
                 <text x='{:.1}' y='{}'>{shown}</text>",
                LEFT - 8.0,
                top + 14,
                length(figure.median),
                LEFT + length(figure.least),
                LEFT + length(figure.most),
                LEFT + 8.0 + length(figure.most),
                top + 14,
            );
        }
        plot.push_str("</svg><table><tr>");
        let heads: &[&str] = if bars.iter().any(|(_, _, is_held)| *is_held) {
            &["", "descriptors each", "RSS bytes each", "pipe bytes each", "failures"]
        } else {
            &["", "cost", "a second", "p50 us", "p99 us", "p999 us", "failures"]
        };
        for head in heads {
            let _ = write!(plot, "<th>{head}</th>");
        }
        for summary in &summaries {
            let _ = write!(plot, "</tr><tr><td>{}</td>", summary.name);
            for cell in self.cells(summary) {
                let _ = write!(plot, "<td>{}</td>", cell.trim());
            }
        }
        plot.push_str("</tr></table>");
        plot
    }
}

const HEAD: &str = "<!DOCTYPE html>
<html lang='en'><head><meta charset='utf-8'><title>What a proxy costs</title><style>
body { font: 15px/1.4 sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; color: #222 }
h2 { font-size: 1.05em; margin: 2em 0 .4em }
svg { display: block; max-width: 100% } svg text { font-size: 13px; fill: #222 }
svg line { stroke: #222; stroke-width: 1.5 } .ours { fill: #2a7ab0 } .other { fill: #c4ccd2 }
table { border-collapse: collapse; font-size: 13px; margin-top: .4em }
th, td { text-align: right; padding: .1em .8em } td:first-child { text-align: left }
</style></head><body>
";
