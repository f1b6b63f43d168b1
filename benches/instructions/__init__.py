"""The guard against slow growth: how many instructions the hot paths take, compared with what is
recorded in ``counts.json``.

Times are noisy, on a busy machine hopelessly so; valgrind counts the same instructions each time.
``run.py`` counts, of the protocol crate (``benches/protocol.rs``) and of Python programs
(``client.py``), which talk to a daemon in lockstep (``daemon.py``). ``callgrind.py`` starts them
under valgrind and reads what it found, ``record.py`` says what has grown.
"""
