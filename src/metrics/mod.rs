//! What `--metrics=` shows: each family, its name and its help, from what was counted.
//!
//! Its size is bounded: so many listeners and backends have lines of their own, and what is beyond them
//! is added up as `other`, as are connections of the process before this one that came in elsewhere,
//! if there was one.

pub mod exporter;
mod openmetrics;

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use crate::counters::{CommandCounters, ConnectCounters, Histogram, ListenerCounters, Loops};
use crate::limits::ConnectionLimit;
use crate::logging::bounded_line;
use crate::metrics::openmetrics::{Exposition, Format, Kind};

/// Listeners, and backends, that have lines of their own.
const SHOWN_MAX: usize = 64;

/// Bytes of a label: a socket's name is anything.
const LABEL_MAX: usize = 128;

const OTHER: &str = "other";

/// Everything that is shown, to be read at any time on any thread.
#[derive(Debug)]
pub struct Metrics {
    limit: ConnectionLimit,
    /// By listener and backend.
    counts: Vec<([String; 2], Vec<Arc<ListenerCounters>>)>,
    /// Which of the plan's backends have this name.
    backends: Vec<(String, Vec<usize>)>,
    counters: Vec<Arc<ConnectCounters>>,
    loops: Arc<Loops>,
    restored: u64,
    starts: Option<Arc<CommandCounters>>,
    start: f64,
}

/// Where it all is.
#[derive(Debug)]
pub struct MetricsSources {
    /// The cap.
    pub limit: ConnectionLimit,
    /// Each listener, and which backend it leads to.
    pub listeners: Vec<(String, usize, Arc<ListenerCounters>)>,
    /// Connections of the process before this one that came in elsewhere.
    pub elsewhere: Arc<ListenerCounters>,
    /// Each backend.
    pub backends: Vec<(String, Arc<ConnectCounters>)>,
    /// The event loops.
    pub loops: Arc<Loops>,
    /// Connections of the process before this one.
    pub restored: usize,
    /// COMMAND's.
    pub starts: Option<Arc<CommandCounters>>,
}

impl Metrics {
    /// Gives everything its name.
    pub fn new(sources: MetricsSources) -> Self {
        let MetricsSources { limit, listeners, elsewhere, backends, loops, restored, starts } =
            sources;
        let name = |index: usize| backends.get(index).map_or("", |(name, _)| name).to_string();
        let counts = listeners.into_iter();
        let counts = counts.map(|(listener, backend, counts)| ([listener, name(backend)], counts));
        let has_others = restored > 0;
        let elsewhere = has_others.then(|| ([OTHER; 2].map(String::from), elsewhere));
        let known = (0..backends.len()).map(|index| ([name(index)], index));
        let unknown = has_others.then(|| ([OTHER.to_string()], backends.len()));
        let grouped = group(known.chain(unknown)).into_iter();
        let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH);
        Self {
            limit,
            counts: group(counts.chain(elsewhere)),
            backends: grouped.map(|([name], indexes)| (name, indexes)).collect(),
            counters: backends.into_iter().map(|(_, counters)| counters).collect(),
            loops,
            restored: restored as u64,
            starts,
            start: since_epoch.map_or(0.0, |time| time.as_secs_f64()),
        }
    }

    /// All of it, as it is now.
    pub fn render(&self, form: Format) -> String {
        let mut all = Exposition::new(form);
        let version = [("version", env!("CARGO_PKG_VERSION"))];
        all.family("socket_proxyd_build_info", Kind::Gauge, "The version, as a label.")
            .sample(&version, 1);
        all.family(
            "process_start_time_seconds",
            Kind::Gauge,
            "When the process started, in seconds since 1970.",
        )
        .sample(&[], self.start);
        all.family(
            "socket_proxyd_connections_max",
            Kind::Gauge,
            "Connections that are served at a time, --connections-max=.",
        )
        .sample(&[], self.limit.max());
        self.connections(&mut all);
        all.family(
            "socket_proxyd_handover_connections",
            Kind::Counter,
            "Connections taken over from the process before this one, --handover=.",
        )
        .sample(&[], self.restored);
        self.bytes(&mut all);
        self.counters(&mut all);
        if let Some(starts) = &self.starts {
            let backend = self.backends.first().map_or("", |(name, _)| name);
            all.family("socket_proxyd_backend_starts", Kind::Counter, "Times COMMAND was started.")
                .sample(&[("backend", backend)], starts.all.get());
            all.family(
                "socket_proxyd_backend_start_failures",
                Kind::Counter,
                "Times COMMAND ended before it was ready, or as soon as it was.",
            )
            .sample(&[("backend", backend)], starts.failed.get());
        }
        all.family("socket_proxyd_pipes", Kind::Gauge, "Pipes for splice(2) in existence.")
            .sample(&[], self.loops.pipes());
        all.finish()
    }

    fn connections(&self, all: &mut Exposition) {
        type Value = fn(&ListenerCounters) -> u64;
        let families: [(&str, Kind, &str, Value); 5] = [
            (
                "socket_proxyd_connections_open",
                Kind::Gauge,
                "Connections that are open, those included that wait for their backend.",
                |counts| counts.open.taken() as u64,
            ),
            (
                "socket_proxyd_connections_waiting",
                Kind::Gauge,
                "Clients that wait until their backend is up.",
                |counts| counts.waiting.taken() as u64,
            ),
            (
                "socket_proxyd_connections",
                Kind::Counter,
                "Connections that were accepted and admitted.",
                |counts| counts.admitted.get(),
            ),
            (
                "socket_proxyd_connections_refused",
                Kind::Counter,
                "Connections that were closed at the cap.",
                |counts| counts.refused.get(),
            ),
            (
                "socket_proxyd_connections_failed",
                Kind::Counter,
                "Connections that ended because there was no backend.",
                |counts| counts.failed.get(),
            ),
        ];
        for (name, kind, help, value) in families {
            let mut family = all.family(name, kind, help);
            for ([listener, backend], counts) in &self.counts {
                let value: u64 = counts.iter().map(|counts| value(counts)).sum();
                family.sample(&[("listener", listener), ("backend", backend)], value);
            }
        }
    }

    fn bytes(&self, all: &mut Exposition) {
        let carried = self.loops.carried();
        let mut family = all.family(
            "socket_proxyd_bytes",
            Kind::Counter,
            "Bytes delivered, --proxy-protocol= headers included.",
        );
        for (backend, indexes) in &self.backends {
            for (side, direction) in ["from_client", "from_backend"].into_iter().enumerate() {
                let bytes = indexes.iter().filter_map(|index| Some(carried.get(*index)?[side]));
                let labels = [("backend", backend.as_str()), ("direction", direction)];
                family.sample(&labels, bytes.sum::<u64>());
            }
        }
    }

    fn counters(&self, all: &mut Exposition) {
        let counters = |indexes: &[usize]| -> Vec<_> {
            indexes.iter().filter_map(|index| self.counters.get(*index)).collect()
        };
        let mut family = all.family(
            "socket_proxyd_connect_duration_seconds",
            Kind::Histogram,
            "How long it took to look a backend up and to connect to it.",
        );
        for (backend, indexes) in &self.backends {
            let mut within = Histogram::BOUNDS.map(|micros| (micros as f64 / 1e6, 0));
            let (mut count, mut sum) = (0, 0.0);
            for counters in counters(indexes) {
                let (its_within, its_count, its_sum) = counters.latency.get();
                within.iter_mut().zip(its_within).for_each(|((_, all), its)| *all += its);
                count += its_count;
                sum += its_sum.as_secs_f64();
            }
            family.histogram(&[("backend", backend)], &within, count, sum);
        }
        let mut family = all.family(
            "socket_proxyd_connect_errors",
            Kind::Counter,
            "Attempts to connect to a backend that failed, those included that only look whether it is up.",
        );
        for (backend, indexes) in &self.backends {
            let mut sums: Vec<_> = ConnectCounters::default().failed().collect();
            for counters in counters(indexes) {
                sums.iter_mut().zip(counters.failed()).for_each(|((_, sum), (_, its))| *sum += its);
            }
            for (kind, count) in sums {
                family.sample(&[("backend", backend), ("kind", kind.name())], count);
            }
        }
    }
}

/// What has the same names together, in order, and what is beyond the bound as others.
fn group<const N: usize, T>(
    named: impl Iterator<Item = ([String; N], T)>,
) -> Vec<([String; N], Vec<T>)> {
    let mut groups: Vec<([String; N], Vec<T>)> = Vec::new();
    for (names, it) in named {
        let mut names = names.map(|name| bounded_line(&name, LABEL_MAX));
        let is_new = !groups.iter().any(|(known, _)| *known == names);
        if is_new && groups.len() >= SHOWN_MAX {
            names = std::array::from_fn(|_| OTHER.into());
        }
        match groups.iter_mut().find(|(known, _)| *known == names) {
            Some((_, members)) => members.push(it),
            None => groups.push((names, vec![it])),
        }
    }
    groups
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::num::NonZeroU32;

    use super::*;
    use crate::counters::ConnectErrorKind;

    fn metrics(listeners: usize, name: impl Fn(usize) -> String) -> Metrics {
        let listeners: Vec<_> = (0..listeners)
            .map(|index| (name(index), index, Arc::<ListenerCounters>::default()))
            .collect();
        for (_, _, counts) in &listeners {
            counts.admitted.add_one();
        }
        let backends: Vec<_> = listeners
            .iter()
            .map(|(name, ..)| (name.clone(), Arc::<ConnectCounters>::default()))
            .collect();
        for (_, counters) in &backends {
            counters.fail(ConnectErrorKind::Refused);
        }
        let loops = Arc::new(Loops::default());
        loops.add(listeners.len()).carried.iter().for_each(|carried| carried.add(0, 1));
        Metrics::new(MetricsSources {
            limit: ConnectionLimit::new(NonZeroU32::MIN),
            listeners,
            elsewhere: Arc::default(),
            backends,
            loops,
            restored: 0,
            starts: Some(Arc::default()),
        })
    }

    fn sum(text: &str, name: &str) -> u64 {
        let values = text.lines().filter(|line| line.starts_with(name));
        values.map(|line| line.rsplit(' ').next().unwrap().parse::<u64>().unwrap()).sum()
    }

    #[test]
    fn the_dashboard_asks_for_what_is_there() {
        let text = metrics(1, |_| "web".into()).render(Format::Text);
        let dashboard = include_str!("../../docs/grafana.json");
        let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
        let names = dashboard.split(|c| !is_name(c));
        let names: BTreeSet<_> = names.filter(|name| name.starts_with("socket_proxyd_")).collect();
        assert!(names.len() >= 10, "{names:?}");
        for name in names {
            let is_there = text.lines().any(|line| {
                line.strip_prefix(name).is_some_and(|rest| rest.starts_with(['{', ' ']))
            });
            assert!(is_there, "{name}");
        }
    }

    #[test]
    fn nothing_is_said_twice_however_sockets_are_named() {
        let text = metrics(3, |_| "the same".into()).render(Format::OpenMetrics);
        let series: Vec<_> =
            text.lines().filter_map(|line| Some(line.rsplit_once(' ')?.0)).collect();
        let unique: BTreeSet<_> = series.iter().collect();
        assert_eq!(series.len(), unique.len(), "{text}");
        assert_eq!(sum(&text, "socket_proxyd_connections_total{"), 3);
        assert_eq!(sum(&text, "socket_proxyd_bytes_total{"), 3);
        assert!(!text.contains("backend=\"other\""), "{text}");
    }

    #[test]
    fn however_many_there_are_the_text_is_bounded_and_nothing_is_missing() {
        let name = |index| format!("{index}{}", "\\".repeat(4096));
        let text = metrics(1000, name).render(Format::Text);
        assert!(text.len() < 1024 * 1024, "{}", text.len());
        assert_eq!(sum(&text, "socket_proxyd_connections_total{"), 1000);
        assert_eq!(sum(&text, "socket_proxyd_bytes_total{"), 1000);
        assert_eq!(sum(&text, "socket_proxyd_connect_errors_total{"), 1000);
    }
}
