"""Counts the instructions of the hot paths, and fails where they have grown by more than 5 %.

Usage: run.py [--update] [--keep DIRECTORY]

``--update`` records the counts in counts.json, after a decrease or a justified growth.
``--keep`` keeps the profiles, for callgrind_annotate.
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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from instructions import callgrind, record

HERE = Path(__file__).resolve().parent
COUNTS = HERE / "counts.json"


def protocol(keep: Path | None) -> dict[str, callgrind.Count]:
    """Counts the protocol crate alone, without Python."""
    command = ["cargo", "bench", "--locked", "--quiet", "--bench=protocol", "--no-run"]
    build = subprocess.run(
        [*command, "--message-format=json"], cwd=HERE, stdout=subprocess.PIPE, check=True
    )
    messages = map(json.loads, build.stdout.splitlines())
    (program,) = {message["executable"] for message in messages if message.get("executable")}
    counts = callgrind.count([program, "--instructions"], program.__eq__, keep)
    return {f"protocol: {name}": count for name, count in counts.items()}


def client(keep: Path | None) -> dict[str, callgrind.Count]:
    """Counts the Python client with its extension module."""
    with tempfile.TemporaryDirectory(prefix="lockstep-") as directory:
        daemon = subprocess.Popen(
            [sys.executable, HERE / "daemon.py", directory], stdout=subprocess.PIPE
        )
        with daemon:
            try:
                assert daemon.stdout is not None and daemon.stdout.readline() == b"ready\n"
                command = [sys.executable, str(HERE / "client.py"), directory]
                counts = callgrind.count(command, is_extension, keep)
            finally:
                daemon.kill()
    return {f"python: {name}": count for name, count in counts.items()}


def is_extension(path: str) -> bool:
    return Path(path).name.startswith("_native.")


def build() -> str:
    """Describes the compiler and its target."""
    rustc = subprocess.run(["rustc", "--version"], stdout=subprocess.PIPE, text=True, check=True)
    return f"{rustc.stdout.strip()} for {sysconfig.get_config_var('SOABI')}"


def surroundings() -> dict[str, str]:
    """Describes the environment that the totals depend on."""
    # The interpreter is in a shared library or in the program itself.
    mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
    libraries = [path for path in mapped if Path(path).name.startswith("libpython")]
    (interpreter,) = libraries or [os.path.realpath(sys.executable)]
    digest = hashlib.sha256(Path(interpreter).read_bytes()).hexdigest()[:16]
    # The C library and memchr choose their code by the CPU features that valgrind reports.
    has_avx2 = "avx2" in Path("/proc/cpuinfo").read_text().split()
    return {
        "interpreter": f"{platform.python_version()} {digest}",
        "C library": " ".join(platform.libc_ver()),
        "valgrind": callgrind.version(),
        "CPU": f"{platform.machine()} {'with' if has_avx2 else 'without'} AVX2",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Counts the instructions of the hot paths.")
    parser.add_argument("--update", action="store_true", help="record them anew")
    parser.add_argument("--keep", type=Path, help="a directory for the profiles")
    arguments = parser.parse_args()
    update, keep = arguments.update, arguments.keep
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
    where = build(), surroundings()
    counted = record.Record(*where, {**protocol(keep), **client(keep)})

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
