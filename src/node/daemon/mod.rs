//! The program p2pd-rs: command line, output, life cycle.

mod flags;
mod identity;
mod output;
