"""Calling stream handlers, and cancelling them after their peer has left."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import math
import select
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any
from unittest import mock

import anyio
import pytest
from fake_daemon import ADDR, IDENTITY, PEER, Connection, FakeDaemon, field, frame, honest
from support import DaemonProcess, connect_to_listener, new_directory, open_descriptors, until

from p2pclient_rs import Client, ConnectionLost, PeerID, Stream, StreamInfo, handlers
from p2pclient_rs.handlers import takes_info

if TYPE_CHECKING:
    from conftest import Pair

pytestmark = pytest.mark.anyio

#: jsp2pd does not close a handler's socket when the peer leaves (docs/streams.md).
reports_closed_streams = pytest.mark.daemons("hivemind", "go")

#: A linger in seconds, short because tests wait for it.
LINGER = 0.2


def living_tasks() -> int:
    """Returns the number of tasks on the running event loop."""
    try:
        return len(asyncio.all_tasks())
    except RuntimeError:
        import trio

        return trio.lowlevel.current_statistics().tasks_living


async def get_stuck() -> None:
    """Blocks forever; on asyncio, by putting to a full queue."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        await anyio.Event().wait()
    queue: asyncio.Queue[int] = asyncio.Queue(1)
    await queue.put(1)
    await queue.put(2)


@asynccontextmanager
async def listening(transport: str = "unix") -> AsyncIterator[Client]:
    """A listening client of a daemon that accepts every request."""
    listen = f"/unix{new_directory()}/s" if transport == "unix" else "/ip4/127.0.0.1/tcp/0"
    with FakeDaemon(honest) as fake:
        async with Client(fake.control_maddr, listen) as client, client.listen():
            yield client


def inbound(client: Client, protocol: str) -> socket.socket:
    """Opens an inbound stream to ``client``, as its daemon would."""
    sock = connect_to_listener(client)
    sock.sendall(frame(field(1, PEER) + field(2, ADDR) + field(3, protocol.encode())))
    return sock


class Handler:
    """A stream handler that runs ``work`` and records how it ends."""

    def __init__(self, work: Callable[[Stream], Awaitable[object]]) -> None:
        self._work = work
        self.events: list[str] = []

    async def __call__(self, info: StreamInfo, stream: Stream) -> None:
        self.events.append("begun")
        try:
            await self._work(stream)
            self.events.append("returned")
        except anyio.get_cancelled_exc_class():
            self.events.append("cancelled")
            raise

    @property
    def ended(self) -> bool:
        return len(self.events) > 1


def stuck() -> Handler:
    return Handler(lambda stream: get_stuck())


def cancellations(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Returns the log lines about handlers that were cancelled because their peer has left."""
    return [
        record.getMessage()
        for record in caplog.records
        if record.name == "p2pclient_rs.control"
        and "the peer has closed the stream" in record.message
    ]


# --- handlers whose peer has left ---


@reports_closed_streams
async def test_stuck_handlers_are_cancelled_and_logged_once_their_peers_left(
    pair: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    handler = stuck()
    await pair.bob.stream_handler("/stuck", handler, linger=LINGER)
    await pair.alice.list_peers()  # leaves a pooled connection, as the last list_peers does
    tasks, descriptors = living_tasks(), len(open_descriptors())
    streams = [await pair.alice.stream_open(pair.bob_daemon.peer_id, ["/stuck"]) for _ in range(20)]
    await until(lambda: len(handler.events) == 20)
    assert living_tasks() > tasks
    for stream in streams:
        await stream.aclose()
    await until(lambda: handler.events.count("cancelled") == 20)
    await until(lambda: living_tasks() <= tasks)
    await pair.alice.list_peers()
    assert len(open_descriptors()) == descriptors
    assert handler.events == 20 * ["begun"] + 20 * ["cancelled"]
    lines = cancellations(caplog)
    assert len(lines) == 20
    assert all("/stuck" in line and str(pair.alice_daemon.peer_id) in line for line in lines)
    assert all("0.2 s" in line for line in lines)


@reports_closed_streams
@pytest.mark.parametrize(
    "sizes", [[1 << 19], [3 << 20], 2000 * [20]], ids=["512 KiB", "3 MiB", "small messages"]
)
@pytest.mark.parametrize("how", ["aborts", "daemon is killed"])
async def test_unread_input_does_not_hide_that_the_peer_has_left(
    pair: Pair, sizes: list[int], how: str
) -> None:
    handler = stuck()
    await pair.bob.stream_handler("/stuck", handler, linger=LINGER)
    daemon = DaemonProcess()
    try:
        async with daemon.client() as peer:
            await peer.connect(pair.bob_daemon.peer_id, pair.bob_daemon.addrs)
            stream = await peer.stream_open(pair.bob_daemon.peer_id, ["/stuck"])
            with anyio.move_on_after(2):
                for size in sizes:
                    await stream.send(bytes(size))
            if how == "aborts":
                stream.abort()
            else:
                daemon.kill()
                await stream.aclose()
            await until(lambda: handler.ended)
    finally:
        daemon.stop()
    assert handler.events == ["begun", "cancelled"]


@reports_closed_streams
async def test_many_departed_peers_with_unread_input_are_all_noticed(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handlers, "_MAX_ALL_AHEAD", 4 << 20)  # less than they send in total
    handler = stuck()
    await pair.bob.stream_handler("/stuck", handler, linger=LINGER)
    streams = [await pair.alice.stream_open(pair.bob_daemon.peer_id, ["/stuck"]) for _ in range(5)]
    await until(lambda: len(handler.events) == 5)

    async def send(stream: Stream) -> None:
        with anyio.move_on_after(2):
            await stream.send(bytes(3 << 20))
        stream.abort()

    async with anyio.create_task_group() as tasks:
        for stream in streams:
            tasks.start_soon(send, stream.stream)
    await until(lambda: handler.events.count("cancelled") == 5)


@pytest.mark.independent
async def test_input_is_not_read_ahead_within_the_linger() -> None:
    idle, other = stuck(), stuck()
    async with listening() as client:
        await client.stream_handler("/idle", idle, linger=4)
        await client.stream_handler("/other", other, linger=LINGER)
        with inbound(client, "/idle") as peer:
            await until(lambda: idle.events)
            assert fill(peer) > 0
            for _ in range(3):  # each round spans several checks
                other.events.clear()
                inbound(client, "/other").close()
                await until(lambda: other.ended)
            assert fill(peer) == 0


@pytest.mark.independent
async def test_read_ahead_input_is_bounded_per_stream_and_per_listener(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(handlers, "_MAX_AHEAD", 2 << 20)
    monkeypatch.setattr(handlers, "_MAX_ALL_AHEAD", 3 << 20)
    streams: list[Stream] = []

    async def keep(stream: Stream) -> None:
        streams.append(stream)
        await get_stuck()

    async with listening() as client:
        await client.stream_handler("/p", keep, linger=LINGER)
        with inbound(client, "/p") as one, inbound(client, "/p") as two:
            peers = [one, two]

            def ahead() -> list[int]:
                for peer in peers:
                    fill(peer)
                return sorted(stream._raw.read_ahead_size for stream in streams)

            await until(lambda: len(streams) == 2)
            await until(lambda: sum(ahead()) >= 3 << 20)
            # Neither amount grows any further.
            await anyio.sleep(3 * LINGER)
            one_mib, two_mib = ahead()
            assert 1 << 20 <= one_mib < (1 << 20) + 65536
            assert 2 << 20 <= two_mib < (2 << 20) + 65536


def fill(peer: socket.socket) -> int:
    """Sends until the socket would block; returns the number of bytes sent."""
    peer.setblocking(False)
    count = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            count += peer.send(bytes(65536))
    return count


@pytest.mark.independent
async def test_handler_receives_input_that_was_read_ahead() -> None:
    received: list[bytes] = []
    peer_has_sent = anyio.Event()

    async def wait_and_read(stream: Stream) -> None:
        await peer_has_sent.wait()
        received.append(await stream.readexactly(100_000))
        async for data in stream:
            received.append(data)

    handler = Handler(wait_and_read)
    data = bytes(range(250)) * 20_000
    async with listening() as client:
        await client.stream_handler("/p", handler, linger=LINGER)
        with inbound(client, "/p") as peer:
            # The sockets cannot hold all of this, so it returns only if the listener reads ahead.
            await anyio.to_thread.run_sync(peer.sendall, data)
            peer_has_sent.set()
        await until(lambda: handler.ended)
    assert b"".join(received) == data and handler.events == ["begun", "returned"]


@pytest.mark.independent
async def test_half_close_on_a_unix_socket_does_not_count_as_left() -> None:
    half_closed, closed = stuck(), stuck()
    async with listening() as client:
        await client.stream_handler("/half", half_closed, linger=0)
        await client.stream_handler("/full", closed, linger=LINGER)
        with inbound(client, "/half") as peer:
            peer.shutdown(socket.SHUT_WR)
            inbound(client, "/full").close()
            await until(lambda: closed.ended)
            assert (closed.events, half_closed.events) == (["begun", "cancelled"], ["begun"])
        await until(lambda: half_closed.ended)
        assert half_closed.events == ["begun", "cancelled"]


@pytest.mark.independent
async def test_stream_half_closed_by_both_sides_counts_as_closed() -> None:
    async def end_and_wait(stream: Stream) -> None:
        await stream.send_eof()
        await get_stuck()

    handler = Handler(end_and_wait)
    async with listening() as client:
        await client.stream_handler("/ended", handler, linger=LINGER)
        with inbound(client, "/ended") as peer:
            assert peer.recv(1) == b"" if await readable(peer) else False
            peer.shutdown(socket.SHUT_WR)
            await until(lambda: handler.ended)


async def readable(sock: socket.socket) -> bool:
    await until(lambda: select.select([sock], [], [], 0)[0])
    return True


@pytest.mark.independent
@pytest.mark.parametrize("how", ["FIN", "reset", "half-close"])
async def test_eof_on_a_tcp_socket_counts_as_left(how: str) -> None:
    handler = stuck()
    async with listening("tcp") as client:
        await client.stream_handler("/tcp", handler, linger=LINGER)
        with inbound(client, "/tcp") as peer:
            await until(lambda: handler.events)
            if how == "half-close":
                peer.shutdown(socket.SHUT_WR)
            else:
                if how == "reset":
                    linger = struct.pack("ii", 1, 0)
                    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                peer.close()
            await until(lambda: handler.ended)
        assert handler.events == ["begun", "cancelled"]


@pytest.mark.independent
@pytest.mark.parametrize("how", ["receive", "read", "send", "write", "send_all", "readuntil"])
async def test_every_use_of_the_stream_restarts_the_linger(how: str) -> None:
    uses = {
        "receive": lambda stream: stream.receive(),
        "read": lambda stream: stream.read(1),
        "readuntil": lambda stream: stream.readuntil(),
        "send": lambda stream: stream.send(b"a"),
        "send_all": lambda stream: stream.send_all(b"a"),
        "write": lambda stream: stream.write(b"a"),
    }

    async def use_it(stream: Stream) -> None:
        for _ in range(20):
            try:
                await uses[how](stream)
            except (anyio.EndOfStream, anyio.BrokenResourceError, asyncio.IncompleteReadError):
                pass  # the peer has left
            await anyio.sleep(LINGER / 4)

    handler = Handler(use_it)
    async with listening() as client:
        await client.stream_handler("/busy", handler, linger=LINGER)
        inbound(client, "/busy").close()
        await until(lambda: handler.ended)
    assert handler.events == ["begun", "returned"]


@pytest.mark.independent
async def test_handler_that_ignores_the_stream_gets_the_whole_linger() -> None:
    async def compute(stream: Stream) -> None:
        await anyio.sleep(LINGER * 2)

    handler = Handler(compute)
    async with listening() as client:
        await client.stream_handler("/computes", handler, linger=LINGER * 20)
        inbound(client, "/computes").close()
        await until(lambda: handler.ended)
    assert handler.events == ["begun", "returned"]


@pytest.mark.independent
async def test_handler_without_a_linger_runs_until_listening_ends(
    caplog: pytest.LogCaptureFixture,
) -> None:
    patient, default, other = stuck(), stuck(), stuck()
    async with listening() as client:
        await client.stream_handler("/patient", patient, linger=None)
        await client.stream_handler("/default", default)
        await client.stream_handler("/other", other, linger=LINGER)
        inbound(client, "/patient").close()
        inbound(client, "/default").close()
        for count in (2, 4):
            inbound(client, "/other").close()
            await until(lambda count=count: len(other.events) == count)  # type: ignore[misc]
        assert patient.events == default.events == ["begun"]
        assert len(cancellations(caplog)) == 2
    assert patient.events == default.events == ["begun", "cancelled"]


@pytest.mark.independent
async def test_cancelled_handler_may_clean_up() -> None:
    left: list[str] = []

    async def handler(info: StreamInfo, stream: Stream) -> None:
        try:
            await get_stuck()
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.sleep(0.01)
                await stream.aclose()
            left.append("cleaned up")

    async with listening() as client:
        await client.stream_handler("/tidy", handler, linger=LINGER)
        inbound(client, "/tidy").close()
        await until(lambda: left)
        # The listener still accepts streams.
        inbound(client, "/tidy").close()
        await until(lambda: len(left) == 2)


@pytest.mark.independent
async def test_exception_of_a_handler_with_a_linger_is_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def fail(stream: Stream) -> None:
        raise LookupError("a bug in the handler")

    async with listening() as client:
        await client.stream_handler("/fails", fail, linger=LINGER)
        with inbound(client, "/fails") as peer:
            assert await readable(peer)
    assert "a bug in the handler" in caplog.text


@pytest.mark.independent
@pytest.mark.parametrize("linger", [-1, -0.001, math.nan, -math.inf])
async def test_invalid_linger_is_refused(linger: float) -> None:
    async with listening() as client:
        with pytest.raises(ValueError, match="linger"):
            await client.stream_handler("/p", stuck(), linger=linger)
        assert client.control.handlers == {}


@pytest.mark.independent
async def test_infinite_linger_means_none() -> None:
    async def pause(stream: Stream) -> None:
        await anyio.sleep(0.3)

    handler = Handler(pause)
    async with listening() as client:
        await client.stream_handler("/p", handler, linger=math.inf)
        inbound(client, "/p").close()
        await until(lambda: handler.ended)
    assert handler.events == ["begun", "returned"]


@pytest.mark.independent
async def test_linger_survives_register_again() -> None:
    handler = stuck()
    async with listening() as client:
        await client.stream_handler("/p", handler, linger=LINGER)
        await client.control.register_again()
        inbound(client, "/p").close()
        await until(lambda: handler.ended)


@pytest.mark.independent
async def test_linger_survives_a_failed_registration() -> None:
    registered = 0

    def script(connection: Connection) -> None:
        nonlocal registered
        while True:
            request = connection.read_request()
            if b"/p" in request:
                registered += 1
                if registered == 2:
                    return
            connection.send(frame(IDENTITY))

    handler = stuck()
    with FakeDaemon(script) as fake:
        listen = f"/unix{new_directory()}/s"
        async with Client(fake.control_maddr, listen) as client, client.listen():
            await client.stream_handler("/p", handler, linger=LINGER)
            with pytest.raises(ConnectionLost):
                await client.stream_handler("/p", stuck(), linger=None)
            inbound(client, "/p").close()
            await until(lambda: handler.ended)
    assert handler.events == ["begun", "cancelled"]


@pytest.mark.independent
async def test_short_linger_is_not_delayed_by_longer_ones() -> None:
    long, short = stuck(), stuck()
    async with listening() as client:
        await client.stream_handler("/long", long, linger=10_000)
        await client.stream_handler("/short", short, linger=LINGER)
        for _ in range(2):
            inbound(client, "/long").close()
            await until(lambda: long.events)
        inbound(client, "/short").close()
        await until(lambda: short.ended, within=5)
        assert long.events == ["begun", "begun"]


# --- how a handler is called ---


class Methods:
    async def with_info(self, info: Any, stream: Any) -> None: ...

    async def alone(self, stream: Any) -> None: ...

    @staticmethod
    async def static(stream: Any) -> None: ...

    @classmethod
    async def of_class(cls, stream: Any) -> None: ...


class CallableAlone:
    async def __call__(self, stream: Any) -> None: ...


class CallableWithInfo:
    async def __call__(self, info: Any, stream: Any) -> None: ...


async def with_info(info: Any, stream: Any) -> None: ...
async def alone(stream: Any) -> None: ...
async def alone_positional(stream: Any, /) -> None: ...
async def alone_keywords(stream: Any, *, timeout: float = 1) -> None: ...
async def alone_rest(stream: Any, **rest: Any) -> None: ...
async def optional(stream: Any, timeout: float = 1) -> None: ...
async def anything(*args: Any, **kwargs: Any) -> None: ...
async def one_and_more(stream: Any, *rest: Any) -> None: ...
async def three(client: Any, info: Any, stream: Any) -> None: ...
async def three_with_default(info: Any, stream: Any, timeout: float = 1) -> None: ...
async def none() -> None: ...
async def keyword_only(*, stream: Any) -> None: ...
async def needs_keyword(info: Any, stream: Any, *, key: Any) -> None: ...


def passing(function: Callable[..., Any]) -> Callable[..., Any]:
    """A decorator whose wrapper passes all arguments on."""

    @functools.wraps(function)
    async def wrapper(*args: Any, **kwargs: Any) -> Any:
        return await function(*args, **kwargs)

    return wrapper


def dropping(function: Callable[..., Any]) -> Callable[..., Any]:
    """A decorator whose wrapper drops the info."""

    @functools.wraps(function)
    async def wrapper(info: Any, stream: Any) -> Any:
        return await function(stream)

    return wrapper


def adding(function: Callable[..., Any]) -> Callable[..., Any]:
    """A decorator whose wrapper adds an argument."""

    @functools.wraps(function)
    async def wrapper(info: Any, stream: Any) -> Any:
        return await function(None, info, stream)

    return wrapper


def adding_to_anything(function: Callable[..., Any]) -> Callable[..., Any]:
    """A decorator whose wrapper accepts any arguments and adds one."""

    @functools.wraps(function)
    async def wrapper(*args: Any) -> Any:
        return await function(None, *args)

    return wrapper


def supplying_info(function: Callable[..., Any]) -> Callable[..., Any]:
    """A decorator whose wrapper supplies the info."""

    @functools.wraps(function)
    async def wrapper(stream: Any) -> Any:
        return await function(stream.info, stream)

    return wrapper


TWO: list[Callable[..., Any]] = [
    with_info,
    optional,
    anything,
    one_and_more,
    three_with_default,
    Methods().with_info,
    CallableWithInfo(),
    functools.partial(three, None),
    functools.partial(with_info),
    passing(with_info),
    dropping(alone),
    adding(three),
    adding_to_anything(three),
    mock.Mock(),
    mock.AsyncMock(),
    mock.create_autospec(with_info),
    max,
]
ONE: list[Callable[..., Any]] = [
    alone,
    alone_positional,
    alone_keywords,
    alone_rest,
    Methods().alone,
    Methods.static,
    Methods.of_class,
    Methods().static,
    CallableAlone(),
    functools.partial(with_info, None),
    functools.partial(Methods.alone, Methods()),
    passing(alone),
    passing(passing(alone)),
    supplying_info(with_info),
    mock.create_autospec(alone),
    lambda stream: alone(stream),
]
NEITHER: list[Any] = [three, none, keyword_only, needs_keyword, Methods.with_info]


@pytest.mark.parametrize("handler", TWO, ids=repr)
def test_handler_that_accepts_two_arguments_gets_both(handler: Callable[..., Any]) -> None:
    assert takes_info(handler) is True


@pytest.mark.parametrize("handler", ONE, ids=repr)
def test_handler_that_accepts_one_argument_gets_the_stream(
    handler: Callable[..., Any],
) -> None:
    assert takes_info(handler) is False


@pytest.mark.independent
@pytest.mark.parametrize("handler", [*NEITHER, None, 5], ids=repr)
async def test_registering_a_handler_of_another_arity_raises_type_error(
    handler: Any,
) -> None:
    with FakeDaemon(honest) as fake:
        async with Client(fake.control_maddr, f"/unix{new_directory()}/s") as client:
            expected = r"\(info, stream\) or \(stream\)" if callable(handler) else "callable"
            with pytest.raises(TypeError, match=expected):
                await client.stream_handler("/p", handler)
            assert client.control.handlers == {}
        assert fake.requests == []


async def test_handler_with_one_parameter_is_called_with_the_stream(pair: Pair) -> None:
    seen: list[tuple[PeerID, str]] = []

    async def handler(stream: Stream) -> None:
        seen.append((stream.info.peer_id, stream.info.proto))
        await stream.write(await stream.read(4))
        await stream.close()

    await pair.bob.stream_handler("/alone", handler)
    stream = await pair.alice.stream_open(pair.bob_daemon.peer_id, ["/alone"])
    await stream.write(b"ping")
    assert await stream.read(4) == b"ping"
    await stream.close()
    assert seen == [(pair.alice_daemon.peer_id, "/alone")]


@pytest.mark.independent
async def test_handler_added_to_the_table_directly_may_take_only_the_stream() -> None:
    streams: list[Any] = []

    async def handler(stream: Stream) -> None:
        streams.append(stream.info.proto)

    async with listening() as client:
        client.control.handlers["/direct"] = handler
        with inbound(client, "/direct") as peer:
            assert await readable(peer)
    assert streams == ["/direct"]
