"""Supervises a daemon on any event loop: carries out what ``Supervision`` decides."""

from __future__ import annotations

import logging
import math
import weakref
from contextvars import copy_context
from typing import TYPE_CHECKING

import anyio

from p2pclient_rs._native import Reconnection, Supervision
from p2pclient_rs.client import Client
from p2pclient_rs.exceptions import ControlFailure, DaemonStartError
from p2pclient_rs.process import poll_exit, wait_exit
from p2pclient_rs.reactor import reactor
from p2pclient_rs.startup import ready, reason

if TYPE_CHECKING:
    from anyio.abc import TaskGroup

    from p2pclient_rs._native import DaemonProcess, Identity, SupervisionAction

#: Named after the module of `Daemon`, which is the public class.
logger: logging.Logger = logging.getLogger("p2pclient_rs.daemon")


class Supervisor:
    """A task that supervises a daemon until it is stopped or there is nothing left to supervise.

    It holds no reference to the ``Daemon``, whose finalizer ends the process.

    Args:
        process: The daemon, which is ready.
        supervision: Decides what to do and when.
        clients: The clients whose handlers are registered again after a restart.
        start_timeout: How long each restart may take, in seconds.
    """

    def __init__(
        self,
        process: DaemonProcess,
        supervision: Supervision,
        clients: weakref.WeakSet[Client],
        start_timeout: float,
    ) -> None:
        #: The daemon's identity after the last restart; None before the first.
        self.identity: Identity | None = None
        #: Why the supervisor gave up; None if it did not.
        self.failure: DaemonStartError | None = None
        self._process = process
        self._peers = process.background_peers()
        self._supervision = supervision
        self._clients = clients
        self._start_timeout = start_timeout
        self._last_failure: DaemonStartError | None = None
        #: Set when an event was reported to `_supervision`.
        self._wake = anyio.Event()
        self._finished = anyio.Event()
        self._reactor = reactor()
        # At once, not only when the task begins.
        process.set_supervised(process.restart_limit > 0)
        self._work = self._reactor.spawn(self._run(), copy_context())
        self._reactor.when_ended(self._work, self._finish)

    @property
    def loop_closed(self) -> bool:
        """Whether its event loop is closed, so that the task will never end."""
        return self._reactor.is_closed()

    async def stop(self) -> None:
        """Stops the task, and waits until it has ended. Does not stop the daemon."""
        self._process.set_supervised(False)
        if not self.loop_closed:
            self._reactor.call_from_anywhere(self._work.cancel)
            await self._finished.wait()

    def _finish(self) -> None:
        self._process.set_supervised(False)
        self._finished.set()

    async def _run(self) -> None:
        try:
            self._supervision.started(anyio.current_time())
            aborted = True
            while aborted:
                # A task group for the work of one run of the daemon.
                async with anyio.create_task_group() as tasks:
                    aborted = await self._carry_out_until_abort(tasks)
                    tasks.cancel_scope.cancel()
        except Exception:
            logger.exception("the supervisor failed: the daemon will not be restarted")
        finally:
            self._finish()

    async def _carry_out_until_abort(self, tasks: TaskGroup) -> bool:
        """Returns False when supervision has finished."""
        while True:
            action = self._supervision.poll()
            if action is None:
                if self._supervision.finished:
                    return False
                await self._event()
            elif action.kind == "abort":
                return True
            else:
                await self._carry_out(action, tasks)

    async def _event(self) -> None:
        """Waits for an event."""
        self._wake = anyio.Event()
        deadline = self._supervision.deadline
        with anyio.CancelScope(deadline=math.inf if deadline is None else deadline):
            await self._wake.wait()
        self._supervision.timeout(anyio.current_time())

    async def _carry_out(self, action: SupervisionAction, tasks: TaskGroup) -> None:
        kind = action.kind
        if kind == "watch":
            tasks.start_soon(self._watch)
        elif kind == "connect":
            tasks.start_soon(self._connect, action.peer)
        elif kind == "register":
            for client in list(self._clients):
                tasks.start_soon(_register, client)
        elif kind == "start":
            await self._start()
        elif kind == "give up":
            logger.error(
                "the daemon has died %d times in a row and will not be restarted: %s",
                action.deaths,
                self._last_failure,
            )
            self.failure = self._last_failure
        else:
            self._report(action)

    def _report(self, action: SupervisionAction) -> None:
        kind = action.kind
        if kind == "report restarting":
            brief = "" if self._last_failure is None else _brief(self._last_failure)
            logger.warning("%s; starting it again in %.1f s", brief, action.pause)
        elif kind == "report restarted":
            logger.info("restarted the daemon as process %s", self._process.pid)
        elif kind == "report connected":
            address = self._peers[action.peer][0]
            logger.info("connected to the bootstrap peer %s", address)
        elif kind == "report unreachable":
            address = self._peers[action.peer][0]
            logger.warning("cannot connect to the bootstrap peer %s: %s", address, action.reason)

    async def _watch(self) -> None:
        await wait_exit(self._process)
        if self._process.ended:  # stopped, or its `Daemon` was collected
            self._supervision.stopped(anyio.current_time())
        else:
            failure = self._process.died()
            assert isinstance(failure, DaemonStartError)
            self._last_failure = failure
            self._supervision.died(anyio.current_time())
        self._wake.set()

    async def _connect(self, peer: int) -> None:
        _, peer_id, addrs = self._peers[peer]
        try:
            async with Client(self._process.control_maddr) as client:
                await client.connect(peer_id, addrs, timeout=Reconnection.TIMEOUT)
        except ControlFailure as failure:
            daemon_lost = isinstance(failure, ConnectionError)
            now = anyio.current_time()
            self._supervision.connect_failed(peer, reason(failure), daemon_lost, now)
        else:
            self._supervision.connected(peer, anyio.current_time())
        self._wake.set()

    async def _start(self) -> None:
        process = self._process
        try:
            process.spawn()
            self.identity = await ready(process, self._start_timeout)
        except DaemonStartError as error:
            if process.ended:
                self._supervision.stopped(anyio.current_time())
                return
            self._last_failure = error
            process.kill()
            await poll_exit(process)
            self._supervision.start_failed(anyio.current_time())
        else:
            self._supervision.started(anyio.current_time())


async def _register(client: Client) -> None:
    for register_again in (client.control.register_again, client.unary.register_again):
        try:
            with anyio.fail_after(Supervision.REGISTER_TIMEOUT):
                await register_again()
        except (ControlFailure, TimeoutError) as error:
            why = str(error) or f"no answer within {Supervision.REGISTER_TIMEOUT:g} s"
            logger.warning("the handlers of %r were not registered again: %s", client, why)


def _brief(error: DaemonStartError) -> str:
    """Returns the error's text without the command line and the output."""
    return f"{error.args[0]}: {error.cause}" if error.cause else str(error.args[0])
