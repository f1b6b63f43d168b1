"""Runs the scenarios: rounds of all contenders in turn, so that whatever else the machine does
falls on all of them alike. The order is another each time; the first round is for warming up."""

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
from worker import EXAMPLES, HERE, Worker

#: By scenario, contender and metric, what the rounds came to: times in seconds for one operation,
#: memory in bytes.
Results = dict[str, dict[str, dict[str, list[float]]]]

#: How much of a round is done to warm up.
WARM_UP = 0.25
PER_OPERATION = ("wall", "cpu", "server", "daemons")


@dataclass(frozen=True)
class Effort:
    """How much is measured.

    Attributes:
        rounds: How many are.
        scale: How many operations a round has, as a part of the full number.
        warms_up: Whether there is a round before.
    """

    rounds: int
    scale: float = 1.0
    warms_up: bool = True


def _order(
    scenarios: Sequence[Scenario], effort: Effort
) -> Iterator[tuple[bool, Scenario, int, Contender]]:
    """Whether it counts, what, how many operations, and who."""
    for number in range(0 if effort.warms_up else 1, effort.rounds + 1):
        for scenario in scenarios:
            if scenario.rounds is not None and number > scenario.rounds:
                continue
            who = [contender for contender in CONTENDERS if contender[0] in scenario.kinds]
            count = scenario.scaled(effort.scale * (1 if number else WARM_UP))
            for place in range(len(who)):
                yield number > 0, scenario, count, who[(place + number) % len(who)]


def _keep(
    results: Results, scenario: Scenario, contender: Contender, count: int, found: dict[str, float]
) -> None:
    metrics = results.setdefault(scenario.key, {}).setdefault(key(contender), {})
    for metric, value in found.items():
        each = value / count if metric in PER_OPERATION else value
        metrics.setdefault(metric, []).append(float(f"{each:.5g}"))


def _cores() -> list[int]:
    """Two to pin processes to, if there are."""
    return sorted(os.sched_getaffinity(0))[:2] if hasattr(os, "sched_getaffinity") else []


def _pin(process: int, core: int) -> None:
    for thread in Path(f"/proc/{process}/task").iterdir():
        os.sched_setaffinity(int(thread.name), {core})


@contextmanager
def mock_daemon() -> Iterator[tuple[str, str, int]]:
    """Its control address, its peer id and its process."""
    with tempfile.TemporaryDirectory() as folder:
        control = f"/unix{folder}/control.sock"
        program = [str(EXAMPLES / "mock_daemon"), control]
        with subprocess.Popen(program, stdout=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout is not None
                lines = dict(process.stdout.readline().strip().split(": ") for _ in range(3))
                yield control, lines["Peer ID"], process.pid
            finally:
                process.terminate()


def against_mock(scenarios: Sequence[Scenario], effort: Effort, results: Results) -> None:
    """With the mock daemon at the other end.

    It has a core of its own, and contenders another one, but where the two take turns: then they
    share one. Left to the system, who shares one with whom, and so the cost of waking the other,
    which is several times that of a small operation, would change by the second.
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
                _keep(results, scenario, contender, count, found)


def fresh(scenarios: Sequence[Scenario], effort: Effort, results: Results) -> None:
    """In a new process for each round."""
    with mock_daemon() as (*place, _):
        for counts, scenario, count, contender in _order(scenarios, effort):
            if scenario.command == "import":
                if contender[1] != OURS[1]:
                    continue  # the loops are no part of it
                found = _import(contender[0])
            else:
                worker = Worker(contender, *place)
                found = worker.round(scenario.command, count, *scenario.arguments)
                found["memory"] *= scenario.count / count
                worker.stop()
            if counts:
                _keep(results, scenario, contender, count, found)


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
    """With two real daemons in between, and at the far one a server of the caller's kind: for
    p2pclient ours.

    Args:
        near, far: For callers and servers, the control address of their daemon and the peer id of
            the other.
        daemons: The daemons' processes.
    """
    callers: dict[Contender, Worker] = {}
    servers: dict[Contender, Worker] = {}
    with ExitStack() as stack:
        for counts, scenario, count, contender in _order(scenarios, effort):
            # hivemind's daemon does not know what p2pclient wants of it when that is to serve.
            serving = OURS if contender[0] == "p2pclient" else contender
            proto = "-".join(serving)
            if contender not in callers:
                callers[contender] = Worker(contender, *near)
                stack.callback(callers[contender].stop)
            if serving not in servers:
                servers[serving] = Worker(serving, *far)
                stack.callback(servers[serving].stop)
                servers[serving].tell("serve", proto)
            words: list[object] = [scenario.command, count, *scenario.arguments]
            if scenario.command != "identify":
                suffix = {"ping-pong": "/echo", "framed-echo": "/framed"}.get(scenario.command, "")
                words.append(proto + suffix)
            # What is compared before the first round is not to count among the others' CPU time.
            if not counts or not effort.warms_up:
                callers[contender].round(words[0], scenario.parallel, *words[2:])
            server, daemon = float(servers[serving].tell("cpu")), _cpu(daemons)
            found = callers[contender].round(*words)
            found["daemons"] = _cpu(daemons) - daemon
            if serving == contender and scenario.command != "identify":
                found["server"] = float(servers[serving].tell("cpu")) - server
            if counts:
                _keep(results, scenario, contender, count, found)


def to_json(measured: object) -> str:
    """With the values of a metric in one line, so that files can be compared."""
    text = json.dumps(measured, indent=1)
    return re.sub(r"\[[^][{}]*\]", lambda found: " ".join(found[0].split()), text) + "\n"


def _cpu(processes: Sequence[int]) -> float:
    """The CPU time of processes so far, in seconds: of their threads, which Go keeps."""
    total = 0
    for process in processes:
        for thread in Path(f"/proc/{process}/task").iterdir():
            total += int((thread / "schedstat").read_text().split()[0])
    return total / 1e9
