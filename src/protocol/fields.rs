//! Reads the fields of a protobuf message without a schema.

use super::framing;

/// Iterates over the length-delimited fields of a message. Skips all other fields, including whole
/// groups. Stops before a malformed field.
///
/// prost cannot be used here. The Go daemon forwards unknown fields from peers, and prost fails if these
/// contain deeply nested groups.
pub struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    /// Starts at the first field of an encoded message.
    pub fn new(message: &'a [u8]) -> Self {
        Self(message)
    }

    /// Whether all fields were read and well-formed.
    pub fn is_at_end(&self) -> bool {
        self.0.is_empty()
    }

    /// Returns the number and content of the next length-delimited field.
    pub fn next(&mut self) -> Option<(u64, &'a [u8])> {
        let mut bytes = self.0;
        // Number of enclosing groups.
        let mut depth = 0_usize;
        loop {
            let (key, rest) = framing::decode_varint(bytes).ok()?;
            let (value, rest) = match key & 7 {
                0 => (None, framing::decode_varint(rest).ok()?.1),
                1 => (None, rest.get(8..)?),
                2 => {
                    let (len, rest) = framing::decode_varint(rest).ok()?;
                    let (value, rest) = rest.split_at_checked(usize::try_from(len).ok()?)?;
                    (Some(value), rest)
                }
                3 => {
                    depth += 1;
                    (None, rest)
                }
                4 => {
                    depth = depth.checked_sub(1)?;
                    (None, rest)
                }
                5 => (None, rest.get(4..)?),
                _ => return None,
            };
            bytes = rest;
            if depth == 0 {
                self.0 = rest;
                if let Some(value) = value {
                    return Some((key >> 3, value));
                }
            }
        }
    }

    /// Returns the content of the last field with this number.
    pub fn last(mut self, number: u64) -> Option<&'a [u8]> {
        let mut last = None;
        while let Some((found, value)) = self.next() {
            if found == number {
                last = Some(value);
            }
        }
        last
    }
}
