"""The conftest.py for p2pclient's own tests, whose sdist has none.

run.sh copies this file next to the unmodified tests. It has another name here, so that pytest does
not load it for our own tests.
"""

from __future__ import annotations

import shutil
from typing import Any

import anyio
import pytest

import p2pclient_rs

# p2pclient distinguishes the two kinds of daemon by these names.
_EXECUTABLES = {"go": "p2pd", "js": "jsp2pd"}

_MARKERS = {
    "go_only": "the JavaScript daemon lacks this feature",
    "jsp2pd_probable_bug": "fails on the JavaScript daemon, which is probably to blame",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--daemon", choices=sorted(_EXECUTABLES), default="go", help="which daemon")
    parser.addoption(
        "--incumbent", action="store_true", help="test the original p2pclient, not p2pclient_rs"
    )
    parser.addoption("--uvloop", action="store_true", help="test on uvloop too")
    parser.addoption(
        "--pace",
        type=float,
        default=0.02,
        metavar="SECONDS",
        help="delay before each request",
    )


def pytest_configure(config: pytest.Config) -> None:
    for marker, meaning in _MARKERS.items():
        config.addinivalue_line("markers", f"{marker}: {meaning}")
    if not config.getoption("incumbent"):
        p2pclient_rs.install()


def pytest_report_header(config: pytest.Config) -> str:
    import p2pclient

    executable = _EXECUTABLES[config.getoption("daemon")]
    return f"p2pclient: {p2pclient.__file__}\ndaemon: {shutil.which(executable)}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("daemon") == "js":
        # p2pclient's own CI also leaves the marked tests out. All others must pass.
        others = [item for item in items if any(map(item.get_closest_marker, _MARKERS))]
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if item not in others]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "anyio_backend" in metafunc.fixturenames:
        backends: dict[str, Any] = {
            "asyncio": ("asyncio", {"use_uvloop": False}),
            "trio": ("trio", {}),
        }
        if metafunc.config.getoption("uvloop"):
            backends["uvloop"] = ("asyncio", {"use_uvloop": True})
        metafunc.parametrize(
            "anyio_backend", backends.values(), ids=backends, indirect=True, scope="module"
        )


@pytest.fixture(scope="module")
def anyio_backend(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture(scope="session")
def daemon_executable(pytestconfig: pytest.Config) -> str:
    return _EXECUTABLES[pytestconfig.getoption("daemon")]


@pytest.fixture(autouse=True)
def pace(pytestconfig: pytest.Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Delays every request of this package.

    The tests assume that when one daemon learns of a subscription or a disconnection, its
    neighbours learn of it before the next request. The protocol does not promise that. It
    happens to be true for p2pclient, whose requests take a millisecond or more. Ours take a
    twentieth of that.
    """
    if pytestconfig.getoption("incumbent"):
        return
    from p2pclient_rs.connector import DaemonConnector

    def delayed(send: Any) -> Any:
        async def request(*args: Any, **kwargs: Any) -> Any:
            await anyio.sleep(pytestconfig.getoption("pace"))
            return await send(*args, **kwargs)

        return request

    for name in ("request", "request_stream"):
        monkeypatch.setattr(DaemonConnector, name, delayed(getattr(DaemonConnector, name)))
