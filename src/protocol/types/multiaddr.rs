//! Multiaddrs in binary form, parsed on demand.
//!
//! The `multiaddr` crate reads all protocols except `/unix`, for which it accepts only one path segment.
//! Here, as in Go, the path of `/unix` is the rest of the address: `/unix/tmp/p2pd.sock` has the path
//! `/tmp/p2pd.sock`, stored with its leading slash.

pub(crate) mod component;
mod error;

pub use component::Component;
pub use error::MultiaddrError;

use bytes::Bytes;
use component::{parse_component, push_unix, read_component, UNIX};
use std::fmt;
use std::str::FromStr;
use unsigned_varint::encode;

/// A multiaddr in binary form. Addresses from a daemon are kept unchanged, even if they contain an
/// unknown protocol.
///
/// ```
/// use p2pd_protocol::Multiaddr;
///
/// let addr: Multiaddr = "/ip4/127.0.0.1/tcp/4001".parse()?;
/// assert_eq!(addr.as_bytes(), [4, 127, 0, 0, 1, 6, 0x0f, 0xa1]);
/// assert_eq!(addr.to_string(), "/ip4/127.0.0.1/tcp/4001");
/// # Ok::<(), p2pd_protocol::multiaddr::MultiaddrError>(())
/// ```
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Multiaddr(Bytes);

impl Multiaddr {
    /// Makes a multiaddr from any bytes; [`validate`](Self::validate) checks them.
    pub fn from_bytes(bytes: impl Into<Bytes>) -> Self {
        Self(bytes.into())
    }

    /// The binary form.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// The binary form, without a copy.
    pub fn to_bytes(&self) -> Bytes {
        self.0.clone()
    }

    /// Returns the protocols and their values, in order.
    ///
    /// # Errors
    /// A component is malformed, or its protocol is unknown.
    pub fn components(&self) -> Result<Vec<Component<'_>>, MultiaddrError> {
        self.walk().collect()
    }

    /// Returns the numbers and names of the protocols, in order.
    ///
    /// # Errors
    /// Those of [`components`](Self::components).
    pub fn protocols(&self) -> Result<Vec<(u32, &'static str)>, MultiaddrError> {
        self.walk()
            .map(|part| part.map(|part| (part.code, part.name)))
            .collect()
    }

    /// Checks that the bytes are a multiaddr. Bytes after an unknown protocol are not checked.
    ///
    /// # Errors
    /// The bytes are empty or malformed.
    pub fn validate(&self) -> Result<(), MultiaddrError> {
        if self.0.is_empty() {
            return Err(MultiaddrError::Empty);
        }
        match self.walk().find_map(Result::err) {
            None | Some(MultiaddrError::UnknownCode(_)) => Ok(()),
            Some(error) => Err(error),
        }
    }

    /// Makes the path of `/unix` absolute.
    ///
    /// py-multiaddr omits the leading slash, and a Go daemon would dial a path relative to its working
    /// directory.
    #[must_use]
    pub fn with_absolute_path(self) -> Self {
        let code = encode::u32(UNIX, &mut encode::u32_buffer()).to_vec();
        if !self.0.windows(code.len()).any(|window| window == code) {
            return self;
        }
        match self.components().as_deref() {
            Ok([before @ .., unix]) if unix.code == UNIX => {
                let start: usize = before.iter().map(|part| part.bytes.len()).sum();
                let mut bytes = self.0[..start].to_vec();
                push_unix(&mut bytes, unix.value.as_deref().unwrap_or_default());
                Self::from_bytes(bytes)
            }
            _ => self,
        }
    }

    /// Iterates over the components, up to the first error.
    pub(crate) fn walk(&self) -> impl Iterator<Item = Result<Component<'_>, MultiaddrError>> {
        let mut rest: &[u8] = &self.0;
        std::iter::from_fn(move || {
            if rest.is_empty() {
                return None;
            }
            let item = read_component(rest, self.0.len() - rest.len());
            rest = item.as_ref().map_or(&[], |part| &rest[part.bytes.len()..]);
            Some(item)
        })
    }
}

impl FromStr for Multiaddr {
    type Err = MultiaddrError;

    /// Parses the text form. As in Go, trailing slashes are ignored.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let trimmed = text.trim_end_matches('/');
        if trimmed.is_empty() {
            return Err(MultiaddrError::Empty);
        }
        let path = trimmed
            .strip_prefix('/')
            .ok_or(MultiaddrError::NoLeadingSlash)?;
        let mut bytes = Vec::with_capacity(text.len());
        let mut rest = Some(path);
        while let Some(text) = rest {
            rest = parse_component(text, &mut bytes)?;
        }
        Ok(Self::from_bytes(bytes))
    }
}

impl fmt::Display for Multiaddr {
    /// Writes the text form. From the first unknown or malformed component on, writes `/unknown/` and
    /// the remaining bytes in hexadecimal, which cannot be parsed back.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = 0;
        for part in self.walk() {
            match part {
                Ok(part) => {
                    shown += part.bytes.len();
                    write!(f, "{part}")?;
                }
                Err(_) => {
                    f.write_str("/unknown/")?;
                    for byte in &self.0[shown..] {
                        write!(f, "{byte:02x}")?;
                    }
                }
            }
        }
        Ok(())
    }
}

impl fmt::Debug for Multiaddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Multiaddr({self})")
    }
}

#[cfg(test)]
mod tests;
