"""The pool of control connections, and the errors of calls when the daemon misbehaves."""

from __future__ import annotations

import random
import select
import socket
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import pytest
from fake_daemon import (
    ADDR,
    ERROR,
    IDENTITY,
    OK,
    PEER,
    STREAM_OPENED,
    Connection,
    FakeDaemon,
    Gone,
    Script,
    by_connection,
    decode,
    dht,
    field,
    frame,
    honest,
    varint,
)
from support import BACKENDS, until

from p2pclient_rs import (
    Client,
    ConnectionLost,
    ControlClient,
    ControlFailure,
    ControlTimeout,
    DaemonConnector,
    DaemonRefused,
    NotSupported,
    PeerID,
    ProtocolViolation,
    StreamInfo,
)
from p2pclient_rs.connector import Types

pytestmark = [pytest.mark.anyio, pytest.mark.independent]

FAKE_PEER = PeerID(PEER)

transports = pytest.mark.parametrize("transport", ["unix", "tcp"])


async def assert_usable(client: Client) -> None:
    """Asserts that an IDENTIFY succeeds."""
    assert (await client.identify(timeout=10)).peer_id == FAKE_PEER


# --- the pool ---


@transports
async def test_sequential_calls_share_one_connection(transport: str) -> None:
    with FakeDaemon(honest, transport) as fake:
        async with Client(fake.control_maddr) as client:
            for _ in range(50):
                await assert_usable(client)
            assert len(fake.requests) == 50
            assert fake.accepted == fake.open == 1
        await until(lambda: fake.open == 0)


@transports
async def test_thousand_concurrent_calls_share_a_few_connections(
    transport: str,
) -> None:
    results = []
    with FakeDaemon(honest, transport) as fake:
        async with Client(fake.control_maddr) as client:

            async def call() -> None:
                results.append(await client.identify())

            async with anyio.create_task_group() as tasks:
                for _ in range(1000):
                    tasks.start_soon(call)
            assert {identity.peer_id for identity in results} == {FAKE_PEER}
            assert len(results) == len(fake.requests) == 1000
            assert fake.accepted <= 8


async def test_pool_is_bounded_and_keeps_at_most_max_idle() -> None:
    lock = threading.Lock()
    busy: list[int] = [0]

    def slow(connection: Connection) -> None:
        while True:
            connection.read_request()
            with lock:
                busy.append(busy[-1] + 1)
            # Hold back replies until the pool has reached its limit.
            deadline = time.monotonic() + 10
            while max(busy) < 5 and time.monotonic() < deadline:
                time.sleep(0.001)
            with lock:
                busy.append(busy[-1] - 1)
            connection.send(frame(OK))

    with FakeDaemon(slow) as fake:
        connector = DaemonConnector(fake.control_maddr, max_connections=5, max_idle=2)
        control = ControlClient(connector)
        async with anyio.create_task_group() as tasks:
            for _ in range(30):
                tasks.start_soon(control.connect, FAKE_PEER, [ADDR])
        assert len(fake.requests) == 30
        assert max(busy) == 5
        await until(lambda: fake.open == 2)
        await connector.aclose()
        await until(lambda: fake.open == 0)


async def test_local_requests_do_not_queue_behind_remote_ones() -> None:
    def script(connection: Connection) -> None:
        while True:
            request = connection.read_request()
            if request.startswith(field(1, 1)):  # CONNECT is never answered
                connection.wait_closed()
                return
            connection.send(frame(IDENTITY))

    with FakeDaemon(script) as fake:
        connector = DaemonConnector(fake.control_maddr, max_connections=2)
        control = ControlClient(connector)
        async with anyio.create_task_group() as tasks:
            for _ in range(4):
                tasks.start_soon(control.connect, FAKE_PEER, [ADDR])
            await until(lambda: len(fake.requests) == 2)
            await control.identify(timeout=10)
            tasks.cancel_scope.cancel()
        await connector.aclose()
        await until(lambda: fake.open == 0)


async def test_connection_turned_stream_leaves_the_pool() -> None:
    @by_connection
    def script(connection: Connection) -> None:
        connection.answer(STREAM_OPENED)
        assert connection.read(4) == b"ping"
        connection.send(b"pong")
        assert connection.wait_closed() == b""

    with FakeDaemon(script) as fake:
        async with Client(fake.control_maddr) as client:
            info, stream = await client.stream_open(FAKE_PEER, ["/echo"])
            assert (info.peer_id, info.proto) == (FAKE_PEER, "/echo")
            await assert_usable(client)
            await stream.send(b"ping")
            assert await stream.readexactly(4) == b"pong"
            await stream.aclose()
            await assert_usable(client)
            assert fake.accepted == 2


async def test_stream_is_closed_if_its_info_cannot_be_converted() -> None:
    class Refusing(Types):
        def stream_info(self, info: StreamInfo) -> Any:
            raise ValueError("not an address of this ecosystem")

    def script(connection: Connection) -> None:
        connection.answer(STREAM_OPENED)
        connection.wait_closed()

    with FakeDaemon(script) as fake:
        control = ControlClient(DaemonConnector(fake.control_maddr, types=Refusing()))
        with pytest.raises(ValueError, match="not an address"):
            await control.stream_open(FAKE_PEER, ["/echo"])
        await until(lambda: fake.accepted == 1 and not fake.open)


async def test_bytes_after_the_stream_open_response_belong_to_the_stream() -> None:
    def script(connection: Connection) -> None:
        connection.read_request()
        connection.send(frame(STREAM_OPENED) + b"at once")
        connection.wait_closed()

    with FakeDaemon(script) as fake:
        async with Client(fake.control_maddr) as client:
            _, stream = await client.stream_open(FAKE_PEER, ["/echo"])
            async with stream:
                assert await stream.receive() == b"at once"


async def test_refusal_leaves_the_connection_usable() -> None:
    def script(connection: Connection) -> None:
        for _ in range(4):
            connection.answer(ERROR)
        honest(connection)

    with FakeDaemon(script) as fake:
        async with Client(fake.control_maddr) as client:
            calls: list[Callable[[], Awaitable[Any]]] = [
                client.identify,
                lambda: client.stream_open(FAKE_PEER, ["/echo"]),
                lambda: client.pubsub_subscribe("topic"),
                lambda: client.dht_get_value(b"key"),
            ]
            for call in calls:
                with pytest.raises(DaemonRefused) as error:
                    await call()
                assert error.value.daemon_message == "no such luck"
            await assert_usable(client)
            assert fake.accepted == 1


async def test_cancelled_call_closes_its_connection() -> None:
    def silent(connection: Connection) -> None:
        connection.read_request()
        connection.wait_closed()

    with FakeDaemon(by_connection(silent)) as fake:
        async with Client(fake.control_maddr) as client:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(client.identify)
                await until(lambda: fake.requests)
                tasks.cancel_scope.cancel()
            await until(lambda: fake.open == 0)
            await assert_usable(client)
            assert fake.accepted == 2


async def test_call_cancelled_while_waiting_for_a_permit_sends_nothing() -> None:
    def script(connection: Connection) -> None:
        connection.read_request()
        release.wait()
        connection.send(frame(OK))
        honest(connection)

    release = threading.Event()
    with FakeDaemon(script) as fake:
        connector = DaemonConnector(fake.control_maddr, max_connections=1)
        control = ControlClient(connector)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(control.connect, FAKE_PEER, [ADDR])
            await until(lambda: fake.requests)
            with pytest.raises(ControlTimeout):
                await control.connect(FAKE_PEER, [ADDR], timeout=0.05)
            release.set()
        await control.identify(timeout=10)
        assert fake.accepted == 1
        assert len(fake.requests) == 2
        await connector.aclose()


@transports
async def test_idle_connection_closed_by_the_daemon_is_replaced(transport: str) -> None:
    with FakeDaemon(by_connection(lambda c: c.answer(IDENTITY)), transport) as fake:
        async with Client(fake.control_maddr) as client:
            await assert_usable(client)
            await until(lambda: fake.open == 0)
            await assert_usable(client)
            assert len(fake.requests) == fake.accepted == 2


async def test_request_that_could_not_be_written_is_retried() -> None:
    def deaf(connection: Connection) -> None:
        connection.answer(IDENTITY)
        connection.socket.shutdown(socket.SHUT_RD)  # the client's write fails, its read does not
        stopped.append(connection.number)
        until_closed(connection)

    def until_closed(connection: Connection) -> None:
        poll = select.poll()
        poll.register(connection.socket, select.POLLHUP)
        assert poll.poll(10_000)

    stopped: list[int] = []
    with FakeDaemon(by_connection(deaf)) as fake:
        async with Client(fake.control_maddr) as client:
            await assert_usable(client)
            await until(lambda: stopped)
            await assert_usable(client)
            assert len(fake.requests) == fake.accepted == 2


async def test_request_left_unread_by_a_unix_daemon_is_retried() -> None:
    def closes_unread(connection: Connection) -> None:
        connection.answer(IDENTITY)
        connection.wait_readable()

    with FakeDaemon(by_connection(closes_unread)) as fake:
        async with Client(fake.control_maddr) as client:
            await assert_usable(client)
            await assert_usable(client)
            assert len(fake.requests) == fake.accepted == 2


@transports
@pytest.mark.parametrize("idle_before", [False, True], ids=["new", "reused"])
async def test_request_read_by_the_daemon_is_never_retried(
    transport: str, idle_before: bool
) -> None:
    def reads_and_closes(connection: Connection) -> None:
        if idle_before:
            connection.answer(IDENTITY)
        connection.read_request()

    with FakeDaemon(by_connection(reads_and_closes), transport) as fake:
        async with Client(fake.control_maddr) as client:
            if idle_before:
                await assert_usable(client)
            sent = len(fake.requests)
            with pytest.raises(ConnectionLost, match="without answering") as error:
                await client.connect(FAKE_PEER, [ADDR])
            assert (error.value.request, error.value.peer_id) == ("CONNECT", FAKE_PEER)
            assert isinstance(error.value, ConnectionError)
            assert len(fake.requests) == sent + 1
            assert fake.accepted == 1
            await assert_usable(client)


async def test_request_is_not_retried_after_a_tcp_reset() -> None:
    def resets(connection: Connection) -> None:
        connection.answer(IDENTITY)
        connection.wait_readable()
        connection.reset()

    with FakeDaemon(by_connection(resets), "tcp") as fake:
        async with Client(fake.control_maddr) as client:
            await assert_usable(client)
            with pytest.raises(ConnectionLost, match="reset") as error:
                await client.connect(FAKE_PEER, [ADDR])
            assert isinstance(error.value.__cause__, ConnectionResetError)
            assert fake.accepted == 1
            await assert_usable(client)


async def test_failure_on_a_new_connection_is_not_retried() -> None:
    with FakeDaemon(by_connection(lambda c: c.wait_readable())) as fake:
        async with Client(fake.control_maddr) as client:
            with pytest.raises(ConnectionLost):
                await client.identify()
            assert fake.accepted == 1
            await assert_usable(client)


async def test_closed_client_can_be_used_again() -> None:
    with FakeDaemon(honest) as fake:
        client = Client(fake.control_maddr)
        for times in (1, 2):
            await assert_usable(client)
            await client.close()
            await client.close()
            await until(lambda: fake.open == 0)
            assert fake.accepted == times


async def test_close_lets_calls_in_flight_finish_and_then_closes_their_connections() -> None:
    release = threading.Event()

    def script(connection: Connection) -> None:
        connection.read_request()
        release.wait()
        connection.send(frame(IDENTITY))
        connection.wait_closed()

    with FakeDaemon(script) as fake:
        client = Client(fake.control_maddr)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(assert_usable, client)
            await until(lambda: fake.requests)
            await client.close()
            release.set()
        await until(lambda: fake.open == 0)


@pytest.mark.parametrize("backend_and_options", BACKENDS)
def test_client_can_be_used_on_one_event_loop_after_another(backend_and_options: Any) -> None:
    backend, options = backend_and_options

    async def run(client: Client) -> None:
        await assert_usable(client)
        await assert_usable(client)

    with FakeDaemon(honest) as fake:
        client = Client(fake.control_maddr)
        for _ in range(3):
            anyio.run(run, client, backend=backend, backend_options=options)
        assert len(fake.requests) == 6
        assert fake.accepted == 3  # one connection per event loop
        anyio.run(client.close, backend=backend, backend_options=options)


async def test_open_connection_sends_nothing() -> None:
    def script(connection: Connection) -> None:
        assert connection.read(3) == b"raw"
        connection.send(b"war")

    with FakeDaemon(script) as fake:
        async with await DaemonConnector(fake.control_maddr).open_connection() as stream:
            await stream.send(b"raw")
            assert await stream.read() == b"war"
            assert fake.requests == []


# --- timeouts ---


async def ignore(info: object, stream: object) -> None:
    """A stream handler that does nothing."""


@pytest.mark.parametrize("timeout", [0.2, 1.0])
async def test_unanswered_call_times_out(timeout: float) -> None:
    def silent(connection: Connection) -> None:
        connection.read_request()
        connection.wait_closed()

    with FakeDaemon(by_connection(silent)) as fake:
        async with Client(fake.control_maddr) as client:
            start = time.monotonic()
            with pytest.raises(ControlTimeout, match=f"no answer within {timeout:g} s") as error:
                await client.identify(timeout=timeout)
            assert timeout <= time.monotonic() - start < timeout + 1
            assert isinstance(error.value, TimeoutError)
            assert error.value.request == "IDENTIFY"
            assert error.value.daemon_message is None
            await until(lambda: fake.open == 0)
            await assert_usable(client)
            assert fake.accepted == 2


async def test_incomplete_reply_times_out() -> None:
    def half(connection: Connection) -> None:
        connection.read_request()
        connection.send(frame(IDENTITY)[:-1])
        connection.wait_closed()

    with FakeDaemon(by_connection(half)) as fake:
        async with Client(fake.control_maddr) as client:
            with pytest.raises(ControlTimeout):
                await client.identify(timeout=0.2)
            await assert_usable(client)
            assert fake.accepted == 2


@pytest.mark.parametrize(
    ("timeout", "seconds"), [(None, None), (0.1, 1), (1.0, 1), (1.2, 2), (59.5, 60)]
)
async def test_timeout_is_sent_to_the_daemon_in_whole_seconds(
    timeout: float | None, seconds: int | None
) -> None:
    def script(connection: Connection) -> None:
        for answer in (OK, STREAM_OPENED):
            connection.answer(answer)
        connection.wait_closed()

    with FakeDaemon(script) as fake:
        async with Client(fake.control_maddr) as client:
            await client.connect(FAKE_PEER, [], timeout=timeout)
            _, stream = await client.stream_open(FAKE_PEER, ["/echo"], timeout=timeout)
            await stream.aclose()
    timeout_field = b"" if seconds is None else field(3, seconds)
    peer = field(1, PEER)
    assert fake.requests == [
        field(1, 1) + field(2, peer + timeout_field),
        field(1, 2) + field(3, peer + field(2, b"/echo") + timeout_field),
    ]


@pytest.mark.parametrize("timeout", [-1.0, float("nan"), float("-inf")])
async def test_invalid_timeout_raises_value_error(timeout: float) -> None:
    peer, maddrs = FAKE_PEER, [ADDR]
    with FakeDaemon(honest) as fake:
        async with Client(fake.control_maddr) as client:
            connector = client.control.daemon_connector
            calls: list[Callable[[], Awaitable[Any]]] = [
                lambda: client.identify(timeout=timeout),
                lambda: client.connect(peer, maddrs, timeout=timeout),
                lambda: client.disconnect(peer, timeout=timeout),
                lambda: client.list_peers(timeout=timeout),
                lambda: client.stream_open(peer, ["/echo"], timeout=timeout),
                lambda: client.stream_handler("/echo", ignore, timeout=timeout),
                lambda: client.connmgr_trim(timeout=timeout),
                lambda: client.dht_get_value(b"key", timeout=timeout),
                lambda: client.pubsub_subscribe("topic", timeout=timeout),
                lambda: connector.open_connection(timeout=timeout),
            ]
            for call in calls:
                with pytest.raises(ValueError, match="timeout"):
                    await call()
            assert fake.accepted == 0
            await client.identify(timeout=float("inf"))


# --- misbehaving daemons ---


def sends(data: bytes, close: bool) -> Script:
    """Answers one request with raw ``data``; then closes the connection if ``close``."""

    def run(connection: Connection) -> None:
        connection.read_request()
        connection.send(data)
        if not close:
            connection.wait_closed()

    return run


@transports
async def test_reply_cut_off_anywhere_raises_connection_lost(transport: str) -> None:
    answer = frame(IDENTITY)
    scripts = [sends(answer[:size], close=True) for size in range(len(answer))]
    with FakeDaemon(by_connection(*scripts), transport) as fake:
        async with Client(fake.control_maddr) as client:
            for size in range(len(answer)):
                message = "in the middle of its answer" if size else "without answering"
                with pytest.raises(ConnectionLost, match=message):
                    await client.identify(timeout=10)
            await assert_usable(client)
            assert fake.accepted == len(answer) + 1


BROKEN = {
    "garbage": (b"\x05hello", "malformed Response"),
    "an error message in text": (b"HTTP/1.1 400 Bad Request\r\n\r\n" * 9, "malformed Response"),
    "a length of eleven bytes": (b"\x80" * 10 + b"\x01", "malformed length"),
    "a length that is not minimal": (b"\x80\x00", "malformed length"),
    "a length of 2^63": (varint(1 << 63), "message of 9223372036854775808 bytes"),
    "a length over the limit": (varint((4 << 20) + (64 << 10) + 1), "the limit is 4259840"),
    "an empty message": (b"\x00", "Response without `type`"),
    "an unknown type": (frame(field(1, 7)), "unknown type 7"),
    "another request's answer": (frame(STREAM_OPENED), "Response without `identify`"),
    "no content": (frame(OK), "Response without `identify`"),
    "no peer id": (frame(OK + field(4, field(2, ADDR))), "IdentifyResponse without `id`"),
    "a malformed content": (frame(OK + field(4, b"\xff")), "malformed Response"),
    "a content of another wire type": (frame(OK + field(4, 1)), "malformed Response"),
}


@pytest.mark.parametrize(("data", "message"), BROKEN.values(), ids=BROKEN)
async def test_invalid_reply_raises_protocol_violation_at_once(data: bytes, message: str) -> None:
    with FakeDaemon(by_connection(sends(data, close=False))) as fake:
        async with Client(fake.control_maddr) as client:
            with pytest.raises(ProtocolViolation, match=message) as error:
                await client.identify(timeout=10)
            assert error.value.request == "IDENTIFY"
            await until(lambda: fake.open == 0)
            await assert_usable(client)
            assert fake.accepted == 2


BEGIN, END = frame(OK + field(5, dht(0))), frame(dht(2))
VALUE = frame(dht(1, value=b"value"))
INFO = field(1, PEER) + field(2, ADDR)

BROKEN_DHT = {
    "end before begin": (frame(OK + field(5, dht(2))), False, "END before BEGIN"),
    "begin twice": (BEGIN + frame(dht(0)), False, "BEGIN after BEGIN"),
    "no dht": (frame(OK), False, "Response without `dht`"),
    "no type": (frame(OK + field(5, b"")), False, "DHTResponse without `type`"),
    "unknown type": (BEGIN + frame(field(1, 9)), False, "unknown type 9"),
    "no value": (BEGIN + frame(dht(1)), False, "DHTResponse without `value`"),
    "a peer for a value": (BEGIN + frame(dht(1, peer=INFO)), False, "without `value`"),
    "cut off after a value": (BEGIN + VALUE, True, "in the middle of its answer"),
    "cut off after begin": (BEGIN, True, "in the middle of its answer"),
    "cut off in a value": (BEGIN + VALUE[:-1], True, "in the middle of its answer"),
}


@pytest.mark.parametrize(("data", "close", "message"), BROKEN_DHT.values(), ids=BROKEN_DHT)
async def test_invalid_sequence_of_dht_values_raises_at_once(
    data: bytes, close: bool, message: str
) -> None:
    with FakeDaemon(by_connection(sends(data, close))) as fake:
        async with Client(fake.control_maddr) as client:
            with pytest.raises(ConnectionLost if close else ProtocolViolation, match=message):
                await client.dht_search_value(b"key", timeout=10)
            await until(lambda: fake.open == 0)
            await assert_usable(client)


async def test_dht_queries_return_all_values_and_leave_the_connection_usable() -> None:
    def script(connection: Connection) -> None:
        peers = [frame(dht(1, peer=INFO))] * 3
        for answer in (
            BEGIN + VALUE + VALUE + END,
            BEGIN + END,
            BEGIN + b"".join(peers) + END,
            frame(OK + field(5, dht(1, value=b"only"))),
            frame(OK + field(5, dht(1, peer=INFO))),
            BEGIN + VALUE + END,
        ):
            connection.read_request()
            connection.send(answer)
        honest(connection)

    with FakeDaemon(script) as fake:
        async with Client(fake.control_maddr) as client:
            assert await client.dht_search_value(b"key") == (b"value", b"value")
            assert await client.dht_search_value(b"key") == ()
            providers = await client.dht_find_providers(b"cid", 3)
            assert [info.peer_id for info in providers] == [FAKE_PEER] * 3
            assert await client.dht_get_value(b"key") == b"only"
            assert (await client.dht_find_peer(FAKE_PEER)).addrs[0].to_bytes() == ADDR
            assert await client.dht_get_value(b"key") == b"value"
            await assert_usable(client)
            assert fake.accepted == 1


async def test_peerstore_request_is_sent_only_after_a_probe() -> None:
    unknown = frame(field(1, 1) + field(2, field(1, b"ERR_INVALID_REQUEST_TYPE")))

    def script(connection: Connection) -> None:
        if fake.accepted > 1:
            honest(connection)
            return
        for store in (field(2, b"/a") + field(2, b"/b"), field(1, INFO)):
            assert decode(connection.read_request()) == {1: 2**31 - 1}  # the probe: an unknown type
            connection.send(unknown)
            request = decode(connection.read_request())
            assert (request[1], sorted(request)) == (9, [1, 9])
            connection.send(frame(OK + field(8, store)))
        # This daemon does not answer the probe, so the client must not send the PEERSTORE request.
        # hivemind's daemon would mistake it for an upgrade, and could shut down when the connection
        # ends; upstream's daemon closes the connection.
        assert decode(connection.read_request()) == {1: 2**31 - 1}

    with FakeDaemon(script) as fake:
        async with Client(fake.control_maddr) as client:
            assert await client.peerstore_get_protocols(FAKE_PEER) == ("/a", "/b")
            info = await client.peerstore_get_peer_info(FAKE_PEER)
            assert (info.peer_id, info.addrs[0].to_bytes()) == (FAKE_PEER, ADDR)
            with pytest.raises(NotSupported) as error:
                await client.peerstore_get_protocols(FAKE_PEER)
            assert error.value.request == "PEERSTORE GET_PROTOCOLS"
            assert error.value.peer_id == FAKE_PEER
            await assert_usable(client)


async def test_reply_may_arrive_one_byte_at_a_time() -> None:
    def script(connection: Connection) -> None:
        while True:
            connection.read_request()
            for byte in frame(IDENTITY):
                connection.send(bytes([byte]))

    with FakeDaemon(script) as fake:
        async with Client(fake.control_maddr) as client:
            for _ in range(5):
                await assert_usable(client)
            assert fake.accepted == 1


@pytest.mark.parametrize("extra", [b"\x00", frame(IDENTITY)])
async def test_connection_with_bytes_after_the_reply_is_not_reused(extra: bytes) -> None:
    with FakeDaemon(by_connection(sends(frame(IDENTITY) + extra, close=False))) as fake:
        async with Client(fake.control_maddr) as client:
            await assert_usable(client)
            await assert_usable(client)
            assert fake.accepted == 2


async def test_connection_with_unsolicited_data_is_not_reused() -> None:
    sent: list[int] = []

    def talks(connection: Connection) -> None:
        connection.answer(IDENTITY)
        answered.wait()
        connection.send(frame(ERROR))
        sent.append(1)
        connection.wait_closed()

    answered = threading.Event()
    with FakeDaemon(by_connection(talks)) as fake:
        async with Client(fake.control_maddr) as client:
            await assert_usable(client)
            answered.set()
            await until(lambda: sent)
            await assert_usable(client)
            assert fake.accepted == 2


async def test_random_replies_never_hang_or_break_the_client() -> None:
    rng = random.Random(7)
    blobs = [rng.randbytes(rng.randrange(1, 60)) for _ in range(100)]
    with FakeDaemon(by_connection(*(sends(blob, close=True) for blob in blobs))) as fake:
        async with Client(fake.control_maddr) as client:
            for _ in blobs:
                with pytest.raises(ControlFailure) as error:
                    await client.identify(timeout=10)
                assert type(error.value) in (ConnectionLost, ProtocolViolation, DaemonRefused)
            await assert_usable(client)


async def test_request_over_the_limit_is_refused_by_the_client() -> None:
    with FakeDaemon(honest) as fake:
        async with Client(fake.control_maddr) as client:
            with pytest.raises(ControlFailure, match="the limit is 4259840") as error:
                await client.pubsub_publish("topic", bytes(5 << 20))
            assert error.value.request == "PUBSUB PUBLISH"
            await assert_usable(client)
            assert len(fake.requests) == 1


async def test_large_request_reaches_a_slow_daemon() -> None:
    def slow(connection: Connection) -> None:
        connection.read_request()
        connection.send(frame(OK))
        connection.wait_closed()

    data = random.Random(1).randbytes(4 << 20)
    with FakeDaemon(slow) as fake:
        async with Client(fake.control_maddr) as client:
            await client.pubsub_publish("topic", data, timeout=20)
    assert fake.requests == [
        field(1, 8) + field(8, field(1, 2) + field(2, b"topic") + field(3, data))
    ]


async def test_max_message_size_limits_replies() -> None:
    with FakeDaemon(honest) as fake:
        connector = DaemonConnector(fake.control_maddr, max_message_size=len(IDENTITY) - 1)
        with pytest.raises(ProtocolViolation, match=f"the limit is {len(IDENTITY) - 1}"):
            await ControlClient(connector).identify()
        connector = DaemonConnector(fake.control_maddr, max_message_size=len(IDENTITY))
        assert (await ControlClient(connector).identify()).peer_id == FAKE_PEER
        await connector.aclose()


def test_fake_daemon_raises_assertion_errors_of_its_scripts() -> None:
    def wrong(connection: Connection) -> None:
        raise Gone if connection.number == 2 else AssertionError("wrong")

    async def call() -> None:
        for _ in range(2):
            with pytest.raises(ConnectionLost):
                await client.identify()

    with pytest.raises(AssertionError, match="wrong"), FakeDaemon(wrong) as fake:
        client = Client(fake.control_maddr)
        anyio.run(call)
