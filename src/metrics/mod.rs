//! The metrics of `--metrics=`: their names, help texts and labels.
//!
//! The export is bounded. At most [`SHOWN_MAX`] listeners and as many backends have labels of their
//! own; the counts of the others are added up under the label `other`. So are the counts of
//! restored connections whose listener or backend no longer exists.

pub mod exporter;

use std::collections::BTreeMap;
use std::fmt;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric, NoLabelSet};
use prometheus_client::metrics::MetricType::{self, Counter, Gauge};
use prometheus_client::metrics::counter::{self, ConstCounter};
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::{Registry, Unit};

use crate::counters::{
    CommandCounters, ConnectCounters, DatagramCounters, ListenerCounters, Loops, RefusalReason,
};
use crate::logging::bounded_line;

/// The counters to export.
#[derive(Debug)]
pub struct MetricsSources {
    pub connections_max: NonZeroU32,
    pub listeners: Vec<ListenerSource>,
    /// The datagram sockets.
    pub datagrams: Vec<ListenerSource>,
    /// Counters of restored connections whose listener no longer exists.
    pub unconfigured: Arc<ListenerCounters>,
    /// The name of each backend, and its counters.
    pub backends: Vec<(String, Arc<ConnectCounters>)>,
    pub loops: Arc<Loops>,
    /// Messages whose descriptors were closed.
    pub descriptors_dropped: counter::Counter,
    /// Connections restored from the previous process.
    pub restored: usize,
    pub starts: Option<Arc<CommandCounters>>,
}

/// The name of a listener, the index of its backend, and its counters.
type ListenerSource = (String, usize, Arc<ListenerCounters>);

/// Returns the registry that encodes the metrics.
pub fn registry(sources: MetricsSources) -> Registry {
    let start = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let mut registry = Registry::default();
    registry.register_with_unit(
        "process_start_time",
        "Start of the process, in seconds since 1970",
        Unit::Seconds,
        ConstGauge::new(start.as_secs_f64()),
    );
    let ours = registry.sub_registry_with_prefix("socket_proxyd");
    ours.register("build", "Version, as a label", Info::new([("version", VERSION)]));
    ours.register(
        "connections_max",
        "Connection limit, --connections-max=",
        ConstGauge::new(sources.connections_max.get()),
    );
    ours.register(
        "handover_connections",
        "Connections restored from the previous process, --handover=",
        ConstCounter::new(sources.restored as u64),
    );
    ours.register_collector(Box::new(sources));
    registry
}

/// The metrics that change, read from the counters at each scrape.
impl Collector for MetricsSources {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        self.encode_listeners(&mut encoder)?;
        self.encode_datagrams(&mut encoder)?;
        self.encode_backends(&mut encoder)?;
        let pipes = [([("", ""); 0], self.loops.pipes() as u64)];
        encode(&mut encoder, Gauge, "pipes", "Open pipes for splice(2).", pipes)?;
        let help = "Messages from Unix sockets to other sockets whose descriptors were closed.";
        let dropped = [([("", ""); 0], self.descriptors_dropped.get())];
        encode(&mut encoder, Counter, "descriptors_dropped", help, dropped)
    }
}

impl MetricsSources {
    /// Writes the metrics of connections, with a value for each listener.
    fn encode_listeners(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let elsewhere = (self.restored > 0).then_some(([OTHER; 2], &self.unconfigured));
        let groups = group(self.labelled(&self.listeners).chain(elsewhere));
        let help = "Open connections, those that wait for their backend included.";
        let open = sums(&groups, |counters| counters.open.taken() as u64);
        encode(encoder, Gauge, "connections_open", help, open)?;
        let help = "Clients that wait until their backend is up.";
        let waiting = sums(&groups, |counters| counters.waiting.taken() as u64);
        encode(encoder, Gauge, "connections_waiting", help, waiting)?;
        let help = "Connections accepted and admitted.";
        let admitted = sums(&groups, |counters| counters.admitted.get());
        encode(encoder, Counter, "connections", help, admitted)?;
        let help = "Connections closed at a limit.";
        let refused = RefusalReason::NAMES.into_iter().enumerate().flat_map(|(index, reason)| {
            let sums = sums(&groups, |counters| counters.refused[index].get()).into_iter();
            sums.map(move |([listener, backend], sum)| {
                ([listener, backend, ("reason", reason)], sum)
            })
        });
        encode(encoder, Counter, "connections_refused", help, refused)?;
        let help = "Connections closed because no backend was reached.";
        let failed = sums(&groups, |counters| counters.failed.get());
        encode(encoder, Counter, "connections_failed", help, failed)
    }

    /// Writes the metrics of datagrams, with a value for each listener, if there is one.
    fn encode_datagrams(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        if self.datagrams.is_empty() {
            return Ok(());
        }
        let groups = group(self.labelled(&self.datagrams));
        let help = "Open sessions of datagrams, those that wait for their backend included.";
        let open = sums(&groups, |counters| counters.open.taken() as u64);
        encode(encoder, Gauge, "sessions_open", help, open)?;
        let help = "Sessions that wait until their backend is up.";
        let waiting = sums(&groups, |counters| counters.waiting.taken() as u64);
        encode(encoder, Gauge, "sessions_waiting", help, waiting)?;
        let help = "Sessions begun.";
        let begun = sums(&groups, |counters| counters.admitted.get());
        encode(encoder, Counter, "sessions", help, begun)?;
        let help = "Sessions that gave way at the connection limit.";
        let evicted = sums(&groups, |counters| counters.datagrams.evicted.get());
        encode(encoder, Counter, "sessions_evicted", help, evicted)?;
        let help = "Sessions ended because no backend was reached.";
        let failed = sums(&groups, |counters| counters.failed.get());
        encode(encoder, Counter, "sessions_failed", help, failed)?;
        let help = "Datagrams received.";
        let received = by_direction(&groups, |it, at| vec![("", it.received[at].get())]);
        encode(encoder, Counter, "datagrams_received", help, received.map(without_reason))?;
        let help = "Datagrams delivered.";
        let delivered = by_direction(&groups, |it, at| vec![("", it.delivered[at].get())]);
        encode(encoder, Counter, "datagrams_delivered", help, delivered.map(without_reason))?;
        let help = "Bytes of the datagrams delivered, --proxy-protocol= headers included.";
        let bytes = by_direction(&groups, |it, at| vec![("", it.bytes[at].get())]);
        encode(encoder, Counter, "datagram_bytes", help, bytes.map(without_reason))?;
        let help = "Datagrams dropped.";
        let dropped = by_direction(&groups, |it, at| it.dropped(at).collect());
        encode(encoder, Counter, "datagrams_dropped", help, dropped)
    }

    /// Returns counters with the labels of their listener and its backend.
    fn labelled<'a>(
        &'a self,
        listeners: &'a [ListenerSource],
    ) -> impl Iterator<Item = ([&'a str; 2], &'a Arc<ListenerCounters>)> {
        listeners.iter().map(|(name, backend, counters)| {
            let (backend, _) = &self.backends[*backend];
            ([name.as_str(), backend], counters)
        })
    }

    /// Writes the metrics that have a value for each backend.
    fn encode_backends(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let elsewhere = (self.restored > 0).then(|| (OTHER.into(), Arc::default()));
        let backends = self.backends.iter().chain(&elsewhere).enumerate();
        // Each with its index in `Loops::delivered`.
        let groups = group(backends.map(|(index, (name, it))| ([name.as_str()], (index, it))));

        let help = "Bytes delivered, --proxy-protocol= headers included.";
        let delivered = self.loops.delivered();
        let bytes = by_backend(&groups, "direction", |(index, _)| {
            let [client, backend] = delivered.get(*index).copied().unwrap_or_default();
            vec![("from_client", client), ("from_backend", backend)]
        });
        encode(encoder, Counter, "bytes", help, bytes)?;

        let help = "Time to look a backend up and to connect to it.";
        let (name, unit) = ("connect_duration", Some(&Unit::Seconds));
        let mut family = encoder.encode_descriptor(name, help, unit, MetricType::Histogram)?;
        for ([backend], members) in &groups {
            let durations = members.iter().map(|(_, connects)| &connects.durations);
            let sum = durations.clone().map(|durations| durations.sum().as_secs_f64()).sum();
            let buckets = add_up(durations.map(|durations| durations.buckets().collect()));
            let count = buckets.iter().map(|(_, count)| count).sum();
            family
                .encode_family(&[("backend", backend.as_str())])?
                .encode_histogram::<NoLabelSet>(sum, count, &buckets, None)?;
        }
        let help = "Failed attempts to connect to a backend, probes for waiting clients included.";
        let errors = by_backend(&groups, "kind", |(_, connects)| connects.errors().collect());
        encode(encoder, Counter, "connect_errors", help, errors)?;
        let help = "Probes of --ready= that failed.";
        let failed = groups.iter().map(|([backend], members)| {
            let sum = members.iter().map(|(_, connects)| connects.probe_failures.get()).sum();
            ([("backend", backend.as_str())], sum)
        });
        encode(encoder, Counter, "backend_probe_failures", help, failed)?;

        // The proxy starts no other backend than the first.
        if let Some((starts, (backend, _))) = self.starts.as_ref().zip(self.backends.first()) {
            let labels = [("backend", backend.as_str())];
            let mut encode =
                |name, help, count| encode(encoder, Counter, name, help, [(labels, count)]);
            let help = "Starts of COMMAND, or runs of the start command.";
            encode("backend_starts", help, starts.all.get())?;
            let help = "Starts of COMMAND that failed, or after which it exited before it was ready or within 1s.";
            encode("backend_start_failures", help, starts.failed.get())?;
            let help = "Stops of an idle COMMAND, or runs of the stop command.";
            encode("backend_stops", help, starts.stops.get())?;
            let help = "Runs of the stop command that failed.";
            encode("backend_stop_failures", help, starts.stop_failures.get())?;
            let help = "Times that a frozen COMMAND was thawed.";
            encode("backend_thaws", help, starts.thaws.get())?;
        }
        Ok(())
    }
}

/// Counters by the values of their labels.
type Groups<const LABELS: usize, T> = BTreeMap<[String; LABELS], Vec<T>>;

type ListenerGroups<'a> = Groups<2, &'a Arc<ListenerCounters>>;

/// The labels of a listener and of its backend.
type ListenerLabels<'a> = [(&'static str, &'a str); 2];

/// Returns a value of each group of listeners, with its labels.
fn sums<'a>(
    groups: &'a ListenerGroups<'_>,
    value: impl Fn(&ListenerCounters) -> u64,
) -> Vec<(ListenerLabels<'a>, u64)> {
    let sums = groups.iter().map(|([listener, backend], members)| {
        let labels = [("listener", listener.as_str()), ("backend", backend)];
        (labels, members.iter().map(|counters| value(counters)).sum())
    });
    sums.collect()
}

/// Returns the values of each group of listeners for both directions, with its labels, the
/// direction and the reason.
fn by_direction<'a>(
    groups: &'a ListenerGroups<'_>,
    values: impl Fn(&DatagramCounters, usize) -> Vec<(&'static str, u64)>,
) -> impl Iterator<Item = ([(&'static str, &'a str); 4], u64)> {
    groups.iter().flat_map(move |([listener, backend], members)| {
        let rows = ["from_client", "from_backend"].into_iter().enumerate();
        let rows = rows.flat_map(|(index, direction)| {
            let sums = add_up(members.iter().map(|it| values(&it.datagrams, index)));
            let labels = [("listener", listener.as_str()), ("backend", backend)];
            sums.into_iter().map(move |(reason, sum)| {
                let [listener, backend] = labels;
                ([listener, backend, ("direction", direction), ("reason", reason)], sum)
            })
        });
        rows.collect::<Vec<_>>()
    })
}

fn without_reason<'a>(
    ([listener, backend, direction, _], sum): ([(&'static str, &'a str); 4], u64),
) -> ([(&'static str, &'a str); 3], u64) {
    ([listener, backend, direction], sum)
}

/// Returns the values of each backend, with its label and a second one for each value.
fn by_backend<'a, T>(
    groups: &'a Groups<1, T>,
    label: &'static str,
    values: impl Fn(&T) -> Vec<(&'static str, u64)>,
) -> impl Iterator<Item = ([(&'static str, &'a str); 2], u64)> {
    groups.iter().flat_map(move |([backend], members)| {
        let sums = add_up(members.iter().map(&values)).into_iter();
        sums.map(move |(value, sum)| ([("backend", backend.as_str()), (label, value)], sum))
    })
}

/// Writes the values of a metric, each with its labels.
fn encode<L: EncodeLabelSet>(
    encoder: &mut DescriptorEncoder<'_>,
    kind: MetricType,
    name: &str,
    help: &str,
    values: impl IntoIterator<Item = (L, u64)>,
) -> fmt::Result {
    let mut family = encoder.encode_descriptor(name, help, None, kind)?;
    for (labels, value) in values {
        let labelled = family.encode_family(&labels)?;
        match kind {
            Counter => ConstCounter::new(value).encode(labelled)?,
            _ => ConstGauge::new(value).encode(labelled)?,
        }
    }
    Ok(())
}

/// Groups counters whose labels are equal, and those beyond the bound as [`OTHER`].
fn group<'a, const LABELS: usize, T>(
    labelled: impl IntoIterator<Item = ([&'a str; LABELS], T)>,
) -> Groups<LABELS, T> {
    let mut groups = Groups::new();
    for (labels, counters) in labelled {
        let mut labels = labels.map(|label| bounded_line(label, LABEL_MAX));
        if groups.len() >= SHOWN_MAX && !groups.contains_key(&labels) {
            labels = labels.map(|_| OTHER.into());
        }
        groups.entry(labels).or_insert_with(Vec::new).push(counters);
    }
    groups
}

/// Adds up the counts of a group's members, key by key.
fn add_up<K>(members: impl Iterator<Item = Vec<(K, u64)>>) -> Vec<(K, u64)> {
    let add = |mut sums: Vec<(K, u64)>, counts: Vec<(K, u64)>| {
        sums.iter_mut().zip(counts).for_each(|((_, sum), (_, count))| *sum += count);
        sums
    };
    members.reduce(add).unwrap_or_default()
}

/// The label of what has none of its own.
const OTHER: &str = "other";

/// At most this many listeners, and this many backends, have labels of their own.
const SHOWN_MAX: usize = 64;

/// Bytes of a label: the name of a socket may be of any length.
const LABEL_MAX: usize = 128;

const VERSION: &str = env!("CARGO_PKG_VERSION");

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use prometheus_client::encoding::{prometheus_text, text};

    use super::*;
    use crate::counters::ConnectErrorKind;

    fn metrics(listeners: usize, name: impl Fn(usize) -> String) -> Registry {
        let listeners: Vec<_> = (0..listeners)
            .map(|index| (name(index), index, Arc::<ListenerCounters>::default()))
            .collect();
        for (_, _, counts) in &listeners {
            counts.admitted.inc();
        }
        let backends: Vec<_> = listeners
            .iter()
            .map(|(name, ..)| (name.clone(), Arc::<ConnectCounters>::default()))
            .collect();
        for (_, counters) in &backends {
            counters.fail(ConnectErrorKind::Refused);
        }
        let loops = Arc::new(Loops::default());
        loops.add(listeners.len()).bytes.iter().for_each(|bytes| bytes.add(0, 1));
        registry(MetricsSources {
            connections_max: NonZeroU32::MIN,
            listeners,
            datagrams: Vec::new(),
            unconfigured: Arc::default(),
            backends,
            loops,
            descriptors_dropped: counter::Counter::default(),
            restored: 0,
            starts: Some(Arc::default()),
        })
    }

    fn openmetrics(registry: &Registry) -> String {
        let mut body = String::new();
        text::encode(&mut body, registry).unwrap();
        body
    }

    fn text(registry: &Registry) -> String {
        let mut body = String::new();
        prometheus_text::encode(&mut body, registry).unwrap();
        body
    }

    fn sum(text: &str, name: &str) -> u64 {
        let values = text.lines().filter(|line| line.starts_with(name));
        values.map(|line| line.rsplit(' ').next().unwrap().parse::<u64>().unwrap()).sum()
    }

    #[test]
    fn both_formats_have_the_same_metrics() {
        let registry = metrics(1, |_| r#"a "\ name"#.into());
        let (openmetrics, text) = (openmetrics(&registry), text(&registry));
        let label = r#"{listener="a \"\\ name",backend="a \"\\ name"}"#;
        for line in [
            "# TYPE socket_proxyd_connections_open gauge",
            "# TYPE socket_proxyd_connect_duration_seconds histogram",
            "socket_proxyd_pipes 0",
            &format!("socket_proxyd_build_info{{version=\"{VERSION}\"}} 1"),
            &format!("socket_proxyd_connections_total{label} 1"),
        ] {
            for body in [&openmetrics, &text] {
                assert!(body.lines().any(|of_body| of_body == line), "no {line} in {body}");
            }
        }
        assert!(openmetrics.contains("# TYPE socket_proxyd_connections counter\n"));
        assert!(openmetrics.contains("# UNIT socket_proxyd_connect_duration_seconds seconds\n"));
        assert!(openmetrics.ends_with("# EOF\n"));
        assert!(text.contains("# TYPE socket_proxyd_connections_total counter\n"));
        assert!(!text.contains("UNIT") && !text.contains("EOF"));
    }

    #[test]
    fn the_dashboard_asks_for_what_is_there() {
        let text = text(&metrics(1, |_| "web".into()));
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
        let text = openmetrics(&metrics(3, |_| "the same".into()));
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
        let text = text(&metrics(1000, name));
        assert!(text.len() < 1024 * 1024, "{}", text.len());
        assert_eq!(sum(&text, "socket_proxyd_connections_total{"), 1000);
        assert_eq!(sum(&text, "socket_proxyd_bytes_total{"), 1000);
        assert_eq!(sum(&text, "socket_proxyd_connect_errors_total{"), 1000);
    }
}
