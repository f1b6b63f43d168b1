"""Limits of unary calls: large messages, many calls, limits changed while running."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import anyio
import pytest
from fake_daemon import (
    PATIENCE,
    PEER,
    Connection,
    FakeDaemon,
    acknowledgement,
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
from forking import in_child
from support import BACKENDS, DaemonProcess, all_of, eventually, resident_memory, until

from p2pclient_rs import (
    Client,
    ControlFailure,
    DaemonConnector,
    MessageTooLarge,
    P2PHandlerError,
    PeerID,
    UnaryClient,
    daemon_limit,
)
from p2pclient_rs.compat.hivemind import control as hivemind_control
from p2pclient_rs.compat.hivemind.p2pclient import Client as HivemindClient

pytestmark = [pytest.mark.anyio, pytest.mark.needs("unary")]

MIB = 1 << 20
FAKE_PEER = PeerID(PEER)
#: The message limit of the daemons in the fixture ``large``, in bytes.
LARGE = 64 * MIB
#: A message limit set on clients, and the largest message they then accept, in bytes.
LIMIT, INCOMING = 1000, 1000 + (64 << 10)
#: Call ids of incoming calls.
IDS = [bytes([number]) * 16 for number in range(1, 100)]

on_asyncio = pytest.mark.parametrize("anyio_backend", BACKENDS[:2], indirect=True)


async def echo(data: bytes, peer_id: Any) -> bytes:
    return data


def limited(fake: FakeDaemon) -> Client:
    return Client(fake.control_maddr, persistent_conn_max_msg_size=LIMIT)


async def call_echo(client: Client, data: bytes) -> bytes:
    return await client.call_unary(FAKE_PEER, "echo", data, timeout=10)


# --- messages over the limit ---


@pytest.mark.parametrize("kind", [reply, handler_error, daemon_error])
async def test_reply_over_the_limit_fails_only_its_call(
    kind: Callable[[bytes, bytes], bytes],
) -> None:
    sizes = []

    def script(connection: Connection) -> None:
        connection.upgrade()
        calls: dict[bytes, bytes] = {}
        while len(calls) < 3:
            message = connection.read_message()
            calls[message.data] = message.call_id
        oversized = kind(calls[b"b"], bytes(300_000))
        sizes.append(len(oversized))
        connection.send(frame(reply(calls[b"a"], b"A")) + frame(oversized))
        connection.send(frame(reply(calls[b"c"], b"C")))
        serve_echo(connection)

    with FakeDaemon(script) as fake:
        async with limited(fake) as client:
            answers = await all_of(call_echo(client, data) for data in (b"a", b"b", b"c"))
            assert (answers[0], answers[2]) == (b"A", b"C")
            error = answers[1]
            assert isinstance(error, MessageTooLarge) and isinstance(error, ControlFailure)
            assert (error.size, error.limit, error.received) == (sizes[0], INCOMING, True)
            assert str(sizes[0]) in str(error) and str(INCOMING) in str(error)
            assert (error.peer_id, error.protocol) == (FAKE_PEER, "echo")
            assert await call_echo(client, b"next") == b"next"
            assert fake.accepted == 1


async def test_call_over_the_limit_is_answered_with_its_size_and_the_limit() -> None:
    answers: list[Any] = []
    oversized = incoming(IDS[0], "echo", bytes(300_000))

    def script(connection: Connection) -> None:
        connection.upgrade()
        connection.send(frame(acknowledgement(connection.read_message().call_id)))
        connection.send(frame(oversized) + frame(incoming(IDS[1], "echo", b"small")))
        answers.extend(connection.read_message() for _ in range(2))
        connection.wait_closed()

    with FakeDaemon(script) as fake:
        async with limited(fake) as client:
            await client.add_unary_handler("echo", echo)
            await until(lambda: len(answers) == 2)
            assert client.unary.connected
    kinds = {answer.call_id: answer for answer in answers}
    refused, served = kinds[IDS[0]], kinds[IDS[1]]
    assert (served.kind, served.data) == ("response", b"small")
    assert refused.kind == "error"
    assert str(len(oversized)).encode() in refused.data and str(INCOMING).encode() in refused.data


@pytest.mark.parametrize("trickled", [0, 400, 70_000])
async def test_finds_the_call_id_behind_a_payload_over_the_limit(trickled: int) -> None:
    def script(connection: Connection) -> None:
        connection.upgrade()
        call = connection.read_message()
        message = field(99, bytes(100_000)) + field(2, field(1, bytes(300_000)))
        data = frame(message + field(1, call.call_id))
        connection.send(data[:trickled])
        connection.trickle(data[trickled : trickled + 50])
        connection.send(data[trickled + 50 : -10])
        connection.trickle(data[-10:])
        serve_echo(connection)

    with FakeDaemon(script) as fake:
        async with limited(fake) as client:
            with pytest.raises(MessageTooLarge):
                await call_echo(client, b"")
            assert await call_echo(client, b"next") == b"next"
            assert fake.accepted == 1


async def test_skips_a_message_over_the_limit_without_a_call_id(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def script(connection: Connection) -> None:
        connection.upgrade()
        call = connection.read_message()
        for junk in (field(2, bytes(300_000)), b"\xff" * 200_000, bytes(200_000)):
            connection.send(frame(junk))
        connection.send(frame(reply(call.call_id, call.data)))
        serve_echo(connection)

    with FakeDaemon(script) as fake:
        async with limited(fake) as client:
            assert await call_echo(client, b"first") == b"first"
            assert await call_echo(client, b"next") == b"next"
            assert fake.accepted == 1
    lines = [r.getMessage() for r in caplog.records if "without a call id" in r.getMessage()]
    assert len(lines) == 3
    assert str(INCOMING) in lines[0] and "200000" in lines[1]


async def test_message_over_the_limit_is_not_stored() -> None:
    size = 512 * MIB

    def script(connection: Connection) -> None:
        connection.upgrade()
        call = connection.read_message()
        head = field(1, call.call_id) + varint(2 << 3 | 2) + varint(size)
        connection.send(varint(len(head) + size) + head)
        for _ in range(size // MIB):
            connection.send(bytes(MIB))
        serve_echo(connection)

    with FakeDaemon(script) as fake:
        async with Client(fake.control_maddr) as client:
            before = resident_memory()
            with pytest.raises(MessageTooLarge, match=str(size)[:4]):
                await client.call_unary(FAKE_PEER, "echo", b"")
            assert resident_memory() - before < 32 * MIB
            assert await call_echo(client, b"next") == b"next"


async def test_reply_over_the_limit_fails_only_its_registration() -> None:
    def script(connection: Connection) -> None:
        connection.upgrade()
        connection.send(frame(daemon_error(connection.read_message().call_id, bytes(300_000))))
        serve_echo(connection)

    with FakeDaemon(script) as fake:
        async with limited(fake) as client:
            with pytest.raises(MessageTooLarge):
                await client.add_unary_handler("echo", echo)
            assert client.unary.handlers == {}
            await client.add_unary_handler("echo", echo)
            assert fake.accepted == 1


async def test_error_for_a_request_over_the_limit_says_that_it_was_not_sent() -> None:
    with FakeDaemon(unary_echo) as fake:
        async with limited(fake) as client:
            with pytest.raises(MessageTooLarge) as caught:
                await call_echo(client, bytes(LIMIT))
            assert caught.value.size is not None and caught.value.size > LIMIT
            assert (caught.value.limit, caught.value.received) == (LIMIT, False)


# --- the daemon's limit ---


@pytest.mark.parametrize(
    ("command", "limit"),
    [
        ("/x/p2pd -b=1 -persistentConnMaxMsgSize=67108864 -tls=1", LARGE),
        ("p2pd --persistentConnMaxMsgSize=67108864", LARGE),
        ("p2pd -persistentConnMaxMsgSize 67108864", LARGE),
        ("p2pd -persistentConnMaxMsgSize=0x4000000", LARGE),
        ("p2pd -persistentConnMaxMsgSize=1 -persistentConnMaxMsgSize=67108864", LARGE),
        ("p2pd -id -persistentConnMaxMsgSize=5 -persistentConnMaxMsgSize=67108864", LARGE),
        ("renamed -persistentConnMaxMsgSize=67108864", LARGE),
        ("p2pd -listen=/unix/tmp/x", 4 * MIB),
        ("p2pd-linux-amd64", 4 * MIB),
        # Go stops parsing at the first argument that is not a flag.
        ("p2pd -b foo -persistentConnMaxMsgSize=67108864", 4 * MIB),
        ("p2pd -- -persistentConnMaxMsgSize=67108864", 4 * MIB),
        ("p2pd -id=-persistentConnMaxMsgSize=67108864", 4 * MIB),
        ("python -m pytest", None),
        ("socat UNIX-LISTEN:/tmp/p2pd.sock UNIX:/tmp/x", None),
        ("p2pd -persistentConnMaxMsgSize=many", None),
        ("p2pd -persistentConnMaxMsgSize", None),
        ("p2pd -persistentConnMaxMsgSize=", None),
        ("p2pd -persistentConnMaxMsgSize=0", None),
        ("p2pd -persistentConnMaxMsgSize=-1", None),
        ("p2pd -persistentConnMaxMsgSize=99999999999999999999", None),
        ("", None),
    ],
)
def test_reads_the_limit_from_a_command_line(command: str, limit: int | None) -> None:
    assert daemon_limit.of_command([part.encode() for part in command.split()]) == limit


@pytest.fixture(scope="module")
def large() -> Iterator[tuple[DaemonProcess, DaemonProcess]]:
    """Two connected daemons that accept messages up to 64 MiB, the second on TCP."""
    options = "-persistentConnMaxMsgSize", str(LARGE)
    with DaemonProcess(*options) as first, DaemonProcess(*options, transport="tcp") as second:
        first.keep()
        second.keep()

        async def connect() -> None:
            async with second.client() as client:
                await client.connect(first.peer_id, first.addrs)

        anyio.run(connect)
        yield first, second


async def test_client_without_a_limit_adopts_the_daemons(
    large: tuple[DaemonProcess, DaemonProcess],
) -> None:
    first, second = large
    data = os.urandom(8 * MIB)
    async with (
        first.client() as replica,
        Client(second.control_maddr, persistent_conn_max_msg_size=LARGE) as creator,
    ):
        assert replica.unary.max_message_size == 4 * MIB
        await replica.unary.open()
        assert replica.unary.max_message_size == LARGE
        await eventually(lambda: replica.add_unary_handler("large", echo))
        await eventually(lambda: creator.add_unary_handler("large", echo))
        assert await creator.call_unary(first.peer_id, "large", data, timeout=30) == data
        assert await replica.call_unary(second.peer_id, "large", data, timeout=30) == data


async def test_client_keeps_an_explicit_limit(
    large: tuple[DaemonProcess, DaemonProcess],
) -> None:
    first, second = large
    async with (
        Client(first.control_maddr, persistent_conn_max_msg_size=4 * MIB) as small,
        Client(second.control_maddr, persistent_conn_max_msg_size=LARGE) as other,
    ):
        await eventually(lambda: small.add_unary_handler("large", echo))
        small_data, data = bytes(MIB), bytes(8 * MIB)
        calls = [
            other.call_unary(first.peer_id, "large", payload, timeout=30)
            for payload in (small_data, data, small_data)
        ]
        answers = await all_of(calls)
        assert (answers[0], answers[2]) == (small_data, small_data)
        assert isinstance(answers[1], P2PHandlerError)
        assert str(4 * MIB + (64 << 10)) in str(answers[1])
        assert small.unary.connected

        async def grow(data: bytes, peer_id: Any) -> bytes:
            return bytes(8 * MIB)

        await eventually(lambda: other.add_unary_handler("grow", grow))
        answers = await all_of(
            small.call_unary(second.peer_id, name, b"", timeout=30) for name in ("grow", "none")
        )
        assert isinstance(answers[0], MessageTooLarge) and answers[0].received
        assert small.unary.connected
        # A new limit applies to the next message.
        small.unary.max_incoming_size = LARGE
        assert await small.call_unary(second.peer_id, "grow", b"", timeout=30) == bytes(8 * MIB)


async def test_default_limit_of_a_daemon_is_detected(large: Any) -> None:
    with DaemonProcess() as daemon:
        async with daemon.client() as client:
            await client.unary.open()
            assert client.unary.max_message_size == 4 * MIB


@on_asyncio
async def test_hivemind_replicas_adopt_the_daemons_limit(
    large: tuple[DaemonProcess, DaemonProcess],
) -> None:
    first, second = large
    replica = await HivemindClient.create(first.control_maddr, first.listen_maddr())
    creator = await HivemindClient.create(
        second.control_maddr, second.listen_maddr(), persistent_conn_max_msg_size=LARGE
    )
    # Over TCP, the daemon's process is unknown, but the program gave the limit to ``creator``.
    other = await HivemindClient.create(second.control_maddr, second.listen_maddr())
    try:
        for client in (replica, creator, other):
            assert client.control.persistent_conn_max_msg_size == LARGE
        data = os.urandom(8 * MIB)
        await eventually(lambda: replica.add_unary_handler("replica", echo))
        await eventually(lambda: other.add_unary_handler("other", echo))
        here, there = [(await client.identify())[0] for client in (replica, creator)]
        assert await creator.call_unary_handler(here, "replica", data) == data
        assert await other.call_unary_handler(here, "replica", data) == data
        assert await replica.call_unary_handler(there, "other", data) == data
    finally:
        for client in (replica, creator, other):
            client.close()


async def test_forked_processes_know_a_remembered_limit() -> None:
    maddr = "/ip4/127.0.0.1/tcp/9"
    daemon_limit.remember(maddr, LARGE)

    def check() -> None:
        read, write = os.pipe()
        assert daemon_limit.find(read, maddr) == LARGE
        assert daemon_limit.find(write, "/ip4/127.0.0.1/tcp/10") is None

    await in_child(check)


def test_table_of_remembered_limits_is_bounded() -> None:
    for number in range(3000):
        daemon_limit.remember(f"/unix/tmp/{number}", number + 1)
    assert len(daemon_limit._told) <= 1024
    read, write = os.pipe()
    assert daemon_limit.find(read, "/unix/tmp/2999") == 3000
    os.close(read)
    os.close(write)


@on_asyncio
async def test_hivemind_layer_accepts_messages_of_any_size() -> None:
    sizes = []
    data = bytes(40 * MIB)

    async def count(data: bytes, peer_id: Any) -> bytes:
        sizes.append(len(data))
        return b"ok"

    def script(connection: Connection) -> None:
        connection.upgrade()
        connection.send(frame(acknowledgement(connection.read_message().call_id)))
        connection.send(frame(incoming(IDS[0], "count", data)))
        assert connection.read_message().data == b"ok"
        call = connection.read_message()
        connection.send(frame(reply(call.call_id, data)))
        connection.wait_closed()

    with FakeDaemon(script) as fake:
        client = await HivemindClient.create(fake.control_maddr, "/unix/tmp/unused.sock")
        try:
            assert client.control.persistent_conn_max_msg_size == 4 * MIB
            await client.add_unary_handler("count", count)
            await until(lambda: sizes == [len(data)])
            answer = await client.call_unary_handler(FAKE_PEER, "echo", b"")
            assert len(answer) == len(data)
            # Outgoing messages are still limited, since the daemon would close the connection.
            with pytest.raises(ControlFailure):
                await client.call_unary_handler(FAKE_PEER, "echo", data)
        finally:
            client.close()


# --- limits changed while running ---


@on_asyncio
async def test_limit_of_a_hivemind_client_can_be_changed_later(
    large: tuple[DaemonProcess, DaemonProcess],
) -> None:
    first, _ = large
    client = await HivemindClient.create(
        first.control_maddr, first.listen_maddr(), persistent_conn_max_msg_size=4 * MIB
    )
    with FakeDaemon(unary_echo) as fake:
        faked = await HivemindClient.create(
            fake.control_maddr, "/unix/tmp/unused.sock", persistent_conn_max_msg_size=4 * MIB
        )
        try:
            for control in (client.control, faked.control):
                with pytest.raises(ControlFailure, match="limit"):
                    await control.call_unary_handler(FAKE_PEER, "echo", bytes(5 * MIB))
                control.persistent_conn_max_msg_size = LARGE
                assert control.persistent_conn_max_msg_size == LARGE
            answer = await faked.call_unary_handler(FAKE_PEER, "echo", bytes(5 * MIB))
            assert answer == bytes(5 * MIB)
            # The daemon does not know the peer, but it did accept the size of the call.
            with pytest.raises(ControlFailure) as caught:
                await client.call_unary_handler(FAKE_PEER, "echo", bytes(5 * MIB))
            assert "limit" not in str(caught.value)
            faked.control.persistent_conn_max_msg_size = 100
            with pytest.raises(ControlFailure, match="100"):
                await faked.call_unary_handler(FAKE_PEER, "echo", bytes(200))
        finally:
            client.close()
            faked.close()


async def test_limit_of_a_client_can_be_changed_later() -> None:
    with FakeDaemon(unary_echo) as fake:
        async with limited(fake) as client:
            with pytest.raises(MessageTooLarge):
                await call_echo(client, bytes(2000))
            client.unary.max_message_size = 200_000
            assert await call_echo(client, bytes(150_000)) == bytes(150_000)
            client.unary.max_message_size = None
            assert client.unary.max_message_size == 4 * MIB
            assert await call_echo(client, bytes(2 * MIB)) == bytes(2 * MIB)
            client.unary.max_message_size = LIMIT
            with pytest.raises(MessageTooLarge):
                await call_echo(client, bytes(2000))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_message_size", -1),
        ("max_incoming_size", -1),
        ("max_unanswered", -1),
        ("max_unanswered_bytes", -1),
        ("hold", -0.5),
        ("hold", float("nan")),
    ],
)
async def test_invalid_limit_is_refused(name: str, value: Any) -> None:
    connector = DaemonConnector("/unix/tmp/nowhere.sock")
    with pytest.raises(ValueError, match=name):
        UnaryClient(connector, **{name: value})
    unary = UnaryClient(connector)
    before = getattr(unary, name)
    with pytest.raises(ValueError, match=name):
        setattr(unary, name, value)
    assert getattr(unary, name) == before


async def test_new_connector_is_used_for_the_next_connection() -> None:
    with FakeDaemon(unary_echo) as one, FakeDaemon(unary_echo) as two:
        async with Client(one.control_maddr) as client:
            assert await call_echo(client, b"1") == b"1"
            client.unary.daemon_connector = DaemonConnector(two.control_maddr)
            assert await call_echo(client, b"2") == b"2"
            assert (one.accepted, two.accepted) == (1, 0)
            client.unary.close()
            assert await call_echo(client, b"3") == b"3"
            assert (one.accepted, two.accepted) == (1, 1)


# --- many calls at once ---


class Crowd:
    """A daemon that sends many calls of one size at once and records the replies."""

    def __init__(self, count: int, size: int) -> None:
        self.count, self.size = count, size
        self.answers: dict[bytes, Any] = {}
        self.entered: list[int] = []
        self.go_on = anyio.Event()

    def script(self, connection: Connection) -> None:
        connection.upgrade()
        connection.send(frame(acknowledgement(connection.read_message().call_id)))

        def read() -> None:
            while len(self.answers) < self.count:
                message = connection.read_message()
                self.answers[message.call_id] = message

        reader = threading.Thread(target=read)
        reader.start()
        for number in range(self.count):
            connection.send(frame(incoming(IDS[number], "handler", bytes(self.size))))
        reader.join(PATIENCE)
        connection.wait_closed()

    async def handler(self, data: bytes, peer_id: Any) -> bytes:
        self.entered.append(len(data))
        await self.go_on.wait()
        return b"done"

    def kinds(self) -> list[str]:
        return sorted(answer.kind for answer in self.answers.values())


@on_asyncio
async def test_hivemind_layer_serves_sixty_large_calls_at_once() -> None:
    crowd = Crowd(60, 2 * MIB)
    with FakeDaemon(crowd.script) as fake:
        client = await HivemindClient.create(fake.control_maddr, "/unix/tmp/unused.sock")
        try:
            await client.add_unary_handler("handler", crowd.handler)
            # All run at once: none waits for another to end.
            await until(lambda: len(crowd.entered) == crowd.count)
            crowd.go_on.set()
            await until(lambda: len(crowd.answers) == crowd.count)
            assert crowd.kinds() == ["response"] * crowd.count
        finally:
            client.close()


async def test_bounds_can_be_lifted_while_calls_are_held_back() -> None:
    crowd = Crowd(60, 2 * MIB)
    with FakeDaemon(crowd.script) as fake:
        async with Client(fake.control_maddr, hold=None) as client:
            await client.add_unary_handler("handler", crowd.handler)
            await until(lambda: client.unary.unanswered_calls == 32)
            client.unary.max_unanswered_bytes = None
            await until(lambda: len(crowd.entered) == crowd.count)
            crowd.go_on.set()
            await until(lambda: len(crowd.answers) == crowd.count)
            assert crowd.kinds() == ["response"] * crowd.count


@pytest.mark.parametrize("later", [False, True])
async def test_calls_over_the_bound_are_refused_after_hold_seconds(later: bool) -> None:
    # Each call is larger than one read, so the client checks the limit between the calls.
    crowd = Crowd(6, 100_000)
    options: dict[str, Any] = {"max_unanswered": 2, "hold": 0.0}
    with FakeDaemon(crowd.script) as fake:
        async with Client(fake.control_maddr, **({"hold": None} if later else options)) as client:
            if later:
                client.unary.max_unanswered = 2
            await client.add_unary_handler("handler", crowd.handler)
            if later:
                await until(lambda: client.unary.unanswered_calls == 2)
                assert crowd.answers == {}
                client.unary.hold = 0.0
            await until(lambda: len(crowd.answers) == 4)
            assert crowd.kinds() == ["error"] * 4
            assert all(b"busy" in answer.data for answer in crowd.answers.values())
            crowd.go_on.set()
            await until(lambda: len(crowd.answers) == 6)


@pytest.mark.parametrize("anyio_backend", BACKENDS[:1], indirect=True)
async def test_unread_output_starts_no_timer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ended = threading.Event()
    entered = timers = 0

    def script(connection: Connection) -> None:
        connection.upgrade()
        connection.send(frame(acknowledgement(connection.read_message().call_id)))
        calls = (incoming(number.to_bytes(16, "big"), "large", b"") for number in range(40))
        # In one piece: the script reads no replies, so a call after the first ones is refused.
        connection.send(b"".join(map(frame, calls)))
        ended.wait(PATIENCE)

    async def large(data: bytes, peer_id: PeerID) -> bytes:
        nonlocal entered
        entered += 1
        return bytes(2 << 20)

    loop = asyncio.get_running_loop()
    call_later = loop.call_later

    def counted(*args: Any) -> Any:
        nonlocal timers
        timers += 1
        return call_later(*args)

    with FakeDaemon(script) as fake:
        async with Client(fake.control_maddr, hold=0.0) as client:
            await client.add_unary_handler("large", large)
            await until(lambda: entered == 40 and client.unary.unanswered_calls == 0)
            monkeypatch.setattr(loop, "call_later", counted)
            for _ in range(1000):
                await asyncio.sleep(0)
            ended.set()
    assert timers < 10


@on_asyncio
async def test_hivemind_layer_accepts_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    async def refused(**options: Any) -> int:
        crowd = Crowd(6, 100_000)
        with FakeDaemon(crowd.script) as fake:
            client = await HivemindClient.create(
                fake.control_maddr, "/unix/tmp/unused.sock", **options
            )
            try:
                bounds = client.control.max_unanswered, client.control.max_unanswered_bytes
                await client.add_unary_handler("handler", crowd.handler)
                await until(lambda: len(crowd.answers) + len(crowd.entered) == crowd.count)
                assert bounds != (None, None) or crowd.answers == {}
                return len(crowd.answers)
            finally:
                crowd.go_on.set()
                client.close()

    assert await refused() == 0
    assert await refused(max_unanswered=2, hold=0) == 4
    assert await refused(max_unanswered_bytes=250_000, hold=0) == 3
    monkeypatch.setattr(hivemind_control.ControlClient, "DEFAULT_MAX_UNANSWERED", 1)
    monkeypatch.setattr(hivemind_control.ControlClient, "DEFAULT_HOLD", 0.0)
    assert await refused() == 5
    assert await refused(max_unanswered=None) == 0


# --- the table of handlers ---


def answering(answer: bytes) -> Callable[[bytes, Any], Awaitable[bytes]]:
    async def handle(data: bytes, peer_id: Any) -> bytes:
        return answer

    return handle


@on_asyncio
async def test_hiveminds_handler_table_is_read_at_each_call(
    large: tuple[DaemonProcess, DaemonProcess],
) -> None:
    first, second = large
    client = await HivemindClient.create(first.control_maddr, first.listen_maddr())
    caller = await HivemindClient.create(second.control_maddr, second.listen_maddr())
    control = client.control
    try:
        here, _ = await client.identify()

        async def call(proto: str = "x") -> bytes:
            return await asyncio.wait_for(caller.call_unary_handler(here, proto, b""), 10)

        await eventually(lambda: client.add_unary_handler("x", answering(b"1")))
        assert await call() == b"1"
        control.unary_handlers["x"] = answering(b"2")
        assert await call() == b"2"
        del control.unary_handlers["x"]
        with pytest.raises(P2PHandlerError, match="no handler"):
            await call()
        with pytest.raises(ControlFailure, match="not registered"):
            await client.remove_unary_handler("x")
        control.unary_handlers["x"] = answering(b"3")
        assert await call() == b"3"
        with pytest.raises(ControlFailure, match="already registered"):
            await client.add_unary_handler("x", answering(b"no"))
        assert control.unary_handlers.pop("x") is not None
        await client.add_unary_handler("x", answering(b"4"))
        assert await call() == b"4"
        table = {"x": answering(b"5")}
        control.unary_handlers = table
        assert control.unary_handlers is table
        assert await call() == b"5"
        table["x"] = answering(b"6")
        assert await call() == b"6"
        await client.remove_unary_handler("x")
        assert table == {}
        with pytest.raises(ControlFailure):
            await call()
    finally:
        client.close()
        caller.close()


async def test_handler_table_of_a_client_is_read_only() -> None:
    with FakeDaemon(unary_echo) as fake:
        async with Client(fake.control_maddr) as client:
            await client.add_unary_handler("echo", echo)
            handlers: Any = client.unary.handlers
            assert handlers == {"echo": echo}
            with pytest.raises(TypeError):
                handlers["echo"] = echo
            with pytest.raises(TypeError):
                del handlers["echo"]


@on_asyncio
async def test_reconnect_skips_handlers_removed_from_hiveminds_table() -> None:
    names: list[list[str]] = [[], []]

    def script(connection: Connection) -> None:
        connection.upgrade()
        while True:
            message = connection.read_message()
            names[connection.number - 1].append(message.proto)
            connection.send(frame(acknowledgement(message.call_id)))
            if connection.number == 1 and message.proto == "end":
                return

    with FakeDaemon(script) as fake:
        client = await HivemindClient.create(fake.control_maddr, "/unix/tmp/unused.sock")
        try:
            await client.add_unary_handler("kept", echo)
            await client.add_unary_handler("gone", echo)
            del client.control.unary_handlers["gone"]
            client.control.unary_handlers["unknown to the daemon"] = echo
            await client.add_unary_handler("end", echo)
            await until(lambda: len(names[1]) == 2)
            assert set(names[1]) == {"kept", "end"}
        finally:
            client.close()
