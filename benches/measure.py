"""Runs the scenarios, interleaving the rounds of all contenders so that other load affects them
alike. The order changes with each round; the first round is a warm-up."""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import incumbents
from scenarios import CONTENDERS, OURS, Contender, Scenario, key
from worker import HERE, RELEASE, Worker

#: Scenario → contender → metric → a value for each round. Times are in seconds per operation,
#: memory is in bytes.
Results = dict[str, dict[str, dict[str, list[float]]]]

#: Size of the warm-up, as a fraction of a round.
WARM_UP = 0.25
PER_OPERATION = ("wall", "cpu", "server", "daemons")


@dataclass(frozen=True)
class Effort:
    """How much to measure.

    Attributes:
        rounds: Number of measured rounds.
        scale: Size of a round, as a fraction of the full number of operations.
        warms_up: Whether to run a warm-up round first.
    """

    rounds: int
    scale: float = 1.0
    warms_up: bool = True


def _order(
    scenarios: Sequence[Scenario], effort: Effort
) -> Iterator[tuple[bool, Scenario, int, Contender]]:
    """Yields each round: whether it is measured, scenario, number of operations, contender."""
    for number in range(0 if effort.warms_up else 1, effort.rounds + 1):
        for scenario in scenarios:
            if scenario.rounds is not None and number > scenario.rounds:
                continue
            who = [contender for contender in CONTENDERS if contender[0] in scenario.kinds]
            count = scenario.scaled(effort.scale * (1 if number else WARM_UP))
            for place in range(len(who)):
                yield number > 0, scenario, count, who[(place + number) % len(who)]


def _record(
    results: Results, scenario: Scenario, contender: Contender, count: int, found: dict[str, float]
) -> None:
    metrics = results.setdefault(scenario.key, {}).setdefault(key(contender), {})
    for metric, value in found.items():
        each = value / count if metric in PER_OPERATION else value
        metrics.setdefault(metric, []).append(float(f"{each:.5g}"))


def _cores() -> list[int]:
    """Returns two cores to pin processes to, or fewer if there are not as many."""
    return sorted(os.sched_getaffinity(0))[:2] if hasattr(os, "sched_getaffinity") else []


def _pin(process: int, core: int) -> None:
    for thread in Path(f"/proc/{process}/task").iterdir():
        os.sched_setaffinity(int(thread.name), {core})


@contextmanager
def mock_daemon() -> Iterator[tuple[str, str, int]]:
    """Runs the mock daemon; yields its control address, peer id and process id."""
    with tempfile.TemporaryDirectory() as folder:
        control = f"/unix{folder}/control.sock"
        program = [str(RELEASE / "mock_daemon"), control]
        with subprocess.Popen(program, stdout=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout is not None
                lines = dict(process.stdout.readline().strip().split(": ") for _ in range(3))
                yield control, lines["Peer ID"], process.pid
            finally:
                process.terminate()


def against_mock(scenarios: Sequence[Scenario], effort: Effort, results: Results) -> None:
    """Measures against the mock daemon.

    The daemon and the contenders are pinned to a core each; where they mostly wait for each other,
    they share one. Left to the scheduler, the placement would change from second to second, and
    with it the cost of a wake-up, which is several times that of a small operation.
    """
    cores = _cores()
    with ExitStack() as stack:
        *place, daemon = stack.enter_context(mock_daemon())
        if len(cores) == 2:
            _pin(daemon, cores[0])
        workers: dict[Contender, Worker] = {}
        for counts, scenario, count, contender in _order(scenarios, effort):
            if contender not in workers:
                workers[contender] = Worker(contender, *place)
                stack.callback(workers[contender].stop)
            if len(cores) == 2:
                _pin(workers[contender].process.pid, cores[not scenario.in_turns])
            found = workers[contender].round(scenario.command, count, *scenario.arguments)
            if counts:
                _record(results, scenario, contender, count, found)


def fresh(scenarios: Sequence[Scenario], effort: Effort, results: Results) -> None:
    """Measures each round in a new process."""
    with mock_daemon() as (*place, _):
        for counts, scenario, count, contender in _order(scenarios, effort):
            if scenario.command == "import":
                if contender[1] != OURS[1]:
                    continue  # the event loop makes no difference
                found = _import(contender[0])
            else:
                worker = Worker(contender, *place)
                found = worker.round(scenario.command, count, *scenario.arguments)
                found["memory"] *= scenario.count / count
                worker.stop()
            if counts:
                _record(results, scenario, contender, count, found)


def _import(kind: str) -> dict[str, float]:
    wheel = incumbents.P2PCLIENT if kind == "p2pclient" else incumbents.HIVEMIND
    command = [sys.executable, str(HERE / "importing.py"), kind, str(incumbents.fetch(wheel))]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    wall, cpu = map(float, printed.split())
    return {"wall": wall, "cpu": cpu}


def through_daemons(
    scenarios: Sequence[Scenario],
    effort: Effort,
    results: Results,
    near: tuple[str, str],
    far: tuple[str, str],
    daemons: Sequence[int],
) -> None:
    """Measures through two real daemons. The server is of the caller's kind; for p2pclient, ours.

    Args:
        near, far: For callers and for servers: the control address of their daemon, and the peer
            id of the other one.
        daemons: Process ids of the daemons.
    """
    callers: dict[Contender, Worker] = {}
    servers: dict[Contender, Worker] = {}
    with ExitStack() as stack:
        for counts, scenario, count, contender in _order(scenarios, effort):
            # p2pclient cannot register handlers with hivemind's daemon.
            serving = OURS if contender[0] == "p2pclient" else contender
            proto = "-".join(serving)
            if contender not in callers:
                callers[contender] = Worker(contender, *near)
                stack.callback(callers[contender].stop)
            if serving not in servers:
                servers[serving] = Worker(serving, *far)
                stack.callback(servers[serving].stop)
                servers[serving].send("serve", proto)
            command: list[object] = [scenario.command, count, *scenario.arguments]
            if scenario.command != "identify":
                suffix = {"ping-pong": "/echo", "framed-echo": "/framed"}.get(scenario.command, "")
                command.append(proto + suffix)
            # Keeps the first round's check of the echo out of the measured CPU time.
            if not counts or not effort.warms_up:
                callers[contender].round(command[0], scenario.parallel, *command[2:])
            server, daemon = float(servers[serving].send("cpu")), _cpu(daemons)
            found = callers[contender].round(*command)
            found["daemons"] = _cpu(daemons) - daemon
            if serving == contender and scenario.command != "identify":
                found["server"] = float(servers[serving].send("cpu")) - server
            if counts:
                _record(results, scenario, contender, count, found)


def to_json(measured: object) -> str:
    """Formats results with one line per metric, so that files can be compared with diff."""
    text = json.dumps(measured, indent=1)
    return re.sub(r"\[[^][{}]*\]", lambda found: " ".join(found[0].split()), text) + "\n"


def _cpu(processes: Sequence[int]) -> float:
    """Returns the total CPU time of processes so far, in seconds. Go keeps its threads."""
    total = 0
    for process in processes:
        for thread in Path(f"/proc/{process}/task").iterdir():
            total += int((thread / "schedstat").read_text().split()[0])
    return total / 1e9
