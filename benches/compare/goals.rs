//! Limits on the cost and the rate of rows, as quotients to another program, to another row, or to the
//! splice loop.

use crate::comparison::{Comparison, Entry, Section};
use crate::contender::{FLOOR, OURS};

/// A limit on one figure of socket-proxyd's.
struct Goal {
    row: &'static str,
    pairs: &'static [&'static str],
    /// What socket-proxyd runs with, as the names of contenders have it.
    option: Option<&'static str>,
    figure: Figure,
    than: Than,
    bound: f64,
}

#[derive(Clone, Copy, PartialEq)]
enum Figure {
    /// At most the bound.
    Cost,
    /// At least the bound.
    Rate,
}

/// What a figure is divided by.
#[derive(Clone, Copy)]
enum Than {
    /// The best of these programs, by what their names begin with.
    Best(&'static [&'static str]),
    /// The best of these programs; or the floor is no better, which also meets the goal.
    BestOrFloor(&'static [&'static str]),
    /// socket-proxyd with default options, in this row.
    Row(&'static str),
}

/// All that compare with socket-proxyd.
const PEERS: &[&str] = &["systemd", "HAProxy", "nginx", "socat"];

const SYSTEMD: &[&str] = &["systemd"];

/// They pass a half-close on, as socket-proxyd does.
const FAITHFUL: &[&str] = &["HAProxy", "nginx (half-close)"];

const ALL: &[&str] = &["tcp-tcp", "tcp-unix", "unix-tcp", "unix-unix"];
const FROM_TCP: &[&str] = &["tcp-tcp", "tcp-unix"];
const TCP: &[&str] = &["tcp-tcp"];

/// A change of a bound needs a profile: which microseconds are too many, and why they stay.
const GOALS: &[Goal] = {
    use Figure::{Cost, Rate};
    use Than::{Best, BestOrFloor, Row};
    const fn goal(
        row: &'static str,
        pairs: &'static [&'static str],
        figure: Figure,
        than: Than,
        bound: f64,
    ) -> Goal {
        Goal { row, pairs, option: None, figure, than, bound }
    }
    const TWO: Option<&str> = Some("2 threads");
    &[
        goal("bulk-up", TCP, Cost, Best(SYSTEMD), 0.8),
        goal("bulk-up", TCP, Rate, Best(PEERS), 1.05),
        goal("bulk-down", TCP, Cost, Best(SYSTEMD), 0.8),
        goal("bulk-down", TCP, Rate, Best(PEERS), 1.05),
        goal("bulk-1-up", ALL, Cost, BestOrFloor(PEERS), 0.9),
        goal("bulk-1-up", ALL, Rate, BestOrFloor(PEERS), 1.1),
        goal("bulk-1-down", ALL, Cost, BestOrFloor(PEERS), 0.9),
        goal("bulk-1-down", ALL, Rate, BestOrFloor(PEERS), 1.1),
        goal("short", FROM_TCP, Cost, Best(FAITHFUL), 1.0),
        goal("short", &["unix-tcp"], Cost, Best(FAITHFUL), 1.1),
        goal("activation", ALL, Cost, Best(SYSTEMD), 0.65),
        goal("64B-1000", ALL, Cost, Row("64B-100"), 1.2),
        Goal { option: TWO, ..goal("64B-100", FROM_TCP, Cost, Row("64B-100"), 1.1) },
        Goal { option: TWO, ..goal("short", FROM_TCP, Cost, Row("short"), 1.1) },
        goal("bulk-600-unprivileged", ALL, Cost, Row("bulk-600"), 1.5),
    ]
};

/// How far the floor's figure may differ from socket-proxyd's without being better. Two runs differ
/// by as much.
const NOISE: f64 = 0.05;

/// A goal, judged on one pair of families.
pub(crate) struct Verdict {
    pub(crate) row: String,
    pub(crate) pair: &'static str,
    /// What the figure is divided by.
    pub(crate) than: String,
    pub(crate) quotient: f64,
    pub(crate) is_met: bool,
}

/// Judges each goal for which the run has both figures.
pub(crate) fn verdicts(comparison: &Comparison) -> Vec<Verdict> {
    on_pairs().filter_map(|(goal, pair)| goal.verdict(comparison, pair)).collect()
}

/// Returns the goals for which the run lacks a figure: that of a row, or of all peers.
pub(crate) fn unjudged(comparison: &Comparison) -> Vec<String> {
    let unjudged = on_pairs().filter(|(goal, pair)| goal.verdict(comparison, pair).is_none());
    unjudged.map(|(goal, pair)| format!("{} on {pair}", goal.words())).collect()
}

fn on_pairs() -> impl Iterator<Item = (&'static Goal, &'static str)> {
    GOALS.iter().flat_map(|goal| goal.pairs.iter().map(move |pair| (goal, *pair)))
}

/// Returns socket-proxyd's CPU and rate as quotients to the best of the other programs.
pub(crate) fn to_the_best(section: &Section) -> Option<String> {
    let ours = section.entries.iter().find(|entry| entry.name == OURS)?;
    let quotient = |figure: Figure| {
        let (name, best) = figure.best(section, PEERS)?;
        Some(format!("{} {:.2} of {name}'s", figure.word(), figure.of(ours)? / best))
    };
    let quotients: Vec<_> = [Figure::Cost, Figure::Rate].into_iter().filter_map(quotient).collect();
    (!quotients.is_empty()).then(|| format!("socket-proxyd: {}", quotients.join(", ")))
}

impl Goal {
    fn verdict(&self, comparison: &Comparison, pair: &'static str) -> Option<Verdict> {
        let section = comparison.section(self.row, pair)?;
        let is_ours = |entry: &&Entry| entry.is_ours() && entry.option() == self.option;
        let ours = self.figure.of(section.entries.iter().find(is_ours)?)?;
        let (than, reference) = match self.than {
            Than::Best(names) | Than::BestOrFloor(names) => self.figure.best(section, names)?,
            Than::Row(row) => {
                let other = comparison.section(row, pair)?;
                let entry = other.entries.iter().find(|entry| entry.name == OURS)?;
                (format!("{row} with default options"), self.figure.of(entry)?)
            }
        };
        let mut is_met = self.figure.is_at(ours / reference, self.bound);
        if let Than::BestOrFloor(_) = self.than {
            let floor = section.entries.iter().find(|entry| entry.name == FLOOR);
            let floor = floor.and_then(|entry| self.figure.of(entry));
            is_met |=
                floor.is_some_and(|floor| self.figure.is_at(ours / floor, self.figure.near()));
        }
        Some(Verdict { row: self.words(), pair, than, quotient: ours / reference, is_met })
    }

    fn words(&self) -> String {
        let (word, most) = (self.figure.word(), self.figure.bound_word());
        let option = self.option.map(|option| format!(" ({option})")).unwrap_or_default();
        format!("{}{option}, {word} {most} {}", self.row, self.bound)
    }
}

impl Figure {
    fn word(self) -> &'static str {
        match self {
            Self::Cost => "cost",
            Self::Rate => "rate",
        }
    }

    fn bound_word(self) -> &'static str {
        match self {
            Self::Cost => "at most",
            Self::Rate => "at least",
        }
    }

    fn of(self, entry: &Entry) -> Option<f64> {
        let figure = match self {
            Self::Cost => entry.cost()?,
            Self::Rate => entry.rate()?,
        };
        (figure.median > 0.0).then_some(figure.median)
    }

    fn is_at(self, quotient: f64, bound: f64) -> bool {
        match self {
            Self::Cost => quotient <= bound,
            Self::Rate => quotient >= bound,
        }
    }

    fn near(self) -> f64 {
        match self {
            Self::Cost => 1.0 + NOISE,
            Self::Rate => 1.0 - NOISE,
        }
    }

    /// Returns the best of the programs that have one of these names and fail no client.
    fn best(self, section: &Section, names: &[&str]) -> Option<(String, f64)> {
        let is_named = |entry: &&Entry| names.iter().any(|name| has_name(entry, name));
        let named = section.entries.iter().filter(is_named).filter(|it| it.failures() == 0);
        let figures = named.filter_map(|entry| Some((entry.name.clone(), self.of(entry)?)));
        figures.min_by(|(_, one), (_, other)| match self {
            Self::Cost => one.total_cmp(other),
            Self::Rate => other.total_cmp(one),
        })
    }
}

/// Whether an entry is the program "NAME" or "NAME (OPTION)", of any version.
fn has_name(entry: &Entry, name: &str) -> bool {
    let (program, option) = match name.split_once(" (") {
        Some((program, option)) => (program, Some(option.trim_end_matches(')'))),
        None => (name, None),
    };
    entry.name.starts_with(program) && entry.option() == option
}
