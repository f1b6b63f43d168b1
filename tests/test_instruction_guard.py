"""benches/instructions: comparing counts with a record, and reading callgrind's profiles."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "benches"))

from instructions.callgrind import Count, self_cost
from instructions.record import Record, compare
from instructions.run import COUNTS

pytestmark = pytest.mark.independent

RECORDED = Record(
    "rustc 1.88.0 for cpython-311",
    {"interpreter": "3.11.2 abc", "CPU": "x86_64"},
    {"identify": Count(1000, 50_000), "unary": Count(2000, 60_000)},
)


def with_unary(ours: int, total: int = 60_000) -> Record:
    return dataclasses.replace(RECORDED, counts={**RECORDED.counts, "unary": Count(ours, total)})


def test_unchanged_counts_pass_without_notes() -> None:
    result = compare(RECORDED, RECORDED)
    assert not result.failures and not result.notes
    assert len(result.table) == 5


def test_growth_by_6_percent_fails_and_is_named() -> None:
    result = compare(RECORDED, with_unary(2120))
    assert result.failures == ["unary, ours: +6.0%"]
    assert [line for line in result.table if line.endswith("GREW")] == [result.table[3]]
    assert "unary" in result.table[3]


def test_growth_by_4_percent_passes() -> None:
    assert not compare(RECORDED, with_unary(2080, 62_400)).failures


def test_growth_outside_of_the_extension_module_fails_too() -> None:
    assert compare(RECORDED, with_unary(2000, 63_600)).failures == ["unary, all: +6.0%"]


def test_shrinkage_is_reported_and_passes() -> None:
    result = compare(RECORDED, with_unary(1880))
    assert not result.failures
    assert result.table[3].endswith("shrank")
    assert any("--update" in note for note in result.notes)


def test_scenario_missing_in_the_record_or_the_run_fails() -> None:
    less = dataclasses.replace(RECORDED, counts={"identify": RECORDED.counts["identify"]})
    assert compare(RECORDED, less).failures == ["unary is recorded and was not counted"]
    assert compare(less, RECORDED).failures == ["unary is not recorded"]


def test_growth_by_10_percent_passes_with_another_compiler() -> None:
    other = dataclasses.replace(with_unary(2180), build="rustc 1.99.0 for cpython-311")
    result = compare(RECORDED, other)
    assert not result.failures
    assert any("rustc 1.99.0" in note for note in result.notes)
    assert compare(RECORDED, dataclasses.replace(other, counts=with_unary(2220).counts)).failures


def test_totals_are_not_compared_across_interpreters() -> None:
    elsewhere = {**RECORDED.surroundings, "interpreter": "3.12.0 def"}
    result = compare(
        RECORDED, dataclasses.replace(with_unary(2000, 90_000), surroundings=elsewhere)
    )
    assert not result.failures
    assert any("3.12.0 def" in note for note in result.notes)
    grown = dataclasses.replace(with_unary(2120), surroundings=elsewhere)
    assert compare(RECORDED, grown).failures == ["unary, ours: +6.0%"]


def test_record_survives_saving_and_loading(tmp_path: Path) -> None:
    file = tmp_path / "counts.json"
    RECORDED.save(file)
    assert Record.load(file) == RECORDED


def test_every_recorded_scenario_has_both_counts() -> None:
    recorded = Record.load(COUNTS)
    assert recorded.counts
    assert all(0 < count.ours < count.all for count in recorded.counts.values())


def test_instructions_of_callees_count_once_for_their_own_object() -> None:
    profile = """\
# callgrind format
positions: line
events: Ir

ob=(1) /usr/bin/python3
fl=(1) ???
fn=(1) main
0 10
+3 5
cob=(2) /site-packages/_native.so
cfn=(2) call
calls=1 0
* 100

ob=(2)
fn=(2)
0 70
cob=(1)
cfn=(3) PyLong_FromLong
calls=2 0
0 30

ob=(1)
fn=(3)
-2 30
"""
    assert self_cost(profile) == {"/usr/bin/python3": 45, "/site-packages/_native.so": 70}
