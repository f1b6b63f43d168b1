"""The exceptions of the package. The class says who failed, and when.

    P2PDaemonError
    ├── ControlFailure              a request to the daemon failed
    │   ├── DaemonRefused           the daemon replied with an error
    │   │   └── NotSupported        … because it does not support the request
    │   ├── AlreadyRegistered       there is a handler for the protocol (a DaemonRefused, if another
    │   │                           client has it)
    │   ├── NotRegistered           there is no handler to remove (a DaemonRefused, if the daemon
    │   │                           found out)
    │   ├── DaemonUnreachable       no connection to the control socket (an OSError)
    │   ├── ConnectionLost          the connection ended before the reply (an OSError)
    │   ├── ControlTimeout          no reply in time (a TimeoutError)
    │   ├── ProtocolViolation       the daemon violated the protocol
    │   ├── MessageTooLarge         a sent or received message exceeds the limit
    │   └── ForkedClientError       a client was used in a forked child of its process
    ├── DispatchFailure             an inbound stream could not be passed to a handler
    └── DaemonStartError            a daemon process did not start (an OSError, if the operating
        │                           system refused something: a PermissionError, …)
        └── DaemonNotFound          … because there is no binary (a FileNotFoundError)
    P2PHandlerError                 a peer's unary handler failed, not the daemon

An exception with an operating-system error behind it has the ``errno``, ``strerror`` and
``filename`` of that error, and is also an instance of the built-in class for the number. So
``except FileNotFoundError`` or ``except ConnectionRefusedError`` catches a ``DaemonUnreachable``
with that cause, and ``except BrokenPipeError`` a ``ConnectionLost`` caused by a broken pipe.

All exceptions can be pickled and copied. Attributes are in the instance's ``__dict__``, and
``args`` is the message alone.

Example:
    try:
        await client.connect(peer_id, ["/ip4/127.0.0.1/tcp/1"], timeout=5)
    except DaemonRefused as error:
        print("refused:", error.daemon_message)
    except ControlTimeout:
        print("no reply in time")
    except ControlFailure as error:
        print(error.request, "failed:", error)
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
        hint: str | None


__all__ = [
    "AlreadyRegistered",
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
    "NotRegistered",
    "NotSupported",
    "P2PDaemonError",
    "P2PHandlerError",
    "ProtocolViolation",
]


class P2PDaemonError(Exception):
    """The base class of all exceptions of this package, except ``P2PHandlerError``."""

    def __reduce__(self) -> tuple[object, ...]:
        return rebuild, parts(self)


#: The classes made by `combined`, keyed by its arguments.
_COMBINED: dict[tuple[type[Exception], tuple[type[Exception], ...]], type[Exception]] = {}

#: The attributes of an OSError besides its arguments.
_OS_FIELDS = "errno", "strerror", "filename", "filename2"

E = TypeVar("E", bound="ControlFailure")


class ControlFailure(P2PDaemonError):
    """A request to the daemon failed. The subclass says at what point.

    Args:
        message: What went wrong, without the context in the other arguments.
        request: The request's name in the protocol, such as ``"CONNECT"`` or ``"DHT GET_VALUE"``.
        peer_id: The peer that the request was about.
        protocol: The protocol id that the request was about, or several separated by commas.
        daemon_message: The daemon's error message.
        hint: The next step in one line, if one is known.
    """

    request: str | None
    peer_id: PeerID | None
    protocol: str | None
    daemon_message: str | None
    hint: str | None
    #: Whether its text is the message alone. hivemind's users compare that text.
    _terse: bool = False
    #: In a class made by `combined`: the arguments of that call.
    _made_of: tuple[type[Exception], tuple[type[Exception], ...]] | None = None

    def __init__(
        self,
        message: str = "",
        *,
        request: str | None = None,
        peer_id: PeerID | None = None,
        protocol: str | None = None,
        daemon_message: str | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(message)
        self.request = request
        self.peer_id = peer_id
        self.protocol = protocol
        self.daemon_message = daemon_message
        self.hint = hint

    def __str__(self) -> str:
        text = str(self.args[0]) if self.args else ""
        if self._terse:
            return text
        if self.daemon_message and self.daemon_message not in text:
            text = f"{text}: {self.daemon_message}" if text else self.daemon_message
        if self.hint:
            text = f"{text}; {self.hint}"
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
        # Includes the daemon's message: programs log the repr, and hivemind sends it to callers.
        return f"{type(self).__name__}({str(self)!r})"


def combined(kind: type[Exception], also: tuple[type[Exception], ...]) -> type[Exception]:
    """Returns a subclass of ``kind`` and of all of ``also``, with the name of ``kind``.

    Args:
        kind: A class of this package.
        also: Other exception classes. Base classes of ``kind`` are ignored.
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
        # If another thread has made the class meanwhile, use that one.
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
    """Creates an exception of this package for an operating-system error.

    Args:
        kind: The class, a subclass of OSError.
        message: The message.
        number: The ``errno``. The result is also an instance of the built-in class for it, for
            example FileNotFoundError for ENOENT.
        strerror: The text for the number; the system's by default.
        filename: The path that the error is about.
        also: More base classes of the result.
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
    """Creates an exception with the number, text, class and file name of ``cause``."""
    # Errors of name resolution have their own numbers, without built-in classes.
    if isinstance(cause, (socket.gaierror, socket.herror)):
        error = with_errno(kind, message, None, strerror=cause.strerror, also=(type(cause),))
        error.errno = cause.errno  # type: ignore[attr-defined]
        return error
    path = cause.filename if isinstance(cause.filename, str) else filename
    return with_errno(kind, message, cause.errno, strerror=cause.strerror, filename=path)


def connection_lost(message: str, number: int | None = None) -> ConnectionLost:
    """Creates a ``ConnectionLost`` with an ``errno``; the default is ECONNRESET."""
    return with_errno(ConnectionLost, message, number)


def parts(error: Exception) -> tuple[Any, ...]:
    """Returns the arguments with which ``rebuild`` creates a copy of ``error``.

    Pickle's default would not work: it finds a class by its name, which a combined class shares
    with another class, and it drops an ``errno`` that is not in ``args``.
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
    """Creates an exception from its ``parts``."""
    error = combined(kind, also)(*args)
    for name, value in zip(_OS_FIELDS, fields, strict=True):
        if value is not None:
            setattr(error, name, value)
    error.__dict__.update(attributes)
    return error


class DaemonRefused(ControlFailure):
    """The daemon replied with an error; ``daemon_message`` is its message."""


class NotSupported(DaemonRefused):
    """This daemon does not support the request: it is another kind of daemon or an older version,
    or the feature is off."""


class AlreadyRegistered(ControlFailure):
    """There is already a handler for the protocol.

    If another client of the daemon has registered it, the daemon has refused the request: the
    exception is also a ``DaemonRefused``, with a ``daemon_message``. If this client has, nothing
    was sent. The ``hint`` names the next step.

    Example:
        async def double(request: bytes, caller: PeerID) -> bytes:
            return 2 * request

        try:
            await client.add_unary_handler("double", double)
        except AlreadyRegistered as error:
            print(error.protocol, "is taken:", error.hint)
    """


class NotRegistered(ControlFailure):
    """This client has no handler for the protocol, so it can remove none.

    If the daemon found out, the exception is also a ``DaemonRefused``, with a ``daemon_message``.
    """


def already_registered(proto: str | None, hint: str) -> AlreadyRegistered:
    """Returns the exception for a second handler of the same client."""
    return AlreadyRegistered(f"Handler for protocol {proto} already registered", hint=hint)


class DaemonUnreachable(ControlFailure, ConnectionError):
    """The client could not connect to the daemon's control socket: nothing was sent.

    It is also an instance of the built-in class for its ``errno``: FileNotFoundError if there is no
    socket, ConnectionRefusedError if no daemon listens on it, PermissionError, or
    ``socket.gaierror``.
    """


class ConnectionLost(ControlFailure, ConnectionResetError, EOFError):
    """The control connection ended before the reply: the daemon may have executed the request.

    It is a ConnectionResetError and an EOFError. The ``errno`` is ECONNRESET unless the operating
    system reported another one; then it is also an instance of the built-in class for that, for
    example BrokenPipeError.

    Attributes:
        unexecuted: Whether the daemon cannot have executed the request, because it did not read all
            of it.
        mid_answer: Whether a part of the reply had arrived.
    """

    unexecuted: bool = False
    mid_answer: bool = False

    errno: int | None
    strerror: str | None

    def __init__(self, message: str = "", **context: Unpack[_Context]) -> None:
        super().__init__(message, **context)
        self.errno, self.strerror = errno.ECONNRESET, os.strerror(errno.ECONNRESET)


class ControlTimeout(ControlFailure, TimeoutError):
    """The daemon did not reply in time: it may have executed the request."""

    errno: int | None
    strerror: str | None

    def __init__(self, message: str = "", **context: Unpack[_Context]) -> None:
        super().__init__(message, **context)
        self.errno, self.strerror = errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT)


def timed_out(timeout: float | None) -> ControlTimeout:
    """Returns the exception for a request without a reply within this time, in seconds."""
    return ControlTimeout(f"no answer within {timeout:g} s")


class ProtocolViolation(ControlFailure):
    """The daemon violated the control protocol."""


class MessageTooLarge(ControlFailure):
    """A message exceeds a limit. Only this call fails; the connection stays usable.

    If the request was too large, it was not sent. If the reply was, it was skipped, but the handler
    ran.

    Attributes:
        size: The size of the message, in bytes.
        limit: The limit, in bytes; None if there was no memory for the message.
        received: Whether the message is a reply. Otherwise nothing was sent.
    """

    size: int | None = None
    limit: int | None = None
    received: bool = False


class ForkedClientError(ControlFailure):
    """A client was used in a forked child of its process. Create a new one in the child."""


class P2PHandlerError(Exception):
    """The called peer's unary handler failed. The daemons are not at fault, so this is no
    ``P2PDaemonError``, as in hivemind.

    Args:
        message: The peer's message. Handlers of this package and of hivemind send the ``repr`` of
            the exception.
        peer_id: The called peer.
        protocol: The name of the handler.
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
    """An inbound stream could not be passed to a handler."""


class DaemonStartError(P2PDaemonError):
    """A daemon process could not be started, died, or did not reply in time.

    If the operating system refused something that the start needs, this is also an instance of the
    built-in class for that error, such as PermissionError.

    Args:
        message: What happened.
        command: The command line.
        returncode: The exit status, negative for a signal; None if the daemon never ran or was
            still running.
        logs: The last lines of the daemon's output.
        cause: The cause in one line, if it is known. It names the file or the operation that the
            operating system refused.
        hint: A fix in one line, if one is known.
        errno: The number of the operating-system error, if there was one.
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
        """Returns the class for an operating-system error; this class if there is no number."""
        also = () if number is None else (type(OSError(number, "")),)
        return cast("type[DaemonStartError]", combined(DaemonStartError, also))


class DaemonNotFound(DaemonStartError, FileNotFoundError):
    """There is no daemon binary to run.

    Args:
        message: The message.
        looked_at: All places searched, each with the reason for its rejection.
        hint: A fix in one line.
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
