"""The option --bindings, and the check that no test leaves a process behind."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from hivemind_swarm.processes import kill, living_descendants, until

PR_SET_CHILD_SUBREAPER = 36

_reports = pytest.StashKey[list[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--bindings",
        choices=["original", "ours"],
        default="original",
        help="the bindings that hivemind runs on: its own (the default) or those of p2pclient_rs",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_reports] = []
    bindings = config.getoption("--bindings")
    if bindings == "ours":
        import p2pclient_rs

        p2pclient_rs.install()
    module = _bindings_client().__module__
    if module.startswith("p2pclient_rs") != (bindings == "ours"):
        raise pytest.UsageError(
            f"with --bindings={bindings} hivemind's Client is defined in {module}"
        )

    import torch

    # A thread pool in this process would not work in processes forked from it.
    torch.set_num_threads(1)
    # Makes orphans children of this process, so that the check below finds them.
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)


def _bindings_client() -> Any:
    """Returns the class of the clients that hivemind's ``P2P`` makes."""
    from hivemind.p2p import p2p_daemon

    return p2p_daemon.p2pclient.Client


def pytest_report_header(config: pytest.Config) -> str:
    client = _bindings_client()
    bindings = config.getoption("--bindings")
    return f"bindings: {bindings}: hivemind runs on {client.__module__}.{client.__qualname__}"


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if config.stash[_reports]:
        terminalreporter.section(f"measured, bindings {config.getoption('--bindings')}")
    for line in config.stash[_reports]:
        terminalreporter.line(line)


@pytest.fixture
def report(pytestconfig: pytest.Config) -> Callable[[str], None]:
    """Prints a line at the end of the run, for comparing the two bindings."""
    return pytestconfig.stash[_reports].append


@pytest.fixture(scope="session")
def replaced(pytestconfig: pytest.Config) -> bool:
    """Whether hivemind runs on this package's bindings."""
    return bool(pytestconfig.getoption("--bindings") == "ours")


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(("asyncio", {"use_uvloop": False}), id="asyncio"),
        pytest.param(("asyncio", {"use_uvloop": True}), id="uvloop"),
    ],
)
def anyio_backend(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture(scope="module", autouse=True)
def no_process_is_left() -> Iterator[None]:
    """Fails a module if a process that its tests started, directly or not, outlives it."""
    assert living_descendants() == {}
    yield
    gc.collect()
    try:
        until(lambda: not living_descendants(), within=15)
    finally:
        left = living_descendants()
        for pid in left:
            kill(pid)
    assert left == {}
