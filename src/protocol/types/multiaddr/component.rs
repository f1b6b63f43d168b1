//! Reads and writes one protocol of a multiaddr, in binary and as text.

use super::error::MultiaddrError;
use crate::types::peer_id::{ParsePeerIdError, PeerId};
use multiaddr::{Error as CrateError, Protocol};
use std::fmt;
use unsigned_varint::{decode, encode};

pub(crate) const UNIX: u32 = 400;

/// One protocol of a multiaddr, with its value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Component<'a> {
    /// The number of the protocol.
    pub code: u32,
    /// Its name in text.
    pub name: &'static str,
    /// The text of its value, if it has one. For `/unix`, the path with its leading slash.
    pub value: Option<String>,
    /// The whole component in binary.
    pub bytes: &'a [u8],
}

impl fmt::Display for Component<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "/{}", self.name)?;
        match &self.value {
            Some(path) if self.code == UNIX => f.write_str(path),
            Some(value) => write!(f, "/{value}"),
            None => Ok(()),
        }
    }
}

/// Reads the first component of `input`, which is not empty and begins at `offset` in the address.
pub(super) fn read_component(input: &[u8], offset: usize) -> Result<Component<'_>, MultiaddrError> {
    let malformed = |reason: String| MultiaddrError::Malformed { offset, reason };
    let (code, value) = decode::u32(input).map_err(|error| malformed(error.to_string()))?;
    if code == UNIX {
        let (length, path) = decode::usize(value).map_err(|error| malformed(error.to_string()))?;
        if path.len() < length {
            return Err(malformed(format!("a path of {length} bytes is cut short")));
        }
        if path.len() > length {
            return Err(MultiaddrError::UnixNotLast);
        }
        let path = std::str::from_utf8(path).map_err(|error| malformed(error.to_string()))?;
        if path.trim_matches('/').is_empty() {
            return Err(malformed("an empty path".into()));
        }
        let slash = if path.starts_with('/') { "" } else { "/" };
        let value = Some(format!("{slash}{path}"));
        return Ok(Component {
            code,
            name: "unix",
            value,
            bytes: input,
        });
    }
    let (protocol, rest) = Protocol::from_bytes(input).map_err(|error| match error {
        CrateError::UnknownProtocolId(code) => MultiaddrError::UnknownCode(code),
        other => malformed(other.to_string()),
    })?;
    let name = protocol.tag();
    let text = protocol.to_string();
    let value = text[1 + name.len()..].strip_prefix('/');
    // Such a value would not survive a round trip through text.
    if value.is_some_and(|value| value.is_empty() || value.contains('/')) {
        return Err(malformed(format!(
            "the value of {name} is empty or has a slash in it"
        )));
    }
    let value = value.map(str::to_owned);
    Ok(Component {
        code,
        name,
        value,
        bytes: &input[..input.len() - rest.len()],
    })
}

pub(crate) fn push_unix(out: &mut Vec<u8>, path: &str) {
    out.extend_from_slice(encode::u32(UNIX, &mut encode::u32_buffer()));
    out.extend_from_slice(encode::usize(path.len(), &mut encode::usize_buffer()));
    out.extend_from_slice(path.as_bytes());
}

/// Parses the first component of `text`, which has no leading slash. Appends its binary form to `out`.
/// Returns the text after it, if any.
pub(super) fn parse_component<'a>(
    text: &'a str,
    out: &mut Vec<u8>,
) -> Result<Option<&'a str>, MultiaddrError> {
    let (name, after) = text
        .split_once('/')
        .map_or((text, None), |(n, rest)| (n, Some(rest)));
    if name == "unix" {
        let path = after.ok_or_else(|| MultiaddrError::MissingValue(name.into()))?;
        push_unix(out, &format!("/{path}"));
        return Ok(None);
    }
    let (value, after_value) = match after.map(|rest| rest.split_once('/').unwrap_or((rest, ""))) {
        Some((value, _)) => (
            Some(value),
            after.and_then(|rest| rest.get(value.len() + 1..)),
        ),
        None => (None, None),
    };
    let invalid = |value: &str, reason: String| MultiaddrError::InvalidValue {
        protocol: name.into(),
        value: value.into(),
        reason,
    };
    // The `multiaddr` crate reads only base58, but a peer id can also be a CID.
    let peer = match (name, value) {
        ("p2p" | "ipfs", Some(value)) => {
            let peer = value.parse::<PeerId>();
            Some(
                peer.map_err(|e: ParsePeerIdError| invalid(value, e.to_string()))?
                    .to_base58(),
            )
        }
        _ => None,
    };
    let mut taken = 0;
    let parts = [Some(name), peer.as_deref().or(value)]
        .into_iter()
        .flatten();
    let protocol = Protocol::from_str_parts(parts.inspect(|_| taken += 1));
    let protocol = protocol.map_err(|error| match (error, value) {
        (CrateError::UnknownProtocolString(name), _) => MultiaddrError::UnknownProtocol(name),
        (_, None) => MultiaddrError::MissingValue(name.into()),
        (CrateError::ParsingError(error), Some(value)) => invalid(value, error.to_string()),
        (error, Some(value)) => invalid(value, error.to_string()),
    })?;
    let start = out.len();
    let written = protocol.write_bytes(out);
    // Reads the component back, to refuse an empty or overlong value.
    if let Err(error) = written.map_err(|e| e.to_string()).and_then(|()| {
        read_component(&out[start..], start)
            .map_err(|error| error.to_string())
            .map(drop)
    }) {
        return Err(invalid(value.unwrap_or_default(), error));
    }
    Ok(if taken > 1 { after_value } else { after })
}
