"""Control requests: peers, connections, streams, and listening for inbound streams."""

from __future__ import annotations

import errno
import os
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING

import anyio
from anyio.abc import TaskGroup

from p2pclient_rs._native import (
    Identity,
    Multiaddr,
    PeerInfo,
    RawListener,
    Request,
    StreamInfo,
    endpoint,
)
from p2pclient_rs.connector import DaemonConnector, MultiaddrLike, PeerIDLike
from p2pclient_rs.dial import resolve
from p2pclient_rs.exceptions import (
    ControlFailure,
    DaemonRefused,
    NotSupported,
    already_registered,
)
from p2pclient_rs.handlers import DEFAULT_LINGER, HandlerOptions, Lingering, StreamHandler
from p2pclient_rs.inbound import InboundStreams
from p2pclient_rs.listening import (
    BackgroundListener,
    ListenerStats,
    Listening,
    PrivateSocket,
    check_same_machine,
    pause,
)
from p2pclient_rs.loops import UnlessClosed, UnlessClosedAsync
from p2pclient_rs.opened_stream import OpenedStream
from p2pclient_rs.readiness import watch
from p2pclient_rs.registration import Registrations
from p2pclient_rs.stream import Stream

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["DEFAULT_LISTEN_MADDR", "ControlClient", "ListenerStats", "StreamHandler"]

DEFAULT_LISTEN_MADDR = "/unix/tmp/p2pclient.sock"

#: How long removing all handlers from the daemon may take when listening ends, in seconds.
_GOODBYE_TIMEOUT = 1.0

_IDENTIFY = Request.identify()


class ControlClient(InboundStreams):
    """Peers, connections and streams.

    Every ``timeout`` is in seconds. CONNECT and STREAM_OPEN pass it on to the daemon, in whole
    seconds; without one the daemon gives up after 60 s. All requests raise subclasses of
    ``ControlFailure``.

    Args:
        daemon_connector: The connections to the daemon.
        listen_maddr: The address at which the client listens for inbound streams. The default is a
            unix socket in a new directory that only this user can read. A daemon that runs as
            another user or on another machine needs an address that it can reach. With TCP port 0
            the client chooses a free port; while it listens, the attribute shows the port.

    Example:
        async with client.control.listen():
            await client.control.stream_handler("/echo/1", echo)
            print(client.control.listen_maddr, client.control.stats)
    """

    #: Whether registering a handler replaces this client's former one.
    _replaces_handlers = True
    #: Whether handlers are cancelled if they outlive their peers by more than their linger.
    _lingers = True

    def __init__(
        self, daemon_connector: DaemonConnector, listen_maddr: MultiaddrLike | None = None
    ) -> None:
        super().__init__()
        self.daemon_connector = daemon_connector
        #: The requested listen address, and the one in use if it differs.
        self._wanted_maddr: Multiaddr | None = None
        self._bound_maddr: Multiaddr | None = None
        self._private: PrivateSocket | None = None
        self.listen_maddr = listen_maddr
        #: The protocols registered as balanced.
        self._balanced: set[str] = set()
        self._registrations = Registrations()
        self._scope: anyio.CancelScope | None = None
        self._pid = os.getpid()
        self._listening = False
        self._listener: RawListener | None = None
        self._background: BackgroundListener | None = None
        self._task_group: TaskGroup | None = None

    @property
    def listen_maddr(self) -> Multiaddr:
        """The address at which the client listens for inbound streams, or will listen.

        Setting it while the client listens affects only handlers that are registered later; the
        listener keeps its address.

        Raises:
            InvalidMultiaddr: The new value is not a multiaddr (a ValueError).
            ControlFailure: No address was given, and a daemon that may be on another machine
                could not reach the default one.
        """
        if self._bound_maddr is not None:
            return self._bound_maddr
        if self._wanted_maddr is not None:
            return self._wanted_maddr
        check_same_machine(Multiaddr(self.daemon_connector.control_maddr))
        self.daemon_connector.check_fork()
        if self._private is None:
            self._private = PrivateSocket()
        return self._show(Multiaddr(f"/unix{self._private.path}"))

    @listen_maddr.setter
    def listen_maddr(self, listen_maddr: MultiaddrLike | None) -> None:
        self._wanted_maddr = None if listen_maddr is None else self._parse(listen_maddr)
        self._bound_maddr = None

    def _parse(self, listen_maddr: MultiaddrLike) -> Multiaddr:
        """Returns a listen address as ``listen_maddr`` returns it."""
        return self._show(Multiaddr(listen_maddr))

    def _show(self, maddr: Multiaddr) -> Multiaddr:
        return self.daemon_connector.types.multiaddr(maddr)

    # --- peers ---

    async def identify(self, *, timeout: float | None = None) -> Identity:
        """IDENTIFY: returns the daemon's peer id and addresses.

        Raises:
            DaemonUnreachable: There is no daemon at the control address.

        Example:
            peer_id, addrs = await client.control.identify()
        """
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
        """CONNECT: connects to a peer.

        Args:
            peer_id: The peer.
            maddrs: Its addresses. One that works is enough.
            timeout: In seconds.

        Raises:
            DaemonRefused: The peer cannot be reached, or another peer answers there.

        Example:
            await client.control.connect(peer_id, addrs, timeout=10)
        """
        await self.daemon_connector.request(
            "CONNECT", Request.connect(peer_id, maddrs, timeout), timeout=timeout, peer_id=peer_id
        )

    async def disconnect(self, peer_id: PeerIDLike, *, timeout: float | None = None) -> None:
        """DISCONNECT: closes all connections to a peer. Does nothing if there are none.

        Raises:
            NotSupported: The daemon is the JavaScript one.
        """
        await self.daemon_connector.request(
            "DISCONNECT", Request.disconnect(peer_id), timeout=timeout, peer_id=peer_id
        )

    async def list_peers(self, *, timeout: float | None = None) -> tuple[PeerInfo, ...]:
        """LIST_PEERS: returns the connected peers, one entry for each connection.

        Example:
            for info in await client.control.list_peers():
                print(info.peer_id, info.addrs)
        """
        infos = await self.daemon_connector.request(
            "LIST_PEERS", Request.list_peers(), timeout=timeout
        )
        return tuple(map(self.daemon_connector.types.peer_info, infos))

    # --- streams ---

    async def stream_open(
        self, peer_id: PeerIDLike, protocols: Sequence[str], *, timeout: float | None = None
    ) -> OpenedStream[StreamInfo]:
        """STREAM_OPEN: opens a stream to a peer.

        Args:
            peer_id: The peer.
            protocols: Protocol ids, the preferred one first.
            timeout: In seconds.

        Returns:
            The stream. It also unpacks as ``(info, stream)``; ``info`` has the protocol that was
            agreed on.

        Raises:
            DaemonRefused: The peer cannot be reached or supports none of the protocols.

        Example:
            info, stream = await client.control.stream_open(peer_id, ["/echo/2", "/echo/1"])
            print(info.proto)
            await stream.aclose()
        """
        if isinstance(protocols, str):
            raise TypeError("protocols is a sequence of protocol ids, not a string")
        info, stream = await self.daemon_connector.request_stream(
            Stream,
            "STREAM_OPEN",
            Request.stream_open(peer_id, list(protocols), timeout),
            timeout=timeout,
            peer_id=peer_id,
            protocol=", ".join(protocols),
        )
        try:
            stream.info = info = self.daemon_connector.types.stream_info(info)
        except BaseException:
            stream.abort()
            raise
        # Same as ``OpenedStream(info, stream)``, but faster.
        return tuple.__new__(OpenedStream, (info, stream))

    async def stream_handler(
        self,
        proto: str,
        handler_cb: StreamHandler,
        *,
        balanced: bool = False,
        replace: bool = True,
        linger: float | None = DEFAULT_LINGER,
        timeout: float | None = None,
    ) -> None:
        """STREAM_HANDLER: registers a handler for the inbound streams of a protocol.

        The handler is called while the client listens.

        Args:
            proto: The protocol id.
            handler_cb: An async function of a ``StreamInfo`` and a ``Stream``, or of a ``Stream``
                alone, whose ``info`` is the same. A function that accepts one or two arguments is
                called with two. An exception in it is logged, and resets only its own stream. After
                it returns, the stream stays open as long as the program holds it.
            balanced: Whether several clients may register the protocol, and serve its streams in
                turn (hivemind's daemon).
            replace: Whether to replace this client's previous handler for the protocol. If that
                fails, the previous handler stays.
            linger: How long a handler may leave its stream unused after the peer has closed it in
                both directions, in seconds; None for no limit. After that, the handler is
                cancelled, its stream is aborted, and this is logged. If the handler left input
                unread, the time counts from its last use of the stream.
            timeout: In seconds.

        Raises:
            AlreadyRegistered: This client serves the protocol, and ``replace`` is false; or
                another client serves it (hivemind's daemon). The latter is also a DaemonRefused.
            TypeError: The handler cannot be called with one or two arguments.
            ValueError: ``linger`` is negative or not a number.

        Example:
            async def reverse(stream: Stream) -> None:
                async with stream:
                    await stream.send((await stream.read())[::-1])

            await client.control.stream_handler("/reverse/1", reverse, linger=60)
        """
        registration = HandlerOptions.of(handler_cb, linger)
        before = self._options.get(proto)
        # Before the request, since the daemon may open a stream at once.
        self._options[proto] = registration
        try:
            await self._register(
                proto, handler_cb, balanced=balanced, replace=replace, timeout=timeout
            )
        except BaseException:
            self._options.pop(proto, None)
            if before is not None:
                self._options[proto] = before
            raise

    async def _register(
        self,
        proto: str,
        handler_cb: StreamHandler,
        *,
        balanced: bool,
        replace: bool = True,
        timeout: float | None,
    ) -> None:
        work = self._add(proto, handler_cb, balanced, replace)
        await self.daemon_connector.described(work, "STREAM_HANDLER", timeout, protocol=proto)

    async def _add(
        self, proto: str, handler_cb: StreamHandler, balanced: bool, replace: bool
    ) -> None:
        async with self._registrations.changing(proto):
            if not replace and proto in self.handlers:
                raise already_registered(proto, "remove it first, or pass replace=True")
            before, was_balanced = self.handlers.get(proto), proto in self._balanced
            self._note_balanced(proto, balanced)
            # Before the request, since a stream can arrive before the daemon's reply.
            self.handlers[proto] = handler_cb
            try:
                await self._register_at_daemon(proto, balanced)
            except BaseException:
                if before is None:
                    self.handlers.pop(proto, None)
                else:
                    self.handlers[proto] = before
                self._note_balanced(proto, was_balanced)
                raise

    async def _register_at_daemon(self, proto: str, balanced: bool) -> None:
        """Registers a protocol at the daemon, unless the daemon already has the registration.

        Raises:
            ControlFailure: The port of the listen address is not known yet.
            AlreadyRegistered: Another client serves the protocol.
        """
        maddr = Multiaddr(self.listen_maddr)
        kind, _, port = endpoint(maddr)
        if kind != "unix" and port == 0 and not self._listening:
            raise ControlFailure(
                f"{maddr} has no port yet: register handlers after listen(), which chooses one"
            )
        await self._registrations.register(self, proto, balanced)

    def _note_balanced(self, proto: str, balanced: bool) -> None:
        (self._balanced.add if balanced else self._balanced.discard)(proto)

    async def register_again(self, *, timeout: float | None = None) -> None:
        """Registers this client's stream handlers again, at a restarted daemon.

        Does nothing unless the client listens: otherwise it would take protocols from clients
        that do.

        Args:
            timeout: For each handler, in seconds.

        Raises:
            DaemonRefused: Another client has taken a protocol. All others are registered.
        """
        if not self._listening:
            return
        refused: DaemonRefused | None = None
        for proto in list(self.handlers):
            try:
                await self.daemon_connector.described(
                    self._register_one_again(proto), "STREAM_HANDLER", timeout, protocol=proto
                )
            except DaemonRefused as error:
                self.logger.error("lost the handler of %r: %s", proto, error)
                refused = refused or error
        if refused is not None:
            try:
                raise refused
            finally:
                del refused  # breaks a reference cycle: its traceback has this frame

    async def _register_one_again(self, proto: str) -> None:
        async with self._registrations.changing(proto):
            if proto in self.handlers:
                await self._register_at_daemon(proto, proto in self._balanced)

    async def remove_stream_handler(self, proto: str, *, timeout: float | None = None) -> None:
        """REMOVE_STREAM_HANDLER: removes the handler of a protocol.

        Raises:
            NotSupported: The daemon is not hivemind's. It still offers the protocol to its peers,
                but this client refuses their streams.
            NotRegistered: The daemon has no such handler of this client.
        """
        self.handlers.pop(proto, None)
        self._options.pop(proto, None)
        await self._registrations.unregister(self, proto, timeout)

    # --- inbound streams ---

    def listen(self) -> Listening[Self]:
        """Accepts inbound streams and calls their handlers.

        ``async with client.listen():`` listens until the block ends. It then cancels the running
        handlers and removes their protocols from the daemon, if the daemon supports that.
        ``await client.listen()`` returns at once and listens until ``close()``, which does the
        same. Listening also ends with the event loop, and when the client is garbage-collected, so
        keep a reference to the client. A running handler keeps the client alive, too.

        Raises:
            ControlFailure: The client is already listening.
            OSError: The address cannot be listened on.

        Example:
            await client.control.listen()
            await client.control.stream_handler("/echo/1", echo)
            await client.control.close()
        """
        return Listening(self._listen_within, self._listen_from_now_on)

    @asynccontextmanager
    async def _listen_within(self) -> AsyncIterator[Self]:
        listener = await self._begin()
        try:
            async with self._serving(listener):
                closed = False
                try:
                    yield self
                except GeneratorExit:
                    # Raised by the garbage collector or the end of the loop: no await is possible.
                    closed = True
                    raise
                finally:
                    if not closed:
                        await self._unregister_all()
        finally:
            self._ended()

    async def _listen_from_now_on(self) -> Self:
        listener = await self._begin()
        try:
            self._lingering = Lingering() if self._lingers else None
            poll = None if self._lingering is None else self._lingering.poll
            self._background = background = BackgroundListener(self, listener, poll)
        except BaseException:
            listener.close()
            self._ended()
            raise
        try:
            await background.begun()
        except BaseException:
            background.close()
            raise
        return self

    async def _begin(self) -> RawListener:
        """Opens the listening socket and records its address."""
        if self._background is not None and self._background.loop_ended:
            self._background.close()
        if self._listening:
            raise ControlFailure("Listener is already listening")
        self._listening = True
        try:
            wanted = self._wanted_maddr
            listener, bound = await self._bind(Multiaddr(self.listen_maddr))
            self._listener = listener
            if self._wanted_maddr is wanted:
                self._bound_maddr = bound
        except BaseException:
            self._ended()
            raise
        return listener

    def _ended(self) -> None:
        """Resets the state after listening."""
        self._scope = self._listener = self._background = self._task_group = None
        self._lingering = None
        self._listening = False
        self._bound_maddr = None
        self._remove_private()

    def _remove_private(self) -> None:
        private, self._private = self._private, None
        if private is not None:
            private.remove()

    def _stopped_listening(self, listener: BackgroundListener) -> None:
        """Resets the state after a background listener has ended."""
        if self._background is listener:
            self._ended()

    async def close(self) -> None:
        """Stops listening, cancels running handlers, and closes idle connections.

        After ``await listen()`` it also removes the protocols from the daemon and waits until the
        handlers have ended.
        """
        # In a forked child, cancelling the parent's tasks would change the parent's epoll instance.
        here = os.getpid() == self._pid
        background = self._background if here else None
        try:
            if here and self._scope is not None:
                self._scope.cancel()
            elif background is not None and not background.loop_ended:
                await self._unregister_all()
        finally:
            # Runs even if the caller is cancelled while the daemon does not reply.
            if background is not None:
                background.close()
            self.daemon_connector.close()
            if not self._listening:
                self._remove_private()
        if background is not None:
            await background.aclose()

    async def _bind(self, maddr: Multiaddr) -> tuple[RawListener, Multiaddr]:
        for attempt, address in enumerate(addresses := await resolve(maddr), 1):
            try:
                listener = RawListener(address)
            except OSError as error:
                if attempt < len(addresses):
                    continue
                message = f"cannot listen at {maddr}: {error.strerror}"
                if error.errno == errno.EADDRINUSE:
                    message += "; another program listens there: pass another listen_maddr"
                raise OSError(error.errno, message) from None
            if isinstance(address, str):
                return listener, self.listen_maddr
            host, port = listener.local_address
            actual = Multiaddr(f"/{'ip6' if ':' in host else 'ip4'}/{host}/tcp/{port}")
            return listener, self._show(actual)
        raise OSError(errno.EADDRNOTAVAIL, f"no address to listen at: {maddr}")

    @asynccontextmanager
    async def _serving(self, listener: RawListener) -> AsyncIterator[None]:
        """Accepts streams until the context ends."""
        self._scope = scope = anyio.CancelScope()
        async with _ungrouped_task_group() as tasks:
            self._task_group = tasks
            tasks.start_soon(self._serve, listener, scope)
            try:
                yield
            finally:
                with suppress(RuntimeError):  # raised if no event loop is running
                    scope.cancel()

    async def _serve(self, listener: RawListener, scope: anyio.CancelScope) -> None:
        watched = watch(listener.fileno())
        try:
            with UnlessClosed(scope):
                async with UnlessClosedAsync(anyio.create_task_group()) as tasks:
                    if self._lingers:
                        self._lingering = Lingering()
                        tasks.start_soon(self._lingering.poll)
                    while True:
                        wait = self._accept_one(listener, tasks.start_soon)
                        await pause(wait, watched.readable)
        finally:
            self._lingering = None
            watched.close()
            listener.close()

    async def _unregister_all(self) -> None:
        """Removes all handlers from the daemon, or as many as it acknowledges in time."""
        with UnlessClosed(anyio.move_on_after(_GOODBYE_TIMEOUT, shield=True)):
            for proto in list(self.handlers):
                try:
                    await self._registrations.unregister(self, proto, None)
                except DaemonRefused as error:
                    if isinstance(error, NotSupported):
                        # The daemon still offers the protocol, so the next listen() serves it.
                        break
                except ControlFailure:
                    break
                self.handlers.pop(proto, None)
                self._options.pop(proto, None)


@asynccontextmanager
async def _ungrouped_task_group() -> AsyncIterator[TaskGroup]:
    """A task group that raises the exception of its body itself, not an exception group."""
    failure = None
    async with UnlessClosedAsync(anyio.create_task_group()) as tasks:
        try:
            yield tasks
        except Exception as error:
            failure = error
            tasks.cancel_scope.cancel()
    if failure is not None:
        raise failure
