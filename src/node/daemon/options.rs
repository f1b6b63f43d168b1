//! The daemon's settings, from its flags.

use super::flags::Flags;
use super::identity;
use crate::{Config, Security};
use libp2p::identity::Keypair;
use p2pd_protocol::{Multiaddr, PeerId};
use std::path::Path;
use std::time::Duration;

/// Peers to join the network through if `-b` is given without others: those of IPFS.
const IPFS_PEERS: &[&str] = &[
    "/dnsaddr/bootstrap.libp2p.io/p2p/QmNnooDu7bfjPFoTZYxMNLWUQJyrVwtbZg5gBMjTezGAJN",
    "/dnsaddr/bootstrap.libp2p.io/p2p/QmQCU2EcMqAqQPR2i9bChDtGNJchTbq5TbXJJ16u19uLTa",
    "/dnsaddr/bootstrap.libp2p.io/p2p/QmbLHAnMoJPWSCR5Zhtx6BHJX9KiKNN6tpvbUcqanj75Nb",
    "/dnsaddr/bootstrap.libp2p.io/p2p/QmcZf59bWwK5XFi76CZX8cbJ4BhTzzA3gU1ZjYZcYW3dwt",
    "/ip4/104.131.131.82/tcp/4001/p2p/QmaCpDMGvV2BGHeYERUEnRQAwe3N8SzbUtfsmvsqQLuvuJ",
];

/// The settings.
#[derive(Debug)]
pub(super) struct Options {
    /// Control address.
    pub(super) listen: Multiaddr,
    pub(super) is_quiet: bool,
    pub(super) node: Config,
    /// Peers to connect to before the daemon serves clients.
    pub(super) bootstrap: Option<Vec<BootstrapPeer>>,
    /// The peers were named by the user.
    pub(super) shows_bootstrap: bool,
    /// How long the daemon waits for its first persistent connection; it then ends with the last one.
    pub(super) idle_timeout: Option<Duration>,
}

/// A peer to connect to at the start.
#[derive(Debug, Clone)]
pub(super) struct BootstrapPeer {
    /// The text that names it.
    pub(super) text: String,
    pub(super) peer: PeerId,
    pub(super) addrs: Vec<Multiaddr>,
}

impl Options {
    /// Checks the flags. The error message is that of the Go daemons.
    pub(super) fn new(flags: &Flags) -> Result<Self, String> {
        let security: Vec<_> = [(Security::Tls, "tls"), (Security::Noise, "noise")]
            .into_iter()
            .filter_map(|(security, name)| flags.is(name).then_some(security))
            .collect();
        if security.is_empty() {
            return Err("at least one channel security protocol must be enabled".to_owned());
        }
        if flags.is("forceReachabilityPublic") && flags.is("forceReachabilityPrivate") {
            return Err("forceReachability must be public or private, not both".to_owned());
        }
        let keypair = match flags.text("id") {
            "" => Keypair::generate_ed25519(),
            path => identity::read(Path::new(path))?,
        };
        let listen = parse(flags.text("listen"))?;
        let mut node = Config::new(keypair);
        node.security = security;
        if !flags.is("noListenAddrs") {
            node.listen = addresses(flags.text("hostAddrs"))?;
        }
        node.announce = addresses(flags.text("announceAddrs"))?;
        if let Ok(size @ 1..) = usize::try_from(flags.number("persistentConnMaxMsgSize")) {
            node.max_message = size;
        }
        let named: Vec<_> = list(flags.text("bootstrapPeers")).collect();
        let shows_bootstrap = flags.is("b") && !named.is_empty();
        let bootstrap = match (flags.is("b"), named.is_empty()) {
            (false, _) => None,
            (true, true) => Some(IPFS_PEERS.to_vec()),
            (true, false) => Some(named),
        };
        let bootstrap = bootstrap
            .map(|texts| texts.into_iter().map(BootstrapPeer::parse).collect())
            .transpose()?;
        let idle = u64::try_from(flags.number("idleTimeout")).unwrap_or(0);
        Ok(Self {
            listen,
            is_quiet: flags.is("q"),
            node,
            bootstrap,
            shows_bootstrap,
            idle_timeout: (idle > 0).then(|| Duration::from_nanos(idle)),
        })
    }
}

impl BootstrapPeer {
    fn parse(text: &str) -> Result<Self, String> {
        let whole = parse(text)?;
        let invalid = || "invalid p2p multiaddr".to_owned();
        let parts = whole.components().map_err(|_| invalid())?;
        let Some((last, before)) = parts.split_last().filter(|(last, _)| last.name == "p2p") else {
            return Err(invalid());
        };
        let peer = last.value.as_deref().and_then(|peer| peer.parse().ok());
        let addr: Vec<u8> = before.iter().flat_map(|part| part.bytes).copied().collect();
        let addrs = (!addr.is_empty()).then(|| Multiaddr::from_bytes(addr));
        Ok(Self {
            text: text.to_owned(),
            peer: peer.ok_or_else(invalid)?,
            addrs: addrs.into_iter().collect(),
        })
    }
}

fn list(text: &str) -> impl Iterator<Item = &str> {
    text.split(',').filter(|part| !part.is_empty())
}

fn parse(text: &str) -> Result<Multiaddr, String> {
    text.parse().map_err(|error| {
        let why = match text.starts_with('/') {
            true => format!("{error}"),
            false => "must begin with /".to_owned(),
        };
        format!("failed to parse multiaddr {text:?}: {why}")
    })
}

fn addresses(text: &str) -> Result<Vec<libp2p::Multiaddr>, String> {
    let parsed = list(text).map(|text| {
        let addr = parse(text)?;
        libp2p::Multiaddr::try_from(addr.as_bytes().to_vec())
            .map_err(|error| format!("failed to parse multiaddr {text:?}: {error}"))
    });
    parsed.collect()
}
