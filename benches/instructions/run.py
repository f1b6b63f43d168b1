"""Counts the instructions of the hot paths, and fails where they have grown by more than 5 %.

Usage: run.py [--update] [--only TEXT]

``--update`` records them anew in counts.json, which is to be done, and looked at, where they have
shrunk or a growth is what it is worth.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from instructions import callgrind, record

COUNTS = HERE / "counts.json"


def core() -> dict[str, callgrind.Count]:
    """Of the core, with no Python around it."""
    command = ["cargo", "bench", "--locked", "--quiet", "--bench=core", "--no-run"]
    build = subprocess.run(
        [*command, "--message-format=json"], cwd=HERE, stdout=subprocess.PIPE, check=True
    )
    messages = map(json.loads, build.stdout.splitlines())
    (program,) = {message["executable"] for message in messages if message.get("executable")}
    counts = callgrind.count([program, "--instructions"], program.__eq__)
    return {f"core: {name}": count for name, count in counts.items()}


def client() -> dict[str, callgrind.Count]:
    """Of the Python client, and its extension."""
    with tempfile.TemporaryDirectory(prefix="lockstep-") as directory:
        daemon = subprocess.Popen(
            [sys.executable, HERE / "daemon.py", directory], stdout=subprocess.PIPE
        )
        with daemon:
            try:
                assert daemon.stdout is not None and daemon.stdout.readline() == b"ready\n"
                command = [sys.executable, str(HERE / "client.py"), directory]
                counts = callgrind.count(command, is_extension)
            finally:
                daemon.kill()
    return {f"python: {name}": count for name, count in counts.items()}


def is_extension(path: str) -> bool:
    return Path(path).name.startswith("_native.")


def surroundings() -> dict[str, str]:
    """What the totals depend on, and ours do not."""
    library = Path(sysconfig.get_config_var("LIBDIR"), sysconfig.get_config_var("LDLIBRARY"))
    interpreter = library if library.suffix == ".so" or ".so." in library.name else None
    file = interpreter or Path(os.path.realpath(sys.executable))
    # The C library and memchr pick their code by what the CPU can do; valgrind knows no more.
    has_avx2 = "avx2" in Path("/proc/cpuinfo").read_text().split()
    return {
        "interpreter": f"{platform.python_version()} {hashlib.sha256(file.read_bytes()).hexdigest()}",
        "C library": " ".join(platform.libc_ver()),
        "CPU": f"{platform.machine()} {'with' if has_avx2 else 'without'} AVX2",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Counts the instructions of the hot paths.")
    parser.add_argument("--update", action="store_true", help="record them anew")
    update = parser.parse_args().update
    version = subprocess.run(["rustc", "--version"], capture_output=True, text=True, check=True)
    counted = record.Record(version.stdout.strip(), surroundings(), {**core(), **client()})

    if COUNTS.exists():
        comparison = record.compare(record.Record.load(COUNTS), counted)
        print(*comparison.table, *comparison.notes, *comparison.failures, sep="\n")
        if comparison.failures and not update:
            raise SystemExit(1)
    if update:
        counted.save(COUNTS)
        print(f"recorded in {COUNTS}")


if __name__ == "__main__":
    main()
