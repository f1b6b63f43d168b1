"""Counts the instructions of the hot paths and compares them with the record in ``counts.json``.

Times are noisy, especially on a busy machine, while valgrind counts the same number of instructions
each time. ``run.py`` counts the instructions of the protocol crate (``benches/protocol.rs``) and of
a Python program (``client.py``) that talks to a daemon in lockstep (``daemon.py``).
``callgrind.py`` runs both under valgrind and parses its profiles. ``record.py`` compares the counts
with the record.
"""
