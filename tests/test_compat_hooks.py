"""``compat/`` relies on private parts of CPython, asyncio and hivemind. These work as it assumes.

Each test fails when a new release changes one of them. ``test_install.py``,
``test_hivemind_compat.py`` and ``test_asyncio_streams.py`` test the behaviour that depends on them.
"""

from __future__ import annotations

import asyncio
import gc
import importlib
import inspect
import logging
import multiprocessing.spawn
import os
import runpy
import subprocess
import sys
import threading
import time
from importlib import _bootstrap
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_loader
from pathlib import Path
from textwrap import dedent
from types import ModuleType

import hivemind_tree
import pytest

from p2pclient_rs.compat.bindings import is_being_imported
from p2pclient_rs.compat.hivemind.streams import StreamReader, StreamTransport, StreamWriter

pytestmark = pytest.mark.independent


class SlowLoader(MetaPathFinder, Loader):
    """Imports a module named ``slow``, whose code waits for an event."""

    def __init__(self) -> None:
        self.started, self.go_on = threading.Event(), threading.Event()

    def find_spec(self, fullname: str, path: object, target: object = None) -> ModuleSpec | None:
        return spec_from_loader(fullname, self) if fullname == "slow" else None

    def exec_module(self, module: ModuleType) -> None:
        self.started.set()
        self.go_on.wait(10)
        time.sleep(0.05)
        module.__dict__["done"] = True


def test_lock_of_a_module_waits_for_the_thread_that_imports_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loader = SlowLoader()
    monkeypatch.setattr(sys, "meta_path", [loader, *sys.meta_path])
    thread = threading.Thread(target=importlib.import_module, args=("slow",))
    thread.start()
    try:
        assert loader.started.wait(10)
        module = sys.modules["slow"]
        assert is_being_imported(module)
        loader.go_on.set()
        _bootstrap._lock_unlock_module("slow")  # type: ignore[attr-defined]
        assert module.done
        assert not is_being_imported(module)
    finally:
        loader.go_on.set()
        thread.join()
        sys.modules.pop("slow", None)
    # Returns at once for a module that no thread is importing.
    _bootstrap._lock_unlock_module("not.imported")  # type: ignore[attr-defined]


def test_unset_flag_keeps_asyncio_from_reporting_a_destroyed_pending_task(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def drop_a_task(reports: bool) -> None:
        task = asyncio.get_running_loop().create_task(asyncio.sleep(60))
        await asyncio.sleep(0)
        assert task._log_destroy_pending  # type: ignore[attr-defined]
        task._log_destroy_pending = reports  # type: ignore[attr-defined]

    for reports in (False, True):
        loop = asyncio.new_event_loop()
        with caplog.at_level(logging.ERROR, "asyncio"):
            loop.run_until_complete(drop_a_task(reports))
            loop.close()
            del loop
            gc.collect()
        assert ("was destroyed" in caplog.text) == reports
    caplog.clear()


def test_running_loop_of_asyncio_is_none_outside_of_one() -> None:
    async def running() -> bool:
        return asyncio._get_running_loop() is asyncio.get_running_loop()

    assert asyncio._get_running_loop() is None
    assert asyncio.run(running())


# Public methods that only asyncio calls, or that make no sense for a daemon's stream.
ABSENT = {
    StreamReader: {"feed_data", "feed_eof", "set_exception", "set_transport"},
    StreamWriter: set[str](),
    StreamTransport: {
        "get_protocol",
        "set_protocol",
        "is_reading",
        "pause_reading",
        "resume_reading",
    },
}


@pytest.mark.parametrize("ours", ABSENT)
def test_every_method_of_asyncios_stream_classes_is_overridden(ours: type) -> None:
    # An inherited method would use attributes set by asyncio's __init__, which ours does not call.
    (theirs,) = ours.__bases__
    names = {name for name in dir(theirs) if not name.startswith("_")}
    # StreamWriter gets these two methods from its transport.
    own = {*vars(ours), *({"write", "drain"} if ours is StreamWriter else ())}
    assert names - own == ABSENT[ours]
    special = {"__init__", "__repr__", "__del__", "__aiter__", "__anext__"} & vars(theirs).keys()
    # asyncio's iteration calls readline(), which is overridden.
    assert special - vars(ours).keys() <= {"__aiter__", "__anext__"}


def test_gc_callbacks_receive_the_generation() -> None:
    seen = []

    def callback(phase: str, info: dict[str, int]) -> None:
        seen.append((phase, info["generation"]))

    gc.callbacks.append(callback)
    try:
        gc.collect()
    finally:
        gc.callbacks.remove(callback)
    assert ("start", 2) in seen


def test_preparation_data_of_multiprocessing_is_a_dictionary_sent_before_the_main_module() -> None:
    data = multiprocessing.spawn.get_preparation_data("name")
    assert {"name", "sys_path"} <= data.keys()
    # The child unpickles all of the data before prepare() imports the program's main module.
    source = inspect.getsource(multiprocessing.spawn._main)
    assert source.index("reduction.pickle.load") < source.index("prepare(")


def test_run_module_as_main_takes_a_name_and_alter_argv() -> None:
    parameters = inspect.signature(runpy._run_module_as_main).parameters  # type: ignore[attr-defined]
    assert list(parameters) == ["mod_name", "alter_argv"]


def test_p2p_of_hivemind_has_the_attributes_that_reconnecting_uses(tmp_path: Path) -> None:
    program = """
        import inspect
        from hivemind.p2p.p2p_daemon import P2P
        assert isinstance(inspect.getattr_static(P2P, "create"), classmethod)
        assert "initial_peers" in inspect.signature(P2P.create).parameters
        source = inspect.getsource(P2P)
        for part in ("def _terminate(self)", "self._child", "self._client", "def is_alive(self)",
                     "self.peer_id", "self._terminate()"):
            assert part in source, part
    """
    environment = {**os.environ, "PYTHONPATH": str(hivemind_tree.make(tmp_path))}
    result = subprocess.run(
        [sys.executable, "-c", dedent(program)], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
