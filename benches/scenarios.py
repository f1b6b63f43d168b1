"""What is measured, and on whom."""

from dataclasses import dataclass

#: A client and the loop it runs on. The blocking client has none.
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
    """What people read."""
    kind, loop = contender
    return ", ".join(filter(None, (_NAMES.get(kind, kind), loop)))


def key(contender: Contender) -> str:
    """What it is in JSON."""
    return "/".join(filter(None, contender))


ALL = frozenset(kind for kind, _ in CONTENDERS)
CALLERS = ALL - {"p2pclient"}
#: Those with an event loop.
PYTHON = ALL - {"floor"}


@dataclass(frozen=True)
class Scenario:
    """Something that is measured.

    Attributes:
        key: Its name in JSON and for ``--only``.
        title: What people read.
        command: What contenders are told, with ``count`` and ``arguments``; see contender.py.
        count: How many operations a round has.
        arguments: What else is told.
        kinds: Who can do it.
        rounds: How many are measured at the most.
        metrics: What is measured, the most important first.
        unit: In what times are given, and how many of them are a second.
        parallel: Of what ``count`` is a multiple.
        in_turns: Whether the client and the other end mostly wait for each other, as they do where
            a stream is all there is: its socket holds some 200 KB.
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
        """How many operations a smaller round has."""
        return max(1, round(self.count * scale) // self.parallel) * self.parallel


KIB, MIB = 1 << 10, 1 << 20
GB = ("ms/GB", 1e12)
CHUNK = 256 * KIB


def _unary(what: str, size: int, parallel: int, count: int) -> Scenario:
    sizes = f"{size // KIB} KiB" if size < MIB else f"{size // MIB} MiB"
    callers = what == "unary"
    # The blocking client does not read while it writes, nor does the mock daemon.
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


#: With the mock daemon at the other end.
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

#: In a new process each time.
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

#: With two real daemons in between, and a server like the caller at the other.
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
