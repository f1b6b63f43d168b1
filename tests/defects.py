"""Provokes the defects of hivemind's bindings, in those or in ours, and prints the results as JSON.

Usage: defects.py ours|hivemind

The result of each test is true for correct behaviour. This is a separate program because it imports
the original. An event that does not happen within a second counts as never happening.
"""

import asyncio
import json
import sys
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Protocol, TypeAlias

sys.path.insert(0, str(Path(__file__).parent.parent / "benches"))
import incumbents  # noqa: E402
from fake_daemon import (  # noqa: E402
    ERROR,
    PATIENCE,
    PEER,
    Connection,
    FakeDaemon,
    acknowledgement,
    cancellation,
    daemon_error,
    frame,
    incoming,
    varint,
)

NEVER = 1.0
CALL_ID = bytes(range(16))


async def happens(awaitable: Awaitable[Any]) -> bool:
    """Returns whether ``awaitable`` completes in time, with a result or an error."""
    try:
        await asyncio.wait_for(awaitable, NEVER)
    except asyncio.TimeoutError:
        return False
    except Exception:
        pass
    return True


def add_one_handler(connection: Connection) -> None:
    connection.upgrade()
    connection.send(frame(acknowledgement(connection.read_message().call_id)))


class Answer:
    """Sends a call of a protocol to the client, and records whether the client answers it."""

    def __init__(self, proto: str) -> None:
        self.proto = proto
        self.received = threading.Event()

    def script(self, connection: Connection) -> None:
        add_one_handler(connection)
        connection.send(frame(incoming(CALL_ID, self.proto, b"")))
        connection.read_message()
        self.received.set()


class Contender(Protocol):
    """The operations that both clients support."""

    async def call(self, data: bytes) -> bytes:
        """Calls a peer's echo."""

    async def add(self, proto: str, handler: Callable[[bytes, Any], Awaitable[bytes]]) -> None:
        """Adds a handler."""

    def running(self) -> int:
        """Returns how many handlers the client considers running."""

    async def close(self) -> None: ...


class Ours:
    def __init__(self, client: Any) -> None:
        self._client = client

    @classmethod
    async def create(cls, fake: FakeDaemon) -> Contender:
        from p2pclient_rs import Client

        client = Client(fake.control_maddr)
        await client.unary.open()
        return cls(client)

    async def call(self, data: bytes) -> bytes:
        result: bytes = await self._client.call_unary(PEER, "echo", data)
        return result

    async def add(self, proto: str, handler: Callable[[bytes, Any], Awaitable[bytes]]) -> None:
        await self._client.add_unary_handler(proto, handler)

    def running(self) -> int:
        return int(self._client.unary.unanswered_calls)

    async def close(self) -> None:
        await self._client.close()


class Hivemind:
    def __init__(self, client: Any, peer: Any) -> None:
        self._client = client
        self._peer = peer

    @classmethod
    async def create(cls, fake: FakeDaemon) -> Contender:
        incumbents.load_hivemind()
        from hivemind.p2p.p2p_daemon_bindings.datastructures import PeerID
        from hivemind.p2p.p2p_daemon_bindings.p2pclient import Client
        from multiaddr import Multiaddr

        client = await Client.create(
            Multiaddr(fake.control_maddr),
            Multiaddr("/unix/tmp/unused.sock"),
            persistent_conn_max_msg_size=4 << 20,
        )
        return cls(client, PeerID(PEER))

    async def call(self, data: bytes) -> bytes:
        result: bytes = await self._client.call_unary_handler(self._peer, "echo", data)
        return result

    async def add(self, proto: str, handler: Callable[[bytes, Any], Awaitable[bytes]]) -> None:
        await self._client.add_unary_handler(proto, handler)

    def running(self) -> int:
        return len(self._client.control._handler_tasks)

    async def close(self) -> None:
        tasks = self._client.control._handler_tasks.values()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._client.close()


Create: TypeAlias = Callable[[FakeDaemon], Awaitable[Contender]]


async def lost(create: Create) -> dict[str, bool]:
    def script(connection: Connection) -> None:
        connection.upgrade()
        connection.read_message()

    with FakeDaemon(script) as fake:
        client = await create(fake)
        pending = await happens(client.call(b""))
        later = await happens(client.call(b""))
        await client.close()
    return {"a pending call ends with its connection": pending, "a later call ends": later}


async def answered(create: Create) -> dict[str, bool]:
    async def too_large(data: bytes, peer_id: object) -> bytes:
        return bytes(5 << 20)

    results = {}
    for proto, statement in (
        ("unknown", "a call for an unknown protocol is answered"),
        ("large", "a call whose result is too large is answered"),
    ):
        answer = Answer(proto)
        with FakeDaemon(answer.script) as fake:
            client = await create(fake)
            await client.add("large", too_large)
            results[statement] = await asyncio.to_thread(answer.received.wait, NEVER)
            await client.close()
    return results


async def refused(create: Create) -> dict[str, bool]:
    def no_upgrade(connection: Connection) -> None:
        connection.answer(ERROR)
        connection.wait_closed()

    with FakeDaemon(no_upgrade) as fake:
        try:
            await (await create(fake)).close()
            raised = False
        except Exception:
            raised = True

    def no_handler(connection: Connection) -> None:
        connection.upgrade()
        while True:
            connection.send(frame(daemon_error(connection.read_message().call_id, b"taken")))

    async def handler(data: bytes, peer_id: object) -> bytes:
        return data

    with FakeDaemon(no_handler) as fake:
        client = await create(fake)
        for _ in range(2):
            try:
                await client.add("echo", handler)
            except Exception as error:
                message = str(error)
        await client.close()
    return {
        "a refused upgrade is an error": raised,
        "a handler that the daemon refused can be tried again": "taken" in message,
    }


async def cancelled(create: Create) -> dict[str, bool]:
    cancel = threading.Event()

    def script(connection: Connection) -> None:
        add_one_handler(connection)
        connection.send(frame(incoming(CALL_ID, "handler", b"")))
        cancel.wait(PATIENCE)
        connection.send(frame(cancellation(CALL_ID)))
        connection.wait_closed()

    async def handler(data: bytes, peer_id: object) -> bytes:
        cancel.set()
        try:
            await asyncio.sleep(PATIENCE)
        finally:
            left.set()
        return data

    left = asyncio.Event()
    with FakeDaemon(script) as fake:
        client = await create(fake)
        await client.add("handler", handler)
        await left.wait()
        await asyncio.sleep(0)
        entries = client.running()
        await client.close()
    return {"a cancelled handler leaves no entry": entries == 0}


async def too_long(create: Create) -> dict[str, bool]:
    def script(connection: Connection) -> None:
        connection.upgrade()
        connection.read_message()
        connection.send(varint(1 << 40))
        connection.wait_closed()

    with FakeDaemon(script) as fake:
        client = await create(fake)
        ended = await happens(client.call(b""))
        await client.close()
    return {"a message of a tebibyte is refused": ended}


async def main(kind: str) -> None:
    create: Create = {"ours": Ours.create, "hivemind": Hivemind.create}[kind]
    results: dict[str, bool] = {}
    for provoke in (lost, answered, refused, cancelled, too_long):
        results |= await provoke(create)
    print(json.dumps(results))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
