//! Identify and identify-push.
