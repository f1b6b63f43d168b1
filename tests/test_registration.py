"""Stream handlers that are registered again: at the same daemon, at one that was started anew, and
where another client has taken the name meanwhile."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import anyio
import pytest
from support import DaemonProcess, eventually

from p2pclient_rs import Client, ControlFailure, DaemonRefused, StreamInfo
from p2pclient_rs.streams import Stream

pytestmark = [pytest.mark.anyio, pytest.mark.daemons("hivemind")]


def greeter(greeting: bytes) -> Callable[[StreamInfo, Stream], Awaitable[None]]:
    async def handler(_: StreamInfo, stream: Stream) -> None:
        await stream.send(greeting)
        await stream.aclose()

    return handler


@asynccontextmanager
async def connected(daemon: DaemonProcess) -> AsyncIterator[Client]:
    """A client of another daemon that is connected to this one."""
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


async def is_greeted(caller: Client, daemon: DaemonProcess, proto: str, words: bytes) -> None:
    async def check() -> None:
        assert await greeting(caller, daemon, proto) == words

    await eventually(check)


async def test_a_name_that_another_client_took_after_a_restart_is_refused() -> None:
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
            # The name is free now.
            await first.stream_handler("/name", greeter(b"first, new"))
            async with connected(daemon) as caller:
                assert await greeting(caller, daemon, "/name") == b"first, new"


async def test_a_handler_is_replaced_at_a_daemon_that_was_started_anew() -> None:
    with DaemonProcess() as daemon:
        async with daemon.client() as client, client.listen():
            await client.stream_handler("/name", greeter(b"old"))
            daemon.restart()
            await client.stream_handler("/name", greeter(b"new"))
            await client.stream_handler("/name", greeter(b"newest"))
            async with connected(daemon) as caller:
                assert await greeting(caller, daemon, "/name") == b"newest"


async def test_replacing_a_handler_drops_no_stream() -> None:
    with DaemonProcess() as daemon:
        async with daemon.client() as client, client.listen(), connected(daemon) as caller:
            await client.stream_handler("/name", greeter(b"0"))
            await is_greeted(caller, daemon, "/name", b"0")
            done, greetings = anyio.Event(), list[bytes]()

            async def call() -> None:
                while not done.is_set():
                    greetings.append(await greeting(caller, daemon, "/name"))

            async with anyio.create_task_group() as tasks:
                for _ in range(4):
                    tasks.start_soon(call)
                for number in range(1, 51):
                    await client.stream_handler("/name", greeter(str(number).encode()))
                    # Turns an idle connection of the pool into a pipeline.
                    await client.identify()
                done.set()
            assert greetings and b"" not in greetings
            assert await greeting(caller, daemon, "/name") == b"50"


async def test_replacing_works_after_the_connections_were_closed() -> None:
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


async def test_a_balanced_handler_that_is_replaced_has_one_share() -> None:
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


async def test_a_shared_name_is_not_made_exclusive() -> None:
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


async def test_port_0_cannot_be_registered_before_the_client_listens() -> None:
    with DaemonProcess() as daemon:
        async with Client(daemon.control_maddr, "/ip4/127.0.0.1/tcp/0") as client:
            with pytest.raises(ControlFailure, match="listen"):
                await client.stream_handler("/name", greeter(b"nobody"))
            assert client.control.handlers == {}
            async with client.listen():
                await client.stream_handler("/name", greeter(b"one"))
                async with connected(daemon) as caller:
                    assert await greeting(caller, daemon, "/name") == b"one"


async def test_registrations_of_one_name_at_once_end_with_one_that_is_served() -> None:
    with DaemonProcess() as daemon:
        async with daemon.client() as client, client.listen(), connected(daemon) as caller:
            async with anyio.create_task_group() as tasks:
                for number in range(20):
                    tasks.start_soon(client.stream_handler, "/name", greeter(b"%d" % number))
            assert await greeting(caller, daemon, "/name") in {b"%d" % n for n in range(20)}
            assert client.control._registering == {}


async def test_a_registration_that_was_given_up_can_be_made_again() -> None:
    with DaemonProcess() as daemon:
        async with daemon.client() as client, client.listen():
            # Cancelled at any moment, before or after the daemon has the registration.
            for number in range(20):
                with anyio.move_on_after(number * 5e-5):
                    await client.stream_handler("/name", greeter(b"given up"))
            await client.stream_handler("/name", greeter(b"made"))
            async with connected(daemon) as caller:
                assert await greeting(caller, daemon, "/name") == b"made"


async def test_registering_again_tells_of_a_name_that_another_client_took(
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


async def test_registering_again_what_the_daemon_has_is_no_error() -> None:
    with DaemonProcess() as daemon:
        async with daemon.client() as client, client.listen(), connected(daemon) as caller:
            await client.stream_handler("/name", greeter(b"hello"))
            for _ in range(3):
                await client.control.register_again()
            assert await greeting(caller, daemon, "/name") == b"hello"
