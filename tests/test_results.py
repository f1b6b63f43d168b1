"""Results of DHT queries, awaited and iterated: real daemons, and a scripted one."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import os
import signal
import threading
import time
from collections.abc import AsyncIterator
from typing import Any

import anyio
import pytest
from conftest import FULL, Pair
from fake_daemon import ERROR, IDENTITY, OK, PEER, Connection, FakeDaemon, dht, field, frame
from support import DaemonProcess, eventually, open_descriptors, suspend, unknown_peer, until

from p2pclient_rs import (
    Client,
    ConnectionLost,
    ControlTimeout,
    DaemonRefused,
    InvalidPeerID,
    PeerID,
    PeerInfo,
    Results,
)

pytestmark = pytest.mark.anyio

FAKE_PEER = PeerID(PEER)
CID = b"\x01\x55\x12\x20" + bytes(32)

BEGIN, VALUE, END = range(3)


def begin() -> bytes:
    return frame(OK + field(5, dht(BEGIN)))


def value(number: int) -> bytes:
    return frame(dht(VALUE, value=b"%d" % number))


def end() -> bytes:
    return frame(dht(END))


async def found(results: Results[bytes]) -> list[bytes]:
    return [result async for result in results]


@pytest.fixture
async def nothing_left_open() -> AsyncIterator[None]:
    """Fails a test that leaves a descriptor open, without the garbage collector's help."""
    before = len(open_descriptors())
    gc.disable()
    try:
        yield
        await until(lambda: len(open_descriptors()) <= before)
    finally:
        gc.enable()


# --- real daemons ---


async def test_iterating_yields_what_awaiting_returns(dht_pair: Pair) -> None:
    results = dht_pair.alice.dht_get_closest_peers(b"some key")
    assert {peer async for peer in results} == set(
        await dht_pair.alice.dht_get_closest_peers(b"some key")
    )
    assert repr(results) == "<Results of DHT GET_CLOSEST_PEERS>"


@pytest.mark.needs("dht_no_providers")
async def test_iterating_yields_providers_and_keeps_the_connection(
    dht_pair: Pair,
) -> None:
    cid = b"\x01\x55\x12\x20" + hashlib.sha256(os.urandom(8)).digest()
    assert [info async for info in dht_pair.bob.dht.find_providers(cid, 5)] == []
    await dht_pair.alice.dht_provide(cid)

    async def provider() -> None:
        (info,) = [info async for info in dht_pair.bob.dht.find_providers(cid, 5, timeout=10)]
        assert isinstance(info, PeerInfo)
        assert info.peer_id == dht_pair.alice_daemon.peer_id

    await eventually(provider)
    before = len(open_descriptors())
    for _ in range(20):
        await provider()
    assert len(open_descriptors()) <= before


# jsp2pd crashes when a client closes a connection with a query in progress.
@pytest.mark.daemons("hivemind", "go")
async def test_leaving_the_loop_early_closes_the_connection(
    dht_pair: Pair, nothing_left_open: None
) -> None:
    for _ in range(10):
        async for peer in dht_pair.alice.dht_get_closest_peers(b"some key"):
            assert isinstance(peer, PeerID)
            break
        else:
            pytest.fail("no peer was found")
    assert (await dht_pair.alice.identify()).peer_id == dht_pair.alice_daemon.peer_id


async def test_refused_query_raises_at_the_first_result(
    bare_daemon: DaemonProcess, nothing_left_open: None
) -> None:
    if bare_daemon.kind == "js":
        pytest.skip("its DHT cannot be switched off")
    async with bare_daemon.client() as client:
        results = client.dht_find_providers(CID, 1)
        with pytest.raises(DaemonRefused) as error:
            await results.__anext__()
        assert error.value.request == "DHT FIND_PROVIDERS"
        assert [info async for info in results] == []
        assert (await client.identify()).peer_id == bare_daemon.peer_id


async def test_daemon_killed_between_results_raises_connection_lost() -> None:
    with DaemonProcess(*FULL) as near, DaemonProcess(*FULL) as far:
        async with near.client() as client:
            await client.connect(far.peer_id, far.addrs)

            async def known() -> None:
                assert await client.dht_get_closest_peers(b"anything") != ()

            await eventually(known)
            results = client.dht_get_closest_peers(b"some key")
            assert await results.__anext__() == far.peer_id
            near.kill()
            try:
                assert [peer async for peer in results] == []  # the query has already ended
            except ConnectionLost as error:
                assert error.request == "DHT GET_CLOSEST_PEERS"


@pytest.mark.daemons("hivemind", "go")
@pytest.mark.parametrize("how", ["timeout", "cancelled"])
async def test_query_to_a_frozen_daemon_times_out_and_the_next_one_works(
    how: str, dht_pair: Pair, nothing_left_open: None
) -> None:
    alice, process = dht_pair.alice, dht_pair.alice_daemon.process
    try:
        await suspend(process.pid)
        if how == "timeout":
            with pytest.raises(ControlTimeout):
                async for _ in alice.dht_get_closest_peers(b"some key", timeout=0.2):
                    pass
        else:
            with anyio.move_on_after(0.2) as scope:
                async for _ in alice.dht_get_closest_peers(b"some key"):
                    pass
            assert scope.cancelled_caught
    finally:
        process.send_signal(signal.SIGCONT)
    peers = {peer async for peer in alice.dht_get_closest_peers(b"some key")}
    assert dht_pair.bob_daemon.peer_id in peers


# --- a scripted daemon ---


@pytest.mark.independent
@pytest.mark.parametrize("transport", ["unix", "tcp"])
async def test_result_is_yielded_before_the_next_one_is_found(transport: str) -> None:
    yielded = threading.Semaphore(0)

    def script(connection: Connection) -> None:
        for _ in range(2):
            connection.answer(OK + field(5, dht(BEGIN)))
            for number in range(3):
                connection.send(value(number))
                assert yielded.acquire(timeout=20)
            connection.send(end())
        connection.answer(IDENTITY)

    with FakeDaemon(script, transport) as fake:
        async with Client(fake.control_maddr) as client:
            for _ in range(2):
                numbers = []
                async for result in client.dht_search_value(b"key"):
                    numbers.append(result)
                    yielded.release()
                assert numbers == [b"0", b"1", b"2"]
            await client.identify()
            assert fake.accepted == 1


@pytest.mark.independent
async def test_buffered_results_let_other_tasks_run() -> None:
    def script(connection: Connection) -> None:
        connection.read_request()
        connection.send(begin() + b"".join(map(value, range(10_000))) + end())
        connection.wait_closed()

    turns = 0

    async def count_turns() -> None:
        nonlocal turns
        while True:
            await anyio.lowlevel.checkpoint()
            turns += 1

    with FakeDaemon(script) as fake:
        async with Client(fake.control_maddr) as client, anyio.create_task_group() as tasks:
            tasks.start_soon(count_turns)
            results = await found(client.dht_search_value(b"key"))
            assert results == [b"%d" % number for number in range(10_000)]
            assert turns >= 500
            tasks.cancel_scope.cancel()


def stalls(connection: Connection) -> None:
    """A daemon that finds one value and then hangs."""
    connection.read_request()
    connection.send(begin() + value(0))
    connection.wait_closed()


@pytest.mark.independent
@pytest.mark.parametrize("how", ["break", "raise", "aclose", "async with", "cancel", "close"])
async def test_iteration_that_ends_early_closes_its_connection(
    how: str, nothing_left_open: None
) -> None:
    with FakeDaemon(stalls) as fake:
        async with Client(fake.control_maddr) as client:
            if how == "break":
                async for result in client.dht_search_value(b"key"):
                    assert result == b"0"
                    break
            elif how == "raise":
                with pytest.raises(KeyError):
                    async for _ in client.dht_search_value(b"key"):
                        raise KeyError
            elif how == "cancel":
                with anyio.move_on_after(0.1) as scope:
                    async for result in client.dht_search_value(b"key"):
                        assert result == b"0"
                assert scope.cancelled_caught
            elif how == "async with":
                async with client.dht_search_value(b"key") as results:
                    assert await results.__anext__() == b"0"
            else:
                results = client.dht_search_value(b"key")
                assert await results.__anext__() == b"0"
                await results.aclose() if how == "aclose" else results.close()
                with pytest.raises(StopAsyncIteration):
                    await results.__anext__()
            await until(lambda: fake.open == 0)


@pytest.mark.independent
async def test_cancelled_wait_for_the_next_result_loses_nothing() -> None:
    go_on = threading.Event()

    def script(connection: Connection) -> None:
        connection.read_request()
        connection.send(begin() + value(0))
        assert go_on.wait(20)
        connection.send(value(1) + end())
        connection.wait_closed()

    with FakeDaemon(script) as fake:
        async with Client(fake.control_maddr) as client:
            results = client.dht_search_value(b"key")
            assert await results.__anext__() == b"0"
            for _ in range(3):
                with anyio.move_on_after(0.02) as scope:
                    await results.__anext__()
                assert scope.cancelled_caught
            go_on.set()
            assert await found(results) == [b"1"]


@pytest.mark.independent
async def test_query_cancelled_before_its_first_result_is_sent_again() -> None:
    def script(connection: Connection) -> None:
        connection.read_request()
        if connection.number == 1:
            connection.wait_closed()
        connection.send(begin() + value(0) + end())
        connection.wait_closed()

    with FakeDaemon(script) as fake:
        async with Client(fake.control_maddr) as client:
            results = client.dht_search_value(b"key")
            with anyio.move_on_after(0.1) as scope:
                await results.__anext__()
            assert scope.cancelled_caught
            assert await found(results) == [b"0"]
            assert fake.accepted == 2


@pytest.mark.independent
async def test_timeout_bounds_the_whole_iteration(nothing_left_open: None) -> None:
    def script(connection: Connection) -> None:
        connection.read_request()
        connection.send(begin())
        for number in range(1000):
            connection.send(value(number))
            time.sleep(0.05)

    with FakeDaemon(script) as fake:
        async with Client(fake.control_maddr) as client:
            start = time.monotonic()
            count = 0
            with pytest.raises(ControlTimeout) as error:
                async for _ in client.dht_search_value(b"key", timeout=0.4):
                    count += 1
            assert 0.39 <= time.monotonic() - start < 2.0
            assert count >= 1
            assert str(error.value) == "no answer within 0.4 s (request DHT SEARCH_VALUE)"
            del error
            await until(lambda: fake.open == 0)


@pytest.mark.independent
@pytest.mark.parametrize("transport", ["unix", "tcp"])
@pytest.mark.parametrize("mid_message", [False, True])
async def test_connection_lost_between_results_raises_after_the_received_ones(
    transport: str, mid_message: bool
) -> None:
    def script(connection: Connection) -> None:
        connection.read_request()
        connection.send(begin() + value(0) + value(1) + (b"\x20" if mid_message else b""))

    with FakeDaemon(script, transport) as fake:
        async with Client(fake.control_maddr) as client:
            results = client.dht_find_peers_connected_to_peer(FAKE_PEER)
            values = client.dht_search_value(b"key")
            numbers = []
            with pytest.raises(ConnectionLost) as error:
                async for result in values:
                    numbers.append(result)
            assert numbers == [b"0", b"1"]
            assert error.value.mid_answer
            assert error.value.request == "DHT SEARCH_VALUE"
            with pytest.raises(StopAsyncIteration):
                await values.__anext__()
            await results.aclose()
            assert [info async for info in results] == []


@pytest.mark.independent
async def test_query_on_a_stale_connection_is_sent_again() -> None:
    closing = threading.Event()

    def script(connection: Connection) -> None:
        if connection.number == 1:
            connection.answer(IDENTITY)
            closing.wait(20)
            return  # without reading the query, if it has arrived
        connection.read_request()
        connection.send(begin() + value(0) + end())
        connection.wait_closed()

    with FakeDaemon(script) as fake:
        async with Client(fake.control_maddr) as client:
            await client.identify()
            closing.set()
            assert await found(client.dht_search_value(b"key")) == [b"0"]


@pytest.mark.independent
async def test_unfinished_iteration_does_not_hold_a_permit() -> None:
    def script(connection: Connection) -> None:
        connection.read_request()
        connection.send(begin() + value(connection.number))
        connection.wait_closed()

    with FakeDaemon(script) as fake:
        async with Client(fake.control_maddr) as client:
            unfinished = [client.dht_search_value(b"key") for _ in range(100)]
            for results in unfinished:
                await results.__anext__()
            assert fake.open == 100
            for results in unfinished:
                results.close()


@pytest.mark.independent
async def test_results_are_used_once_by_one_task_either_way() -> None:
    with FakeDaemon(stalls) as fake:
        async with Client(fake.control_maddr) as client:
            results = client.dht_search_value(b"key")
            assert await results.__anext__() == b"0"
            with pytest.raises(RuntimeError, match="was iterated"):
                await results
            async with anyio.create_task_group() as tasks:

                async def wait() -> None:
                    await results.__anext__()

                tasks.start_soon(wait)
                await anyio.sleep(0.05)
                with pytest.raises(anyio.BusyResourceError):
                    await results.__anext__()
                tasks.cancel_scope.cancel()
            results.close()
            awaited = client.dht_search_value(b"key")
            awaited.close()
            with pytest.raises(RuntimeError, match="was iterated"):
                await awaited


@pytest.mark.independent
async def test_results_are_a_coroutine_for_functions_that_start_tasks(anyio_backend: Any) -> None:
    def script(connection: Connection) -> None:
        while True:
            connection.answer(OK + field(5, dht(BEGIN)))
            connection.send(value(7) + end())

    with FakeDaemon(script) as fake:
        async with Client(fake.control_maddr) as client, anyio.create_task_group() as tasks:
            tasks.start_soon(client.dht_search_value, b"key")
            if anyio_backend[0] == "asyncio":
                query = client.dht_search_value
                assert await asyncio.create_task(query(b"key")) == (b"7",)
                assert await asyncio.wait_for(query(b"key"), 10) == (b"7",)
                both = await asyncio.gather(query(b"key"), query(b"key"))
                assert list(both) == [(b"7",), (b"7",)]


@pytest.mark.independent
async def test_invalid_argument_raises_on_await_and_on_iteration() -> None:
    client = Client("/unix/nowhere")
    for results in (client.dht_find_peers_connected_to_peer("no peer id"),):
        with pytest.raises(InvalidPeerID):
            await results
    with pytest.raises(InvalidPeerID):
        await client.dht_find_peers_connected_to_peer("no peer id").__anext__()
    for timeout in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="timeout"):
            await client.dht_get_closest_peers(b"key", timeout=timeout).__anext__()
        with pytest.raises(ValueError, match="timeout"):
            await client.dht_get_closest_peers(b"key", timeout=timeout)


@pytest.mark.independent
async def test_refused_iteration_keeps_the_connection() -> None:
    def script(connection: Connection) -> None:
        connection.answer(ERROR)
        connection.answer(IDENTITY)

    with FakeDaemon(script) as fake:
        async with Client(fake.control_maddr) as client:
            with pytest.raises(DaemonRefused, match="no such luck") as error:
                await client.dht_find_peers_connected_to_peer(unknown_peer()).__anext__()
            assert error.value.peer_id is not None
            await client.identify()
            assert fake.accepted == 1


@pytest.mark.independent
async def test_connection_of_a_query_is_closed_if_the_control_address_changed_meanwhile() -> None:
    def old_daemon(connection: Connection) -> None:
        connection.read_request()
        connection.send(begin() + value(1))
        assert may_end.wait(10)
        connection.send(end())
        connection.wait_closed()

    def new_daemon(connection: Connection) -> None:
        connection.read_request()
        connection.send(frame(IDENTITY))
        connection.wait_closed()

    may_end = threading.Event()
    with FakeDaemon(old_daemon) as old, FakeDaemon(new_daemon) as new:
        async with Client(old.control_maddr) as client:
            async for _ in client.dht.search_value(b"key"):
                client.control.daemon_connector.control_maddr = new.control_maddr
                may_end.set()
            assert (await client.identify()).peer_id == FAKE_PEER
        assert (old.accepted, new.accepted) == (1, 1)


@pytest.mark.independent
async def test_closing_during_the_first_wait_closes_the_connection(nothing_left_open: None) -> None:
    def script(connection: Connection) -> None:
        connection.read_request()
        requested.set()
        assert may_answer.wait(10)
        connection.send(begin() + value(1))
        connection.wait_closed()

    async def iterate() -> None:
        assert [result async for result in results] == []

    requested, may_answer = threading.Event(), threading.Event()
    with FakeDaemon(script) as fake:
        async with Client(fake.control_maddr) as client:
            results = client.dht.search_value(b"key")
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(iterate)
                await until(requested.is_set)
                results.close()
                may_answer.set()
