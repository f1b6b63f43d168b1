//! The command line, in the syntax of Go's `flag` package.

mod table;
#[cfg(test)]
mod tests;
mod value;

use std::collections::HashMap;
use table::{Flag, Support, FLAGS};
use value::Kind;
pub(super) use value::Value;

/// The values of all flags.
#[derive(Debug)]
pub(super) struct Flags(HashMap<&'static str, Value>);

/// Why the program ends without starting the daemon. Both have the text for stderr.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Refused {
    /// `-help`: exit status 0.
    Help(String),
    /// A flag is unknown or has an invalid value: exit status 2.
    Invalid(String),
}

impl Flags {
    /// Parses arguments without the program's own name, which is only for the usage text. As in Go,
    /// the first argument that is no flag ends the flags, and the rest is ignored.
    pub(super) fn parse(program: &str, arguments: &[String]) -> Result<Self, Refused> {
        let invalid = |why: String| Refused::Invalid(format!("{why}\n{}", usage(program)));
        let mut values: HashMap<_, _> = FLAGS
            .iter()
            .map(|flag| (flag.name, flag.default_value()))
            .collect();
        let mut rest = arguments.iter();
        while let Some(argument) = rest.next() {
            let Some(text) = argument.strip_prefix('-').filter(|text| !text.is_empty()) else {
                break;
            };
            if text == "-" {
                break;
            }
            let text = text.strip_prefix('-').unwrap_or(text);
            if text.is_empty() || text.starts_with(['-', '=']) {
                return Err(invalid(format!("bad flag syntax: {argument}")));
            }
            let (name, value) = match text.split_once('=') {
                Some((name, value)) => (name, Some(value)),
                None => (text, None),
            };
            let Some(flag) = FLAGS.iter().find(|flag| flag.name == name) else {
                if name == "help" || name == "h" {
                    return Err(Refused::Help(usage(program)));
                }
                return Err(invalid(format!("flag provided but not defined: -{name}")));
            };
            let value = match (value, flag.kind) {
                (Some(value), _) => value,
                (None, Kind::Bool) => "true",
                (None, _) => match rest.next() {
                    Some(value) => value,
                    None => return Err(invalid(format!("flag needs an argument: -{name}"))),
                },
            };
            let parsed = Value::parse(flag.kind, value).map_err(|why| {
                invalid(match flag.kind {
                    Kind::Bool => format!("invalid boolean value {value:?} for -{name}: {why}"),
                    _ => format!("invalid value {value:?} for flag -{name}: {why}"),
                })
            })?;
            values.insert(flag.name, parsed);
        }
        Ok(Self(values))
    }

    /// Returns the value of a boolean flag.
    pub(super) fn is(&self, name: &str) -> bool {
        matches!(self.0.get(name), Some(Value::Bool(true)))
    }

    /// Returns the value of a flag that is text, or an empty text.
    pub(super) fn text(&self, name: &str) -> &str {
        match self.0.get(name) {
            Some(Value::Text(text)) => text,
            _ => "",
        }
    }

    /// Returns the value of a flag that is a number or a duration in nanoseconds, or 0.
    pub(super) fn number(&self, name: &str) -> i64 {
        match self.0.get(name) {
            Some(Value::Int(number)) => *number,
            _ => 0,
        }
    }

    /// Returns one line for each flag that was set to request a feature that this daemon lacks.
    pub(super) fn missing_features(&self) -> Vec<String> {
        let requested = |flag: &&Flag| {
            let value = self.0.get(flag.name);
            let is_off = matches!(value, Some(Value::Bool(false)) | None);
            !is_off && value != Some(&flag.default_value())
        };
        let missing = FLAGS.iter().filter(requested);
        let lines = missing.filter_map(|flag| match flag.support {
            Support::Missing(feature) => Some(format!(
                "-{} has no effect: this daemon has no {feature} yet",
                flag.name
            )),
            Support::Full | Support::Ignored => None,
        });
        lines.collect()
    }
}

/// Returns the list of flags, in Go's layout.
fn usage(program: &str) -> String {
    let mut text = format!("Usage of {program}:\n");
    for flag in FLAGS {
        let kind = match flag.kind {
            Kind::Bool => "",
            Kind::Int => " int",
            Kind::Uint => " uint",
            Kind::Duration => " duration",
            Kind::Text => " string",
        };
        let gap = match flag.name.len() + kind.len() {
            1 => "\t",
            _ => "\n    \t",
        };
        text += &format!("  -{}{kind}{gap}{}", flag.name, flag.usage);
        match (flag.kind, flag.default) {
            (_, "") => {}
            (Kind::Text, default) => text += &format!(" (default {default:?})"),
            (_, default) => text += &format!(" (default {default})"),
        }
        text.push('\n');
    }
    text.pop();
    text
}
