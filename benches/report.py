"""Formats the numbers as tables of text cells, printed by run.py and rendered by document.py."""

import statistics
from collections.abc import Sequence
from typing import TypeAlias

from measure import Results
from scenarios import (
    CONTENDERS,
    FLOOR,
    HIVEMIND,
    OURS,
    P2PCLIENT,
    Contender,
    Scenario,
    key,
    name,
)
from targets import TARGETS, Target

Table: TypeAlias = list[list[str]]

MIB = 1 << 20


class Numbers:
    """Access to the measured results."""

    def __init__(self, results: Results) -> None:
        self.results = results

    def values(self, scenario: str, contender: Contender, metric: str) -> list[float]:
        """Returns the values of all rounds; none if not measured."""
        return self.results.get(scenario, {}).get(key(contender), {}).get(metric, [])

    def median(self, scenario: str, contender: Contender, metric: str) -> float | None:
        values = self.values(scenario, contender, metric)
        return statistics.median(values) if values else None

    def ratio(
        self, scenario: str, one: Contender, other: Contender, metric: str
    ) -> tuple[float, float, float] | None:
        """Returns the ratio of ``other`` to ``one``: of the medians, with the extremes by round."""
        mine, theirs = (self.values(scenario, of, metric) for of in (one, other))
        if not mine or not theirs or not all(mine):
            return None
        rounds = [b / a for a, b in zip(mine, theirs, strict=False)]
        return statistics.median(theirs) / statistics.median(mine), min(rounds), max(rounds)


def number(value: float) -> str:
    """Formats a number with three significant digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def times(ratio: tuple[float, float, float] | None, spread: bool = True) -> str:
    """Formats a ratio, for example ``6.2x (5.9-6.6)``."""
    if ratio is None:
        return "-"
    text = f"{ratio[0]:.2f}x" if ratio[0] < 3 else f"{ratio[0]:.1f}x"
    return text + (f" ({ratio[1]:.1f}-{ratio[2]:.1f})" if spread else "")


LABELS = {"cpu": "CPU", "server": "server's CPU", "daemons": "daemons' CPU", "peak": "peak MiB"}


def scenario_table(numbers: Numbers, scenario: Scenario) -> Table | None:
    """All contenders of a scenario, compared with ours on asyncio; None if not measured."""
    unit, factor = scenario.unit
    metrics = [
        metric
        for metric in (*scenario.metrics[:2], "server", "daemons", *scenario.metrics[2:])
        if numbers.values(scenario.key, OURS, metric)
    ]
    if not metrics:
        return None
    header = [""]
    for place, metric in enumerate(metrics):
        label = LABELS.get(metric, metric)
        if metric in ("peak", "memory"):
            header.append("MiB" if metric == "memory" else label)
            if metric == "memory":
                header.append("x ours")
            continue
        header.append(f"{label}, {unit}")
        if place == 0:
            header.append("spread")
        if metric != "daemons":
            header.append("x ours")
    table = [header]
    for contender in CONTENDERS:
        if not numbers.values(scenario.key, contender, metrics[0]):
            continue
        row = [name(contender)]
        for place, metric in enumerate(metrics):
            values = numbers.values(scenario.key, contender, metric)
            if not values:
                row += ["-", "-"]
                continue
            median = statistics.median(values)
            ratio = numbers.ratio(scenario.key, OURS, contender, metric)
            if metric == "peak":
                row.append(number(median / MIB))
            elif metric == "memory":
                row += [number(median / MIB), times(ratio)]
            else:
                row.append(number(median * factor))
                if place == 0:
                    row.append(f"{number(min(values) * factor)}-{number(max(values) * factor)}")
                if metric != "daemons":
                    row.append(times(ratio, spread=place == 0))
        table.append(row)
    return table


def targets_table(numbers: Numbers, scenarios: Sequence[Scenario]) -> Table:
    """The targets, and which of them were reached."""
    known = {scenario.key: scenario for scenario in scenarios}
    header = ["scenario", "ours", "ratio", "the floor's", "at least", "aim"]
    table = [[*header, "x floor", "at most", "reached"]]
    for target in TARGETS:
        scenario = known.get(target.scenario)
        ours = numbers.median(target.scenario, OURS, target.metric)
        if scenario is None or ours is None:
            continue
        unit, factor = scenario.unit
        least = numbers.ratio(target.scenario, OURS, target.least[0], target.metric)
        same = target.aim is None or target.aim[0] == target.least[0]
        ratios = f"{times(least)} {target.least[0][0]}"
        if target.aim is not None and not same:
            aim = numbers.ratio(target.scenario, OURS, target.aim[0], target.metric)
            ratios += f", {times(aim)} {target.aim[0][0]}"
        floor = numbers.ratio(target.scenario, FLOOR, OURS, target.metric)
        table.append(
            [
                scenario.title + (", CPU" if target.metric == "cpu" else ""),
                f"{number(ours * factor)} {unit}",
                ratios,
                times(numbers.ratio(target.scenario, FLOOR, target.least[0], target.metric), False),
                *(_bar(bar, named=not same) for bar in (target.least, target.aim)),
                times(floor, spread=False),
                f"{target.floor:g}x" if target.floor else "-",
                verdict(numbers, target),
            ]
        )
    return table


def summary_table(numbers: Numbers, scenarios: Sequence[Scenario]) -> Table:
    """The median of each contender, and its ratio to ours."""
    some = [OURS, ("ours", "uvloop"), ("ours", "trio"), HIVEMIND, P2PCLIENT, FLOOR]
    table = [["", *(name(contender) for contender in some)]]
    for scenario in scenarios:
        metric = "cpu" if scenario.unit[0] == "ms/GB" else scenario.metrics[0]
        unit, factor = scenario.unit
        if metric not in ("wall", "cpu") or not numbers.values(scenario.key, OURS, metric):
            continue
        row = [f"{scenario.title}, {'CPU, ' if metric == 'cpu' else ''}{unit}"]
        for contender in some:
            median = numbers.median(scenario.key, contender, metric)
            text = "-" if median is None else number(median * factor)
            if median is not None and contender != OURS:
                text += f" ({times(numbers.ratio(scenario.key, OURS, contender, metric), False)})"
            row.append(text)
        table.append(row)
    return table


def _bar(bar: tuple[Contender, float] | None, named: bool) -> str:
    if bar is None:
        return "-"
    return f"{bar[1]:g}x" + (f" {bar[0][0]}" if named else "")


def split_table(numbers: Numbers, scenarios: Sequence[Scenario]) -> Table:
    """CPU time per operation through two daemons, split by caller, server and daemons, for ours and
    hivemind's, and hivemind's ratios to ours."""
    parts = ("cpu", "server", "daemons")
    header = ["scenario"]
    for who in ("ours", "hivemind"):
        header += [f"{who}: caller", "server", "daemons"]
    table = [[*header, "caller x ours", "server x ours"]]
    for scenario in scenarios:
        if not numbers.values(scenario.key, OURS, "server"):
            continue
        row = [scenario.title]
        for contender in (OURS, HIVEMIND):
            medians = (numbers.median(scenario.key, contender, part) for part in parts)
            row += [number(median * 1e6) if median is not None else "-" for median in medians]
        for part in parts[:2]:
            row.append(times(numbers.ratio(scenario.key, OURS, HIVEMIND, part)))
        table.append(row)
    return table


def verdict(numbers: Numbers, target: Target) -> str:
    """Returns the best target reached, and whether the ratio to the floor is low enough."""

    def reaches(bar: tuple[Contender, float] | None) -> bool:
        if bar is None:
            return False
        ratio = numbers.ratio(target.scenario, OURS, bar[0], target.metric)
        return ratio is not None and ratio[0] >= bar[1]

    result = "aim" if reaches(target.aim) else "at least" if reaches(target.least) else "NO"
    if result == "at least" and target.aim is None:
        result = "yes"
    if target.floor is not None:
        floor = numbers.ratio(target.scenario, FLOOR, OURS, target.metric)
        if floor is None or floor[0] > target.floor:
            result += ", floor NO"
    return result


def show(title: str, table: Table) -> None:
    """Prints a table."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    print(f"\n{title}")
    for row in table:
        first, *rest = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join([first.strip().ljust(widths[0]), *rest]).rstrip(), flush=True)
