"""The few parts of py-libp2p that p2pclient includes."""
