"""Shutdown of event loops, threads and the interpreter; garbage collection; memory limits; private
sockets. See docs/reliability.md."""

from __future__ import annotations

import ast
import asyncio
import gc
import logging
import os
import re
import socket
import stat
import subprocess
import sys
import textwrap
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest
import uvloop
from fake_daemon import (
    IDENTITY,
    OK,
    PATIENCE,
    PEER,
    STREAM_INFO,
    STREAM_OPENED,
    Connection,
    FakeDaemon,
    acknowledgement,
    decode,
    dht,
    field,
    frame,
    incoming,
    reply,
    varint,
)
from support import BACKENDS, all_of, new_directory, open_descriptors, until

import p2pclient_rs
from p2pclient_rs import Client, Daemon, ProtocolViolation, Stream, Subscription
from p2pclient_rs.connector import DaemonConnector

HERE = Path(__file__).parent
PACKAGE = Path(p2pclient_rs.__file__).parent
CALL_ID = bytes(range(16))
LOOPS = ["asyncio", "uvloop", "trio"]


def python(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Runs Python with the tests' modules on its path."""
    path = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    quiet = "ignore:p2pclient_rs was built without optimisation:RuntimeWarning"
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONWARNINGS": quiet}
    environment.pop(
        "PYTHONASYNCIODEBUG", None
    )  # asyncio's warnings about slow callbacks depend on the machine
    return subprocess.run(
        [sys.executable, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


def program(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return python("-c", textwrap.dedent(code), *arguments)


# --- interpreter shutdown ---

#: Request types of the control protocol.
IDENTIFY, STREAM_OPEN, STREAM_HANDLER, DHT, PUBSUB, PERSISTENT = 0, 2, 3, 4, 8, 9


def accept_everything(connection: Connection) -> None:
    """A daemon that accepts every request, and then sends nothing more."""
    while True:
        request = decode(connection.read_request())
        kind = request[1]
        if kind == DHT:
            continue  # never answered
        if kind == PERSISTENT:
            connection.send(frame(OK))
            added = connection.read_message()
            connection.send(frame(acknowledgement(added.call_id)))
            connection.send(frame(incoming(CALL_ID, "handler", b"data")))
            connection.wait_closed()
            return
        if kind == IDENTIFY:
            connection.send(frame(IDENTITY))
        elif kind == STREAM_OPEN:
            connection.send(frame(STREAM_OPENED))
            hold(connection)
            return
        elif kind == STREAM_HANDLER:
            connection.send(frame(OK))
            handler = request[4]
            assert isinstance(handler, bytes)
            address = decode(handler)[1]
            assert isinstance(address, bytes)
            knock(address[3:].decode())  # skips the multiaddr code of /unix and the length
        else:
            connection.send(frame(OK))
            if kind == PUBSUB:
                hold(connection)
                return


def hold(connection: Connection) -> None:
    """Reads nothing until the client closes the connection."""
    import select

    poll = select.poll()
    poll.register(connection.socket, select.POLLRDHUP)
    poll.poll(PATIENCE * 1000)


def knock(path: str) -> None:
    """Opens an inbound stream and leaves it open."""
    inbound = socket.socket(socket.AF_UNIX)
    inbound.connect("/" + path.lstrip("/"))
    info = STREAM_INFO.replace(b"/echo", b"/served").replace(b"\x1a\x05", b"\x1a\x07")
    inbound.sendall(frame(info))
    knocking.append(inbound)


knocking: list[socket.socket] = []


@pytest.fixture
def openable() -> Iterator[FakeDaemon]:
    with FakeDaemon(accept_everything) as daemon:
        yield daemon
        while knocking:
            knocking.pop().close()


HOWS = ["return", "forget", "exit", "raise", "thread", "stop"]


@pytest.mark.parametrize(
    ("loop", "how"),
    # trio.run cannot be stopped midway.
    [(loop, how) for loop in LOOPS for how in HOWS if (loop, how) != ("trio", "stop")],
)
def test_exit_with_everything_open_is_silent(loop: str, how: str, openable: FakeDaemon) -> None:
    listen = f"/unix{new_directory() / 'l'}"
    ended = python(HERE / "open_end.py", openable.control_maddr, listen, loop, how)
    printed = ended.stdout.split()
    assert printed[:3] == ["idle", "unary", "streams"], ended.stderr
    if how == "raise":
        # There is only the exception raised on purpose.
        assert ended.stderr.startswith("Traceback") and ended.stderr.count("Traceback") == 1
        assert ended.stderr.endswith("KeyError: 'meant'\n")
        assert ended.returncode == 1
        return
    assert ended.stderr == ""
    assert ended.returncode == {"exit": 3}.get(how, 0)
    if how in ("return", "forget", "thread"):
        assert printed[3:] == ["tasks"]
    Path(listen.removeprefix("/unix")).unlink(
        missing_ok=True
    )  # left by a thread that was never stopped


LATE = """
import asyncio, sys, threading, time
from p2pclient_rs._native import Readiness, _wait_before_finalization

closed = asyncio.new_event_loop()
closed.close()

class Loop:
    create_future = closed.create_future
    def add_reader(self, *_):
        # Called from Rust. The sleep releases the GIL while the interpreter shuts down.
        entered.set()
        time.sleep({nap})
        print("woke", flush=True)
    def is_closed(self): return True

def wait():
    while True:
        Readiness(Loop(), 0, None, None).readable()

entered = threading.Event()
threading.Thread(target=wait, daemon=True).start()
entered.wait()
"""


def test_thread_inside_rust_does_not_abort_the_process_at_exit() -> None:
    # Before Python 3.14 a thread that wants the GIL after shutdown has begun is unwound, and
    # unwinding through Rust aborts the process.
    ended = program(LATE.format(nap=0.2))
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout == "woke\n"


def test_exit_handler_may_wait_for_a_thread_inside_rust() -> None:
    code = (
        LATE.format(nap=0) + "entered.clear(); _wait_before_finalization(); assert entered.wait(10)"
    )
    ended = program(code)
    assert (ended.returncode, ended.stderr) == (0, "")


BUSY = """
import sys, threading
import anyio
from fake_daemon import PEER
from p2pclient_rs import Client

async def main():
    client = Client(sys.argv[1])

    async def call():
        while True:
            await client.call_unary(PEER, "echo", b"data")
            started.set()

    async with anyio.create_task_group() as tasks:
        for _ in range(32):
            tasks.start_soon(call)

options = {"use_uvloop": True} if sys.argv[2] == "uvloop" else {}
backend = "trio" if sys.argv[2] == "trio" else "asyncio"
started = threading.Event()
sys.setswitchinterval(1e-5)
work = lambda: anyio.run(main, backend=backend, backend_options=options)
threading.Thread(target=work, daemon=True).start()
assert started.wait(20)
"""


@pytest.mark.parametrize("loop", LOOPS)
def test_exit_with_a_busy_loop_in_another_thread_is_silent(loop: str) -> None:
    def echo(connection: Connection) -> None:
        connection.upgrade()
        while True:
            message = connection.read_message()
            if message.kind == "call":
                connection.send(frame(reply(message.call_id, message.data)))

    with FakeDaemon(echo) as daemon:
        for _ in range(5):
            ended = program(BUSY, daemon.control_maddr, loop)
            assert (ended.returncode, ended.stderr) == (0, "")


@pytest.mark.parametrize("loop", LOOPS)
def test_daemon_still_running_at_exit_is_stopped_silently(loop: str) -> None:
    code = """
        import sys
        import anyio
        from p2pclient_rs import Daemon

        async def main():
            global daemon, client
            daemon = await Daemon().start()
            client = daemon.client()
            await client.identify()
            print(daemon.pid)

        options = {"use_uvloop": True} if sys.argv[1] == "uvloop" else {}
        backend = "trio" if sys.argv[1] == "trio" else "asyncio"
        anyio.run(main, backend=backend, backend_options=options)
    """
    ended = program(code, loop)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert not Path(f"/proc/{ended.stdout.strip()}").exists()


# --- free-threaded Python, subinterpreters, panics ---


def test_free_threaded_python_is_refused_with_the_reason() -> None:
    ended = program(
        """
        import sys
        sys.abiflags = "t"
        import p2pclient_rs
        """
    )
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1] == (
        "ImportError: p2pclient_rs does not support free-threaded Python: use a build with the GIL"
    )


def test_subinterpreter_is_refused_and_the_main_one_keeps_working() -> None:
    code = """
        import p2pclient_rs
        try:
            import _interpreters as interpreters  # new in Python 3.13
        except ImportError:
            import _xxsubinterpreters as interpreters
        inner = interpreters.create()
        failed = "ran"
        try:
            result = interpreters.{run}(inner, "import p2pclient_rs")
            if result is not None:
                failed = str(result.type.__name__) + ": " + str(result.msg)
        except Exception as error:
            failed = str(error)
        print(failed)
        interpreters.destroy(inner)
        print(p2pclient_rs.PeerID.from_base58 is not None)
    """
    run = "exec" if sys.version_info >= (3, 13) else "run_string"
    ended = program(code.replace("{run}", run))
    assert (ended.returncode, ended.stderr) == (0, "")
    why, works = ended.stdout.splitlines()
    assert "ImportError" in why and "subinterpreters" in why
    assert works == "True"


def test_no_profile_aborts_on_panic() -> None:
    # The extension module also refuses to compile with panic = "abort".
    manifest = (HERE.parent / "Cargo.toml").read_text()
    assert "[profile.release]" in manifest
    assert not re.search(r"^\s*panic\s*=", manifest, re.MULTILINE)
    for source in HERE.parent.glob("src/python/**/*.rs"):
        # Rust functions called from C: a panic in one cannot unwind, and aborts the process. The
        # function in fork_guard.rs only sets a number to 0.
        called = re.findall(r'extern "[^"]*"\s+fn (\w+)', source.read_text())
        assert called == (["forget"] if source.name == "fork_guard.rs" else []), source


# --- garbage collection ---


def unclosed(control: str, *, unsent: int = 0) -> Callable[[], Any]:
    """Opens one of everything that has a descriptor and no task, in reference cycles.

    With ``unsent``, leaves unsent data in the stream, which asyncio then keeps alive.
    """

    async def open_all() -> list[Any]:
        client = Client(control)
        await client.identify()
        called = anyio.Event()

        async def handler(data: bytes, peer: object) -> bytes:
            called.set()
            return data

        await client.add_unary_handler("handler", handler)
        await called.wait()
        _, stream = await client.stream_open(PEER, ["/echo"])
        stream.write(bytes(unsent))
        with anyio.move_on_after(0.01):
            await stream.receive()  # registers the descriptor with the loop
        subscription = await client.pubsub_subscribe("topic")
        raw = await DaemonConnector(control).open_connection()
        everything: list[Any] = [client, stream, subscription, raw]
        for thing in everything:
            thing.everything = everything
        return everything

    return open_all


@pytest.mark.anyio
async def test_objects_collected_in_cycles_close_their_descriptors(
    openable: FakeDaemon,
) -> None:
    before = open_descriptors()
    everything = await unclosed(openable.control_maddr)()
    assert [type(thing) for thing in everything] == [Client, Stream, Subscription, Stream]
    await until(lambda: len(open_descriptors()) == len(before) + 2 * 4)
    del everything
    gc.collect()
    # This process also has the descriptors of the other ends.
    await until(lambda: len(open_descriptors()) <= len(before))


@pytest.mark.parametrize("cycles", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_objects_collected_after_their_loop_close_their_descriptors(
    backend: Any, cycles: bool, openable: FakeDaemon
) -> None:
    before = open_descriptors()
    name, options = backend
    work = unclosed(openable.control_maddr, unsent=4 << 20)
    left = anyio.run(work, backend=name, backend_options=options)
    inodes = {os.readlink(f"/proc/self/fd/{thing._raw.fileno()}") for thing in left[1:]}
    assert len(inodes) == 3
    while not cycles and left:
        del left.pop().everything
    del left
    gc.collect()
    assert not inodes & set(open_descriptors())
    anyio.run(lambda: until(lambda: len(open_descriptors()) <= len(before) + 20))
    anyio.run(lambda: until(lambda: openable.open == 0))


@pytest.mark.parametrize("backend", BACKENDS)
def test_cancelled_calls_close_their_descriptors_after_their_loop(
    backend: Any, openable: FakeDaemon
) -> None:
    async def main() -> None:
        client = Client(openable.control_maddr)
        _, stream = await client.stream_open(PEER, ["/echo"])
        await all_of([cancelled(client.dht_get_value(b"key")), cancelled(stream.receive())])

    async def cancelled(call: Any) -> None:
        with anyio.move_on_after(0.05):
            await call

    name, options = backend
    anyio.run(main, backend=name, backend_options=options)
    gc.collect()
    anyio.run(lambda: until(lambda: openable.open == 0))


@pytest.mark.parametrize("backend", BACKENDS[:2])  # trio leaves no tasks behind
def test_waiting_tasks_of_an_abandoned_loop_close_their_descriptors(
    backend: Any, openable: FakeDaemon, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> list[asyncio.Task[bytes]]:
        streams = [
            await DaemonConnector(openable.control_maddr).open_connection() for _ in range(10)
        ]
        reading = [asyncio.ensure_future(stream.read(1)) for stream in streams]
        await until(lambda: all(stream._reading for stream in streams))
        return reading

    caplog.set_level(logging.CRITICAL, "asyncio")  # asyncio warns about pending tasks
    for _ in range(3):  # a later round reuses descriptors leaked by an earlier one
        loop = uvloop.new_event_loop() if backend[1]["use_uvloop"] else asyncio.new_event_loop()
        left = [weakref.ref(task) for task in loop.run_until_complete(main())]
        loop.close()
        del loop
        gc.collect()
        assert [task() for task in left] == [None] * 10
    anyio.run(lambda: until(lambda: openable.open == 0))


# --- private sockets ---


@pytest.fixture
def no_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


@pytest.mark.anyio
@pytest.mark.usefixtures("no_umask")
async def test_sockets_are_private_whatever_the_umask(tmp_path: Path) -> None:
    async with Daemon() as daemon, daemon.client() as client, client.listen():
        listening = Path(str(client.control.listen_maddr).removeprefix("/unix"))
        control = Path(str(daemon.control_maddr).removeprefix("/unix"))
        assert listening.parent == control.parent
        assert mode(control.parent) == 0o700
        assert listening.is_socket() and mode(listening) == 0o600
        assert control.is_socket() and mode(control) & 0o077 == 0
    path = tmp_path / "listener"
    async with Client(None, f"/unix{path}").listen():
        assert mode(path) == 0o600


# --- memory limits ---

ANNOUNCES = """
import resource, sys
import anyio
from fake_daemon import PEER
from p2pclient_rs import Client, ControlFailure

def size():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmSize"))

async def main():
    client = Client(sys.argv[1], persistent_conn_max_msg_size=1 << 28)
    await client.unary.open()
    before = size()
    {limit}
    try:
        await client.call_unary(PEER, "echo", b"data", timeout={timeout})
    except ControlFailure as error:
        state = "connected" if client.unary.connected else "lost"
        print((size() - before) // 1024, type(error).__name__, error, state)

anyio.run(main)
"""


@pytest.mark.parametrize("sent", [0, 100_000])
def test_declared_length_alone_allocates_no_memory(sent: int) -> None:
    with FakeDaemon(announcing(200 << 20, sent)) as daemon:
        ended = program(ANNOUNCES.format(limit="", timeout=0.5), daemon.control_maddr)
    assert ended.stderr == ""
    grown, kind, _ = ended.stdout.split(maxsplit=2)
    assert kind == "ControlTimeout" and int(grown) < 16  # MiB


def test_reply_too_large_for_memory_fails_only_its_call() -> None:
    limit = "resource.setrlimit(resource.RLIMIT_AS, (size() * 1024 + (64 << 20),) * 2)"
    with FakeDaemon(announcing(200 << 20, 200 << 20)) as daemon:
        ended = program(ANNOUNCES.format(limit=limit, timeout=20), daemon.control_maddr)
    assert "Traceback" not in ended.stderr
    assert "there is no memory for a message of 2097" in ended.stdout
    assert ended.stdout.endswith(" connected\n")


def announcing(size: int, sent: int) -> Callable[[Connection], None]:
    """A daemon that answers a call with only the first ``sent`` of ``size`` bytes of a reply."""

    def script(connection: Connection) -> None:
        connection.upgrade()
        call = connection.read_message()
        data = varint(1 << 3 | 2) + varint(size)
        answer = field(1, call.call_id) + varint(2 << 3 | 2) + varint(len(data) + size) + data
        connection.send(varint(len(answer) + size) + answer + bytes(sent))
        connection.wait_closed()

    return script


@pytest.mark.anyio
async def test_endless_empty_dht_results_raise_protocol_violation() -> None:
    def endless(connection: Connection) -> None:
        if connection.read_request() == b"":
            return
        connection.send(frame(OK + field(5, dht(0))))
        while True:
            connection.send(frame(dht(1, value=b"")) * 10_000)

    with FakeDaemon(endless) as daemon:
        async with Client(daemon.control_maddr) as client:
            with pytest.raises(ProtocolViolation, match="exceed 67108864 bytes"):
                await client.dht_search_value(b"key")


# --- received bytes are never executed ---

#: Modules that create objects or run code from bytes.
UNSAFE = {"pickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "yaml", "ctypes", "code"}
CALLS = {"eval", "exec", "compile", "__import__"}
#: The file that runs the user's own program, which the command line names.
RUNS_PROGRAMS = "run.py"


def test_package_never_unpickles_or_evaluates() -> None:
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 30
    for file in files:
        for node in ast.walk(ast.parse(file.read_bytes())):
            where = f"{file}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Import):
                names = {alias.name.partition(".")[0] for alias in node.names}
                assert not names & UNSAFE, where
            elif isinstance(node, ast.ImportFrom):
                assert (node.module or "").partition(".")[0] not in UNSAFE, where
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in CALLS or file.name == RUNS_PROGRAMS, where


# --- the documents ---


def test_every_test_named_in_the_docs_exists() -> None:
    root = HERE.parent
    tests: dict[str, set[str]] = {}
    for file in [*HERE.rglob("*.py"), *HERE.glob("*.rs"), *root.glob("src/**/*.rs")]:
        found = re.findall(r"\b(?:def|fn) (\w+)\(", file.read_text())
        tests[str(file.relative_to(root))] = set(found)
    named = 0
    for document in sorted(root.glob("docs/*.md")):
        where = ""
        for match in re.finditer(r"`([\w/]+\.(?:py|rs))?::(\w+)`", document.read_text()):
            # A name without a file refers to the file of the previous one.
            where = match[1] or where
            there = tests.get(where, set()) | tests.get(f"tests/{where}", set())
            assert match[2] in there, f"{document.name} names {match[0]}"
            named += document.name == "reliability.md"
    assert named > 80
