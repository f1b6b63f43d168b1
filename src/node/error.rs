//! Errors of a node, in the words of the Go daemons.
