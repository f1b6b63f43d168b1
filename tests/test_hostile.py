"""Every client call, with every kind of misbehaviour of a daemon or a peer.

Each call raises the exception for the fault within its timeout, leaves nothing open, and does not
affect the next call.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field as having
from typing import Any

import anyio
import pytest
from fake_daemon import (
    ADDR,
    ERROR,
    IDENTITY,
    OK,
    PATIENCE,
    PEER,
    STREAM_INFO,
    STREAM_OPENED,
    UNKNOWN,
    Answer,
    Connection,
    FakeDaemon,
    Message,
    Plan,
    acknowledgement,
    dht,
    field,
    frame,
    incoming,
    reply,
    varint,
)
from support import is_closed, new_directory, open_descriptors, until

from p2pclient_rs import (
    Client,
    ConnectionLost,
    ControlFailure,
    ControlTimeout,
    DaemonRefused,
    NotSupported,
    PeerID,
    ProtocolViolation,
    Stream,
    StreamInfo,
    Subscription,
    inbound,
)

pytestmark = [pytest.mark.anyio, pytest.mark.independent]

FAKE_PEER = PeerID(PEER)
INFO = field(1, PEER) + field(2, ADDR)
KEY = field(1, 99) + field(2, b"a key of a kind that is not known")
BEGIN, END = OK + field(5, dht(0)), dht(2)
#: The time limit for calls that can fail at once, in seconds.
SOON = 5.0


async def echo(request: bytes, peer_id: PeerID) -> bytes:
    """A unary handler that returns its input."""
    return request


async def ignore(info: StreamInfo, stream: Stream) -> None:
    """A stream handler that does nothing."""


# --- the calls ---


@dataclass(frozen=True)
class Call:
    """A client call, and a daemon's valid reply to it."""

    request: str
    make: Callable[[Client, float], Awaitable[Any]]
    answer: tuple[bytes, ...] = (OK,)
    #: Replies that lack a required part.
    lacking: tuple[tuple[bytes, ...], ...] = ()
    #: Whether the call's result is the expected one.
    is_expected: Callable[[Any], bool] = having(default=lambda result: result is None)

    @property
    def valid(self) -> bytes:
        """The reply as sent over the wire."""
        return b"".join(map(frame, self.answer))

    @property
    def means_unknown(self) -> bool:
        """Whether a daemon that does not know this request closes the connection."""
        return self.request in ("REMOVE_STREAM_HANDLER", "PERSISTENT_CONN_UPGRADE")


def one(value: bytes) -> bytes:
    """Returns the reply to a DHT query with a single result."""
    return OK + field(5, value)


def many(*values: bytes) -> tuple[bytes, ...]:
    """Returns the reply to a DHT query with a list of results."""
    return (BEGIN, *values, END)


A_PEER, A_VALUE = dht(1, peer=INFO), dht(1, value=b"value")
NO_PEER, NO_PEER_ID = dht(1), dht(1, peer=field(2, ADDR))

CALLS = [
    Call(
        "IDENTIFY",
        lambda c, t: c.identify(timeout=t),
        (IDENTITY,),
        ((OK,), (OK + field(4, field(2, ADDR)),)),
        lambda identity: identity.peer_id == FAKE_PEER and len(identity.addrs) == 1,
    ),
    Call("CONNECT", lambda c, t: c.connect(FAKE_PEER, [ADDR], timeout=t)),
    Call("DISCONNECT", lambda c, t: c.disconnect(FAKE_PEER, timeout=t)),
    Call(
        "LIST_PEERS",
        lambda c, t: c.list_peers(timeout=t),
        (OK + field(6, INFO) + field(6, field(1, PEER)),),
        ((OK + field(6, INFO) + field(6, field(2, ADDR)),),),
        lambda peers: [len(info.addrs) for info in peers] == [1, 0],
    ),
    Call(
        "STREAM_OPEN",
        lambda c, t: c.stream_open(FAKE_PEER, ["/echo"], timeout=t),
        (STREAM_OPENED,),
        (
            (OK,),
            (OK + field(3, field(2, ADDR) + field(3, b"/echo")),),
            (OK + field(3, field(1, PEER) + field(3, b"/echo")),),
            (OK + field(3, INFO),),
        ),
        lambda opened: opened[0].proto == "/echo",
    ),
    Call("STREAM_HANDLER", lambda c, t: c.stream_handler("/echo", ignore, timeout=t)),
    Call("REMOVE_STREAM_HANDLER", lambda c, t: c.remove_stream_handler("/echo", timeout=t)),
    Call("CONNMANAGER TAG_PEER", lambda c, t: c.connmgr_tag_peer(FAKE_PEER, "t", 1, timeout=t)),
    Call("CONNMANAGER UNTAG_PEER", lambda c, t: c.connmgr_untag_peer(FAKE_PEER, "t", timeout=t)),
    Call("CONNMANAGER TRIM", lambda c, t: c.connmgr_trim(timeout=t)),
    Call(
        "DHT FIND_PEER",
        lambda c, t: c.dht_find_peer(FAKE_PEER, timeout=t),
        (one(A_PEER),),
        ((OK,), (one(NO_PEER),), (one(NO_PEER_ID),), (one(b""),)),
        lambda info: info.peer_id == FAKE_PEER,
    ),
    Call(
        "DHT FIND_PEERS_CONNECTED_TO_PEER",
        lambda c, t: c.dht_find_peers_connected_to_peer(FAKE_PEER, timeout=t),
        many(A_PEER),
        ((OK,), many(NO_PEER), many(A_PEER, NO_PEER_ID)),
        lambda infos: len(infos) == 1,
    ),
    Call(
        "DHT FIND_PROVIDERS",
        lambda c, t: c.dht_find_providers(b"cid", 2, timeout=t),
        many(A_PEER, A_PEER),
        ((OK,), many(NO_PEER), many(A_PEER, NO_PEER_ID)),
        lambda infos: len(infos) == 2,
    ),
    Call(
        "DHT GET_CLOSEST_PEERS",
        lambda c, t: c.dht_get_closest_peers(b"key", timeout=t),
        many(dht(1, value=PEER)),
        ((OK,), many(A_PEER), many(b"")),
        lambda peers: peers == (FAKE_PEER,),
    ),
    Call(
        "DHT GET_PUBLIC_KEY",
        lambda c, t: c.dht_get_public_key(FAKE_PEER, timeout=t),
        (one(dht(1, value=KEY)),),
        ((OK,), (one(A_PEER),), (one(dht(1, value=b"")),), (one(dht(1, value=b"\xff")),)),
        lambda key: key.key_type == 99,
    ),
    Call(
        "DHT GET_VALUE",
        lambda c, t: c.dht_get_value(b"key", timeout=t),
        many(A_VALUE),
        ((OK,), (one(A_PEER),), many(), many(A_VALUE, A_VALUE)),
        lambda value: value == b"value",
    ),
    Call(
        "DHT SEARCH_VALUE",
        lambda c, t: c.dht_search_value(b"key", timeout=t),
        many(A_VALUE, A_VALUE),
        ((OK,), many(A_VALUE, NO_PEER)),
        lambda values: values == (b"value",) * 2,
    ),
    Call("DHT PUT_VALUE", lambda c, t: c.dht_put_value(b"/pk/k", b"v", timeout=t)),
    Call("DHT PROVIDE", lambda c, t: c.dht_provide(b"cid", timeout=t)),
    Call(
        "PUBSUB GET_TOPICS",
        lambda c, t: c.pubsub_get_topics(timeout=t),
        (OK + field(7, field(1, b"topic")),),
        ((OK,),),
        lambda topics: topics == ("topic",),
    ),
    Call(
        "PUBSUB LIST_PEERS",
        lambda c, t: c.pubsub_list_peers("topic", timeout=t),
        (OK + field(7, field(2, PEER)),),
        ((OK,),),
        lambda peers: peers == (FAKE_PEER,),
    ),
    Call("PUBSUB PUBLISH", lambda c, t: c.pubsub_publish("topic", b"data", timeout=t)),
    Call(
        "PUBSUB SUBSCRIBE",
        lambda c, t: c.pubsub_subscribe("topic", timeout=t),
        is_expected=lambda subscription: isinstance(subscription, Subscription),
    ),
    Call("PERSISTENT_CONN_UPGRADE", lambda c, t: c.unary.open(timeout=t)),
    Call(
        "PEERSTORE GET_PROTOCOLS",
        lambda c, t: c.peerstore_get_protocols(FAKE_PEER, timeout=t),
        (OK + field(8, field(2, b"/echo")),),
        ((OK,),),
        lambda protocols: list(protocols) == ["/echo"],
    ),
    Call(
        "PEERSTORE GET_PEER_INFO",
        lambda c, t: c.peerstore_get_peer_info(FAKE_PEER, timeout=t),
        (OK + field(8, field(1, INFO)),),
        ((OK,), (OK + field(8, b""),), (OK + field(8, field(1, field(2, ADDR))),)),
        lambda info: info.peer_id == FAKE_PEER,
    ),
]


@dataclass(frozen=True)
class UnaryCall:
    """A call on the persistent connection."""

    request: str
    #: The kind of its message.
    kind: str
    make: Callable[[Client, float], Awaitable[Any]]
    answer: Callable[[bytes], bytes]
    result: bytes | None = None
    #: Whether losing the connection has the same effect as the call, since the daemon then drops
    #: the handlers.
    done_by_loss: bool = False

    def framed(self, call_id: bytes) -> bytes:
        """The reply as sent over the wire."""
        return frame(self.answer(call_id))


UNARY_CALLS = [
    UnaryCall(
        "CALL_UNARY",
        "call",
        lambda c, t: c.call_unary(FAKE_PEER, "echo", b"data", timeout=t),
        lambda call_id: reply(call_id, b"data"),
        b"data",
    ),
    UnaryCall(
        "ADD_UNARY_HANDLER",
        "add",
        lambda c, t: c.add_unary_handler("other", echo, timeout=t),
        acknowledgement,
    ),
    UnaryCall(
        "REMOVE_UNARY_HANDLER",
        "remove",
        lambda c, t: c.remove_unary_handler("echo", timeout=t),
        acknowledgement,
        done_by_loss=True,
    ),
]


async def close_result(result: Any) -> None:
    """Closes the stream or subscription that a call has opened, if any."""
    for opened in result if isinstance(result, tuple) else (result,):
        if isinstance(opened, Stream):
            await opened.aclose()


@asynccontextmanager
async def hostile(transport: str = "unix") -> AsyncIterator[tuple[Client, Plan, FakeDaemon]]:
    """A client of a daemon with a plan; checks that no descriptor or connection is left open."""
    before = open_descriptors()
    plan = Plan()
    with FakeDaemon(plan, transport) as fake:
        async with Client(fake.control_maddr, f"/unix{new_directory()}/listen.sock") as client:
            yield client, plan, fake
        await until(lambda: fake.open == 0)
    assert open_descriptors() == before


async def assert_usable(client: Client) -> None:
    """Asserts that an IDENTIFY succeeds."""
    assert (await client.identify(timeout=PATIENCE)).peer_id == FAKE_PEER


async def fails(
    call: Call | UnaryCall, client: Client, expected: type[Exception], timeout: float = PATIENCE
) -> None:
    """Asserts that a call fails with exactly this exception, in time."""
    start = time.monotonic()
    try:
        await close_result(await call.make(client, timeout))
        if isinstance(call, UnaryCall) and call.done_by_loss and expected is not ControlTimeout:
            assert client.unary.handlers == {}
            return
    except ControlFailure as error:
        # Compares names, as errors with an errno are of a subclass with the same name.
        assert type(error).__name__ == expected.__name__, f"{call.request}: {error!r}"
        assert error.request == call.request, f"{call.request}: {error!r}"
        assert str(error), call.request
    else:
        pytest.fail(f"{call.request} succeeds")
    assert time.monotonic() - start < SOON, call.request


# --- the faults ---


@dataclass(frozen=True)
class Fault:
    """What a daemon sends instead of a reply."""

    #: Returns the bytes to send, given the valid reply.
    data: Callable[[bytes], bytes]
    expected: type[Exception]
    #: Whether the daemon then closes the connection.
    close: bool = False

    def answer(self, valid: bytes | Callable[[bytes], bytes]) -> Answer:
        """Returns the step of a plan, given the valid reply or a function from call id to it."""

        def answer(connection: Connection, call_id: bytes) -> bool | None:
            connection.send(self.data(valid if isinstance(valid, bytes) else valid(call_id)))
            return None if self.close else False

        return answer


def sends(data: bytes, close: bool = False) -> Answer:
    """Sends ``data``; then closes the connection if ``close``."""
    return Fault(lambda valid: valid, ControlFailure, close).answer(data)


FAULTS = {
    "EOF": Fault(lambda valid: b"", ConnectionLost, close=True),
    "a length cut short": Fault(lambda valid: b"\x80", ConnectionLost, close=True),
    "an answer cut short": Fault(lambda valid: valid[:-1], ConnectionLost, close=True),
    "a huge answer cut short": Fault(
        lambda valid: varint(4 << 20) + bytes(100_000), ConnectionLost, close=True
    ),
    "nothing, ever": Fault(lambda valid: b"", ControlTimeout),
    "half an answer, and nothing more": Fault(lambda valid: valid[:-1], ControlTimeout),
    "garbage": Fault(lambda valid: b"\x05hello" + valid, ProtocolViolation),
    "text": Fault(lambda valid: b"HTTP/1.1 400 Bad Request\r\n\r\n" * 9, ProtocolViolation),
    "a length of eleven bytes": Fault(lambda valid: b"\x80" * 10 + b"\x01", ProtocolViolation),
    "a length that is not minimal": Fault(lambda valid: b"\x80\x00", ProtocolViolation),
    "a length of 2^63": Fault(lambda valid: varint(1 << 63), ProtocolViolation),
    "a length of 2^64 - 1": Fault(lambda valid: varint((1 << 64) - 1), ProtocolViolation),
    "a length of 65 bits": Fault(lambda valid: b"\x80" * 9 + b"\x02" + valid, ProtocolViolation),
    "a length just over the limit": Fault(
        lambda valid: varint((4 << 20) + (64 << 10) + 1), ProtocolViolation
    ),
    "an empty message": Fault(lambda valid: b"\x00" + valid, ProtocolViolation),
    "a message of another type": Fault(lambda valid: frame(STREAM_INFO), ProtocolViolation),
    "a field that ends too late": Fault(lambda valid: frame(b"\x0a\x7f"), ProtocolViolation),
    "a field number of 0": Fault(lambda valid: frame(b"\x02\x00"), ProtocolViolation),
}

faults = pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)

#: A persistent connection skips a message over the limit, so it waits for the rest of the message.
#: Only a length that protobuf does not allow fails at once.
UNARY_FAULTS = FAULTS | {
    "a length just over the limit": Fault(
        lambda valid: varint((4 << 20) + (64 << 10) + 1), ControlTimeout
    ),
    "a length of 2 GiB": Fault(lambda valid: varint(1 << 31), ProtocolViolation),
}
unary_faults = pytest.mark.parametrize("fault", UNARY_FAULTS.values(), ids=UNARY_FAULTS)


@faults
async def test_every_call_fails_on(fault: Fault) -> None:
    async with hostile() as (client, plan, _):
        for call in CALLS:
            plan.next("request", fault.answer(call.valid))
            timeout = 0.05 if fault.expected is ControlTimeout else PATIENCE
            # A daemon that has begun a reply knows the request.
            unknown = call.means_unknown and fault is FAULTS["EOF"]
            await fails(call, client, NotSupported if unknown else fault.expected, timeout)
            assert plan.used, call.request
            await assert_usable(client)
            client.unary.close()


@unary_faults
async def test_every_unary_call_fails_on(fault: Fault) -> None:
    async with hostile() as (client, plan, _):
        for call in UNARY_CALLS:
            await client.add_unary_handler("echo", echo, timeout=PATIENCE)
            plan.next(call.kind, fault.answer(call.framed))
            timeout = 0.05 if fault.expected is ControlTimeout else PATIENCE
            await fails(call, client, fault.expected, timeout)
            assert plan.used, call.request
            if fault.expected is ControlTimeout:
                # The connection still waits for the rest of the message.
                client.unary.close()
            assert await client.call_unary(FAKE_PEER, "echo", b"next", timeout=SOON) == b"next"
            assert client.unary.pending_calls == 0
            await assert_usable(client)
            client.unary.close()


async def test_every_call_fails_on_a_reply_without_a_required_part() -> None:
    async with hostile() as (client, plan, _):
        for call in CALLS:
            for lacking in ((call.answer[0].removeprefix(OK),), *call.lacking):
                data = b"".join(map(frame, lacking))
                plan.next("request", sends(data))
                await fails(call, client, ProtocolViolation)
                await assert_usable(client)


async def test_every_call_fails_on_an_unknown_type_of_reply() -> None:
    async with hostile() as (client, plan, _):
        for call in CALLS:
            data = frame(field(1, 7) + call.answer[0].removeprefix(OK))
            plan.next("request", sends(data))
            await fails(call, client, ProtocolViolation)
            await assert_usable(client)


async def test_every_call_raises_daemon_refused_on_a_refusal() -> None:
    def refuses(connection: Connection, _: bytes) -> bool:
        connection.send(frame(ERROR))
        return False

    async with hostile() as (client, plan, fake):
        for call in CALLS:
            plan.next("request", refuses)
            refused = NotSupported if call.request == "PERSISTENT_CONN_UPGRADE" else DaemonRefused
            await fails(call, client, refused)
            await assert_usable(client)
        # One connection for queries, and one for everything else.
        assert fake.accepted <= 2, "a refusal leaves the connection usable"


@pytest.mark.parametrize("transport", ["unix", "tcp"])
async def test_every_call_fails_on_a_reply_cut_off_anywhere(transport: str) -> None:
    async with hostile(transport) as (client, plan, _):
        for call in CALLS:
            for size in range(1, len(call.valid)):
                plan.next("request", sends(call.valid[:size], close=True))
                await fails(call, client, ConnectionLost)
        await assert_usable(client)
        for unary_call in UNARY_CALLS:
            for size in range(len(unary_call.framed(bytes(16)))):
                await client.add_unary_handler("echo", echo, timeout=PATIENCE)
                cut = Fault(lambda valid, size=size: valid[:size], ConnectionLost, close=True)  # type: ignore[misc]
                plan.next(unary_call.kind, cut.answer(unary_call.framed))
                await fails(unary_call, client, ConnectionLost)
                client.unary.close()


# --- unusual but valid replies ---


def send_trickling(connection: Connection, data: bytes) -> None:
    connection.trickle(data)


def send_whole(connection: Connection, data: bytes) -> None:
    connection.send(data)


GOOD: dict[str, tuple[Callable[[Connection, bytes], None], bytes]] = {
    "one byte at a time": (send_trickling, b""),
    "everything at once": (send_whole, b""),
    "unknown fields": (send_whole, UNKNOWN),
    "unknown fields, one byte at a time": (send_trickling, UNKNOWN),
}


@pytest.mark.parametrize(("send", "more"), GOOD.values(), ids=GOOD)
async def test_every_call_accepts(send: Callable[[Connection, bytes], None], more: bytes) -> None:
    async with hostile() as (client, plan, fake):
        for call in CALLS:
            data = b"".join(frame(message + more) for message in call.answer)

            def answer(connection: Connection, _: bytes, data: bytes = data) -> bool:
                send(connection, data)
                return True

            plan.next("request", answer)
            result = await call.make(client, PATIENCE)
            assert call.is_expected(result), f"{call.request}: {result!r}"
            await close_result(result)
            await assert_usable(client)
        await client.add_unary_handler("echo", echo)
        for unary_call in UNARY_CALLS:

            def reply_so(connection: Connection, i: bytes, c: UnaryCall = unary_call) -> bool:
                # Replies with unknown call ids, and the valid reply twice.
                strange = frame(reply(bytes(16), b"?") + more) + frame(acknowledgement(b"1" * 16))
                good = frame(c.answer(i) + more)
                send(connection, strange + good + good)
                return True

            plan.next(unary_call.kind, reply_so)
            assert await unary_call.make(client, PATIENCE) == unary_call.result
            assert await client.call_unary(FAKE_PEER, "echo", b"next") == b"next"
        assert client.unary.pending_calls == 0


# --- incoming calls ---


def without(message: bytes, *numbers: int) -> bytes:
    """Returns an incoming call without some of its fields."""
    call = [field(1, PEER), field(2, b"echo"), field(3, b"data")]
    kept = b"".join(part for number, part in enumerate(call, 1) if number not in numbers)
    return field(1, message) + field(3, kept)


CALLER = b"c" * 16
#: Invalid calls of a peer, forwarded by the daemon. Each is refused and affects nothing else.
BAD_CALLS = {
    "no peer": without(CALLER, 1),
    "no protocol": without(CALLER, 2),
    "no data": without(CALLER, 3),
    "nothing": without(CALLER, 1, 2, 3),
    "no message": field(1, CALLER) + field(3, b"\xff"),
    "a protocol without a handler": incoming(CALLER, "other", b"data"),
    "a protocol that is not UTF-8": field(1, CALLER)
    + field(3, field(1, PEER) + field(2, b"\xff\xfe") + field(3, b"data")),
}


async def test_invalid_incoming_call_is_refused_and_the_next_one_served() -> None:
    answers: list[Message] = []

    def calls(connection: Connection, call_id: bytes) -> bool:
        connection.send(frame(acknowledgement(call_id)))
        for number, bad in enumerate(BAD_CALLS.values()):
            connection.send(frame(bad))
            answers.append(connection.read_message())
            good = bytes([number]) * 16
            # Unknown fields, as a newer peer may send.
            connection.trickle(frame(incoming(good, "echo", b"good") + UNKNOWN))
            answers.append(connection.read_message())
        return True

    async with hostile() as (client, plan, _):
        plan.next("add", calls)
        await client.add_unary_handler("echo", echo)
        await until(lambda: len(answers) == 2 * len(BAD_CALLS))
        assert await client.call_unary(FAKE_PEER, "echo", b"next") == b"next"
        assert client.unary.unanswered_calls == 0
    assert {answer.kind for answer in answers[::2]} == {"error"}
    assert {answer.call_id for answer in answers[::2]} == {CALLER}
    assert [(answer.kind, answer.data) for answer in answers[1::2]] == [
        ("response", b"good")
    ] * len(BAD_CALLS)


@unary_faults
async def test_incoming_calls_are_served_after_reconnect_from(fault: Fault) -> None:
    if fault.expected is ControlTimeout:
        # An incomplete message does not break an idle connection, so close it here.
        fault = Fault(fault.data, ConnectionLost, close=True)
    answers: list[Message] = []

    def breaks(connection: Connection, call_id: bytes) -> None:
        connection.send(frame(acknowledgement(call_id)))
        fault.answer(frame(incoming(CALLER, "echo", bytes(100_000))))(connection, call_id)
        if not fault.close:
            connection.wait_closed()

    def calls(connection: Connection, call_id: bytes) -> bool:
        connection.send(frame(acknowledgement(call_id)) + frame(incoming(CALLER, "echo", b"data")))
        answers.append(connection.read_message())
        return True

    async with hostile() as (client, plan, fake):
        plan.next("add", breaks)
        await client.add_unary_handler("echo", echo)
        await until(lambda: plan.used and not client.unary.connected)
        plan.next("add", calls)  # the registration on the new connection
        assert await client.call_unary(FAKE_PEER, "echo", b"next", timeout=SOON) == b"next"
        await until(lambda: answers)
        assert client.unary.unanswered_calls == 0
    assert [(answer.kind, answer.data) for answer in answers] == [("response", b"data")]


# --- subscriptions ---

MESSAGE = field(1, PEER) + field(2, b"data") + field(3, b"1") + field(4, b"topic")
#: The data instead of a message, whether the daemon then closes, and the resulting exception.
BAD_MESSAGES: dict[str, tuple[bytes, bool, type[Exception]]] = {
    "EOF": (b"", True, anyio.EndOfStream),
    "a length cut short": (b"\x80", True, ConnectionLost),
    "a message cut short": (frame(MESSAGE)[:-1], True, ConnectionLost),
    "garbage": (b"\x05hello", False, ProtocolViolation),
    "a length of eleven bytes": (b"\x80" * 10 + b"\x01", False, ProtocolViolation),
    "a length of 2^63": (varint(1 << 63), False, ProtocolViolation),
    "a length just over the limit": (varint((4 << 20) + (64 << 10) + 1), False, ProtocolViolation),
    "a topic that is not UTF-8": (frame(field(4, b"\xff")), False, ProtocolViolation),
    "a message of another type": (frame(IDENTITY), False, ProtocolViolation),
}


def subscribed(then: Callable[[Connection], object]) -> Answer:
    """Answers SUBSCRIBE with a first message, and continues with ``then``."""

    def answer(connection: Connection, _: bytes) -> None:
        connection.send(frame(OK) + frame(MESSAGE))
        then(connection)

    return answer


@pytest.mark.parametrize(("data", "end", "expected"), BAD_MESSAGES.values(), ids=BAD_MESSAGES)
async def test_subscription_fails_on(data: bytes, end: bool, expected: type[Exception]) -> None:
    def then(connection: Connection) -> None:
        connection.send(data)
        if not end:
            connection.wait_closed()

    async with hostile() as (client, plan, _):
        plan.next("request", subscribed(then))
        async with await client.pubsub_subscribe("topic", timeout=PATIENCE) as subscription:
            assert (await subscription.receive_message()).data == b"data"
            with anyio.fail_after(SOON), pytest.raises(expected):
                await subscription.receive_message()
        await assert_usable(client)


async def test_subscription_accepts_unknown_fields_and_any_chunking() -> None:
    def then(connection: Connection) -> None:
        connection.trickle(frame(MESSAGE + UNKNOWN) + frame(b""))
        connection.send(frame(MESSAGE) * 1000)

    async with hostile() as (client, plan, _):
        plan.next("request", subscribed(then))
        async with await client.pubsub_subscribe("topic") as subscription:
            messages = [message async for message in subscription]
        assert len(messages) == 1 + 2 + 1000
        assert (messages[2].data, messages[2].peer_id) == (b"", None)
        assert messages[0] == messages[1] == messages[-1]


# --- misbehaving peers on a stream ---


def opened(then: Callable[[Connection], object]) -> Answer:
    """Answers STREAM_OPEN, and continues with ``then`` as the peer."""

    def answer(connection: Connection, _: bytes) -> None:
        connection.send(frame(STREAM_OPENED) + b"ahead")
        then(connection)

    return answer


async def test_stream_closed_by_the_peer_yields_its_data_and_then_eof() -> None:
    async with hostile() as (client, plan, _):
        plan.next("request", opened(lambda _: None))
        _, stream = await client.stream_open(FAKE_PEER, ["/echo"], timeout=PATIENCE)
        async with stream:
            assert await stream.readexactly(5) == b"ahead"
            with anyio.fail_after(SOON):
                with pytest.raises(anyio.EndOfStream):
                    await stream.receive()
                assert await stream.read() == b""
                with pytest.raises(anyio.BrokenResourceError):
                    while True:
                        await stream.send(bytes(65536))
        await assert_usable(client)


async def test_stream_reset_by_the_peer_raises_broken_resource_error() -> None:
    def resets(connection: Connection) -> None:
        connection.wait_readable()
        connection.reset()

    async with hostile("tcp") as (client, plan, _):
        plan.next("request", opened(resets))
        _, stream = await client.stream_open(FAKE_PEER, ["/echo"], timeout=PATIENCE)
        async with stream:
            assert await stream.readexactly(5) == b"ahead"
            await stream.send(b"x")
            with anyio.fail_after(SOON), pytest.raises(anyio.BrokenResourceError):
                while True:
                    await stream.receive()
        await assert_usable(client)


async def test_read_from_a_silent_peer_can_be_cancelled() -> None:
    async with hostile() as (client, plan, _):
        plan.next("request", opened(lambda c: c.wait_closed()))
        _, stream = await client.stream_open(FAKE_PEER, ["/echo"], timeout=PATIENCE)
        async with stream:
            assert await stream.readexactly(5) == b"ahead"
            for read in (stream.receive, stream.read, stream.readline, stream.receive_frame):
                with anyio.move_on_after(0.02) as scope:
                    await read()
                assert scope.cancelled_caught
        await assert_usable(client)


@pytest.mark.parametrize("kind", ["stream", "subscription"])
async def test_endless_sender_is_held_back_by_a_slow_reader(kind: str) -> None:
    total = 100 << 20
    message = frame(field(2, bytes(100_000))) if kind == "subscription" else bytes(100_000)
    count = total // len(message)
    sent = [0]
    blocked = threading.Event()

    def flood(connection: Connection) -> None:
        connection.socket.setblocking(False)
        for _ in range(count):
            rest = memoryview(message)
            while rest:
                try:
                    done = connection.socket.send(rest)
                except BlockingIOError:
                    blocked.set()
                    connection.wait_writable()
                    continue
                sent[0] += done
                rest = rest[done:]

    most = 0
    async with hostile() as (client, plan, _):
        if kind == "stream":
            plan.next("request", opened(flood))
            _, stream = await client.stream_open(FAKE_PEER, ["/echo"])
            await stream.readexactly(5)
        else:
            plan.next("request", subscribed(flood))
            stream = subscription = await client.pubsub_subscribe("topic")
            await subscription.receive_message()
        async with stream:
            await until(blocked.is_set)
            received = 0
            for _ in range(count):
                if isinstance(stream, Subscription):
                    assert len((await stream.receive_message()).data) == 100_000
                else:
                    await stream.readexactly(len(message))
                received += len(message)
                most = max(most, sent[0] - received)
            with pytest.raises(anyio.EndOfStream):
                await stream.receive()
        await assert_usable(client)
    assert sent[0] == count * len(message)
    # Sending stops once the buffers of the sockets and of the client are full.
    assert most < 2 << 20


# --- invalid connections to the listener ---


@asynccontextmanager
async def listening() -> AsyncIterator[tuple[Client, Callable[[], socket.socket], list[bytes]]]:
    """A listening client, a function that connects like the daemon, and what its handler read."""
    got: list[bytes] = []

    async def handler(info: StreamInfo, stream: Stream) -> None:
        async with stream:
            got.append(await stream.read())

    path = new_directory() / "listen.sock"
    sockets: list[socket.socket] = []

    def connect() -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(str(path))
        sock.setblocking(False)
        sockets.append(sock)
        return sock

    before = open_descriptors()
    with FakeDaemon(Plan()) as fake:
        async with Client(fake.control_maddr, f"/unix{path}") as client, client.listen():
            await client.stream_handler("/echo", handler)
            yield client, connect, got
    while sockets:
        sockets.pop().close()
    assert open_descriptors() == before


async def assert_served(connect: Callable[[], socket.socket], got: list[bytes]) -> None:
    """Asserts that a stream reaches its handler."""
    got.clear()
    good = connect()
    good.sendall(frame(STREAM_INFO) + b"data")
    good.shutdown(socket.SHUT_WR)
    await until(lambda: got)
    assert got == [b"data"]
    await until(lambda: is_closed(good))


BAD_HEADS = {
    "garbage": b"\x05hello",
    "text": b"GET / HTTP/1.1\r\n\r\n" * 9,
    "a length of eleven bytes": b"\x80" * 10 + b"\x01",
    "a length of 2^63": varint(1 << 63),
    "a length just over the limit": varint((64 << 10) + 1),
    "an empty message": b"\x00",
    "a message of another type": frame(IDENTITY),
    "no peer": frame(field(2, ADDR) + field(3, b"/echo")),
    "no address": frame(field(1, PEER) + field(3, b"/echo")),
    "no protocol": frame(INFO),
    "a protocol that is not UTF-8": frame(INFO + field(3, b"\xff")),
    "a protocol without a handler": frame(INFO + field(3, b"/other")),
}


async def test_listener_closes_streams_with_an_invalid_or_incomplete_header() -> None:
    head = frame(STREAM_INFO)
    async with listening() as (_, connect, got):
        for bad in BAD_HEADS.values():
            invalid = connect()
            invalid.sendall(bad)
            await until(lambda: is_closed(invalid))  # noqa: B023
        for size in range(len(head)):
            invalid = connect()
            invalid.sendall(head[:size])
            invalid.shutdown(socket.SHUT_WR)
            await until(lambda: is_closed(invalid))  # noqa: B023
        assert got == []
        await assert_served(connect, got)


async def test_header_may_have_unknown_fields_and_arrive_one_byte_at_a_time() -> None:
    async with listening() as (_, connect, got):
        good = connect()
        for byte in frame(STREAM_INFO + UNKNOWN) + b"data":
            good.sendall(bytes([byte]))
            await anyio.lowlevel.checkpoint()
        good.shutdown(socket.SHUT_WR)
        await until(lambda: got == [b"data"])


async def test_half_open_inbound_streams_are_bounded_in_number_and_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(inbound, "MAX_HALF_OPEN", 5)
    monkeypatch.setattr(inbound, "HALF_OPEN_PATIENCE", 0.01)
    monkeypatch.setattr(inbound, "HEADER_TIMEOUT", 1.0)
    async with listening() as (_, connect, got):
        silent = [connect() for _ in range(20)]
        for connection in silent[::2]:
            connection.sendall(frame(STREAM_INFO)[:5])
        # The oldest connections are closed in favour of new ones.
        await assert_served(connect, got)
        assert sum(map(is_closed, silent)) >= 20 - 7
        # Connections that have sent nothing may stay, since jsp2pd connects early.
        await until(lambda: all(map(is_closed, silent[::2])), within=SOON)
        await assert_served(connect, got)
