"""Runs the soak scenarios of benches/soak at a small scale.

Checks that they detect corrupted, repeated and unserved payloads, a leak, growth and a stall.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from support import new_directory

pytestmark = pytest.mark.needs("unary")

SOAK = Path(__file__).parents[1] / "benches" / "soak"

#: The event loop of each scenario in this test. The full runs use all loops.
SCENARIOS = {
    "dying_peers": "asyncio",
    "restarts": "uvloop",
    "frozen_daemon": "trio",
    "slow": "uvloop",
    "descriptors": "trio",
    "concurrent_streams": "asyncio",
    "concurrent_calls": "trio",
    "streams": "uvloop",
    "unary_calls": "asyncio",
}
SABOTAGE = {
    "corrupt": "1 replies were wrong",
    "swallow": "1 operations were answered by nobody",
    "repeat": "1 operations were carried out more than once",
    "leak": r"the caller has \d+ descriptors before, \d+ after",
    "grow": "the caller grew by",
    "stall": "the caller's event loop stood still",
}

Run = tuple[int, dict[str, Any], str]


@pytest.fixture(scope="module")
def runs() -> Iterator[dict[str, Future[Run]]]:
    """Starts all runs, four at a time, as they mostly wait."""
    directory = new_directory()

    def run(name: str, *arguments: str) -> Run:
        file = directory / name
        command = [sys.executable, str(SOAK / "run.py"), *arguments, "--json", str(file)]
        ended = subprocess.run(
            [*command, "--scale", "0.001"], capture_output=True, text=True, timeout=180
        )
        [report] = json.loads(file.read_text())
        return ended.returncode, report, ended.stdout + ended.stderr

    with ThreadPoolExecutor(4) as pool:
        started = {s: pool.submit(run, s, s, "--loop", loop) for s, loop in SCENARIOS.items()}
        harm = [f"--break={harm}" for harm in SABOTAGE]
        started["sabotage"] = pool.submit(run, "sabotage", "unary_calls", *harm)
        yield started


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_every_guarantee_holds_at_a_small_scale(
    scenario: str, runs: dict[str, Future[Run]]
) -> None:
    code, report, output = runs[scenario].result()
    assert report["broken"] == [], output
    assert code == 0
    assert report["operations"] > 0
    assert report["caller"]["descriptors_before"] == report["caller"]["descriptors_after"]
    assert report["peers"]


def test_sabotage_is_detected(runs: dict[str, Future[Run]]) -> None:
    code, report, output = runs["sabotage"].result()
    assert code == 1, output
    for harm, message in SABOTAGE.items():
        assert re.search(message, "\n".join(report["broken"])), harm
    assert len(report["broken"]) == len(SABOTAGE), output


def test_every_scenario_is_covered() -> None:
    modules = {path.stem for path in SOAK.glob("*.py") if "async def run(soak" in path.read_text()}
    assert modules == set(SCENARIOS)
