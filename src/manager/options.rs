//! A daemon's options, and the command-line arguments they make.
//!
//! An option that is not set is not passed, so that an older daemon is not given a flag it lacks.

use p2pd_protocol::endpoint::EndpointError;
use p2pd_protocol::multiaddr::MultiaddrError;
use p2pd_protocol::{Multiaddr, PeerId};
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Whose daemon it is: they spell their flags differently.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Flavour {
    /// `p2pd`: upstream's, hivemind's fork, and those that copy their flags.
    #[default]
    Go,
    /// `jsp2pd`, of the npm package `libp2p-daemon`.
    Js,
}

impl Flavour {
    /// Tells the flavour from the binary's file name.
    pub fn of(binary: &Path) -> Self {
        let name = binary.file_name().unwrap_or(OsStr::new(""));
        if name.to_string_lossy().starts_with("jsp2pd") {
            Flavour::Js
        } else {
            Flavour::Go
        }
    }
}

/// The part the daemon plays in the DHT. Out of a bool: true is [`Auto`](Dht::Auto).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Dht {
    /// None.
    #[default]
    Off,
    /// A client, and a server too once the daemon finds that it is publicly reachable. On
    /// loopback that never happens: daemons on one machine need [`Dht::Server`].
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
    /// None.
    #[default]
    Off,
    /// With the router of the daemon's own choice, which for today's daemons is gossipsub.
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

/// The connection manager, which closes connections when there are too many. Out of a bool: true
/// is [`Default`](ConnectionManager::Default).
#[derive(Debug, Clone, Copy, PartialEq, Default)]
#[non_exhaustive]
pub enum ConnectionManager {
    /// None.
    #[default]
    Off,
    /// With the daemon's own limits.
    Default,
    /// With these limits.
    Limits {
        /// The number of connections it trims down to.
        low: u32,
        /// The number of connections that makes it trim.
        high: u32,
        /// The age up to which a connection is spared. `jsp2pd` has no such option.
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

/// When the bootstrap peers are connected to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Bootstrap {
    /// By the daemon, before it counts as started. One of them must be reachable (Go).
    #[default]
    Required,
    /// By CONNECT requests once the daemon has started, again and again until they are connected,
    /// and again when they no longer are. None of them need be reachable.
    Background,
}

/// A peer to join others through: what a multiaddr that ends in `/p2p/<peer id>` says.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct BootstrapPeer {
    /// Who it is.
    pub peer_id: PeerId,
    /// Where it is; nothing if that is for the daemon to find out.
    pub addrs: Vec<Multiaddr>,
}

impl BootstrapPeer {
    /// Takes the multiaddr apart.
    ///
    /// # Errors
    /// Says what is wrong with it.
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

/// Everything a daemon can be told when it is started.
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
    /// Whose daemon the arguments are for.
    pub flavour: Flavour,
    /// Where to serve the control protocol: a unix or TCP multiaddr. With none, a daemon takes
    /// `/unix/tmp/p2pd.sock`; [`Process`](super::process::Process) gives it a private socket, and
    /// in place of TCP port 0 a free one.
    pub control: Option<Multiaddr>,
    /// A file with a private key in libp2p's protobuf encoding; a new identity if none.
    pub identity: Option<PathBuf>,
    /// The multiaddrs to listen on for peers. With none, daemons listen on *every* interface.
    pub host_addrs: Vec<String>,
    /// The multiaddrs to tell peers instead of those listened on.
    pub announce_addrs: Vec<String>,
    /// Peers to connect to at the start, each a multiaddr that ends in `/p2p/<peer id>`. With
    /// none, the daemon connects to nobody, its built-in list of IPFS peers included.
    pub bootstrap_peers: Vec<String>,
    /// When they are connected to.
    pub bootstrap: Bootstrap,
    /// The DHT.
    pub dht: Dht,
    /// Circuit relay; the daemon's own default if none.
    pub relay: Option<bool>,
    /// Pubsub.
    pub pubsub: Pubsub,
    /// The connection manager.
    pub connection_manager: ConnectionManager,
    /// Arguments to pass as they are, after all others.
    pub extra_args: Vec<String>,
    /// After how many quick deaths in a row a daemon that is started again is given up; with 0, it
    /// is not started again. If it may be, it has the same identity each time, with no file a
    /// temporary one, and a free TCP port in place of port 0 of `host_addrs`.
    pub restart: u32,
}

/// Options that no arguments can be made of.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum OptionsError {
    /// A control address that is none.
    #[error(transparent)]
    Control(#[from] EndpointError),
    /// Daemons take lists separated by commas, so a comma would make two addresses of one.
    #[error("an address of {option} is empty or has a comma in it: {address:?}")]
    Address {
        /// The field it is in.
        option: &'static str,
        /// The address.
        address: String,
    },
    /// A bootstrap peer that no daemon could connect to.
    #[error("the bootstrap peer {address:?} cannot be one: {reason}")]
    BootstrapPeer {
        /// Its address.
        address: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A connection manager that could never be satisfied.
    #[error(
        "the connection manager's low water mark ({low}) is over its high water mark ({high})"
    )]
    WaterMarks {
        /// The low water mark.
        low: u32,
        /// The high water mark.
        high: u32,
    },
    /// An extra argument that would move the control socket from where the client looks for it.
    #[error("the extra argument {0:?} sets the control address; use the option for that")]
    ControlInExtraArgs(String),
    /// A path that the command line could not name.
    #[error("the path of the identity file is not UTF-8: {0:?}")]
    Identity(PathBuf),
    /// Something that this flavour of daemon has no flag for.
    #[error("jsp2pd has no option for {0}")]
    NotInJs(&'static str),
    /// An extra argument that jsp2pd would ignore without a word.
    #[error("jsp2pd has no option {0}")]
    UnknownToJs(String),
}

impl DaemonOptions {
    /// Checks what can be checked without knowing which daemon it will be.
    ///
    /// # Errors
    /// Says which option is wrong.
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

    /// The arguments to start the daemon with, without the binary itself.
    ///
    /// # Errors
    /// As [`validate`](Self::validate), and for what this flavour of daemon has no flag for.
    pub fn arguments(&self) -> Result<Vec<String>, OptionsError> {
        self.validate()?;
        let mut arguments = match self.flavour {
            Flavour::Go => self.go_arguments(),
            Flavour::Js => self.js_arguments()?,
        };
        arguments.extend(self.extra_args.iter().cloned());
        Ok(arguments)
    }

    /// The peers that the daemon itself is to connect to.
    #[doc(hidden)]
    pub fn required_peers(&self) -> &[String] {
        match self.bootstrap {
            Bootstrap::Required => &self.bootstrap_peers,
            Bootstrap::Background => &[],
        }
    }

    /// The flags that both flavours have, but for the number of dashes.
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
        // Without `-b` the list would be ignored; `-b` without a list would mean the IPFS peers.
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
            // A Go duration: a bare number is refused.
            arguments.push(format!("-connGrace={}s", grace.as_secs_f64()));
        }
        arguments
    }

    fn js_arguments(&self) -> Result<Vec<String>, OptionsError> {
        // Go's daemons end when they are given a flag they do not know.
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

/// The flag of an argument, if it is one that jsp2pd does not know.
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
