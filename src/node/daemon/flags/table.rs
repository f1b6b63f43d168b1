//! The flags of both Go daemons: their kinds, defaults and explanations.

use super::value::{Kind, Value};
use Kind::{Bool, Duration, Int, Text, Uint};
use Support::{Full, Ignored, Missing};

/// Whether this daemon does what a flag requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Support {
    Full,
    /// It has no effect in the Go daemons either.
    Ignored,
    /// This daemon lacks the feature.
    Missing(&'static str),
}

/// A flag.
pub(super) struct Flag {
    pub(super) name: &'static str,
    pub(super) kind: Kind,
    /// Its default as text; empty for false, 0 or no text.
    pub(super) default: &'static str,
    pub(super) support: Support,
    pub(super) usage: &'static str,
}

impl Flag {
    /// Its default value.
    pub(super) fn default_value(&self) -> Value {
        let text = match (self.kind, self.default) {
            (Bool, "") => "false",
            (Int | Uint | Duration, "") => "0",
            (_, text) => text,
        };
        Value::parse(self.kind, text).expect("a test checks the defaults")
    }
}

const fn flag(
    name: &'static str,
    kind: Kind,
    default: &'static str,
    support: Support,
    usage: &'static str,
) -> Flag {
    Flag {
        name,
        kind,
        default,
        support,
        usage,
    }
}

/// All flags, in the order of the usage text.
#[rustfmt::skip]
pub(super) const FLAGS: &[Flag] = &[
    flag("announceAddrs", Text, "", Full,
        "comma separated list of multiaddrs the host should announce to the network"),
    flag("autoRelay", Bool, "", Missing("relay client"),
        "Enables autorelay"),
    flag("autonat", Bool, "", Missing("AutoNAT service"),
        "Enables the AutoNAT service"),
    flag("b", Bool, "", Full,
        "connects to bootstrap peers and bootstraps the dht if enabled"),
    flag("bootstrapPeers", Text, "", Full,
        "comma separated list of bootstrap peers; defaults to the IPFS DHT peers"),
    flag("connGrace", Duration, "2m0s", Missing("connection manager"),
        "Connection Manager grace period"),
    flag("connHi", Int, "512", Missing("connection manager"),
        "Connection Manager High Water mark"),
    flag("connLo", Int, "256", Missing("connection manager"),
        "Connection Manager Low Water mark"),
    flag("connManager", Bool, "", Missing("connection manager"),
        "Enables the Connection Manager"),
    flag("dht", Bool, "", Missing("DHT"),
        "Enables the DHT in full node mode"),
    flag("dhtClient", Bool, "", Missing("DHT"),
        "Enables the DHT in client mode"),
    flag("dhtServer", Bool, "", Missing("DHT"),
        "Enables the DHT in server mode (use 'dht' unless you actually need this)"),
    flag("echo", Bool, "", Missing("echo protocol"),
        "Enables echo protocol"),
    flag("f", Text, "", Missing("configuration file"),
        "a file from which to read a json representation of the daemon config"),
    flag("forceReachabilityPrivate", Bool, "", Missing("AutoNAT client"),
        "Set up ForceReachability as private for autonat"),
    flag("forceReachabilityPublic", Bool, "", Missing("AutoNAT client"),
        "Set up ForceReachability as public for autonat"),
    flag("gossipsubHeartbeatInitialDelay", Duration, "", Missing("pubsub"),
        "Specifies the gossipsub initial heartbeat delay"),
    flag("gossipsubHeartbeatInterval", Duration, "", Missing("pubsub"),
        "Specifies the gossipsub heartbeat interval"),
    flag("hostAddrs", Text, "", Full,
        "comma separated list of multiaddrs the host should listen on"),
    flag("i", Bool, "", Missing("configuration file"),
        "have the daemon read the json config from stdin"),
    flag("id", Text, "", Full,
        "peer identity; private key file"),
    flag("idleTimeout", Duration, "", Full,
        "Kills the daemon if no client opens a persistent connection in this time; 0 disables it. It then also ends with the last persistent connection"),
    flag("listen", Text, "/unix/tmp/p2pd.sock", Full,
        "daemon control listen multiaddr"),
    flag("metricsAddr", Text, "", Missing("metrics"),
        "an address to bind the metrics handler to"),
    flag("muxer", Text, "yamux", Missing("multiplexer other than yamux"),
        "muxer to use for connections"),
    flag("natPortMap", Bool, "", Missing("port mapping"),
        "Enables NAT port mapping"),
    flag("noListenAddrs", Bool, "", Full,
        "sets the host to listen on no addresses"),
    flag("noise", Bool, "true", Full,
        "Enables Noise channel security protocol"),
    flag("persistentConnMaxMsgSize", Int, "4194304", Full,
        "Max size for persistent connection messages (bytes)"),
    flag("plaintext", Bool, "", Missing("plaintext connections"),
        "Enables Plaintext channel security protocol"),
    flag("pprof", Bool, "", Missing("Go profiler"),
        "Enables the HTTP pprof handler, listening on the first port available in the range [6060-7800], or on the user-provided port via -pprofPort"),
    flag("pprofPort", Uint, "", Missing("Go profiler"),
        "Binds the HTTP pprof handler to a specific port; has no effect unless the pprof option is enabled"),
    flag("pubsub", Bool, "", Missing("pubsub"),
        "Enables pubsub"),
    flag("pubsubRouter", Text, "gossipsub", Missing("pubsub"),
        "Specifies the pubsub router implementation"),
    flag("pubsubSign", Bool, "true", Missing("pubsub"),
        "Enables pubsub message signing"),
    flag("pubsubSignStrict", Bool, "true", Missing("pubsub"),
        "Enables or disables pubsub strict signature verification"),
    flag("q", Bool, "", Full,
        "be quiet"),
    flag("quic", Bool, "true", Ignored,
        "Enables the QUIC transport (deprecated, always enabled now)"),
    flag("relay", Bool, "", Missing("relay"),
        "Enables circuit relay"),
    flag("relayActive", Bool, "", Ignored,
        "Enables active mode for relay (deprecated, has no effect, use -relayService=1 instead)"),
    flag("relayBufferSize", Int, "16777216", Missing("relay"),
        "size (in bytes) of the relayed connection buffers if -relayService=1"),
    flag("relayDataLimit", Int, "4294967296", Missing("relay"),
        "maximum data bytes relayed (in each direction) before resetting connection if -relayService=1"),
    flag("relayDiscovery", Bool, "true", Missing("relay client"),
        "Discover potential relays in background if -autoRelay=1"),
    flag("relayHop", Bool, "", Ignored,
        "Enables hop for relay (deprecated, has no effect)"),
    flag("relayHopLimit", Int, "", Ignored,
        "Sets the hop limit for hop relays (deprecated, has no effect)"),
    flag("relayMaxCircuits", Int, "16", Missing("relay"),
        "maximum number of open relay connections for each peer if -relayService=1"),
    flag("relayMaxReservations", Int, "128", Missing("relay"),
        "maximum number of reserved relay slots for each peer if -relayService=1"),
    flag("relayService", Bool, "", Missing("relay"),
        "Configures this node to serve as a relay for others if -relayEnabled=1"),
    flag("relayTimeLimit", Duration, "30m0s", Missing("relay"),
        "maximum duration of a single active relayed connection if -relayService=1"),
    flag("tls", Bool, "true", Full,
        "Enables TLS1.3 channel security protocol"),
    flag("trustedRelays", Text, "", Missing("relay client"),
        "comma separated list of multiaddrs for static circuit relay peers; by default, use bootstrap peers as trusted relays"),
];
