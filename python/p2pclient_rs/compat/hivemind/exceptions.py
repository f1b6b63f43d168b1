"""Exceptions that are both hivemind's and this package's.

For each subclass of ``ControlFailure``, and for ``P2PHandlerError``, this module has a class of the
same name that is derived from both this package's class and hivemind's. hivemind pickles exceptions
to pass them between its processes. These can also be unpickled where hivemind is not installed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from p2pclient_rs import exceptions
from p2pclient_rs.compat import hivemind_copies

from .datastructures import PeerID
from .original import PACKAGE, import_bindings

if TYPE_CHECKING:
    from hivemind.p2p.p2p_daemon_bindings.utils import (
        ControlFailure,
        DispatchFailure,
        P2PDaemonError,
        P2PHandlerError,
    )
else:
    _theirs = import_bindings("utils") or exceptions
    ControlFailure, DispatchFailure = _theirs.ControlFailure, _theirs.DispatchFailure
    P2PDaemonError, P2PHandlerError = _theirs.P2PDaemonError, _theirs.P2PHandlerError

__all__ = ["ControlFailure", "DispatchFailure", "P2PDaemonError", "P2PHandlerError", "to_hivemind"]

_CLASSES: dict[type[Exception], type[Exception]] = {}


def _reduce(error: Exception) -> tuple[Any, ...]:
    *others, state = exceptions.parts(error)
    peer_id = state.get("peer_id")
    if peer_id is not None:
        # As bytes: the unpickling process makes its own PeerID of them, with or without hivemind.
        state["peer_id"] = peer_id.to_bytes()
    return hivemind_copies.reduce_exception(PACKAGE, _load, *others, state)


def _load(*parts: Any) -> Exception:
    error = exceptions.rebuild(*parts)
    peer_id = error.__dict__.get("peer_id")
    if peer_id is not None:
        error.__dict__["peer_id"] = PeerID(peer_id)
    return error


def _define_class(ours: type[Exception], theirs: type[Exception]) -> None:
    name = f"_{ours.__name__}" if ours.__name__ in __all__ else ours.__name__
    if not issubclass(ours, theirs):
        namespace = {
            "__module__": __name__,
            "__qualname__": name,
            "__doc__": ours.__doc__,
            "__reduce__": _reduce,
        }
        cls: Any = type(ours.__name__, (ours, theirs), namespace)
    else:
        cls = ours
    globals()[name] = _CLASSES[ours] = cls


for _name in exceptions.__all__:
    _ours = getattr(exceptions, _name)
    if issubclass(_ours, exceptions.ControlFailure):
        _define_class(_ours, ControlFailure)
_define_class(exceptions.P2PHandlerError, P2PHandlerError)


def to_hivemind(error: Exception) -> Exception:
    """Converts an exception of this package into one that is also hivemind's.

    Returns:
        The new exception; ``error`` itself if hivemind is not installed or has no such exception.
    """
    kind, also, *others = exceptions.parts(error)
    cls = _CLASSES.get(kind)
    if cls is None or cls is kind:
        return error
    twin = exceptions.rebuild(cls, also, *others)
    twin.__cause__ = error.__cause__
    twin.__suppress_context__ = error.__suppress_context__
    return twin.with_traceback(error.__traceback__)
