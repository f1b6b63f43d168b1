"""Failed requests as built-in exceptions: the class, the errno and the file name.

All of these must survive copying and pickling.
"""

from __future__ import annotations

import asyncio
import copy
import errno
import os
import pickle
import resource
import socket
import subprocess
import sys
import textwrap
import traceback
from collections.abc import Awaitable, Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest
from fake_daemon import IDENTITY, Connection, FakeDaemon, frame
from support import new_directory

from p2pclient_rs import Client, PeerID, exceptions
from p2pclient_rs.exceptions import (
    ConnectionLost,
    ControlFailure,
    ControlTimeout,
    DaemonUnreachable,
    combined,
    from_os_error,
)

pytestmark = [pytest.mark.anyio, pytest.mark.independent]

PEER = PeerID(b"\x00\x24\x08\x01\x12\x20" + bytes(range(32)))


async def failure_of(call: Awaitable[object]) -> OSError:
    with pytest.raises(OSError) as caught:
        await call
    return caught.value


def assert_survives_copies(error: Any) -> None:
    """Asserts that a copied and a pickled error equal the original in every respect."""
    for again in (copy.copy(error), pickle.loads(pickle.dumps(error))):
        assert type(again) is type(error)
        for name in ("errno", "strerror", "filename", "args", "__dict__"):
            assert getattr(again, name) == getattr(error, name), name
        assert (str(again), repr(again)) == (str(error), repr(error))


@pytest.fixture
def stale_socket() -> Iterator[str]:
    """Yields the path of a socket file without a listener."""
    path = str(new_directory() / "stale.sock")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
    yield path
    os.unlink(path)


def assert_unreachable(error: OSError, kind: type[OSError], number: int, path: str | None) -> None:
    assert isinstance(error, DaemonUnreachable) and isinstance(error, kind)
    assert isinstance(error, ConnectionError)
    assert (error.errno, error.filename) == (number, path)
    if kind is not socket.gaierror:
        assert error.strerror == os.strerror(number)
    assert error.request == "IDENTIFY"
    assert isinstance(error.__cause__, OSError)
    assert type(error).__name__ == "DaemonUnreachable"
    assert type(error).__module__ == "p2pclient_rs.exceptions"
    printed = traceback.format_exception_only(error)
    assert printed[-1].startswith("p2pclient_rs.exceptions.DaemonUnreachable: no connection")
    assert repr(error).startswith("DaemonUnreachable(")
    assert_survives_copies(error)


async def test_missing_socket_file_raises_file_not_found() -> None:
    path = str(new_directory() / "none.sock")
    error = await failure_of(Client(f"/unix{path}").identify())
    assert_unreachable(error, FileNotFoundError, errno.ENOENT, path)
    assert "p2pclient_rs.Daemon()" in str(error) and "control_maddr" in str(error)


async def test_stale_socket_file_raises_connection_refused(stale_socket: str) -> None:
    error = await failure_of(Client(f"/unix{stale_socket}").identify())
    assert_unreachable(error, ConnectionRefusedError, errno.ECONNREFUSED, stale_socket)
    assert "start the daemon again" in str(error)


async def test_closed_port_raises_connection_refused() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        client = Client(f"/ip4/127.0.0.1/tcp/{free.getsockname()[1]}")
        error = await failure_of(client.identify())
    assert_unreachable(error, ConnectionRefusedError, errno.ECONNREFUSED, None)


async def test_usual_retry_loop_catches_the_errors() -> None:
    tries = 0
    client = Client(f"/unix{new_directory()}/none.sock")
    while True:
        try:
            await client.identify()
        except (FileNotFoundError, ConnectionRefusedError):
            tries += 1
            if tries == 3:
                break
    assert tries == 3


async def test_socket_path_through_a_file_raises_not_a_directory() -> None:
    file = new_directory() / "file"
    file.touch()
    error = await failure_of(Client(f"/unix{file}/control.sock").identify())
    assert_unreachable(error, NotADirectoryError, errno.ENOTDIR, f"{file}/control.sock")


@pytest.mark.skipif(os.geteuid() != 0, reason="requires root, to become another user")
def test_socket_of_another_user_raises_permission_error() -> None:
    code = """if True:
        import asyncio, os, sys
        from p2pclient_rs import Client, DaemonUnreachable
        import anyio._backends._asyncio  # the other user cannot read its file
        os.setuid(65534)
        try:
            asyncio.run(Client(f"/unix{sys.argv[1]}").identify())
        except PermissionError as error:
            assert isinstance(error, DaemonUnreachable)
            print(error.errno, error.filename, "check the permissions" in str(error))
    """
    directory = new_directory()
    directory.chmod(0o755)
    path = directory / "control.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        path.chmod(0o600)
        output = subprocess.check_output([sys.executable, "-c", code, str(path)], text=True)
        path.unlink()
    assert output.split() == [str(errno.EACCES), str(path), "True"]


async def test_unresolvable_name_raises_gaierror() -> None:
    with pytest.raises(socket.gaierror) as caught:
        await Client("/dns4/no-such-host.invalid/tcp/4001").identify()
    error = caught.value
    assert error.errno in (socket.EAI_NONAME, socket.EAI_AGAIN)
    assert_unreachable(error, socket.gaierror, error.errno, None)


def test_lack_of_descriptors_raises_os_error_with_errno() -> None:
    with FakeDaemon(lambda connection: None) as fake:

        async def main() -> OSError:
            client = Client(fake.control_maddr)
            limits = resource.getrlimit(resource.RLIMIT_NOFILE)
            # All descriptors below the lowest free one are in use.
            lowest = os.dup(0)
            os.close(lowest)
            resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, limits[1]))
            try:
                return await failure_of(client.identify())
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, limits)

        error = asyncio.run(main())
    assert_unreachable(error, OSError, errno.EMFILE, None)


# --- lost connections ---


def assert_lost(error: OSError, kind: type[OSError], number: int) -> None:
    assert isinstance(error, ConnectionLost) and isinstance(error, kind)
    assert (error.errno, error.strerror) == (number, os.strerror(number))
    assert type(error).__name__ == "ConnectionLost"
    assert_survives_copies(error)


@pytest.mark.parametrize("answer", [b"", frame(IDENTITY)[:-1]])
async def test_eof_on_the_connection_raises_connection_reset_and_eof_error(answer: bytes) -> None:
    def script(connection: Connection) -> None:
        connection.read_request()
        connection.send(answer)

    with FakeDaemon(script) as fake:
        async with Client(fake.control_maddr) as client:
            error = await failure_of(client.identify())
    assert_lost(error, ConnectionResetError, errno.ECONNRESET)
    assert isinstance(error, EOFError)
    assert isinstance(error, ConnectionLost) and error.mid_answer is bool(answer)


async def test_connection_reset_raises_connection_reset_error() -> None:
    def script(connection: Connection) -> None:
        connection.read_request()
        connection.reset()

    with FakeDaemon(script, "tcp") as fake:
        async with Client(fake.control_maddr) as client:
            error = await failure_of(client.connect(PEER, []))
    assert_lost(error, ConnectionResetError, errno.ECONNRESET)
    assert not isinstance(error, (BrokenPipeError, ConnectionAbortedError))
    assert isinstance(error.__cause__, ConnectionResetError)


async def test_pending_unary_calls_raise_connection_reset_on_loss_and_close() -> None:
    def script(connection: Connection) -> None:
        connection.upgrade()
        while connection.read_message().data != b"end":
            pass

    with FakeDaemon(script) as fake:
        async with Client(fake.control_maddr) as client:
            error = await failure_of(client.call_unary(PEER, "p", b"end"))
            assert_lost(error, ConnectionResetError, errno.ECONNRESET)
            assert isinstance(error, EOFError)

            failures: list[OSError] = []

            async def call() -> None:
                failures.append(await failure_of(client.call_unary(PEER, "p", b"")))

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(call)
                while client.unary.pending_calls == 0:
                    await anyio.sleep(0)
                client.unary.close()
    assert_lost(failures[0], ConnectionResetError, errno.ECONNRESET)


async def test_every_call_waiting_for_an_unreachable_daemon_gets_the_errno() -> None:
    client = Client(f"/unix{new_directory()}/none.sock")
    errors: list[OSError] = []

    async def call() -> None:
        errors.append(await failure_of(client.call_unary(PEER, "p", b"")))

    async with anyio.create_task_group() as tasks:
        for _ in range(3):
            tasks.start_soon(call)
    assert len(errors) == 3
    for error in errors:
        assert isinstance(error, DaemonUnreachable) and isinstance(error, FileNotFoundError)
        assert error.errno == errno.ENOENT and error.request == "CALL_UNARY"
        assert error.filename is not None
    client.unary.close()


async def test_timeout_has_errno_etimedout() -> None:
    def silent(connection: Connection) -> None:
        connection.wait_closed()

    with FakeDaemon(silent) as fake:
        async with Client(fake.control_maddr) as client:
            error = await failure_of(client.identify(timeout=0.05))
    assert isinstance(error, ControlTimeout) and isinstance(error, TimeoutError)
    assert (error.errno, error.strerror) == (errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
    assert_survives_copies(error)


# --- the classes ---

NUMBERS = [
    (errno.ECONNRESET, ConnectionResetError),
    (errno.EPIPE, BrokenPipeError),
    (errno.ECONNABORTED, ConnectionAbortedError),
    (errno.ETIMEDOUT, TimeoutError),
    (errno.EACCES, PermissionError),
    (errno.EINTR, InterruptedError),
    (errno.ENOTCONN, OSError),
]


@pytest.mark.parametrize(("number", "kind"), NUMBERS)
@pytest.mark.parametrize("ours", [ConnectionLost, DaemonUnreachable])
def test_class_follows_the_errno(
    number: int, kind: type[OSError], ours: type[ControlFailure]
) -> None:
    error: Any = from_os_error(ours, "it failed", OSError(number, "as the system says"), "/a/path")
    assert isinstance(error, kind) and isinstance(error, ours)
    assert (error.errno, error.strerror, error.filename) == (
        number,
        "as the system says",
        "/a/path",
    )
    assert str(error) == "it failed"
    assert type(from_os_error(ours, "again", OSError(number, ""))) is type(error)
    vars(error).update(request="CONNECT", peer_id=PEER, extra=["of a program"])
    assert_survives_copies(error)


def test_exception_with_the_builtin_base_is_not_combined_again() -> None:
    assert combined(ConnectionLost, (OSError, ConnectionError)) is ConnectionLost
    assert exceptions.connection_lost("lost").errno == errno.ECONNRESET


def test_pickled_error_loads_in_a_new_process() -> None:
    errors = [
        from_os_error(DaemonUnreachable, "one", FileNotFoundError(2, "no such", "/x")),
        exceptions.connection_lost("two"),
        from_os_error(DaemonUnreachable, "three", socket.gaierror(-2, "unknown")),
    ]
    code = """
        import pickle, socket, sys
        one, two, three = pickle.load(sys.stdin.buffer)
        assert isinstance(one, FileNotFoundError) and one.filename == "/x" and one.errno == 2
        assert isinstance(two, ConnectionResetError) and isinstance(two, EOFError)
        assert isinstance(three, socket.gaierror) and three.errno == -2
        print(*(type(error).__name__ for error in (one, two, three)))
    """
    output = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        input=pickle.dumps(errors),
        stdout=subprocess.PIPE,
        check=True,
    ).stdout
    assert output.split() == [b"DaemonUnreachable", b"ConnectionLost", b"DaemonUnreachable"]


# --- the compatibility layers ---

HIVEMIND = """
import asyncio, errno, pickle, sys
sys.path.insert(0, sys.argv[2])
from p2pclient_rs.compat.hivemind.p2pclient import Client, ControlClient, DaemonConnector, Multiaddr
from p2pclient_rs import exceptions
from hivemind.p2p.p2p_daemon_bindings import utils

def check(error, ours, builtin, number):
    assert isinstance(error, ours), error
    assert isinstance(error, builtin), type(error).__mro__
    assert isinstance(error, utils.ControlFailure), type(error).__mro__
    assert error.errno == number, error.errno
    assert type(error).__name__ == ours.__name__
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error) and again.errno == number and str(again) == str(error)
    assert again.filename == error.filename

async def main():
    nowhere = Multiaddr(f"/unix{sys.argv[1]}")
    for call in (Client.create(nowhere), DaemonConnector(nowhere).open_connection()):
        try:
            await call
        except (FileNotFoundError, ConnectionRefusedError) as error:
            check(error, exceptions.DaemonUnreachable, FileNotFoundError, errno.ENOENT)
            assert error.filename == sys.argv[1]
        else:
            raise AssertionError
    lost = exceptions.connection_lost("lost")
    from p2pclient_rs.compat.hivemind.exceptions import to_hivemind
    check(to_hivemind(lost), exceptions.ConnectionLost, EOFError, errno.ECONNRESET)
    check(to_hivemind(lost), exceptions.ConnectionLost, ConnectionResetError, errno.ECONNRESET)
    timeout = to_hivemind(exceptions.ControlTimeout("late"))
    check(timeout, exceptions.ControlTimeout, TimeoutError, errno.ETIMEDOUT)

asyncio.run(main())
print("done")
"""


def test_exceptions_of_the_hivemind_layer_are_builtin_exceptions_too(tmp_path: Path) -> None:
    import hivemind_tree

    tree = hivemind_tree.make(tmp_path)
    output = subprocess.check_output(
        [sys.executable, "-c", HIVEMIND, f"{tmp_path}/none.sock", str(tree)], text=True
    )
    assert output == "done\n"


async def test_exceptions_of_the_p2pclient_layer_are_builtin_exceptions_too() -> None:
    from multiaddr import Multiaddr

    from p2pclient_rs.compat.p2pclient import Client as P2PClient, ControlFailure as TheirFailure

    path = str(new_directory() / "none.sock")
    error = await failure_of(P2PClient(Multiaddr(f"/unix{path}")).identify())
    assert_unreachable(error, FileNotFoundError, errno.ENOENT, path)
    assert isinstance(error, TheirFailure)


# --- listening ---


async def test_listen_on_an_address_in_use_gives_a_hint() -> None:
    path = new_directory() / "listen.sock"
    first, second = (Client(listen_maddr=f"/unix{path}") for _ in range(2))
    async with first.listen():
        with pytest.raises(OSError, match="pass another listen_maddr") as caught:
            async with second.listen():
                pass
        assert caught.value.errno == errno.EADDRINUSE
