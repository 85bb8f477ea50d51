//! Where events go: systemd's journal with fields, or lines on standard error.
//!
//! **Logging never waits.** A line goes into a bounded queue. A thread, which the first line
//! starts, writes the lines. When the reader of standard error or systemd's journal is stuck, lines
//! are dropped and counted, and the count is logged once the reader moves again. Where no thread
//! can be started (`TasksMax=`, `RLIMIT_NPROC`), a line is written at once, or dropped if that
//! would wait.
//!
//! tracing's five levels stand for syslog(3)'s: error is `err`, warn `warning`, info `notice` and
//! `info`, debug and trace `debug`. There are no spans: an event carries the fields it needs.
//! (tracing-journald sends on the caller's thread, which waits as long as the journal does.)

pub mod bytes;
pub mod message_id;
mod rate_limit;
mod output;
mod line;

use std::env;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use clap::ValueEnum;
use tracing::level_filters::LevelFilter;
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};

use crate::logging::line::{Format, Line};
use crate::logging::output::Output;

pub use line::bounded_line;
pub use rate_limit::RateLimit;
pub(crate) use rate_limit::rate_limited;

/// Returns an error's message without Rust's "(os error N)".
pub fn os_message(error: &io::Error) -> String {
    let mut message = error.to_string();
    message.truncate(message.find(" (os error").unwrap_or(message.len()));
    message
}

/// The least severe level that is logged, by its name or number in syslog(3).
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogLevel {
    /// Nothing is logged: no event is more severe than `err`.
    #[value(hide = true, aliases = ["alert", "emerg", "0", "1", "2"])]
    Crit,
    #[value(aliases = ["error", "3"])]
    Err,
    #[value(aliases = ["warn", "4"])]
    Warning,
    #[value(alias = "5")]
    Notice,
    #[value(alias = "6")]
    Info,
    #[value(alias = "7")]
    Debug,
}

impl LogLevel {
    /// Returns `$SYSTEMD_LOG_LEVEL`, or info. Like systemd, ignores what it can't read. In a list,
    /// takes the first level without a `DESTINATION:` before it.
    pub fn from_environment() -> Self {
        let levels = env::var("SYSTEMD_LOG_LEVEL").unwrap_or_default();
        let mut levels = levels.split(',').filter(|level| !level.contains(':'));
        levels.find_map(|level| Self::from_str(level, false).ok()).unwrap_or(Self::Info)
    }

    fn filter(self) -> LevelFilter {
        match self {
            Self::Crit => LevelFilter::OFF,
            Self::Err => LevelFilter::ERROR,
            Self::Warning => LevelFilter::WARN,
            Self::Notice | Self::Info => LevelFilter::INFO,
            Self::Debug => LevelFilter::DEBUG,
        }
    }
}

/// The destination of all events and panics. Dropping this flushes the last lines.
#[derive(Debug)]
pub struct Logging(Arc<Logger>);

impl Logging {
    pub fn start(level: LogLevel) -> Self {
        Self::start_with(level, Output::detect())
    }

    /// Logs to the journal or not at all, where standard error was a client's socket.
    pub fn without_stderr(level: LogLevel) -> Self {
        match Output::journal() {
            Some(journal) => Self::start_with(level, journal),
            None => Self::start_with(LogLevel::Crit, Output::Stderr(Format::Plain)),
        }
    }

    fn start_with(level: LogLevel, output: Output) -> Self {
        let (output, dropped) = (Arc::new(output), Arc::default());
        let logger = Logger { level: level.filter(), output, sender: OnceLock::new(), dropped };
        let logger = Arc::new(logger);
        // Fails only when a test has set another, which then stays.
        let _ = tracing::subscriber::set_global_default(Arc::clone(&logger));
        std::panic::set_hook(Box::new(|panic| {
            rate_limited!(
                PANICS,
                error,
                message_id = message_id::INTERNAL_ERROR,
                "Internal error, please report: {panic}."
            );
        }));
        Self(logger)
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

/// tracing's subscriber, which queues lines for the writing thread.
#[derive(Debug)]
struct Logger {
    level: LevelFilter,
    output: Arc<Output>,
    /// Set once the thread is started.
    sender: OnceLock<SyncSender<Item>>,
    dropped: Arc<AtomicU64>,
}

enum Item {
    Line(Vec<u8>),
    /// The thread sends when all lines before this are written.
    Flush(SyncSender<()>),
}

impl Logger {
    fn push(&self, line: Vec<u8>) {
        let is_accepted = match self.sender() {
            Some(sender) => sender.try_send(Item::Line(line)).is_ok(),
            None => self.write_now(&line).is_ok(),
        };
        if !is_accepted {
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Writes a line, and before it how many were dropped.
    fn write_now(&self, line: &[u8]) -> io::Result<()> {
        let dropped = self.dropped.load(Ordering::Relaxed);
        if dropped > 0 {
            self.output.try_write(&dropped_message(dropped, self.output.format()))?;
            self.dropped.fetch_sub(dropped, Ordering::Relaxed);
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
            // If another thread was quicker, this one's writer ends by itself.
            let _ = self.sender.set(sender);
        }
        self.sender.get()
    }
}

/// Runs on the thread that may wait.
fn write_items(output: &Output, items: &Receiver<Item>, dropped: &AtomicU64) {
    // A text that cannot be written stands for so many lines.
    let write = |text: &[u8], lines: u64| {
        if output.write(text).is_err() {
            dropped.fetch_add(lines, Ordering::Relaxed);
        }
    };
    for item in items {
        if let Item::Line(line) = &item {
            write(line, 1);
        }
        // Lines are dropped only while this thread waits for the reader.
        let count = dropped.swap(0, Ordering::Relaxed);
        if count > 0 {
            write(&dropped_message(count, output.format()), count);
        }
        if let Item::Flush(written) = item {
            let _ = written.send(());
        }
    }
}

fn dropped_message(count: u64, format: Format) -> Vec<u8> {
    let text = format!("{count} log lines were dropped, because their reader was stuck.");
    Line { text, ..Line::default() }.render(format, Level::WARN)
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
        self.push(line.render(self.output.format(), *event.metadata().level()));
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

/// Lines that may wait for their reader.
const QUEUE_MAX: usize = 1024;

/// How long the end of the process waits for the last lines.
const FLUSH: Duration = Duration::from_millis(200);

static PANICS: RateLimit = RateLimit::new(5, Duration::from_secs(10));

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_are_those_of_syslog() {
        let parse = |text| LogLevel::from_str(text, false).map(LogLevel::filter);
        assert_eq!(parse("emerg"), Ok(LevelFilter::OFF));
        assert_eq!(parse("3"), Ok(LevelFilter::ERROR));
        assert_eq!(parse("notice"), parse("6"));
        assert_eq!(parse("7"), Ok(LevelFilter::DEBUG));
        assert!(parse("loud").is_err());
    }
}
