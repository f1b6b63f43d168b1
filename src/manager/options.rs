//! A daemon's options, and the command-line arguments they become.
//!
//! An option that is not set is not passed, so an older daemon does not get a flag it lacks.

use p2pd_protocol::endpoint::EndpointError;
use p2pd_protocol::multiaddr::MultiaddrError;
use p2pd_protocol::{Multiaddr, PeerId};
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The implementation of the daemon, which determines its flags.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Flavour {
    /// `p2pd`: upstream's, hivemind's fork, and others with the same flags.
    #[default]
    Go,
    /// `jsp2pd`, of the npm package `libp2p-daemon`.
    Js,
}

impl Flavour {
    /// Derives the flavour from the binary's file name.
    pub fn of(binary: &Path) -> Self {
        let name = binary.file_name().unwrap_or(OsStr::new(""));
        if name.to_string_lossy().starts_with("jsp2pd") {
            Flavour::Js
        } else {
            Flavour::Go
        }
    }
}

/// The daemon's role in the DHT. Converts from a bool: true is [`Auto`](Dht::Auto).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Dht {
    /// No DHT.
    #[default]
    Off,
    /// A client, which becomes a server once the daemon finds that it is publicly reachable. That
    /// never happens on loopback: daemons on one machine need [`Dht::Server`].
    Auto,
    /// Queries the DHT and stores nothing for others.
    Client,
    /// Stores records for others from the start.
    Server,
}

impl From<bool> for Dht {
    fn from(on: bool) -> Self {
        if on {
            Dht::Auto
        } else {
            Dht::Off
        }
    }
}

/// Pubsub, and its router.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Pubsub {
    /// No pubsub.
    #[default]
    Off,
    /// With the daemon's default router, which is gossipsub.
    On,
    /// With gossipsub.
    Gossipsub,
    /// With floodsub.
    Floodsub,
}

impl From<bool> for Pubsub {
    fn from(on: bool) -> Self {
        if on {
            Pubsub::On
        } else {
            Pubsub::Off
        }
    }
}

/// The connection manager, which closes connections when there are too many. Converts from a bool:
/// true is [`Default`](ConnectionManager::Default).
#[derive(Debug, Clone, Copy, PartialEq, Default)]
#[non_exhaustive]
pub enum ConnectionManager {
    /// No connection manager.
    #[default]
    Off,
    /// With the daemon's default limits.
    Default,
    /// With these limits.
    Limits {
        /// The number of connections that trimming leaves.
        low: u32,
        /// The number of connections above which it trims.
        high: u32,
        /// The age below which a connection is kept. `jsp2pd` has no such option.
        grace: Duration,
    },
}

impl From<bool> for ConnectionManager {
    fn from(on: bool) -> Self {
        if on {
            ConnectionManager::Default
        } else {
            ConnectionManager::Off
        }
    }
}

/// Who connects to the bootstrap peers, and when.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Bootstrap {
    /// The daemon, before it is ready. With Go's daemon, one of them must be reachable.
    #[default]
    Required,
    /// The supervisor, once the daemon is ready, with backoff. None of them need be reachable.
    Background,
}

/// A peer to join the network through, parsed from a multiaddr that ends in `/p2p/<peer id>`.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct BootstrapPeer {
    /// Its peer id.
    pub peer_id: PeerId,
    /// Its addresses; empty if the daemon has to find them.
    pub addrs: Vec<Multiaddr>,
}

impl BootstrapPeer {
    /// Parses the multiaddr.
    ///
    /// # Errors
    /// The address is invalid; the error says why.
    pub fn parse(address: &str) -> Result<Self, OptionsError> {
        let malformed = |error: MultiaddrError| OptionsError::BootstrapPeer {
            address: address.into(),
            reason: error.to_string(),
        };
        let whole: Multiaddr = address.parse().map_err(malformed)?;
        let parts = whole.components().map_err(malformed)?;
        let (peer_id, before) = match parts.as_slice() {
            [before @ .., last] if last.name == "p2p" => (last.value.as_deref(), before),
            parts => (None, parts),
        };
        let peer_id = peer_id.and_then(|text| text.parse().ok());
        let Some(peer_id) = peer_id else {
            return Err(OptionsError::BootstrapPeer {
                address: address.into(),
                reason: "it does not end in /p2p/<peer id>".into(),
            });
        };
        let addr: Vec<u8> = before.iter().flat_map(|part| part.bytes).copied().collect();
        let addrs = (!addr.is_empty()).then(|| Multiaddr::from_bytes(addr));
        Ok(BootstrapPeer {
            peer_id,
            addrs: addrs.into_iter().collect(),
        })
    }
}

/// The options of a daemon.
///
/// ```
/// use p2pd_manager::{DaemonOptions, Dht};
///
/// let mut options = DaemonOptions::default();
/// options.dht = Dht::Server;
/// options.pubsub = true.into();
/// assert_eq!(options.arguments()?, ["-dhtServer", "-pubsub"]);
/// # Ok::<(), p2pd_manager::OptionsError>(())
/// ```
#[derive(Debug, Clone, PartialEq, Default)]
#[non_exhaustive]
pub struct DaemonOptions {
    /// The daemon's implementation.
    pub flavour: Flavour,
    /// The address at which to serve the control protocol, a unix or TCP multiaddr.
    /// Without one, [`Process`](super::process::Process) chooses a private socket. It replaces TCP
    /// port 0 by an unused port. (A daemon's own default is `/unix/tmp/p2pd.sock`.)
    pub control: Option<Multiaddr>,
    /// A file with a private key in libp2p's protobuf encoding. None means a new identity.
    pub identity: Option<PathBuf>,
    /// The multiaddrs to listen on for peers. If empty, daemons listen on *every* interface.
    pub host_addrs: Vec<String>,
    /// The multiaddrs to announce to peers instead of those listened on.
    pub announce_addrs: Vec<String>,
    /// Peers to connect to at the start, each a multiaddr that ends in `/p2p/<peer id>`. If empty,
    /// the daemon connects to no peer, not even to its built-in list of IPFS peers.
    pub bootstrap_peers: Vec<String>,
    /// Who connects to them, and when.
    pub bootstrap: Bootstrap,
    /// The DHT.
    pub dht: Dht,
    /// Circuit relay. None means the daemon's default.
    pub relay: Option<bool>,
    /// Pubsub.
    pub pubsub: Pubsub,
    /// The connection manager.
    pub connection_manager: ConnectionManager,
    /// Further arguments, passed unchanged after all others.
    pub extra_args: Vec<String>,
    /// The number of quick deaths in a row after which the supervisor gives up. With 0, the daemon
    /// is never restarted. A restarted daemon keeps its TCP ports and its identity (a temporary one
    /// if there is no file).
    pub restart: u32,
}

/// Options that are invalid, or that the daemon does not support.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum OptionsError {
    /// The control address is invalid.
    #[error(transparent)]
    Control(#[from] EndpointError),
    /// Daemons take lists separated by commas, so a comma would split the address.
    #[error("an address of {option} is empty or has a comma in it: {address:?}")]
    Address {
        /// The field that contains it.
        option: &'static str,
        /// The address.
        address: String,
    },
    /// The address of a bootstrap peer is invalid.
    #[error("invalid bootstrap peer {address:?}: {reason}")]
    BootstrapPeer {
        /// Its address.
        address: String,
        /// Why it is invalid.
        reason: String,
    },
    /// The low water mark is above the high one.
    #[error(
        "the connection manager's low water mark ({low}) is over its high water mark ({high})"
    )]
    WaterMarks {
        /// The low water mark.
        low: u32,
        /// The high water mark.
        high: u32,
    },
    /// An extra argument would move the control socket, and the client would not find it.
    #[error("the extra argument {0:?} sets the control address; use the option for that")]
    ControlInExtraArgs(String),
    /// The path cannot be passed on the command line.
    #[error("the path of the identity file is not UTF-8: {0:?}")]
    Identity(PathBuf),
    /// `jsp2pd` has no flag for this option.
    #[error("jsp2pd has no option for {0}")]
    NotInJs(&'static str),
    /// `jsp2pd` would silently ignore this extra argument.
    #[error("jsp2pd has no option {0}")]
    UnknownToJs(String),
}

impl DaemonOptions {
    /// Checks the options as far as possible without knowing the daemon.
    ///
    /// # Errors
    /// An option is invalid; the error names it.
    pub fn validate(&self) -> Result<(), OptionsError> {
        if let Some(control) = &self.control {
            control.endpoint()?;
        }
        for (option, addresses) in [
            ("host_addrs", &self.host_addrs),
            ("announce_addrs", &self.announce_addrs),
            ("bootstrap_peers", &self.bootstrap_peers),
        ] {
            let wrong = |address: &&String| address.is_empty() || address.contains(',');
            if let Some(address) = addresses.iter().find(wrong) {
                let address = address.clone();
                return Err(OptionsError::Address { option, address });
            }
        }
        for address in &self.bootstrap_peers {
            BootstrapPeer::parse(address)?;
        }
        if let ConnectionManager::Limits { low, high, .. } = self.connection_manager {
            if low > high {
                return Err(OptionsError::WaterMarks { low, high });
            }
        }
        if let Some(path) = self
            .identity
            .as_ref()
            .filter(|path| path.to_str().is_none())
        {
            return Err(OptionsError::Identity(path.clone()));
        }
        let sets_control = |arg: &&String| {
            let flag = arg.trim_start_matches('-');
            arg.starts_with('-') && (flag == "listen" || flag.starts_with("listen="))
        };
        match self.extra_args.iter().find(sets_control) {
            Some(arg) => Err(OptionsError::ControlInExtraArgs(arg.clone())),
            None => Ok(()),
        }
    }

    /// Returns the arguments for the daemon, without the binary.
    ///
    /// # Errors
    /// As for [`validate`](Self::validate), or this flavour does not support an option.
    pub fn arguments(&self) -> Result<Vec<String>, OptionsError> {
        self.validate()?;
        let mut arguments = match self.flavour {
            Flavour::Go => self.go_arguments(),
            Flavour::Js => self.js_arguments()?,
        };
        arguments.extend(self.extra_args.iter().cloned());
        Ok(arguments)
    }

    /// The peers that the daemon itself connects to.
    #[doc(hidden)]
    pub fn required_peers(&self) -> &[String] {
        match self.bootstrap {
            Bootstrap::Required => &self.bootstrap_peers,
            Bootstrap::Background => &[],
        }
    }

    /// The flags that both flavours share, except for the number of dashes.
    fn common_arguments(&self, dashes: &str) -> Vec<String> {
        let identity = self
            .identity
            .as_ref()
            .map(|path| path.display().to_string());
        let list = |addresses: &[String]| (!addresses.is_empty()).then(|| addresses.join(","));
        [
            ("listen", self.control.as_ref().map(Multiaddr::to_string)),
            ("id", identity),
            ("hostAddrs", list(&self.host_addrs)),
            ("announceAddrs", list(&self.announce_addrs)),
            ("bootstrapPeers", list(self.required_peers())),
        ]
        .into_iter()
        .filter_map(|(flag, value)| Some(format!("{dashes}{flag}={}", value?)))
        .collect()
    }

    fn go_arguments(&self) -> Vec<String> {
        let mut arguments = self.common_arguments("-");
        // Without `-b` the daemon ignores the list; `-b` without a list means the IPFS peers.
        if !self.required_peers().is_empty() {
            arguments.push("-b".into());
        }
        match self.dht {
            Dht::Off => {}
            Dht::Auto => arguments.push("-dht".into()),
            Dht::Client => arguments.push("-dhtClient".into()),
            Dht::Server => arguments.push("-dhtServer".into()),
        }
        if let Some(relay) = self.relay {
            arguments.push(format!("-relay={relay}"));
        }
        if self.pubsub != Pubsub::Off {
            arguments.push("-pubsub".into());
            arguments.extend(self.pubsub.router("-"));
        }
        if self.connection_manager != ConnectionManager::Off {
            arguments.push("-connManager".into());
        }
        if let ConnectionManager::Limits { low, high, grace } = self.connection_manager {
            arguments.push(format!("-connLo={low}"));
            arguments.push(format!("-connHi={high}"));
            // A Go duration needs a unit.
            arguments.push(format!("-connGrace={}s", grace.as_secs_f64()));
        }
        arguments
    }

    fn js_arguments(&self) -> Result<Vec<String>, OptionsError> {
        // Go's daemons exit on an unknown flag by themselves.
        if let Some(flag) = self.extra_args.iter().find_map(|arg| unknown_to_js(arg)) {
            return Err(OptionsError::UnknownToJs(flag.into()));
        }
        let mut arguments = self.common_arguments("--");
        if !self.required_peers().is_empty() {
            arguments.push("--bootstrap=true".into());
        }
        match self.dht {
            Dht::Off => {}
            Dht::Client => return Err(OptionsError::NotInJs("a DHT client (-dhtClient)")),
            Dht::Auto | Dht::Server => arguments.push("--dht=true".into()),
        }
        // Its relay is always on.
        if self.relay == Some(false) {
            return Err(OptionsError::NotInJs(
                "switching the relay off (-relay=false)",
            ));
        }
        if self.pubsub != Pubsub::Off {
            arguments.push("--pubsub=true".into());
            arguments.extend(self.pubsub.router("--"));
        }
        if self.connection_manager != ConnectionManager::Off {
            arguments.push("--connMgr=true".into());
        }
        if let ConnectionManager::Limits { low, high, .. } = self.connection_manager {
            arguments.push(format!("--connMgrLo={low}"));
            arguments.push(format!("--connMgrHi={high}"));
        }
        Ok(arguments)
    }
}

/// Returns the flag of an argument if jsp2pd does not know it.
fn unknown_to_js(arg: &str) -> Option<&str> {
    let flag = arg.split('=').next().filter(|flag| flag.starts_with('-'))?;
    let known = match flag.strip_prefix("--") {
        Some("") => true,
        Some(name) => JS_OPTIONS.contains(&name.strip_prefix("no-").unwrap_or(name)),
        None => flag[1..].chars().all(|letter| "bq".contains(letter)),
    };
    (!known).then_some(flag)
}

/// The names of jsp2pd's options.
const JS_OPTIONS: &[&str] = &[
    "announceAddrs",
    "bootstrap",
    "bootstrapPeers",
    "connMgr",
    "connMgrHi",
    "connMgrLo",
    "dht",
    "dhtClient",
    "help",
    "hostAddrs",
    "id",
    "nat",
    "pubsub",
    "pubsubRouter",
    "quiet",
    "version",
];

impl Pubsub {
    fn router(self, dashes: &str) -> Option<String> {
        let name = match self {
            Pubsub::Off | Pubsub::On => return None,
            Pubsub::Gossipsub => "gossipsub",
            Pubsub::Floodsub => "floodsub",
        };
        Some(format!("{dashes}pubsubRouter={name}"))
    }
}

#[cfg(test)]
mod tests;
