//! Log lines on stderr, in the formats of the Go daemons: `GOLOG_LOG_LEVEL` sets the level, and
//! `GOLOG_LOG_FMT=json` the format that hivemind reads.

use super::output::stderr;
use log::{Level, LevelFilter, Log, Metadata, Record};
use std::env;
use std::fmt::Write as _;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

struct Logger {
    is_json: bool,
}

/// Starts logging.
pub(super) fn start() {
    let is_json = env::var("GOLOG_LOG_FMT").is_ok_and(|format| format == "json");
    let level = env::var("GOLOG_LOG_LEVEL").unwrap_or_default();
    if log::set_boxed_logger(Box::new(Logger { is_json })).is_ok() {
        log::set_max_level(filter(&level));
    }
}

/// Reads the level of all loggers, such as `info` in `info,dht=debug`.
fn filter(levels: &str) -> LevelFilter {
    let mut levels = levels.split(',').filter(|level| !level.contains('='));
    match levels.next().unwrap_or_default().to_lowercase().as_str() {
        "debug" => LevelFilter::Debug,
        "info" => LevelFilter::Info,
        "warn" | "warning" => LevelFilter::Warn,
        _ => LevelFilter::Error,
    }
}

impl Log for Logger {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        // The libraries log normal events at the lower levels.
        metadata.level() <= Level::Error || metadata.target().starts_with("p2pd")
    }

    fn log(&self, record: &Record<'_>) {
        if self.enabled(record.metadata()) {
            let message = record.args().to_string();
            stderr().push(&self.line(record, &message, SystemTime::now()));
        }
    }

    fn flush(&self) {}
}

impl Logger {
    fn line(&self, record: &Record<'_>, message: &str, now: SystemTime) -> String {
        let time = Time::from(now).rfc3339();
        let level = record.level().as_str();
        let logger = record.target().split("::").next().unwrap_or_default();
        let file = record.file().unwrap_or_default();
        let caller = format!("{file}:{}", record.line().unwrap_or_default());
        if !self.is_json {
            return format!("{time}\t{level}\t{logger}\t{caller}\t{message}");
        }
        let level = level.to_lowercase();
        let fields = [
            ("level", level.as_str()),
            ("ts", &time),
            ("logger", logger),
            ("caller", &caller),
            ("msg", message),
        ];
        let fields = fields.map(|(name, value)| format!("\"{name}\":{}", quoted(value)));
        format!("{{{}}}", fields.join(","))
    }
}

/// Returns a JSON string.
fn quoted(text: &str) -> String {
    let mut quoted = String::from("\"");
    for letter in text.chars() {
        match letter {
            '"' | '\\' => quoted.extend(['\\', letter]),
            '\0'..='\x1f' => {
                let _ = write!(quoted, "\\u{:04x}", letter as u32);
            }
            letter => quoted.push(letter),
        }
    }
    quoted + "\""
}

/// A time in UTC.
pub(super) struct Time {
    year: u64,
    month: u64,
    day: u64,
    /// Since midnight.
    time: Duration,
}

impl From<SystemTime> for Time {
    fn from(time: SystemTime) -> Self {
        const DAY: u64 = 86_400;
        let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
        // Counts from 1 March of the year 0, so that a leap day ends its year. 400 years have 146,097 days.
        let days = since.as_secs() / DAY + 719_468;
        let (era, day_of_era) = (days / 146_097, days % 146_097);
        let year_of_era =
            (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let from_march = (5 * day_of_year + 2) / 153;
        let month = (from_march + 2) % 12 + 1;
        Self {
            year: 400 * era + year_of_era + u64::from(month <= 2),
            month,
            day: day_of_year - (153 * from_march + 2) / 5 + 1,
            time: since - Duration::from_secs(since.as_secs() / DAY * DAY),
        }
    }
}

impl Time {
    fn rfc3339(&self) -> String {
        let millis = self.time.subsec_millis();
        format!(
            "{:04}-{:02}-{:02}T{}.{millis:03}Z",
            self.year,
            self.month,
            self.day,
            self.clock()
        )
    }

    /// Returns the time as Go's `log` package writes it: `2026/11/29 16:59:57`.
    pub(super) fn go(&self) -> String {
        format!(
            "{:04}/{:02}/{:02} {}",
            self.year,
            self.month,
            self.day,
            self.clock()
        )
    }

    fn clock(&self) -> String {
        let seconds = self.time.as_secs();
        format!(
            "{:02}:{:02}:{:02}",
            seconds / 3600,
            seconds / 60 % 60,
            seconds % 60
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writes_times_as_go_does() {
        for (seconds, expected) in [
            (0, "1970/01/01 00:00:00"),
            (951_782_399, "2000/02/28 23:59:59"),
            (951_782_400, "2000/02/29 00:00:00"),
            (1_796_057_997, "2026/11/30 16:59:57"),
            (4_107_542_400, "2100/03/01 00:00:00"),
        ] {
            let time = Time::from(UNIX_EPOCH + Duration::from_secs(seconds));
            assert_eq!(time.go(), expected);
        }
        let time = Time::from(UNIX_EPOCH + Duration::from_millis(1_796_057_997_067));
        assert_eq!(time.rfc3339(), "2026-11-30T16:59:57.067Z");
    }

    #[test]
    fn writes_lines_that_hivemind_reads() {
        let logger = Logger { is_json: true };
        let mut record = Record::builder();
        record.level(Level::Warn).target("p2pd_node::server");
        record.file(Some("server/session.rs")).line(Some(7));
        assert_eq!(
            logger.line(&record.build(), "a \"b\"\n\\", UNIX_EPOCH),
            r#"{"level":"warn","ts":"1970-01-01T00:00:00.000Z","logger":"p2pd_node","caller":"server/session.rs:7","msg":"a \"b\"\u000a\\"}"#
        );
        assert_eq!(filter("info,dht=debug"), LevelFilter::Info);
        assert_eq!(filter(""), LevelFilter::Error);
    }
}
