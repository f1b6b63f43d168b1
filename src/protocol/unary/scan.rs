//! Finds the payload from the first bytes of a frame.

use super::call_id::CallId;
use super::message::{Direction, Head, HeadRef, CALL};

/// Result of reading the head of a frame.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Scan<'a> {
    /// The payload begins at this offset and is the rest of the message.
    Payload(HeadRef<'a>, usize),
    /// The head has not arrived completely.
    Incomplete,
    /// The message has another layout, or no payload.
    Other,
}

/// Finds the payload in a message of `len` bytes, of which `bytes` have arrived. Expects the layout of Go
/// and prost: fields in the order of their numbers, the payload last.
pub(super) fn scan(bytes: &[u8], len: usize, direction: Direction) -> Scan<'_> {
    let mut at = Cursor {
        bytes,
        offset: 0,
        end: len,
    };
    let scanned = (|| {
        let id: CallId = at.value(1)?.try_into().map_err(|_| Scan::Other)?;
        let head = match u32::from(at.key()?) {
            field if field == direction.reply() => {
                at.enter_last()?;
                Head::Reply { id }
            }
            CALL => {
                at.enter_last()?;
                let peer = at.value(1)?;
                let protocol = std::str::from_utf8(at.value(2)?).map_err(|_| Scan::Other)?;
                Head::Call { id, peer, protocol }
            }
            _ => return Err(Scan::Other),
        };
        let payload = if matches!(head, Head::Reply { .. }) {
            1
        } else {
            3
        };
        if at.key()? != payload {
            return Err(Scan::Other);
        }
        at.enter_last()?;
        Ok(Scan::Payload(head, at.offset))
    })();
    scanned.unwrap_or_else(|stopped| stopped)
}

/// Reads length-delimited fields.
struct Cursor<'a> {
    bytes: &'a [u8],
    offset: usize,
    end: usize,
}

impl<'a> Cursor<'a> {
    fn byte(&mut self) -> Result<u8, Scan<'a>> {
        let byte = self.bytes.get(self.offset).ok_or(Scan::Incomplete)?;
        self.offset += 1;
        Ok(*byte)
    }

    /// Reads the number of a length-delimited field, which must be below 16.
    fn key(&mut self) -> Result<u8, Scan<'a>> {
        match self.byte()? {
            key if key & 0x87 == 2 => Ok(key >> 3),
            _ => Err(Scan::Other),
        }
    }

    fn length(&mut self) -> Result<usize, Scan<'a>> {
        let mut length = 0;
        for shift in [0, 7, 14, 21] {
            let byte = self.byte()?;
            length |= usize::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Ok(length);
            }
        }
        Err(Scan::Other)
    }

    fn value(&mut self, number: u8) -> Result<&'a [u8], Scan<'a>> {
        if self.key()? != number {
            return Err(Scan::Other);
        }
        let end = self.length()? + self.offset;
        if end > self.end {
            return Err(Scan::Other);
        }
        let value = self.bytes.get(self.offset..end).ok_or(Scan::Incomplete)?;
        self.offset = end;
        Ok(value)
    }

    /// Reads the length of a field that must extend to the end of the message.
    fn enter_last(&mut self) -> Result<(), Scan<'a>> {
        if self.length()? + self.offset == self.end {
            return Ok(());
        }
        Err(Scan::Other)
    }
}
