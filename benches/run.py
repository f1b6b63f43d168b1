"""Measures this package against the bindings it replaces, in one run, on the same two daemons.

Every contender is a process of its own; rounds are interleaved, so that whatever else the machine
does falls on all of them alike. The echo at the other end of streams is the same for all.
Prints medians per operation and the ratio to ours on asyncio, of wall time and of CPU time.

Usage: run.py [--rounds N]
"""

import argparse
import platform
import statistics
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import anyio
import incumbents

from p2pclient_rs import Daemon, Stream, StreamInfo

CONTENDERS = [
    ("ours", "asyncio"),
    ("ours", "uvloop"),
    ("ours", "trio"),
    ("p2pclient", "asyncio"),
    ("p2pclient", "trio"),
    ("hivemind", "asyncio"),
    ("hivemind", "uvloop"),
]
#: How many operations a round has.
SCENARIOS = {"identify": 500, "identify-64": 640, "ping-pong": 500}
DESCRIPTIONS = {
    "identify": "identify, one after another",
    "identify-64": "identify, 64 at once",
    "ping-pong": "ping-pong of 100 bytes over a stream",
}

Times = dict[tuple[str, str, str], list[tuple[float, float]]]


class Worker:
    """A contender's process."""

    def __init__(self, kind: str, loop: str, control: str, peer: str) -> None:
        program = str(Path(__file__).with_name("contender.py"))
        command = [sys.executable, program, kind, loop]
        self.process = subprocess.Popen(
            [*command, control, peer], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        if self._answer() != "ready":
            raise SystemExit(f"{kind} on {loop} did not start")

    def round(self, scenario: str, count: int) -> tuple[float, float]:
        assert self.process.stdin is not None
        print(scenario, count, file=self.process.stdin, flush=True)
        wall, cpu = self._answer().split()
        return float(wall) / count, float(cpu) / count

    def _answer(self) -> str:
        assert self.process.stdout is not None
        answer: str = self.process.stdout.readline()
        return answer.strip()

    def stop(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


async def echo(info: StreamInfo, stream: Stream) -> None:
    async for chunk in stream:
        await stream.send(chunk)


def measure(control: str, peer: str, rounds: int) -> Times:
    times: Times = {}
    with ExitStack() as stack:
        workers = {}
        for kind, loop in CONTENDERS:
            worker = workers[kind, loop] = Worker(kind, loop, control, peer)
            stack.callback(worker.stop)
        for number in range(rounds + 1):
            for scenario, count in SCENARIOS.items():
                for (kind, loop), worker in workers.items():
                    result = worker.round(scenario, count)
                    if number > 0:  # the first is for warming up
                        times.setdefault((scenario, kind, loop), []).append(result)
    return times


def report(times: Times, rounds: int) -> None:
    machine = platform.processor() or platform.machine()
    print(f"{platform.python_implementation()} {platform.python_version()}, {machine}, ", end="")
    print(f"medians of {rounds} interleaved rounds")
    for scenario, count in SCENARIOS.items():
        print(f"\n{DESCRIPTIONS[scenario]} ({count} a round)")
        print(f"{'':22}{'wall us':>9}{'spread':>14}{'CPU us':>9}{'x wall':>8}{'x CPU':>8}")
        base = [statistics.median(t) for t in zip(*times[scenario, "ours", "asyncio"], strict=True)]
        for kind, loop in CONTENDERS:
            walls, cpus = zip(*times[scenario, kind, loop], strict=True)
            wall, cpu = statistics.median(walls), statistics.median(cpus)
            spread = f"{min(walls) * 1e6:.0f}-{max(walls) * 1e6:.0f}"
            print(
                f"{kind + ' on ' + loop:22}{wall * 1e6:9.1f}{spread:>14}{cpu * 1e6:9.1f}"
                f"{wall / base[0]:8.2f}{cpu / base[1]:8.2f}"
            )


async def main(rounds: int) -> None:
    for name in incumbents.WHEELS:
        incumbents.fetch(name)
    async with Daemon() as here, Daemon() as there:
        async with there.client() as server, server.listen():
            await server.stream_handler("echo", echo)
            async with here.client() as client:
                await client.connect(there.peer_id, there.addrs)
            control, peer = str(here.control_maddr), str(there.peer_id)
            report(await anyio.to_thread.run_sync(measure, control, peer, rounds), rounds)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=9)
    anyio.run(main, parser.parse_args().rounds)
