"""Fixtures: event loops, daemons, connected clients, and checks that nothing is left behind."""

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
    CRASH_REPORTS,
    DaemonProcess,
    check_running,
    child_processes,
    eventually,
    open_descriptors,
    remove_directories,
    revive,
)

from p2pclient_rs import Client

#: The number of deselected tests by reason; see daemons/features.py.
_DESELECTED = pytest.StashKey[Counter[str]]()

#: Time limit of an async test, in seconds.
LIMIT = 30.0


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--daemon",
        choices=list(get_daemon.KINDS),
        default="hivemind",
        help="kind of daemon to test on",
    )


def pytest_configure(config: pytest.Config) -> None:
    for marker in (
        "needs(*features): runs only if the daemon has these features (daemons/features.py)",
        "daemons(*kinds): runs only on these kinds of daemon",
        "independent: runs once, with hivemind's daemon; uses none, or chooses its own",
    ):
        config.addinivalue_line("markers", marker)
    support.DEFAULT_KIND = config.getoption("daemon")
    binaries = {kind: str(get_daemon.fetch(kind)) for kind in {"hivemind", support.DEFAULT_KIND}}
    # For tests that start daemons without a DaemonProcess.
    os.environ["P2PD_PATH"] = binaries[support.DEFAULT_KIND]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    reasons = {item: _deselect_reason(item) for item in items}
    if deselected := [item for item in items if reasons[item]]:
        config.hook.pytest_deselected(items=deselected)
        config.stash[_DESELECTED] = Counter(reasons[item] for item in deselected)
        items[:] = [item for item in items if not reasons[item]]
    for item in items:
        if isinstance(item, pytest.Function) and inspect.iscoroutinefunction(item.obj):
            item.obj = _limited(item.obj)


def _deselect_reason(item: pytest.Item) -> str:
    """Returns why a test does not apply to the tested daemon, or an empty string."""
    if support.DEFAULT_KIND != "hivemind" and item.get_closest_marker("independent"):
        return "independent of the daemon: run with hivemind's"
    for marker in item.iter_markers("daemons"):
        if support.DEFAULT_KIND not in marker.args:
            return f"about {' and '.join(marker.args)} only"
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
    if CRASH_REPORTS:
        terminalreporter.section("daemons that ended by themselves")
    for report in CRASH_REPORTS:
        terminalreporter.line(report)


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
    # Trio keeps idle worker threads for a while; busy ones are named differently.
    return {t.name for t in threading.enumerate() if not t.name.startswith("Trio thread")}


def _pending_tasks() -> list[object]:
    objects = gc.get_objects()
    return [o for o in objects if isinstance(o, asyncio.Task) and not o.done()]


@pytest.fixture(scope="module", autouse=True)
def fails_on_leaks() -> Iterator[None]:
    """Fails a test module that leaks a descriptor, thread, task, process or socket file."""
    uvloop.new_event_loop().close()  # the first uvloop opens a pipe that stays open
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
    """Fails a test that leaves a task. Checks before the test runner cancels tasks."""
    if anyio_backend[0] == "trio":
        yield  # trio's tasks cannot outlive their nursery
        return
    yield
    tasks = [task for task in asyncio.all_tasks() if "coro=<TestRunner." not in repr(task)]
    assert tasks == []


@pytest.fixture(autouse=True)
def fails_on_logged_errors(
    request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture
) -> Iterator[None]:
    """Fails a test that leaves a task, or makes asyncio log a warning or error."""
    if "anyio_backend" in request.fixturenames:
        request.getfixturevalue("_no_task_left")
    yield
    records = caplog.get_records("call") + caplog.get_records("setup")
    seen = [r.getMessage() for r in records if r.name == "asyncio" and r.levelno >= logging.WARNING]
    # asyncio's debug mode also logs slow callbacks, which a loaded machine can cause.
    assert [message for message in seen if not message.startswith("Executing <")] == []


# --- daemons ---

#: Options that enable every optional service.
FULL = ("-dhtServer", "-pubsub", "-connManager")


@pytest.fixture(scope="module", params=["unix", "tcp"])
def transport(request: pytest.FixtureRequest) -> str:
    """The kind of address of control sockets and listeners."""
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def daemons(transport: str) -> Iterator[tuple[DaemonProcess, DaemonProcess]]:
    """Two daemons with every optional service enabled, shared by a module's tests."""
    with (
        DaemonProcess(*FULL, transport=transport) as first,
        DaemonProcess(*FULL, transport=transport) as second,
    ):
        yield first, second


@pytest.fixture(scope="module")
def bare_daemon() -> Iterator[DaemonProcess]:
    """A daemon with no optional service."""
    with DaemonProcess() as daemon:
        yield daemon


@dataclass
class Pair:
    """Listening clients of two connected daemons."""

    alice: Client
    bob: Client
    alice_daemon: DaemonProcess
    bob_daemon: DaemonProcess


@pytest.fixture
async def pair(daemons: tuple[DaemonProcess, DaemonProcess]) -> AsyncIterator[Pair]:
    first, second = daemons
    revive(first, second)
    async with first.client() as alice, second.client() as bob, alice.listen(), bob.listen():
        await alice.connect(second.peer_id, second.addrs)
        yield Pair(alice, bob, first, second)
    await check_running(*daemons)


@pytest.fixture
async def dht_pair(pair: Pair) -> Pair:
    """A pair whose daemons are in each other's DHT routing tables."""
    await eventually(lambda: pair.alice.dht_get_closest_peers(b"anything"))
    await eventually(lambda: pair.bob.dht_get_closest_peers(b"anything"))
    return pair
