"""The guard against slow growth: how many instructions the hot paths take, compared with what is
recorded in ``counts.json``.

Times are noisy, on a busy machine hopelessly so; valgrind counts the same instructions each time.
``run.py`` counts, of the core (``benches/core.rs``) and of Python programs (``client.py``), which
talk to a daemon in lockstep (``daemon.py``). ``callgrind.py`` starts them under valgrind and reads
what it found, ``record.py`` says what has grown.

Of each scenario there are two numbers per operation: "ours" is what the machine code of this
project takes itself, "all" has the interpreter and the C library too. The first depends on the
compiler, and little on that; the second is compared only where interpreter, C library and kind of
CPU are those of the record. (The C library copies large blocks with an instruction that counts once
for each byte: a payload that is copied once more shows in "all".)

Every count is a steady state: a program does each scenario once to warm up and once more between
two calls of getppid(), for which nobody else has a use, and at which valgrind takes its counters.
"""
