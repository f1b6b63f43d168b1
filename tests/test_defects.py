"""The defects of hivemind's bindings exist in the original but not here. See docs/defects.md."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.independent


@pytest.mark.parametrize(("kind", "correct"), [("ours", True), ("hivemind", False)])
def test_defects_of_hivemind_are_absent_here(kind: str, correct: bool) -> None:
    program = str(Path(__file__).with_name("defects.py"))
    output = subprocess.run(
        [sys.executable, program, kind],
        env={**os.environ, "HIVEMIND_LOGLEVEL": "CRITICAL"},
        stdout=subprocess.PIPE,
        timeout=60,
        check=True,
    ).stdout
    results = json.loads(output)
    assert len(results) == 8
    assert {name: result for name, result in results.items() if result != correct} == {}
