"""The registrations of stream handlers at the daemon."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Protocol

import anyio

from p2pclient_rs._native import UNKNOWN_REQUEST, Multiaddr, Request
from p2pclient_rs.connector import DaemonConnector
from p2pclient_rs.exceptions import (
    ConnectionLost,
    ControlFailure,
    DaemonRefused,
    DaemonUnreachable,
    NotSupported,
)
from p2pclient_rs.loops import UnlessClosed, UnlessClosedAsync

__all__ = ["Registrations"]

#: How long the removal of a former registration may take, in seconds, even for a cancelled caller.
_REPLACING = 5.0


class Owner(Protocol):
    """The client whose registrations these are: a ``ControlClient``."""

    #: Whether a handler takes the place of another one of this client.
    _replaces_handlers: bool

    @property
    def daemon_connector(self) -> DaemonConnector: ...
    @property
    def listen_maddr(self) -> Multiaddr: ...


@dataclass(frozen=True)
class _Registration:
    """A stream handler that the daemon has, or may have."""

    #: The listen address that the daemon was given.
    maddr: Multiaddr
    balanced: bool
    #: By which `DaemonConnector.still_registered` knows the daemon again; None if it cannot.
    token: object | None


class Registrations:
    """The stream handlers of one client that the daemon has, or may have.

    The client is an argument of each method: a reference to it would keep it alive.
    """

    def __init__(self) -> None:
        #: By protocol: the handlers that the daemon has or may have.
        self._registered: dict[str, _Registration] = {}
        #: By protocol: the lock for changing its registration, and how many tasks use that.
        self._registering: dict[str, tuple[anyio.Lock, int]] = {}

    @asynccontextmanager
    async def changing(self, proto: str) -> AsyncIterator[None]:
        """Serialises registrations of one protocol."""
        lock, users = self._registering.get(proto) or (anyio.Lock(), 0)
        self._registering[proto] = lock, users + 1
        try:
            async with UnlessClosedAsync(lock):
                yield
        finally:
            lock, users = self._registering.pop(proto)
            if users > 1:
                self._registering[proto] = lock, users - 1

    async def register(self, owner: Owner, proto: str, balanced: bool) -> None:
        """Registers a protocol at the daemon, unless it has the registration already.

        Raises:
            DaemonRefused: Another client does.
        """
        connector = owner.daemon_connector
        maddr = Multiaddr(owner.listen_maddr)
        before = self._registered.get(proto)
        try:
            await self._register_once(connector, maddr, proto, balanced)
        except DaemonRefused:
            # hivemind's fork refuses every name that is taken, even by this client, with the same
            # words.
            if before is None or not owner._replaces_handlers:
                self._restore(proto, before)
                raise
            self._registered[proto] = before
            same = before.maddr == maddr and before.balanced == balanced
            if same and await connector.still_registered(before.token):
                return
            # A removal that is cancelled could overtake a later registration.
            with UnlessClosed(anyio.move_on_after(_REPLACING, shield=True)):
                if await self._replace(owner, connector, proto, balanced):
                    return
                # Others may share the name: this client goes on sharing it.
                if before.balanced and not balanced:
                    try:
                        await self._register_once(
                            connector, Multiaddr(owner.listen_maddr), proto, True
                        )
                    except DaemonRefused:
                        del self._registered[proto]
            raise
        except DaemonUnreachable:
            self._restore(proto, before)
            raise
        if balanced and before is not None and await connector.still_registered(before.token):
            # The fork has appended another entry, so that this client would get twice its share.
            with (
                UnlessClosed(anyio.move_on_after(_REPLACING, shield=True)),
                suppress(ControlFailure),
            ):
                await connector.request(
                    "REMOVE_STREAM_HANDLER", Request.remove_stream_handler(before.maddr, proto)
                )

    async def _replace(
        self, owner: Owner, connector: DaemonConnector, proto: str, balanced: bool
    ) -> bool:
        """Registers a name that is taken; returns False if it is another client's.

        The daemon may have been restarted, and another client may have taken the name: the removal
        succeeds only if the registration has this client's address.
        """
        maddr = Multiaddr(owner.listen_maddr)
        former = self._registered[proto].maddr
        while True:
            try:
                await connector.request(
                    "REMOVE_STREAM_HANDLER", Request.remove_stream_handler(former, proto)
                )
            except DaemonRefused:
                del self._registered[proto]
                return False
            with suppress(DaemonRefused):
                await self._register_once(connector, Multiaddr(owner.listen_maddr), proto, balanced)
                return True
            # The daemon may have carried out a cancelled request of this client in between.
            former = maddr

    async def _register_once(
        self, connector: DaemonConnector, maddr: Multiaddr, proto: str, balanced: bool
    ) -> None:
        """Registers a name.

        Raises:
            DaemonRefused: The name is taken.
        """
        # Until the daemon answers, it may have it or not.
        self._registered[proto] = _Registration(maddr, balanced, None)
        await connector.request("STREAM_HANDLER", Request.stream_handler(maddr, proto, balanced))
        self._registered[proto] = _Registration(maddr, balanced, connector.registered())

    def _restore(self, proto: str, before: _Registration | None) -> None:
        if before is None:
            self._registered.pop(proto, None)
        else:
            self._registered[proto] = before

    async def unregister(self, owner: Owner, proto: str, timeout: float | None) -> None:
        """Removes a protocol from the daemon.

        Raises:
            NotSupported: The daemon is not hivemind's.
            DaemonRefused: It has no such registration of this client.
        """
        connector = owner.daemon_connector
        entry = self._registered.get(proto)
        maddr = owner.listen_maddr if entry is None else entry.maddr
        request = Request.remove_stream_handler(maddr, proto)
        try:
            await connector.request(
                "REMOVE_STREAM_HANDLER", request, timeout=timeout, protocol=proto
            )
        except ConnectionLost as error:
            if not await connector.is_unknown_request(error):
                raise
            raise connector.describe(
                NotSupported(UNKNOWN_REQUEST), "REMOVE_STREAM_HANDLER", protocol=proto
            ) from error
        except DaemonRefused as error:
            if not isinstance(error, NotSupported) and self._registered.get(proto) is entry:
                self._registered.pop(proto, None)
            raise
        if self._registered.get(proto) is entry:
            self._registered.pop(proto, None)
