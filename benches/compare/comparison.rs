//! The figures of a run: all samples, and their medians over the rounds.

use serde::{Deserialize, Serialize};

use crate::addresses::Family;
use crate::contender::Contender;
use crate::machine::Machine;
use crate::process::Holdings;
use crate::rows::{Row, Unit};
use crate::stage::Sample;

/// All samples of a run, as the JSON has them.
#[derive(Deserialize, Serialize)]
pub(crate) struct Comparison {
    pub(crate) machine: Machine,
    pub(crate) rounds: usize,
    pub(crate) sections: Vec<Section>,
}

/// A row on one pair of families.
#[derive(Deserialize, Serialize)]
pub(crate) struct Section {
    pub(crate) row: String,
    pub(crate) about: String,
    pub(crate) pair: String,
    pub(crate) unit: Unit,
    pub(crate) entries: Vec<Entry>,
}

/// The samples of one contender, one for each round.
#[derive(Deserialize, Serialize)]
pub(crate) struct Entry {
    pub(crate) name: String,
    pub(crate) samples: Vec<Sample>,
}

/// A figure over all rounds.
#[derive(Clone, Copy)]
pub(crate) struct Figure {
    pub(crate) median: f64,
    pub(crate) least: f64,
    pub(crate) most: f64,
}

impl Comparison {
    pub(crate) fn new(rounds: usize) -> Self {
        Self { machine: Machine::of_this_run(), rounds, sections: Vec::new() }
    }

    pub(crate) fn add(
        &mut self,
        row: Row,
        families: (Family, Family),
        contender: &Contender,
        sample: Sample,
    ) {
        let pair = pair(families);
        let section = self.sections.iter().position(|it| it.row == row.name && it.pair == pair);
        let section = section.unwrap_or_else(|| {
            self.sections.push(Section {
                row: row.name.into(),
                about: row.about.into(),
                pair: pair.into(),
                unit: row.unit(),
                entries: Vec::new(),
            });
            self.sections.len() - 1
        });
        let entries = &mut self.sections[section].entries;
        match entries.iter_mut().find(|entry| entry.name == contender.name) {
            Some(entry) => entry.samples.push(sample),
            None => entries.push(Entry { name: contender.name.clone(), samples: vec![sample] }),
        }
    }

    pub(crate) fn section(&self, row: &str, pair: &str) -> Option<&Section> {
        self.sections.iter().find(|section| section.row == row && section.pair == pair)
    }

    /// Returns how many connections and answers socket-proxyd failed.
    pub(crate) fn our_failures(&self) -> u64 {
        let entries = self.sections.iter().flat_map(|section| &section.entries);
        entries.filter(|entry| entry.is_ours()).map(Entry::failures).sum()
    }
}

impl Entry {
    pub(crate) fn rate(&self) -> Option<Figure> {
        self.figure(|sample| Some(sample.rate))
    }

    pub(crate) fn cost(&self) -> Option<Figure> {
        self.figure(|sample| sample.cost)
    }

    /// Returns the median, the 99th or the 99.9th percentile.
    pub(crate) fn latency(&self, percentile: usize) -> Option<Figure> {
        self.figure(|sample| sample.latency.map(|latency| latency[percentile]))
    }

    /// Returns what the proxy holds for each connection.
    pub(crate) fn held(&self, of: fn(&Holdings) -> usize) -> Option<Figure> {
        self.figure(|sample| sample.held.as_ref().map(|held| of(held) as f64))
    }

    pub(crate) fn failures(&self) -> u64 {
        self.samples.iter().map(|sample| sample.failures).sum()
    }

    pub(crate) fn is_ours(&self) -> bool {
        self.name.starts_with("socket-proxyd")
    }

    /// Returns the option that a contender of the form "NAME (OPTION)" runs with.
    pub(crate) fn option(&self) -> Option<&str> {
        Some(self.name.split_once(" (")?.1.trim_end_matches(')'))
    }

    /// Returns `None` if a round lacks the figure.
    fn figure(&self, of: impl Fn(&Sample) -> Option<f64>) -> Option<Figure> {
        let mut values = self.samples.iter().map(of).collect::<Option<Vec<_>>>()?;
        values.sort_by(f64::total_cmp);
        let median = *values.get(values.len() / 2)?;
        Some(Figure { median, least: *values.first()?, most: *values.last()? })
    }
}

/// Names a pair of families.
pub(crate) fn pair((front, back): (Family, Family)) -> &'static str {
    match (front, back) {
        (Family::Tcp, Family::Tcp) => "tcp-tcp",
        (Family::Tcp, Family::Unix) => "tcp-unix",
        (Family::Unix, Family::Tcp) => "unix-tcp",
        (Family::Unix, Family::Unix) => "unix-unix",
        (Family::Udp, _) | (_, Family::Udp) => "udp-udp",
    }
}
