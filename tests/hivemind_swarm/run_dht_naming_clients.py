"""Prints the module that defines hivemind's clients, and then runs hivemind's ``run_dht``."""

from __future__ import annotations

from hivemind.hivemind_cli import run_dht
from hivemind.p2p import p2p_daemon

if __name__ == "__main__":
    print("clients of", p2p_daemon.p2pclient.Client.__module__, flush=True)
    run_dht.main()
