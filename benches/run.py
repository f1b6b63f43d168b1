"""Measures this package against the bindings it replaces, and a blocking Rust client as the floor.

Every contender is its own process, and their rounds are interleaved. The mock daemon shows the cost
of a client alone, two real daemons what a program gains. docs/performance.md explains the tables.

Usage: run.py [--rounds N] [--quick | --smoke] [--only NAME...] [--json FILE]
"""

import argparse
import resource
from pathlib import Path

import anyio
import chart
import document
import incumbents
import machine
import measure
from report import Numbers, scenario_table, show, split_table, targets_table
from scenarios import DAEMONS, FRESH, MOCK, Scenario
from worker import TARGET

from p2pclient_rs import Daemon

GROUPS = (
    ("against the mock daemon", MOCK),
    ("in a new process", FRESH),
    ("through two real daemons", DAEMONS),
)


async def through_daemons(
    scenarios: list[Scenario], effort: measure.Effort, results: measure.Results
) -> None:
    async with Daemon() as here, Daemon() as there:
        async with here.client() as client, there.client() as server:
            await client.connect(there.peer_id, there.addrs)
            # These daemons exit when their last persistent connection closes.
            await client.unary.open()
            await server.unary.open()
            near = str(here.control_maddr), str(there.peer_id)
            far = str(there.control_maddr), str(here.peer_id)
            processes = [daemon.pid for daemon in (here, there) if daemon.pid is not None]

            def run() -> None:
                measure.through_daemons(scenarios, effort, results, near, far, processes)

            await anyio.to_thread.run_sync(run)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, help="measured rounds (default: 9)")
    parser.add_argument("--quick", action="store_true", help="fewer and smaller rounds")
    parser.add_argument("--smoke", action="store_true", help="only check that everything works")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="scenarios, by name or prefix")
    parser.add_argument(
        "--json",
        metavar="FILE",
        type=Path,
        default=TARGET / "performance.json",
        help="file for the numbers; the chart goes beside it; in docs/, the tables are renewed too",
    )
    options = parser.parse_args()
    effort = measure.Effort(options.rounds or 9)
    if options.quick:
        effort = measure.Effort(options.rounds or 3, scale=0.2)
    if options.smoke:
        effort = measure.Effort(1, scale=1e-3, warms_up=False)

    def chosen(scenarios: tuple[Scenario, ...]) -> list[Scenario]:
        only = tuple(options.only or ("",))
        return [scenario for scenario in scenarios if scenario.key.startswith(only)]

    # Some scenarios open many streams.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    for wheel in incumbents.WHEELS:
        incumbents.fetch(wheel)
    described = machine.describe()
    described["rounds"] = f"{effort.rounds}, interleaved" + (
        f", of {effort.scale:g} of the operations" if effort.scale != 1 else ""
    )
    for what, value in described.items():
        print(f"{what}: {value}")

    results: measure.Results = {}
    numbers = Numbers(results)
    for title, scenarios in GROUPS:
        some = chosen(scenarios)
        if not some:
            continue
        if scenarios is MOCK:
            measure.against_mock(some, effort, results)
        elif scenarios is FRESH:
            measure.fresh(some, effort, results)
        else:
            anyio.run(through_daemons, some, effort, results)
        for scenario in some:
            table = scenario_table(numbers, scenario)
            if table is None:
                raise SystemExit(f"{scenario.key} was not measured")
            if options.smoke:
                print(f"{scenario.title}, {title}: ok", flush=True)
            else:
                show(f"{scenario.title}, {title}", table)
    table = targets_table(numbers, MOCK)
    if len(table) > 1 and not options.smoke:
        show("targets: ours on asyncio, against the mock daemon", table)
    table = split_table(numbers, DAEMONS)
    if len(table) > 1 and not options.smoke:
        show("whose CPU time an operation through two real daemons takes, us, on asyncio", table)
    written: Path = options.json
    written.write_text(measure.to_json({"machine": described, "results": results}))
    if chart.draw(numbers, described, str(written.with_suffix(".svg"))):
        print(f"\nwritten: {written}, and the chart beside it")
    for text in (written.with_suffix(".md"), written.parent.parent / "README.md"):
        if written.parent.name == "docs" and text.exists():
            document.fill(numbers, described, text)


if __name__ == "__main__":
    main()
