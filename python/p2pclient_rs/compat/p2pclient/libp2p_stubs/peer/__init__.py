"""Peer ids, and peers with their addresses."""
