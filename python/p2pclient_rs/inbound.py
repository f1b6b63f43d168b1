"""Inbound streams: each is accepted, its header read, and its handler called."""

from __future__ import annotations

import asyncio
import functools
import logging
import math
from collections.abc import Awaitable, Callable

import anyio

from p2pclient_rs._native import Multiaddr, RawListener, RawStream, StreamInfo, decode_stream_info
from p2pclient_rs.connector import DaemonConnector
from p2pclient_rs.exceptions import DispatchFailure
from p2pclient_rs.handlers import DEFAULT_LINGER, HandlerOptions, Lingering, StreamHandler, logger
from p2pclient_rs.listening import ListenerStats, Refusals, Start
from p2pclient_rs.loops import UnlessClosed, current_loop, watch
from p2pclient_rs.streams import Stream

__all__ = ["InboundStreams"]

#: The StreamInfo before an inbound stream is small, and comes at once.
_MAX_HEADER = 64 * 1024
_HEADER_TIMEOUT = 30.0
#: So many inbound streams may be without theirs; when there are more, the oldest ones go that were
#: given this long to send it, in seconds.
_MAX_HALF_OPEN = 256
_HALF_OPEN_PATIENCE = 1.0


class InboundStreams:
    """Gives inbound streams to their handlers: the base of ``ControlClient``.

    Attributes:
        daemon_connector: Says which types handlers get.
        listen_maddr: The address that the daemon connects to.
        handlers: The handlers of inbound streams, by protocol.
    """

    #: Receives the log lines about inbound streams.
    logger: logging.Logger = logger
    #: Whether tasks that the client started itself are being cancelled.
    _stopping = False

    daemon_connector: DaemonConnector
    listen_maddr: Multiaddr
    handlers: dict[str, StreamHandler]

    def __init__(self) -> None:
        self.handlers = {}
        #: The options of handlers that were registered, by protocol.
        self._options: dict[str, HandlerOptions] = {}
        self._lingering: Lingering | None = None
        #: What waits for the header of an inbound stream, the oldest first, and since when.
        self._half_open: dict[anyio.CancelScope, float] = {}
        self._refusals = Refusals()

    @property
    def stats(self) -> ListenerStats:
        """The numbers of accepted and refused inbound streams since this client was made."""
        return self._refusals.stats()

    def _accept_one(self, listener: RawListener, start: Start) -> float | None:
        """Accepts at most one inbound stream; see ``listening.Acceptor``."""
        # jsp2pd has one for each handler, from its registration on.
        if len(self._half_open) > _MAX_HALF_OPEN + len(self.handlers):
            oldest, since = next(iter(self._half_open.items()))
            if (wait := since + _HALF_OPEN_PATIENCE - anyio.current_time()) > 0:
                return min(wait, 0.02)
            oldest.cancel()
            return 0.0
        try:
            raw = listener.try_accept()
        except OSError as error:
            # Out of descriptors, most likely: others will be closed. Streams wait until then.
            words = "cannot accept a stream at %s: %s"
            self._refusals.log(
                "accept_errors", self.logger, logging.ERROR, words, self.listen_maddr, error
            )
            return 0.1
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
            # The garbage collector ends the task, and closes the stream in the loop's thread.
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
            if not (self._stopping or _is_asked_for()):
                self.logger.warning(
                    "the handler of %r was cancelled on a stream from %s, and by nobody",
                    info.proto,
                    info.peer_id,
                    exc_info=True,
                )

    def _refused(self, error: Exception) -> None:
        kind = "no_handler" if isinstance(error, _NoHandler) else "bad_header"
        words = str(error) or type(error).__name__
        self._refusals.log(
            kind, self.logger, logging.WARNING, "refused an inbound stream: %s", words
        )

    async def _header(self, stream: Stream) -> bytes:
        with UnlessClosed(anyio.CancelScope()) as scope:
            self._half_open[scope] = anyio.current_time()
            try:
                # The JavaScript daemon connects when a handler is registered, and says nothing
                # until there is a stream.
                await stream._watch.readable()
                scope.deadline = anyio.current_time() + _HEADER_TIMEOUT
                return await stream.receive_frame(_MAX_HEADER)
            finally:
                del self._half_open[scope]
        raise DispatchFailure("the daemon does not say what it is")

    async def _handle(
        self, handler: Callable[..., Awaitable[object]], info: StreamInfo, stream: Stream
    ) -> None:
        registration = self._options.get(info.proto)
        if registration is None or registration.handler is not handler:
            # It was put into ``handlers`` directly.
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
    """No handler is there for the protocol of an inbound stream."""


def _is_stray(error: BaseException) -> bool:
    """Whether this is a cancellation of asyncio's that no scope asked for, as one that comes from
    awaiting a cancelled task. A task group would take it for its own, and end."""
    return (
        isinstance(error, asyncio.CancelledError)
        and anyio.current_effective_deadline() != -math.inf
    )


def _is_asked_for() -> bool:
    """Whether somebody has cancelled this task, as the end of the event loop does."""
    if not isinstance(current_loop(), asyncio.AbstractEventLoop):
        return False
    # Python 3.10 does not tell.
    return bool(getattr(asyncio.current_task(), "cancelling", int)())
