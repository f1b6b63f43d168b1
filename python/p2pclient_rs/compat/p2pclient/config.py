"""Default addresses of the daemon and of the listener, read each time a client is made."""

control_maddr_str = "/unix/tmp/p2pd.sock"
listen_maddr_str = "/unix/tmp/p2pclient.sock"
