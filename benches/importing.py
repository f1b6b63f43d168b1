"""Measures the import of a client in its own process: the modules that its users import.

Usage: importing.py KIND FOLDER, where FOLDER has the unpacked packages of the other clients.
"""

import sys
import time

from without_torch import load_hivemind

kind, folder = sys.argv[1:]
if kind == "p2pclient":
    sys.path.insert(0, folder)
elif kind != "ours":
    load_hivemind(folder)

wall, cpu = time.perf_counter(), time.process_time()
if kind == "ours":
    import p2pclient_rs
elif kind == "p2pclient":
    import p2pclient  # noqa: F401
else:
    if kind == "ours-as-hivemind":
        import p2pclient_rs

        p2pclient_rs.install(p2pclient=False)
    import hivemind.p2p.p2p_daemon_bindings.p2pclient  # noqa: F401
wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
print(wall, cpu)
