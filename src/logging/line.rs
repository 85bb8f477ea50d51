//! A log line: an event's message and fields, bounded, in the format of its destination.

use std::borrow::Cow;
use std::fmt::{self, Write};

use tracing::Level;
use tracing::field::{Field, Visit};

/// The format in which lines are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// The journal's native protocol, with fields.
    Journal,
    /// Lines that begin with `<N>` (sd-daemon(3)).
    Prefixed,
    Plain,
}

/// An event's message and fields.
#[derive(Default)]
pub struct Line {
    pub text: String,
    pub fields: Vec<(&'static str, String)>,
}

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        if field.name() == "message" {
            let _ = write!(self.text, "{value:?}");
        } else {
            self.fields.push((field.name(), format!("{value:?}")));
        }
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.fields.push((field.name(), value.into()));
    }
}

impl Line {
    /// Returns the bytes of the line.
    pub fn render(&self, format: Format, level: Level) -> Vec<u8> {
        let mut text = self.text.clone();
        for (name, value) in &self.fields {
            let _ = write!(text, " {name}={}", quoted(value));
        }
        let text = bounded_line(&text, LINE_MAX);
        let priority = match level {
            Level::ERROR => 3,
            Level::WARN => 4,
            Level::INFO => 5,
            Level::DEBUG | Level::TRACE => 7,
        };
        let mut line = String::new();
        let _ = match format {
            Format::Plain => writeln!(line, "{text}"),
            Format::Prefixed => writeln!(line, "<{priority}>{text}"),
            Format::Journal => {
                for (name, value) in &self.fields {
                    let _ =
                        writeln!(line, "{}={}", name.to_uppercase(), bounded_line(value, LINE_MAX));
                }
                writeln!(
                    line,
                    "PRIORITY={priority}\nSYSLOG_IDENTIFIER=socket-proxyd\nMESSAGE={text}"
                )
            }
        };
        line.into_bytes()
    }
}

/// Returns a field's value as one word of a line: in quotes if a reader could take it for several.
fn quoted(value: &str) -> Cow<'_, str> {
    let is_plain = |byte: u8| byte.is_ascii_graphic() && !b"\"'\\=".contains(&byte);
    match value {
        "" => "\"\"".into(),
        _ if value.bytes().all(is_plain) => value.into(),
        _ => format!("{value:?}").into(),
    }
}

/// Returns `text` without control characters and in at most `max` bytes. It ends with dots where it was cut.
pub fn bounded_line(text: &str, max: usize) -> String {
    const DOTS: &str = "...";
    let printable = |c: char| if c.is_control() { ' ' } else { c };
    let mut line: String = text.chars().map(printable).collect();
    if line.len() > max {
        while line.len() + DOTS.len() > max && line.pop().is_some() {}
        line.push_str(DOTS);
    }
    line
}

/// Bytes of a line or a field.
const LINE_MAX: usize = 2048;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_stays_one_line_in_each_format() {
        let line =
            Line { text: "cut\noff".into(), fields: vec![("client", "a\nPRIORITY=0".into())] };
        let render = |format| String::from_utf8(line.render(format, Level::WARN)).unwrap();
        let text = "cut off client=\"a\\nPRIORITY=0\"";
        assert_eq!(render(Format::Plain), format!("{text}\n"));
        assert_eq!(render(Format::Prefixed), format!("<4>{text}\n"));
        assert_eq!(
            render(Format::Journal),
            format!(
                "CLIENT=a PRIORITY=0\nPRIORITY=4\nSYSLOG_IDENTIFIER=socket-proxyd\nMESSAGE={text}\n"
            )
        );
    }

    #[test]
    fn a_value_is_one_word() {
        for (value, word) in [
            ("127.0.0.1:80", "127.0.0.1:80"),
            ("[fe80::1%2]:80", "[fe80::1%2]:80"),
            ("web (127.0.0.1:80)", "\"web (127.0.0.1:80)\""),
            ("/x listener=y", "\"/x listener=y\""),
            ("/x\" listener=\"y", "\"/x\\\" listener=\\\"y\""),
            ("/x\\", "\"/x\\\\\""),
            ("/\u{e9}\u{202e}", "\"/\u{e9}\\u{202e}\""),
            ("", "\"\""),
        ] {
            assert_eq!(quoted(value), word);
        }
    }

    #[test]
    fn a_line_that_was_cut_ends_with_dots() {
        assert_eq!(bounded_line("a\nb", 3), "a b");
        assert_eq!(bounded_line("abcdefgh", 7), "abcd...");
        assert_eq!(bounded_line("abc\u{e9}efgh", 7), "abc...");
    }
}
