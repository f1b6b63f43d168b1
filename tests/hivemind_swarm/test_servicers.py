"""Servicers on two daemons: calls of every kind, their errors and their cancellation."""

from __future__ import annotations

import asyncio
import gc
import secrets
import weakref
from collections.abc import AsyncIterator as Yields, Awaitable, Callable
from dataclasses import dataclass

# hivemind does not recognise collections.abc.AsyncIterator as a stream.
from typing import Any, AsyncIterator  # noqa: UP035

import pytest
from hivemind.p2p import P2P, P2PContext, P2PDaemonError, P2PHandlerError, ServicerBase
from hivemind.proto.test_pb2 import TestRequest as Request, TestResponse as Response

pytestmark = pytest.mark.anyio

#: The time limit for actions of the other side, in seconds.
SOON = 10


class Part:
    """The state of a round."""


class Numbers(ServicerBase):
    """Methods of each kind: some reply, some fail, and some wait until they are cancelled."""

    def __init__(self) -> None:
        self.entered = asyncio.Event()
        self.cancelled = asyncio.Event()
        self.callers: set[Any] = set()
        self.parts: weakref.WeakSet[Part] = weakref.WeakSet()
        self.queue: weakref.ref[asyncio.Queue[Any]] | None = None

    async def rpc_square(self, request: Request, context: P2PContext) -> Response:
        self.callers.add(context.remote_id)
        return Response(number=request.number**2)

    async def rpc_count(self, request: Request, context: P2PContext) -> AsyncIterator[Response]:
        self.callers.add(context.remote_id)
        for number in range(request.number):
            yield Response(number=number)

    async def rpc_sum(self, requests: AsyncIterator[Request], context: P2PContext) -> Response:
        self.callers.add(context.remote_id)
        return Response(number=sum([request.number async for request in requests]))

    async def rpc_squares(
        self, requests: AsyncIterator[Request], context: P2PContext
    ) -> AsyncIterator[Response]:
        self.callers.add(context.remote_id)
        async for request in requests:
            yield Response(number=request.number**2)

    async def rpc_fail(self, request: Request, _: P2PContext) -> Response:
        raise ValueError(f"unlucky {request.number}")

    async def rpc_fail_later(self, request: Request, _: P2PContext) -> AsyncIterator[Response]:
        yield Response(number=request.number)
        raise ValueError(f"unlucky {request.number}")

    async def rpc_wait(self, request: Request, _: P2PContext) -> Response:
        await self._wait_to_be_cancelled()
        return Response()

    async def rpc_wait_later(self, request: Request, _: P2PContext) -> AsyncIterator[Response]:
        yield Response(number=request.number)
        await self._wait_to_be_cancelled()

    async def rpc_fail_round(
        self, requests: AsyncIterator[Request], context: P2PContext
    ) -> AsyncIterator[Response]:
        part = Part()
        self.parts.add(part)
        # hivemind's queue of received messages.
        self.queue = weakref.ref(requests.ag_frame.f_locals["requests"])  # type: ignore[attr-defined]
        async for request in requests:
            yield Response(number=request.number)
            # In a failed round, the handler waits for parts that never arrive, and the rest of the
            # input fills the queue.
            await asyncio.Event().wait()

    def is_stuck(self) -> bool:
        """Returns whether the input of the last round waits for space in its queue."""
        queue = self.queue() if self.queue is not None else None
        return queue is not None and bool(queue._putters)  # type: ignore[attr-defined]

    async def _wait_to_be_cancelled(self) -> None:
        self.entered.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise


@dataclass
class Call:
    """A servicer, and the stub for calls to it from a client of another daemon."""

    servicer: Numbers
    stub: Any
    server: P2P
    client: P2P
    namespace: str


@pytest.fixture(scope="module")
async def pair(anyio_backend: Any) -> Yields[tuple[P2P, P2P]]:
    server = await P2P.create()
    client = await P2P.create(initial_peers=await server.get_visible_maddrs())
    yield server, client
    await client.shutdown()
    await server.shutdown()


@pytest.fixture
async def call(pair: tuple[P2P, P2P]) -> Yields[Call]:
    server, client = pair
    namespace = secrets.token_hex(4)
    servicer = Numbers()
    await servicer.add_p2p_handlers(server, namespace=namespace)
    stub = Numbers.get_stub(client, server.peer_id, namespace=namespace)
    yield Call(servicer, stub, server, client, namespace)
    await servicer.remove_p2p_handlers(server, namespace=namespace)


async def requests(count: int) -> Yields[Request]:
    for number in range(count):
        yield Request(number=number)


async def numbers(stream: Yields[Response]) -> list[int]:
    return [response.number async for response in stream]


async def assert_gives(ask: Callable[[], Awaitable[Yields[Response]]], expected: list[int]) -> None:
    """Asserts that a call's stream gives these replies. Repeats a call whose stream ended early.

    With either bindings, p2pd sometimes loses data that was written right before a close.
    """
    for _ in range(3):
        got = await numbers(await ask())
        assert got == expected[: len(got)]
        if len(got) == len(expected):
            return
    raise AssertionError(f"cut short three times, at last to {len(got)} of {len(expected)}")


async def test_unary_to_unary(call: Call) -> None:
    responses = await asyncio.gather(
        *(call.stub.rpc_square(Request(number=number)) for number in range(200))
    )
    assert [r.number for r in responses] == [number**2 for number in range(200)]
    assert call.servicer.callers == {call.client.peer_id}


async def test_unary_to_stream(call: Call) -> None:
    await assert_gives(lambda: call.stub.rpc_count(Request(number=500)), list(range(500)))
    assert call.servicer.callers == {call.client.peer_id}


async def test_stream_to_unary(call: Call) -> None:
    assert (await call.stub.rpc_sum(requests(500))).number == sum(range(500))
    assert call.servicer.callers == {call.client.peer_id}


async def test_stream_to_stream(call: Call) -> None:
    squares = [number**2 for number in range(500)]
    await assert_gives(lambda: call.stub.rpc_squares(requests(500)), squares)
    assert call.servicer.callers == {call.client.peer_id}


async def test_stream_handler_replies_while_requests_arrive(call: Call) -> None:
    asked: asyncio.Queue[Request | None] = asyncio.Queue()

    async def ask() -> Yields[Request]:
        while (request := await asked.get()) is not None:
            yield request

    responses = await call.stub.rpc_squares(ask())
    for number in range(20):
        asked.put_nowait(Request(number=number))
        response = await asyncio.wait_for(responses.__anext__(), SOON)
        assert response.number == number**2
    asked.put_nowait(None)
    assert await numbers(responses) == []


async def test_many_streams_at_once(call: Call) -> None:
    async def square_all() -> list[int]:
        have_all = asyncio.Event()

        async def ask() -> Yields[Request]:
            async for request in requests(20):
                yield request
            # When many streams end at once, about one in 1,500 loses the end of its handler's data,
            # with any bindings. So the input ends only once the caller has received everything.
            await have_all.wait()

        responses = await call.stub.rpc_squares(ask())
        squares = [(await responses.__anext__()).number for _ in range(20)]
        have_all.set()
        assert await numbers(responses) == []
        return squares

    results = await asyncio.gather(*(square_all() for _ in range(30)))
    assert results == [[number**2 for number in range(20)]] * 30


async def test_failed_unary_handler_is_an_error_at_the_caller(call: Call) -> None:
    with pytest.raises(P2PHandlerError, match=r"ValueError\('unlucky 13'\)"):
        await call.stub.rpc_fail(Request(number=13))
    assert (await call.stub.rpc_square(Request(number=3))).number == 9


async def test_failed_stream_handler_is_an_error_after_its_replies(call: Call) -> None:
    responses = await call.stub.rpc_fail_later(Request(number=13))
    assert (await responses.__anext__()).number == 13
    with pytest.raises(P2PHandlerError, match="unlucky 13"):
        await responses.__anext__()


async def test_cancelling_a_unary_call_cancels_its_handler(call: Call) -> None:
    task = asyncio.create_task(call.stub.rpc_wait(Request()))
    await asyncio.wait_for(call.servicer.entered.wait(), SOON)
    task.cancel()
    await asyncio.wait_for(call.servicer.cancelled.wait(), SOON)
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_timed_out_unary_call_cancels_its_handler(call: Call) -> None:
    with pytest.raises(asyncio.TimeoutError):
        await call.stub.rpc_wait(Request(), timeout=0.2)
    await asyncio.wait_for(call.servicer.cancelled.wait(), SOON)
    assert (await call.stub.rpc_square(Request(number=3))).number == 9


async def test_closing_a_stream_cancels_its_handler(call: Call) -> None:
    responses = await call.stub.rpc_wait_later(Request(number=7))
    assert (await responses.__anext__()).number == 7
    await asyncio.wait_for(call.servicer.entered.wait(), SOON)
    await responses.aclose()
    await asyncio.wait_for(call.servicer.cancelled.wait(), SOON)


async def test_removed_handler_no_longer_answers(call: Call) -> None:
    assert (await call.stub.rpc_square(Request(number=3))).number == 9
    await call.servicer.remove_p2p_handlers(call.server, namespace=call.namespace)
    with pytest.raises(P2PDaemonError):
        await call.stub.rpc_square(Request(number=3))
    with pytest.raises((P2PDaemonError, ConnectionError, StopAsyncIteration)):
        await (await call.stub.rpc_count(Request(number=3))).__anext__()
    await call.servicer.add_p2p_handlers(call.server, namespace=call.namespace)
    assert (await call.stub.rpc_square(Request(number=3))).number == 9
    await assert_gives(lambda: call.stub.rpc_count(Request(number=3)), [0, 1, 2])


async def test_failed_rounds_are_collected_after_their_callers_leave(
    call: Call,
) -> None:
    loop = asyncio.get_running_loop()
    before, said = loop.get_exception_handler(), []
    # With either bindings, asyncio reports each task that the garbage collector ends.
    loop.set_exception_handler(lambda _, context: said.append(context["message"]))
    gc.collect()
    tasks = len(asyncio.all_tasks())
    for _ in range(5):
        call.servicer.queue = None
        # The input does not fit into the queue, and does not end before the caller disconnects.
        stream = await call.stub.rpc_fail_round(endless_requests())
        async for response in stream:
            assert response.number == 0
            break
        while not call.servicer.is_stuck():
            await asyncio.sleep(0.01)
        await stream.aclose()
        del stream
    deadline = loop.time() + SOON
    while call.servicer.parts or len(asyncio.all_tasks()) > tasks:
        assert loop.time() < deadline, (len(call.servicer.parts), asyncio.all_tasks())
        await asyncio.sleep(0.01)
        gc.collect()
    assert said.count("Task was destroyed but it is pending!") >= 5
    assert (await call.stub.rpc_square(Request(number=3))).number == 9
    # In the next iterations of the loop, asyncio reports that it cannot close the generators.
    for _ in range(10):
        await asyncio.sleep(0)
        gc.collect()
    loop.set_exception_handler(before)


async def endless_requests() -> Yields[Request]:
    number = 0
    while True:
        yield Request(number=number)
        number += 1
        await asyncio.sleep(0)
