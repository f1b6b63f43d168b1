"""Describes the machine and the software of a measurement."""

import os
import platform
import subprocess
import sys
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import incumbents

PACKAGES = ("p2pclient-rs", "anyio", "trio", "uvloop", "protobuf", "multiaddr")


def describe() -> dict[str, str]:
    """Returns the description, as title → text."""
    interpreter = f"{platform.python_implementation()} {platform.python_version()}"
    interpreter += f", {os.path.realpath(sys.executable)}, {platform.python_compiler()}"
    if not os.path.realpath(sys.executable).startswith("/usr/bin/"):
        interpreter += ": NOT the distribution's, which is the optimised one"
    packages = []
    for package in PACKAGES:
        try:
            packages.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            packages.append(f"{package} missing")
    others = [wheel.replace("-", " ") for wheel in incumbents.WHEELS]
    return {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "CPU": f"{_cpu()}, {os.cpu_count()} cores",
        "kernel": f"{platform.system()} {platform.release()} {platform.machine()}",
        "interpreter": interpreter,
        "Rust": subprocess.run(
            ["rustc", "--version"], check=True, stdout=subprocess.PIPE, text=True
        ).stdout.strip(),
        "packages": ", ".join(packages + others),
    }


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
