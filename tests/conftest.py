"""Event loops, daemons and connected clients for the tests, and the check that nothing is left."""

from __future__ import annotations

import asyncio
import functools
import gc
import inspect
import logging
import os
import threading
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any

import anyio
import get_daemon
import pytest
import support
import uvloop
from daemons.features import FEATURES, State
from support import (
    BACKENDS,
    LAST_WORDS,
    DaemonProcess,
    child_processes,
    eventually,
    open_descriptors,
    remove_directories,
    still_there,
)

from p2pclient_rs import Client

#: How many tests were deselected, by why: see daemons/features.py.
_DESELECTED = pytest.StashKey[Counter[str]]()

#: How long an async test may take, in seconds: none hangs for ever.
LIMIT = 30.0


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--daemon",
        choices=list(get_daemon.KINDS),
        default="hivemind",
        help="which kind of daemon to test on",
    )


def pytest_configure(config: pytest.Config) -> None:
    for marker in (
        "needs(*features): what the daemon must have (daemons/features.py); deselected where not",
        "independent: involves no real daemon, or one of its own choice: run with hivemind's only",
    ):
        config.addinivalue_line("markers", marker)
    support.DEFAULT_KIND = config.getoption("daemon")
    binaries = {kind: str(get_daemon.fetch(kind)) for kind in {"hivemind", support.DEFAULT_KIND}}
    # Of what starts daemons without a DaemonProcess.
    os.environ["P2PD_PATH"] = binaries[support.DEFAULT_KIND]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    lacking = {item: _lacks(item) for item in items}
    if deselected := [item for item in items if lacking[item]]:
        config.hook.pytest_deselected(items=deselected)
        config.stash[_DESELECTED] = Counter(lacking[item] for item in deselected)
        items[:] = [item for item in items if not lacking[item]]
    for item in items:
        if isinstance(item, pytest.Function) and inspect.iscoroutinefunction(item.obj):
            item.obj = _limited(item.obj)


def _lacks(item: pytest.Item) -> str:
    """Why a test is not for the daemon that is tested on, if it is not."""
    if support.DEFAULT_KIND != "hivemind" and item.get_closest_marker("independent"):
        return "independent of the daemon: run with hivemind's"
    for marker in item.iter_markers("needs"):
        for feature in marker.args:
            entry = FEATURES[feature].of(support.DEFAULT_KIND)
            if entry.state is not State.SUPPORTED:
                return f"{feature}: {entry.state.value}"
    return ""


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if deselected := terminalreporter.config.stash.get(_DESELECTED, None):
        terminalreporter.section(f"deselected on the {support.DEFAULT_KIND} daemon")
        for reason, count in sorted(deselected.items()):
            terminalreporter.line(f"{count:5} {reason}")
    if LAST_WORDS:
        terminalreporter.section("daemons that ended by themselves")
    for words in LAST_WORDS:
        terminalreporter.line(words)


def _limited(test: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
    @functools.wraps(test)
    async def run(*args: object, **kwargs: object) -> None:
        with anyio.fail_after(LIMIT):
            await test(*args, **kwargs)

    return run


@pytest.fixture(params=BACKENDS)
def anyio_backend(request: pytest.FixtureRequest) -> Any:
    return request.param


def _threads() -> set[str]:
    # Trio keeps idle worker threads for a while; while one works it has another name.
    return {t.name for t in threading.enumerate() if not t.name.startswith("Trio thread")}


def _pending_tasks() -> list[object]:
    objects = gc.get_objects()
    return [o for o in objects if isinstance(o, asyncio.Task) and not o.done()]


@pytest.fixture(scope="module", autouse=True)
def nothing_is_left() -> Iterator[None]:
    """Fails a module that leaves a descriptor, thread, task, process or socket file behind."""
    uvloop.new_event_loop().close()  # the first loop opens a pipe that the process keeps
    gc.collect()
    before = open_descriptors(), _threads(), child_processes()
    yield
    gc.collect()
    after = open_descriptors(), _threads(), child_processes()
    sockets = remove_directories()
    assert after == before
    assert sockets == []
    assert _pending_tasks() == []


@pytest.fixture
async def _no_task_left(anyio_backend: Any) -> AsyncIterator[None]:
    """The runner cancels what is left when it ends, so that must be looked at before."""
    if anyio_backend[0] == "trio":
        yield  # whose tasks cannot outlive the block they were started in
        return
    yield
    tasks = [task for task in asyncio.all_tasks() if "coro=<TestRunner." not in repr(task)]
    assert tasks == []


@pytest.fixture(autouse=True)
def nothing_goes_wrong_unseen(
    request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture
) -> Iterator[None]:
    """Fails a test that leaves a task, or an exception that the event loop could only log."""
    if "anyio_backend" in request.fixturenames:
        request.getfixturevalue("_no_task_left")
    yield
    records = caplog.get_records("call") + caplog.get_records("setup")
    seen = [r.getMessage() for r in records if r.name == "asyncio" and r.levelno >= logging.WARNING]
    # In asyncio's debug mode a callback that takes long is told, too: that can be the machine.
    assert [words for words in seen if not words.startswith("Executing <")] == []


# --- daemons ---

#: Everything that can be switched on.
FULL = ("-dhtServer", "-pubsub", "-connManager")


@pytest.fixture(scope="module", params=["unix", "tcp"])
def transport(request: pytest.FixtureRequest) -> str:
    """What control sockets and listeners are."""
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def daemons(transport: str) -> Iterator[tuple[DaemonProcess, DaemonProcess]]:
    """Two daemons with everything switched on, which a module's tests share."""
    with (
        DaemonProcess(*FULL, transport=transport) as first,
        DaemonProcess(*FULL, transport=transport) as second,
    ):
        yield first, second


@pytest.fixture(scope="module")
def bare_daemon() -> Iterator[DaemonProcess]:
    """A daemon with nothing switched on."""
    with DaemonProcess() as daemon:
        yield daemon


@dataclass
class Pair:
    """Two listening clients of two daemons that are connected to each other."""

    alice: Client
    bob: Client
    alice_daemon: DaemonProcess
    bob_daemon: DaemonProcess


@pytest.fixture
async def pair(daemons: tuple[DaemonProcess, DaemonProcess]) -> AsyncIterator[Pair]:
    first, second = daemons
    async with first.client() as alice, second.client() as bob, alice.listen(), bob.listen():
        await alice.connect(second.peer_id, second.addrs)
        yield Pair(alice, bob, first, second)
    await still_there(*daemons)


@pytest.fixture
async def dht_pair(pair: Pair) -> Pair:
    """The same, once each has the other in its routing table."""
    await eventually(lambda: pair.alice.dht_get_closest_peers(b"anything"))
    await eventually(lambda: pair.bob.dht_get_closest_peers(b"anything"))
    return pair
