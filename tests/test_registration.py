"""Registering a stream handler again: with the same daemon, after it has restarted, and after
another client has taken the protocol."""

from __future__ import annotations

import logging
import pickle
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import anyio
import pytest
from support import DaemonProcess, eventually

from p2pclient_rs import (
    AlreadyRegistered,
    Client,
    ControlFailure,
    DaemonRefused,
    NotRegistered,
    StreamInfo,
)
from p2pclient_rs.stream import Stream

pytestmark = [pytest.mark.anyio, pytest.mark.daemons("hivemind")]


def greeter(greeting: bytes) -> Callable[[StreamInfo, Stream], Awaitable[None]]:
    async def handler(_: StreamInfo, stream: Stream) -> None:
        await stream.send(greeting)
        await stream.aclose()

    return handler


@asynccontextmanager
async def connected(daemon: DaemonProcess) -> AsyncIterator[Client]:
    """A client of another daemon that is connected to ``daemon``."""
    with DaemonProcess() as other:
        async with other.client() as client:
            await client.connect(daemon.peer_id, daemon.addrs)
            yield client


async def greeting(caller: Client, daemon: DaemonProcess, proto: str) -> bytes:
    _, stream = await caller.stream_open(daemon.peer_id, [proto])
    try:
        return await stream.receive()
    except anyio.EndOfStream:
        return b""
    finally:
        await stream.aclose()


async def eventually_greeted(
    caller: Client, daemon: DaemonProcess, proto: str, expected: bytes
) -> None:
    async def check() -> None:
        assert await greeting(caller, daemon, proto) == expected

    await eventually(check)


async def test_protocol_taken_by_another_client_after_a_restart_is_refused() -> None:
    with DaemonProcess() as daemon:
        async with daemon.client() as first, first.listen():
            old = greeter(b"first, old")
            await first.stream_handler("/name", old)
            daemon.restart()
            async with daemon.client() as second, second.listen():
                await second.stream_handler("/name", greeter(b"second"))
                for _ in range(2):
                    with pytest.raises(DaemonRefused, match="already set") as refused:
                        await first.stream_handler("/name", greeter(b"first, new"))
                    assert refused.value.request == "STREAM_HANDLER"
                    assert refused.value.protocol == "/name"
                    assert first.control.handlers == {"/name": old}
                async with connected(daemon) as caller:
                    assert await greeting(caller, daemon, "/name") == b"second"
            # The second client has left, so the protocol is free again.
            await first.stream_handler("/name", greeter(b"first, new"))
            async with connected(daemon) as caller:
                assert await greeting(caller, daemon, "/name") == b"first, new"


async def test_handler_can_be_replaced_after_a_daemon_restart() -> None:
    with DaemonProcess() as daemon:
        async with daemon.client() as client, client.listen():
            await client.stream_handler("/name", greeter(b"old"))
            daemon.restart()
            await client.stream_handler("/name", greeter(b"new"))
            await client.stream_handler("/name", greeter(b"newest"))
            async with connected(daemon) as caller:
                assert await greeting(caller, daemon, "/name") == b"newest"


async def test_handler_is_replaced_only_if_that_is_allowed() -> None:
    with DaemonProcess() as daemon:
        async with daemon.client() as client, client.listen():
            await client.stream_handler("/name", greeter(b"first"), replace=False)
            with pytest.raises(ControlFailure, match="already registered") as failure:
                await client.stream_handler("/name", greeter(b"second"), replace=False)
            assert failure.value.request == "STREAM_HANDLER"
            assert failure.value.protocol == "/name"
            assert type(failure.value) is AlreadyRegistered
            assert failure.value.daemon_message is None
            assert "replace" in str(failure.value)
            async with connected(daemon) as caller:
                assert await greeting(caller, daemon, "/name") == b"first"


async def test_refused_registration_and_removal_raise_their_own_classes() -> None:
    with DaemonProcess() as daemon:
        async with daemon.client() as first, first.listen(), daemon.client() as second:
            await first.stream_handler("/name", greeter(b"first"))
            async with second.listen():
                with pytest.raises(AlreadyRegistered) as taken:
                    await second.stream_handler("/name", greeter(b"second"))
                with pytest.raises(NotRegistered) as missing:
                    await second.remove_stream_handler("/name")
            for error, message in ((taken.value, "already set"), (missing.value, "not exist")):
                assert isinstance(error, DaemonRefused)
                assert error.protocol == "/name"
                assert error.daemon_message is not None and message in error.daemon_message
                assert error.hint is not None and error.hint in str(error)
                copy = pickle.loads(pickle.dumps(error))
                assert type(copy) is type(error) and str(copy) == str(error)


async def test_replacing_a_handler_drops_no_streams() -> None:
    with DaemonProcess() as daemon:
        async with daemon.client() as client, client.listen(), connected(daemon) as caller:
            await client.stream_handler("/name", greeter(b"0"))
            await eventually_greeted(caller, daemon, "/name", b"0")
            done, greetings = anyio.Event(), list[bytes]()

            async def call() -> None:
                while not done.is_set():
                    greetings.append(await greeting(caller, daemon, "/name"))

            async with anyio.create_task_group() as tasks:
                for _ in range(4):
                    tasks.start_soon(call)
                for number in range(1, 51):
                    await client.stream_handler("/name", greeter(str(number).encode()))
                    # Turns an idle pooled connection into the pipeline.
                    await client.identify()
                done.set()
            assert greetings and b"" not in greetings
            assert await greeting(caller, daemon, "/name") == b"50"


async def test_handler_can_be_replaced_after_the_pool_was_closed() -> None:
    with DaemonProcess() as daemon:
        daemon.keep()
        async with daemon.client() as client, client.listen(), daemon.client() as other:
            await client.stream_handler("/name", greeter(b"old"))
            await client.control.daemon_connector.aclose()
            await client.stream_handler("/name", greeter(b"new"))
            async with connected(daemon) as caller:
                assert await greeting(caller, daemon, "/name") == b"new"
            async with other.listen():
                with pytest.raises(DaemonRefused):
                    await other.stream_handler("/name", greeter(b"other"))


async def test_replaced_balanced_handler_gets_one_share() -> None:
    with DaemonProcess() as daemon:
        daemon.keep()
        async with daemon.client() as one, one.listen(), daemon.client() as two, two.listen():
            for _ in range(3):
                await one.stream_handler("/name", greeter(b"one"), balanced=True)
            await two.stream_handler("/name", greeter(b"two"), balanced=True)
            async with connected(daemon) as caller:
                greetings = [await greeting(caller, daemon, "/name") for _ in range(6)]
                assert sorted(greetings) == [b"one"] * 3 + [b"two"] * 3
                await one.remove_stream_handler("/name")
                for _ in range(3):
                    assert await greeting(caller, daemon, "/name") == b"two"


async def test_shared_protocol_cannot_be_made_exclusive() -> None:
    with DaemonProcess() as daemon:
        daemon.keep()
        async with daemon.client() as one, one.listen(), daemon.client() as two, two.listen():
            await one.stream_handler("/name", greeter(b"one"), balanced=True)
            await two.stream_handler("/name", greeter(b"two"), balanced=True)
            with pytest.raises(DaemonRefused):
                await one.stream_handler("/name", greeter(b"exclusive"))
            async with connected(daemon) as caller:
                greetings = [await greeting(caller, daemon, "/name") for _ in range(6)]
                assert sorted(greetings) == [b"one"] * 3 + [b"two"] * 3
            await two.remove_stream_handler("/name")
            await one.stream_handler("/name", greeter(b"exclusive"))
            async with connected(daemon) as caller:
                assert await greeting(caller, daemon, "/name") == b"exclusive"


async def test_registration_with_port_0_requires_listening_first() -> None:
    with DaemonProcess() as daemon:
        async with Client(daemon.control_maddr, "/ip4/127.0.0.1/tcp/0") as client:
            with pytest.raises(ControlFailure, match="listen"):
                await client.stream_handler("/name", greeter(b"nobody"))
            assert client.control.handlers == {}
            async with client.listen():
                await client.stream_handler("/name", greeter(b"one"))
                async with connected(daemon) as caller:
                    assert await greeting(caller, daemon, "/name") == b"one"


async def test_concurrent_registrations_of_one_protocol_leave_one_handler() -> None:
    with DaemonProcess() as daemon:
        async with daemon.client() as client, client.listen(), connected(daemon) as caller:
            async with anyio.create_task_group() as tasks:
                for number in range(20):
                    tasks.start_soon(client.stream_handler, "/name", greeter(b"%d" % number))
            assert await greeting(caller, daemon, "/name") in {b"%d" % n for n in range(20)}
            assert client.control._registrations._registering == {}


async def test_cancelled_registration_can_be_repeated() -> None:
    with DaemonProcess() as daemon:
        async with daemon.client() as client, client.listen():
            # Cancel at various moments, before and after the daemon has the registration.
            for number in range(20):
                with anyio.move_on_after(number * 5e-5):
                    await client.stream_handler("/name", greeter(b"cancelled"))
            await client.stream_handler("/name", greeter(b"made"))
            async with connected(daemon) as caller:
                assert await greeting(caller, daemon, "/name") == b"made"


async def test_register_again_reports_a_protocol_taken_by_another_client(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with DaemonProcess() as daemon:
        async with daemon.client() as first, first.listen():
            for proto in ("/taken", "/free"):
                await first.stream_handler(proto, greeter(b"first"))
            daemon.restart()
            async with daemon.client() as second, second.listen():
                await second.stream_handler("/taken", greeter(b"second"))
                with caplog.at_level(logging.ERROR), pytest.raises(DaemonRefused) as refused:
                    await first.control.register_again()
                assert refused.value.protocol == "/taken"
                assert [record for record in caplog.messages if "/taken" in record]
                async with connected(daemon) as caller:
                    assert await greeting(caller, daemon, "/taken") == b"second"
                    assert await greeting(caller, daemon, "/free") == b"first"


async def test_register_again_is_idempotent() -> None:
    with DaemonProcess() as daemon:
        async with daemon.client() as client, client.listen(), connected(daemon) as caller:
            await client.stream_handler("/name", greeter(b"hello"))
            for _ in range(3):
                await client.control.register_again()
            assert await greeting(caller, daemon, "/name") == b"hello"
