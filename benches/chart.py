"""Draws the chart of run.py's numbers: times of the other clients as multiples of ours.

Usage: chart.py JSON_FILE SVG_FILE
"""

import json
import sys
from collections.abc import Mapping

import matplotlib
from matplotlib import pyplot
from report import Numbers
from scenarios import FLOOR, HIVEMIND, MOCK, OURS, P2PCLIENT, name
from targets import TARGETS

BARS = ((HIVEMIND, "#4c72b0"), (P2PCLIENT, "#dd8452"), (FLOOR, "#8c8c8c"))


def draw(numbers: Numbers, machine: Mapping[str, str], file: str) -> bool:
    """Writes the chart; returns False if none of its scenarios was measured."""
    titles = {scenario.key: scenario.title for scenario in MOCK}
    shown = [target for target in TARGETS if numbers.values(target.scenario, OURS, target.metric)]
    if not shown:
        return False
    # Reproducible output, in fonts that every viewer has.
    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "p2pclient-rs", "svg.fonttype": "none"})
    figure, axes = pyplot.subplots(
        figsize=(9, 0.9 + 0.55 * len(shown)), facecolor="white", layout="constrained"
    )
    height = 0.8 / len(BARS)
    for place, (contender, colour) in enumerate(BARS):
        label: str | None = name(contender)
        for row, target in enumerate(shown):
            ratio = numbers.ratio(target.scenario, OURS, contender, target.metric)
            if ratio is None:
                continue
            value, low, high = ratio
            y = row + (place - 1) * height
            axes.barh(y, value - 1, height, left=1, color=colour, label=label)
            label = None
            axes.plot([low, high], [y, y], color="black", linewidth=0.8)
            axes.annotate(
                f"{value:.2g}×" if value < 10 else f"{value:.0f}×",
                (max(value, high, 1), y),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=7,
            )
    axes.axvline(1, color="#2a7f3f", linewidth=2, label=name(OURS))
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(matplotlib.ticker.LogLocator(10, subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}×")
    axes.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    axes.set_yticks(
        range(len(shown)),
        [titles[of.scenario] + (", CPU" if of.metric == "cpu" else "") for of in shown],
        fontsize=8,
    )
    axes.invert_yaxis()
    axes.margins(x=0.1, y=0.01)
    axes.tick_params(labelsize=8)
    axes.set_xlabel("time, as a multiple of ours: right of the line is slower", fontsize=8)
    axes.set_title(f"against the mock daemon\n{machine['CPU']}; {machine['interpreter']}", size=8)
    axes.grid(axis="x", linewidth=0.3)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.legend(loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    figure.savefig(file, format="svg", metadata={"Date": None})
    pyplot.close(figure)
    return True


if __name__ == "__main__":
    with open(sys.argv[1]) as opened:
        measured = json.load(opened)
    if not draw(Numbers(measured["results"]), measured["machine"], sys.argv[2]):
        raise SystemExit("none of the chart's scenarios was measured")
