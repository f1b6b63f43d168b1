"""Unary calls over faulty connections: invalid replies, lost connections, floods, forks."""

from __future__ import annotations

import asyncio
import functools
import gc
import os
import random
import select
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import anyio
import pytest
import trio
import uvloop
from fake_daemon import (
    ERROR,
    OK,
    PATIENCE,
    PEER,
    UPGRADE,
    Connection,
    FakeDaemon,
    Gone,
    Message,
    Script,
    acknowledgement,
    by_connection,
    cancellation,
    daemon_error,
    field,
    frame,
    handler_error,
    incoming,
    reply,
    serve_echo,
    unary_echo,
    varint,
)
from forking import in_child, run_in_thread
from support import BACKENDS, DaemonProcess, all_of, open_descriptors, resident_memory, until

from p2pclient_rs import (
    Client,
    ConnectionLost,
    ControlFailure,
    ControlTimeout,
    DaemonRefused,
    DaemonUnreachable,
    ForkedClientError,
    MessageTooLarge,
    NotSupported,
    P2PHandlerError,
    PeerID,
    ProtocolViolation,
    UnaryClient,
)
from p2pclient_rs._native import Lifecycle

pytestmark = [pytest.mark.anyio, pytest.mark.needs("unary")]

FAKE_PEER = PeerID(PEER)
#: Call ids of incoming calls.
IDS = [bytes([number]) * 16 for number in range(1, 100)]


async def call_echo(client: Client, data: bytes = b"data", timeout: float | None = None) -> bytes:
    return await client.call_unary(FAKE_PEER, "echo", data, timeout=timeout)


async def assert_usable(client: Client) -> None:
    """Asserts that a call succeeds."""
    assert await call_echo(client, b"the next", timeout=10) == b"the next"


async def echo(data: bytes, peer_id: PeerID) -> bytes:
    return data


# --- the upgrade ---


def upstream(connection: Connection) -> None:
    """A Go daemon without unary calls, which closes the connection on the upgrade."""
    request = connection.read_request()
    while request != UPGRADE:
        connection.send(frame(OK + field(4, field(1, PEER))))
        request = connection.read_request()


def refuses(connection: Connection) -> None:
    """A daemon that answers the upgrade with an error, as jsp2pd does."""
    request = connection.read_request()
    while True:
        answer = ERROR if request == UPGRADE else OK + field(4, field(1, PEER))
        connection.send(frame(answer))
        request = connection.read_request()


def silent(connection: Connection) -> None:
    """A daemon that never answers."""
    connection.read_request()
    connection.wait_closed()


def upgraded_at(go_on: threading.Event) -> Script:
    """A daemon that answers the upgrade once ``go_on`` is set, and then echoes every call."""

    def script(connection: Connection) -> None:
        connection.read_request()
        go_on.wait(PATIENCE)
        connection.send(frame(OK))
        serve_echo(connection)

    return script


@pytest.mark.parametrize("script", [upstream, refuses])
async def test_daemon_without_persistent_connections_raises_not_supported(script: Script) -> None:
    with FakeDaemon(script) as fake:
        async with Client(fake.control_maddr) as client:
            calls: list[Callable[[], Awaitable[Any]]] = [
                lambda: call_echo(client, timeout=10),
                lambda: client.add_unary_handler("echo", echo, timeout=10),
                lambda: client.unary.open(timeout=10),
            ]
            for call in calls:
                with pytest.raises(NotSupported) as error:
                    await call()
                assert error.value.request == "PERSISTENT_CONN_UPGRADE"
                assert not client.unary.connected and client.unary.pending_calls == 0
            with pytest.raises(ControlFailure, match="not registered"):
                await client.remove_unary_handler("echo")
            assert (await client.identify()).peer_id == FAKE_PEER
    # The error has the daemon's message if there was one.
    assert (error.value.daemon_message == "no such luck") == (script is refuses)


async def test_missing_daemon_raises_daemon_unreachable(tmp_path: Path) -> None:
    async with Client(f"/unix{tmp_path}/missing.sock") as client:
        for call in (
            call_echo(client),
            client.add_unary_handler("echo", echo),
            client.unary.open(),
        ):
            with pytest.raises(DaemonUnreachable):
                await call


async def test_unanswered_upgrade_delays_each_call_only_by_its_own_timeout() -> None:
    with FakeDaemon(by_connection(silent, then=unary_echo)) as fake:
        async with Client(fake.control_maddr) as client:
            for _ in range(2):
                with pytest.raises(ControlTimeout):
                    await call_echo(client, timeout=0.1)
            client.unary.close()
            await until(lambda: fake.open == 0)
            await assert_usable(client)
            assert fake.accepted == 2


async def test_unanswered_upgrade_times_out_by_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    quick = functools.partial(Lifecycle, open_timeout=0.2)
    monkeypatch.setattr("p2pclient_rs.persistent.Lifecycle", quick)
    with FakeDaemon(by_connection(silent, then=unary_echo)) as fake:
        async with Client(fake.control_maddr) as client:
            with pytest.raises(ControlTimeout):
                await call_echo(client)
            await until(lambda: fake.open == 0)
            await assert_usable(client)
            assert fake.accepted == 2


async def test_cancelling_the_first_call_does_not_cancel_the_upgrade() -> None:
    """hivemind's daemon exits when its last persistent connection closes."""
    go_on = threading.Event()
    with FakeDaemon(upgraded_at(go_on)) as fake:
        async with Client(fake.control_maddr) as client:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(call_echo, client, b"goes")
                await until(lambda: fake.requests)
                tasks.cancel_scope.cancel()
            go_on.set()
            assert await call_echo(client, b"stays") == b"stays"
            assert fake.accepted == 1


async def test_close_during_the_upgrade_fails_waiting_calls() -> None:
    with FakeDaemon(silent) as fake:
        async with Client(fake.control_maddr) as client:
            async with anyio.create_task_group() as tasks:

                async def waits() -> None:
                    with pytest.raises(ConnectionLost, match="closed"):
                        await call_echo(client)

                for _ in range(3):
                    tasks.start_soon(waits)
                await until(lambda: fake.requests)
                client.unary.close()
            await until(lambda: fake.open == 0)


async def test_concurrent_calls_share_one_upgrade() -> None:
    with FakeDaemon(unary_echo) as fake:
        async with Client(fake.control_maddr) as client:
            payloads = [b"%d" % number for number in range(100)]
            assert await all_of(call_echo(client, data) for data in payloads) == payloads
            assert fake.accepted == 1
            assert len(fake.requests) == 101


async def test_call_cancelled_during_the_upgrade_leaves_the_others_alone() -> None:
    go_on = threading.Event()
    with FakeDaemon(upgraded_at(go_on)) as fake:
        async with Client(fake.control_maddr) as client:
            results = []

            async def stays() -> None:
                results.append(await call_echo(client, b"stays"))

            async with anyio.create_task_group() as tasks:
                async with anyio.create_task_group() as cancelled:
                    cancelled.start_soon(call_echo, client, b"goes")
                    await until(lambda: fake.requests)
                    tasks.start_soon(stays)
                    await anyio.lowlevel.checkpoint()
                    cancelled.cancel_scope.cancel()
                go_on.set()
            assert results == [b"stays"]
            assert client.unary.pending_calls == 0
            await until(lambda: fake.open == 1)


# --- lost connections ---


@pytest.mark.parametrize("how", ["close", "reset"])
async def test_lost_connection_fails_every_pending_call_at_once(how: str) -> None:
    lose = threading.Event()

    def script(connection: Connection) -> None:
        connection.upgrade()
        for _ in range(100):
            connection.read_message()
        lose.wait(PATIENCE)
        if how == "reset":
            connection.reset()

    with FakeDaemon(by_connection(script, then=unary_echo), "tcp") as fake:
        async with Client(fake.control_maddr) as client:

            async def lose_it() -> None:
                await until(lambda: client.unary.pending_calls == 100)
                lose.set()

            calls = [client.call_unary(FAKE_PEER, f"p{n}", b"data") for n in range(100)]
            *errors, _ = await all_of([*calls, lose_it()])
            for number, error in enumerate(errors):
                assert isinstance(error, ConnectionLost)
                assert error.request == "CALL_UNARY"
                assert (error.peer_id, error.protocol) == (FAKE_PEER, f"p{number}")
                assert str(FAKE_PEER) in str(error) and f"p{number}" in str(error)
            assert (
                len({id(error) for error in errors}) == 100
            )  # each caller gets its own object, for its own traceback
            assert client.unary.pending_calls == 0 and not client.unary.connected
            await assert_usable(client)
            assert fake.accepted == 2


async def test_connection_lost_while_idle_is_reopened_with_its_handlers() -> None:
    lose = threading.Event()
    again: list[Message] = []

    def loses(connection: Connection) -> None:
        connection.upgrade()
        for _ in range(3):
            message = connection.read_message()
            connection.send(frame(acknowledgement(message.call_id)))
        lose.wait(PATIENCE)

    def second(connection: Connection) -> None:
        connection.upgrade()
        while True:
            message = connection.read_message()
            again.append(message)
            answer = reply(message.call_id, message.data)
            if message.kind == "add":
                answer = acknowledgement(message.call_id)
            connection.send(frame(answer))
            if len(again) == 3:
                connection.send(frame(incoming(IDS[0], "kept", b"hello")))

    with FakeDaemon(by_connection(loses, second, then=unary_echo)) as fake:
        async with Client(fake.control_maddr) as client:
            await client.add_unary_handler("kept", echo)
            await client.add_unary_handler("shared", echo, balanced=True)
            await client.remove_unary_handler("shared")
            lose.set()
            await until(lambda: fake.open == 0)
            await until(lambda: not client.unary.connected)
            await client.add_unary_handler("new", echo, balanced=True)
            await assert_usable(client)
            await until(lambda: len(again) == 4)
    added = [(m.proto, m.balanced) for m in again if m.kind == "add"]
    assert added == [("kept", False), ("new", True)]
    assert [m.data for m in again if m.kind == "call"] == [b"the next"]
    assert [m.data for m in again if m.kind == "response"] == [b"hello"]


async def test_reconnect_retries_handlers_until_the_daemon_drops_the_old_connection() -> None:
    """Until then, the protocol is still registered for this client's old connection."""
    lose = threading.Event()
    refused: list[Message] = []

    def loses(connection: Connection) -> None:
        connection.upgrade()
        connection.send(frame(acknowledgement(connection.read_message().call_id)))
        lose.wait(PATIENCE)

    def second(connection: Connection) -> None:
        connection.upgrade()
        for _ in range(3):
            refused.append(connection.read_message())
            text = b"handler for protocol kept already set"
            connection.send(frame(daemon_error(refused[-1].call_id, text)))
        serve_echo(connection)

    with FakeDaemon(by_connection(loses, second, then=unary_echo)) as fake:
        async with Client(fake.control_maddr) as client:
            await client.add_unary_handler("kept", echo)
            lose.set()
            await until(lambda: not client.unary.connected)
            await assert_usable(client)
            assert list(client.unary.handlers) == ["kept"]
    assert [(m.kind, m.proto) for m in refused] == [("add", "kept")] * 3


async def test_running_handlers_are_cancelled_when_the_connection_is_lost() -> None:
    lose = threading.Event()

    def loses(connection: Connection) -> None:
        connection.upgrade()
        connection.send(frame(acknowledgement(connection.read_message().call_id)))
        for call_id in IDS[:5]:
            connection.send(frame(incoming(call_id, "waits", b"")))
        lose.wait(PATIENCE)

    events = []

    async def waits(data: bytes, peer_id: PeerID) -> bytes:
        events.append("entered")
        try:
            await anyio.sleep_forever()
        finally:
            events.append("left")
        raise AssertionError

    with FakeDaemon(by_connection(loses, then=unary_echo)) as fake:
        async with Client(fake.control_maddr) as client:
            await client.add_unary_handler("waits", waits)
            await until(lambda: events == ["entered"] * 5)
            assert client.unary.unanswered_calls == 5
            lose.set()
            await until(lambda: events.count("left") == 5)
            await until(lambda: client.unary.unanswered_calls == 0)
            await assert_usable(client)


async def test_connection_lost_during_a_registration_fails_and_forgets_it() -> None:
    def loses(connection: Connection) -> None:
        connection.upgrade()
        connection.read_message()

    with FakeDaemon(by_connection(loses, then=unary_echo)) as fake:
        async with Client(fake.control_maddr) as client:
            with pytest.raises(ConnectionLost) as error:
                await client.add_unary_handler("echo", echo, timeout=10)
            assert error.value.protocol == "echo"
            await assert_usable(client)
            assert len(fake.requests) == 4  # two upgrades, a handler, a call
            await client.add_unary_handler("echo", echo)


async def test_unsent_registration_is_sent_again_on_the_next_connection() -> None:
    close, closed = threading.Event(), threading.Event()

    def closes(connection: Connection) -> None:
        connection.upgrade()
        close.wait(PATIENCE)
        connection.socket.close()
        closed.set()

    with FakeDaemon(by_connection(closes, then=unary_echo)) as fake:
        async with Client(fake.control_maddr) as client:
            await client.unary.open()
            close.set()
            closed.wait(PATIENCE)  # blocks the event loop, which does not notice
            await client.add_unary_handler("echo", echo)
            assert list(client.unary.handlers) == ["echo"]
            assert fake.accepted == 2
            await assert_usable(client)


async def test_killed_daemon_fails_a_thousand_pending_calls_within_a_second() -> None:
    never = anyio.Event()

    async def waits(data: bytes, peer_id: PeerID) -> bytes:
        await never.wait()
        return data

    with DaemonProcess() as here, DaemonProcess() as there:
        async with here.client() as alice, there.client() as bob:
            await alice.unary.open()
            await bob.add_unary_handler("waits", waits)
            await alice.connect(there.peer_id, there.addrs)
            killed = []

            async def kill() -> None:
                await until(lambda: alice.unary.pending_calls == 1000)
                await until(lambda: bob.unary.unanswered_calls > 0)
                here.process.kill()
                killed.append(time.monotonic())

            calls: list[Awaitable[Any]] = [
                alice.call_unary(there.peer_id, "waits", b"%d" % n) for n in range(1000)
            ]
            *errors, none = await all_of([*calls, kill()])
            assert time.monotonic() - killed[0] < 1.0
            assert none is None
            assert all(isinstance(error, ConnectionLost) for error in errors)
            assert alice.unary.pending_calls == 0
            # The callee's own daemon sends it the Cancel messages.
            await until(lambda: bob.unary.unanswered_calls == 0)
            start = time.monotonic()
            with pytest.raises(DaemonUnreachable):
                await alice.call_unary(there.peer_id, "waits", b"later")
            assert time.monotonic() - start < 1.0


async def test_killed_remote_daemon_fails_the_calls_to_it() -> None:
    with DaemonProcess() as here, DaemonProcess() as there:
        async with here.client() as alice, there.client() as bob:
            await alice.unary.open()

            async def waits(data: bytes, peer_id: PeerID) -> bytes:
                await anyio.sleep_forever()
                raise AssertionError

            await bob.add_unary_handler("waits", waits)
            await alice.connect(there.peer_id, there.addrs)

            async def kill() -> None:
                await until(lambda: bob.unary.unanswered_calls == 50)
                there.process.kill()

            calls: list[Awaitable[Any]] = [
                alice.call_unary(there.peer_id, "waits", b"") for _ in range(50)
            ]
            *errors, _ = await all_of([*calls, kill()])
            assert {type(error) for error in errors} == {DaemonRefused}
            await until(lambda: bob.unary.unanswered_calls == 0)
            assert alice.unary.connected and not bob.unary.connected


async def test_handlers_are_registered_again_after_a_daemon_restart() -> None:
    with DaemonProcess() as here:
        async with here.client() as alice:
            await alice.unary.open()
            there = DaemonProcess()
            try:
                bob = there.client()
                await bob.add_unary_handler("echo", echo)
                await alice.connect(there.peer_id, there.addrs)
                assert await alice.call_unary(there.peer_id, "echo", b"before") == b"before"
                address = there.control_maddr
            finally:
                there.stop()
            with DaemonProcess(control_maddr=address) as there:
                async with bob:
                    await until(lambda: not bob.unary.connected)
                    # A client that only serves must reconnect by itself.
                    await until(lambda: bob.unary.connected)
                    await alice.connect(there.peer_id, there.addrs)
                    assert await alice.call_unary(there.peer_id, "echo", b"after") == b"after"


async def test_connection_broken_right_after_a_reconnect_is_reopened() -> None:
    served = threading.Event()

    def script(connection: Connection) -> None:
        connection.upgrade()
        acknowledged = frame(acknowledgement(connection.read_message().call_id))
        if 1 < connection.number < 6:
            # The bytes that break the connection arrive together with the last acknowledgement.
            connection.send(acknowledged + b"\xff" * 11)
            return
        connection.send(acknowledged)
        if connection.number == 1:
            return
        served.set()
        connection.wait_closed()

    with FakeDaemon(script) as fake:
        async with Client(fake.control_maddr) as client:
            await client.add_unary_handler("echo", echo)
            await until(served.is_set)
            await until(lambda: client.unary.connected)


async def test_every_lost_connection_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    served = threading.Event()

    def script(connection: Connection) -> None:
        connection.upgrade()
        message = connection.read_message()
        if connection.number == 2:  # is lost while the handler is registered again
            return
        connection.send(frame(acknowledgement(message.call_id)))
        if connection.number == 3:
            served.set()
            connection.wait_closed()

    def losses() -> list[str]:
        return [line for line in caplog.messages if "persistent connection" in line]

    with FakeDaemon(script) as fake:
        async with Client(fake.control_maddr) as client:
            await client.add_unary_handler("echo", echo)
            await until(served.is_set)
            await until(lambda: client.unary.connected)
            assert len(losses()) == 2
        # The client has closed the third connection itself.
        assert len(losses()) == 2


async def test_reconnect_backs_off_if_the_daemon_drops_every_connection() -> None:
    def script(connection: Connection) -> None:
        connection.upgrade()
        message = connection.read_message()
        if connection.number == 1:
            connection.send(frame(acknowledgement(message.call_id)))

    with FakeDaemon(script) as fake:
        async with Client(fake.control_maddr) as client:
            await client.add_unary_handler("echo", echo)
            await anyio.sleep(1.5)
            # Attempts after 0.05, 0.15, 0.35, 0.75 and 1.55 s.
            assert 2 <= fake.accepted <= 6


def test_client_whose_loop_ended_during_a_reconnect_works_on_the_next_loop(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def script(connection: Connection) -> None:
        if connection.number == 1:
            connection.upgrade()
            connection.send(frame(acknowledgement(connection.read_message().call_id)))
        else:
            unary_echo(connection)

    async def serve(client: Client) -> None:
        await client.add_unary_handler("echo", echo)
        await until(lambda: not client.unary.connected)

    with FakeDaemon(script) as fake:
        client = Client(fake.control_maddr)
        loop = asyncio.new_event_loop()
        loop.run_until_complete(serve(client))
        loop.close()
        assert asyncio.run(call_echo(client, b"the next")) == b"the next"
        asyncio.run(client.close())
    gc.collect()
    caplog.clear()  # asyncio's warning about a loop closed with a pending task


@pytest.mark.parametrize("closes", [True, False], ids=["close", "next loop"])
def test_client_whose_loop_ended_during_the_upgrade_can_be_closed_and_used(
    anyio_backend: Any, closes: bool
) -> None:
    backend, options = anyio_backend

    def run(function: Callable[[Client], Coroutine[Any, Any, object]]) -> None:
        if backend == "trio":
            # In another thread, since the fixtures' event loop runs in this one.
            with ThreadPoolExecutor(1) as thread:
                thread.submit(trio.run, function, client).result()
            return
        loop = uvloop.new_event_loop() if options["use_uvloop"] else asyncio.new_event_loop()
        loop.run_until_complete(function(client))
        loop.close()

    async def gives_up(client: Client) -> None:
        with pytest.raises(ControlTimeout):
            await client.unary.open(timeout=0.05)

    with FakeDaemon(by_connection(silent, then=unary_echo)) as fake:
        client = Client(fake.control_maddr)
        run(gives_up)
        if closes:
            client.unary.close()
        run(assert_usable)
        run(Client.close)


@pytest.mark.parametrize("how", ["removed", "closed", "dropped"])
async def test_reconnect_stops_when_there_are_no_handlers_left(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = functools.partial(Lifecycle, backoff=(0.01, 0.02))
    monkeypatch.setattr("p2pclient_rs.persistent.Lifecycle", quick)

    def script(connection: Connection) -> None:
        if connection.number == 1:
            connection.upgrade()
            connection.send(frame(acknowledgement(connection.read_message().call_id)))
        else:
            connection.read_request()

    with FakeDaemon(script) as fake:
        client: Client | None = Client(fake.control_maddr)
        assert client is not None
        await client.add_unary_handler("echo", echo)
        await until(lambda: fake.accepted > 5)
        if how == "removed":
            await client.remove_unary_handler("echo")
        elif how == "closed":
            await client.close()
        else:
            client = None
            gc.collect()
        await anyio.sleep(0.1)  # time for an attempt in progress to end
        before = fake.accepted
        await anyio.sleep(0.3)
        assert fake.accepted == before
        if client is not None:
            await client.close()


# --- invalid replies ---


async def test_replies_with_unknown_call_ids_are_ignored() -> None:
    def script(connection: Connection) -> None:
        connection.upgrade()
        while True:
            call = connection.read_message()
            if call.kind == "cancel":
                continue
            strange = os.urandom(16)
            for answer in (
                reply(strange, b"unknown"),
                handler_error(strange, b"unknown"),
                acknowledgement(strange),
                daemon_error(strange, b"unknown"),
                cancellation(strange),
                reply(call.call_id, call.data),
                reply(call.call_id, b"repeated"),
                handler_error(call.call_id, b"repeated"),
                daemon_error(call.call_id, b"repeated"),
                acknowledgement(call.call_id),
                cancellation(call.call_id),
            ):
                connection.send(frame(answer))

    with FakeDaemon(script) as fake:
        async with Client(fake.control_maddr) as client:
            for number in range(20):
                assert await call_echo(client, b"%d" % number, timeout=10) == b"%d" % number
            assert fake.accepted == 1 and client.unary.pending_calls == 0


async def test_cancelled_call_sends_cancel_and_drops_its_late_reply() -> None:
    late: list[Message] = []

    def script(connection: Connection) -> None:
        connection.upgrade()
        while True:
            message = connection.read_message()
            if message.kind == "cancel":
                (call,) = (m for m in late if m.call_id == message.call_id)
                # A reply that crossed with the Cancel, then the Go daemon's answer to the Cancel.
                connection.send(frame(reply(call.call_id, b"late")))
                connection.send(frame(cancellation(call.call_id)))
                late.append(message)
            elif message.data == b"silence":
                late.append(message)
            else:
                connection.send(frame(reply(message.call_id, message.data)))

    with FakeDaemon(script) as fake:
        async with Client(fake.control_maddr) as client:
            with pytest.raises(ControlTimeout):
                await call_echo(client, b"silence", timeout=0.1)
            await until(lambda: len(late) == 2)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(call_echo, client, b"silence")
                await until(lambda: len(late) == 3)
                tasks.cancel_scope.cancel()
            await until(lambda: len(late) == 4)
            for _ in range(5):
                await assert_usable(client)
            assert [message.kind for message in late] == ["call", "cancel"] * 2
            assert len({message.call_id for message in late}) == 2
            assert fake.accepted == 1 and client.unary.pending_calls == 0


async def test_daemon_error_raises_daemon_refused_with_its_message() -> None:
    def script(connection: Connection) -> None:
        connection.upgrade()
        while True:
            connection.send(frame(daemon_error(connection.read_message().call_id, b"no way")))

    with FakeDaemon(script) as fake:
        async with Client(fake.control_maddr) as client:
            with pytest.raises(DaemonRefused, match="no way") as error:
                await call_echo(client)
            assert error.value.daemon_message == "no way"
            assert (error.value.request, error.value.peer_id) == ("CALL_UNARY", FAKE_PEER)
            assert error.value.protocol == "echo"
            with pytest.raises(DaemonRefused, match="no way") as error:
                await client.add_unary_handler("echo", echo)
            assert error.value.protocol == "echo"
            # Nothing was registered, so the handler can be added again but not removed.
            with pytest.raises(DaemonRefused, match="no way"):
                await client.add_unary_handler("echo", echo)
            with pytest.raises(ControlFailure, match="not registered"):
                await client.remove_unary_handler("echo")
            assert fake.accepted == 1


@pytest.mark.parametrize(
    "strange",
    [
        lambda c: acknowledgement(c),
        lambda c: field(1, c) + field(2, b""),
        lambda c: field(1, c) + field(2, b"\xff"),
        lambda c: field(1, c) + field(2, 7),
    ],
    ids=["no message", "no result", "a malformed result", "a number"],
)
async def test_reply_without_a_result_fails_only_its_call(
    strange: Callable[[bytes], bytes],
) -> None:
    """Go daemons forward invalid replies of remote peers this way."""

    def script(connection: Connection) -> None:
        connection.upgrade()
        calls = [connection.read_message() for _ in range(3)]
        for call in sorted(calls, key=lambda call: call.data):
            answer = reply(call.call_id, call.data)
            connection.send(frame(strange(call.call_id) if call.data == b"1" else answer))
        serve_echo(connection)

    with FakeDaemon(script) as fake:
        async with Client(fake.control_maddr) as client:
            before, error, after = await all_of(
                call_echo(client, b"%d" % number, timeout=10) for number in range(3)
            )
            assert (before, after) == (b"0", b"2")
            assert isinstance(error, ProtocolViolation)
            assert (error.request, error.peer_id) == ("CALL_UNARY", FAKE_PEER)
            await assert_usable(client)
            assert fake.accepted == 1


CALL_ID = IDS[0]
BROKEN: dict[str, tuple[Callable[[bytes], bytes], bool]] = {
    # The reply to a call with that id, and whether the daemon then closes the connection.
    "garbage": (lambda c: b"\x05hello", False),
    "text": (lambda c: b"HTTP/1.1 400 Bad Request\r\n\r\n" * 9, False),
    "a length of eleven bytes": (lambda c: b"\x80" * 10 + b"\x01", False),
    "a length that is not minimal": (lambda c: b"\x80\x00", False),
    "a length of 2^63": (lambda c: varint(1 << 63), False),
    "a length of 2 GiB": (lambda c: varint(1 << 31) + reply(c, b""), False),
    "an empty message": (lambda c: b"\x00", False),
    "no call id": (lambda c: frame(field(2, field(1, b"data"))), False),
    "a call id of 15 bytes": (lambda c: frame(reply(c[:15], b"data")), False),
    "a call id of 17 bytes": (lambda c: frame(reply(c + b"x", b"data")), False),
    "an empty call id": (lambda c: frame(reply(b"", b"data")), False),
    "a call id of an incoming call": (lambda c: frame(incoming(b"short", "echo", b"")), False),
    "a field that ends too late": (lambda c: frame(reply(c, b"data")[:-1]), False),
    "nothing": (lambda c: b"", True),
    "half a length": (lambda c: b"\xff", True),
    "half a reply": (lambda c: frame(reply(c, bytes(1000)))[:500], True),
    "half a large reply": (lambda c: frame(reply(c, bytes(1 << 20)))[: 1 << 19], True),
    "all but a byte": (lambda c: frame(reply(c, bytes(100)))[:-1], True),
}


@pytest.mark.parametrize(("answer", "close"), BROKEN.values(), ids=BROKEN)
async def test_invalid_reply_fails_all_pending_calls_at_once(
    answer: Callable[[bytes], bytes], close: bool
) -> None:
    def broken(connection: Connection) -> None:
        connection.upgrade()
        calls = [connection.read_message() for _ in range(5)]
        connection.send(answer(calls[0].call_id))
        if not close:
            connection.wait_closed()

    with FakeDaemon(by_connection(broken, then=unary_echo)) as fake:
        async with Client(fake.control_maddr) as client:
            errors = await all_of(call_echo(client, timeout=10) for _ in range(5))
            # Compares names, as errors with an errno are of a subclass with the same name.
            kinds = {type(error).__name__ for error in errors}
            assert kinds == {"ConnectionLost"} if close else "ProtocolViolation" in kinds
            # The calls after the first may raise either.
            assert kinds <= {"ConnectionLost", "ProtocolViolation"}
            for error in errors:
                assert isinstance(error, ControlFailure)
                assert (error.request, error.peer_id) == ("CALL_UNARY", FAKE_PEER)
            await until(lambda: fake.open == 0)
            assert client.unary.pending_calls == 0
            await assert_usable(client)
            assert fake.accepted == 2


async def test_reply_received_before_an_invalid_message_is_delivered() -> None:
    def script(connection: Connection) -> None:
        connection.upgrade()
        call = connection.read_message()
        connection.send(frame(reply(call.call_id, b"good")) + frame(b"\xff\xff\xff"))
        connection.wait_closed()

    with FakeDaemon(by_connection(script, then=unary_echo)) as fake:
        async with Client(fake.control_maddr) as client:
            assert await call_echo(client) == b"good"
            await assert_usable(client)
            assert fake.accepted == 2


@pytest.mark.parametrize("close", [True, False])
async def test_random_replies_never_hang_or_break_the_client(close: bool) -> None:
    rng = random.Random(6)

    def script(blob: bytes) -> Script:
        def run(connection: Connection) -> None:
            connection.upgrade()
            call = connection.read_message()
            good = frame(reply(call.call_id, bytes(50)))
            damaged = bytearray(good)
            damaged[blob[0] % len(good)] ^= 1 << (blob[1] % 8)
            connection.send(blob if blob[2] & 1 else bytes(damaged))
            if not close:
                # A truncated reply ends when the connection closes.
                select.select([connection.socket], [], [], 0.05)

        return run

    scripts = [script(rng.randbytes(rng.randrange(3, 60))) for _ in range(100)]
    with FakeDaemon(by_connection(*scripts, then=unary_echo)) as fake:
        async with Client(fake.control_maddr) as client:
            for _ in range(300):
                try:
                    await call_echo(client, timeout=10)
                except (ConnectionLost, ProtocolViolation, DaemonRefused, P2PHandlerError):
                    pass
                if fake.accepted > 100:
                    break
            assert fake.accepted > 100
            assert client.unary.pending_calls == 0
            await assert_usable(client)


async def test_reply_may_arrive_one_byte_at_a_time() -> None:
    def script(connection: Connection) -> None:
        for byte in frame(OK):
            if not connection._requests:
                connection.read_request()
            connection.send(bytes([byte]))
        call_number = 0
        while True:
            message = connection.read_message()
            if message.kind == "response":
                continue
            call_number += 1
            answer = frame(reply(message.call_id, message.data))
            if message.kind == "add":
                answer = frame(acknowledgement(message.call_id))
            answer += frame(incoming(IDS[call_number], "echo", b"an incoming call"))
            for byte in answer:
                connection.send(bytes([byte]))

    with FakeDaemon(script) as fake:
        async with Client(fake.control_maddr) as client:
            await client.add_unary_handler("echo", echo)
            for size in (0, 1, 200, 5000):
                data = random.Random(size).randbytes(size)
                assert await call_echo(client, data) == data
            await until(lambda: len(fake.requests) == 1 + 5 + 5)
    responses = [Message.decode(request) for request in fake.requests[1:]]
    assert [m.data for m in responses if m.kind == "response"] == [b"an incoming call"] * 5


async def test_many_messages_in_one_read_are_all_handled() -> None:
    def script(connection: Connection) -> None:
        connection.upgrade()
        connection.send(frame(acknowledgement(connection.read_message().call_id)))
        calls = [connection.read_message() for _ in range(50)]
        answers = [frame(reply(call.call_id, call.data)) for call in calls]
        answers += [frame(incoming(call_id, "echo", call_id * 300)) for call_id in IDS[:50]]
        rng.shuffle(answers)
        connection.send(b"".join(answers))
        serve_echo(connection)

    rng = random.Random(8)
    payloads = [rng.randbytes(rng.choice([0, 10, 5000, 100_000])) for _ in range(50)]
    with FakeDaemon(script) as fake:
        async with Client(fake.control_maddr) as client:
            await client.add_unary_handler("echo", echo)
            assert await all_of(call_echo(client, data) for data in payloads) == payloads
            await until(lambda: len(fake.requests) == 102)
            await assert_usable(client)
    messages = [Message.decode(request) for request in fake.requests[52:]]
    answered = {m.call_id: m.data for m in messages if m.kind == "response"}
    assert answered == {call_id: call_id * 300 for call_id in IDS[:50]}


async def test_subclass_may_define_its_own_timeout() -> None:
    class Impatient(UnaryClient):
        async def call(self, *args: Any, timeout: float | None = 10.0) -> bytes:
            return await super().call(*args, timeout=timeout)

    with FakeDaemon(unary_echo) as fake:
        async with Client(fake.control_maddr) as client:
            client.unary = Impatient(client.unary.daemon_connector)
            assert await call_echo(client) == b"data"
            assert await client.unary.call(FAKE_PEER, "echo", b"more") == b"more"


# --- incoming calls ---


def one_call(call: bytes, answers: list[Message]) -> Script:
    """Makes a call once a handler is registered, and records the reply."""

    def run(connection: Connection) -> None:
        connection.upgrade()
        connection.send(frame(acknowledgement(connection.read_message().call_id)))
        connection.send(frame(call))
        answers.append(connection.read_message())
        serve_echo(connection)

    return run


async def test_call_without_a_handler_is_answered_with_an_error() -> None:
    answers: list[Message] = []
    with FakeDaemon(one_call(incoming(CALL_ID, "other", b"data"), answers)) as fake:
        async with Client(fake.control_maddr) as client:
            await client.add_unary_handler("echo", echo)
            await until(lambda: answers)
            assert (answers[0].kind, answers[0].call_id) == ("error", CALL_ID)
            assert b"other" in answers[0].data
            assert client.unary.unanswered_calls == 0
            await assert_usable(client)
            assert fake.accepted == 1


async def test_call_with_a_protocol_that_is_not_utf8_is_answered_with_an_error() -> None:
    """The caller chooses the protocol's bytes, and the Go daemon forwards them unchecked."""
    call = field(1, PEER) + field(2, b"\xff\xfe") + field(3, b"data")
    answers: list[Message] = []
    with FakeDaemon(one_call(field(1, CALL_ID) + field(3, call), answers)) as fake:
        async with Client(fake.control_maddr) as client:
            await client.add_unary_handler("echo", echo)
            await until(lambda: answers)
            assert (answers[0].kind, answers[0].call_id) == ("error", CALL_ID)
            await assert_usable(client)
            assert fake.accepted == 1


async def test_cancelled_handler_sends_nothing() -> None:
    answers: list[Message] = []
    entered, sent = [], threading.Event()

    def script(connection: Connection) -> None:
        connection.upgrade()
        connection.send(frame(acknowledgement(connection.read_message().call_id)))
        for call_id in IDS[:3]:
            connection.send(frame(incoming(call_id, "handler", call_id)))
        sent.wait(PATIENCE)
        # Cancel the first call twice and an unknown one; leave the other two running.
        for call_id in (IDS[0], IDS[0], IDS[9]):
            connection.send(frame(cancellation(call_id)))
        answers.append(connection.read_message())
        answers.append(connection.read_message())
        serve_echo(connection)

    left = []
    opened = anyio.Event()

    async def handler(data: bytes, peer_id: PeerID) -> bytes:
        entered.append(data)
        try:
            await opened.wait()
        finally:
            left.append(data)
        return data

    with FakeDaemon(script) as fake:
        async with Client(fake.control_maddr) as client:
            await client.add_unary_handler("handler", handler)
            await until(lambda: len(entered) == 3)
            sent.set()
            await until(lambda: left == [IDS[0]])
            await until(lambda: client.unary.unanswered_calls == 2)
            opened.set()
            await until(lambda: len(answers) == 2)
            await assert_usable(client)
    assert {m.call_id: m.data for m in answers} == {i: i for i in IDS[1:3]}
    assert all(message.kind == "response" for message in answers)


async def test_handler_may_make_calls() -> None:
    answers: list[Message] = []

    def script(connection: Connection) -> None:
        connection.upgrade()
        connection.send(frame(acknowledgement(connection.read_message().call_id)))
        connection.send(frame(incoming(CALL_ID, "asks", b"data")))
        call = connection.read_message()
        connection.send(frame(reply(call.call_id, call.data + b" and more")))
        answers.append(connection.read_message())

    with FakeDaemon(script) as fake:
        async with Client(fake.control_maddr) as client:

            async def asks(data: bytes, peer_id: PeerID) -> bytes:
                return await client.call_unary(peer_id, "more", data)

            await client.add_unary_handler("asks", asks)
            await until(lambda: answers)
    assert (answers[0].call_id, answers[0].data) == (CALL_ID, b"data and more")


class Flood:
    """A daemon that forwards more calls than a client can hold."""

    def __init__(self, count: int, size: int) -> None:
        self.count, self.size = count, size
        self.sent = 0
        #: Set once the client has stopped reading.
        self.blocked = threading.Event()
        self.answers: dict[bytes, Message] = {}

    def call_id(self, number: int) -> bytes:
        return number.to_bytes(16, "big")

    def data(self, number: int) -> bytes:
        return number.to_bytes(4, "big") * (self.size // 4)

    def script(self, connection: Connection) -> None:
        connection.upgrade()
        connection.send(frame(acknowledgement(connection.read_message().call_id)))
        reader = threading.Thread(target=self.read, args=(connection,))
        reader.start()
        for number in range(self.count):
            rest = memoryview(frame(incoming(self.call_id(number), "handler", self.data(number))))
            while rest:
                if not select.select([], [connection.socket], [], 0.5)[1]:
                    self.blocked.set()
                    select.select([], [connection.socket], [], PATIENCE)
                rest = rest[connection.socket.send(rest, socket.MSG_DONTWAIT) :]
            self.sent += 1
        reader.join(PATIENCE)

    def read(self, connection: Connection) -> None:
        while len(self.answers) < self.count:
            try:
                message = connection.read_message()
            except (OSError, Gone):
                return
            assert message.call_id not in self.answers
            self.answers[message.call_id] = message


@pytest.mark.parametrize(
    ("count", "size"), [(20_000, 4), (400, 1 << 20)], ids=["many small", "large"]
)
async def test_flood_of_calls_is_held_back_and_loses_no_call(count: int, size: int) -> None:
    flood = Flood(count, size)
    go_on = anyio.Event()
    entered = []

    async def handler(data: bytes, peer_id: PeerID) -> bytes:
        entered.append(data[:4])
        await go_on.wait()
        assert data == data[:4] * (flood.size // 4)
        return data[:4]

    before = resident_memory()
    with FakeDaemon(flood.script) as fake:
        async with Client(fake.control_maddr) as client:
            await client.add_unary_handler("handler", handler)
            await until(flood.blocked.is_set)
            assert flood.sent < count
            assert len(entered) <= client.unary.unanswered_calls < count
            assert resident_memory() - before < 128 << 20
            assert flood.answers == {}
            go_on.set()
            await until(lambda: len(flood.answers) == count, within=25)
            assert client.unary.unanswered_calls == 0
            assert fake.accepted == 1
    assert all(message.kind == "response" for message in flood.answers.values())
    assert [flood.answers[flood.call_id(n)].data for n in range(count)] == [
        flood.data(n)[:4] for n in range(count)
    ]


async def test_flood_of_calls_does_not_delay_an_outgoing_call() -> None:
    """While a reply is pending the client keeps reading, and refuses excess calls as busy."""
    count = 20_000
    kinds: list[str] = []

    def script(connection: Connection) -> None:
        connection.upgrade()
        connection.send(frame(acknowledgement(connection.read_message().call_id)))
        call = connection.read_message()

        def read() -> None:
            while len(kinds) < count:
                message = connection.read_message()
                kinds.append(message.kind)
                if message.kind == "error":
                    assert b"busy" in message.data.lower()

        reader = threading.Thread(target=read)
        reader.start()
        for number in range(count):
            connection.send(frame(incoming(number.to_bytes(16, "big"), "handler", b"data")))
        connection.send(frame(reply(call.call_id, b"answer")))
        reader.join(PATIENCE)

    go_on = anyio.Event()

    async def handler(data: bytes, peer_id: PeerID) -> bytes:
        await go_on.wait()
        return data

    with FakeDaemon(script) as fake:
        async with Client(fake.control_maddr) as client:
            await client.add_unary_handler("handler", handler)
            assert await call_echo(client, timeout=25) == b"answer"
            assert client.unary.unanswered_calls < count
            go_on.set()
            await until(lambda: len(kinds) == count)
            assert fake.accepted == 1
    assert set(kinds) == {"error", "response"}


async def test_calls_wait_while_the_daemon_does_not_read() -> None:
    read_on = threading.Event()
    answered = []

    def deaf(connection: Connection) -> None:
        connection.upgrade()
        read_on.wait(PATIENCE)
        while True:
            message = connection.read_message()
            if message.kind == "call":
                answered.append(message.data[:1])
                connection.send(frame(reply(message.call_id, message.data)))

    data = bytes(1 << 20)
    with FakeDaemon(deaf) as fake:
        async with Client(fake.control_maddr) as client:
            await client.unary.open()
            before = resident_memory()
            async with anyio.create_task_group() as tasks:
                for _ in range(300):
                    tasks.start_soon(call_echo, client, data)
                await until(lambda: client.unary.pending_calls)
                await anyio.sleep(0.3)  # there is no event when the client stops accepting
                assert resident_memory() - before < 128 << 20
                # A waiting call can still be cancelled or time out.
                with pytest.raises(ControlTimeout):
                    await call_echo(client, data, timeout=0.1)
                tasks.cancel_scope.cancel()
            assert client.unary.pending_calls == 0
            read_on.set()
            # The client first completes a partly written message: the daemon reads whole messages.
            data = b"x" + data
            results = await all_of(call_echo(client, data, timeout=20) for _ in range(20))
            assert all(result == data for result in results)
            assert fake.accepted == 1
            assert answered.count(b"x") == 20
            assert answered.count(b"\0") < 300


async def test_call_that_stops_waiting_passes_its_turn_to_the_next() -> None:
    read_on = threading.Event()

    def deaf(connection: Connection) -> None:
        connection.upgrade()
        read_on.wait(PATIENCE)
        serve_echo(connection)

    results = []
    with FakeDaemon(deaf) as fake:
        async with Client(fake.control_maddr) as client:

            async def call(size: int) -> None:
                results.append(len(await call_echo(client, bytes(size), timeout=20)))

            async def too_large() -> None:
                with pytest.raises(MessageTooLarge):
                    await call_echo(client, bytes(5 << 20), timeout=20)
                results.append(-1)

            await client.unary.open()
            async with anyio.create_task_group() as tasks:
                for _ in range(3):
                    tasks.start_soon(call, 1 << 20)
                await until(lambda: client.unary.pending_calls)
                for _ in range(5):
                    tasks.start_soon(too_large)
                    tasks.start_soon(call, 10)
                async with anyio.create_task_group() as cancelled:
                    cancelled.start_soon(call, 20)
                    await anyio.sleep(0.05)
                    cancelled.cancel_scope.cancel()
                tasks.start_soon(call, 30)
                await anyio.sleep(0.05)
                read_on.set()
            assert sorted(results) == [-1] * 5 + [10] * 5 + [30] + [1 << 20] * 3
            assert fake.accepted == 1


async def test_daemon_that_dies_without_reading_fails_all_calls() -> None:
    die = threading.Event()

    def deaf(connection: Connection) -> None:
        connection.upgrade()
        die.wait(PATIENCE)

    with FakeDaemon(by_connection(deaf, then=unary_echo)) as fake:
        async with Client(fake.control_maddr) as client:
            await client.unary.open()
            pending: list[Awaitable[Any]] = [call_echo(client, bytes(1 << 20)) for _ in range(50)]

            async def kill() -> None:
                await until(lambda: client.unary.pending_calls)
                die.set()

            *errors, _ = await all_of([*pending, kill()])
            # Calls that were certainly not sent may have been retried and answered instead.
            assert all(isinstance(error, (ConnectionLost, bytes)) for error in errors)
            assert any(isinstance(error, ConnectionLost) for error in errors)
            await assert_usable(client)


@pytest.mark.parametrize("left", [300_000, 510_000], ids=["written", "room for a call"])
async def test_connection_lost_while_blocked_fails_all_calls_and_is_reopened(left: int) -> None:
    """The loop finds the socket readable and writable at once, and sees the daemon's EOF first.

    Args:
        left: The number of bytes that the daemon leaves unread at first. Once it reads them, the
            socket accepts all pending data, or enough for a caller waiting for room to continue.
    """
    read, go, ended = threading.Event(), threading.Event(), threading.Event()
    size = 700_000

    def script(connection: Connection) -> None:
        connection.upgrade()
        connection.read(2 * size - left)
        read.set()
        go.wait(PATIENCE)
        connection.drain()
        connection.socket.shutdown(socket.SHUT_WR)
        ended.set()
        connection.wait_closed()

    async def end() -> bytes:
        await until(read.is_set)
        for _ in range(20):
            await anyio.lowlevel.checkpoint()
        go.set()
        assert ended.wait(PATIENCE)  # blocks the loop
        return b""

    with FakeDaemon(by_connection(script, then=unary_echo)) as fake:
        async with Client(fake.control_maddr) as client:
            await client.unary.open()
            with anyio.fail_after(PATIENCE):
                calls = [call_echo(client, bytes(n), timeout=5) for n in (size, size, 1)]
                *results, _ = await all_of([*calls, end()])
                assert sum(isinstance(result, ConnectionLost) for result in results) >= 2
                assert all(isinstance(result, (ConnectionLost, bytes)) for result in results)
                await assert_usable(client)


# --- call ids, forked processes ---


async def test_call_ids_are_unique_across_clients_and_forks(anyio_backend: Any) -> None:
    """Daemons tell calls of all their clients and of other peers apart by call id."""
    with FakeDaemon(unary_echo) as fake:

        async def calls() -> None:
            async with Client(fake.control_maddr) as client:
                payloads = [b"%d" % number for number in range(50)]
                assert await all_of(call_echo(client, data) for data in payloads) == payloads

        async with Client(fake.control_maddr) as client:
            await assert_usable(client)
            for _ in range(4):
                await in_child(lambda: run_in_thread(anyio_backend, calls))
            await calls()
            await assert_usable(client)
            await assert_usable(client)
        ids = [Message.decode(r).call_id for r in fake.requests if r != UPGRADE]
    assert len(ids) == len(set(ids)) == 3 + 5 * 50


async def test_client_of_the_parent_is_refused_in_a_forked_child(anyio_backend: Any) -> None:
    with FakeDaemon(unary_echo) as fake:
        async with Client(fake.control_maddr) as client:
            await client.add_unary_handler("echo", echo)
            await assert_usable(client)

            async def use() -> None:
                calls: list[Callable[[], Awaitable[Any]]] = [
                    lambda: call_echo(client),
                    lambda: call_echo(client, timeout=5),
                    lambda: client.add_unary_handler("another", echo),
                    lambda: client.remove_unary_handler("echo"),
                    client.unary.open,
                ]
                for call in calls:
                    with pytest.raises(ForkedClientError, match=f"process {os.getppid()} .*new"):
                        await call()
                with pytest.raises(ForkedClientError) as error:
                    await call_echo(client)
                assert (error.value.request, error.value.peer_id) == ("CALL_UNARY", FAKE_PEER)
                assert error.value.protocol == "echo"

            await in_child(lambda: run_in_thread(anyio_backend, use))
            await assert_usable(client)
            assert fake.accepted == 1


@pytest.mark.parametrize("how", ["unary.close", "client.close", "garbage"])
async def test_dropping_the_client_in_a_forked_child_leaves_pending_calls_alone(
    how: str, anyio_backend: Any
) -> None:
    go_on = threading.Event()

    def script(connection: Connection) -> None:
        connection.upgrade()
        connection.send(frame(acknowledgement(connection.read_message().call_id)))
        call = connection.read_message()
        connection.send(frame(incoming(CALL_ID, "handler", b"incoming")))
        go_on.wait(PATIENCE)
        connection.send(frame(reply(call.call_id, call.data)))
        response = connection.read_message()
        assert (response.kind, response.data) == ("response", b"incoming")
        serve_echo(connection)

    opened = anyio.Event()
    entered = []

    async def handler(data: bytes, peer_id: PeerID) -> bytes:
        entered.append(data)
        await opened.wait()
        return data

    with FakeDaemon(script) as fake:
        clients = [Client(fake.control_maddr)]
        async with clients[0] as client:
            await client.add_unary_handler("handler", handler)

            def drop_client() -> None:
                nonlocal client
                if how == "unary.close":
                    client.unary.close()
                elif how == "garbage":
                    clients.clear()
                    del client
                    gc.collect()
                else:
                    run_in_thread(anyio_backend, client.close)

            results = []

            async def call() -> None:
                results.append(await call_echo(client))

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(call)
                await until(lambda: entered)
                await in_child(drop_client)
                assert client.unary.pending_calls == client.unary.unanswered_calls == 1
                go_on.set()
            opened.set()
            assert results == [b"data"]
            await until(lambda: client.unary.unanswered_calls == 0)
            await assert_usable(client)
            assert fake.accepted == 1


@pytest.mark.parametrize(
    ("backend", "rounds"),
    [
        pytest.param(backend.values[0], rounds, id=backend.id)
        for backend, rounds in zip(BACKENDS, (1000, 100, 100), strict=True)
    ],
)
def test_forks_that_use_the_parents_daemon_leak_nothing(backend: Any, rounds: int) -> None:
    async def main() -> None:
        with DaemonProcess() as here, DaemonProcess() as there:
            here.keep()
            there.keep()
            async with here.client() as alice, there.client() as bob:
                await alice.connect(there.peer_id, there.addrs)
                await bob.add_unary_handler("echo", echo)
                await alice.add_unary_handler("echo", echo)

                async def child() -> None:
                    async with here.client() as client:
                        data = os.urandom(100)
                        assert await client.call_unary(there.peer_id, "echo", data) == data

                async def parent(number: int) -> None:
                    data = b"%d" % number
                    assert await alice.call_unary(there.peer_id, "echo", data) == data
                    assert await bob.call_unary(here.peer_id, "echo", data) == data

                def daemons_descriptors() -> int:
                    return len(os.listdir(f"/proc/{here.process.pid}/fd"))

                await parent(0)
                descriptors, theirs = open_descriptors(), daemons_descriptors()
                for number in range(rounds):
                    async with anyio.create_task_group() as tasks:
                        tasks.start_soon(parent, number)
                        await anyio.lowlevel.checkpoint()  # leaves a call pending
                        await in_child(lambda: run_in_thread(backend, child))
                    if number == rounds // 10:
                        before = resident_memory()
                await parent(rounds)
                assert open_descriptors() == descriptors
                assert resident_memory() - before < 16 << 20
                await until(lambda: daemons_descriptors() <= theirs + 2)

    anyio.run(main, backend=backend[0], backend_options=backend[1])
