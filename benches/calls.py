"""Unary calls: a caller at one daemon, an echo in another process at the other.

A contender is a program for both ends. Measured are the two together, and each as the echo of
the same caller. CPU time is that of the caller's process and of the echo's; the daemons' is in
the wall time alone.
"""

import statistics
from contextlib import ExitStack
from dataclasses import dataclass

from worker import Worker

CONTENDERS = [
    ("ours", "asyncio"),
    ("ours", "uvloop"),
    ("hivemind", "asyncio"),
    ("hivemind", "uvloop"),
]
#: The caller of every echo where those are compared.
CALLER = ("ours", "uvloop")


@dataclass(frozen=True)
class Scenario:
    name: str
    #: Of the payload, in bytes.
    size: int
    #: Calls at once, and in a round.
    parallel: int
    count: int


SCENARIOS = [
    Scenario("unary 1 KiB x64", 1 << 10, 64, 1280),
    Scenario("unary 64 KiB x64", 64 << 10, 64, 320),
    Scenario("unary 1 MiB x1", 1 << 20, 1, 20),
]

Contender = tuple[str, str]
#: Wall time, the caller's CPU time and the echo's, of one call, in seconds.
Result = tuple[float, float, float]
#: Of a scenario, whether the caller is the same for all, and a contender.
Times = dict[tuple[Scenario, bool, Contender], list[Result]]


def measure(near: tuple[str, str], far: tuple[str, str], rounds: int) -> Times:
    """Runs the scenarios.

    Args:
        near, far: For callers and echoes, the control address of their daemon and the peer id of
            the other.
        rounds: How many rounds are measured.
    """
    times: Times = {}
    with ExitStack() as stack:
        callers: dict[Contender, Worker] = {}
        echoes: dict[Contender, Worker] = {}
        for contender in CONTENDERS:
            for workers, place in ((callers, near), (echoes, far)):
                worker = workers[contender] = Worker(*contender, *place)
                stack.callback(worker.stop)
            echoes[contender].tell("serve", protocol(contender))
        for number in range(rounds + 1):
            for scenario in SCENARIOS:
                for same_caller in (False, True):
                    for contender in CONTENDERS:
                        caller = callers[CALLER if same_caller else contender]
                        result = one_round(scenario, caller, echoes[contender], contender)
                        if number > 0:  # the first is for warming up
                            times.setdefault((scenario, same_caller, contender), []).append(result)
    return times


def protocol(contender: Contender) -> str:
    return "-".join(("echo", *contender))


def one_round(scenario: Scenario, caller: Worker, echo: Worker, contender: Contender) -> Result:
    before = float(echo.tell("cpu"))
    wall, cpu = caller.round(
        "unary", scenario.count, protocol(contender), scenario.size, scenario.parallel
    )
    # The caller has checked as many results as it makes calls at once, before it was timed.
    served = scenario.count + scenario.parallel
    return wall, cpu, (float(echo.tell("cpu")) - before) / served


def report(times: Times) -> None:
    """Prints medians, and their ratios to ours on asyncio."""
    for scenario in SCENARIOS:
        for same_caller in (False, True):
            print(f"\n{scenario.name} ({scenario.count} a round)", end="")
            print(f", called by {' on '.join(CALLER)}" if same_caller else "")
            print(f"{'':21}{'wall us':>9}{'spread':>13}{'caller CPU':>12}{'echo CPU':>10}", end="")
            print(f"{'x wall':>8}{'x caller':>10}{'x echo':>8}")
            base = medians(times[scenario, same_caller, CONTENDERS[0]])
            for contender in CONTENDERS:
                results = times[scenario, same_caller, contender]
                wall, cpu, echo = medians(results)
                walls = [result[0] * 1e6 for result in results]
                spread = f"{min(walls):.0f}-{max(walls):.0f}"
                print(
                    f"{' on '.join(contender):21}{wall * 1e6:9.1f}{spread:>13}{cpu * 1e6:12.1f}"
                    f"{echo * 1e6:10.1f}{wall / base[0]:8.2f}{cpu / base[1]:10.2f}"
                    f"{echo / base[2]:8.2f}"
                )


def medians(results: list[Result]) -> Result:
    wall, cpu, echo = (statistics.median(values) for values in zip(*results, strict=True))
    return wall, cpu, echo
