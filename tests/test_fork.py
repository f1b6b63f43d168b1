"""Forked processes: a client and its streams belong to the process that created them."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from fake_daemon import IDENTITY, PEER, STREAM_OPENED, Connection, FakeDaemon, frame
from forking import CHILD_LIMIT, in_child, run_in_thread, with_loop_running_in_child
from support import BACKENDS, DaemonProcess, until

from p2pclient_rs import (
    Client,
    ForkedClientError,
    PeerID,
    Stream,
    StreamInfo,
)

if TYPE_CHECKING:
    from conftest import Pair

pytestmark = pytest.mark.anyio


async def echo(info: StreamInfo, stream: Stream) -> None:
    async with stream:
        async for data in stream:
            await stream.send(data)


async def opened(pair: Pair) -> Stream:
    """Opens a stream to an echo handler."""
    await pair.bob.stream_handler("/echo", echo)
    _, stream = await pair.alice.stream_open(pair.bob_daemon.peer_id, ["/echo"])
    return stream


async def assert_echoes(stream: Stream, data: bytes) -> None:
    await stream.send(data)
    assert await stream.readexactly(len(data)) == data


async def test_client_of_the_parent_is_refused_in_a_forked_child(
    pair: Pair, anyio_backend: Any
) -> None:
    client = pair.alice
    await client.identify()
    stream = await opened(pair)

    async def use() -> None:
        for call in (
            client.identify,
            client.list_peers,
            lambda: client.identify(timeout=5),
            lambda: client.stream_open(pair.bob_daemon.peer_id, ["/echo"]),
            lambda: client.pubsub_subscribe("topic"),
            lambda: client.dht_get_value(b"key"),
            client.control.daemon_connector.open_connection,
            stream.receive,
            lambda: stream.send(b"data"),
        ):
            with pytest.raises(ForkedClientError, match=f"process {os.getppid()} .* make a new"):
                await call()
        with pytest.raises(ForkedClientError) as error:
            await client.connect(pair.bob_daemon.peer_id, [])
        assert error.value.request == "CONNECT"
        assert error.value.peer_id == pair.bob_daemon.peer_id
        with pytest.raises(ForkedClientError):
            stream.write(b"data")

    async with stream:
        await in_child(lambda: run_in_thread(anyio_backend, use))
        await assert_echoes(stream, b"the parent's")
        assert (await client.identify()).peer_id == pair.alice_daemon.peer_id


@pytest.mark.parametrize("anyio_backend", BACKENDS[:2])
async def test_client_is_refused_at_once_in_the_task_that_forked(pair: Pair) -> None:
    """In the child, asyncio no longer has a running loop."""
    client = pair.alice
    await client.identify()
    stream = await opened(pair)

    def use() -> None:
        for call in (
            client.identify,
            lambda: client.call_unary(pair.bob_daemon.peer_id, "echo", b"data"),
            lambda: client.stream_open(pair.bob_daemon.peer_id, ["/echo"]),
        ):
            with pytest.raises(ForkedClientError):
                call().send(None)
        # anyio looks up the loop first.
        for work in (client.identify(timeout=5), stream.receive()):
            with pytest.raises(RuntimeError, match="no running event loop"):
                work.send(None)

    async with stream:
        await in_child(use)
        await assert_echoes(stream, b"the parent's")


@pytest.mark.independent
@pytest.mark.parametrize("anyio_backend", BACKENDS[:2])
async def test_event_loop_running_in_a_forked_child_leaves_data_to_the_parent() -> None:
    go = threading.Event()

    def script(connection: Connection) -> None:
        connection.read_request()
        connection.send(frame(STREAM_OPENED))
        go.wait(CHILD_LIMIT)
        connection.send(b"for the parent")
        connection.wait_closed()

    def left_it() -> None:
        assert not received.done() or isinstance(received.exception(), ForkedClientError)

    with FakeDaemon(script) as fake:
        async with Client(fake.control_maddr) as client:
            _, stream = await client.stream_open(PeerID(PEER), ["/echo"])
            async with stream:
                received = asyncio.ensure_future(stream.receive())
                await until(lambda: stream._reading)
                await with_loop_running_in_child(go.set, left_it)
                assert await received == b"for the parent"


async def test_new_client_works_in_a_forked_child(pair: Pair, anyio_backend: Any) -> None:
    await pair.alice.identify()
    await pair.bob.stream_handler("/echo", echo)

    async def use() -> None:
        async with pair.alice_daemon.client() as client:
            assert (await client.identify()).peer_id == pair.alice_daemon.peer_id
            _, stream = await client.stream_open(pair.bob_daemon.peer_id, ["/echo"])
            async with stream:
                await assert_echoes(stream, b"the child's")

    await in_child(lambda: run_in_thread(anyio_backend, use))
    assert (await pair.alice.identify()).peer_id == pair.alice_daemon.peer_id


@pytest.mark.needs("pubsub_own")
async def test_close_in_a_forked_child_leaves_the_parent_alone(
    pair: Pair, anyio_backend: Any
) -> None:
    async def close_all() -> None:
        await pair.alice.close()
        await pair.bob.close()
        await stream.aclose()
        await subscription.aclose()

    stream = await opened(pair)
    subscription = await pair.alice.pubsub_subscribe("forked")
    async with stream, subscription:
        await pair.alice.identify()  # leaves an idle connection in the pool
        await in_child(lambda: run_in_thread(anyio_backend, close_all))
        await assert_parent_works(pair, stream, subscription)


async def assert_parent_works(pair: Pair, stream: Stream, subscription: Any) -> None:
    """Asserts that everything in the parent still works."""
    await assert_echoes(stream, b"ping")
    await pair.alice.pubsub_publish("forked", b"message")
    assert (await subscription.receive_message()).data == b"message"
    assert (await pair.alice.identify()).peer_id == pair.alice_daemon.peer_id
    async with await opened(pair) as another:
        await assert_echoes(another, b"another")


@pytest.mark.needs("pubsub_own")
@pytest.mark.parametrize("how", ["abort", "close", "connector.close"])
async def test_closing_without_a_loop_in_a_forked_child_leaves_waiting_tasks_alone(
    pair: Pair, how: str
) -> None:
    """In the child, the parent's loop appears to be running."""
    received = []

    async def wait_for_data() -> None:
        received.append(await stream.receive())

    async def wait_for_message() -> None:
        received.append((await subscription.receive_message()).data)

    def disturb() -> None:
        if how == "connector.close":
            pair.alice.control.daemon_connector.close()
        else:
            getattr(stream, how)()
            getattr(subscription, how)()

    stream = await opened(pair)
    subscription = await pair.alice.pubsub_subscribe("forked")
    async with stream, subscription:
        await pair.alice.identify()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(wait_for_data)
            tasks.start_soon(wait_for_message)
            await until(lambda: stream._reading and subscription._reading)
            await in_child(disturb)
            await stream.send(b"ping")
            await pair.alice.pubsub_publish("forked", b"message")
        assert sorted(received) == [b"message", b"ping"]
        await assert_parent_works(pair, stream, subscription)


@pytest.mark.needs("stream_handler_again")
async def test_stream_collected_in_a_forked_child_stays_open_in_the_parent(pair: Pair) -> None:
    streams = [await opened(pair)]
    with anyio.move_on_after(0.01):
        await streams[0].receive()  # registers the descriptor with the loop
    await anyio.lowlevel.checkpoint()  # the loop drops the cancellation's traceback
    number = streams[0]._raw.fileno()

    def forget() -> None:
        streams.clear()
        gc.collect()
        assert not os.path.exists(f"/proc/self/fd/{number}")

    await in_child(forget)
    (stream,) = streams
    async with stream:
        await assert_echoes(stream, b"still open")


async def test_close_in_a_forked_child_leaves_a_pending_call_of_the_parent_alone(
    anyio_backend: Any,
) -> None:
    release = threading.Event()

    def script(connection: Connection) -> None:
        while True:
            connection.read_request()
            release.wait(CHILD_LIMIT)
            connection.send(frame(IDENTITY))

    with FakeDaemon(script) as fake:
        async with Client(fake.control_maddr) as client:
            answers = []

            async def call() -> None:
                answers.append(await client.identify())

            async def close() -> None:
                await client.close()

            async with anyio.create_task_group() as tasks:
                for _ in range(3):
                    tasks.start_soon(call)
                await until(lambda: len(fake.requests) == 3)
                await in_child(lambda: run_in_thread(anyio_backend, close))
                await in_child(client.control.daemon_connector.close)
                release.set()
            assert len(answers) == len(fake.requests) == 3
            assert fake.accepted == 3
            await client.identify()
            assert fake.accepted == 3  # the connections were kept


@pytest.mark.needs("stream_handler_again")
async def test_listener_of_the_parent_survives_close_in_a_forked_child(
    pair: Pair, anyio_backend: Any
) -> None:
    async def close() -> None:
        await pair.bob.close()

    await in_child(lambda: run_in_thread(anyio_backend, close))
    async with await opened(pair) as stream:
        await assert_echoes(stream, b"still listening")


def test_descriptors_are_not_inheritable(bare_daemon: DaemonProcess) -> None:
    async def main() -> None:
        async with bare_daemon.client() as client, client.listen():
            await client.identify()
            stream = await client.control.daemon_connector.open_connection()
            async with stream:
                fds = [stream._raw.fileno()]
                fds += [
                    int(fd)
                    for fd in os.listdir("/proc/self/fd")
                    if os.path.islink(f"/proc/self/fd/{fd}")
                    and os.readlink(f"/proc/self/fd/{fd}").startswith("socket:")
                ]
                assert [fd for fd in fds if os.get_inheritable(fd)] == []
                listed = subprocess.run(
                    [sys.executable, "-c", "import os; print(os.listdir('/proc/self/fd'))"],
                    close_fds=False,
                    capture_output=True,
                    check=True,
                    text=True,
                ).stdout
                assert f"'{fds[0]}'" not in listed

    anyio.run(main)
