//! Metrics as text, in the two forms that Prometheus reads: OpenMetrics 1.0, and the one from before it,
//! which promtool(1) and people read. They differ in the names of counters, in units, and in their end.
//!
//! (No library writes both, and from counters that it does not own.)

use std::fmt::{self, Write};

/// A form.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// <https://prometheus.io/docs/specs/om/open_metrics_spec/>
    OpenMetrics,
    /// Prometheus' text format, 0.0.4.
    Text,
}

impl Format {
    /// The form for a client whose `Accept:` says this.
    pub fn accepted(accept: &str) -> Self {
        let is_open = |range: &str| {
            let mut parts = range.split(';').map(str::trim);
            let is_it = parts
                .next()
                .is_some_and(|it| it.eq_ignore_ascii_case("application/openmetrics-text"));
            let is_none = |weight: &str| weight.parse::<f32>().is_ok_and(|weight| weight == 0.0);
            let mut weights = parts.filter_map(|part| part.strip_prefix("q="));
            is_it && !weights.any(is_none)
        };
        if accept.split(',').any(is_open) { Self::OpenMetrics } else { Self::Text }
    }

    /// `Content-Type:` for it.
    pub fn content_type(self) -> &'static str {
        match self {
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
            Self::Text => "text/plain; version=0.0.4; charset=utf-8",
        }
    }
}

/// What kind of numbers a family has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// It only goes up; its samples' names end in `_total`.
    Counter,
    /// It goes up and down.
    Gauge,
    /// How many there were up to each bound.
    Histogram,
}

/// A label's name and value.
pub type Label<'a> = (&'static str, &'a str);

/// The text, family by family.
#[derive(Debug)]
pub struct Exposition {
    form: Format,
    text: String,
}

/// A family, of which samples are written.
#[derive(Debug)]
pub struct MetricFamily<'a> {
    text: &'a mut String,
    name: &'static str,
    suffix: &'static str,
}

impl Exposition {
    /// Nothing yet.
    pub fn new(form: Format) -> Self {
        Self { form, text: String::new() }
    }

    /// Begins a family. A name that ends in a unit has that one.
    pub fn family(&mut self, name: &'static str, kind: Kind, help: &str) -> MetricFamily<'_> {
        let suffix = if kind == Kind::Counter { "_total" } else { "" };
        let (text, kind) = (&mut self.text, kind.name());
        // A String takes whatever is written.
        let _ = match self.form {
            Format::Text => {
                writeln!(text, "# HELP {name}{suffix} {help}\n# TYPE {name}{suffix} {kind}")
            }
            Format::OpenMetrics => writeln!(text, "# TYPE {name} {kind}"),
        };
        if self.form == Format::OpenMetrics {
            if let Some(unit) = ["seconds", "bytes"].iter().find(|unit| name.ends_with(**unit)) {
                let _ = writeln!(text, "# UNIT {name} {unit}");
            }
            let _ = writeln!(text, "# HELP {name} {help}");
        }
        MetricFamily { text, name, suffix }
    }

    /// All of it.
    pub fn finish(mut self) -> String {
        if self.form == Format::OpenMetrics {
            self.text.push_str("# EOF\n");
        }
        self.text
    }
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Counter => "counter",
            Self::Gauge => "gauge",
            Self::Histogram => "histogram",
        }
    }
}

impl MetricFamily<'_> {
    /// Writes one number.
    pub fn sample(&mut self, labels: &[Label<'_>], value: impl fmt::Display) {
        self.line(self.suffix, labels, value);
    }

    /// Writes a histogram: how many were `within` each bound, how many there were, and their sum.
    pub fn histogram(&mut self, labels: &[Label<'_>], within: &[(f64, u64)], count: u64, sum: f64) {
        let mut bucket = |bound: &str, count: u64| {
            let labels = [labels, &[("le", bound)]].concat();
            self.line("_bucket", &labels, count);
        };
        for (bound, count) in within {
            bucket(&canonical(*bound), *count);
        }
        bucket("+Inf", count);
        self.line("_sum", labels, sum);
        self.line("_count", labels, count);
    }

    fn line(&mut self, suffix: &str, labels: &[Label<'_>], value: impl fmt::Display) {
        let _ = write!(self.text, "{}{suffix}", self.name);
        for (index, (name, value)) in labels.iter().enumerate() {
            let before = if index == 0 { '{' } else { ',' };
            let value = value.replace('\\', r"\\").replace('"', r#"\""#).replace('\n', r"\n");
            let _ = write!(self.text, "{before}{name}=\"{value}\"");
        }
        let after = if labels.is_empty() { "" } else { "}" };
        let _ = writeln!(self.text, "{after} {value}");
    }
}

/// A bound as OpenMetrics wants it, so that the same one is the same label everywhere: with a point, and two
/// digits of an exponent.
fn canonical(bound: f64) -> String {
    let text = format!("{bound:?}");
    match text.split_once("e-") {
        Some((digits, exponent @ ("1" | "2" | "3" | "4" | "5" | "6" | "7" | "8" | "9"))) => {
            format!("{digits}e-0{exponent}")
        }
        _ => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn render(form: Format) -> String {
        let mut all = Exposition::new(form);
        let mut bytes = all.family("a_bytes", Kind::Counter, "Bytes.");
        bytes.sample(&[("of", "\"x\\\n"), ("to", "y")], 5);
        let mut times = all.family("b_seconds", Kind::Histogram, "Times.");
        times.histogram(&[("of", "x")], &[(0.00025, 1), (1.0, 2)], 3, 4.5);
        all.family("c", Kind::Gauge, "Now.").sample(&[], 1.25);
        all.finish()
    }

    #[test]
    fn open_metrics() {
        assert_eq!(
            render(Format::OpenMetrics),
            r#"# TYPE a_bytes counter
# UNIT a_bytes bytes
# HELP a_bytes Bytes.
a_bytes_total{of="\"x\\\n",to="y"} 5
# TYPE b_seconds histogram
# UNIT b_seconds seconds
# HELP b_seconds Times.
b_seconds_bucket{of="x",le="0.00025"} 1
b_seconds_bucket{of="x",le="1.0"} 2
b_seconds_bucket{of="x",le="+Inf"} 3
b_seconds_sum{of="x"} 4.5
b_seconds_count{of="x"} 3
# TYPE c gauge
# HELP c Now.
c 1.25
# EOF
"#
        );
    }

    #[test]
    fn bounds_are_canonical() {
        for (bound, text) in [(2.5e-5, "2.5e-05"), (1e-4, "0.0001"), (1.0, "1.0"), (10.0, "10.0")] {
            assert_eq!(canonical(bound), text);
        }
    }

    #[test]
    fn the_form_from_before_it() {
        let text = render(Format::Text);
        assert!(text.starts_with("# HELP a_bytes_total Bytes.\n# TYPE a_bytes_total counter\n"));
        assert!(text.contains("# TYPE b_seconds histogram\nb_seconds_bucket{"), "{text}");
        assert!(!text.contains("UNIT") && !text.contains("EOF"), "{text}");
    }

    #[test]
    fn who_accepts_open_metrics_gets_it() {
        let prometheus =
            "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5";
        assert_eq!(Format::accepted(prometheus), Format::OpenMetrics);
        for accept in ["*/*", "", "application/openmetrics-text;q=0, text/plain"] {
            assert_eq!(Format::accepted(accept), Format::Text);
        }
    }
}
