"""Pipelined queries: each gets its own reply.

A query that fails, is cancelled or loses the connection does not fail the others.
"""

from __future__ import annotations

import asyncio
import gc
import select
import socket
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest
import trio
import uvloop
from fake_daemon import (
    ERROR,
    IDENTITY,
    OK,
    PATIENCE,
    PEER,
    Connection,
    FakeDaemon,
    Script,
    by_connection,
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

pytestmark = [pytest.mark.anyio, pytest.mark.independent]

FAKE_PEER = PeerID(PEER)

#: The number of the field ``pubsub`` in Response.
PUBSUB = 7


def topic_of(request: bytes) -> bytes | None:
    """Returns the topic of a PUBSUB LIST_PEERS request; None for other requests."""
    query = decode(request).get(8)
    topic = decode(query)[2] if isinstance(query, bytes) else None
    assert not isinstance(topic, int)
    return topic


def answer_to(request: bytes) -> bytes:
    """Answers LIST_PEERS with a peer whose id is the topic, and IDENTIFY with an identity."""
    topic = topic_of(request)
    return IDENTITY if topic is None else OK + field(PUBSUB, field(2, topic))


def answers(connection: Connection) -> None:
    """Answers every request by ``answer_to``."""
    while True:
        connection.send(frame(answer_to(connection.read_request())))


def first_connection(script: Script) -> Script:
    """Runs the script on the first connection, and ``answers`` on further ones."""
    return by_connection(script, then=answers)


async def enter_pipeline(client: Client) -> None:
    """Makes the client's queries share its only connection from then on."""
    for _ in range(2):
        assert (await client.identify(timeout=10)).peer_id == FAKE_PEER


@asynccontextmanager
async def pipeline(
    script: Script, transport: str = "unix"
) -> AsyncIterator[tuple[Client, FakeDaemon]]:
    """A client of a scripted daemon, whose queries share its only connection."""
    with FakeDaemon(script, transport) as fake:
        async with Client(fake.control_maddr) as client:
            await enter_pipeline(client)
            yield client, fake


async def assert_own_reply(client: Client, number: int) -> None:
    """Sends a query to which only one reply is correct."""
    topic = f"topic {number}"
    assert await client.pubsub_list_peers(topic) == (PeerID(topic.encode()),)


class Held:
    """Answers two requests, and then holds back replies until ``count`` requests have arrived."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.requests: list[bytes] = []
        self.complete = threading.Event()
        #: Clear it to stop reading first.
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
async def no_descriptor_left() -> AsyncIterator[None]:
    """Checks that the test leaves no descriptor open."""
    before = len(open_descriptors())
    yield
    await until(lambda: len(open_descriptors()) <= before)


async def test_concurrent_queries_are_pipelined_and_get_their_own_replies() -> None:
    held = Held(200)

    def script(connection: Connection) -> None:
        for request in held.read(connection):
            connection.send(frame(answer_to(request)))
        connection.wait_closed()

    async with pipeline(script) as (client, fake):
        async with anyio.create_task_group() as tasks:
            for number in range(200):
                tasks.start_soon(assert_own_reply, client, number)
        assert fake.accepted == 1


@pytest.mark.parametrize("transport", ["unix", "tcp"])
async def test_woken_tasks_send_further_queries_and_get_their_own_replies(transport: str) -> None:
    def script(connection: Connection) -> None:
        while True:
            connection.send(frame(answer_to(connection.read_request())))

    async def ask_often(start: int) -> None:
        for number in range(start, start + 50):
            await assert_own_reply(client, number)

    async with pipeline(script, transport) as (client, fake):
        async with anyio.create_task_group() as tasks:
            for start in range(0, 3200, 50):
                tasks.start_soon(ask_often, start)
        assert fake.accepted == 1
        assert len(fake.requests) == 2 + 3200


async def test_requests_with_side_effects_are_never_pipelined() -> None:
    held = Held(1)

    @by_connection
    def script(connection: Connection) -> None:
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


async def test_refusal_fails_only_its_query() -> None:
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


async def test_cancelled_query_keeps_its_place_and_new_ones_use_another_connection() -> None:
    held = Held(3)

    @first_connection
    def script(connection: Connection) -> None:
        requests = held.read(connection)
        was_cancelled.wait()
        for request in requests:
            connection.send(frame(answer_to(request)))
        closed.append(connection.wait_closed())

    was_cancelled = threading.Event()
    closed: list[bytes] = []
    async with pipeline(script) as (client, fake):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(assert_own_reply, client, 1)
            await anyio.lowlevel.checkpoint()
            impatient = anyio.create_task_group()
            async with impatient:
                impatient.start_soon(assert_own_reply, client, 2)
                await anyio.lowlevel.checkpoint()
                tasks.start_soon(assert_own_reply, client, 3)
                await until(held.complete.is_set)
                impatient.cancel_scope.cancel()
            with anyio.fail_after(10):
                await assert_own_reply(client, 4)
            assert fake.accepted == 2
            was_cancelled.set()
        # Once the remaining queries are answered, nothing more is sent on this connection.
        await until(lambda: closed == [b""])
        await assert_own_reply(client, 5)
        assert fake.accepted == 2


async def test_connection_whose_queries_all_timed_out_is_closed_at_once() -> None:
    held = Held(5)

    @by_connection
    def script(connection: Connection) -> None:
        held.read(connection)
        connection.wait_closed()

    async with pipeline(script) as (client, fake):
        errors = await all_of(client.identify(timeout=0.2) for _ in range(5))
        assert [type(error) for error in errors] == [ControlTimeout] * 5
        await until(lambda: fake.open == 0)
        await enter_pipeline(client)


@pytest.mark.parametrize("partly", [False, True], ids=["before a reply", "in a reply"])
async def test_lost_connection_fails_the_current_query_and_retries_the_rest(
    partly: bool,
) -> None:
    held = Held(100)

    @first_connection
    def script(connection: Connection) -> None:
        requests = held.read(connection)
        for request in requests[:30]:
            connection.send(frame(answer_to(request)))
        if partly:
            connection.send(frame(answer_to(requests[30]))[:-1])

    async with pipeline(script) as (client, fake):
        results = await all_of(assert_own_reply(client, number) for number in range(100))
        # Trio starts tasks in this order or in the reverse order.
        topic = topic_of(held.requests[30])
        assert topic is not None
        lost = results.pop(int(topic.split()[1]))
        assert isinstance(lost, ConnectionLost) and lost.mid_answer is partly
        assert results == [None] * 99
        assert len(fake.requests) == 2 + 100 + 69


@pytest.mark.parametrize("read", [False, True], ids=["unread", "read"])
async def test_query_is_retried_on_a_lost_connection_only_if_unread(
    read: bool,
) -> None:
    @by_connection
    def script(connection: Connection) -> None:
        connection.answer(IDENTITY)
        connection.answer(IDENTITY)
        if read:
            connection.read_request()
        else:
            connection.wait_readable()

    async with pipeline(script) as (client, fake):
        (result,) = await all_of([client.identify()])
        assert isinstance(result, ConnectionLost) is read
        await enter_pipeline(client)
        assert fake.accepted == 2


async def test_queries_that_could_not_be_written_are_all_retried() -> None:
    @by_connection
    def deaf(connection: Connection) -> None:
        connection.answer(IDENTITY)
        connection.answer(IDENTITY)
        connection.socket.shutdown(socket.SHUT_RD)  # the client's write fails, its read does not
        stopped.set()
        poll = select.poll()
        poll.register(connection.socket, select.POLLHUP)
        assert poll.poll(10_000)

    stopped = threading.Event()
    async with pipeline(deaf) as (client, fake):
        stopped.wait()
        results = await all_of(client.identify() for _ in range(20))
        assert [identity.peer_id for identity in results] == [FAKE_PEER] * 20  # type: ignore[union-attr]


async def test_connection_lost_while_blocked_leaves_no_writer_registered() -> None:
    """The next connection gets the same descriptor."""
    go, ended = threading.Event(), threading.Event()

    @first_connection
    def script(connection: Connection) -> None:
        connection.answer(IDENTITY)
        connection.answer(IDENTITY)
        go.wait(PATIENCE)
        connection.drain()
        connection.socket.shutdown(socket.SHUT_WR)
        ended.set()
        connection.wait_closed()

    async def end() -> None:
        for _ in range(20):
            await anyio.lowlevel.checkpoint()
        go.set()
        # Block the loop, which then finds the socket readable and writable at the same time.
        assert ended.wait(PATIENCE)

    topics = [f"{number}" * 150_000 for number in range(2)]  # too much for the socket's buffer
    async with pipeline(script) as (client, fake):
        with anyio.fail_after(PATIENCE):
            queries = [client.pubsub_list_peers(topic, timeout=5) for topic in topics]
            *results, _ = await all_of([*queries, end()])
            lost = [result for result in results if isinstance(result, Exception)]
            assert [type(error) for error in lost] == [ConnectionLost], lost
            await enter_pipeline(client)


async def test_daemon_that_is_gone_fails_every_waiting_query(no_descriptor_left: None) -> None:
    held = Held(20)

    def script(connection: Connection) -> None:
        if connection.number == 1:
            held.read(connection)

    async def query() -> None:
        errors.extend(await all_of(client.identify() for _ in range(20)))

    errors: list[object] = []
    async with anyio.create_task_group() as tasks:
        with FakeDaemon(script) as fake:
            client = Client(fake.control_maddr)
            await enter_pipeline(client)
            tasks.start_soon(query)
            await until(held.complete.is_set)
    # While stopping, the daemon may still have accepted some of the retries.
    assert all(isinstance(error, (DaemonUnreachable, ConnectionLost)) for error in errors)
    assert len({id(error) for error in errors}) == 20
    assert {getattr(error, "request", None) for error in errors} == {"IDENTIFY"}
    await client.close()


async def test_invalid_reply_fails_its_query_and_the_rest_are_retried() -> None:
    held = Held(3)

    @by_connection
    def script(connection: Connection) -> None:
        held.read(connection)
        connection.send(frame(IDENTITY) + frame(b"\xff\xff\xff"))
        connection.wait_closed()

    async with pipeline(script) as (client, fake):
        answered, failed, again = await all_of(client.identify() for _ in range(3))
        assert isinstance(failed, ProtocolViolation)
        assert answered == again != failed
        await enter_pipeline(client)
        assert fake.accepted == 2


async def test_unsolicited_data_is_not_taken_for_a_reply() -> None:
    sent = threading.Event()

    @by_connection
    def script(connection: Connection) -> None:
        connection.answer(IDENTITY)
        connection.answer(IDENTITY)
        connection.send(frame(ERROR))
        sent.set()
        connection.wait_closed()

    async with pipeline(script) as (client, fake):
        sent.wait()  # blocks the loop, which cannot read it before the next query
        await enter_pipeline(client)
        assert fake.accepted == 2


async def test_queries_over_the_limit_of_a_connection_use_others() -> None:
    held = Held(1024)

    @first_connection
    def script(connection: Connection) -> None:
        for request in held.read(connection):
            connection.send(frame(answer_to(request)))
        connection.wait_closed()

    async with pipeline(script) as (client, fake):
        async with anyio.create_task_group() as tasks:
            for number in range(1500):
                tasks.start_soon(assert_own_reply, client, number)
        assert 1 < fake.accepted <= 9


async def test_daemon_that_does_not_read_does_not_block_the_loop() -> None:
    names = [f"{number}" * 100_000 for number in range(10)]
    held = Held(10)
    held.go.clear()

    def script(connection: Connection) -> None:
        for request in held.read(connection):
            connection.send(frame(OK + field(PUBSUB, field(2, request[-4:]))))
        connection.wait_closed()

    async def query(name: str) -> None:
        answers[name] = await client.pubsub_list_peers(name)

    answers: dict[str, tuple[PeerID, ...]] = {}
    async with pipeline(script) as (client, fake):
        async with anyio.create_task_group() as tasks:
            for name in names:
                tasks.start_soon(query, name)
            for _ in range(20):
                await anyio.lowlevel.checkpoint()  # the loop is not blocked
            assert not answers
            held.go.set()
        assert answers == {name: (PeerID(name[-4:].encode()),) for name in names}


async def test_close_lets_queries_in_flight_finish_and_keeps_no_connection() -> None:
    held = Held(10)

    def script(connection: Connection) -> None:
        for request in held.read(connection):
            go.wait()
            connection.send(frame(answer_to(request)))
        connection.wait_closed()

    go = threading.Event()
    with FakeDaemon(script) as fake:
        client = Client(fake.control_maddr)
        await enter_pipeline(client)
        async with anyio.create_task_group() as tasks:
            for number in range(10):
                tasks.start_soon(assert_own_reply, client, number)
            await until(held.complete.is_set)
            await client.close()
            go.set()
        await until(lambda: fake.open == 0)


async def test_dropped_client_closes_its_connection(no_descriptor_left: None) -> None:
    with FakeDaemon(honest) as fake:
        client = Client(fake.control_maddr)
        await enter_pipeline(client)
        await enter_pipeline(client)
        del client
        gc.collect()
        await until(lambda: fake.open == 0)


async def test_client_dropped_in_another_thread_closes_its_connection() -> None:
    with FakeDaemon(honest) as fake:
        holds = [Client(fake.control_maddr)]
        await enter_pipeline(holds[0])
        await anyio.to_thread.run_sync(holds.clear)
        gc.collect()
        await until(lambda: fake.open == 0)


@pytest.mark.parametrize("waiting", [False, True], ids=["idle", "with pending queries"])
def test_connection_is_closed_with_its_event_loop(anyio_backend: Any, waiting: bool) -> None:
    backend, options = anyio_backend
    held = Held(3)

    @by_connection
    def script(connection: Connection) -> None:
        held.read(connection)
        connection.wait_closed()

    async def leaves(client: Client) -> None:
        await enter_pipeline(client)
        if waiting:
            for _ in range(3):
                start(client.identify)
            await until(held.complete.is_set)

    def start(query: Callable[[], Coroutine[Any, Any, object]]) -> None:
        """Starts a task that does not end before its loop."""
        if backend == "trio":
            trio.lowlevel.spawn_system_task(query)
        else:
            task = asyncio.ensure_future(query())
            task.add_done_callback(lambda task: task.cancelled() or task.exception())

    def run_and_close(function: Callable[[Client], Coroutine[Any, Any, None]]) -> None:
        if backend == "trio":
            # In another thread, since the fixtures' event loop runs in this one.
            with ThreadPoolExecutor(1) as thread:
                return thread.submit(trio.run, function, client).result()
        loop = uvloop.new_event_loop() if options["use_uvloop"] else asyncio.new_event_loop()
        loop.run_until_complete(function(client))
        for task in asyncio.all_tasks(loop):
            task._log_destroy_pending = False  # type: ignore[attr-defined]
        loop.close()

    async def closed(_: Client) -> None:
        await until(lambda: fake.open == 0)

    with FakeDaemon(script) as fake:
        client = Client(fake.control_maddr)
        for run in (leaves, enter_pipeline, Client.close, closed):
            run_and_close(run)


async def test_connections_of_cancelled_queries_are_bounded() -> None:
    def deaf_after(count: int) -> Script:
        def script(connection: Connection) -> None:
            for _ in range(count):
                connection.answer(IDENTITY)
            connection.wait_closed()

        return script

    # Each connection answers once, and so becomes idle, and then never again.
    with FakeDaemon(deaf_after(1)) as fake:
        async with Client(fake.control_maddr) as client, anyio.create_task_group() as tasks:
            for _ in range(20):
                with anyio.move_on_after(0.05):
                    await client.identify()  # leaves an idle connection, unless too many are open
                tasks.start_soon(client.identify)
                with anyio.move_on_after(0.05):
                    await client.identify()
            await until(lambda: fake.open <= 8 + 8)
            tasks.cancel_scope.cancel()
        await until(lambda: fake.open == 0)


def test_pipeline_of_the_parent_is_refused_in_a_forked_child() -> None:
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
