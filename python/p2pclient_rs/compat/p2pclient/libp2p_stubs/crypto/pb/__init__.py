"""Keys as they are serialised."""
