"""How tasks on asyncio and uvloop are woken by what came: where the loop says so, as themselves."""

from __future__ import annotations

import asyncio
import gc
import socket
import threading
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from contextvars import ContextVar, copy_context
from typing import Any

import anyio
import pytest
import uvloop
from fake_daemon import (
    ERROR,
    IDENTITY,
    OK,
    PATIENCE,
    PEER,
    UPGRADE,
    Connection,
    FakeDaemon,
    daemon_error,
    frame,
    handler_error,
    reply,
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
)
from p2pclient_rs.loops import AsyncioWatch, carry_out, pump

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.independent,
]

FAKE_PEER = PeerID(PEER)
LOOPS = {False: asyncio.new_event_loop, True: uvloop.new_event_loop}


@pytest.fixture(params=BACKENDS[:2])
def anyio_backend(request: pytest.FixtureRequest) -> Any:
    return request.param  # trio wakes its tasks itself


class Batches:
    """A daemon that answers calls with their data, so many in one write, when it is told to."""

    def __init__(self, *sizes: int) -> None:
        self._sizes = sizes
        self._go_on = threading.Semaphore(0)
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
        connection.wait_closed()

    def answer(self) -> None:
        self._go_on.release()


@asynccontextmanager
async def client_of(batches: Batches) -> AsyncIterator[Client]:
    with FakeDaemon(batches) as fake:
        async with Client(fake.control_maddr) as client:
            await client.unary.open()
            yield client


async def ask(client: Client, data: bytes = b"data") -> bytes:
    return await client.call_unary(FAKE_PEER, "echo", data)


async def test_tasks_go_on_in_the_order_of_their_replies_each_in_its_own_context() -> None:
    number: ContextVar[int] = ContextVar("number")
    went_on: list[int] = []

    async def one(n: int) -> None:
        number.set(n)
        task = asyncio.current_task()
        for _ in range(2):
            assert await ask(client, b"%d" % n) == b"%d" % n
            assert asyncio.current_task() is task and number.get() == n
            went_on.append(n)

    batches = Batches(10, 10)
    async with client_of(batches) as client:
        tasks = [asyncio.ensure_future(one(n)) for n in range(10)]
        for turn in (1, 2):
            await until(lambda: batches.arrived == 10 * turn)  # noqa: B023
            batches.answer()
            await until(lambda: len(went_on) == 10 * turn)  # noqa: B023
        await asyncio.gather(*tasks)
    assert went_on == 2 * list(range(10))


async def test_a_task_that_was_woken_cancels_one_whose_reply_came_with_its_own() -> None:
    async def first() -> bytes:
        data = await ask(client, b"first")
        second.cancel("by the first")
        return data

    batches = Batches(2, 1)
    async with client_of(batches) as client:
        cancels = asyncio.ensure_future(first())
        second = asyncio.ensure_future(ask(client, b"second"))
        await until(lambda: batches.arrived == 2)
        batches.answer()
        assert await cancels == b"first"
        with pytest.raises(asyncio.CancelledError):
            await second
        assert client.unary.pending_calls == 0
        batches.answer()
        assert await ask(client, b"next") == b"next"


async def test_a_task_that_was_woken_closes_the_client_and_the_others_have_their_replies() -> None:
    async def closes() -> bytes:
        data = await ask(client, b"closes")
        client.unary.close()
        return data

    batches = Batches(3)
    async with client_of(batches) as client:
        others = [asyncio.ensure_future(closes())]
        others += [asyncio.ensure_future(ask(client, b"%d" % n)) for n in range(2)]
        await until(lambda: batches.arrived == 3)
        batches.answer()
        assert await asyncio.gather(*others) == [b"closes", b"0", b"1"]


async def test_what_a_woken_task_ends_the_loop_with_does_not_keep_the_others_from_their_replies(
    anyio_backend: Any,
) -> None:
    """As in a program: the loop ends, and another run of it goes on."""

    class Ended(KeyboardInterrupt):
        pass

    client: Any = None
    results: list[Any] = []

    async def ends() -> None:
        await ask(client, b"ends")
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
        second = loop.create_task(ask(client, b"second"))

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


async def test_what_a_loop_calls_within_a_task_wakes_the_others_when_that_is_possible() -> None:
    """As nest_asyncio has it: the callback finds a task running, and no other may be entered."""
    batches = Batches(1)
    async with client_of(batches) as client:
        asked = asyncio.ensure_future(ask(client, b"nested"))
        await until(lambda: batches.arrived == 1)
        batches.answer()
        connection = client.unary._recent.current  # type: ignore[union-attr]
        assert connection is not None
        while connection.pending:
            pump(connection)
            assert not asked.done()
        assert await asked == b"nested"


async def test_tasks_written_in_python_are_woken_as_well() -> None:
    loop = asyncio.get_running_loop()
    kind: Any = asyncio.tasks._PyTask  # type: ignore[attr-defined]
    batches = Batches(3, 1)
    async with client_of(batches) as client:
        tasks = [kind(ask(client, b"%d" % n), loop=loop) for n in range(3)]
        await until(lambda: batches.arrived == 3)
        tasks[1].cancel()
        batches.answer()
        with pytest.raises(asyncio.CancelledError):
            await tasks[1]
        assert [await tasks[0], await tasks[2]] == [b"0", b"2"]
        batches.answer()
        assert await ask(client, b"next") == b"next"


async def test_failures_leave_nothing_to_the_garbage_collector() -> None:
    """An exception has the frames that it passed, and none of them may have it."""

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
                await ask(client)
            with pytest.raises(DaemonRefused):
                await ask(client)
            with pytest.raises(DaemonRefused):
                await client.identify()
            with pytest.raises(DaemonUnreachable):
                await nobody.identify()
            with pytest.raises(ConnectionLost):
                await brief.unary.open()
            with pytest.raises(NotSupported):
                await old.unary.open()

    with FakeDaemon(script) as fake, FakeDaemon(closes) as closing, FakeDaemon(knows_not) as older:
        async with AsyncExitStack() as clients:
            client, brief, old, nobody = [
                await clients.enter_async_context(Client(maddr))
                for maddr in (
                    fake.control_maddr,
                    closing.control_maddr,
                    older.control_maddr,
                    "/unix/tmp/nobody.sock",
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


async def test_who_waited_in_vain_is_dropped_where_a_watch_may_be_used() -> None:
    class Reason:
        def __del__(self) -> None:
            again.append(watch.readable())

    async def wait() -> None:
        await watch.readable()

    again: list[Any] = []
    near, far = socket.socketpair()
    with near, far:
        watch = AsyncioWatch(asyncio.get_running_loop(), near.fileno())
        task = asyncio.ensure_future(wait())
        await asyncio.sleep(0)
        task.cancel(Reason())
        await asyncio.wait([task])
        del task
        gc.collect()
        waits = watch.readable()
        assert len(again) == 1
        far.send(b"x")
        await waits
        await again[0]
        watch.close()


class Settled:
    """Of a persistent connection, what is done last: whether at once."""

    def __init__(self) -> None:
        self.now: list[bool] = []

    def settle(self, now: bool) -> None:
        self.now.append(now)


async def test_what_is_sent_waits_for_those_who_go_on_later() -> None:
    connection: Any = Settled()
    carry_out(connection, [(copy_context(), lambda _: None, None)])
    carry_out(connection, [])  # all were woken in another way, as on trio
    carry_out(connection, [(None, lambda: None, ())])  # a handler is at work
    assert connection.now == [True, False, False]


async def test_what_ends_the_loop_is_raised_whatever_else_is() -> None:
    def fails() -> None:
        raise ValueError

    def ends() -> None:
        raise KeyboardInterrupt

    connection: Any = Settled()
    for order in ([fails, ends, fails], [ends, fails]):
        with pytest.raises(KeyboardInterrupt):
            carry_out(connection, [(None, function, ()) for function in order])
    with pytest.raises(ValueError):
        carry_out(connection, [(None, fails, ())])
