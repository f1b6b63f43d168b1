//! The requests of a node's handles to the task that drives its swarm.

use libp2p::swarm::dial_opts::DialOpts;
use libp2p::swarm::DialError;
use tokio::sync::oneshot;

/// A request to the swarm.
pub(crate) enum Command {
    Dial {
        opts: DialOpts,
        result: oneshot::Sender<Result<(), DialError>>,
    },
    Shutdown,
}
