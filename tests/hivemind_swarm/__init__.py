"""Swarms of real hivemind in real processes, with its own bindings or with this package's.

    python -m pytest tests/hivemind_swarm --swap=off
    python -m pytest tests/hivemind_swarm --swap=on

The same assertions hold for both. ``make test-hivemind`` makes the environment and runs both.
"""
