"""Queries, which follow each other on one connection: what each is told, and what becomes of the
others when one fails, is given up or loses the connection."""

from __future__ import annotations

import asyncio
import gc
import select
import socket
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest
import uvloop
from fake_daemon import (
    ERROR,
    IDENTITY,
    OK,
    PEER,
    Connection,
    FakeDaemon,
    Script,
    decode,
    field,
    frame,
    honest,
)
from forking import in_child
from support import all_of, open_descriptors, until

from p2pclient_rs import (
    Client,
    ConnectionLost,
    ControlTimeout,
    DaemonRefused,
    DaemonUnreachable,
    ForkedClientError,
    PeerID,
    ProtocolViolation,
)

# Trio's tasks have a connection each.
pytestmark = [
    pytest.mark.anyio,
    pytest.mark.independent,
    pytest.mark.parametrize(
        "anyio_backend",
        [("asyncio", {"use_uvloop": False}), ("asyncio", {"use_uvloop": True})],
        ids=["asyncio", "uvloop"],
    ),
]

FAKE_PEER = PeerID(PEER)

#: Response's field for pubsub.
PUBSUB = 7


def topic_of(request: bytes) -> bytes | None:
    """The topic that a PUBSUB LIST_PEERS is about."""
    query = decode(request).get(8)
    topic = decode(query)[2] if isinstance(query, bytes) else None
    assert not isinstance(topic, int)
    return topic


def answer_to(request: bytes) -> bytes:
    """Peers whose id is the topic's name, or an identity."""
    topic = topic_of(request)
    return IDENTITY if topic is None else OK + field(PUBSUB, field(2, topic))


async def pipelined(client: Client) -> None:
    """Has the client's queries share its only connection from now on."""
    for _ in range(2):
        assert (await client.identify(timeout=10)).peer_id == FAKE_PEER


@asynccontextmanager
async def pipeline(
    script: Script, transport: str = "unix"
) -> AsyncIterator[tuple[Client, FakeDaemon]]:
    """A client of such a daemon whose queries share its only connection."""
    with FakeDaemon(script, transport) as fake:
        async with Client(fake.control_maddr) as client:
            await pipelined(client)
            yield client, fake


async def asks(client: Client, number: int) -> None:
    """Asks what only one answer is right for."""
    topic = f"topic {number}"
    assert await client.pubsub_list_peers(topic) == (PeerID(topic.encode()),)


class Held:
    """Answers at first; then what comes on a connection when so many requests have come."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.requests: list[bytes] = []
        self.complete = threading.Event()
        #: Set unless it is to stop reading first.
        self.go = threading.Event()
        self.go.set()

    def read(self, connection: Connection) -> list[bytes]:
        for _ in range(2):
            connection.answer(IDENTITY)
        self.go.wait()
        while len(self.requests) < self.count:
            self.requests.append(connection.read_request())
        self.complete.set()
        return self.requests


@pytest.fixture
async def left_open() -> AsyncIterator[None]:
    """Afterwards no more descriptors are open than before."""
    before = len(open_descriptors())
    yield
    await until(lambda: len(open_descriptors()) <= before)


async def test_queries_at_once_are_all_sent_before_the_first_is_answered_each_by_its_own() -> None:
    held = Held(200)

    def script(connection: Connection) -> None:
        for request in held.read(connection):
            connection.send(frame(answer_to(request)))
        connection.wait_closed()

    async with pipeline(script) as (client, fake):
        async with anyio.create_task_group() as tasks:
            for number in range(200):
                tasks.start_soon(asks, client, number)
        assert fake.accepted == 1


@pytest.mark.parametrize("transport", ["unix", "tcp"])
async def test_whoever_is_woken_asks_again_and_gets_its_own_answers(transport: str) -> None:
    def script(connection: Connection) -> None:
        while True:
            connection.send(frame(answer_to(connection.read_request())))

    async def ask_often(start: int) -> None:
        for number in range(start, start + 50):
            await asks(client, number)

    async with pipeline(script, transport) as (client, fake):
        async with anyio.create_task_group() as tasks:
            for start in range(0, 3200, 50):
                tasks.start_soon(ask_often, start)
        assert fake.accepted == 1
        assert len(fake.requests) == 2 + 3200


async def test_what_changes_something_never_follows_a_query() -> None:
    held = Held(1)

    def script(connection: Connection) -> None:
        if connection.number > 1:
            return honest(connection)
        held.read(connection)
        changed.wait()
        connection.send(frame(IDENTITY))
        connection.wait_closed()

    changed = threading.Event()
    async with pipeline(script) as (client, fake):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(client.identify)
            await until(held.complete.is_set)
            await client.disconnect(FAKE_PEER, timeout=10)
            changed.set()
        assert fake.accepted == 2


async def test_a_refusal_is_for_the_one_who_asked() -> None:
    held = Held(3)

    def script(connection: Connection) -> None:
        held.read(connection)
        connection.send(frame(IDENTITY) + frame(ERROR) + frame(IDENTITY))
        connection.wait_closed()

    async with pipeline(script) as (client, fake):
        one, refused, other = await all_of(client.identify() for _ in range(3))
        assert isinstance(refused, DaemonRefused)
        assert refused.daemon_message == "no such luck"
        assert refused.request == "IDENTIFY"
        assert one == other != refused
        assert fake.accepted == 1


async def test_one_that_is_given_up_keeps_its_place_and_nobody_is_to_wait_behind_it() -> None:
    held = Held(3)

    def script(connection: Connection) -> None:
        if connection.number > 1:
            while True:
                connection.send(frame(answer_to(connection.read_request())))
        requests = held.read(connection)
        given_up.wait()
        for request in requests:
            connection.send(frame(answer_to(request)))
        closed.append(connection.wait_closed())

    given_up = threading.Event()
    closed: list[bytes] = []
    async with pipeline(script) as (client, fake):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(asks, client, 1)
            await anyio.lowlevel.checkpoint()
            impatient = anyio.create_task_group()
            async with impatient:
                impatient.start_soon(asks, client, 2)
                await anyio.lowlevel.checkpoint()
                tasks.start_soon(asks, client, 3)
                await until(held.complete.is_set)
                impatient.cancel_scope.cancel()
            with anyio.fail_after(10):
                await asks(client, 4)
            assert fake.accepted == 2
            given_up.set()
        # When the last of the others is answered, nothing is to come on it any more.
        await until(lambda: closed == [b""])
        await asks(client, 5)
        assert fake.accepted == 2


async def test_a_connection_on_which_all_gave_up_is_closed_at_once() -> None:
    held = Held(5)

    def script(connection: Connection) -> None:
        if connection.number > 1:
            return honest(connection)
        held.read(connection)
        connection.wait_closed()

    async with pipeline(script) as (client, fake):
        errors = await all_of(client.identify(timeout=0.2) for _ in range(5))
        assert [type(error) for error in errors] == [ControlTimeout] * 5
        await until(lambda: fake.open == 0)
        await pipelined(client)


@pytest.mark.parametrize("partly", [False, True], ids=["before an answer", "in an answer"])
async def test_a_lost_connection_fails_the_query_it_was_at_and_the_rest_are_asked_again(
    partly: bool,
) -> None:
    held = Held(100)

    def script(connection: Connection) -> None:
        if connection.number > 1:
            while True:
                connection.send(frame(answer_to(connection.read_request())))
        requests = held.read(connection)
        for request in requests[:30]:
            connection.send(frame(answer_to(request)))
        if partly:
            connection.send(frame(answer_to(requests[30]))[:-1])

    async with pipeline(script) as (client, fake):
        results = await all_of(asks(client, number) for number in range(100))
        lost = results.pop(30)
        assert isinstance(lost, ConnectionLost) and lost.mid_answer is partly
        assert results == [None] * 99
        assert len(fake.requests) == 2 + 100 + 69


@pytest.mark.parametrize("read", [False, True], ids=["unread", "read"])
async def test_a_connection_lost_in_the_moment_of_use_is_replaced_if_nothing_was_read_of_it(
    read: bool,
) -> None:
    def script(connection: Connection) -> None:
        if connection.number > 1:
            return honest(connection)
        connection.answer(IDENTITY)
        connection.answer(IDENTITY)
        if read:
            connection.read_request()
        else:
            connection.wait_readable()

    async with pipeline(script) as (client, fake):
        (result,) = await all_of([client.identify()])
        assert isinstance(result, ConnectionLost) is read
        await pipelined(client)
        assert fake.accepted == 2


async def test_queries_that_could_not_be_written_are_all_asked_again() -> None:
    def deaf(connection: Connection) -> None:
        if connection.number > 1:
            return honest(connection)
        connection.answer(IDENTITY)
        connection.answer(IDENTITY)
        connection.socket.shutdown(socket.SHUT_RD)  # a unix peer's write fails, its read does not
        stopped.set()
        poll = select.poll()
        poll.register(connection.socket, select.POLLHUP)
        assert poll.poll(10_000)

    stopped = threading.Event()
    async with pipeline(deaf) as (client, fake):
        stopped.wait()
        results = await all_of(client.identify() for _ in range(20))
        assert [identity.peer_id for identity in results] == [FAKE_PEER] * 20  # type: ignore[union-attr]


async def test_a_daemon_that_is_gone_is_an_error_for_each_who_waits(left_open: None) -> None:
    held = Held(20)

    def script(connection: Connection) -> None:
        if connection.number == 1:
            held.read(connection)

    with FakeDaemon(script) as fake:
        client = Client(fake.control_maddr)
        await pipelined(client)
        tasks = [asyncio.ensure_future(client.identify()) for _ in range(20)]
        await until(held.complete.is_set)
    errors = await asyncio.gather(*tasks, return_exceptions=True)
    # Some may have been let in by the daemon that was about to end.
    assert all(isinstance(error, (DaemonUnreachable, ConnectionLost)) for error in errors)
    assert len({id(error) for error in errors}) == 20
    assert {getattr(error, "request", None) for error in errors} == {"IDENTIFY"}
    await client.close()


async def test_an_answer_that_is_none_fails_its_query_and_the_rest_are_asked_again() -> None:
    held = Held(3)

    def script(connection: Connection) -> None:
        if connection.number > 1:
            return honest(connection)
        held.read(connection)
        connection.send(frame(IDENTITY) + frame(b"\xff\xff\xff"))
        connection.wait_closed()

    async with pipeline(script) as (client, fake):
        answered, failed, again = await all_of(client.identify() for _ in range(3))
        assert isinstance(failed, ProtocolViolation)
        assert answered == again != failed
        await pipelined(client)
        assert fake.accepted == 2


async def test_what_comes_unasked_is_nobodys_answer() -> None:
    sent = threading.Event()

    def script(connection: Connection) -> None:
        if connection.number > 1:
            return honest(connection)
        connection.answer(IDENTITY)
        connection.answer(IDENTITY)
        connection.send(frame(ERROR))
        sent.set()
        connection.wait_closed()

    async with pipeline(script) as (client, fake):
        sent.wait()  # and the loop cannot see it before the next is asked
        await pipelined(client)
        assert fake.accepted == 2


async def test_more_than_a_connection_may_have_go_other_ways() -> None:
    held = Held(1024)

    def script(connection: Connection) -> None:
        if connection.number > 1:
            while True:
                connection.send(frame(answer_to(connection.read_request())))
        for request in held.read(connection):
            connection.send(frame(answer_to(request)))
        connection.wait_closed()

    async with pipeline(script) as (client, fake):
        async with anyio.create_task_group() as tasks:
            for number in range(1500):
                tasks.start_soon(asks, client, number)
        assert 1 < fake.accepted <= 9


async def test_a_daemon_that_does_not_read_holds_nothing_up_but_its_queries() -> None:
    names = [f"{number}" * 100_000 for number in range(10)]
    held = Held(10)
    held.go.clear()

    def script(connection: Connection) -> None:
        for request in held.read(connection):
            connection.send(frame(OK + field(PUBSUB, field(2, request[-4:]))))
        connection.wait_closed()

    async with pipeline(script) as (client, fake):
        tasks = [asyncio.ensure_future(client.pubsub_list_peers(name)) for name in names]
        for _ in range(20):
            await asyncio.sleep(0)  # the loop goes on
        assert not any(task.done() for task in tasks)
        held.go.set()
        answers = await asyncio.gather(*tasks)
        assert answers == [(PeerID(name[-4:].encode()),) for name in names]


async def test_closing_lets_queries_in_flight_finish_and_keeps_no_connection() -> None:
    held = Held(10)

    def script(connection: Connection) -> None:
        for request in held.read(connection):
            go.wait()
            connection.send(frame(answer_to(request)))
        connection.wait_closed()

    go = threading.Event()
    with FakeDaemon(script) as fake:
        client = Client(fake.control_maddr)
        await pipelined(client)
        async with anyio.create_task_group() as tasks:
            for number in range(10):
                tasks.start_soon(asks, client, number)
            await until(held.complete.is_set)
            await client.close()
            go.set()
        await until(lambda: fake.open == 0)


async def test_a_client_that_is_dropped_closes_its_connection(left_open: None) -> None:
    with FakeDaemon(honest) as fake:
        client = Client(fake.control_maddr)
        await pipelined(client)
        await pipelined(client)
        del client
        gc.collect()
        await until(lambda: fake.open == 0)


async def test_a_client_that_is_dropped_in_another_thread_closes_its_connection() -> None:
    with FakeDaemon(honest) as fake:
        holds = [Client(fake.control_maddr)]
        await pipelined(holds[0])
        await anyio.to_thread.run_sync(holds.clear)
        gc.collect()
        await until(lambda: fake.open == 0)


@pytest.mark.parametrize("waiting", [False, True], ids=["idle", "with queries under way"])
def test_a_loop_that_ends_takes_its_connection_with_it(anyio_backend: Any, waiting: bool) -> None:
    def new_loop() -> asyncio.AbstractEventLoop:
        uv = anyio_backend[1]["use_uvloop"]
        return uvloop.new_event_loop() if uv else asyncio.new_event_loop()

    held = Held(3)

    def script(connection: Connection) -> None:
        if connection.number > 1:
            return honest(connection)
        held.read(connection)
        connection.wait_closed()

    async def leaves(client: Client) -> None:
        await pipelined(client)
        if waiting:
            tasks = [asyncio.ensure_future(client.identify()) for _ in range(3)]
            await until(held.complete.is_set)
            for task in tasks:
                task.add_done_callback(lambda task: task.cancelled() or task.exception())

    async def closed(_: Client) -> None:
        await until(lambda: fake.open == 0)

    with FakeDaemon(script) as fake:
        client = Client(fake.control_maddr)
        for run in (leaves, pipelined, Client.close, closed):
            loop = new_loop()
            loop.run_until_complete(run(client))
            for task in asyncio.all_tasks(loop):
                task._log_destroy_pending = False  # type: ignore[attr-defined]
            loop.close()


async def test_connections_of_those_who_gave_up_are_bounded() -> None:
    def deaf_after(count: int) -> Script:
        def script(connection: Connection) -> None:
            for _ in range(count):
                connection.answer(IDENTITY)
            connection.wait_closed()

        return script

    # Each has an answer for whoever makes it idle, and never one for those who share it.
    with FakeDaemon(deaf_after(1)) as fake:
        async with Client(fake.control_maddr) as client, anyio.create_task_group() as tasks:
            for _ in range(20):
                with anyio.move_on_after(0.05):
                    await client.identify()  # makes an idle connection, if it may
                tasks.start_soon(client.identify)
                with anyio.move_on_after(0.05):
                    await client.identify()
            await until(lambda: fake.open <= 8 + 8)
            tasks.cancel_scope.cancel()
        await until(lambda: fake.open == 0)


def test_what_was_idle_is_refused_in_a_forked_child_as_the_clients(anyio_backend: Any) -> None:
    with FakeDaemon(honest) as fake:
        loop = asyncio.new_event_loop()
        client = Client(fake.control_maddr)
        loop.run_until_complete(client.identify())

        def use() -> None:
            with pytest.raises(ForkedClientError, match="this client belongs to process"):
                loop.run_until_complete(client.identify())

        asyncio.run(in_child(use))
        loop.run_until_complete(client.identify())
        assert fake.accepted == 1
        loop.run_until_complete(client.close())
        loop.close()
