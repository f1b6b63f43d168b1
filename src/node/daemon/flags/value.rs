//! Values of flags, as Go's `flag` package reads them.

/// Kind of a flag's value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Bool,
    Int,
    Uint,
    Duration,
    Text,
}

/// The value of a flag.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::daemon) enum Value {
    /// Of a boolean flag.
    Bool(bool),
    /// Of a number, or of a duration in nanoseconds.
    Int(i64),
    /// Of a flag that is text.
    Text(String),
}

const PARSE: &str = "parse error";
const RANGE: &str = "value out of range";

impl Value {
    /// Reads a value; the error is Go's.
    pub(super) fn parse(kind: Kind, text: &str) -> Result<Self, &'static str> {
        match kind {
            Kind::Bool => match text {
                "1" | "t" | "T" | "true" | "TRUE" | "True" => Ok(Self::Bool(true)),
                "0" | "f" | "F" | "false" | "FALSE" | "False" => Ok(Self::Bool(false)),
                _ => Err(PARSE),
            },
            Kind::Int => {
                let (is_negative, digits) = match text.strip_prefix('-') {
                    Some(digits) => (true, digits),
                    None => (false, text.strip_prefix('+').unwrap_or(text)),
                };
                let number = i128::from(magnitude(digits)?);
                let number = if is_negative { -number } else { number };
                i64::try_from(number).map(Self::Int).map_err(|_| RANGE)
            }
            // The only flag of this kind is a port.
            Kind::Uint => i64::try_from(magnitude(text)?)
                .map(Self::Int)
                .map_err(|_| RANGE),
            Kind::Duration => duration(text).map(Self::Int).ok_or(PARSE),
            Kind::Text => Ok(Self::Text(text.to_owned())),
        }
    }
}

/// Reads an integer without a sign, with Go's prefixes and underscores: `0x1f`, `0b1`, `0o7`, `07`,
/// `1_000`.
fn magnitude(text: &str) -> Result<u64, &'static str> {
    let lower = text.to_ascii_lowercase();
    let (radix, digits) = match lower.as_bytes() {
        [b'0', b'x', ..] => (16, &lower[2..]),
        [b'0', b'b', ..] => (2, &lower[2..]),
        [b'0', b'o', ..] => (8, &lower[2..]),
        [b'0', _, ..] => (8, &lower[1..]),
        _ => (10, &lower[..]),
    };
    // An underscore may follow a prefix or a digit, and must precede a digit.
    let separated = if radix == 10 {
        digits
    } else {
        digits.strip_prefix('_').unwrap_or(digits)
    };
    let is_digit = |letter: char| letter.is_digit(radix);
    if !separated
        .split('_')
        .all(|group| !group.is_empty() && group.chars().all(is_digit))
    {
        return Err(PARSE);
    }
    u64::from_str_radix(&separated.replace('_', ""), radix).map_err(|_| RANGE)
}

/// Reads a duration in nanoseconds: `1h30m`, `1.5s`, `-2ms`, or `0`.
fn duration(text: &str) -> Option<i64> {
    let (sign, mut rest) = match text.strip_prefix('-') {
        Some(rest) => (-1, rest),
        None => (1, text.strip_prefix('+').unwrap_or(text)),
    };
    if rest == "0" {
        return Some(0);
    }
    if rest.is_empty() {
        return None;
    }
    let mut total = 0i128;
    while !rest.is_empty() {
        let end = rest.find(|letter: char| !letter.is_ascii_digit() && letter != '.')?;
        let (number, after) = rest.split_at(end);
        let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
        if (whole.is_empty() && fraction.is_empty()) || fraction.contains('.') {
            return None;
        }
        let unit_end = after
            .find(|letter: char| letter.is_ascii_digit() || letter == '.')
            .unwrap_or(after.len());
        let (unit, after) = after.split_at(unit_end);
        let unit: i128 = match unit {
            "ns" => 1,
            "us" | "µs" | "μs" => 1_000,
            "ms" => 1_000_000,
            "s" => 1_000_000_000,
            "m" => 60_000_000_000,
            "h" => 3_600_000_000_000,
            _ => return None,
        };
        let whole: i128 = match whole {
            "" => 0,
            digits => digits.parse::<i64>().ok()?.into(),
        };
        total += whole * unit;
        // More digits than these are below a nanosecond.
        let digits: String = fraction.chars().take(15).collect();
        if !digits.is_empty() {
            let scale = 10i128.pow(digits.len() as u32);
            total += digits.parse::<i128>().ok()? * unit / scale;
        }
        if total > i128::from(i64::MAX) {
            return None;
        }
        rest = after;
    }
    i64::try_from(sign * total).ok()
}
