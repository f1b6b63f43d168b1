"""p2pclient's exceptions: this package's own, so that ``except`` catches their subclasses too."""

from p2pclient_rs.exceptions import ControlFailure, DispatchFailure

__all__ = ["ControlFailure", "DispatchFailure"]
