"""Reconnects hivemind's ``P2P`` to its bootstrap peers when it has lost all of its peers.

A task on the event loop on which the ``P2P`` was created lists the daemon's peers at the intervals
that `Reconnection` sets. It ends with the ``P2P`` and does not keep it alive.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import logging
import os
import weakref
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from p2pclient_rs import control
from p2pclient_rs._native import Multiaddr, PeerID, Reconnection
from p2pclient_rs.exceptions import ControlFailure
from p2pclient_rs.reactor import silence

__all__ = ["restore", "wrap"]

logger: logging.Logger = logging.getLogger("p2pclient_rs.compat.hivemind")

#: The attribute of a ``P2P`` that holds its watchdog.
_ATTRIBUTE = "_p2pclient_rs_reconnection"

_watchdogs: weakref.WeakSet[_Watchdog] = weakref.WeakSet()
#: For each wrapped class and method: the class's own attribute before wrapping, and our wrapper.
_wrapped: dict[type, dict[str, tuple[Any, Any]]] = {}


def wrap(p2p_daemon: ModuleType) -> None:
    """Makes every ``P2P`` that is created from now on reconnect.

    Args:
        p2p_daemon: The module of hivemind that defines ``P2P``.

    Raises:
        AttributeError: The class lacks a method that hivemind's ``P2P`` has.
    """
    owner = p2p_daemon.P2P
    if owner in _wrapped:
        return
    create, terminate = inspect.getattr_static(owner, "create"), owner._terminate
    if not isinstance(create, classmethod):
        raise AttributeError(f"{owner.__qualname__}.create is not a class method")
    create = create.__func__

    @functools.wraps(create)
    async def create_and_watch(cls: Any, *args: Any, **kwargs: Any) -> Any:
        p2p = await create(cls, *args, **kwargs)
        given = inspect.signature(create).bind(cls, *args, **kwargs).arguments
        peers = given.get("initial_peers")
        # Other code may have wrapped this function, and then still calls it after `restore`.
        if peers and isinstance(peers, Sequence) and owner in _wrapped:
            watchdog = _Watchdog(p2p, [str(peer) for peer in peers])
            setattr(p2p, _ATTRIBUTE, watchdog)
            _watchdogs.add(watchdog)
        return p2p

    @functools.wraps(terminate)
    def stop_and_terminate(self: Any, *args: Any, **kwargs: Any) -> Any:
        watchdog = vars(self).pop(_ATTRIBUTE, None)
        if watchdog is not None:
            watchdog.stop()
        return terminate(self, *args, **kwargs)

    methods = {"create": classmethod(create_and_watch), "_terminate": stop_and_terminate}
    _wrapped[owner] = {name: (vars(owner).get(name), ours) for name, ours in methods.items()}
    for name, ours in methods.items():
        setattr(owner, name, ours)


def restore() -> None:
    """Undoes `wrap`, and stops all watchdogs."""
    while _wrapped:
        cls, methods = _wrapped.popitem()
        for name, (before, ours) in methods.items():
            if vars(cls).get(name) is not ours:
                continue
            if before is None:  # The class inherited it.
                delattr(cls, name)
            else:
                setattr(cls, name, before)
    for watchdog in list(_watchdogs):
        watchdog.stop()


class _Watchdog:
    """Reconnects one ``P2P``, in a task on its event loop.

    Args:
        p2p: The ``P2P``.
        addresses: Its bootstrap peers, each a multiaddr that ends in ``/p2p/<peer id>``.
    """

    def __init__(self, p2p: Any, addresses: Sequence[str]) -> None:
        self._p2p = weakref.ref(p2p)
        self._name = f"P2P {p2p.peer_id}"
        self._peers = [peer for address in addresses if (peer := _parse(address)) is not None]
        self._isolated = False
        self._pid = os.getpid()
        self._loop = asyncio.get_running_loop()
        self._task = self._loop.create_task(self._run())
        silence(self._task)

    def stop(self) -> None:
        """Cancels the task. Any thread may call this. Does nothing in a forked child."""
        if os.getpid() != self._pid or self._loop.is_closed():
            return
        if asyncio._get_running_loop() is self._loop:
            self._task.cancel()
            return
        try:
            self._loop.call_soon_threadsafe(self._task.cancel)
        except RuntimeError:  # The loop was closed meanwhile.
            pass

    def _control(self) -> Any:
        """Returns the control client of the ``P2P``; None if it or its daemon has ended."""
        p2p = self._p2p()
        if p2p is None or not p2p.is_alive:
            return None
        child = p2p._child
        if child is not None and child.returncode is not None:
            return None
        return p2p._client.control

    async def _run(self) -> None:
        schedule = Reconnection()
        pause, _ = schedule.connected()
        try:
            while True:
                await asyncio.sleep(pause)
                client = self._control()
                if client is None:
                    return
                pause = await self._check(client, schedule)
                del client
        except Exception:
            logger.exception("%s is no longer reconnected to its bootstrap peers", self._name)

    async def _check(self, client: Any, schedule: Reconnection) -> float:
        """Reconnects if there are no peers. Returns the seconds until the next check."""
        try:
            if await control.ControlClient.list_peers(client, timeout=schedule.TIMEOUT):
                pause, _ = schedule.connected()
                if self._isolated:
                    logger.info("%s has peers again", self._name)
                self._isolated = False
                return pause
        except ControlFailure as failure:
            pause, is_new = schedule.failed(_reason(failure))
            if is_new and self._control() is not None:
                logger.warning("%s: its peers are unknown: %s", self._name, _reason(failure))
            return pause
        if not self._isolated:
            self._isolated = True
            logger.warning(
                "%s has lost all of its peers; reconnecting to its bootstrap peers", self._name
            )
        reasons = await asyncio.gather(*(self._connect(client, *peer) for peer in self._peers))
        if None in reasons:
            pause, _ = schedule.connected()
            self._isolated = False
            connected = [
                address
                for (address, *_), reason in zip(self._peers, reasons, strict=True)
                if reason is None
            ]
            logger.info("%s is reconnected to %s", self._name, ", ".join(connected))
            return pause
        failures = "; ".join(
            f"{address}: {reason}"
            for (address, *_), reason in zip(self._peers, reasons, strict=True)
        )
        pause, is_new = schedule.failed(failures)
        if is_new and self._control() is not None:
            logger.warning("%s cannot connect to its bootstrap peers: %s", self._name, failures)
        return pause

    async def _connect(
        self, client: Any, address: str, peer_id: PeerID, addrs: list[Multiaddr]
    ) -> str | None:
        """Connects to a bootstrap peer. Returns None, or the reason if it fails."""
        try:
            await control.ControlClient.connect(
                client, peer_id, addrs, timeout=Reconnection.TIMEOUT
            )
        except ControlFailure as failure:
            return _reason(failure)
        return None


def _parse(address: str) -> tuple[str, PeerID, list[Multiaddr]] | None:
    """Splits a bootstrap peer's address; returns None if it does not name the peer."""
    try:
        *before, last = Multiaddr(address).split()
        peer_id = PeerID(str(last["p2p"]))
        return address, peer_id, [Multiaddr.join(*before)] if before else []
    except (LookupError, ValueError) as error:
        logger.warning("cannot reconnect to the bootstrap peer %s: %s", address, error)
        return None


def _reason(failure: ControlFailure) -> str:
    """Returns the daemon's message, on one line."""
    return " ".join((failure.daemon_message or str(failure)).split())
