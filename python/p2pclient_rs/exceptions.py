"""The exceptions of the package: who failed, at what, and in whose words.

    P2PDaemonError
    ├── ControlFailure              a request to the daemon failed
    │   ├── DaemonRefused           the daemon answered with an error
    │   │   └── NotSupported        … because it cannot do this at all
    │   ├── DaemonUnreachable       no connection to the control socket (an OSError)
    │   ├── ConnectionLost          the connection ended before the answer (an OSError)
    │   ├── ControlTimeout          no answer in time (a TimeoutError)
    │   ├── ProtocolViolation       the daemon sent what the protocol does not allow
    │   ├── MessageTooLarge         a sent or received message exceeds the limit
    │   └── ForkedClientError       a client was used in a forked child of its process
    ├── DispatchFailure             an inbound stream could not be given to a handler
    └── DaemonStartError            a daemon process did not come up (an OSError, if the operating
        │                           system refused something: a PermissionError, …)
        └── DaemonNotFound          … for there is no binary to run (a FileNotFoundError)
    P2PHandlerError                 a peer's unary handler failed, not the daemon

Those that an error of the operating system caused have its ``errno``, ``strerror`` and
``filename``, and are instances of the built-in class for that number, too:
``except FileNotFoundError`` and ``except ConnectionRefusedError`` catch a ``DaemonUnreachable``,
``except ConnectionResetError`` and ``except BrokenPipeError`` a ``ConnectionLost``, each where that
is what happened.

All can be pickled and copied. Attributes live in the instance's ``__dict__``, and ``args`` is the
message alone.
"""

from __future__ import annotations

import errno
import os
import shlex
import socket
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar, cast

if TYPE_CHECKING:
    from typing import TypedDict

    from typing_extensions import Unpack

    from p2pclient_rs._native import PeerID

    class _Context(TypedDict, total=False):
        """The keyword arguments of ``ControlFailure``."""

        request: str | None
        peer_id: PeerID | None
        protocol: str | None
        daemon_message: str | None


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

    def __reduce__(self) -> tuple[object, ...]:
        return rebuild, parts(self)


#: The classes made by `combined`, by its arguments.
_COMBINED: dict[tuple[type[Exception], tuple[type[Exception], ...]], type[Exception]] = {}

#: What an OSError has besides its arguments.
_OS_FIELDS = "errno", "strerror", "filename", "filename2"

E = TypeVar("E", bound="ControlFailure")


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
    #: Whether its text is the message alone, for hivemind, whose users compare that.
    _terse: bool = False
    #: For a class made by `combined`: its arguments.
    _made_of: tuple[type[Exception], tuple[type[Exception], ...]] | None = None

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


def combined(kind: type[Exception], also: tuple[type[Exception], ...]) -> type[Exception]:
    """Returns the subclass of ``kind`` and of all of ``also``, which has the name of ``kind``.

    Args:
        kind: A class of this package.
        also: Built-in classes; those of which ``kind`` is a subclass already are ignored.
    """
    also = tuple(base for base in also if not issubclass(kind, base))
    if not also:
        return kind
    made = _COMBINED.get((kind, also))
    if made is None:
        namespace = {
            "__module__": kind.__module__,
            "__qualname__": kind.__qualname__,
            "__doc__": kind.__doc__,
            "_made_of": (kind, also),
        }
        # Another thread may have made it meanwhile: all use the same one.
        made = _COMBINED.setdefault((kind, also), type(kind.__name__, (kind, *also), namespace))
    return made


def with_errno(
    kind: type[E],
    message: str,
    number: int | None,
    *,
    strerror: str | None = None,
    filename: str | None = None,
    also: tuple[type[Exception], ...] = (),
) -> E:
    """Makes an exception of ours that an operating-system error caused.

    Args:
        kind: The class, a subclass of OSError.
        message: The message.
        number: The ``errno``; with it the result is an instance of the built-in class for that
            number, too, as FileNotFoundError for ENOENT.
        strerror: The words for it; the system's if none.
        filename: The path it was about.
        also: More base classes for the result.
    """
    if number is not None:
        also = (type(OSError(number, "")), *also)
        if strerror is None:
            strerror = os.strerror(number)
    error: Any = combined(kind, also)(message)
    if strerror is not None:
        error.errno, error.strerror = number, strerror
    if filename is not None:
        error.filename = filename
    return error  # type: ignore[no-any-return]


def from_os_error(kind: type[E], message: str, cause: OSError, filename: str | None = None) -> E:
    """As ``with_errno``, with the number, words, class and file name of ``cause``."""
    # The numbers of a failed name resolution are others, which no built-in class stands for.
    if isinstance(cause, (socket.gaierror, socket.herror)):
        error = with_errno(kind, message, None, strerror=cause.strerror, also=(type(cause),))
        error.errno = cause.errno  # type: ignore[attr-defined]
        return error
    path = cause.filename if isinstance(cause.filename, str) else filename
    return with_errno(kind, message, cause.errno, strerror=cause.strerror, filename=path)


def connection_lost(message: str, number: int | None = None) -> ConnectionLost:
    """Makes a ``ConnectionLost`` with an ``errno``; ECONNRESET if none."""
    return with_errno(ConnectionLost, message, number)


def parts(error: Exception) -> tuple[Any, ...]:
    """The arguments with which ``rebuild`` makes a copy of ``error``.

    A combined class cannot be pickled by its name, which is the other's, and neither can an errno
    that is not in ``args``.
    """
    kind, also = getattr(error, "_made_of", None) or (type(error), ())
    fields = tuple(getattr(error, name, None) for name in _OS_FIELDS)
    return kind, also, error.args, fields, dict(error.__dict__)


def rebuild(
    kind: type[Exception],
    also: tuple[type[Exception], ...],
    args: tuple[object, ...],
    fields: tuple[object, ...],
    attributes: dict[str, Any],
) -> Exception:
    """An exception from its ``parts``."""
    error = combined(kind, also)(*args)
    for name, value in zip(_OS_FIELDS, fields, strict=True):
        if value is not None:
            setattr(error, name, value)
    error.__dict__.update(attributes)
    return error


class DaemonRefused(ControlFailure):
    """The daemon answered with an error; its words are in ``daemon_message``."""


class NotSupported(DaemonRefused):
    """This daemon cannot do what was asked: another kind, an older version, or not switched on."""


class DaemonUnreachable(ControlFailure, ConnectionError):
    """No connection to the daemon's control socket could be made: nothing was sent.

    It is an instance of the built-in class for its ``errno``, too: FileNotFoundError if there is no
    socket, ConnectionRefusedError if nothing listens at it, PermissionError, ``socket.gaierror``.
    """

    #: The message without what to do about it, for those who say that themselves.
    _without_hint: str | None = None


class ConnectionLost(ControlFailure, ConnectionResetError, EOFError):
    """The control connection ended before the answer: the request may have been carried out.

    It is a ConnectionResetError and an EOFError, and the ``errno`` is ECONNRESET, unless the
    operating system gave another: then it is an instance of the built-in class for that, too, as
    BrokenPipeError.

    Attributes:
        unexecuted: It cannot have been: the daemon did not read the whole request.
        mid_answer: The answer had begun to come.
    """

    unexecuted: bool = False
    mid_answer: bool = False

    errno: int | None
    strerror: str | None

    def __init__(self, message: str = "", **context: Unpack[_Context]) -> None:
        super().__init__(message, **context)
        self.errno, self.strerror = errno.ECONNRESET, os.strerror(errno.ECONNRESET)


class ControlTimeout(ControlFailure, TimeoutError):
    """The daemon did not answer in time: the request may have been carried out."""

    errno: int | None
    strerror: str | None

    def __init__(self, message: str = "", **context: Unpack[_Context]) -> None:
        super().__init__(message, **context)
        self.errno, self.strerror = errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT)


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
        also = () if number is None else (type(OSError(number, "")),)
        return cast("type[DaemonStartError]", combined(DaemonStartError, also))


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
        super().__init__(message, hint=hint, errno=errno.ENOENT)
        self.looked_at = list(looked_at)

    def __str__(self) -> str:
        text = str(self.args[0]) if self.args else ""
        text += "".join(f"\n  {place}" for place in self.looked_at)
        return f"{text}\n  hint: {self.hint}" if self.hint else text
