"""Exceptions: their attributes, texts, base classes and pickling."""

from __future__ import annotations

import errno
import pickle

import pytest

from p2pclient_rs import PeerID, exceptions
from p2pclient_rs.exceptions import (
    ConnectionLost,
    ControlFailure,
    ControlTimeout,
    DaemonNotFound,
    DaemonRefused,
    DaemonStartError,
    DaemonUnreachable,
    NotSupported,
    P2PDaemonError,
)

pytestmark = pytest.mark.independent

PEER = PeerID("QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N")
ALL: list[type[P2PDaemonError]] = [getattr(exceptions, name) for name in exceptions.__all__]


def example(kind: type[P2PDaemonError]) -> P2PDaemonError:
    if issubclass(kind, ControlFailure):
        return kind(
            "failed", request="CONNECT", peer_id=PEER, protocol="/x/1", daemon_message="no dial"
        )
    if issubclass(kind, DaemonNotFound):
        return kind("failed", looked_at=["PATH: no p2pd in /bin"])
    if issubclass(kind, DaemonStartError):
        return kind("failed", command=["p2pd", "-b"], returncode=-9, logs=["a", "b"], cause="why")
    return kind("failed")


@pytest.mark.parametrize("kind", ALL)
def test_pickling_preserves_all_attributes(kind: type[P2PDaemonError]) -> None:
    error = example(kind)
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind
    assert copy.args == ("failed",)
    assert vars(copy) == vars(error)
    assert str(copy) == str(error)


def test_control_failure_text_names_the_request_and_the_daemons_message() -> None:
    text = str(example(DaemonRefused))
    assert text == f"failed: no dial (request CONNECT, peer {PEER}, protocol /x/1)"
    hinted = ControlFailure("failed", protocol="/x/1", hint="wait")
    assert str(hinted) == "failed; wait (protocol /x/1)"
    assert str(ControlFailure("failed")) == "failed"
    assert str(ControlFailure(daemon_message="no dial")) == "no dial"
    assert str(ControlFailure("CONNECT failed", request="CONNECT")) == "CONNECT failed"


def test_start_error_text_shows_cause_command_and_output() -> None:
    assert str(example(DaemonStartError)) == (
        "failed: why\n  command: p2pd -b\n  last output:\n    a\n    b"
    )
    assert str(example(DaemonNotFound)) == "failed\n  PATH: no p2pd in /bin"
    hinted = DaemonStartError("failed", command=["p2pd"], logs=["a"], hint="wait")
    assert str(hinted) == "failed\n  command: p2pd\n  last output:\n    a\n  hint: wait"
    assert str(DaemonNotFound("failed", hint="buy one")) == "failed\n  hint: buy one"


@pytest.mark.parametrize(
    ("number", "builtin"),
    [(errno.ENOENT, FileNotFoundError), (errno.EACCES, PermissionError), (errno.EMFILE, OSError)],
)
def test_start_error_with_an_errno_is_also_the_builtin_class(
    number: int, builtin: type[OSError]
) -> None:
    kind = DaemonStartError._of_errno(number)
    error = kind("failed", cause="why", errno=number)
    assert isinstance(error, DaemonStartError) and isinstance(error, builtin)
    assert error.errno == number and str(error) == "failed: why"
    assert type(error).__name__ == "DaemonStartError"
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error) and vars(copy) == vars(error) and copy.args == error.args
    assert DaemonStartError._of_errno(None) is DaemonStartError
    assert not isinstance(DaemonStartError("failed"), OSError)


def test_builtin_classes_catch_the_exceptions() -> None:
    assert issubclass(DaemonUnreachable, ConnectionError)
    assert issubclass(ConnectionLost, ConnectionError)
    assert issubclass(ControlTimeout, TimeoutError)
    assert issubclass(DaemonNotFound, FileNotFoundError)
    assert issubclass(NotSupported, DaemonRefused)
