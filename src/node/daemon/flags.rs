//! The command line, in the syntax of Go's flag package.
