"""Measures this package against the bindings it replaces, in one run, on the same two daemons.

Every contender is a process of its own; rounds are interleaved, so that whatever else the machine
does falls on all of them alike. The echo at the other end of streams is the same for all.
Prints medians per operation and the ratio to ours on asyncio, of wall time and of CPU time.
Unary calls are measured by calls.py.

Usage: run.py [--rounds N] [--only requests|unary]
"""

import argparse
import platform
import statistics
from contextlib import ExitStack

import anyio
import calls
import incumbents
from worker import Worker

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


def report(times: Times) -> None:
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


async def main(rounds: int, only: str | None) -> None:
    for name in incumbents.WHEELS:
        incumbents.fetch(name)
    machine = platform.processor() or platform.machine()
    print(f"{platform.python_implementation()} {platform.python_version()}, {machine}, ", end="")
    print(f"medians of {rounds} interleaved rounds")
    async with Daemon() as here, Daemon() as there:
        async with there.client() as server, server.listen():
            await server.stream_handler("echo", echo)
            async with here.client() as client:
                await client.connect(there.peer_id, there.addrs)
                # Those daemons end with their last persistent connection.
                await client.unary.open()
                await server.unary.open()
                near = str(here.control_maddr), str(there.peer_id)
                far = str(there.control_maddr), str(here.peer_id)
                if only != "unary":
                    report(await anyio.to_thread.run_sync(measure, *near, rounds))
                if only != "requests":
                    calls.report(await anyio.to_thread.run_sync(calls.measure, near, far, rounds))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", choices=["requests", "unary"])
    arguments = parser.parse_args()
    anyio.run(main, arguments.rounds, arguments.only)
