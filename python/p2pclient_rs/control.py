"""Control requests: peers, connections and streams, and the listener for inbound streams."""

from __future__ import annotations

import asyncio
import functools
import logging
import math
import os
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import anyio
from anyio.abc import TaskGroup
from anyio.lowlevel import checkpoint

from p2pclient_rs._native import Multiaddr, RawListener, RawStream, Request, decode_stream_info
from p2pclient_rs.connector import (
    UNKNOWN_REQUEST,
    DaemonConnector,
    MultiaddrLike,
    PeerIDLike,
    resolve,
)
from p2pclient_rs.exceptions import (
    ConnectionLost,
    ControlFailure,
    DaemonRefused,
    DispatchFailure,
    NotSupported,
)
from p2pclient_rs.handlers import DEFAULT_LINGER, Lingering, Registration, StreamHandler
from p2pclient_rs.loops import Watch, current_loop, watch
from p2pclient_rs.opened import OpenedStream
from p2pclient_rs.streams import Stream

__all__ = ["DEFAULT_LISTEN_MADDR", "ControlClient", "StreamHandler"]

DEFAULT_LISTEN_MADDR = "/unix/tmp/p2pclient.sock"

#: The StreamInfo before an inbound stream is small, and comes at once.
_MAX_HEADER = 64 * 1024
_HEADER_TIMEOUT = 30.0
#: So many inbound streams may be without theirs; when there are more, the oldest ones go that were
#: given this long to send it, in seconds.
_MAX_HALF_OPEN = 256
_HALF_OPEN_PATIENCE = 1.0
#: How long saying goodbye to the daemon may take, in seconds.
_GOODBYE_TIMEOUT = 1.0

logger = logging.getLogger(__name__)


_IDENTIFY = Request.identify()


class ControlClient:
    """Peers, connections and streams.

    Every ``timeout`` is in seconds; CONNECT and STREAM_OPEN pass it on to the daemon, in whole
    seconds, which otherwise gives up after 60 s. All raise subclasses of ``ControlFailure``.

    Args:
        daemon_connector: The way to the daemon.
        listen_maddr: Where the daemon is to connect to for inbound streams;
            ``/unix/tmp/p2pclient.sock`` if none. With TCP port 0 a free one is taken, and the
            attribute says which while listening.
    """

    #: Whether a handler takes the place of another one of this client.
    _replaces_handlers = True
    #: Whether handlers are cancelled that outlive their peers.
    _lingers = True
    #: Whether tasks that the client started itself are being cancelled.
    _stopping = False

    def __init__(
        self, daemon_connector: DaemonConnector, listen_maddr: MultiaddrLike | None = None
    ) -> None:
        if listen_maddr is None:
            listen_maddr = DEFAULT_LISTEN_MADDR
        self.daemon_connector = daemon_connector
        self.listen_maddr: Any = daemon_connector.types.multiaddr(Multiaddr(listen_maddr))
        #: The handlers of inbound streams, by protocol.
        self.handlers: dict[str, StreamHandler] = {}
        #: Those registered as balanced.
        self._balanced: set[str] = set()
        #: The options of handlers that were registered, by protocol.
        self._registrations: dict[str, Registration] = {}
        self._lingering: Lingering | None = None
        self._scope: anyio.CancelScope | None = None
        #: What waits for the header of an inbound stream, the oldest first, and since when.
        self._half_open: dict[anyio.CancelScope, float] = {}
        self._pid = os.getpid()
        self._listening = False
        #: Whether the last attempt to accept a stream did not fail: one line a time will do.
        self._accepting = True

    # --- peers ---

    async def identify(self, *, timeout: float | None = None) -> Any:
        """IDENTIFY: the daemon's ``Identity``, which unpacks as ``(peer_id, addrs)``."""
        connector = self.daemon_connector
        identity = await connector.request("IDENTIFY", _IDENTIFY, timeout=timeout)
        return connector.types.identity(identity)

    async def connect(
        self,
        peer_id: PeerIDLike,
        maddrs: Iterable[MultiaddrLike],
        *,
        timeout: float | None = None,
    ) -> None:
        """CONNECT: connects to a peer at any of its addresses.

        Raises:
            DaemonRefused: It cannot be reached there, or is another peer.
        """
        await self.daemon_connector.request(
            "CONNECT", Request.connect(peer_id, maddrs, timeout), timeout=timeout, peer_id=peer_id
        )

    async def disconnect(self, peer_id: PeerIDLike, *, timeout: float | None = None) -> None:
        """DISCONNECT: closes every connection to a peer; there need be none."""
        await self.daemon_connector.request(
            "DISCONNECT", Request.disconnect(peer_id), timeout=timeout, peer_id=peer_id
        )

    async def list_peers(self, *, timeout: float | None = None) -> tuple[Any, ...]:
        """LIST_PEERS: a ``PeerInfo`` for each connection; a peer can have several."""
        infos = await self.daemon_connector.request(
            "LIST_PEERS", Request.list_peers(), timeout=timeout
        )
        return tuple(map(self.daemon_connector.types.peer_info, infos))

    # --- streams ---

    async def stream_open(
        self, peer_id: PeerIDLike, protocols: Sequence[str], *, timeout: float | None = None
    ) -> OpenedStream[Any]:
        """STREAM_OPEN: opens a stream to a peer.

        Args:
            peer_id: The peer.
            protocols: Protocol ids, the one liked best first.

        Returns:
            The stream. It also unpacks as ``(info, stream)``; its ``info`` is a ``StreamInfo`` with
            the protocol agreed on.

        Raises:
            DaemonRefused: The peer cannot be reached or speaks none of the protocols.
        """
        if isinstance(protocols, str):
            raise TypeError("protocols is a sequence of protocol ids, not a string")
        opened = await self.daemon_connector.request_stream(
            Stream,
            "STREAM_OPEN",
            Request.stream_open(peer_id, list(protocols), timeout),
            timeout=timeout,
            peer_id=peer_id,
            protocol=", ".join(protocols),
        )
        # As ``OpenedStream(*opened)``, at less cost.
        return tuple.__new__(OpenedStream, opened)

    async def stream_handler(
        self,
        proto: str,
        handler_cb: StreamHandler,
        *,
        balanced: bool = False,
        linger: float | None = DEFAULT_LINGER,
        timeout: float | None = None,
    ) -> None:
        """STREAM_HANDLER: has inbound streams of a protocol handled while this client listens.

        A handler registered before for the protocol, by this client, is replaced.

        Args:
            proto: The protocol id.
            handler_cb: An async function of a ``StreamInfo`` and a ``Stream``, or of a ``Stream``
                alone, whose ``info`` is the same. One that accepts both is called with two
                arguments. An exception is logged and resets that stream alone. When it returns,
                the stream stays open as long as something holds it.
            balanced: Whether several clients may serve the protocol in turn (hivemind's fork).
            linger: How long a handler may go on without reading from or writing to its stream once
                the peer has closed it in both directions, in seconds; None for no limit. After
                that the handler is cancelled, which is logged, and its stream aborted.

        Raises:
            DaemonRefused: Another client serves the protocol (hivemind's fork).
            TypeError: The handler cannot be called with one or two arguments.
            ValueError: ``linger`` is negative or not a number.
        """
        registration = Registration.of(handler_cb, linger)
        before = self._registrations.get(proto)
        # In place before a stream can come.
        self._registrations[proto] = registration
        try:
            await self._register(proto, handler_cb, balanced=balanced, timeout=timeout)
        except BaseException:
            self._registrations.pop(proto, None)
            if before is not None:
                self._registrations[proto] = before
            raise

    async def _register(
        self, proto: str, handler_cb: StreamHandler, *, balanced: bool, timeout: float | None
    ) -> None:
        request = Request.stream_handler(self.listen_maddr, proto, balanced)
        before, was_balanced = self.handlers.get(proto), proto in self._balanced
        self._note_balanced(proto, balanced)
        # In place before the daemon has it: a stream can come sooner than the daemon's answer.
        self.handlers[proto] = handler_cb
        try:
            await self.daemon_connector.request(
                "STREAM_HANDLER", request, timeout=timeout, protocol=proto
            )
        except BaseException as error:
            # hivemind's fork refuses what upstream takes for a replacement. The daemon connects
            # to this client already, so nothing but the handler is to be replaced.
            if before is not None and isinstance(error, DaemonRefused) and self._replaces_handlers:
                return
            if before is None:
                self.handlers.pop(proto, None)
            else:
                self.handlers[proto] = before
                self._note_balanced(proto, was_balanced)
            raise

    def _note_balanced(self, proto: str, balanced: bool) -> None:
        (self._balanced.add if balanced else self._balanced.discard)(proto)

    async def register_again(self, *, timeout: float | None = None) -> None:
        """Tells a daemon that was started anew of the handlers that this client has, if it listens:
        a closed one would take them from others."""
        if not self._listening:
            return
        for proto in list(self.handlers):
            request = Request.stream_handler(self.listen_maddr, proto, proto in self._balanced)
            try:
                await self.daemon_connector.request(
                    "STREAM_HANDLER", request, timeout=timeout, protocol=proto
                )
            except DaemonRefused as error:
                # Another client was quicker: no reason to do without the rest.
                logger.error("the daemon has not taken a handler again: %s", error)

    async def remove_stream_handler(self, proto: str, *, timeout: float | None = None) -> None:
        """REMOVE_STREAM_HANDLER: takes back ``stream_handler``.

        Raises:
            NotSupported: The daemon is not hivemind's: it goes on offering the protocol to its
                peers, but their streams are refused here.
            DaemonRefused: There is no such handler.
        """
        self.handlers.pop(proto, None)
        self._registrations.pop(proto, None)
        await self._unregister(proto, timeout)

    async def _unregister(self, proto: str, timeout: float | None) -> None:
        request = Request.remove_stream_handler(self.listen_maddr, proto)
        try:
            await self.daemon_connector.request(
                "REMOVE_STREAM_HANDLER", request, timeout=timeout, protocol=proto
            )
        except ConnectionLost as error:
            if not await self.daemon_connector.is_unknown_request(error):
                raise
            raise self.daemon_connector.describe(
                NotSupported(UNKNOWN_REQUEST), "REMOVE_STREAM_HANDLER", protocol=proto
            ) from error

    # --- inbound streams ---

    @asynccontextmanager
    async def listen(self) -> AsyncIterator[ControlClient]:
        """Accepts inbound streams, and has them handled, until the context is left.

        Then handlers still at work are cancelled, and their protocols taken back where the daemon
        knows how.

        Raises:
            ControlFailure: This client listens already.
            OSError: The address cannot be listened at.
        """
        if self._listening:
            raise ControlFailure("Listener is already listening")
        self._listening = True
        configured = self.listen_maddr
        try:
            listener, self.listen_maddr = await self._bind(Multiaddr(configured))
            async with self._serving(listener):
                try:
                    yield self
                finally:
                    await self._unregister_all()
        finally:
            self._scope = None
            self._listening = False
            self.listen_maddr = configured

    async def close(self) -> None:
        """Stops listening, cancels the handlers at work and closes the idle connections."""
        # In a forked child the tasks are the parent's, whose epoll cancelling them would touch.
        if self._scope is not None and os.getpid() == self._pid:
            self._scope.cancel()
        await self.daemon_connector.aclose()

    async def _bind(self, maddr: Multiaddr) -> tuple[RawListener, Any]:
        for attempt, address in enumerate(addresses := await resolve(maddr), 1):
            try:
                listener = RawListener(address)
            except OSError as error:
                if attempt < len(addresses):
                    continue
                raise OSError(error.errno, f"cannot listen at {maddr}: {error.strerror}") from None
            if isinstance(address, str):
                return listener, self.listen_maddr
            host, port = listener.local_address
            actual = Multiaddr(f"/{'ip6' if ':' in host else 'ip4'}/{host}/tcp/{port}")
            return listener, self.daemon_connector.types.multiaddr(actual)
        raise OSError(f"no address to listen at: {maddr}")

    @asynccontextmanager
    async def _serving(self, listener: RawListener) -> AsyncIterator[None]:
        """Serves the listener until the context is left."""
        self._scope = anyio.CancelScope()
        async with _ungrouped_task_group() as tasks:
            tasks.start_soon(self._serve, listener, self._scope)
            try:
                yield
            finally:
                tasks.cancel_scope.cancel()

    async def _serve(self, listener: RawListener, scope: anyio.CancelScope) -> None:
        watched = watch(listener.fileno())
        try:
            with scope:
                async with anyio.create_task_group() as tasks:
                    if self._lingers:
                        self._lingering = Lingering()
                        tasks.start_soon(self._lingering.poll)
                    while True:
                        await self._accept(listener, watched, tasks)
        finally:
            self._lingering = None
            watched.close()
            listener.close()

    async def _accept(self, listener: RawListener, watched: Watch, tasks: TaskGroup) -> None:
        # jsp2pd has one for each handler, from its registration on.
        if len(self._half_open) > _MAX_HALF_OPEN + len(self.handlers):
            oldest, since = next(iter(self._half_open.items()))
            if (wait := since + _HALF_OPEN_PATIENCE - anyio.current_time()) > 0:
                await anyio.sleep(min(wait, 0.02))
            else:
                oldest.cancel()
                await checkpoint()
            return
        try:
            raw = listener.try_accept()
        except OSError as error:
            # Out of descriptors, most likely: others will be closed. Streams wait until then.
            if self._accepting:
                logger.error("cannot accept a stream at %s: %s", self.listen_maddr, error)
            self._accepting = False
            await anyio.sleep(0.1)
            return
        self._accepting = True
        if raw is None:
            await watched.readable()
        else:
            self._start(raw, tasks)
            await checkpoint()

    def _start(self, raw: RawStream, tasks: TaskGroup) -> None:
        """Starts the task of an inbound stream."""
        tasks.start_soon(self._dispatch, raw)

    async def _dispatch(self, raw: RawStream) -> None:
        stream = Stream(raw, watch(raw.fileno()))
        handler = None
        try:
            header = await self._header(stream)
            info = self.daemon_connector.types.stream_info(decode_stream_info(header))
            stream.info = info
            handler = self.handlers.get(info.proto)
            if handler is None:
                raise DispatchFailure(f"no handler for the protocol {info.proto!r}")
        except Exception as error:
            logger.warning("refused an inbound stream: %s", str(error) or type(error).__name__)
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
            logger.exception(
                "the handler of %r failed on a stream from %s", info.proto, info.peer_id
            )
            stream.abort()
        except BaseException as error:
            stream.abort()
            if not _is_stray(error):
                raise
            if not (self._stopping or _is_asked_for()):
                logger.warning(
                    "the handler of %r was cancelled on a stream from %s, and by nobody",
                    info.proto,
                    info.peer_id,
                    exc_info=True,
                )

    async def _header(self, stream: Stream) -> bytes:
        with anyio.CancelScope() as scope:
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

    async def _handle(self, handler: Any, info: Any, stream: Stream) -> None:
        registration = self._registrations.get(info.proto)
        if registration is None or registration.handler is not handler:
            # It was put into ``handlers`` directly.
            registration = Registration.of(handler, DEFAULT_LINGER)
        if registration.linger is None or self._lingering is None:
            await (handler(info, stream) if registration.takes_info else handler(stream))
            return
        await self._lingering.run(
            functools.partial(handler, *((info, stream) if registration.takes_info else (stream,))),
            stream,
            info,
            registration.linger,
        )

    async def _unregister_all(self) -> None:
        """Tells the daemon that nobody will be there; its answer does not matter."""
        with anyio.move_on_after(_GOODBYE_TIMEOUT, shield=True):
            for proto in list(self.handlers):
                try:
                    await self._unregister(proto, None)
                except DaemonRefused as error:
                    if isinstance(error, NotSupported):
                        # The daemon goes on offering the protocol: for the next listen() to serve.
                        break
                except ControlFailure:
                    break
                self.handlers.pop(proto, None)
                self._registrations.pop(proto, None)


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


@asynccontextmanager
async def _ungrouped_task_group() -> AsyncIterator[TaskGroup]:
    """A task group whose tasks do not fail: what its body raises comes out as it is."""
    failure = None
    async with anyio.create_task_group() as tasks:
        try:
            yield tasks
        except Exception as error:
            failure = error
            tasks.cancel_scope.cancel()
    if failure is not None:
        raise failure
