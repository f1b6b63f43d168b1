"""Clients and coroutines that the garbage collector or the event loop ends print nothing."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import hivemind_tree
import pytest
from fake_daemon import Connection, FakeDaemon
from support import DaemonProcess, new_directory

TESTS = Path(__file__).parent

#: Ways in which a client's listening task can end.
ENDS = {
    "collected while the loop runs": "drop",
    "left to asyncio.run": "run",
    "in a forked child": "fork",
    "collected between two runs of the loop": "between",
    "collected with a loop that was not closed": "loop",
    "collected with a closed loop": "closed",
    "left to the interpreter": "interpreter",
}

#: Listens, and drops the client and its task, as hivemind's P2P does.
PROGRAM = """
import asyncio, gc, os, sys
client_kind, end, control_maddr, listen_maddr = sys.argv[1:5]
if client_kind == "own":
    from p2pclient_rs import Client
    async def make():
        client = Client(control_maddr, listen_maddr)
        await client.unary.open()
        return client, client
else:
    if client_kind == "original":
        from hivemind.p2p.p2p_daemon_bindings.p2pclient import Client
        from hivemind.utils.multiaddr import Multiaddr
    else:
        from p2pclient_rs.compat.hivemind.p2pclient import Client, Multiaddr
    async def make():
        client = await Client.create(Multiaddr(control_maddr), Multiaddr(listen_maddr))
        return client, client.control

async def handler(*_):
    pass

async def listen(client):
    async with client.listen():
        listening.set_result(None)
        await asyncio.Future()

def report(loop, context):
    # From Python 3.14 on asyncio itself reports a loop that goes on in a forked child.
    if "is not the running loop" not in str(context.get("exception")):
        loop.default_exception_handler(context)

async def main():
    global listening, task
    listening = asyncio.get_running_loop().create_future()
    client, control = await make()
    task = asyncio.create_task(listen(client))
    task._log_destroy_pending = False  # asyncio would warn about this task itself
    await listening
    await control.stream_handler(f"stream {os.getpid()}", handler)
    await control.add_unary_handler(f"unary {os.getpid()}", handler)
    if end == "fork":
        asyncio.get_running_loop().set_exception_handler(report)
        if os.fork() == 0:
            return
        os.wait()
    if end == "drop":
        del client, control
        task = None
        gc.collect()
        await asyncio.sleep(0.05)
        gc.collect()

loop = None
if end in ("drop", "run", "fork"):
    asyncio.run(main())
else:
    loop = asyncio.new_event_loop()
    loop.run_until_complete(main())
    if end == "between":
        task = None
        gc.collect()
        loop.run_until_complete(asyncio.sleep(0.05))
    if end == "closed":
        loop.close()
    if end in ("loop", "closed"):
        task = listening = loop = None
gc.collect()
"""


def run(program: str, *arguments: str, path: str = "") -> str:
    """Returns the output of a program, with its exit status if that is not 0."""
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env={"PYTHONPATH": path, "PATH": "/usr/bin:/bin"},
        check=False,
    )
    return done.stderr + done.stdout + (f"exit status {done.returncode}" * bool(done.returncode))


@pytest.fixture(scope="module")
def daemon() -> Iterator[DaemonProcess]:
    with DaemonProcess() as daemon:
        daemon.keep()
        yield daemon


@pytest.mark.needs("unary")
@pytest.mark.parametrize("kind", ["own", "hivemind"])
@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
def test_dropped_listening_client_prints_nothing(
    daemon: DaemonProcess, kind: str, end: str
) -> None:
    assert run(PROGRAM, kind, end, daemon.control_maddr, daemon.listen_maddr()) == ""


@pytest.mark.needs("unary")
@pytest.mark.parametrize("end", ["drop", "run", "fork"])
def test_dropped_client_of_real_hivemind_prints_nothing(daemon: DaemonProcess, end: str) -> None:
    path = str(hivemind_tree.make(new_directory()))
    maddrs = daemon.control_maddr, daemon.listen_maddr()
    assert run(PROGRAM, "original", end, *maddrs, path=path) == ""
    Path(maddrs[1].removeprefix("/unix")).unlink(missing_ok=True)


#: Drops each kind of request, with its task and loop, before the daemon has answered.
WAITING = """
import asyncio, gc, sys
from p2pclient_rs import Client
how, control_maddr, listen_maddr = sys.argv[1:4]
peer = b"\\x00\\x24\\x08\\x01\\x12\\x20" + bytes(32)

async def handler(*_):
    pass

def calls(client):
    for timeout in (None, 30):
        yield client.identify(timeout=timeout)
        yield client.connect(peer, [], timeout=timeout)
        yield client.stream_open(peer, ["x"], timeout=timeout)
        yield client.stream_handler("x", handler, timeout=timeout)
        yield client.call_unary(peer, "x", b"", timeout=timeout)
        yield client.add_unary_handler("x", handler, timeout=timeout)
        yield client.unary.open(timeout=timeout)

async def main(number):
    client = Client(control_maddr, listen_maddr)
    if how == "open":
        await client.unary.open()
        await client.add_unary_handler("y", handler)
    call = list(calls(client))[number]
    for other in calls(client):
        other.close()
    task = asyncio.create_task(call)
    task._log_destroy_pending = False
    for _ in range(10):
        await asyncio.sleep(0)
    return task

import warnings
warnings.simplefilter("ignore")  # about coroutines never awaited
for number in range(14):
    for close in (False, True):
        loop = asyncio.new_event_loop()
        task = loop.run_until_complete(main(number))
        assert not task.done(), (number, task)
        if close:
            loop.close()
        del task, loop
        gc.collect()
"""


@pytest.mark.independent
def test_requests_dropped_with_their_loop_print_nothing() -> None:
    def mute(connection: Connection) -> None:
        connection.wait_closed()

    with FakeDaemon(mute) as fake:
        directory = new_directory()
        assert run(WAITING, "mute", fake.control_maddr, f"/unix{directory}/l.sock") == ""
