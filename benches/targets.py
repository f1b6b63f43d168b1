"""Performance targets: for ours on asyncio, against the mock daemon."""

from dataclasses import dataclass

from scenarios import HIVEMIND, P2PCLIENT, Contender


@dataclass(frozen=True)
class Target:
    """The targets of one scenario.

    Attributes:
        scenario: Key of the scenario.
        least: Minimum speed-up, and over which contender.
        aim: Desired speed-up, and over which contender.
        floor: Maximum ratio to the blocking client.
        metric: The metric to compare.
    """

    scenario: str
    least: tuple[Contender, float]
    aim: tuple[Contender, float] | None = None
    floor: float | None = None
    metric: str = "wall"


def _hivemind(scenario: str, least: float, aim: float, floor: float | None = None) -> Target:
    return Target(scenario, (HIVEMIND, least), (HIVEMIND, aim), floor)


def _p2pclient(scenario: str, least: float, aim: float, floor: float | None = None) -> Target:
    return Target(scenario, (P2PCLIENT, least), (P2PCLIENT, aim), floor)


TARGETS = (
    _p2pclient("identify-x1", 5, 8, 2.5),
    _p2pclient("identify-x64", 8, 12),
    _hivemind("unary-1KiB-x64", 9, 12, 2),
    _hivemind("unary-1KiB-x1", 3.4, 5, 2),
    _hivemind("unary-64KiB-x64", 5, 6, 2),
    _hivemind("unary-1MiB-x1", 5, 6, 1.3),
    _hivemind("unary-1MiB-x64", 7, 8, 1.6),
    _hivemind("handler-1KiB-x64", 6, 10),
    _p2pclient("stream-open", 4, 6, 3),
    _hivemind("ping-pong", 1.8, 2.5, 2.5),
    _hivemind("readexactly", 3.3, 5, 1.3),
    _hivemind("framed-read-1MiB", 2, 3),
    _hivemind("framed-write-1MiB", 2, 3),
    Target("bulk-read", (HIVEMIND, 2), (P2PCLIENT, 1), 1.3, "cpu"),
    Target("bulk-write", (HIVEMIND, 1), (P2PCLIENT, 2), 1.3, "cpu"),
    Target("stall", (HIVEMIND, 1), metric="stall"),
)
