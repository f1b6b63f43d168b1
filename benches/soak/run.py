"""Runs soak scenarios, each in its own process, and reports the results.

Usage: run.py [SCENARIO …] [--scale 0.01] [--loop asyncio|uvloop|trio] [--json FILE]

Exits with 1 if a guarantee was violated or a scenario did not end in time.
``--table FILE …`` renders saved reports as a table in Markdown instead.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from soak import harness, peer

#: Time limit of each scenario at full scale, in minutes. One minute is added at any scale.
SCENARIOS = {
    "unary_calls": 60,
    "streams": 60,
    "concurrent_calls": 15,
    "concurrent_streams": 15,
    "descriptors": 10,
    "slow": 10,
    "frozen_daemon": 10,
    "restarts": 15,
    "dying_peers": 15,
}


def in_process(scenario: str, scale: float, loop: str, sabotage: set[str], file: str) -> None:
    """Runs a scenario in this process, and writes its report."""
    soak = harness.Soak(scenario, scale, loop, sabotage)
    peer.run(loop, importlib.import_module(f"soak.{scenario}").run, soak)
    Path(file).write_text(json.dumps(soak.report.asdict()))


def in_child(scenario: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs a scenario in its own process."""
    with tempfile.NamedTemporaryFile("r", prefix="soak-") as file:
        command = [sys.executable, __file__, "--into", file.name, scenario]
        command += ["--scale", str(arguments.scale), "--loop", arguments.loop]
        command += [f"--break={harm}" for harm in arguments.sabotage]
        limit = 60 * (1 + SCENARIOS[scenario] * arguments.scale)
        child = subprocess.Popen(command, start_new_session=True)
        try:
            code: int | str = child.wait(limit)
        except subprocess.TimeoutExpired:
            code = f"no end within {limit:.0f} s"
        except BaseException:
            os.killpg(child.pid, signal.SIGKILL)
            raise
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        if code == 0:
            report: dict[str, Any] = json.loads(file.read())
            return report
    report = harness.Report(scenario, arguments.loop, arguments.scale).asdict()
    return {**report, "broken": [f"it ended with {code}"]}


def show(report: dict[str, Any]) -> None:
    print(f"\n{report['scenario']} on {report['loop']}, scale {report['scale']:g}")
    print(
        f"  {report['operations']} operations in {report['seconds']} s: {report['rate']} a second"
    )
    print(f"  errors {sum(report['errors'].values())}, lost {report['lost']}, ", end="")
    print(f"corrupted {report['corrupted']}, repeated {report['repeated']}")
    for kind, count in report["errors"].items():
        print(f"    {count} x {kind}, as {report['examples'][kind]}")
    for name, figure in report["figures"].items():
        print(f"  {name}: {figure:g}")
    for name, m in measured(report):
        print(
            f"  {name}: {m['cpu_us']} us of CPU each; {m['descriptors_before']} descriptors before,"
            f" {m['descriptors_after']} after; {m['rss_before']} MiB before, {m['rss_tenth']} at"
            f" 10 %, {m['rss_end']} at the end ({m['rss_slope']:+} a minute); stalled for"
            f" {m['stall_ms']} ms ({m['own_stall_ms']} of its own)"
        )
    print(f"  the daemons have {report['daemons_rss']} MiB")
    for message in report["broken"]:
        print(f"  BROKEN: {message}")


def measured(report: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    caller = [("caller", report["caller"])] if report["caller"] else []
    return caller + [(peer["name"], peer["measured"]) for peer in report["peers"]]


def table(reports: list[dict[str, Any]]) -> str:
    """Renders reports as a table in Markdown. A cell with two figures has the caller's, and the
    worst one of the handlers'."""
    lines = [
        "| scenario | loop | operations | per second | errors | lost, corrupted, repeated "
        "| descriptors before → after | RSS at 10 % → end, MiB | MiB per minute "
        "| longest stall, ms | CPU per operation, us |",
        "| --- | --- " + "| ---: " * 9 + "|",
    ]
    for report in reports:
        caller, *others = [m for _, m in measured(report)]
        far = max(others, key=lambda m: m["rss_end"] - m["rss_tenth"])
        errors = ", ".join(f"{count} {kind}" for kind, count in report["errors"].items()) or "0"
        both = (caller, far)
        cells = [
            report["scenario"],
            report["loop"],
            f"{report['operations']:,}",
            f"{report['rate']:,.0f}",
            errors,
            f"{report['lost']}, {report['corrupted']}, {report['repeated']}",
            "; ".join(f"{m['descriptors_before']} → {m['descriptors_after']}" for m in both),
            "; ".join(f"{m['rss_tenth']:.1f} → {m['rss_end']:.1f}" for m in both),
            "; ".join(f"{m['rss_slope']:+.2f}" for m in both),
            "; ".join(f"{m['own_stall_ms']:.0f}" for m in (caller, worst_stall(others))),
            "; ".join(f"{m['cpu_us']:.0f}" for m in both),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def worst_stall(several: list[dict[str, Any]]) -> dict[str, Any]:
    return max(several, key=lambda m: float(m["own_stall_ms"]))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("scenarios", nargs="*", metavar="SCENARIO", help=", ".join(SCENARIOS))
    parser.add_argument("--scale", type=float, default=1.0, help="1 is full scale")
    parser.add_argument("--loop", choices=["asyncio", "uvloop", "trio"], default="asyncio")
    parser.add_argument("--json", metavar="FILE", help="where to write the reports")
    parser.add_argument("--table", action="store_true", help="render saved reports")
    parser.add_argument(
        "--break",
        dest="sabotage",
        choices=harness.SABOTAGE,
        action="append",
        default=[],
        help="cause a defect on purpose, which must be detected",
    )
    parser.add_argument("--into", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.table:
        files = map(Path, arguments.scenarios)
        print(table([report for file in files for report in json.loads(file.read_text())]))
        return 0
    if unknown := set(arguments.scenarios) - set(SCENARIOS):
        parser.error(f"no such scenario: {', '.join(sorted(unknown))}")
    if arguments.into:
        [scenario] = arguments.scenarios
        harm = set(arguments.sabotage)
        in_process(scenario, arguments.scale, arguments.loop, harm, arguments.into)
        return 0
    print(f"{platform.python_implementation()} {platform.python_version()}, {os.cpu_count()} CPUs")
    reports = []
    for scenario in arguments.scenarios or SCENARIOS:
        reports.append(in_child(scenario, arguments))
        show(reports[-1])
        if arguments.json:
            Path(arguments.json).write_text(json.dumps(reports, indent=1) + "\n")
    return int(any(report["broken"] for report in reports))


if __name__ == "__main__":
    sys.exit(main())
