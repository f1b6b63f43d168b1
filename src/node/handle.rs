//! What a front end can ask of a node: one method per request.
