"""Several processes that share one daemon, their handlers balanced by it."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import AsyncIterator as Yields, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, AsyncIterator  # noqa: UP035 - hivemind takes no other for a stream

import pytest
from hivemind.p2p import P2P, P2PContext, P2PDaemonError, P2PHandlerError, ServicerBase
from hivemind.proto.test_pb2 import TestRequest as Request, TestResponse as Response

from hivemind_swarm.processes import Peer, kill, may_be_cut_short, serving

pytestmark = pytest.mark.anyio

WORKERS = 3
CALLS = 60


class Who(ServicerBase):
    """Tells which process answers."""

    async def rpc_unary(self, request: Request, _: P2PContext) -> Response:
        return Response(number=os.getpid())

    async def rpc_stream(
        self, requests: AsyncIterator[Request], _: P2PContext
    ) -> AsyncIterator[Response]:
        async for _request in requests:
            yield Response(number=os.getpid())


async def _nothing(p2p: P2P) -> None:
    pass


async def _balanced(p2p: P2P) -> None:
    await Who().add_p2p_handlers(p2p, balanced=True)


@dataclass
class Setting:
    """A daemon with a process of its own, and the processes that serve on it."""

    daemon: Peer
    workers: list[Peer]

    @property
    def pids(self) -> set[int]:
        return {worker.pid for worker in self.workers}


@pytest.fixture
def setting() -> Iterator[Setting]:
    with ExitStack() as stack:
        daemon = stack.enter_context(serving(_nothing))
        workers = [
            stack.enter_context(serving(_balanced, replicate=daemon.control_maddr))
            for _ in range(WORKERS)
        ]
        yield Setting(daemon, workers)


@pytest.fixture
async def stub(setting: Setting, anyio_backend: Any) -> Yields[Any]:
    client = await P2P.create(initial_peers=setting.daemon.maddrs)
    yield Who.get_stub(client, setting.daemon.peer_id)
    await client.shutdown()


async def _ask(stub: Any) -> int:
    return int((await stub.rpc_unary(Request())).number)


async def _ask_twice(stub: Any) -> int:
    async def requests() -> Yields[Request]:
        yield Request()
        yield Request()

    first, second = [r.number async for r in await stub.rpc_stream(requests())]
    assert first == second
    return int(first)


@may_be_cut_short
@pytest.mark.parametrize("ask", [_ask, _ask_twice], ids=["unary", "stream"])
async def test_calls_are_spread_over_the_processes(setting: Setting, stub: Any, ask: Any) -> None:
    answers = Counter(await asyncio.gather(*(ask(stub) for _ in range(CALLS))))
    assert {worker.peer_id for worker in setting.workers} == {setting.daemon.peer_id}
    assert answers.keys() == setting.pids
    assert min(answers.values()) >= CALLS // WORKERS // 2, answers


async def test_the_others_answer_when_a_process_dies(setting: Setting, stub: Any) -> None:
    dead = setting.workers[0].pid
    kill(dead)
    answers: list[int] = []
    while len(answers) < CALLS:
        try:
            # The daemon never answers a call that it gave to a process that died.
            answers.append(await asyncio.wait_for(_ask(stub), 1))
        except (P2PDaemonError, P2PHandlerError, asyncio.TimeoutError):
            answers.clear()  # it has not noticed yet
    assert set(answers) == setting.pids - {dead}
