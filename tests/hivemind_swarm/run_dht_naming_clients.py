"""hivemind's command ``run_dht``, which first prints the module that defines its clients."""

from __future__ import annotations

from hivemind.hivemind_cli import run_dht
from hivemind.p2p import p2p_daemon

if __name__ == "__main__":
    print("clients of", p2p_daemon.p2pclient.Client.__module__, flush=True)
    run_dht.main()
