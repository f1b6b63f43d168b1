"""p2pclient's exceptions, which are this package's own, so that its subclasses are caught too."""

from p2pclient_rs.exceptions import ControlFailure, DispatchFailure

__all__ = ["ControlFailure", "DispatchFailure"]
