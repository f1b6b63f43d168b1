"""Swarms of real hivemind in real processes, on its own bindings or on this package's.

    python -m pytest tests/hivemind_swarm --bindings=original
    python -m pytest tests/hivemind_swarm --bindings=ours

The same assertions hold for both. ``make test-hivemind`` makes the environment and runs both.
"""
