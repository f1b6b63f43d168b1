"""Counts the instructions of sections of a program, with valgrind's callgrind.

The cargo-based tools iai-callgrind and gungraun need a runner of the same version installed first,
and measure only Rust functions. This module needs only valgrind. It measures any program that calls
getppid() before and after each section and then prints ``{"name": …, "count": …}``.
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

#: The timeout for a program, in seconds: about thirty times its usual duration.
PATIENCE = 300

#: A line with an object file. Its name is present only at its first occurrence.
_OBJECT = re.compile(r"c?ob=\((\d+)\)(?: (.*))?")


@dataclass(frozen=True)
class Count:
    """Instructions per operation."""

    ours: int
    all: int


def version() -> str:
    """Returns valgrind's version."""
    if shutil.which("valgrind") is None:
        raise SystemExit("valgrind is needed: apt-get install valgrind")
    command = ["valgrind", "--version"]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()


def count(
    command: list[str], is_ours: Callable[[str], bool], keep: Path | None = None
) -> dict[str, Count]:
    """Runs a program and returns the counts of its sections by name.

    Args:
        command: The program and its arguments.
        is_ours: Whether the instructions of an object file, given by its path, count as "ours".
        keep: A directory for the profiles, for callgrind_annotate.
    """
    with tempfile.TemporaryDirectory(prefix="instructions-") as directory:
        out = Path(directory, "out")
        valgrind = ["valgrind", "--quiet", "--tool=callgrind", f"--callgrind-out-file={out}"]
        # The caller's environment must not change the program's behaviour.
        environment = {"PATH": os.environ["PATH"], "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"}
        program = subprocess.run(
            [*valgrind, "--dump-before=getppid", *command],
            env=environment,
            stdout=subprocess.PIPE,
            timeout=PATIENCE,
            check=True,
        )
        sections = [json.loads(line) for line in program.stdout.splitlines()]
        parts = len(list(Path(directory).glob("out.*")))
        if parts != 2 * len(sections):
            raise SystemExit(f"{parts} parts for {len(sections)} sections of {command[0]}")
        counts = {}
        for number, section in enumerate(sections, 1):
            # Section n is in profile 2n: profiles with odd numbers end where a section begins.
            profile = Path(f"{out}.{2 * number}")
            by_object = self_cost(profile.read_text())
            ours = sum(cost for path, cost in by_object.items() if is_ours(path))
            operations = section["count"]
            total = sum(by_object.values())
            counts[section["name"]] = Count(round(ours / operations), round(total / operations))
            if keep is not None:
                shutil.copy(profile, keep / f"{section['name']}.callgrind")
        return counts


def self_cost(profile: str) -> dict[str, int]:
    """Returns the number of instructions by object file, from a profile in callgrind's format."""
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
            next(lines)  # the cost of the called function
        elif line[:1] in "0123456789+-*" and line:
            costs[current] = costs.get(current, 0) + int(line.split()[1])
    return costs
