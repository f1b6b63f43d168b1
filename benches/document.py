"""Writes the tables of run.py's numbers into Markdown files, between lines such as
``<!-- targets -->`` and ``<!-- /targets -->``.

Usage: document.py JSON_FILE MARKDOWN_FILE...; run.py does this for the file beside its numbers.
"""

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path

from report import (
    Numbers,
    Table,
    scenario_table,
    split_table,
    summary_table,
    targets_table,
)
from scenarios import DAEMONS, FRESH, MOCK, Scenario


def markdown(table: Table) -> str:
    """Renders a table in Markdown, with numbers aligned to the right."""
    header, *rows = table
    rule = ["---", *("---:" for _ in header[1:])]
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *rows))


def _all(numbers: Numbers, scenarios: tuple[Scenario, ...]) -> str:
    found = ((scenario, scenario_table(numbers, scenario)) for scenario in scenarios)
    return "\n\n".join(
        f"**{scenario.title}**\n\n{markdown(table)}" for scenario, table in found if table
    )


def fill(numbers: Numbers, machine: Mapping[str, str], file: Path) -> None:
    """Replaces the text between each pair of marks in a file."""
    parts = {
        "machine": "\n".join(f"- {what}: {text}" for what, text in machine.items()),
        "summary": markdown(summary_table(numbers, MOCK)),
        "targets": markdown(targets_table(numbers, MOCK)),
        "split": markdown(split_table(numbers, DAEMONS)),
        "mock": _all(numbers, MOCK),
        "fresh": _all(numbers, FRESH),
        "daemons": _all(numbers, DAEMONS),
    }
    text = file.read_text()
    for part, content in parts.items():
        between = re.compile(f"(<!-- {part} -->\n).*?(<!-- /{part} -->)", re.DOTALL)
        escaped = content.replace("\\", r"\\")
        text = between.sub(rf"\1\n{escaped}\n\n\2", text)
    file.write_text(text)


if __name__ == "__main__":
    measured = json.loads(Path(sys.argv[1]).read_text())
    for path in sys.argv[2:]:
        fill(Numbers(measured["results"]), measured["machine"], Path(path))
