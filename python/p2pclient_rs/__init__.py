from p2pclient_rs._native import __version__
