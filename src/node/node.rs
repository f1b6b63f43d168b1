//! Starts a node, and drives its swarm.
