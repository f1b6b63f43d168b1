"""Unary calls between clients of two real hivemind daemons."""

from __future__ import annotations

import array
import asyncio
import hashlib
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import anyio
import pytest
from fake_daemon import field, frame, varint
from support import BACKENDS, DaemonProcess, all_of, eventually, revive, unknown_peer, until

from p2pclient_rs import (
    AlreadyRegistered,
    Client,
    ConnectionLost,
    ControlFailure,
    ControlTimeout,
    DaemonRefused,
    InvalidPeerID,
    MessageTooLarge,
    NotRegistered,
    P2PDaemonError,
    P2PHandlerError,
    PeerID,
    ProtocolViolation,
    Stream,
    StreamInfo,
)

pytestmark = [pytest.mark.anyio, pytest.mark.needs("unary")]

#: The message limit of clients and daemons, in bytes.
LIMIT = 4 << 20


def connect_daemons(first: DaemonProcess, second: DaemonProcess) -> None:
    """Connects two daemons and keeps them running when their clients leave."""
    first.keep()
    second.keep()

    async def connect() -> None:
        async with first.client() as client:
            await client.connect(second.peer_id, second.addrs)

    anyio.run(connect)


@pytest.fixture(scope="module")
def swarm() -> Iterator[tuple[DaemonProcess, DaemonProcess]]:
    """Two connected daemons."""
    with DaemonProcess() as first, DaemonProcess() as second:
        connect_daemons(first, second)
        yield first, second


@dataclass
class Pair:
    """A client of each of two connected daemons."""

    alice: Client
    bob: Client
    alice_daemon: DaemonProcess
    bob_daemon: DaemonProcess

    async def call(self, proto: str, data: Any = b"", timeout: float | None = None) -> bytes:
        """Makes Alice call one of Bob's handlers."""
        return await self.alice.call_unary(self.bob_daemon.peer_id, proto, data, timeout=timeout)

    def idle(self) -> bool:
        """Whether neither client has pending or unanswered calls."""
        clients = (self.alice.unary, self.bob.unary)
        return not any(c.pending_calls or c.unanswered_calls for c in clients)


@pytest.fixture
async def pair(swarm: tuple[DaemonProcess, DaemonProcess]) -> AsyncIterator[Pair]:
    first, second = swarm
    restarted = revive(first, second)
    async with first.client() as alice, second.client() as bob:
        if restarted:
            await alice.connect(second.peer_id, second.addrs)
        pair = Pair(alice, bob, first, second)
        yield pair
        await until(pair.idle)
        # The next test registers the same names, perhaps before the daemons notice that these
        # clients have left.
        for client in (alice, bob):
            for name in client.unary.handlers:
                await client.remove_unary_handler(name)


async def echo(data: bytes, peer_id: PeerID) -> bytes:
    return data


async def backwards(data: bytes, peer_id: PeerID) -> bytes:
    await anyio.lowlevel.checkpoint()
    return data[::-1]


# --- calls and results ---


async def test_calls_in_both_directions_pass_the_callers_peer_id(pair: Pair) -> None:
    callers = []

    async def greet(data: bytes, peer_id: PeerID) -> bytes:
        assert type(data) is bytes and isinstance(peer_id, PeerID)
        callers.append(peer_id)
        return b"hello " + data

    await pair.alice.add_unary_handler("greet", greet)
    await pair.bob.add_unary_handler("greet", greet)
    there, here = pair.bob_daemon.peer_id, pair.alice_daemon.peer_id
    for peer_id in (there, str(there), there.to_bytes()):
        assert await pair.alice.call_unary(peer_id, "greet", b"Bob") == b"hello Bob"
    assert await pair.bob.call_unary(here, "greet", b"Alice", timeout=10) == b"hello Alice"
    assert callers == [here] * 3 + [there]


async def test_calls_over_tcp() -> None:
    with DaemonProcess(transport="tcp") as first, DaemonProcess(transport="tcp") as second:
        async with first.client() as alice, second.client() as bob:
            await alice.unary.open()
            await bob.add_unary_handler("backwards", backwards)
            await alice.connect(second.peer_id, second.addrs)
            data = random.Random(2).randbytes(1 << 20)
            calls = (
                alice.call_unary(second.peer_id, "backwards", data[:n]) for n in (0, 9, 1 << 20)
            )
            assert await all_of(calls) == [b"", data[8::-1], data[::-1]]


@pytest.mark.parametrize("handler", [echo, backwards])
@pytest.mark.parametrize("size", [0, 1, 1 << 10, 1 << 16, 1 << 20, LIMIT - 256])
async def test_payloads_of_any_size_arrive_intact(
    pair: Pair, size: int, handler: Callable[[bytes, PeerID], Awaitable[bytes]]
) -> None:
    await pair.bob.add_unary_handler("handler", handler)
    data = random.Random(size).randbytes(size)
    for _ in range(2):
        result = await pair.call("handler", data)
        assert type(result) is bytes
        assert result == (data if handler is echo else data[::-1])


async def test_concurrent_payloads_of_mixed_sizes_are_not_mixed_up(pair: Pair) -> None:
    async def digest(data: bytes, peer_id: PeerID) -> bytes:
        return data[:32] + hashlib.sha256(data).digest()

    rng = random.Random(3)
    sizes = [rng.choice([0, 1, 100, 4095, 4096, 70_000, 300_000]) for _ in range(150)]
    await pair.bob.add_unary_handler("digest", digest)
    payloads = [rng.randbytes(size) for size in sizes]
    results = await all_of(pair.call("digest", data) for data in payloads)
    assert results == [data[:32] + hashlib.sha256(data).digest() for data in payloads]


@pytest.mark.parametrize(
    "data",
    [
        bytearray(b"bytearray"),
        memoryview(b"a memoryview")[2:],
        memoryview(b"every other byte")[::2],
        array.array("d", [1.0, 2.0]),
        bytearray(b"large" * 50_000),
    ],
    ids=["bytearray", "memoryview", "strided", "array", "large"],
)
async def test_every_kind_of_buffer_is_accepted(pair: Pair, data: Any) -> None:
    await pair.bob.add_unary_handler("echo", echo)
    assert await pair.call("echo", data) == memoryview(data).tobytes()


@pytest.mark.parametrize("data", ["text", None, 7])
async def test_data_that_is_not_a_buffer_raises_type_error(pair: Pair, data: Any) -> None:
    with pytest.raises(TypeError):
        await pair.call("echo", data)


async def test_handler_may_return_any_buffer(pair: Pair) -> None:
    async def handler(data: bytes, peer_id: PeerID) -> bytes:
        return {b"a": bytearray(b"mutable"), b"m": memoryview(b"view")}[data]  # type: ignore[return-value]

    await pair.bob.add_unary_handler("handler", handler)
    assert await pair.call("handler", b"a") == b"mutable"
    assert await pair.call("handler", b"m") == b"view"


async def test_thousand_calls_each_way_are_answered_out_of_order(pair: Pair) -> None:
    rng = random.Random(4)
    order = []

    async def handler(data: bytes, peer_id: PeerID) -> bytes:
        if rng.random() < 0.8:
            await anyio.sleep(rng.random() / 20)
        order.append(data)
        return data[::-1]

    await pair.alice.add_unary_handler("handler", handler)
    await pair.bob.add_unary_handler("handler", handler)
    here = pair.alice_daemon.peer_id
    payloads = [b"alice %04d" % number for number in range(1000)]
    calls = [pair.call("handler", data) for data in payloads]
    calls += [pair.bob.call_unary(here, "handler", data) for data in payloads]
    assert await all_of(calls) == [data[::-1] for data in payloads] * 2
    assert sorted(order) == sorted(payloads * 2) and order != sorted(order)
    assert pair.idle()


async def test_handler_may_call_its_caller_recursively(pair: Pair) -> None:
    def countdown(client: Client) -> Callable[[bytes, PeerID], Awaitable[bytes]]:
        async def handler(data: bytes, peer_id: PeerID) -> bytes:
            left = int(data)
            if left == 0:
                return b"0"
            return data + b" " + await client.call_unary(peer_id, "countdown", b"%d" % (left - 1))

        return handler

    await pair.alice.add_unary_handler("countdown", countdown(pair.alice))
    await pair.bob.add_unary_handler("countdown", countdown(pair.bob))
    results = await all_of(pair.call("countdown", b"10") for _ in range(20))
    assert results == [b"10 9 8 7 6 5 4 3 2 1 0"] * 20


# --- failing calls ---


async def test_handler_exception_is_sent_to_the_caller(pair: Pair) -> None:
    async def at_once(data: bytes, peer_id: PeerID) -> bytes:
        raise ValueError("no good")

    async def later(data: bytes, peer_id: PeerID) -> bytes:
        await anyio.lowlevel.checkpoint()
        raise KeyError(data)

    await pair.bob.add_unary_handler("at once", at_once)
    await pair.bob.add_unary_handler("later", later)
    for proto, text in (("at once", "ValueError('no good')"), ("later", "KeyError(b'data')")):
        with pytest.raises(P2PHandlerError) as error:
            await pair.call(proto, b"data")
        assert str(error.value) == text
        assert error.value.peer_id == pair.bob_daemon.peer_id
        assert error.value.protocol == proto
        assert not isinstance(error.value, P2PDaemonError)


class Unspeakable(Exception):
    def __repr__(self) -> str:
        raise RuntimeError("no repr")


@pytest.mark.parametrize("suspends", [False, True])
@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (ValueError("x" * (LIMIT + 1)), "xxx"),
        (ValueError("\udcff é"), "ValueError"),
        (Unspeakable(), "Unspeakable"),
        (TimeoutError(), r"TimeoutError\(\)"),
        (StopAsyncIteration("stopped"), "stopped"),
    ],
    ids=["huge", "surrogate", "repr fails", "timeout", "stop"],
)
async def test_handler_exception_with_an_unusable_repr_still_reaches_the_caller(
    pair: Pair, failure: Exception, message: str, suspends: bool
) -> None:
    async def handler(data: bytes, peer_id: PeerID) -> bytes:
        if suspends:
            await anyio.lowlevel.checkpoint()
        raise failure

    await pair.bob.add_unary_handler("handler", handler)
    await pair.bob.add_unary_handler("echo", echo)
    with pytest.raises(P2PHandlerError, match=message):
        await pair.call("handler", timeout=10)
    assert await pair.call("echo", b"still there") == b"still there"


@pytest.mark.parametrize("result", [None, "text", 1, [1]])
async def test_result_that_is_not_bytes_is_reported_as_type_error(pair: Pair, result: Any) -> None:
    async def handler(data: bytes, peer_id: PeerID) -> bytes:
        return result  # type: ignore[no-any-return]

    await pair.bob.add_unary_handler("handler", handler)
    with pytest.raises(P2PHandlerError, match=f"TypeError.*{type(result).__name__}"):
        await pair.call("handler", timeout=10)


async def test_handler_that_is_not_a_coroutine_function_is_reported_as_type_error(
    pair: Pair,
) -> None:
    def handler(data: bytes, peer_id: PeerID) -> bytes:
        return data

    await pair.bob.add_unary_handler("handler", handler)  # type: ignore[arg-type]
    with pytest.raises(P2PHandlerError, match="TypeError"):
        await pair.call("handler", timeout=10)


async def test_protocol_unknown_to_the_peer_is_refused_at_once(pair: Pair) -> None:
    with pytest.raises(DaemonRefused, match="not supported") as error:
        await pair.call("no such protocol", timeout=10)
    assert error.value.request == "CALL_UNARY"
    assert error.value.peer_id == pair.bob_daemon.peer_id
    assert error.value.protocol == "no such protocol"
    assert error.value.daemon_message and "no such protocol" in error.value.daemon_message


async def test_unknown_peer_is_refused_at_once(pair: Pair) -> None:
    peer_id = unknown_peer()
    with pytest.raises(DaemonRefused, match=str(peer_id)) as error:
        await pair.alice.call_unary(peer_id, "echo", b"data", timeout=10)
    assert error.value.daemon_message


async def test_malformed_peer_id_is_refused_by_the_client(pair: Pair) -> None:
    with pytest.raises(InvalidPeerID):
        await pair.alice.call_unary("nobody", "echo", b"data")
    with pytest.raises(DaemonRefused):
        await pair.alice.call_unary(b"\x00", "echo", b"data", timeout=10)


def largest_request(peer_id: PeerID, proto: str) -> int:
    """Returns the payload size for which a call's message has exactly the limit."""
    envelope = field(1, bytes(16)) + field(3, b"")[:1]
    call = field(1, peer_id.to_bytes()) + field(2, proto.encode())
    size = LIMIT - len(envelope) - 4 - len(call) - 1 - 4
    assert len(envelope[:-1] + field(3, call + field(3, bytes(size)))) == LIMIT
    return size


def largest_result() -> int:
    """Returns the payload size for which a reply's message has exactly the limit."""
    size = LIMIT - 18 - 5 - 5
    assert len(field(1, bytes(16)) + field(4, field(1, bytes(size)))) == LIMIT
    return size


async def test_request_over_the_limit_is_refused_before_sending(pair: Pair) -> None:
    async def length(data: bytes, peer_id: PeerID) -> bytes:
        return b"%d" % len(data)

    await pair.bob.add_unary_handler("length", length)
    size = largest_request(pair.bob_daemon.peer_id, "length")
    with pytest.raises(MessageTooLarge, match=str(LIMIT)) as error:
        await pair.call("length", bytes(size + 1))
    assert isinstance(error.value, ControlFailure)
    assert error.value.request == "CALL_UNARY"
    assert error.value.peer_id == pair.bob_daemon.peer_id
    assert error.value.protocol == "length"
    # The daemon has not closed the connection and dropped the handlers, so it was not sent.
    assert await pair.call("length", bytes(size)) == b"%d" % size


async def test_result_over_the_limit_is_an_error_for_the_caller(pair: Pair) -> None:
    async def zeros(data: bytes, peer_id: PeerID) -> bytes:
        return bytes(int(data))

    await pair.bob.add_unary_handler("zeros", zeros)
    size = largest_result()
    with pytest.raises(P2PHandlerError, match=str(LIMIT)):
        await pair.call("zeros", b"%d" % (size + 1), timeout=10)
    assert await pair.call("zeros", b"%d" % size, timeout=10) == bytes(size)


async def test_message_limit_is_configurable(swarm: tuple[DaemonProcess, DaemonProcess]) -> None:
    daemon, other = swarm
    client = Client(daemon.control_maddr, persistent_conn_max_msg_size=1000)
    async with client:
        assert client.unary.max_message_size == 1000
        with pytest.raises(MessageTooLarge, match="1000"):
            await client.call_unary(other.peer_id, "echo", bytes(1000))


@pytest.mark.parametrize("timeout", [-1.0, float("nan")])
async def test_invalid_timeout_raises_value_error(pair: Pair, timeout: float) -> None:
    calls: list[Callable[[], Awaitable[Any]]] = [
        lambda: pair.call("echo", timeout=timeout),
        lambda: pair.alice.add_unary_handler("echo", echo, timeout=timeout),
        lambda: pair.alice.remove_unary_handler("echo", timeout=timeout),
        lambda: pair.alice.unary.open(timeout=timeout),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="timeout"):
            await call()
    assert not pair.alice.unary.connected


# --- raw peers, which write directly to the libp2p stream ---


async def read_frame(stream: Stream) -> bytes:
    """Reads one length-delimited message."""
    length, shift = 0, 0
    while True:
        (byte,) = await stream.readexactly(1)
        length |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return await stream.readexactly(length)


#: Bytes that Go keeps as unknown fields and forwards, although prost rejects some of them.
JUNK = {
    "groups in groups": b"\x7b" * 120 + b"\x7c" * 120,
    "field 0": b"\x02\x00",
    "a key of more than 32 bits": varint((1 << 34 | 15) << 3) + b"\x00",
    "a varint of 70 bits": b"\x78" + b"\xff" * 9 + b"\x7f",
}


@pytest.mark.parametrize("junk", JUNK.values(), ids=JUNK)
async def test_unknown_fields_from_a_raw_peer_do_not_break_the_connection(
    pair: Pair, caplog: pytest.LogCaptureFixture, junk: bytes
) -> None:
    """If it broke, hivemind's daemon would exit with its last persistent connection."""

    async def raw_peer(info: StreamInfo, stream: Stream) -> None:
        async with stream:
            call_id = (await read_frame(stream))[2:18]
            answer = field(4, field(1, b"data") + junk)
            await stream.send(frame(field(1, call_id) + answer))
            await stream.read()  # lets the caller's daemon read everything before the stream ends

    await pair.alice.unary.open()
    await pair.bob.add_unary_handler("echo", echo)
    peer_id = pair.bob_daemon.peer_id
    call = field(1, peer_id.to_bytes()) + field(2, b"echo") + field(3, b"data") + junk
    _, stream = await pair.alice.stream_open(peer_id, ["echo"])
    async with stream:
        await stream.send(frame(field(1, bytes(range(16))) + field(3, call)))
        with suppress(anyio.EndOfStream, anyio.IncompleteRead):  # the call may go unanswered
            await read_frame(stream)
    async with pair.bob.listen():
        await pair.bob.stream_handler("raw_peer", raw_peer)
        with suppress(DaemonRefused):
            assert await pair.call("raw_peer", timeout=10) == b"data"
    assert await pair.call("echo", b"still there", timeout=10) == b"still there"
    assert "was lost" not in caplog.text


async def test_invalid_call_from_a_raw_peer_affects_no_other_call(pair: Pair) -> None:
    """A daemon forwards a call unchanged, except that it fills in the caller's peer id."""
    await pair.bob.add_unary_handler("echo", echo)
    peer = field(1, pair.bob_daemon.peer_id.to_bytes())
    call_id = bytes(range(16))
    for proto, data in ((b"\xff\xfe", bytes(10)), (b"\xff\xfe", bytes(100_000)), (b"other", b"")):
        _, stream = await pair.alice.stream_open(pair.bob_daemon.peer_id, ["echo"])
        async with stream:
            call = field(3, peer + field(2, proto) + field(3, data))
            await stream.send(frame(field(1, call_id) + call))
            answer = await read_frame(stream)
            assert b"no handler" in answer
        assert await pair.call("echo", b"still there", timeout=10) == b"still there"


async def test_invalid_reply_from_a_raw_peer_fails_only_its_call(pair: Pair) -> None:
    async def raw_peer(info: StreamInfo, stream: Stream) -> None:
        async with stream:
            request = await read_frame(stream)
            call_id, answer = request[2:18], b""
            if b"nothing" in request:
                answer = field(1, call_id)
            elif b"empty" in request:
                answer = field(1, call_id) + field(4, b"")
            elif b"another field" in request:
                answer = field(1, call_id) + field(2, field(1, b"data") + field(2, 0))
            elif b"not text" in request:
                answer = field(1, call_id) + field(4, field(2, b"\xff"))
            elif b"another id" in request:
                answer = field(1, bytes(16)) + field(4, field(1, b"data"))
            else:
                assert b"hang up" in request
                return
            await stream.send(frame(answer))
            await stream.read()  # lets the caller's daemon read everything before the stream ends

    await pair.bob.add_unary_handler("echo", echo)
    async with pair.bob.listen():
        await pair.bob.stream_handler("raw_peer", raw_peer)
        errors = {
            b"nothing": ProtocolViolation,
            b"empty": ProtocolViolation,
            b"another field": ProtocolViolation,
            b"not text": P2PHandlerError,
            b"hang up": DaemonRefused,
        }
        await pair.alice.unary.open()
        results = await all_of(pair.call("raw_peer", data, timeout=10) for data in errors)
        assert [type(result) for result in results] == list(errors.values())
        # The daemon matches a reply to its call by the stream, not by the call id.
        assert await pair.call("raw_peer", b"another id", timeout=10) == b"data"
        assert await pair.call("echo", b"still there") == b"still there"


# --- cancellation ---


class Gate:
    """A handler that blocks until ``open`` is set, with counters of its calls."""

    def __init__(self) -> None:
        self.open = anyio.Event()
        self.entered = self.cancelled = self.finished = 0

    async def handler(self, data: bytes, peer_id: PeerID) -> bytes:
        self.entered += 1
        try:
            await self.open.wait()
        except anyio.get_cancelled_exc_class():
            self.cancelled += 1
            raise
        self.finished += 1
        return data


# A cancellation can crash the daemon: see PANICS.
@pytest.mark.flaky(reruns=2)
async def test_calls_cancelled_right_after_sending_cancel_their_handlers(pair: Pair) -> None:
    """The daemon may read the Cancel before the call, and then does not know the call."""
    gate = Gate()
    await pair.bob.add_unary_handler("gate", gate.handler)
    await pair.alice.unary.open()
    for _ in range(300):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(pair.call, "gate")
            await anyio.lowlevel.checkpoint()
            tasks.cancel_scope.cancel()
    # Once this later registration is acknowledged, no earlier message is still in transit.
    await pair.bob.add_unary_handler("echo", echo)
    await eventually(lambda: pair.call("echo"))
    await until(pair.idle)
    assert gate.finished == 0


async def test_protocol_is_free_after_its_registration_was_cancelled(pair: Pair) -> None:
    await pair.bob.unary.open()
    for number in range(100):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(pair.bob.add_unary_handler, f"free {number}", echo)
            await anyio.lowlevel.checkpoint()
            tasks.cancel_scope.cancel()
        await pair.bob.add_unary_handler(f"free {number}", echo)
        await pair.bob.remove_unary_handler(f"free {number}")


async def test_cancelling_a_call_cancels_only_its_handler(pair: Pair) -> None:
    gate = Gate()
    await pair.bob.add_unary_handler("gate", gate.handler)
    results = []

    async def stays() -> None:
        results.append(await pair.call("gate", b"stays"))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(stays)
        async with anyio.create_task_group() as cancelled:
            for _ in range(10):
                cancelled.start_soon(pair.call, "gate", b"goes")
            await until(lambda: gate.entered == 11)
            assert (pair.alice.unary.pending_calls, pair.bob.unary.unanswered_calls) == (11, 11)
            cancelled.cancel_scope.cancel()
        assert pair.alice.unary.pending_calls == 1
        await until(lambda: pair.bob.unary.unanswered_calls == 1 and gate.cancelled == 10)
        assert gate.finished == 0
        gate.open.set()
    assert results == [b"stays"]
    assert (gate.cancelled, gate.finished) == (10, 1)
    assert pair.idle()


async def test_call_that_times_out_cancels_its_handler(pair: Pair) -> None:
    gate = Gate()
    await pair.bob.add_unary_handler("gate", gate.handler)
    start = time.monotonic()
    with pytest.raises(ControlTimeout, match="0.3 s") as error:
        await pair.call("gate", timeout=0.3)
    assert 0.29 <= time.monotonic() - start < 1.3  # uvloop's timers round to milliseconds
    assert isinstance(error.value, TimeoutError)
    assert error.value.request == "CALL_UNARY"
    assert (error.value.peer_id, error.value.protocol) == (pair.bob_daemon.peer_id, "gate")
    await until(lambda: gate.cancelled == 1)
    await until(pair.idle)
    gate.open.set()
    assert await pair.call("gate", b"the next") == b"the next"


async def test_cancelled_handler_may_clean_up_slowly(pair: Pair) -> None:
    swept = []

    async def handler(data: bytes, peer_id: PeerID) -> bytes:
        try:
            await anyio.sleep_forever()
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.sleep(0.1)
                swept.append(data)
        raise AssertionError

    await pair.bob.add_unary_handler("handler", handler)
    await pair.bob.add_unary_handler("echo", echo)
    with pytest.raises(ControlTimeout):
        await pair.call("handler", b"late", timeout=0.1)
    assert await pair.call("echo", b"meanwhile") == b"meanwhile"
    await until(lambda: swept == [b"late"])
    await until(pair.idle)


# A cancellation can crash the daemon: see PANICS.
@pytest.mark.flaky(reruns=2)
async def test_ten_thousand_randomly_cancelled_calls_leave_nothing_pending(pair: Pair) -> None:
    done = {"answered": 0, "cancelled": 0}
    #: Calls refused because of the daemons' limit on streams between them, which a loaded machine
    #: can reach.
    refused = []

    async def handler(data: bytes, peer_id: PeerID) -> bytes:
        if data[0] & 1:
            await anyio.sleep(data[0] / 255 / 50)
        return data

    async def caller(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(200):
            data = rng.randbytes(rng.choice([1, 100, 5000]))
            with anyio.move_on_after(rng.random() / 20):
                try:
                    assert await pair.call("handler", data) == data
                    done["answered"] += 1
                except DaemonRefused as error:
                    refused.append(error.daemon_message)
                continue
            done["cancelled"] += 1

    await pair.bob.add_unary_handler("handler", handler)
    async with anyio.create_task_group() as tasks:
        for seed in range(50):
            tasks.start_soon(caller, seed)
    assert pair.alice.unary.pending_calls == 0
    await until(pair.idle)
    assert sum(done.values()) + len(refused) == 10_000
    assert set(refused) <= {"stream reset"}
    assert min(done.values()) > 500, done
    assert await pair.call("handler", b"\x00") == b"\x00"


# --- the environment of a handler ---


async def test_each_handler_runs_in_its_own_context(pair: Pair) -> None:
    who: ContextVar[bytes] = ContextVar("who", default=b"nobody")

    async def at_once(data: bytes, peer_id: PeerID) -> bytes:
        before = who.get()
        who.set(data)
        return before + b" " + who.get()

    async def later(data: bytes, peer_id: PeerID) -> bytes:
        before = who.get()
        who.set(data)
        for _ in range(3):
            await anyio.sleep(0.001)
        return before + b" " + who.get()

    who.set(b"first")
    await pair.bob.add_unary_handler("at once", at_once)
    await pair.bob.add_unary_handler("later", later)
    await pair.alice.unary.open()
    who.set(b"caller")
    names = [b"%d" % number for number in range(20)]
    for proto in ("at once", "later"):
        results = await all_of(pair.call(proto, name) for name in names)
        assert results == [b"first " + name for name in names]
    assert who.get() == b"caller"


async def test_handler_that_never_suspends_may_use_task_features(
    pair: Pair, anyio_backend: Any
) -> None:
    """The client could run such a handler without a task, but must not."""

    async def with_anyio(data: bytes, peer_id: PeerID) -> bytes:
        with anyio.fail_after(10):
            async with anyio.create_task_group() as tasks:
                assert anyio.get_current_task().id
                tasks.start_soon(anyio.lowlevel.checkpoint)
        with anyio.move_on_after(0) as scope:
            await anyio.sleep(10)
        assert scope.cancelled_caught
        return data

    async def with_asyncio(data: bytes, peer_id: PeerID) -> bytes:
        task = asyncio.current_task()
        assert task is not None and task in asyncio.all_tasks()
        if data == b"timeout":
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(asyncio.sleep(10), 0.01)
        elif data == b"gather":
            await asyncio.gather(asyncio.sleep(0), asyncio.sleep(0.01))
            assert asyncio.current_task() is task
        elif data == b"name":
            return task.get_name().encode()
        return data

    await pair.bob.add_unary_handler("anyio", with_anyio)
    assert await all_of(pair.call("anyio", b"%d" % n) for n in range(10)) == [
        b"%d" % n for n in range(10)
    ]
    if anyio_backend[0] != "trio":
        await pair.bob.add_unary_handler("asyncio", with_asyncio)
        for data in (b"timeout", b"gather", b"nothing"):
            assert await pair.call("asyncio", data) == data
        names = await all_of(pair.call("asyncio", b"name") for _ in range(5))
        assert all(isinstance(name, bytes) for name in names)
        assert len({name for name in names if isinstance(name, bytes)}) == 5


@pytest.mark.skipif(not hasattr(asyncio, "timeout"), reason="asyncio.timeout is new in Python 3.11")
@pytest.mark.parametrize("suspends", [False, True])
def test_handler_may_use_asyncio_timeout_and_task_group(
    swarm: tuple[DaemonProcess, DaemonProcess], suspends: bool
) -> None:
    async def handler(data: bytes, peer_id: PeerID) -> bytes:
        async def one() -> int:
            return 1

        async with asyncio.timeout(10):
            if suspends:
                await asyncio.sleep(0)
            async with asyncio.TaskGroup() as tasks:
                results = [tasks.create_task(one()) for _ in range(3)]
        try:
            async with asyncio.timeout(0.01):
                await asyncio.sleep(10)
        except TimeoutError:
            return data * sum(task.result() for task in results)
        raise AssertionError

    async def immediate(data: bytes, peer_id: PeerID) -> bytes:
        async with asyncio.timeout(10):
            return data

    async def main() -> None:
        first, second = swarm
        async with first.client() as alice, second.client() as bob:
            await bob.add_unary_handler("handler", handler)
            await bob.add_unary_handler("immediate", immediate)
            results = await all_of(
                alice.call_unary(second.peer_id, "handler", b"%d" % n) for n in range(5)
            )
            assert results == [b"%d" % n * 3 for n in range(5)]
            assert await alice.call_unary(second.peer_id, "immediate", b"data") == b"data"

    asyncio.run(main())


async def test_running_handlers_do_not_block_each_other(pair: Pair) -> None:
    gate = Gate()

    async def opens(data: bytes, peer_id: PeerID) -> bytes:
        gate.open.set()
        return b"open"

    await pair.bob.add_unary_handler("gate", gate.handler)
    await pair.bob.add_unary_handler("opens", opens)
    async with anyio.create_task_group() as tasks:
        for _ in range(50):
            tasks.start_soon(pair.call, "gate", b"data")
        await until(lambda: gate.entered == 50)
        assert await pair.call("opens") == b"open"
    assert gate.finished == 50


# --- adding and removing handlers ---


async def test_removed_handler_is_no_longer_called(pair: Pair) -> None:
    await pair.bob.add_unary_handler("echo", echo)
    await pair.bob.add_unary_handler("other", echo)
    assert await pair.call("echo", b"data") == b"data"
    await pair.bob.remove_unary_handler("echo", timeout=10)

    with pytest.raises(DaemonRefused):
        await pair.call("echo", timeout=10)
    assert await pair.call("other", b"data") == b"data"
    await pair.bob.add_unary_handler("echo", backwards, timeout=10)
    assert await eventually(lambda: pair.call("echo", b"data")) == b"atad"


async def test_removing_an_unregistered_handler_is_refused(pair: Pair) -> None:
    with pytest.raises(ControlFailure, match="echo.*not registered") as error:
        await pair.bob.remove_unary_handler("echo")
    assert type(error.value) is NotRegistered
    assert error.value.protocol == "echo"
    assert error.value.hint is not None and error.value.hint in str(error.value)


async def test_removed_handler_finishes_its_running_calls(pair: Pair) -> None:
    gate = Gate()
    await pair.bob.add_unary_handler("gate", gate.handler)
    results = []

    async def call() -> None:
        results.append(await pair.call("gate", b"data"))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(call)
        await until(lambda: gate.entered)
        await pair.bob.remove_unary_handler("gate")
        gate.open.set()
    assert results == [b"data"]


async def test_client_has_one_handler_per_protocol(pair: Pair) -> None:
    await pair.bob.add_unary_handler("echo", echo)
    for balanced in (False, True):
        with pytest.raises(ControlFailure, match="echo already registered") as error:
            await pair.bob.add_unary_handler("echo", backwards, balanced=balanced)
        assert type(error.value) is AlreadyRegistered
        assert error.value.protocol == "echo" and error.value.daemon_message is None
        assert error.value.hint is not None and error.value.hint in str(error.value)
    assert await pair.call("echo", b"data") == b"data"


async def test_protocol_of_another_client_is_refused_and_nothing_changes(
    pair: Pair,
) -> None:
    await pair.bob.add_unary_handler("echo", echo)
    async with pair.bob_daemon.client() as second:
        with pytest.raises(DaemonRefused, match="already set") as error:
            await second.add_unary_handler("echo", backwards)
        assert isinstance(error.value, AlreadyRegistered)
        assert error.value.protocol == "echo"
        assert error.value.hint is not None and error.value.hint in str(error.value)
        with pytest.raises(ControlFailure, match="not registered"):
            await second.remove_unary_handler("echo")
        for _ in range(4):
            assert await pair.call("echo", b"data") == b"data"
        await pair.bob.remove_unary_handler("echo")
        await second.add_unary_handler("echo", backwards)
        assert await eventually(lambda: pair.call("echo", b"data")) == b"atad"


async def test_balanced_handlers_of_two_clients_are_served_round_robin(pair: Pair) -> None:
    served = []

    def handler(name: str) -> Callable[[bytes, PeerID], Awaitable[bytes]]:
        async def serve(data: bytes, peer_id: PeerID) -> bytes:
            served.append(name)
            return name.encode() + data

        return serve

    await pair.bob.add_unary_handler("shared", handler("one"), balanced=True)
    async with pair.bob_daemon.client() as second:
        await second.add_unary_handler("shared", handler("two"), balanced=True)
        results = await all_of(pair.call("shared", b"%d" % n) for n in range(40))
        assert sorted(served) == ["one"] * 20 + ["two"] * 20
        assert {r[3:] for r in results if isinstance(r, bytes)} == {b"%d" % n for n in range(40)}
    await until(lambda: second.unary.connected is False)

    async def only_one_is_left() -> None:
        served.clear()
        assert await pair.call("shared", b"") == b"one"
        assert await pair.call("shared", b"") == b"one"

    await eventually(only_one_is_left)


async def test_handlers_can_be_added_and_removed_concurrently(pair: Pair) -> None:
    names = [f"handler {number}" for number in range(50)]
    assert await all_of(pair.bob.add_unary_handler(name, echo) for name in names) == [None] * 50
    results = await all_of(pair.call(name, name.encode()) for name in names)
    assert results == [name.encode() for name in names]
    assert await all_of(pair.bob.remove_unary_handler(name) for name in names) == [None] * 50
    errors = await all_of(pair.call(name) for name in names)
    assert {type(error) for error in errors} == {DaemonRefused}


# --- the connection ---


async def test_persistent_connection_is_opened_on_demand(pair: Pair) -> None:
    unary = pair.alice.unary
    assert not unary.connected
    await pair.alice.identify()
    assert not unary.connected
    await unary.open(timeout=10)
    await unary.open()
    assert unary.connected
    assert unary.daemon_connector is pair.alice.control.daemon_connector
    assert unary.max_message_size == LIMIT


async def test_close_fails_pending_calls_and_sends_errors_to_callers_of_handlers(
    pair: Pair,
) -> None:
    gate = Gate()
    await pair.alice.add_unary_handler("gate", gate.handler)
    await pair.bob.add_unary_handler("gate", gate.handler)
    here = pair.alice_daemon.peer_id

    async def close() -> None:
        await until(lambda: gate.entered == 6)
        pair.alice.unary.close()
        pair.alice.unary.close()

    calls: list[Awaitable[Any]] = [pair.call("gate") for _ in range(3)]
    calls += [pair.bob.call_unary(here, "gate", b"", timeout=10) for _ in range(3)]
    *errors, _ = await all_of([*calls, close()])
    for error in errors[:3]:
        assert isinstance(error, ConnectionLost), error
        assert (error.peer_id, error.protocol) == (pair.bob_daemon.peer_id, "gate")
    # The Go daemon reports nothing to these callers. Without the errors they would wait forever.
    assert {type(error) for error in errors[3:]} == {P2PHandlerError}
    await until(lambda: gate.cancelled == 6)
    await until(pair.idle)
    assert not pair.alice.unary.connected
    # The client can be used again, without its handlers.
    gate.open.set()
    assert await pair.call("gate", b"again") == b"again"
    with pytest.raises(DaemonRefused):
        await pair.bob.call_unary(here, "gate", b"", timeout=10)


@pytest.mark.parametrize("backend_and_options", BACKENDS)
@pytest.mark.parametrize("closed", [True, False])
def test_client_can_be_used_on_one_event_loop_after_another(
    swarm: tuple[DaemonProcess, DaemonProcess], backend_and_options: Any, closed: bool
) -> None:
    backend, options = backend_and_options
    first, second = swarm
    alice, bob = first.client(), second.client()

    async def run() -> None:
        # The daemon may not have noticed yet that the previous loop's connection is closed.
        await eventually(lambda: bob.add_unary_handler("backwards", backwards))
        payloads = [b"%02d" % number for number in range(20)]
        calls = (alice.call_unary(second.peer_id, "backwards", data) for data in payloads)
        assert await all_of(calls) == [data[::-1] for data in payloads]
        if closed:
            await close()

    async def close() -> None:
        await alice.close()
        await bob.close()

    for _ in range(3):
        anyio.run(run, backend=backend, backend_options=options)
    anyio.run(close, backend=backend, backend_options=options)
