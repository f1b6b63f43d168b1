"""The control client: requests, unary calls, streams, and the listener for inbound streams."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Iterable,
    MutableMapping,
    Sequence,
)
from contextlib import asynccontextmanager, suppress
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final, TypeAlias
from uuid import UUID

import anyio

import p2pclient_rs
from p2pclient_rs import connector, control, daemon_limit
from p2pclient_rs._native import RawListener, RawStream
from p2pclient_rs.compat.values import (
    CONNECTION_PROTOCOLS as SUPPORT_CONN_PROTOCOLS,
    ConvertedTypes,
    connection_protocol,
)
from p2pclient_rs.exceptions import (
    AlreadyRegistered,
    ControlFailure as OwnControlFailure,
    NotRegistered,
)
from p2pclient_rs.listening import Start
from p2pclient_rs.reactor import reactor, silence
from p2pclient_rs.stream import Stream
from p2pclient_rs.unary import DEFAULT_HOLD, MAX_PROTOBUF_SIZE, UnaryClient

from .datastructures import Multiaddr, PeerID, PeerInfo, StreamInfo
from .exceptions import to_hivemind
from .handlers import HandlerTasks
from .streams import StreamReader, StreamWriter, reader_and_writer
from .utils import (
    DispatchFailure,
    P2PDaemonError,
    P2PHandlerError,
    raise_if_failed,
    read_pbmsg_safe,
    write_pbmsg,
)

if TYPE_CHECKING:
    from typing_extensions import Buffer, Self

__all__ = [
    "DEFAULT_MAX_MSG_SIZE",
    "MAX_UNARY_PAYLOAD_SIZE",
    "SUPPORTED_PROTOS",
    "SUPPORT_CONN_PROTOCOLS",
    "CallID",
    "ControlClient",
    "DaemonConnector",
    "DispatchFailure",
    "Multiaddr",
    "P2PDaemonError",
    "P2PHandlerError",
    "PeerID",
    "PeerInfo",
    "StreamHandler",
    "StreamInfo",
    "TUnaryHandler",
    "logger",
    "parse_conn_protocol",
    "raise_if_failed",
    "read_pbmsg_safe",
    "write_pbmsg",
]

#: The type of a handler of inbound streams. Each stream has its own task.
StreamHandler: TypeAlias = Callable[
    [StreamInfo, asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]
]
#: The type of a handler of incoming unary calls, called with the request and the caller.
TUnaryHandler: TypeAlias = Callable[[bytes, PeerID], Awaitable[bytes]]
CallID = UUID

SUPPORTED_PROTOS = ("ip4", "ip6", "dns", "dns4", "dns6", "unix")

#: The default size of the largest message of a unary call, in bytes.
DEFAULT_MAX_MSG_SIZE = 4 * 1024**2
#: The size of the largest payload that hivemind sends in a call; larger ones go through a stream.
MAX_UNARY_PAYLOAD_SIZE = DEFAULT_MAX_MSG_SIZE // 2


class _Default:
    """The type of the marker for "use the class's default"."""

    def __repr__(self) -> str:
        return "<the class's default>"


_DEFAULT: Final[_Default] = _Default()

_UNARY_REQUESTS = ("CALL_UNARY", "ADD_UNARY_HANDLER", "REMOVE_UNARY_HANDLER")

#: The maximum number of concurrent requests that wait for peers. hivemind has no limit. This one is
#: high, so that unresponsive peers do not delay requests about other peers.
_MAX_CONNECTIONS = 1024

#: The size of the cache of hivemind's peer ids, which are slow to create: hivemind computes the
#: base58 text in Python.
_MAX_PEER_IDS = 4096

logger: logging.Logger = logging.getLogger(__name__)


def parse_conn_protocol(maddr: Multiaddr) -> int:
    """Returns the code of the protocol for connecting to a control or listen address.

    Returns:
        The code of the only protocol in the address that is in ``SUPPORT_CONN_PROTOCOLS``.

    Raises:
        ValueError: The address has no such protocol, or several.
    """
    code = connection_protocol(maddr)
    if code is None:
        raise ValueError(
            f"connection protocol should be only one protocol out of {SUPPORTED_PROTOS}, "
            f"maddr={maddr}"
        )
    return code


@lru_cache(_MAX_PEER_IDS)
def _peer_id(peer: bytes) -> PeerID:
    return PeerID(peer)


#: The classes of errors that hivemind's client raises with a message of its own.
_OWN_MESSAGES = OwnControlFailure, AlreadyRegistered, NotRegistered


class _Types(ConvertedTypes):
    """Converts the results and the errors of requests into hivemind's types."""

    def __init__(self) -> None:
        super().__init__(Multiaddr, PeerInfo, StreamInfo)

    def peer_id(self, peer_id: p2pclient_rs.PeerID) -> PeerID:
        return _peer_id(peer_id.to_bytes())

    def error(self, error: Exception) -> Exception:
        peer_id = getattr(error, "peer_id", None)
        if peer_id is not None:
            error.peer_id = self.peer_id(peer_id)  # type: ignore[attr-defined]
        if isinstance(error, OwnControlFailure) and error.request in _UNARY_REQUESTS:
            # Petals tells errors of unary calls apart by the text that hivemind gives them: the
            # daemon's message, or the message of hivemind's client. Our client uses the same texts.
            message = error.daemon_message
            if message is None and type(error) in _OWN_MESSAGES:
                message = str(error.args[0])
            if message is not None:
                error.args = (message,)
                error._terse = True
        return to_hivemind(error)


class DaemonConnector(connector.DaemonConnector):
    """Connects to a daemon's control socket.

    Args:
        control_maddr: The socket's address; ``/unix/tmp/p2pd.sock`` if None.

    Raises:
        ValueError: The address cannot be the address of a control socket.
    """

    DEFAULT_CONTROL_MADDR = connector.DEFAULT_CONTROL_MADDR

    def __init__(self, control_maddr: Multiaddr | str | None = None) -> None:
        if control_maddr is None or isinstance(control_maddr, str):
            control_maddr = control_maddr or self.DEFAULT_CONTROL_MADDR
        super().__init__(control_maddr, max_connections=_MAX_CONNECTIONS, types=_Types())

    @property
    def proto_code(self) -> int:
        """The multiaddr code of the protocol for connecting to ``control_maddr``."""
        return parse_conn_protocol(self.control_maddr)

    def _parse(self, control_maddr: Any) -> tuple[p2pclient_rs.Multiaddr, Any]:
        if isinstance(control_maddr, str):
            control_maddr = Multiaddr(control_maddr)
        parse_conn_protocol(control_maddr)
        return p2pclient_rs.Multiaddr(control_maddr), control_maddr

    async def open_connection(  # type: ignore[override]
        self, *, timeout: float | None = None
    ) -> tuple[StreamReader, StreamWriter]:
        """Opens a connection to the control socket, and sends nothing on it.

        Raises:
            ControlFailure: There is no daemon at the address. It is also a ConnectionError.
        """
        try:
            return reader_and_writer(await super().open_connection(timeout=timeout))
        except OwnControlFailure as error:
            raise to_hivemind(error) from error.__cause__

    async def open_persistent_connection(self, *args: Any, **kwargs: Any) -> Any:
        """Opens a persistent connection.

        Without arguments, returns a reader and a writer, for callers that implement the protocol
        themselves, as hivemind's client does.

        Raises:
            ControlFailure: There is no daemon at the address, or it is not hivemind's.
        """
        if args or kwargs:
            return await super().open_persistent_connection(*args, **kwargs)
        name = "PERSISTENT_CONN_UPGRADE"
        connection = await self.described(self._upgrade(name), name, None)
        return reader_and_writer(Stream(connection.raw.take_stream(), connection.watch))


def _unary_setting(name: str, meaning: str) -> Any:
    """Makes a property of ``ControlClient`` that reads and sets an attribute of ``_unary``."""

    def read(client: ControlClient) -> Any:
        return getattr(client._unary, name)

    def change(client: ControlClient, value: Any) -> None:
        setattr(client._unary, name, value)

    return property(read, change, doc=meaning)


class ControlClient(control.ControlClient):
    """Requests about the daemon, its peers and streams; unary calls; and the listener for inbound
    streams. Make one with ``create``.

    Its methods raise hivemind's ``P2PDaemonError``, and ``P2PHandlerError`` if a peer's handler
    raised.

    Attributes:
        daemon_connector: Connects to the daemon. A new value applies to the next request,
            and to the next persistent connection that is opened.
        listen_maddr: The address of the listener for inbound streams.
        handlers: The handlers of inbound streams, by protocol.
        unary_handlers: The table of unary handlers, by protocol. It is read at each call. Setting
            an entry replaces the handler, and deleting an entry makes calls fail; the daemon is
            notified of neither. The table itself can be replaced.
        persistent_conn_max_msg_size, max_unanswered, max_unanswered_bytes, hold: See ``create``.
            Setting one affects the next message.
    """

    DEFAULT_LISTEN_MADDR = control.DEFAULT_LISTEN_MADDR
    #: Defaults for the arguments of ``create`` with these names. hivemind has no such limits.
    DEFAULT_MAX_UNANSWERED: int | None = None
    DEFAULT_MAX_UNANSWERED_BYTES: int | None = None
    DEFAULT_HOLD: float | None = DEFAULT_HOLD

    handlers: dict[str, StreamHandler]  # type: ignore[assignment]
    _replaces_handlers = False
    _lingers = False

    def __init__(
        self,
        daemon_connector: DaemonConnector,
        listen_maddr: Multiaddr | str | None = None,
        *,
        _initialized_with_create: bool = False,
        persistent_conn_max_msg_size: int | None = None,
        max_unanswered: int | None | _Default = _DEFAULT,
        max_unanswered_bytes: int | None | _Default = _DEFAULT,
        hold: float | None | _Default = _DEFAULT,
    ) -> None:
        assert _initialized_with_create, (
            "Please use ControlClient.create coroutine to spawn new control instances"
        )
        super().__init__(daemon_connector, listen_maddr or self.DEFAULT_LISTEN_MADDR)
        self._unary_handlers: MutableMapping[str, TUnaryHandler] = {}
        if isinstance(max_unanswered, _Default):
            max_unanswered = self.DEFAULT_MAX_UNANSWERED
        if isinstance(max_unanswered_bytes, _Default):
            max_unanswered_bytes = self.DEFAULT_MAX_UNANSWERED_BYTES
        self._unary = UnaryClient(
            self.daemon_connector,
            max_message_size=persistent_conn_max_msg_size,
            # Only the daemon limits received messages, as in hivemind.
            max_incoming_size=MAX_PROTOBUF_SIZE,
            max_unanswered=max_unanswered,
            max_unanswered_bytes=max_unanswered_bytes,
            hold=self.DEFAULT_HOLD if isinstance(hold, _Default) else hold,
            handlers=self._unary_handlers,  # type: ignore[arg-type]
        )
        # hivemind's programs stop the daemon while replicas use it, which must not log a warning.
        self._unary._settings.loss_level = logging.INFO
        self._reactor = reactor()
        self._handler_tasks: HandlerTasks | None = None
        self._closed = False

    @property
    def daemon_connector(self) -> DaemonConnector:
        """Connects to the daemon."""
        return self._daemon_connector

    @daemon_connector.setter
    def daemon_connector(self, daemon_connector: connector.DaemonConnector) -> None:
        if not isinstance(daemon_connector, DaemonConnector):
            # Made by hivemind's own class before install(), or by p2pclient_rs.DaemonConnector.
            daemon_connector = DaemonConnector(daemon_connector.control_maddr)
        self._daemon_connector = daemon_connector
        unary = getattr(self, "_unary", None)
        if unary is not None:
            unary.daemon_connector = daemon_connector

    def _parse(self, listen_maddr: Multiaddr | str) -> Multiaddr:  # type: ignore[override]
        if isinstance(listen_maddr, str):
            listen_maddr = Multiaddr(listen_maddr)
        parse_conn_protocol(listen_maddr)
        return listen_maddr

    @classmethod
    async def create(
        cls,
        daemon_connector: DaemonConnector,
        listen_maddr: Multiaddr | str | None = None,
        use_persistent_conn: bool = True,
        persistent_conn_max_msg_size: int | None = None,
        *,
        max_unanswered: int | None | _Default = _DEFAULT,
        max_unanswered_bytes: int | None | _Default = _DEFAULT,
        hold: float | None | _Default = _DEFAULT,
        _fallback: int = 2 << 22,
    ) -> Self:
        """Makes a client.

        Args:
            daemon_connector: Connects to the daemon.
            listen_maddr: The address of the listener for inbound streams;
                ``/unix/tmp/p2pclient.sock`` if None.
            use_persistent_conn: Whether to open the persistent connection now, rather than at its
                first use.
            persistent_conn_max_msg_size: The size of the largest message of a unary call to send,
                in bytes. None means the daemon's limit if it can be determined (see
                ``p2pclient_rs.daemon_limit``), or else hivemind's default.
            max_unanswered: The maximum number of incoming calls in progress, above which the client
                stops reading; None for no limit. By default ``DEFAULT_MAX_UNANSWERED``.
            max_unanswered_bytes: The same for the total size of the payloads of these calls, in
                bytes. By default ``DEFAULT_MAX_UNANSWERED_BYTES``.
            hold: How long the client may stop reading because of these limits, in seconds, before
                it refuses calls over them; None to never refuse any. By default ``DEFAULT_HOLD``.

        Raises:
            ValueError: A limit is negative or not a number.
            ControlFailure: There is no daemon at the address, or it is not hivemind's.
        """
        client = cls(
            daemon_connector,
            listen_maddr,
            _initialized_with_create=True,
            persistent_conn_max_msg_size=persistent_conn_max_msg_size,
            max_unanswered=max_unanswered,
            max_unanswered_bytes=max_unanswered_bytes,
            hold=hold,
        )
        client._unary._settings.fallback = _fallback
        if use_persistent_conn:
            await client._unary.open()
            if persistent_conn_max_msg_size is not None:
                # For replicas in this process or a forked one: P2P.replicate has no such argument.
                maddr = client.daemon_connector.control_maddr
                daemon_limit.remember(maddr, persistent_conn_max_msg_size)
        return client

    def close(self) -> None:  # type: ignore[override]
        """Closes the persistent connection and the idle ones.

        Unary calls fail, and running unary handlers are cancelled.

        The listener and streams stay open. Any thread may call this, even after the event loop is
        closed. In a forked child it does not affect the parent's connections.
        """
        self._closed = True
        self._unary.close()
        if os.getpid() == self._pid:
            self._reactor.call_from_anywhere(self.daemon_connector.close)
        else:
            self.daemon_connector.close()

    def __del__(self) -> None:
        if hasattr(self, "_closed"):
            self.close()

    # --- unary calls ---

    @property
    def unary_handlers(self) -> MutableMapping[str, TUnaryHandler]:
        """The unary handlers, by protocol."""
        return self._unary_handlers

    @unary_handlers.setter
    def unary_handlers(self, handlers: MutableMapping[str, TUnaryHandler]) -> None:
        self._unary_handlers = handlers
        self._unary._use_table(handlers)  # type: ignore[arg-type]

    persistent_conn_max_msg_size: int = _unary_setting(
        "max_message_size", "The size of the largest message of a unary call to send, in bytes."
    )
    max_unanswered: int | None = _unary_setting(
        "max_unanswered", "How many calls of peers may be in progress before no more are read."
    )
    max_unanswered_bytes: int | None = _unary_setting(
        "max_unanswered_bytes", "How many bytes the payloads of calls in progress may have."
    )
    hold: float | None = _unary_setting(
        "hold", "How long reading may pause because of these two, in seconds."
    )

    async def add_unary_handler(
        self, proto: str, handler: TUnaryHandler, balanced: bool = False
    ) -> None:
        """Serves peers' unary calls of a protocol; see ``UnaryClient.add_handler``."""
        await self._unary.add_handler(proto, handler, balanced=balanced)

    async def remove_unary_handler(self, proto: str) -> None:
        """Undoes ``add_unary_handler``."""
        await self._unary.remove_handler(proto)

    def call_unary_handler(self, peer_id: PeerID, proto: str, data: Buffer) -> Awaitable[bytes]:
        """Calls a peer's unary handler. Await it for the reply. See ``UnaryClient.call``."""
        # Not an async function, to avoid the cost of a second coroutine for each call.
        return self._unary.call(peer_id, proto, data)

    # --- peers ---

    async def connect(self, peer_id: PeerID, maddrs: Iterable[Multiaddr]) -> None:  # type: ignore[override]
        """Connects to a peer, at one of these addresses or one that the daemon already knows."""
        await super().connect(peer_id, maddrs)

    # --- streams ---

    async def stream_open(  # type: ignore[override]
        self, peer_id: PeerID, protocols: Sequence[str]
    ) -> tuple[StreamInfo, StreamReader, StreamWriter]:
        """Opens a stream to a peer, with the first of the protocols that the peer supports."""
        info, stream = await super().stream_open(peer_id, protocols)
        return info, *reader_and_writer(stream)

    async def stream_handler(  # type: ignore[override]
        self, proto: str, handler_cb: StreamHandler, balanced: bool = False
    ) -> None:
        """Serves inbound streams of a protocol while this client listens.

        Args:
            proto: The protocol.
            handler_cb: An async function of a ``StreamInfo``, a reader and a writer.
            balanced: Whether several clients may serve the protocol in turn.

        Raises:
            ControlFailure: This client already serves the protocol, or another client does without
                ``balanced``.
        """
        # As in hivemind: handlers are neither inspected, nor cancelled when their peer disconnects.
        await self._register(proto, handler_cb, balanced=balanced, timeout=None)  # type: ignore[arg-type]

    def _start_dispatch(self, raw: RawStream, start: Start) -> None:
        # Not in the listener's task group, which would keep the handler's task alive.
        if self._handler_tasks is None:
            raw.close(abort=True)
        else:
            self._handler_tasks.start(self._dispatch(raw), raw)

    async def _handle(self, handler: Any, info: StreamInfo, stream: Stream) -> None:
        if self._handler_tasks is not None:
            self._handler_tasks.set_stream(stream)
        await handler(info, *reader_and_writer(stream))

    @asynccontextmanager
    async def listen(self) -> AsyncIterator[Self]:  # type: ignore[override]
        """Accepts inbound streams and runs their handlers until the context is exited.

        Handlers that are still running are then cancelled. The task that exits the context need not
        be the one that entered it.
        """
        async with super().listen():
            yield self

    @asynccontextmanager
    async def _serving(self, listener: RawListener) -> AsyncIterator[None]:
        # Runs in its own task, because only the task that enters a task group may exit it.
        self._stopping = False
        self._handler_tasks = handlers = HandlerTasks()
        task = asyncio.create_task(self._serve(listener, anyio.CancelScope()))
        # hivemind's server is not a task, so asyncio does not warn of it.
        silence(task)
        closed = False
        try:
            yield
        except GeneratorExit:
            # The garbage collector or the end of the loop: no await is possible.
            closed = True
            raise
        finally:
            self._stopping = True
            self._handler_tasks = None
            with suppress(RuntimeError):  # The loop is closed.
                task.cancel()
            if closed:
                handlers.release_all()
            else:
                try:
                    await asyncio.wait([task])
                finally:
                    await handlers.stop()
                error = None if task.cancelled() else task.exception()
                if error is not None:
                    raise error

    async def _unregister_all(self) -> None:
        # After close(), the program is about to stop the daemon or the loop, so skip this.
        if not self._closed:
            await super()._unregister_all()
