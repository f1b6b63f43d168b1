"""Counts the instructions of the stretches of a program, with valgrind's callgrind.

Its cargo-driven relatives (iai-callgrind, gungraun) need a runner of their own version installed
first, and measure Rust functions only; this needs valgrind alone, and any program can be measured
that calls getppid() before and after what is to be counted, and prints ``{"name": …, "count": …}``
each time.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

#: How long a program may take, in seconds: some thirty times what it takes.
PATIENCE = 300

#: The name of an object, in full where it comes for the first time.
_OBJECT = re.compile(r"c?ob=\((\d+)\)(?: (.*))?")


@dataclass(frozen=True)
class Count:
    """Instructions per operation."""

    ours: int
    all: int


def version() -> str:
    """valgrind's."""
    if shutil.which("valgrind") is None:
        raise SystemExit("valgrind is needed: apt-get install valgrind")
    command = ["valgrind", "--version"]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()


def count(
    command: list[str], is_ours: Callable[[str], bool], keep: Path | None = None
) -> dict[str, Count]:
    """Runs a program and gives the counts of its stretches by name; those of a stretch are ours
    where ``is_ours`` says so of the object file's path. What they are made of is kept in a
    directory, if there is one, for callgrind_annotate."""
    with tempfile.TemporaryDirectory(prefix="instructions-") as directory:
        out = Path(directory, "out")
        valgrind = ["valgrind", "--quiet", "--tool=callgrind", f"--callgrind-out-file={out}"]
        # What the caller's environment has may change what the program does.
        environment = {"PATH": os.environ["PATH"], "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"}
        program = subprocess.run(
            [*valgrind, "--dump-before=getppid", *command],
            env=environment,
            stdout=subprocess.PIPE,
            timeout=PATIENCE,
            check=True,
        )
        stretches = [json.loads(line) for line in program.stdout.splitlines()]
        parts = len(list(Path(directory).glob("out.*")))
        if parts != 2 * len(stretches):
            raise SystemExit(f"{parts} parts for {len(stretches)} stretches of {command[0]}")
        counts = {}
        for number, stretch in enumerate(stretches, 1):
            # The odd ones end where a stretch begins.
            profile = Path(f"{out}.{2 * number}")
            by_object = self_cost(profile.read_text())
            ours = sum(cost for path, cost in by_object.items() if is_ours(path))
            operations = stretch["count"]
            total = sum(by_object.values())
            counts[stretch["name"]] = Count(round(ours / operations), round(total / operations))
            if keep is not None:
                shutil.copy(profile, keep / f"{stretch['name']}.callgrind")
        return counts


def self_cost(profile: str) -> dict[str, int]:
    """The instructions by object file, from a profile in callgrind's format."""
    names: dict[str, str] = {}
    costs: dict[str, int] = {}
    current = ""
    lines = iter(profile.splitlines())
    for line in lines:
        if found := _OBJECT.match(line):
            number, name = found.groups()
            if name is not None:
                names[number] = name
            if line.startswith("ob="):
                current = names[number]
        elif line.startswith("calls="):
            next(lines)  # what the called function took
        elif line[:1] in "0123456789+-*" and line:
            costs[current] = costs.get(current, 0) + int(line.split()[1])
    return costs
