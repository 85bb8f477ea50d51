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
    /// The number of such messages that were held back before this one.
    pub suppressed: u64,
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

    fn record_u64(&mut self, field: &Field, value: u64) {
        match field.name() {
            "suppressed" => self.suppressed = value,
            _ => self.record_debug(field, &value),
        }
    }
}

impl Line {
    /// Returns the bytes of the line.
    pub fn render(&self, format: Format, level: Level) -> Vec<u8> {
        let text = bounded_line(&self.message(), LINE_MAX);
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

    /// Returns the text, with the client and the backend, or the listener, in parentheses where the
    /// text does not name them.
    fn message(&self) -> String {
        // The names belong to the sentence, and not to the hint in parentheses after it.
        let end = match self.text.strip_suffix(".)") {
            Some(text) => text.rfind(". ("),
            None => self.text.strip_suffix('.').map(str::len),
        };
        let (sentence, rest) = self.text.split_at(end.unwrap_or(self.text.len()));
        let mut message = sentence.to_string();
        let unnamed =
            self.names().filter(|(name, value)| *name == "client" || !has_word(sentence, value));
        let unnamed = unnamed.map(|(name, value)| format!("{name} {}", quoted(value)));
        let unnamed: Vec<_> = unnamed.collect();
        if !unnamed.is_empty() {
            let _ = write!(message, " ({})", unnamed.join(", "));
        }
        message.push_str(rest);
        if self.suppressed > 0 {
            let _ = write!(message, " ({} more since the last such message.)", self.suppressed);
        }
        message
    }

    /// Returns the fields that belong into a message: client and backend, or else the listener.
    fn names(&self) -> impl Iterator<Item = &(&'static str, String)> {
        let is_peer = |name: &str| ["client", "backend"].contains(&name);
        let has_peer = self.fields.iter().any(|(name, _)| is_peer(name));
        self.fields.iter().filter(move |(name, _)| match has_peer {
            true => is_peer(name),
            false => *name == "listener",
        })
    }
}

/// Returns whether `text` has this word, and not as a part of a longer one.
fn has_word(text: &str, word: &str) -> bool {
    text.match_indices(word).any(|(at, _)| {
        !text[..at].ends_with(char::is_alphanumeric)
            && !text[at + word.len()..].starts_with(char::is_alphanumeric)
    })
}

/// Returns a field's value as one word of a message: in quotes if a reader could take it for
/// several.
fn quoted(value: &str) -> Cow<'_, str> {
    let is_plain = |byte: u8| byte.is_ascii_graphic() && !b"\"'\\=(),".contains(&byte);
    match value {
        "" => "\"\"".into(),
        _ if value.bytes().all(is_plain) => value.into(),
        _ => format!("{value:?}").into(),
    }
}

/// Returns `text` without control characters and in at most `max` bytes. It ends with dots where it
/// was cut.
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
        let fields = vec![("client", "a\nPRIORITY=0".into())];
        let line = Line { text: "cut\noff".into(), fields, suppressed: 0 };
        let render = |format| String::from_utf8(line.render(format, Level::WARN)).unwrap();
        let text = "cut off (client \"a\\nPRIORITY=0\")";
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
    fn a_message_names_client_and_backend_or_the_listener_once() {
        let fields = |names: &[(&'static str, &str)]| {
            names.iter().map(|(name, value)| (*name, value.to_string())).collect::<Vec<_>>()
        };
        let all = [("client", "10.0.0.5:47"), ("listener", "[::]:80"), ("backend", "h:80")];
        for (text, names, expected) in [
            ("Closed.", &all[..], "Closed (client 10.0.0.5:47, backend h:80)."),
            ("No h:80: refused", &all, "No h:80: refused (client 10.0.0.5:47)"),
            ("No h:8080. (Wait.)", &all[2..], "No h:8080 (backend h:80). (Wait.)"),
            ("Full. (Raise it.)", &all[1..2], "Full (listener [::]:80). (Raise it.)"),
            ("Full at [::]:80.", &all[1..2], "Full at [::]:80."),
            ("Full.", &[], "Full."),
        ] {
            let mut line = Line { text: text.into(), fields: fields(names), suppressed: 0 };
            assert_eq!(line.message(), expected);
            line.suppressed = 98;
            let expected = format!("{expected} (98 more since the last such message.)");
            assert_eq!(line.message(), expected);
        }
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
            ("/x,", "\"/x,\""),
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
