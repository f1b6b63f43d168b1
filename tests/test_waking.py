"""Waking tasks in place on asyncio and uvloop: order, contexts, cancellation, interrupts."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import socket
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from contextvars import ContextVar, copy_context
from pathlib import Path
from typing import Any

import anyio
import pytest
import trio
import trio.testing
import uvloop
from fake_daemon import (
    ERROR,
    IDENTITY,
    OK,
    PATIENCE,
    PEER,
    STREAM_OPENED,
    UPGRADE,
    Connection,
    FakeDaemon,
    daemon_error,
    field,
    frame,
    handler_error,
    honest,
    reply,
    serve_echo,
    unary_echo,
)
from support import BACKENDS, until

from p2pclient_rs import (
    Client,
    ConnectionLost,
    DaemonRefused,
    DaemonUnreachable,
    NotSupported,
    P2PHandlerError,
    PeerID,
    set_inplace_wake,
)
from p2pclient_rs.driver import on_readable, run_ready
from p2pclient_rs.reactor import reactor
from p2pclient_rs.readiness import AsyncioWatch, _on_readable, _on_writable
from p2pclient_rs.wake import first_wake

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.independent,
]

FAKE_PEER = PeerID(PEER)
LOOPS = {False: asyncio.new_event_loop, True: uvloop.new_event_loop}


@pytest.fixture(params=BACKENDS[:2])
def anyio_backend(request: pytest.FixtureRequest) -> Any:
    return request.param  # no trio, which wakes its tasks itself


@pytest.fixture(params=[True, False], ids=["in place", "ordinary"], autouse=True)
def in_place(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Whether tasks are resumed in place."""
    set_inplace_wake(request.param)
    yield request.param
    set_inplace_wake(True)


only_in_place = pytest.mark.parametrize("in_place", [True], ids=["in place"], indirect=True)


class Batches:
    """A daemon that collects a batch of calls, and echoes them in one write on ``answer()``."""

    def __init__(self, *sizes: int) -> None:
        self._sizes = sizes
        self._go_on = threading.Semaphore(0)
        self.sent = threading.Semaphore(0)
        self.arrived = 0

    def __call__(self, connection: Connection) -> None:
        connection.upgrade()
        for size in self._sizes:
            replies = []
            for _ in range(size):
                message = connection.read_message()
                replies.append(frame(reply(message.call_id, message.data)))
                self.arrived += 1
            assert self._go_on.acquire(timeout=PATIENCE)
            connection.send(b"".join(replies))
            self.sent.release()
        connection.wait_closed()

    def answer(self) -> None:
        self._go_on.release()


@asynccontextmanager
async def client_of(batches: Batches) -> AsyncIterator[Client]:
    with FakeDaemon(batches) as fake:
        async with Client(fake.control_maddr) as client:
            await client.unary.open()
            yield client


async def call_echo(client: Client, data: bytes = b"data") -> bytes:
    return await client.call_unary(FAKE_PEER, "echo", data)


async def test_tasks_resume_in_the_order_of_replies_each_in_its_own_context() -> None:
    number: ContextVar[int] = ContextVar("number")
    resumed: list[int] = []

    async def one(n: int) -> None:
        number.set(n)
        task = asyncio.current_task()
        for _ in range(2):
            assert await call_echo(client, b"%d" % n) == b"%d" % n
            assert asyncio.current_task() is task and number.get() == n
            resumed.append(n)

    batches = Batches(10, 10)
    async with client_of(batches) as client:
        tasks = [asyncio.ensure_future(one(n)) for n in range(10)]
        for turn in (1, 2):
            await until(lambda: batches.arrived == 10 * turn)  # noqa: B023
            batches.answer()
            await until(lambda: len(resumed) == 10 * turn)  # noqa: B023
        await asyncio.gather(*tasks)
    assert resumed == 2 * list(range(10))


async def test_woken_task_may_cancel_another_of_the_same_batch() -> None:
    async def first() -> bytes:
        data = await call_echo(client, b"first")
        second.cancel("by the first")
        return data

    batches = Batches(2, 1)
    async with client_of(batches) as client:
        cancels = asyncio.ensure_future(first())
        second = asyncio.ensure_future(call_echo(client, b"second"))
        await until(lambda: batches.arrived == 2)
        batches.answer()
        assert await cancels == b"first"
        with pytest.raises(asyncio.CancelledError):
            await second
        assert client.unary.pending_calls == 0
        batches.answer()
        assert await call_echo(client, b"next") == b"next"


async def test_woken_task_may_close_the_client_and_the_batch_is_still_delivered() -> None:
    async def closes() -> bytes:
        data = await call_echo(client, b"closes")
        client.unary.close()
        return data

    batches = Batches(3)
    async with client_of(batches) as client:
        others = [asyncio.ensure_future(closes())]
        others += [asyncio.ensure_future(call_echo(client, b"%d" % n)) for n in range(2)]
        await until(lambda: batches.arrived == 3)
        batches.answer()
        assert await asyncio.gather(*others) == [b"closes", b"0", b"1"]


async def test_woken_task_that_stops_the_loop_does_not_lose_the_other_replies(
    anyio_backend: Any,
) -> None:
    """The exception stops the loop, and a second run of the loop continues."""

    class Ended(KeyboardInterrupt):
        pass

    client: Any = None
    results: list[Any] = []

    async def ends() -> None:
        await call_echo(client, b"ends")
        raise Ended

    async def begin() -> Client:
        client = Client(fake.control_maddr)
        await client.unary.open()
        return client

    def program() -> None:
        nonlocal client
        loop: asyncio.AbstractEventLoop = LOOPS[anyio_backend[1]["use_uvloop"]]()
        client = loop.run_until_complete(begin())
        first = loop.create_task(ends())
        second = loop.create_task(call_echo(client, b"second"))

        async def both() -> None:
            await until(lambda: batches.arrived == 2)
            batches.answer()
            await asyncio.wait([first, second])

        with pytest.raises(Ended):
            loop.run_until_complete(both())
        results.append(loop.run_until_complete(second))
        results.append(first.exception())
        loop.run_until_complete(client.close())
        loop.close()

    batches = Batches(2)
    with FakeDaemon(batches) as fake:
        await anyio.to_thread.run_sync(program)
    assert results[0] == b"second" and isinstance(results[1], Ended)


async def test_in_wake_batch_is_true_only_for_the_woken_task_in_its_thread(in_place: bool) -> None:
    def elsewhere(function: Any) -> bool:
        answers: list[bool] = []
        thread = threading.Thread(target=lambda: answers.append(function()))
        thread.start()
        thread.join()
        return answers[0]

    async def woken() -> tuple[bool, bool]:
        await call_echo(client)
        return connection.in_wake_batch, elsewhere(lambda: connection.in_wake_batch)

    batches = Batches(1)
    async with client_of(batches) as client:
        connection: Any = client.unary._recent.current  # type: ignore[union-attr]
        task = asyncio.ensure_future(woken())
        await until(lambda: batches.arrived == 1)
        assert not connection.in_wake_batch
        batches.answer()
        assert await task == (in_place, False)
        assert not connection.in_wake_batch


NESTED = """
import asyncio
import {nesting} as nest_asyncio
from p2pclient_rs import Client
nest_asyncio.apply()

async def main():
    async with Client({control!r}) as client:
        peer = (await client.identify()).peer_id
        await client.unary.open()
        _, stream = await client.stream_open(peer, ["/echo"])
        for turn in range(3):
            for operation in (
                lambda: client.identify(),
                lambda: client.call_unary(peer, "echo", b"data"),
                lambda: stream.readexactly(1),
            ):
                await stream.send(b"x")
                await operation()  # this task is woken in place, and now runs the loop itself
                nested = asyncio.wait_for(operation(), {patience})
                asyncio.get_running_loop().run_until_complete(nested)
        stream.close()

asyncio.run(main())
"""


# From Python 3.14 on, asyncio's own wait_for fails under nest_asyncio, but not under its successor.
NESTINGS = ["nest_asyncio2", *(["nest_asyncio"] if sys.version_info < (3, 14) else [])]


@pytest.mark.parametrize("nesting", NESTINGS)
async def test_woken_task_may_run_a_nested_loop_as_notebooks_do(nesting: str) -> None:
    def script(connection: Connection) -> None:
        while not (request := connection.read_request()).startswith(field(1, 2)):  # STREAM_OPEN
            connection.send(frame(OK if request == UPGRADE else IDENTITY))
            if request == UPGRADE:
                serve_echo(connection)
        connection.send(frame(STREAM_OPENED))
        while True:
            connection.send(connection.read(1) * 2)

    with FakeDaemon(script) as fake:
        code = NESTED.format(nesting=nesting, control=fake.control_maddr, patience=PATIENCE / 4)
        ended = await anyio.run_process([sys.executable, "-c", code], check=False)
        assert (ended.returncode, ended.stderr) == (0, b"")


class Interrupted(KeyboardInterrupt):
    """Raised as if by a signal handler."""


class InterruptedLoop(asyncio.SelectorEventLoop):
    """Raises ``Interrupted`` when hashed, which asyncio does to look up the current task."""

    interrupts = False

    def __hash__(self) -> int:
        if self.interrupts:
            raise Interrupted
        return super().__hash__()


@contextmanager
def interrupted_loop() -> Iterator[InterruptedLoop]:
    loop = InterruptedLoop()
    try:
        yield loop
    finally:
        loop.close()


def on_readable_interrupted(loop: InterruptedLoop, connection: Any) -> None:
    """Runs the connection's callback, and interrupts it before any task is woken."""
    loop.interrupts = True
    try:
        with pytest.raises(Interrupted):
            on_readable(connection)
    finally:
        loop.interrupts = False


looked_up = pytest.mark.skipif(sys.version_info >= (3, 14), reason="the loop is not hashed")


@only_in_place
@looked_up
def test_interrupt_before_any_task_is_woken_loses_no_reply() -> None:
    async def program() -> tuple[bytes, bytes]:
        async with client_of(batches) as client:
            pending = asyncio.gather(call_echo(client, b"one"), call_echo(client, b"other"))
            await until(lambda: batches.arrived == 2)
            connection = client.unary._recent.current  # type: ignore[union-attr]
            batches.answer()
            assert batches.sent.acquire(timeout=PATIENCE)  # sent, but not yet read by the loop
            on_readable_interrupted(loop, connection)
            return await asyncio.wait_for(pending, PATIENCE)

    batches = Batches(2)
    with interrupted_loop() as loop:
        assert list(loop.run_until_complete(program())) == [b"one", b"other"]


@only_in_place
@looked_up
def test_interrupt_before_any_task_is_woken_mixes_up_no_replies() -> None:
    def script(connection: Connection) -> None:
        connection.answer(IDENTITY)
        connection.read_request()
        connection.read_request()
        connection.send(frame(IDENTITY) + frame(ERROR))
        sent.release()
        connection.answer(IDENTITY)
        connection.wait_closed()

    async def program(fake: FakeDaemon) -> None:
        async with Client(fake.control_maddr) as client:
            await client.identify()
            tasks = [asyncio.ensure_future(client.identify()) for _ in range(2)]
            await until(lambda: len(fake.requests) == 3)
            connection = client.control.daemon_connector._recent.pipeline  # type: ignore[union-attr]
            assert sent.acquire(timeout=PATIENCE)  # sent, but not yet read by the loop
            on_readable_interrupted(loop, connection)
            assert (await asyncio.wait_for(tasks[0], PATIENCE)).peer_id == FAKE_PEER
            with pytest.raises(DaemonRefused):
                await asyncio.wait_for(tasks[1], PATIENCE)
            assert (await client.identify(timeout=PATIENCE)).peer_id == FAKE_PEER

    sent = threading.Semaphore(0)
    with interrupted_loop() as loop, FakeDaemon(script) as fake:
        loop.run_until_complete(program(fake))


class Interrupting:
    """A connection or readiness that returns one task to wake.

    Raises ``Interrupted`` right after that, and before its first flush.
    """

    def __init__(self, resumed: list[object]) -> None:
        self._work = copy_context(), resumed.append, self
        self.settled: list[bool] = []

    def read(self, ready: list[Any]) -> None:
        ready.append(self._work)
        raise Interrupted

    read_ready = write_ready = read

    def flush(self, now: bool = True) -> None:
        self.settled.append(now)
        if len(self.settled) == 1:
            raise Interrupted

    remove_idle_writer = flush


@pytest.mark.parametrize("run", [on_readable, _on_readable, _on_writable])
async def test_interrupt_between_reading_and_waking_still_wakes_the_task(run: Any) -> None:
    resumed: list[object] = []
    connection = Interrupting(resumed)
    with pytest.raises(Interrupted):
        run(connection)
    assert resumed == [connection]
    if run is on_readable:
        assert connection.settled == [True, True]


async def test_futures_that_hide_their_callbacks_wake_their_tasks_the_ordinary_way() -> None:
    class Shy(asyncio.Future[Any]):
        @property
        def _callbacks(self) -> Any:
            raise RuntimeError("not to be seen")

    class Sticky(asyncio.Future[Any]):
        def remove_done_callback(self, function: Any, /) -> int:
            return 0

    async def program(fake: FakeDaemon) -> None:
        async with Client(fake.control_maddr) as client:
            await client.unary.open()
            for _ in range(3):
                assert (await client.identify(timeout=PATIENCE)).peer_id == FAKE_PEER
                assert await call_echo(client, b"data") == b"data"

    def script(connection: Connection) -> None:
        if connection.number == 1:
            unary_echo(connection)
        else:
            honest(connection)

    class Wrong(asyncio.Future[Any]):
        _callbacks = [(print, copy_context())]

    for kind in (Shy, Sticky, Wrong):

        class Loop(asyncio.SelectorEventLoop):
            def create_future(self) -> asyncio.Future[Any]:
                return kind(loop=self)  # noqa: B023

        def run() -> None:
            loop = Loop()  # noqa: B023
            try:
                loop.run_until_complete(program(fake))  # noqa: B023
            finally:
                loop.close()

        with FakeDaemon(script) as fake:
            await anyio.to_thread.run_sync(run)


def kind_of_wake(loop: asyncio.AbstractEventLoop) -> bool:
    """Returns whether a task of ``loop`` is resumed in the callback that reads its reply."""

    async def program() -> bool:
        async with client_of(batches) as client:
            connection: Any = client.unary._recent.current  # type: ignore[union-attr]

            async def call() -> bool:
                assert await call_echo(client, b"data") == b"data"
                return bool(connection.in_wake_batch)

            task = asyncio.ensure_future(call())
            await until(lambda: batches.arrived == 1)
            batches.answer()
            return await task

    batches = Batches(1)
    try:
        return loop.run_until_complete(program())
    finally:
        loop.close()


def new_loop(anyio_backend: Any) -> asyncio.AbstractEventLoop:
    loop: asyncio.AbstractEventLoop = LOOPS[anyio_backend[1]["use_uvloop"]]()
    return loop


async def test_switch_turns_waking_in_place_off_and_on(anyio_backend: Any) -> None:
    def wakes_in_place() -> bool:
        return kind_of_wake(new_loop(anyio_backend))

    for enabled in (True, False, True):
        set_inplace_wake(enabled)
        assert await anyio.to_thread.run_sync(wakes_in_place) is enabled


@only_in_place
@pytest.mark.parametrize("value", ["0", "1"])
async def test_environment_variable_turns_waking_in_place_off(value: str) -> None:
    program = "import asyncio, test_waking as t; print(t.kind_of_wake(asyncio.new_event_loop()))"
    env = {**os.environ, "P2PCLIENT_RS_INPLACE_WAKE": value}
    folder = Path(__file__).parent
    ended = await anyio.run_process([sys.executable, "-c", program], env=env, cwd=folder)
    assert ended.stdout.decode().strip() == str(value != "0")


def log_of(loop: asyncio.AbstractEventLoop, caplog: pytest.LogCaptureFixture) -> list[str]:
    """Runs a call on ``loop``, which may not resume its task in place; returns the log."""
    with caplog.at_level(logging.DEBUG, "p2pclient_rs.wake"):
        assert not kind_of_wake(loop)
    return [record.message for record in caplog.records if record.name == "p2pclient_rs.wake"]


@only_in_place
async def test_loop_that_fails_the_test_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    class Future(asyncio.Future[Any]):
        _callbacks: Any = None

    class Loop(asyncio.SelectorEventLoop):
        def create_future(self) -> asyncio.Future[Any]:
            return Future(loop=self)

    def run() -> list[str]:
        first = log_of(Loop(), caplog)
        assert log_of(Loop(), caplog) == first
        return first

    (message,) = await anyio.to_thread.run_sync(run)
    assert "Loop" in message and "ordinary way" in message


@only_in_place
async def test_first_wake_that_resumes_no_task_falls_back(caplog: pytest.LogCaptureFixture) -> None:
    """The loop calls the callback again, and then resumes tasks in the ordinary way."""

    class Loop(asyncio.SelectorEventLoop):
        pass

    class Callback:
        """The callback of a task that awaits ``future``. The first call does not resume it."""

        def __init__(self, task: asyncio.Task[None]) -> None:
            self.__self__ = task
            self.calls = 0

        def __call__(self, future: asyncio.Future[None]) -> None:
            self.calls += 1
            if self.calls > 1:
                future.set_result(None)

    async def program() -> None:
        future = asyncio.get_running_loop().create_future()

        async def wait() -> None:
            await future

        task = asyncio.ensure_future(wait())
        await asyncio.sleep(0)
        callback = Callback(task)
        first_wake(asyncio.get_running_loop(), copy_context(), callback, future)
        assert callback.calls == 1
        await asyncio.wait_for(task, PATIENCE)

    def run() -> list[str]:
        loop = Loop()
        with caplog.at_level(logging.DEBUG, "p2pclient_rs.wake"):
            loop.run_until_complete(program())
        loop.close()
        return log_of(Loop(), caplog)

    (message,) = await anyio.to_thread.run_sync(run)
    assert "do not resume tasks" in message


async def test_nested_callback_defers_waking_until_no_task_is_running() -> None:
    """With nest_asyncio the callback can run inside a task, and must not enter another one."""
    batches = Batches(1)
    async with client_of(batches) as client:
        pending = asyncio.ensure_future(call_echo(client, b"nested"))
        await until(lambda: batches.arrived == 1)
        batches.answer()
        connection = client.unary._recent.current  # type: ignore[union-attr]
        assert connection is not None
        while connection.pending:
            on_readable(connection)
            assert not pending.done()
        assert await pending == b"nested"


async def test_tasks_implemented_in_python_are_woken() -> None:
    loop = asyncio.get_running_loop()
    kind: Any = asyncio.tasks._PyTask  # type: ignore[attr-defined]
    batches = Batches(3, 1)
    async with client_of(batches) as client:
        tasks = [kind(call_echo(client, b"%d" % n), loop=loop) for n in range(3)]
        await until(lambda: batches.arrived == 3)
        tasks[1].cancel()
        batches.answer()
        with pytest.raises(asyncio.CancelledError):
            await tasks[1]
        assert [await tasks[0], await tasks[2]] == [b"0", b"2"]
        batches.answer()
        assert await call_echo(client, b"next") == b"next"


async def test_failures_leave_nothing_to_the_garbage_collector() -> None:
    """A traceback holds the frames it passed, so no such frame may hold the exception."""

    def script(connection: Connection) -> None:
        request = connection.read_request()
        if request != UPGRADE:
            while True:
                connection.send(frame(ERROR))
                connection.read_request()
        connection.send(frame(OK))
        while True:
            call_id = connection.read_message().call_id
            connection.send(frame(handler_error(call_id, b"no")))
            call_id = connection.read_message().call_id
            connection.send(frame(daemon_error(call_id, b"no")))

    def closes(connection: Connection) -> None:
        connection.read_request()

    def knows_not(connection: Connection) -> None:
        while connection.read_request() != UPGRADE:
            connection.send(frame(IDENTITY))

    async def fail() -> None:
        for _ in range(100):
            with pytest.raises(P2PHandlerError):
                await call_echo(client)
            with pytest.raises(DaemonRefused):
                await call_echo(client)
            with pytest.raises(DaemonRefused):
                await client.identify()
            with pytest.raises(DaemonUnreachable):
                await unreachable.identify()
            with pytest.raises(ConnectionLost):
                await brief.unary.open()
            with pytest.raises(NotSupported):
                await old.unary.open()

    with FakeDaemon(script) as fake, FakeDaemon(closes) as closing, FakeDaemon(knows_not) as older:
        async with AsyncExitStack() as clients:
            client, brief, old, unreachable = [
                await clients.enter_async_context(Client(maddr))
                for maddr in (
                    fake.control_maddr,
                    closing.control_maddr,
                    older.control_maddr,
                    "/unix/tmp/unreachable.sock",
                )
            ]
            await fail()
            gc.collect()
            gc.disable()
            try:
                await fail()
                assert gc.collect() < 100
            finally:
                gc.enable()


@asynccontextmanager
async def cancelled_waiter(
    dropped: Callable[[AsyncioWatch], object],
) -> AsyncIterator[Any]:
    """A watch with a cancelled waiter; ``dropped`` runs when the cancellation is collected."""

    class Reason:
        def __del__(self) -> None:
            dropped(watch)

    async def wait() -> None:
        await watch.readable()

    near, far = socket.socketpair()
    with near, far:
        watch = AsyncioWatch(asyncio.get_running_loop(), near.fileno())
        task = asyncio.ensure_future(wait())
        await asyncio.sleep(0)
        task.cancel(Reason())
        await asyncio.wait([task])
        del task
        gc.collect()
        yield watch, far
        watch.close()


async def test_watch_may_be_used_while_a_cancelled_waiter_is_dropped() -> None:
    again: list[Any] = []
    async with cancelled_waiter(lambda watch: again.append(watch.readable())) as (watch, far):
        waits = watch.readable()
        assert len(again) == 1
        far.send(b"x")
        await waits
        await again[0]


async def test_wait_on_a_watch_closed_meanwhile_ends_at_once() -> None:
    async with cancelled_waiter(lambda watch: watch.close()) as (watch, _):
        with anyio.fail_after(PATIENCE):
            await watch.readable()


class Settled:
    """A connection that records whether its flush was immediate."""

    def __init__(self) -> None:
        self.now: list[bool] = []

    def flush(self, now: bool) -> None:
        self.now.append(now)


async def test_flush_is_deferred_if_tasks_or_handlers_still_have_to_run() -> None:
    connection: Any = Settled()
    run_ready(connection, [(copy_context(), lambda _: None, None)])
    run_ready(connection, [])  # tasks are woken the ordinary way, as on trio
    run_ready(connection, [(None, lambda: None, ())])  # a handler was started
    assert connection.now == [True, False, False]


async def test_exception_that_stops_the_loop_takes_precedence() -> None:
    def fails() -> None:
        raise ValueError

    def ends() -> None:
        raise KeyboardInterrupt

    connection: Any = Settled()
    for order in ([fails, ends, fails], [ends, fails]):
        with pytest.raises(KeyboardInterrupt):
            run_ready(connection, [(None, function, ()) for function in order])
    with pytest.raises(ValueError):
        run_ready(connection, [(None, fails, ())])


def test_trio_run_outlives_a_wait_for_a_closed_descriptor(caplog: pytest.LogCaptureFixture) -> None:
    async def wait() -> None:
        closed = socket.socket()
        fd = closed.fileno()
        closed.close()
        reactor().event_loop.add_reader(fd, print)
        await trio.testing.wait_all_tasks_blocked()

    trio.run(wait)
    assert "cannot wait for a descriptor" in caplog.text
