"""Counts the instructions of the hot paths and compares them with the record in ``counts.json``.

Times are noisy, above all on a busy machine; valgrind counts the same instructions each time.
``run.py`` counts those of the protocol crate (``benches/protocol.rs``) and of a Python program
(``client.py``), which talks to a daemon in lockstep (``daemon.py``). ``callgrind.py`` runs both
under valgrind and parses its profiles; ``record.py`` compares the counts with the record.
"""
