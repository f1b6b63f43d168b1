"""The exceptions of the package: who failed, at what, and in whose words.

    P2PDaemonError
    ├── ControlFailure              a request to the daemon failed
    │   ├── DaemonRefused           the daemon answered with an error
    │   │   └── NotSupported        … because it cannot do this at all
    │   ├── DaemonUnreachable       no connection to the control socket (a ConnectionError)
    │   ├── ConnectionLost          the connection ended before the answer (a ConnectionError)
    │   ├── ControlTimeout          no answer in time (a TimeoutError)
    │   ├── ProtocolViolation       the daemon sent what the protocol does not allow
    │   ├── MessageTooLarge         a sent or received message exceeds the limit
    │   └── ForkedClientError       a client was used in a forked child of its process
    ├── DispatchFailure             an inbound stream could not be given to a handler
    └── DaemonStartError            a daemon process did not come up (an OSError, if the operating
        │                           system refused something: a PermissionError, …)
        └── DaemonNotFound          … for there is no binary to run (a FileNotFoundError)
    P2PHandlerError                 a peer's unary handler failed, not the daemon

All can be pickled. Attributes live in the instance's ``__dict__`` and ``args`` is the message
alone, which is what the default ``__reduce__`` of exceptions needs for that.
"""

from __future__ import annotations

import builtins
import errno as _errno
import shlex
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from p2pclient_rs._native import PeerID

__all__ = [
    "ConnectionLost",
    "ControlFailure",
    "ControlTimeout",
    "DaemonNotFound",
    "DaemonRefused",
    "DaemonStartError",
    "DaemonUnreachable",
    "DispatchFailure",
    "ForkedClientError",
    "MessageTooLarge",
    "NotSupported",
    "P2PDaemonError",
    "P2PHandlerError",
    "ProtocolViolation",
]


class P2PDaemonError(Exception):
    """The base of every exception this package defines, but ``P2PHandlerError``."""


class ControlFailure(P2PDaemonError):
    """A request to the daemon failed. The subclass says at what point.

    Args:
        message: What went wrong, without the context given by the other arguments.
        request: The request's name in the protocol, as ``"CONNECT"`` or ``"DHT GET_VALUE"``.
        peer_id: The peer the request was about.
        protocol: The protocol id the request was about, or several separated by commas.
        daemon_message: The daemon's own words.
    """

    request: str | None
    peer_id: PeerID | None
    protocol: str | None
    daemon_message: str | None
    #: Whether it reads as its message alone, for a dialect whose users compare that.
    _terse: bool = False

    def __init__(
        self,
        message: str = "",
        *,
        request: str | None = None,
        peer_id: PeerID | None = None,
        protocol: str | None = None,
        daemon_message: str | None = None,
    ) -> None:
        super().__init__(message)
        self.request = request
        self.peer_id = peer_id
        self.protocol = protocol
        self.daemon_message = daemon_message

    def __str__(self) -> str:
        text = str(self.args[0]) if self.args else ""
        if self._terse:
            return text
        if self.daemon_message and self.daemon_message not in text:
            text = f"{text}: {self.daemon_message}" if text else self.daemon_message
        context = ", ".join(
            f"{name} {value}"
            for name, value in (
                ("request", self.request),
                ("peer", self.peer_id),
                ("protocol", self.protocol),
            )
            if value is not None and str(value) not in text
        )
        if not context:
            return text
        return f"{text} ({context})" if text else context

    def __repr__(self) -> str:
        # Programs log it, and hivemind sends it to callers: with the daemon's words.
        return f"{type(self).__name__}({str(self)!r})"


class DaemonRefused(ControlFailure):
    """The daemon answered with an error; its words are in ``daemon_message``."""


class NotSupported(DaemonRefused):
    """This daemon cannot do what was asked: another kind, an older version, or not switched on."""


class DaemonUnreachable(ControlFailure, ConnectionError):
    """No connection to the daemon's control socket could be made: nothing was sent."""


class ConnectionLost(ControlFailure, ConnectionError):
    """The control connection ended before the answer: the request may have been carried out.

    Attributes:
        unexecuted: It cannot have been: the daemon did not read the whole request.
        mid_answer: The answer had begun to come.
    """

    unexecuted: bool = False
    mid_answer: bool = False


class ControlTimeout(ControlFailure, TimeoutError):
    """The daemon did not answer in time: the request may have been carried out."""


class ProtocolViolation(ControlFailure):
    """The daemon sent something that the control protocol does not allow."""


class MessageTooLarge(ControlFailure):
    """A message exceeds a limit. Only this call fails: the connection stays usable.

    A request over the limit was not sent. A reply over the limit was skipped: the handler ran.

    Attributes:
        size: The size of the message, in bytes.
        limit: The limit, in bytes; None if there was no memory for the message.
        received: Whether it is a reply. If not, nothing was sent.
    """

    size: int | None = None
    limit: int | None = None
    received: bool = False


class ForkedClientError(ControlFailure):
    """A client was used in a forked child of the process that made it; make a new one there."""


class P2PHandlerError(Exception):
    """A unary handler failed at the peer that was called: no fault of a daemon, and, as in
    hivemind, no ``P2PDaemonError``.

    Args:
        message: What the peer says of it: with this package's handlers, and hivemind's, the
            ``repr`` of what the handler raised.
        peer_id: The peer that was called.
        protocol: The handler's name.
    """

    peer_id: PeerID | None
    protocol: str | None

    def __init__(
        self,
        message: str = "",
        *,
        peer_id: PeerID | None = None,
        protocol: str | None = None,
    ) -> None:
        super().__init__(message)
        self.peer_id = peer_id
        self.protocol = protocol


class DispatchFailure(P2PDaemonError):
    """A stream the daemon handed over could not be given to a handler."""


class DaemonStartError(P2PDaemonError):
    """A daemon process could not be started, died, or did not answer in time.

    If the operating system refused something that the start needs, this is also an instance of
    the built-in class for that: ``except PermissionError`` catches it.

    Args:
        message: What happened.
        command: The command line.
        returncode: The exit status, negative for a signal; None if it never ran or was still
            running.
        logs: The last lines of the daemon's output.
        cause: The cause in one line, where it can be told. Names the file or the operation that
            the operating system refused.
        hint: What to do about it, in one line, where that can be told.
        errno: The operating system's number of the error, if it refused something.
    """

    command: list[str]
    returncode: int | None
    logs: list[str]
    cause: str | None
    hint: str | None
    errno: int | None = None

    def __init__(
        self,
        message: str = "",
        *,
        command: Sequence[str] = (),
        returncode: int | None = None,
        logs: Sequence[str] = (),
        cause: str | None = None,
        hint: str | None = None,
        errno: int | None = None,
    ) -> None:
        super().__init__(message)
        self.command = list(command)
        self.returncode = returncode
        self.logs = list(logs)
        self.cause = cause
        self.hint = hint
        self.errno = errno

    def __str__(self) -> str:
        text = str(self.args[0]) if self.args else ""
        if self.cause:
            text += f": {self.cause}"
        if self.command:
            text += f"\n  command: {shlex.join(self.command)}"
        if self.logs:
            text += "\n  last output:" + "".join(f"\n    {line}" for line in self.logs)
        if self.hint:
            text += f"\n  hint: {self.hint}"
        return text

    @staticmethod
    def _of_errno(number: int | None) -> type[DaemonStartError]:
        """Returns the class for an error of the operating system; this one without a number."""
        if number is None:
            return DaemonStartError
        return _start_error_of(type(OSError(number, "")).__name__)


@cache
def _start_error_of(name: str) -> type[DaemonStartError]:
    """Returns the class that is also the built-in one of this name."""
    builtin: type = getattr(builtins, name)

    def reduce(self: DaemonStartError) -> tuple[Any, ...]:
        return _restore_start_error, (name, self.args), self.__dict__

    # One class for each built-in one. Pickled by that, as it is not to be found by its name.
    return type(
        "DaemonStartError",
        (DaemonStartError, builtin),
        {"__module__": __name__, "__doc__": DaemonStartError.__doc__, "__reduce__": reduce},
    )


def _restore_start_error(name: str, args: tuple[Any, ...]) -> DaemonStartError:
    return _start_error_of(name)(*args)


class DaemonNotFound(DaemonStartError, FileNotFoundError):
    """There is no daemon binary to run.

    Args:
        message: What was wanted.
        looked_at: Every place looked at, each with the reason it would not do.
        hint: What to do about it, in one line.
    """

    looked_at: list[str]

    def __init__(
        self, message: str = "", *, looked_at: Sequence[str] = (), hint: str | None = None
    ) -> None:
        super().__init__(message, hint=hint, errno=_errno.ENOENT)
        self.looked_at = list(looked_at)

    def __str__(self) -> str:
        text = str(self.args[0]) if self.args else ""
        text += "".join(f"\n  {place}" for place in self.looked_at)
        return f"{text}\n  hint: {self.hint}" if self.hint else text
