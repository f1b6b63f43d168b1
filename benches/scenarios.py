"""The scenarios and contenders."""

from dataclasses import dataclass

#: Kind of client and event loop. The blocking client has no event loop.
Contender = tuple[str, str]

OURS: Contender = ("ours", "asyncio")
FLOOR: Contender = ("floor", "")
CONTENDERS: tuple[Contender, ...] = (
    OURS,
    ("ours", "uvloop"),
    ("ours", "trio"),
    ("ours-as-hivemind", "asyncio"),
    ("hivemind", "asyncio"),
    ("hivemind", "uvloop"),
    ("p2pclient", "asyncio"),
    ("p2pclient", "trio"),
    FLOOR,
)
HIVEMIND: Contender = ("hivemind", "asyncio")
P2PCLIENT: Contender = ("p2pclient", "asyncio")

_NAMES = {"ours-as-hivemind": "ours as hivemind", "floor": "blocking Rust client"}


def name(contender: Contender) -> str:
    """Returns the name for people."""
    kind, loop = contender
    return ", ".join(filter(None, (_NAMES.get(kind, kind), loop)))


def key(contender: Contender) -> str:
    """Returns the name in JSON."""
    return "/".join(filter(None, contender))


ALL = frozenset(kind for kind, _ in CONTENDERS)
CALLERS = ALL - {"p2pclient"}
#: Contenders with an event loop.
PYTHON = ALL - {"floor"}


@dataclass(frozen=True)
class Scenario:
    """One thing to measure.

    Attributes:
        key: Name in JSON and for ``--only``.
        title: Name for people.
        command: Command for contenders, sent with ``count`` and ``arguments``; see contender.py.
        count: Number of operations in a round.
        arguments: Further arguments of the command.
        kinds: Kinds of contenders that can run it.
        rounds: Maximum number of measured rounds.
        metrics: The metrics, the most important first.
        unit: Unit of times, and its number per second.
        parallel: ``count`` is a multiple of this.
        in_turns: Whether client and daemon mostly wait for each other, as on a single stream, whose
            socket buffers about 200 KB.
    """

    key: str
    title: str
    command: str
    count: int
    arguments: tuple[int, ...] = ()
    kinds: frozenset[str] = ALL
    rounds: int | None = None
    metrics: tuple[str, ...] = ("wall", "cpu", "peak")
    unit: tuple[str, float] = ("us", 1e6)
    parallel: int = 1
    in_turns: bool = False

    def scaled(self, scale: float) -> int:
        """Returns the number of operations in a scaled round."""
        return max(1, round(self.count * scale) // self.parallel) * self.parallel


KIB, MIB = 1 << 10, 1 << 20
GB = ("ms/GB", 1e12)
CHUNK = 256 * KIB


def _unary(what: str, size: int, parallel: int, count: int) -> Scenario:
    sizes = f"{size // KIB} KiB" if size < MIB else f"{size // MIB} MiB"
    callers = what == "unary"
    # Neither the blocking client nor the mock daemon reads while it writes.
    is_blocked = not callers and size * parallel > 128 * KIB
    return Scenario(
        f"{what}-{sizes.replace(' ', '')}-x{parallel}",
        f"unary {sizes} x{parallel}" + ("" if callers else ", as the handler"),
        what,
        count,
        (size, parallel),
        CALLERS - {"floor"} if is_blocked else CALLERS,
        parallel=parallel,
        in_turns=parallel == 1,
    )


#: Against the mock daemon.
MOCK: tuple[Scenario, ...] = (
    Scenario("identify-x1", "identify, one after another", "identify", 3000, (1,), in_turns=True),
    Scenario("identify-x64", "identify, 64 at once", "identify", 6400, (64,), PYTHON, parallel=64),
    _unary("unary", KIB, 1, 5000),
    _unary("unary", KIB, 64, 38400),
    _unary("unary", 64 * KIB, 1, 2000),
    _unary("unary", 64 * KIB, 64, 5120),
    _unary("unary", MIB, 1, 100),
    _unary("unary", MIB, 64, 256),
    _unary("handler", KIB, 1, 5000),
    _unary("handler", KIB, 64, 38400),
    _unary("handler", 64 * KIB, 1, 1000),
    _unary("handler", 64 * KIB, 64, 5120),
    _unary("handler", MIB, 1, 100),
    _unary("handler", MIB, 64, 128),
    Scenario(
        "stall",
        "longest stall of the loop as the handler of 64 KiB x64",
        "stall",
        1280,
        (64 * KIB, 64),
        CALLERS - {"floor"},
        metrics=("stall",),
        unit=("ms", 1e3),
        parallel=64,
    ),
    Scenario("stream-open", "stream_open, and close", "stream-open", 800, in_turns=True),
    Scenario("ping-pong", "ping-pong of 100 B", "ping-pong", 3000, in_turns=True),
    Scenario(
        "readexactly",
        "readexactly of 4 MiB blocks",
        "readexactly",
        60,
        (4 * MIB,),
        in_turns=True,
    ),
    Scenario(
        "framed-read-1MiB",
        "hivemind's framed 1 MiB messages, read",
        "framed-read",
        200,
        (MIB,),
        in_turns=True,
    ),
    Scenario(
        "framed-write-1MiB",
        "hivemind's framed 1 MiB messages, written",
        "framed-write",
        200,
        (MIB,),
        in_turns=True,
    ),
    Scenario(
        "framed-read-100MB",
        "hivemind's framed 100 MB messages, read",
        "framed-read",
        2,
        (100_000_000,),
        rounds=3,
        in_turns=True,
    ),
    Scenario(
        "framed-write-100MB",
        "hivemind's framed 100 MB messages, written",
        "framed-write",
        2,
        (100_000_000,),
        rounds=3,
        in_turns=True,
    ),
    Scenario(
        "bulk-read",
        "bulk read of 1 GiB",
        "bulk-read",
        1 << 30,
        rounds=3,
        unit=GB,
        parallel=CHUNK,
        in_turns=True,
    ),
    Scenario(
        "bulk-write",
        "bulk write of 1 GiB",
        "bulk-write",
        1 << 30,
        rounds=3,
        unit=GB,
        parallel=CHUNK,
        in_turns=True,
    ),
)

#: Each in a new process.
FRESH: tuple[Scenario, ...] = (
    Scenario(
        "import",
        "import",
        "import",
        1,
        kinds=PYTHON,
        metrics=("wall", "cpu"),
        unit=("ms", 1e3),
    ),
    Scenario(
        "memory",
        "memory per 1,000 idle streams",
        "memory",
        1000,
        kinds=PYTHON,
        rounds=3,
        metrics=("memory",),
    ),
)

#: Through two real daemons, to a server of the caller's kind.
DAEMONS: tuple[Scenario, ...] = (
    Scenario("daemons-identify", "identify, one after another", "identify", 500, (1,), PYTHON),
    *(
        Scenario(
            f"daemons-unary-{title.replace(' ', '')}-x{parallel}",
            f"unary {title} x{parallel}",
            "unary",
            count,
            (size, parallel),
            CALLERS - {"floor"},
            parallel=parallel,
        )
        for title, size, parallel, count in (
            ("1 KiB", KIB, 1, 300),
            ("1 KiB", KIB, 64, 1280),
            ("64 KiB", 64 * KIB, 1, 100),
            ("64 KiB", 64 * KIB, 64, 320),
            ("1 MiB", MIB, 1, 12),
            ("1 MiB", MIB, 64, 64),
        )
    ),
    Scenario("daemons-ping-pong", "ping-pong of 100 B", "ping-pong", 500, (), PYTHON),
    Scenario(
        "daemons-framed-echo",
        "hivemind's framed 1 MiB messages, there and back",
        "framed-echo",
        12,
        (MIB,),
        PYTHON,
    ),
)
