//! Where events go: the journal with fields, or lines on standard error.
//!
//! **Logging never waits.** A line goes into a bounded queue and a thread of its own, started with
//! the first line, writes it. When the reader of standard error or the journal is stuck, lines are
//! dropped and counted, and the count is said once it moves again. Where no thread can be started
//! (`TasksMax=`, `RLIMIT_NPROC`), a line is written at once, or dropped if that would wait.
//!
//! tracing's five levels stand for syslog(3)'s: error is `err`, warn `warning`, info `notice` and
//! `info`, debug and trace `debug`. There are no spans: an event carries the fields it needs.
//! (tracing-journald sends on the caller's thread, which waits as long as the journal does.)

pub mod bytes;

use std::borrow::Cow;
use std::env;
use std::fmt::{self, Write as _};
use std::io::{self, Write as _};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixDatagram;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{SendFlags, SocketAddrUnix, sendto};
use tokio::time::Instant;
use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};

/// An error without Rust's "(os error N)".
pub fn os_message(error: &io::Error) -> String {
    let words = error.to_string();
    match words.split_once(" (os error") {
        Some((words, _)) => words.into(),
        None => words,
    }
}

/// Lines that may wait for their reader.
const QUEUE_MAX: usize = 1024;

/// Bytes of a line or a field.
const LINE_MAX: usize = 2048;

/// How long the end of the process waits for the last lines.
const FLUSH: Duration = Duration::from_millis(200);

static PANICS: RateLimit = RateLimit::new(5, Duration::from_secs(10));

const JOURNAL_SOCKET: &str = "/run/systemd/journal/socket";

/// What is logged: this and anything worse.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogLevel(LevelFilter);

impl LogLevel {
    /// Reads a name or number of syslog(3).
    pub fn parse(text: &str) -> Option<Self> {
        Some(Self(match text {
            "emerg" | "alert" | "crit" | "0" | "1" | "2" => LevelFilter::OFF,
            "err" | "error" | "3" => LevelFilter::ERROR,
            "warning" | "warn" | "4" => LevelFilter::WARN,
            "notice" | "info" | "5" | "6" => LevelFilter::INFO,
            "debug" | "7" => LevelFilter::DEBUG,
            _ => return None,
        }))
    }

    /// `$SYSTEMD_LOG_LEVEL`, or info. Like systemd, ignores what it can't read; of a list, the word
    /// that is not for one destination only.
    pub fn from_environment() -> Self {
        env::var("SYSTEMD_LOG_LEVEL")
            .ok()
            .and_then(|levels| {
                let mut levels = levels.split(',').filter(|level| !level.contains(':'));
                levels.find_map(Self::parse)
            })
            .unwrap_or(Self(LevelFilter::INFO))
    }
}

/// Flushes what was logged when it is dropped.
#[derive(Debug)]
pub struct Logging(Arc<Queue>);

impl Logging {
    /// Makes this the destination of all events and panics.
    pub fn start(level: LogLevel) -> Self {
        Self::start_as(level, Output::detect())
    }

    /// The same, where standard error is not there to be written to: the journal or nowhere.
    pub fn without_stderr(level: LogLevel) -> Self {
        match Output::journal() {
            Some(journal) => Self::start_as(level, journal),
            None => Self::start_as(LogLevel(LevelFilter::OFF), Output::Stderr(Format::Plain)),
        }
    }

    fn start_as(level: LogLevel, output: Output) -> Self {
        let (output, dropped) = (Arc::new(output), Arc::default());
        let queue = Arc::new(Queue { output, sender: OnceLock::new(), dropped });
        let logger = Logger { level: level.0, queue: Arc::clone(&queue) };
        // Fails only when a test has set another: then that one stays.
        let _ = tracing::subscriber::set_global_default(logger);
        std::panic::set_hook(Box::new(|panic| {
            if let Some(suppressed) = PANICS.pass() {
                tracing::error!("Internal error, please report: {panic}{suppressed}");
            }
        }));
        Self(queue)
    }
}

impl Drop for Logging {
    fn drop(&mut self) {
        if let Some(sender) = self.0.sender.get() {
            let (done, written) = sync_channel(1);
            if sender.try_send(Item::Flush(done)).is_ok() {
                let _ = written.recv_timeout(FLUSH);
            }
        }
    }
}

/// Lets a repeating message through a few times, and counts the rest.
#[derive(Debug)]
pub struct RateLimit {
    burst: u32,
    interval: Duration,
    state: Mutex<Option<(Instant, u32)>>,
}

impl RateLimit {
    /// At most `burst` messages an `interval`.
    pub const fn new(burst: u32, interval: Duration) -> Self {
        Self { burst, interval, state: Mutex::new(None) }
    }

    /// Whether to log now; if so, how many were held back since the last time.
    pub fn pass(&self) -> Option<Suppressed> {
        let mut state = self.state.lock().ok()?;
        let now = Instant::now();
        let (start, count, held_back) = match *state {
            Some((start, count)) if now - start < self.interval => (start, count, 0),
            Some((_, count)) => (now, 0, count.saturating_sub(self.burst)),
            None => (now, 0, 0),
        };
        *state = Some((start, count.saturating_add(1)));
        (count < self.burst).then_some(Suppressed(held_back))
    }
}

/// How many messages a [`RateLimit`] held back; prints as nothing, or as the tail of a message.
#[derive(Clone, Copy, Debug)]
pub struct Suppressed(u32);

impl fmt::Display for Suppressed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            0 => Ok(()),
            count => write!(f, " ({count} more since the last such message)"),
        }
    }
}

/// The form in which lines leave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Format {
    /// The journal's native protocol, with fields.
    Journal,
    /// Lines with `<N>` in front, sd-daemon(3).
    Prefixed,
    /// Lines.
    Plain,
}

/// Where lines are written.
#[derive(Debug)]
enum Output {
    Stderr(Format),
    /// Opened at the start, when there are descriptors.
    Journal(UnixDatagram),
}

impl Output {
    fn detect() -> Self {
        if is_journal_stream() {
            return Self::journal().unwrap_or(Self::Stderr(Format::Prefixed));
        }
        // systemd.exec(5): set for the process that systemd itself started.
        let pid = std::process::id().to_string();
        Self::Stderr(match env::var("SYSTEMD_EXEC_PID") {
            Ok(started) if started == pid => Format::Prefixed,
            _ => Format::Plain,
        })
    }

    /// The journal, if there is one that takes entries.
    fn journal() -> Option<Self> {
        UnixDatagram::unbound().and_then(|socket| socket.connect(JOURNAL_SOCKET)).ok()?;
        // Not connected: a journal that is restarted is another socket of the same name.
        UnixDatagram::unbound().ok().map(Self::Journal)
    }

    fn form(&self) -> Format {
        match self {
            Self::Stderr(form) => *form,
            Self::Journal(_) => Format::Journal,
        }
    }

    fn write(&self, line: &[u8]) -> io::Result<()> {
        match self {
            Self::Stderr(_) => io::stderr().write_all(line),
            Self::Journal(socket) => socket.send_to(line, JOURNAL_SOCKET).map(drop),
        }
    }

    /// Writes a line unless that would wait.
    fn try_write(&self, line: &[u8]) -> io::Result<()> {
        match self {
            Self::Stderr(_) => {
                // A pipe that can be written to has room for a line (PIPE_BUF in pipe(7)).
                let stderr = io::stderr();
                let mut fds = [PollFd::new(&stderr, PollFlags::OUT)];
                poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 }))?;
                if !fds[0].revents().contains(PollFlags::OUT) {
                    return Err(io::ErrorKind::WouldBlock.into());
                }
                self.write(line)
            }
            Self::Journal(socket) => {
                let name = SocketAddrUnix::new(JOURNAL_SOCKET)?;
                sendto(socket, line, SendFlags::DONTWAIT | SendFlags::NOSIGNAL, &name)?;
                Ok(())
            }
        }
    }
}

/// systemd.exec(5): `$JOURNAL_STREAM` names the device and inode of the stream that was connected;
/// a redirection since then makes standard error another one.
fn is_journal_stream() -> bool {
    let Ok(stream) = env::var("JOURNAL_STREAM") else {
        return false;
    };
    // Through /proc the metadata is the open file's; std has no fstat for standard error.
    std::fs::metadata("/proc/self/fd/2")
        .is_ok_and(|stderr| stream == format!("{}:{}", stderr.dev(), stderr.ino()))
}

/// The way to the writing thread.
#[derive(Debug)]
struct Queue {
    output: Arc<Output>,
    /// To the writing thread, once there is one.
    sender: OnceLock<SyncSender<Item>>,
    dropped: Arc<AtomicU64>,
}

enum Item {
    Line(Vec<u8>),
    Flush(SyncSender<()>),
}

impl Queue {
    fn push(&self, line: Vec<u8>) {
        let written = match self.sender() {
            Some(sender) => sender.try_send(Item::Line(line)).is_ok(),
            None => self.write_now(&line).is_ok(),
        };
        if !written {
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Writes a line, and before it how many were dropped.
    fn write_now(&self, line: &[u8]) -> io::Result<()> {
        let lost = self.dropped.load(Ordering::Relaxed);
        if lost > 0 {
            self.output.try_write(&lines_were_dropped(lost, self.output.form()))?;
            self.dropped.fetch_sub(lost, Ordering::Relaxed);
        }
        self.output.try_write(line)
    }

    /// Starts the thread with the first line, and tries again with the next if that fails.
    fn sender(&self) -> Option<&SyncSender<Item>> {
        if self.sender.get().is_none() {
            let (sender, items) = sync_channel(QUEUE_MAX);
            let (output, dropped) = (Arc::clone(&self.output), Arc::clone(&self.dropped));
            let writer = std::thread::Builder::new().name("log".into());
            writer.spawn(move || write_items(&output, &items, &dropped)).ok()?;
            // Another thread may have been quicker; then this one's writer ends by itself.
            let _ = self.sender.set(sender);
        }
        self.sender.get()
    }
}

/// The thread that may wait.
fn write_items(output: &Output, items: &Receiver<Item>, dropped: &AtomicU64) {
    let write = |line: &[u8]| {
        if output.write(line).is_err() {
            dropped.fetch_add(1, Ordering::Relaxed);
        }
    };
    for item in items {
        let flushed = match item {
            Item::Line(line) => {
                write(&line);
                None
            }
            Item::Flush(done) => Some(done),
        };
        // Whatever was dropped, it was while this thread waited for the reader.
        let lost = dropped.swap(0, Ordering::Relaxed);
        if lost > 0 {
            write(&lines_were_dropped(lost, output.form()));
        }
        drop(flushed);
    }
}

fn lines_were_dropped(lost: u64, form: Format) -> Vec<u8> {
    let text = format!("{lost} log lines were dropped, their reader was stuck.");
    Line { text, fields: Vec::new() }.render(form, Level::WARN)
}

/// tracing's side: which events, and what becomes of one.
struct Logger {
    level: LevelFilter,
    queue: Arc<Queue>,
}

impl Subscriber for Logger {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.is_event() && *metadata.level() <= self.level
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        Some(self.level)
    }

    fn event(&self, event: &Event<'_>) {
        let mut line = Line::default();
        event.record(&mut line);
        self.queue.push(line.render(self.queue.output.form(), *event.metadata().level()));
    }

    // No span is ever enabled.
    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }
    fn record(&self, _: &Id, _: &Record<'_>) {}
    fn record_follows_from(&self, _: &Id, _: &Id) {}
    fn enter(&self, _: &Id) {}
    fn exit(&self, _: &Id) {}
}

/// An event's message and fields.
#[derive(Default)]
struct Line {
    text: String,
    fields: Vec<(&'static str, String)>,
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
    fn render(&self, form: Format, level: Level) -> Vec<u8> {
        let mut text = self.text.clone();
        for (name, value) in &self.fields {
            let _ = write!(text, " {name}={}", quoted(value));
        }
        let text = one_line(&text);
        let priority = match level {
            Level::ERROR => 3,
            Level::WARN => 4,
            Level::INFO => 5,
            Level::DEBUG | Level::TRACE => 7,
        };
        let mut line = String::new();
        let _ = match form {
            Format::Plain => writeln!(line, "{text}"),
            Format::Prefixed => writeln!(line, "<{priority}>{text}"),
            Format::Journal => {
                for (name, value) in &self.fields {
                    let _ = writeln!(line, "{}={}", name.to_uppercase(), one_line(value));
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

/// A field's value as a word of a line: in quotes if a reader could take it for more than one word.
fn quoted(value: &str) -> Cow<'_, str> {
    let is_plain = |byte: u8| byte.is_ascii_graphic() && !b"\"'\\=".contains(&byte);
    match value {
        "" => "\"\"".into(),
        _ if value.bytes().all(is_plain) => value.into(),
        _ => format!("{value:?}").into(),
    }
}

/// A value that can't begin another line or field, and is no longer than a line may be.
fn one_line(text: &str) -> String {
    bounded_line(text, LINE_MAX)
}

/// `text` without control characters and in at most `max` bytes, with dots where it was cut.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_are_syslogs() {
        assert_eq!(LogLevel::parse("err"), LogLevel::parse("3"));
        assert_eq!(LogLevel::parse("debug"), LogLevel::parse("7"));
        assert_eq!(LogLevel::parse("loud"), None);
    }

    #[test]
    fn a_line_stays_one_line_in_each_form() {
        let line =
            Line { text: "cut\noff".into(), fields: vec![("client", "a\nPRIORITY=0".into())] };
        let render = |form| String::from_utf8(line.render(form, Level::WARN)).unwrap();
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
    fn what_is_cut_is_seen_to_be() {
        assert_eq!(bounded_line("a\nb", 3), "a b");
        assert_eq!(bounded_line("abcdefgh", 7), "abcd...");
        assert_eq!(bounded_line("abc\u{e9}efgh", 7), "abc...");
    }

    #[tokio::test(start_paused = true)]
    async fn a_repeating_message_is_held_back_and_counted() {
        let limit = RateLimit::new(2, Duration::from_secs(10));
        let passed = (0..100).filter(|_| limit.pass().is_some()).count();
        assert_eq!(passed, 2);
        tokio::time::advance(Duration::from_secs(11)).await;
        let suppressed = limit.pass().unwrap().to_string();
        assert_eq!(suppressed, " (98 more since the last such message)");
        tokio::time::advance(Duration::from_secs(11)).await;
        assert_eq!(limit.pass().unwrap().to_string(), "");
    }
}
