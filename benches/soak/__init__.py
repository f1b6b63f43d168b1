"""Load and endurance tests: guarantees checked against real daemons over a long time.

``run.py`` runs the scenarios, one module each, in processes of their own. That process is the
caller: it starts the daemons and the peers (``peer.py``), which run the handlers. ``harness.py`` is
shared by the scenarios, ``meter.py`` measures a process, and ``payloads.py`` makes the data to
send."""
