"""The recorded counts, and comparing new counts with them."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from instructions.callgrind import Count

#: The tolerated change of a count. A larger growth fails, and a larger decrease must be recorded.
ALLOWED = 0.05
#: The tolerated change if the compiler or its target differs from the recorded one.
ALLOWED_OF_ANOTHER_BUILD = 0.10


@dataclass(frozen=True)
class Record:
    """Counts by scenario, and the environment on which they depend."""

    #: The compiler and its target.
    build: str
    #: What the totals also depend on: the interpreter, the C library, the kind of CPU.
    surroundings: dict[str, str]
    counts: dict[str, Count]

    @classmethod
    def load(cls, file: Path) -> Record:
        fields = json.loads(file.read_text())
        counts = {name: Count(**count) for name, count in fields["counts"].items()}
        return cls(fields["build"], fields["surroundings"], counts)

    def save(self, file: Path) -> None:
        file.write_text(json.dumps(asdict(self), indent=2) + "\n")


@dataclass
class Comparison:
    """A table of changes, with remarks."""

    table: list[str]
    #: Notes about comparisons that were skipped or less strict.
    notes: list[str] = field(default_factory=list)
    #: Reasons to fail.
    failures: list[str] = field(default_factory=list)


def compare(recorded: Record, counted: Record) -> Comparison:
    """Compares counts with a record."""
    result = Comparison([f"{'instructions per operation':46}{'recorded':>12}{'now':>12}"])
    allowed = ALLOWED
    if recorded.build != counted.build:
        allowed = ALLOWED_OF_ANOTHER_BUILD
        result.notes.append(
            f"{counted.build}, not {recorded.build} as recorded:"
            f" {allowed:.0%} are allowed instead of {ALLOWED:.0%}"
        )
    numbers = ["ours", "all"]
    if others := [
        f"{what} ({counted.surroundings.get(what)}, recorded {was})"
        for what, was in recorded.surroundings.items()
        if counted.surroundings.get(what) != was
    ]:
        numbers.remove("all")
        result.notes.append(f"only ours is compared, since another is here: {', '.join(others)}")

    shrunk = False
    for name in [*recorded.counts, *sorted(counted.counts.keys() - recorded.counts.keys())]:
        was, now = recorded.counts.get(name), counted.counts.get(name)
        if now is None:
            result.failures.append(f"{name} is recorded and was not counted")
        elif was is None:
            result.failures.append(f"{name} is not recorded")
        else:
            for number in numbers:
                before, after = getattr(was, number), getattr(now, number)
                change = after / before - 1
                verdict = ""
                if change > allowed:
                    verdict = "GREW"
                    result.failures.append(f"{name}, {number}: {change:+.1%}")
                elif change < -allowed:
                    verdict = "shrank"
                    shrunk = True
                result.table.append(
                    f"{name:41}{number:5}{before:12,}{after:12,} {change:+7.1%} {verdict}".rstrip()
                )
    if shrunk:
        result.notes.append("what shrank is a bound only when recorded anew: `--update`")
    return result
