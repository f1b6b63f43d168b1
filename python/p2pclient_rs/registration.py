"""The registrations of stream handlers at the daemon."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

import anyio

from p2pclient_rs._native import (
    UNKNOWN_REQUEST,
    Multiaddr,
    Registering,
    Request,
    classify_refusal,
)
from p2pclient_rs.connector import DaemonConnector
from p2pclient_rs.exceptions import (
    ConnectionLost,
    ControlFailure,
    DaemonRefused,
    DaemonUnreachable,
    NotSupported,
    timed_out,
)
from p2pclient_rs.loops import UnlessClosed, UnlessClosedAsync

__all__ = ["Registrations"]

#: How long replacing a former registration may take, in seconds. Cancellation does not shorten it.
_REPLACING = 5.0


Reply: TypeAlias = Literal["done", "taken", "refused", "unreachable", "lost"]


class Owner(Protocol):
    """The client that owns the registrations: a ``ControlClient``."""

    #: Whether registering a handler replaces this client's former one.
    _replaces_handlers: bool

    @property
    def daemon_connector(self) -> DaemonConnector: ...
    @property
    def listen_maddr(self) -> Multiaddr: ...


@dataclass(frozen=True)
class _Registration:
    """A stream handler that the daemon has, or may have."""

    #: The listen address sent to the daemon.
    maddr: Multiaddr
    balanced: bool
    #: For `DaemonConnector.still_registered`; None if no connection could be kept open.
    token: object | None


class _Attempt:
    """Carries out the requests that the registration policy asks for."""

    def __init__(self, all: Registrations, owner: Owner, proto: str, balanced: bool) -> None:
        self._all = all
        self._owner = owner
        self._connector = owner.daemon_connector
        self._proto = proto
        former = all._registered.get(proto)
        maddr = Multiaddr(owner.listen_maddr)
        self._former = former
        self._current = _Registration(maddr, balanced, None)
        self._policy = Registering(
            balanced,
            None
            if former is None
            else (
                former.balanced,
                former.maddr == maddr and former.balanced == balanced,
                former.token is not None,
            ),
            owner._replaces_handlers,
        )
        #: The error of the first STREAM_HANDLER request, and of the last request.
        self.first_error: ControlFailure | None = None
        self.last_error: ControlFailure | None = None
        #: The next action, and its argument.
        self.action, self._flag = self._policy.first()

    async def run(self, *actions: str) -> None:
        """Carries out actions until the next one is not one of ``actions``."""
        while self.action in actions:
            self.last_error = None
            try:
                same = await self._carry_out()
            except ControlFailure as error:
                self.last_error = error
                if self.action == "register" and self.first_error is None:
                    self.first_error = error
                reply = _reply(error)
            else:
                reply = "done" if same else "refused"
            self.action, self._flag = self._policy.next(reply)
            self._remember()

    async def _carry_out(self) -> bool:
        """Carries out one action. Returns False if the daemon may have been restarted."""
        if self.action == "probe":
            assert self._former is not None
            return await self._connector.still_registered(self._former.token)
        if self.action == "remove":
            registration = self._former if self._flag else self._current
            assert registration is not None
            await self._connector.request(
                "REMOVE_STREAM_HANDLER",
                Request.remove_stream_handler(registration.maddr, self._proto),
            )
            return True
        maddr, balanced = Multiaddr(self._owner.listen_maddr), self._flag
        self._current = _Registration(maddr, balanced, None)
        self._remember()
        request = Request.stream_handler(maddr, self._proto, balanced)
        await self._connector.request("STREAM_HANDLER", request)
        self._current = _Registration(maddr, balanced, self._connector.registered())
        return True

    def _remember(self) -> None:
        record = self._policy.record
        if record == "former":
            self._all._remember(self._proto, self._former)
        else:
            self._all._remember(self._proto, self._current if record == "current" else None)

    def error(self) -> ControlFailure | None:
        """Returns the error to raise if the registration has failed."""
        if self.action == "registered":
            return None
        if self.action == "last error":
            return self.last_error
        if self.action == "first error" or self.first_error is not None:
            return self.first_error
        # Out of time. If the former entry remains beside the current one, it does no harm.
        if self.action == "remove" and self._policy.record == "current":
            return None
        return timed_out(_REPLACING)


def _reply(error: ControlFailure) -> Reply:
    """Returns the outcome to report to the registration policy for an error."""
    if isinstance(error, DaemonRefused):
        kind, _ = classify_refusal(error.daemon_message or "")
        return "taken" if kind == "already registered" else "refused"
    return "unreachable" if isinstance(error, DaemonUnreachable) else "lost"


class Registrations:
    """The stream handlers of one client that the daemon has, or may have.

    Methods take the client as an argument, since a stored reference would keep it alive.
    """

    def __init__(self) -> None:
        #: The handlers that the daemon has or may have, by protocol.
        self._registered: dict[str, _Registration] = {}
        #: The lock for changing a protocol's registration and the number of its users, by protocol.
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
        """Registers a protocol at the daemon, unless the daemon already has this registration.

        Raises:
            AlreadyRegistered: Another client serves the protocol.
        """
        attempt = _Attempt(self, owner, proto, balanced)
        try:
            await attempt.run("register", "probe")
            if attempt.action == "remove":
                # Shielded: a cancelled removal could overtake a later registration.
                with UnlessClosed(anyio.move_on_after(_REPLACING, shield=True)):
                    await attempt.run("register", "probe", "remove")
            error = attempt.error()
            if error is not None:
                raise error
        finally:
            # Breaks reference cycles: the tracebacks of the errors have this frame.
            attempt.first_error = attempt.last_error = error = None

    def _remember(self, proto: str, registration: _Registration | None) -> None:
        if registration is None:
            self._registered.pop(proto, None)
        else:
            self._registered[proto] = registration

    async def unregister(self, owner: Owner, proto: str, timeout: float | None) -> None:
        """Removes a protocol from the daemon.

        Raises:
            NotSupported: The daemon is not hivemind's.
            NotRegistered: The daemon has no such registration of this client.
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
