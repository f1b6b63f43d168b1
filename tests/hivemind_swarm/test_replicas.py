"""Several processes share one daemon, which balances calls among their handlers."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import textwrap
from collections import Counter
from collections.abc import AsyncIterator as Yields, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, AsyncIterator  # noqa: UP035 - hivemind recognises streams by it

import pytest
from hivemind.p2p import P2P, P2PContext, P2PDaemonError, P2PHandlerError, ServicerBase
from hivemind.proto.runtime_pb2 import Tensor
from hivemind.proto.test_pb2 import TestRequest as Request, TestResponse as Response

from hivemind_swarm.processes import Peer, kill, may_be_cut_short, serving

pytestmark = pytest.mark.anyio

WORKERS = 3
CALLS = 60


class Who(ServicerBase):
    """Replies with the id of its process."""

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
    """A daemon with its own process, and the processes that serve through it."""

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
async def test_calls_are_distributed_over_the_processes(
    setting: Setting, stub: Any, ask: Any
) -> None:
    answers = Counter(await asyncio.gather(*(ask(stub) for _ in range(CALLS))))
    assert {worker.peer_id for worker in setting.workers} == {setting.daemon.peer_id}
    assert answers.keys() == setting.pids
    assert min(answers.values()) >= CALLS // WORKERS // 2, answers


async def test_remaining_processes_answer_when_one_dies(setting: Setting, stub: Any) -> None:
    dead = setting.workers[0].pid
    kill(dead)
    answers: list[int] = []
    while len(answers) < CALLS:
        try:
            # The daemon never answers a call that it passed to a process that died.
            answers.append(await asyncio.wait_for(_ask(stub), 1))
        except (P2PDaemonError, P2PHandlerError, asyncio.TimeoutError):
            answers.clear()  # The daemon has not noticed the death yet.
    assert set(answers) == setting.pids - {dead}


# --- sizes ---

MIB = 1 << 20
#: The daemons' limit and the size of the messages, in bytes.
LARGE, SIZE = 64 * MIB, 8 * MIB


class Answer(ServicerBase):
    """Replies with as many bytes as it received, after checking them."""

    async def rpc_large(self, request: Tensor, _: P2PContext) -> Tensor:
        assert request.buffer == bytes(SIZE)
        return Tensor(buffer=b"x" * len(request.buffer))


async def _answering(p2p: P2P) -> None:
    await Answer().add_p2p_handlers(p2p, balanced=True)


async def test_replica_accepts_messages_up_to_the_daemons_limit(anyio_backend: Any) -> None:
    """``P2P.replicate`` has no argument for a limit, so the replica uses the daemon's limit."""
    creator = await P2P.create(persistent_conn_max_msg_size=LARGE)
    caller = await P2P.create(
        initial_peers=await creator.get_visible_maddrs(), persistent_conn_max_msg_size=LARGE
    )
    with serving(_taking, replicate=creator.daemon_listen_maddr):
        stub = Take.get_stub(caller, creator.peer_id)
        for _ in range(2):
            response = await stub.rpc_take(Tensor(buffer=bytes(SIZE)))
            assert response.number == SIZE
    await caller.shutdown()
    await creator.shutdown()


class Take(ServicerBase):
    """Replies with the number of bytes received."""

    async def rpc_take(self, request: Tensor, _: P2PContext) -> Response:
        return Response(number=len(request.buffer))


async def _taking(p2p: P2P) -> None:
    await Take().add_p2p_handlers(p2p, balanced=True)


async def test_replica_sends_messages_up_to_the_daemons_limit(
    replaced: bool, anyio_backend: Any
) -> None:
    """hivemind's own bindings limit the messages of a replica to 4 MiB."""
    if not replaced:
        pytest.skip("hivemind's own bindings cannot do this")
    creator = await P2P.create(persistent_conn_max_msg_size=LARGE)
    other = await P2P.create(
        initial_peers=await creator.get_visible_maddrs(), persistent_conn_max_msg_size=LARGE
    )
    await Answer().add_p2p_handlers(other)
    with serving(_answering, replicate=creator.daemon_listen_maddr):
        # First a replica replies, then another one calls.
        response = await Answer.get_stub(other, creator.peer_id).rpc_large(
            Tensor(buffer=bytes(SIZE))
        )
        assert response.buffer == b"x" * SIZE
        replica = await P2P.replicate(creator.daemon_listen_maddr)
        response = await Answer.get_stub(replica, other.peer_id).rpc_large(
            Tensor(buffer=bytes(SIZE))
        )
        assert response.buffer == b"x" * SIZE
        await replica.shutdown()
    await other.shutdown()
    await creator.shutdown()


# --- many calls in progress ---


class Slow(ServicerBase):
    """Replies once all calls are in progress."""

    CALLS = 60
    entered = 0

    async def rpc_slow(self, request: Tensor, _: P2PContext) -> Response:
        self.entered += 1
        while self.entered < self.CALLS:
            await asyncio.sleep(0.05)
        return Response(number=len(request.buffer))


async def test_serves_sixty_calls_of_two_mebibytes_at_once(anyio_backend: Any) -> None:
    server = await P2P.create()
    await Slow().add_p2p_handlers(server)
    client = await P2P.create(initial_peers=await server.get_visible_maddrs())
    stub = Slow.get_stub(client, server.peer_id)
    calls = (stub.rpc_slow(Tensor(buffer=bytes(2 * MIB))) for _ in range(Slow.CALLS))
    answers = await asyncio.gather(*calls)
    assert [answer.number for answer in answers] == [2 * MIB] * Slow.CALLS
    await client.shutdown()
    await server.shutdown()


# --- replicas without shutdown ---

PROGRAM = """
import asyncio, gc, os, sys
{install}
from hivemind.p2p import P2P

async def handler(*_):
    await asyncio.sleep(3600)

async def main():
    p2p = await P2P.create()
    replica = await P2P.replicate(p2p.daemon_listen_maddr)
    await replica._client.add_unary_handler("unary", handler)
    if "listening" in sys.argv:
        await replica.add_binary_stream_handler("stream", handler)
        replica._listen_task._log_destroy_pending = False  # hivemind's own task
        for _ in range(3):  # in which it begins
            await asyncio.sleep(0)
    if "at work" in sys.argv:
        other = await P2P.create(initial_peers=await p2p.get_visible_maddrs())
        _, _, writer = await other.call_binary_stream_handler(p2p.peer_id, "stream")
        writer.write(b"x")
        await writer.drain()
        await other.shutdown()
    if "forked" in sys.argv and os.fork() == 0:
        return
    if "dropped" in sys.argv:
        del replica
        gc.collect()
        await asyncio.sleep(0.1)
        gc.collect()
    if "shut down" in sys.argv:
        await p2p.shutdown()
    return p2p

p2p = asyncio.run(main())
"""


@pytest.mark.parametrize(
    "how",
    [
        "dropped",
        "listening,dropped",
        "listening,at work,dropped",
        "listening",
        "listening,at work",
        "listening,shut down",
        "listening,forked",
    ],
)
def test_replica_without_shutdown_prints_nothing(replaced: bool, how: str) -> None:
    install = "import p2pclient_rs; p2pclient_rs.install()" if replaced else ""
    program = textwrap.dedent(PROGRAM).format(install=install)
    done = subprocess.run(
        [sys.executable, "-c", program, *how.split(",")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.stderr, done.returncode) == ("", 0)
