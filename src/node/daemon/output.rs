//! Lines on stdout and stderr.
