//! What it takes to start a libp2p daemon, without starting it.
