"""Tests of real hivemind swarms in real processes, on hivemind's own bindings or this package's.

    python -m pytest tests/hivemind_swarm --bindings=original
    python -m pytest tests/hivemind_swarm --bindings=ours

The same assertions hold for both. ``make test-hivemind`` creates the environment and runs both.
"""
