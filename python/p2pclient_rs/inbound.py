"""Inbound streams: accepting each, reading its header, and calling its handler."""

from __future__ import annotations

import asyncio
import functools
import logging
import math
from collections.abc import Awaitable, Callable

import anyio

from p2pclient_rs._native import (
    ACCEPT_PAUSE,
    HALF_OPEN_PATIENCE,
    HEADER_TIMEOUT,
    MAX_HALF_OPEN,
    MAX_HEADER,
    HalfOpen,
    Multiaddr,
    RawListener,
    RawStream,
    StreamInfo,
    decode_stream_info,
)
from p2pclient_rs.connector import DaemonConnector
from p2pclient_rs.exceptions import DispatchFailure
from p2pclient_rs.handlers import DEFAULT_LINGER, HandlerOptions, Lingering, StreamHandler, logger
from p2pclient_rs.listening import ListenerStats, Refusals, Start
from p2pclient_rs.loops import UnlessClosed, current_loop
from p2pclient_rs.readiness import watch
from p2pclient_rs.stream import Stream

__all__ = ["InboundStreams"]


#: The interval between checks for room while too many connections have no header, in seconds.
_ROOM_CHECK_INTERVAL = 0.02


class InboundStreams:
    """Dispatches inbound streams to their handlers: the base class of ``ControlClient``.

    Attributes:
        daemon_connector: Converts the stream's description for handlers.
        listen_maddr: The address that the daemon connects to.
        handlers: The handlers of inbound streams, by protocol.
    """

    #: Receives the log lines about inbound streams.
    logger: logging.Logger = logger
    #: Whether the client is cancelling its tasks.
    _stopping = False

    daemon_connector: DaemonConnector
    listen_maddr: Multiaddr
    handlers: dict[str, StreamHandler]

    def __init__(self) -> None:
        self.handlers = {}
        #: The options of the registered handlers, by protocol.
        self._options: dict[str, HandlerOptions] = {}
        self._lingering: Lingering | None = None
        self._half_open = HalfOpen(MAX_HALF_OPEN, HALF_OPEN_PATIENCE)
        #: The scopes in which headers are read, by the connection's number in ``_half_open``.
        self._headers: dict[int, anyio.CancelScope] = {}
        self._refusals = Refusals()

    @property
    def stats(self) -> ListenerStats:
        """The numbers of accepted and refused inbound streams since the client was created."""
        return self._refusals.stats()

    def _accept_one(self, listener: RawListener, start: Start) -> float | None:
        """Accepts at most one inbound stream; see ``listening.Acceptor``."""
        admission = self._half_open.admission(len(self.handlers), anyio.current_time())
        if admission is not None:
            if isinstance(admission, float):
                return min(admission, _ROOM_CHECK_INTERVAL)
            self._headers[admission].cancel()
            return 0.0
        try:
            raw = listener.try_accept()
        except OSError as error:
            # Most likely out of descriptors. Streams wait in the socket until some are closed.
            message = "cannot accept a stream at %s: %s"
            self._refusals.log(
                "accept_errors", self.logger, logging.ERROR, message, self.listen_maddr, error
            )
            return ACCEPT_PAUSE
        if raw is None:
            return None
        self._refusals.count("accepted")
        self._start_dispatch(raw, start)
        return 0.0

    def _start_dispatch(self, raw: RawStream, start: Start) -> None:
        """Starts the task of an inbound stream."""
        start(self._dispatch, raw)

    async def _dispatch(self, raw: RawStream) -> None:
        stream = Stream(raw, watch(raw.fileno()))
        handler = None
        try:
            header = await self._header(stream)
            info = self.daemon_connector.types.stream_info(decode_stream_info(header))
            stream.info = info
            handler = self.handlers.get(info.proto)
            if handler is None:
                raise _NoHandler(f"no handler for the protocol {info.proto!r}")
        except Exception as error:
            self._refused(error)
            stream.abort()
            return
        except BaseException as error:
            stream.abort()
            if _is_stray(error):
                return
            raise
        try:
            await self._handle(handler, info, stream)
        except GeneratorExit:
            # Raised by the garbage collector, which also closes the stream, in the loop's thread.
            raise
        except Exception:
            self.logger.exception(
                "the handler of %r failed on a stream from %s", info.proto, info.peer_id
            )
            stream.abort()
        except BaseException as error:
            stream.abort()
            if not _is_stray(error):
                raise
            if not (self._stopping or _is_cancelled()):
                self.logger.warning(
                    "the handler of %r on a stream from %s was cancelled, but not by its client",
                    info.proto,
                    info.peer_id,
                    exc_info=True,
                )

    def _refused(self, error: Exception) -> None:
        kind = "no_handler" if isinstance(error, _NoHandler) else "bad_header"
        reason = str(error) or type(error).__name__
        self._refusals.log(
            kind, self.logger, logging.WARNING, "refused an inbound stream: %s", reason
        )

    async def _header(self, stream: Stream) -> bytes:
        with UnlessClosed(anyio.CancelScope()) as scope:
            number = self._half_open.enter(anyio.current_time())
            self._headers[number] = scope
            try:
                # jsp2pd connects once a handler is registered, and writes when a stream arrives.
                await stream._watch.readable()
                scope.deadline = anyio.current_time() + HEADER_TIMEOUT
                return await stream.receive_frame(MAX_HEADER)
            finally:
                self._half_open.leave(number)
                del self._headers[number]
        raise DispatchFailure("the daemon has sent no header in time")

    async def _handle(
        self, handler: Callable[..., Awaitable[object]], info: StreamInfo, stream: Stream
    ) -> None:
        registration = self._options.get(info.proto)
        if registration is None or registration.handler is not handler:
            # The program itself has set this item of ``handlers``.
            registration = HandlerOptions.of(handler, DEFAULT_LINGER)
        if registration.linger is None or self._lingering is None:
            await (handler(info, stream) if registration.takes_info else handler(stream))
            return
        await self._lingering.run(
            functools.partial(handler, *((info, stream) if registration.takes_info else (stream,))),
            stream,
            info,
            registration.linger,
        )


class _NoHandler(DispatchFailure):
    """There is no handler for the protocol of an inbound stream."""


def _is_stray(error: BaseException) -> bool:
    """Returns whether an asyncio cancellation does not come from an anyio scope.

    For example, it may come from awaiting a cancelled task. A task group would take it for its own
    cancellation and end.
    """
    return (
        isinstance(error, asyncio.CancelledError)
        and anyio.current_effective_deadline() != -math.inf
    )


def _is_cancelled() -> bool:
    """Returns whether this task was cancelled, for example by the end of the event loop."""
    if not isinstance(current_loop(), asyncio.AbstractEventLoop):
        return False
    # Python 3.10 has no `cancelling`.
    return bool(getattr(asyncio.current_task(), "cancelling", int)())
