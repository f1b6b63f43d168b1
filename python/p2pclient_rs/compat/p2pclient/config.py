"""Where a client finds the daemon, and listens, unless told otherwise. Read when one is made."""

control_maddr_str = "/unix/tmp/p2pd.sock"
listen_maddr_str = "/unix/tmp/p2pclient.sock"
