"""The lifecycle of unary handlers: cancelled registrations, early cancellation, back-pressure,
errors that are hard to send, and leftovers."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Callable
from typing import Any

import anyio
import pytest
import trio
import trio.testing
from fake_daemon import (
    OK,
    PATIENCE,
    PEER,
    UPGRADE,
    Connection,
    FakeDaemon,
    acknowledgement,
    cancellation,
    daemon_error,
    frame,
    incoming,
    reply,
    serve_echo,
    unary_echo,
)
from forking import in_child, with_loop_running_in_child
from support import BACKENDS, all_of, until

from p2pclient_rs import (
    Client,
    ConnectionLost,
    ControlFailure,
    ControlTimeout,
    DaemonRefused,
    PeerID,
)
from p2pclient_rs.connector import Types

pytestmark = [pytest.mark.anyio, pytest.mark.independent]

FAKE_PEER = PeerID(PEER)
IDS = [bytes([number]) * 16 for number in range(1, 100)]


async def call_echo(client: Client, data: bytes = b"data") -> bytes:
    return await client.call_unary(FAKE_PEER, "echo", data, timeout=10)


async def echo(data: bytes, peer_id: PeerID) -> bytes:
    return data


def held_calls(client: Client) -> int:
    """Returns the number of incoming calls that the client keeps track of."""
    return sum(len(session.incoming.tasks) for session in client.unary._sessions.values())


def accept_handler(connection: Connection) -> None:
    """Accepts the upgrade and one handler."""
    connection.upgrade()
    connection.send(frame(acknowledgement(connection.read_message().call_id)))


class Registry:
    """A daemon's table of handlers, which outlives its connections.

    Args:
        before: Called with the kind and the protocol of each request, before it is answered.
    """

    def __init__(self, before: Callable[[str, str], object] = lambda kind, name: None) -> None:
        self.names: set[str] = set()
        self._before = before

    def serve(self, connection: Connection) -> None:
        while True:
            message = connection.read_message()
            if message.kind == "call":
                connection.send(frame(reply(message.call_id, message.data)))
                continue
            name = message.proto
            self._before(message.kind, name)
            known = name in self.names
            if (message.kind == "add") == known:
                text = b"already set" if known else b"does not exist"
                connection.send(frame(daemon_error(message.call_id, text)))
                continue
            (self.names.discard if known else self.names.add)(name)
            connection.send(frame(acknowledgement(message.call_id)))


# --- registering ---


async def test_cancelled_registration_is_undone() -> None:
    gate = threading.Event()
    registry = Registry(lambda kind, name: gate.wait(PATIENCE))

    def script(connection: Connection) -> None:
        connection.upgrade()
        registry.serve(connection)

    with FakeDaemon(script) as fake:
        async with Client(fake.control_maddr) as client:
            with pytest.raises(ControlTimeout):
                await client.add_unary_handler("echo", echo, timeout=0.1)
            assert client.unary.handlers == {}
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(client.add_unary_handler, "echo", echo)
                await anyio.lowlevel.checkpoint()
                gate.set()
            assert list(client.unary.handlers) == ["echo"]
            assert registry.names == {"echo"}
            await client.remove_unary_handler("echo")
            assert registry.names == set()
            assert fake.accepted == 1


async def test_cancelled_removal_still_removes_the_handler() -> None:
    gate = threading.Event()
    registry = Registry(lambda kind, name: kind == "remove" and gate.wait(PATIENCE))

    def script(connection: Connection) -> None:
        connection.upgrade()
        registry.serve(connection)

    with FakeDaemon(script) as fake:
        async with Client(fake.control_maddr) as client:
            await client.add_unary_handler("echo", echo)
            with pytest.raises(ControlTimeout):
                await client.remove_unary_handler("echo", timeout=0.1)
            assert client.unary.handlers == {}
            gate.set()
            with pytest.raises(ControlFailure, match="not registered"):
                await client.remove_unary_handler("echo")
            await client.add_unary_handler("echo", echo)
            assert registry.names == {"echo"}


async def test_removal_waits_for_the_reconnect_that_registers_the_handler() -> None:
    gate, requested = threading.Event(), threading.Event()

    def before(kind: str, name: str) -> None:
        requested.set()
        gate.wait(PATIENCE)

    registry = Registry(before)

    def script(connection: Connection) -> None:
        connection.upgrade()
        if connection.number == 1:
            for _ in range(2):
                connection.send(frame(acknowledgement(connection.read_message().call_id)))
            return
        registry.serve(connection)

    with FakeDaemon(script) as fake:
        async with Client(fake.control_maddr) as client:
            await client.add_unary_handler("one", echo)
            await client.add_unary_handler("two", echo)
            await until(lambda: not client.unary.connected)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(client.unary.open)
                await until(requested.is_set)
                tasks.start_soon(client.remove_unary_handler, "one")
                await anyio.lowlevel.checkpoint()
                gate.set()
            assert registry.names == set(client.unary.handlers) == {"two"}


async def test_reconnect_drops_a_handler_whose_protocol_another_client_took(
    caplog: pytest.LogCaptureFixture,
) -> None:
    registry = Registry()
    registry.names.add("echo")

    def script(connection: Connection) -> None:
        if connection.number == 1:
            accept_handler(connection)
            return
        connection.upgrade()
        registry.serve(connection)

    with FakeDaemon(script) as fake:
        async with Client(fake.control_maddr) as client:
            await client.add_unary_handler("echo", echo)
            await until(lambda: not client.unary.connected)
            await client.unary.open()
            assert client.unary.handlers == {}
            (line,) = [line for line in caplog.messages if "lost the unary handler" in line]
            assert "'echo'" in line and "already set" in line and "use another name" in line
            with pytest.raises(DaemonRefused, match="already set"):
                await client.add_unary_handler("echo", echo)
            registry.names.clear()
            await client.add_unary_handler("echo", echo)


# --- closing ---


async def test_close_fails_calls_waiting_for_back_pressure_or_the_connection() -> None:
    upgraded, over = threading.Event(), threading.Event()

    def script(connection: Connection) -> None:
        if connection.number == 1:
            connection.upgrade()
            upgraded.set()
        else:
            connection.read_request()
        over.wait(PATIENCE)

    with FakeDaemon(script) as fake:
        for wait in (True, False):
            client = Client(fake.control_maddr)
            results: list[Any] = []

            async def calls(client: Client = client, results: list[Any] = results) -> None:
                large_calls = (call_echo(client, bytes(1 << 20)) for _ in range(20))
                results.extend(await all_of(large_calls))

            async with anyio.create_task_group() as tasks:
                if wait:
                    await client.unary.open()
                tasks.start_soon(calls)
                accepted = 1 if wait else 2
                await until(lambda n=accepted: fake.accepted == n)  # type: ignore[misc]
                await anyio.wait_all_tasks_blocked()
                await client.close()
            assert {type(result) for result in results} == {ConnectionLost}
            assert fake.accepted == accepted
        over.set()


async def test_calls_after_one_that_closed_the_client_are_not_started() -> None:
    def script(connection: Connection) -> None:
        accept_handler(connection)
        connection.send(b"".join(frame(incoming(i, "slow", b"")) for i in IDS[:3]))
        connection.wait_closed()

    entered, left = [], []

    async def slow(data: bytes, peer_id: PeerID) -> bytes:
        entered.append(data)
        try:
            await anyio.sleep_forever()
        finally:
            left.append(data)
        return data

    class Closing(Types):
        def peer_id(self, peer_id: PeerID) -> Any:
            client.unary.close()
            return peer_id

    with FakeDaemon(script) as fake:
        client = Client(fake.control_maddr)
        client.unary.daemon_connector.types = Closing()
        await client.add_unary_handler("slow", slow)
        await until(lambda: not client.unary.connected)
        await anyio.wait_all_tasks_blocked()
        assert len(entered) == len(left) <= 1
        await client.close()


# --- cancelled and failing handlers ---


async def test_handler_cancelled_before_it_started_leaves_nothing_behind() -> None:
    def script(connection: Connection) -> None:
        accept_handler(connection)
        both = (frame(incoming(i, "slow", b"")) + frame(cancellation(i)) for i in IDS)
        connection.send(b"".join(both))
        serve_echo(connection)

    async def slow(data: bytes, peer_id: PeerID) -> bytes:
        await anyio.sleep_forever()
        return data

    with FakeDaemon(script) as fake:
        async with Client(fake.control_maddr) as client:
            await client.add_unary_handler("slow", slow)
            assert await call_echo(client) == b"data"
            await until(lambda: client.unary.unanswered_calls == 0)
            assert held_calls(client) == 0


async def test_cancelled_handler_counts_until_it_has_ended() -> None:
    def script(connection: Connection) -> None:
        accept_handler(connection)
        for i in IDS:
            connection.send(frame(incoming(i, "slow", b"")))
        entered.wait(PATIENCE)
        for i in IDS:
            connection.send(frame(cancellation(i)))
        serve_echo(connection)

    entered, count = threading.Event(), 0
    let_go = anyio.Event()

    async def slow(data: bytes, peer_id: PeerID) -> bytes:
        nonlocal count
        count += 1
        if count == len(IDS):
            entered.set()
        try:
            await anyio.sleep_forever()
        finally:
            with anyio.CancelScope(shield=True):
                await let_go.wait()
        return data

    with FakeDaemon(script) as fake:
        async with Client(fake.control_maddr) as client:
            await client.add_unary_handler("slow", slow)
            await until(entered.is_set)
            assert await call_echo(client) == b"data"
            assert client.unary.unanswered_calls == held_calls(client) == len(IDS)
            let_go.set()
            await until(lambda: client.unary.unanswered_calls == held_calls(client) == 0)


class Unprintable(Exception):
    def __repr__(self) -> str:
        return "lone \udcff"


async def test_repr_that_is_not_utf8_is_sent_escaped() -> None:
    answers = []

    def script(connection: Connection) -> None:
        accept_handler(connection)
        connection.send(frame(incoming(IDS[0], "fails", b"")))
        answers.append(connection.read_request())

    async def fails(data: bytes, peer_id: PeerID) -> bytes:
        raise Unprintable

    with FakeDaemon(script) as fake:
        async with Client(fake.control_maddr) as client:
            await client.add_unary_handler("fails", fails)
            await until(lambda: answers)
            assert rb"lone \udcff" in answers[0]
            await until(lambda: client.unary.unanswered_calls == 0)


async def test_long_error_is_truncated_to_the_message_limit() -> None:
    answers = []

    def script(connection: Connection) -> None:
        accept_handler(connection)
        connection.send(frame(incoming(IDS[0], "fails", b"")))
        answers.append(connection.read_request())

    async def fails(data: bytes, peer_id: PeerID) -> bytes:
        raise ValueError("x" * 10_000)

    with FakeDaemon(script) as fake:
        async with Client(fake.control_maddr, persistent_conn_max_msg_size=1000) as client:
            await client.add_unary_handler("fails", fails)
            await until(lambda: answers)
            assert 900 < len(answers[0]) <= 1000


def test_handler_failing_during_cancellation_does_not_crash_trio() -> None:
    ready = threading.Event()

    def script(connection: Connection) -> None:
        accept_handler(connection)
        connection.send(frame(incoming(IDS[0], "nursery", b"")))
        ready.wait(PATIENCE)
        connection.send(frame(cancellation(IDS[0])))
        serve_echo(connection)

    async def fails_at_the_end() -> None:
        try:
            await trio.sleep_forever()
        finally:
            raise ValueError("in the clean-up")

    async def handler(data: bytes, peer_id: PeerID) -> bytes:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fails_at_the_end)
            await trio.testing.wait_all_tasks_blocked()
            ready.set()
            await trio.sleep_forever()
        return data

    async def main() -> None:
        with FakeDaemon(script) as fake:
            async with Client(fake.control_maddr) as client:
                await client.add_unary_handler("nursery", handler)
                await until(lambda: ready.is_set() and client.unary.unanswered_calls == 0)
                assert await call_echo(client) == b"data"

    trio.run(main)


# --- back-pressure ---


async def test_client_that_holds_back_its_callers_still_sees_cancels_and_eof() -> None:
    flooded, ended = threading.Event(), threading.Event()
    refused = []

    def script(connection: Connection) -> None:
        accept_handler(connection)
        sender = threading.Thread(target=flood, args=(connection,))
        sender.start()
        while not ended.is_set():
            refused.append(connection.read_message())  # keep reading, or the flood would block
            if len(refused) > 100:
                flooded.set()
        sender.join()

    def flood(connection: Connection) -> None:
        number = 0
        while not flooded.is_set():
            call_id = number.to_bytes(16, "big")
            connection.send(frame(incoming(call_id, "slow", bytes(1000))))
            number += 1
        connection.send(frame(cancellation(bytes(16))))
        cancelled.wait(PATIENCE)
        ended.set()
        connection.socket.shutdown(2)

    cancelled, at_work = threading.Event(), 0

    async def slow(data: bytes, peer_id: PeerID) -> bytes:
        nonlocal at_work
        at_work += 1
        try:
            await anyio.sleep_forever()
        finally:
            at_work -= 1
            cancelled.set()
        return data

    with FakeDaemon(script) as fake:
        async with Client(fake.control_maddr) as client:
            await client.add_unary_handler("slow", slow)
            await until(lambda: at_work >= 4096)
            await until(cancelled.is_set, within=20)
            await until(lambda: not client.unary.connected)
            await until(lambda: at_work == 0)
    assert b"busy" in refused[0].data


# --- outgoing calls ---


async def test_call_cancelled_by_the_daemon_fails() -> None:
    def script(connection: Connection) -> None:
        connection.upgrade()
        connection.send(frame(cancellation(connection.read_message().call_id)))
        serve_echo(connection)

    with FakeDaemon(script) as fake:
        async with Client(fake.control_maddr) as client:
            with pytest.raises(DaemonRefused, match="cancelled"):
                await call_echo(client)
            assert await call_echo(client) == b"data"


async def test_failed_write_does_not_lose_a_reply_already_received() -> None:
    replied = threading.Event()

    def script(connection: Connection) -> None:
        if connection.number > 1:
            unary_echo(connection)
        connection.upgrade()
        connection.send(frame(reply(connection.read_message().call_id, b"arrived")))
        connection.socket.close()
        replied.set()

    with FakeDaemon(script) as fake:
        async with Client(fake.control_maddr) as client:
            await client.unary.open()
            results = []

            async def first() -> None:
                results.append(await call_echo(client))

            async def second() -> None:
                # Block the loop, so that this call is written before the reply is read.
                replied.wait(PATIENCE)
                results.append(await call_echo(client, b"second"))

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(first)
                await anyio.wait_all_tasks_blocked()
                tasks.start_soon(second)
            assert sorted(results) == [b"arrived", b"second"]


async def test_data_may_have_a_finalizer_that_uses_the_client() -> None:
    go = threading.Event()
    finalized = []

    class Data(bytes):
        def __del__(self) -> None:
            finalized.append(client.unary.pending_calls)

    def script(connection: Connection) -> None:
        connection.upgrade()
        go.wait(PATIENCE)
        serve_echo(connection)

    with FakeDaemon(script) as fake:
        async with Client(fake.control_maddr) as client:
            await client.unary.open()
            with anyio.move_on_after(0.1):
                await all_of(call_echo(client, Data(1 << 20)) for _ in range(3))
            go.set()
            assert await call_echo(client) == b"data"
            gc.collect()
            assert len(finalized) == 3


@pytest.mark.parametrize("anyio_backend", BACKENDS[:2])
@pytest.mark.parametrize("opened", [False, True], ids=["upgrading", "calling"])
async def test_event_loop_running_in_a_forked_child_leaves_replies_to_the_parent(
    opened: bool,
) -> None:
    """Not tested on trio, where the kernel reports each event to only one of the processes."""
    go = threading.Event()

    def script(connection: Connection) -> None:
        if opened:
            connection.upgrade()
            message = connection.read_message()
            go.wait(PATIENCE)
        else:
            assert connection.read_request() == UPGRADE
            go.wait(PATIENCE)
            connection.send(frame(OK))
            message = connection.read_message()
        connection.send(frame(reply(message.call_id, b"for the parent")))
        connection.wait_closed()

    def left_it() -> None:
        """In the child. The call must not have succeeded there."""
        assert not call.done() or call.exception() is not None

    with FakeDaemon(script) as fake:
        async with Client(fake.control_maddr) as client:
            if opened:
                await client.unary.open()
            call = asyncio.ensure_future(call_echo(client))
            await until(lambda: len(fake.requests) == 1 + opened)
            await with_loop_running_in_child(go.set, left_it)
            assert await call == b"for the parent"


@pytest.mark.parametrize("backend", BACKENDS[:2])
def test_call_that_outlives_its_loop_ends_quietly(backend: Any) -> None:
    def script(connection: Connection) -> None:
        connection.upgrade()
        connection.wait_closed()

    with FakeDaemon(script) as fake:
        client = Client(fake.control_maddr)
        call = client.call_unary(FAKE_PEER, "echo", b"data")

        async def main() -> None:
            await client.unary.open()
            call.send(None)
            assert client.unary.pending_calls == 1

        anyio.run(main, backend=backend[0], backend_options=backend[1])
        call.close()
        client.unary.close()
        assert client.unary.pending_calls == 0


def test_finished_trio_runs_are_forgotten() -> None:
    def script(connection: Connection) -> None:
        connection.upgrade()
        connection.read_message()

    with FakeDaemon(script) as fake:
        client = Client(fake.control_maddr)

        async def main() -> None:
            with pytest.raises(ConnectionLost):
                await call_echo(client)

        for _ in range(5):
            trio.run(main)
        assert len(client.unary._sessions) == 1
        client.unary.close()


def test_trio_guest_run_has_its_own_connection() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        done: asyncio.Future[Any] = loop.create_future()
        with FakeDaemon(unary_echo) as fake:
            client = Client(fake.control_maddr)
            assert await call_echo(client, b"host") == b"host"

            async def guest() -> bytes:
                reply = await call_echo(client, b"guest")
                await client.close()
                return reply

            def soon(callback: Callable[[], object]) -> None:
                loop.call_soon_threadsafe(callback)

            trio.lowlevel.start_guest_run(
                guest,
                run_sync_soon_threadsafe=soon,
                done_callback=done.set_result,
            )
            assert (await done).unwrap() == b"guest"

    asyncio.run(main())


@pytest.mark.parametrize("backend", BACKENDS)
def test_close_in_a_forked_child_leaves_the_parent_alone(backend: Any) -> None:
    async def main() -> None:
        with FakeDaemon(unary_echo) as fake:
            async with Client(fake.control_maddr) as client:
                assert await call_echo(client) == b"data"
                await in_child(client.unary.close)
                assert await call_echo(client) == b"data"
                assert fake.accepted == 1

    anyio.run(main, backend=backend[0], backend_options=backend[1])
