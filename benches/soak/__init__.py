"""Load and endurance: what is promised, held against real daemons for as long as it takes.

``run.py`` runs the scenarios, a module each, every one in a process of its own: that process is
the caller. It starts the daemons, and the peers (``peer.py``), whose handlers are at the other
end. ``harness.py`` has what they share, ``meter.py`` what is measured of a process, and
``payloads.py`` what is sent.
"""
