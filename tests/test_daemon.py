"""The daemon manager, against the real p2pd and against scripts that misbehave.

The environment variable P2PD_PATH must name the binary.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import pickle
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeAlias, cast

import anyio
import anyio.lowlevel
import pytest
from support import suspend

import p2pclient_rs.daemon
from p2pclient_rs import Client, Multiaddr, PeerID, Stream, StreamInfo, supervisor
from p2pclient_rs._native import DaemonProcess, Supervision
from p2pclient_rs.daemon import Daemon, unused_tcp_port
from p2pclient_rs.exceptions import (
    ConnectionLost,
    DaemonNotFound,
    DaemonStartError,
    DaemonUnreachable,
)
from p2pclient_rs.supervisor import Supervisor

# Their output and options differ from jsp2pd's.
pytestmark = [pytest.mark.anyio, pytest.mark.daemons("hivemind", "go")]

Backend: TypeAlias = tuple[str, dict[str, Any]]

# On SIGTERM, p2pd's normal exit races with its signal handler, so either status is possible.
EXITED_BY_ITSELF = (0, 128 + signal.SIGTERM)
UNREACHABLE = "/ip4/127.0.0.1/tcp/1/p2p/QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N"


@pytest.fixture(
    params=[("asyncio", {}), ("asyncio", {"use_uvloop": True}), ("trio", {})],
    ids=["asyncio", "uvloop", "trio"],
)
def anyio_backend(request: pytest.FixtureRequest) -> Backend:
    backend: Backend = request.param
    return backend


@pytest.fixture(scope="session")
def p2pd() -> Path:
    return Path(os.environ["P2PD_PATH"]).resolve(strict=True)


@pytest.fixture(autouse=True)
def assert_nothing_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, p2pd: Path
) -> Iterator[None]:
    """Puts all private directories in one place; checks after each test that nothing is left."""
    # Not tmp_path, which is too long for a socket's path.
    home = Path(tempfile.mkdtemp(prefix="t-", dir="/tmp"))
    monkeypatch.setattr(tempfile, "tempdir", str(home))
    try:
        yield
        gc.collect()
        assert children() == []
        assert list(home.iterdir()) == []
    finally:
        shutil.rmtree(home)


def children() -> list[str]:
    """Returns the command lines of this process's children that are running or unreaped."""
    pids = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return [Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ") for pid in pids]


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"  # a zombie counts as ended: init reaps orphans


def eventually(condition: Callable[[], bool], seconds: float = 15) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not become true in time"
        time.sleep(0.01)


def links(pid: int | None) -> list[str]:
    """Returns the targets of a process's open descriptors."""
    found = []
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            found.append(os.readlink(fd))
    return found


def script(path: Path, body: str, interpreter: str = "/bin/sh") -> Path:
    path.write_text(f"#!{interpreter}\n{textwrap.dedent(body)}")
    path.chmod(0o755)
    return path


# The first key pair of RFC 8032.
PRIVATE = "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60"
PUBLIC = "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"


def write_key(path: Path) -> Path:
    path.write_bytes(b"\x08\x01\x12\x40" + bytes.fromhex(PRIVATE + PUBLIC))
    return path


def directory_of(daemon: Daemon) -> Path:
    control = str(daemon.control_maddr)
    assert control.startswith("/unix/") and control.endswith("/control.sock")
    return Path(control.removeprefix("/unix")).parent


def unused_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


# --- starting ---


async def test_daemon_starts_answers_and_leaves_nothing_behind(p2pd: Path) -> None:
    daemon = Daemon(stop_timeout=60)
    assert not daemon.running and daemon.pid is None and daemon.command == []
    async with daemon as entered:
        assert entered is daemon
        pid, directory = daemon.pid, directory_of(daemon)
        assert daemon.running and daemon.returncode is None
        assert pid is not None and Path(f"/proc/{pid}/exe").resolve() == p2pd
        assert daemon.command[0] == str(p2pd)
        assert daemon.command[1:] == [
            f"-listen={daemon.control_maddr}",
            "-hostAddrs=/ip4/127.0.0.1/tcp/0",
        ]
        assert f"Peer ID: {daemon.peer_id}" in daemon.logs
        (addr,) = daemon.addrs
        assert str(addr) in daemon.logs and str(addr).startswith("/ip4/127.0.0.1/tcp/")
        async with daemon.client() as client:
            assert await client.identify() == (daemon.peer_id, daemon.addrs)
    assert not is_alive(pid) and not directory.exists()
    assert not daemon.running and daemon.pid is None and daemon.returncode in EXITED_BY_ITSELF
    assert f"Peer ID: {daemon.peer_id}" in daemon.logs


async def test_only_its_user_can_reach_the_daemon() -> None:
    async with Daemon() as daemon:
        directory = directory_of(daemon)
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
        assert (directory / "control.sock").stat().st_mode & 0o077 == 0


async def test_stop_is_idempotent_and_start_can_be_repeated() -> None:
    daemon = Daemon()
    await daemon.stop()
    await daemon.start()
    first = daemon.peer_id
    with pytest.raises(RuntimeError, match="already"):
        await daemon.start()
    await daemon.stop()
    await daemon.stop()
    async with daemon:
        assert daemon.running and daemon.peer_id != first


async def test_no_descriptor_is_leaked(tmp_path: Path) -> None:
    silent = Daemon(script(tmp_path / "p2pd", "exit 1"))
    counts = []
    for _ in range(3):
        async with Daemon():
            pass
        with pytest.raises(DaemonStartError):
            await silent.start()
        counts.append(len(os.listdir("/proc/self/fd")))
    assert counts[1] == counts[2]


async def test_attributes_before_start_raise_runtime_error() -> None:
    daemon = Daemon()
    for ask in (
        lambda: daemon.peer_id,
        lambda: daemon.addrs,
        lambda: daemon.control_maddr,
        daemon.client,
    ):
        with pytest.raises(RuntimeError, match="not"):
            ask()
    assert daemon.logs == [] and daemon.returncode is None
    assert repr(daemon) == "<Daemon not running>"


async def test_each_client_listens_on_its_own_socket() -> None:
    async with Daemon() as daemon:
        one, other = daemon.client(), daemon.client()
        async with one.listen(), other.listen():
            sockets = sorted(directory_of(daemon).glob("client-*.sock"))
            assert len(sockets) == 2
        await one.close()
        await other.close()


@pytest.mark.parametrize("port", ["0", "unused"])
async def test_control_over_tcp(port: str) -> None:
    number = unused_port() if port == "unused" else 0
    wanted = f"/ip4/127.0.0.1/tcp/{number}"
    async with Daemon(control_maddr=wanted) as daemon:
        control = str(daemon.control_maddr)
        assert (control == wanted) == (number != 0)
        assert not control.endswith("/tcp/0")
        async with daemon.client() as client:
            assert (await client.identify()).peer_id == daemon.peer_id


async def test_control_socket_at_a_given_path_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "c.sock"
    async with Daemon(control_maddr=Multiaddr(f"/unix{path}")) as daemon:
        assert path.is_socket()
        pid = daemon.pid
        assert pid is not None
        # A killed daemon cannot remove its socket.
        os.kill(pid, signal.SIGKILL)
    assert not path.exists()


async def test_stop_keeps_the_control_socket_of_a_successor(tmp_path: Path) -> None:
    control = f"/unix{tmp_path}/c.sock"
    first = await Daemon(control_maddr=control).start()
    os.kill(first.pid or 0, signal.SIGKILL)
    while first.running:
        await anyio.lowlevel.checkpoint()
    async with Daemon(control_maddr=control) as second:
        await first.stop()
        async with second.client() as client:
            assert (await client.identify()).peer_id == second.peer_id


async def test_stale_control_socket_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "c.sock"
    with socket.socket(socket.AF_UNIX) as old:
        old.bind(str(path))
        old.listen()
    assert path.is_socket()
    async with Daemon(control_maddr=f"/unix{path}") as daemon:
        assert daemon.running


async def test_temporary_directory_too_long_for_sockets_is_avoided(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / ("x" * 100)))
    async with Daemon() as daemon, daemon.client().listen():
        assert directory_of(daemon).parent == Path("/tmp")
    assert not directory_of(daemon).exists()


async def test_identity_file_determines_the_peer_id(tmp_path: Path) -> None:
    async with Daemon(identity=write_key(tmp_path / "key")) as daemon:
        assert daemon.peer_id == PeerID(b"\x00\x24\x08\x01\x12\x20" + bytes.fromhex(PUBLIC))


async def test_bootstrap_peers_are_connected() -> None:
    async with Daemon(dht="server") as first:
        peer = f"{first.addrs[0]}/p2p/{first.peer_id}"
        # An unreachable bootstrap peer among others does no harm.
        async with Daemon(dht="server", bootstrap_peers=[UNREACHABLE, peer]) as second:
            async with first.client() as one, second.client() as other:
                assert [p.peer_id for p in await other.list_peers()] == [first.peer_id]
                assert [p.peer_id for p in await one.list_peers()] == [second.peer_id]


async def test_no_peer_is_contacted_by_default() -> None:
    async with Daemon(dht="server", relay=True, pubsub=True, connmgr=True) as daemon:
        assert "-b" not in daemon.command
        async with daemon.client() as client:
            assert await client.list_peers() == ()
        inodes = {link[8:-1] for link in links(daemon.pid) if link.startswith("socket:")}
        table = Path(f"/proc/{daemon.pid}/net/tcp").read_text().splitlines()[1:]
        remotes = [row.split()[2] for row in table if row.split()[9] in inodes]
        assert set(remotes) == {"00000000:0000"}  # only listening sockets


async def test_options_reach_the_daemon() -> None:
    options: dict[str, Any] = {
        "dht": "client",
        "relay": False,
        "pubsub": "floodsub",
        "connmgr": (1, 2, 1.5),
        # On Linux, 127.0.0.2 is a local address without any configuration.
        "host_addrs": [Multiaddr("/ip4/127.0.0.1/tcp/0"), "/ip4/127.0.0.2/tcp/0"],
        "announce_addrs": ["/ip4/192.0.2.1/tcp/4001"],
        "extra_args": ["-muxer=yamux"],
    }
    async with Daemon(**options) as daemon:
        assert [str(addr) for addr in daemon.addrs] == ["/ip4/192.0.2.1/tcp/4001"]
        async with daemon.client() as client:
            assert await client.pubsub_get_topics() == ()
            await client.connmgr_trim()
        assert daemon.command[2:] == [
            "-hostAddrs=/ip4/127.0.0.1/tcp/0,/ip4/127.0.0.2/tcp/0",
            "-announceAddrs=/ip4/192.0.2.1/tcp/4001",
            "-dhtClient",
            "-relay=false",
            "-pubsub",
            "-pubsubRouter=floodsub",
            "-connManager",
            "-connLo=1",
            "-connHi=2",
            "-connGrace=1.5s",
            "-muxer=yamux",
        ]


async def test_daemon_without_output_is_ready_once_it_answers() -> None:
    async with Daemon(control_maddr="/ip4/127.0.0.1/tcp/0", extra_args=["-q"]) as daemon:
        assert daemon.logs == []
        assert daemon.peer_id.to_base58()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dht": "full"}, "dht is True, False"),
        ({"pubsub": "carrier"}, "pubsub is True, False"),
        ({"connmgr": (3, 2, 0.0)}, "low water mark"),
        ({"connmgr": (1, 2, -1.0)}, "grace period"),
        ({"host_addrs": ["/ip4/127.0.0.1/tcp/0,/ip4/0.0.0.0/tcp/0"]}, "comma"),
        ({"extra_args": ["-listen=/unix/tmp/x"]}, "control address"),
        ({"control_maddr": "/ip4/127.0.0.1/udp/1"}, "127.0.0.1/udp/1"),
        ({"identity": os.fsdecode(b"key-\xff")}, "not UTF-8"),
        ({"start_timeout": -1}, "start_timeout cannot be -1"),
        ({"stop_timeout": float("nan")}, "stop_timeout cannot be nan"),
        ({"control_maddr": f"/unix/tmp/{'x' * 103}"}, "its path is 108 bytes long, more than"),
        ({"bootstrap_peers": [UNREACHABLE, "/ip4/127.0.0.1/tcp/1"]}, r'tcp/1".* end in /p2p/'),
        ({"bootstrap_peers": [UNREACHABLE, "/ip4/1.2.3/tcp/1"]}, r'invalid .*"/ip4/1.2.3/tcp/1"'),
        (
            {"bootstrap_peers": ["/ip4/127.0.0.1/tcp/1/p2p/QmA"]},
            'bootstrap peer .*QmA": .*QmA',
        ),
        ({"bootstrap": "later"}, "bootstrap is .*required.*background.*later"),
        ({"restart": -1}, "restart must be .* at least 0, not -1"),
    ],
)
def test_invalid_options_are_refused_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Daemon(**options)


@pytest.mark.parametrize("option", ["start_timeout", "stop_timeout"])
def test_timeout_that_is_not_a_number_raises_type_error(option: str) -> None:
    options: dict[str, Any] = {option: None}
    with pytest.raises(TypeError, match=f"{option} is a number of seconds, not None"):
        Daemon(**options)


async def test_single_address_is_not_iterated_as_characters() -> None:
    async with Daemon(host_addrs="/ip4/127.0.0.1/tcp/0") as daemon:
        assert "-hostAddrs=/ip4/127.0.0.1/tcp/0" in daemon.command


# --- failed starts ---


async def test_exit_is_reported_at_once_with_status_and_last_lines(tmp_path: Path) -> None:
    body = "for i in $(seq 30); do echo line $i; done; echo worst >&2; exit 3"
    fake = script(tmp_path / "p2pd", body)
    begun = time.monotonic()
    with pytest.raises(DaemonStartError, match="exited with status 3") as caught:
        await Daemon(fake, start_timeout=60).start()
    assert time.monotonic() - begun < 10
    error = caught.value
    assert error.returncode == 3 and error.cause is None
    assert error.command[0] == str(fake)
    assert error.logs == [f"line {i}" for i in range(12, 31)] + ["worst"]
    assert "worst" in str(error) and f"-listen=/unix/{tempfile.tempdir}"[:12] in str(error)


async def test_long_line_is_truncated_in_the_error(tmp_path: Path) -> None:
    body = "head -c 1000000 /dev/zero | tr '\\0' x; exit 3"
    with pytest.raises(DaemonStartError) as caught:
        await Daemon(script(tmp_path / "p2pd", body)).start()
    assert caught.value.logs == ["x" * 500 + "…"]
    assert len(str(caught.value)) < 2000


async def test_signal_is_named(tmp_path: Path) -> None:
    with pytest.raises(DaemonStartError, match="killed by SIGSEGV .* printed nothing") as caught:
        await Daemon(script(tmp_path / "p2pd", "kill -SEGV $$")).start()
    assert caught.value.returncode == -signal.SIGSEGV


async def test_silent_daemon_times_out(tmp_path: Path) -> None:
    daemon = Daemon(script(tmp_path / "p2pd", "exec sleep 1000"), start_timeout=0.2)
    with pytest.raises(DaemonStartError, match=r"not ready in 0\.2 seconds and printed") as caught:
        await daemon.start()
    assert caught.value.returncode is None
    cause = caught.value.cause or ""
    assert cause.startswith("no connection") and cause.endswith("No such file or directory")
    assert "p2pclient_rs.Daemon()" not in str(caught.value)
    assert not daemon.running


async def test_daemon_that_accepts_but_never_answers_times_out(tmp_path: Path) -> None:
    body = """
        import socket, sys
        path = next(a for a in sys.argv if a.startswith("-listen=")).partition("/unix")[2]
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path)
            server.listen()
            connections = [server.accept() for _ in range(100)]
    """
    daemon = Daemon(script(tmp_path / "p2pd", body, sys.executable), start_timeout=1)
    with pytest.raises(DaemonStartError, match=r"not ready in 1 seconds and printed nothing"):
        await daemon.start()
    assert daemon.returncode == -signal.SIGKILL


# Actual messages of the daemons.
@pytest.mark.parametrize(
    ("status", "output", "cause"),
    [
        (
            2,
            "flag provided but not defined: -dhtServer\nUsage of p2pd:\n  -announceAddrs string\n",
            "this daemon has no option -dhtServer",
        ),
        (
            2,
            'invalid value "5" for flag -connGrace: parse error\nUsage of p2pd:\n  -b\n',
            'invalid value "5" for flag -connGrace: parse error',
        ),
    ],
)
async def test_option_unknown_to_an_older_daemon_is_named(
    tmp_path: Path, status: int, output: str, cause: str
) -> None:
    (tmp_path / "output").write_text(output)
    fake = script(tmp_path / "p2pd", f"cat {tmp_path}/output >&2; exit {status}")
    with pytest.raises(DaemonStartError) as caught:
        await Daemon(fake, dht="server").start()
    assert caught.value.cause == cause and caught.value.returncode == status
    assert caught.value.logs == output.splitlines()[:1]


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        ({"extra_args": ["--nonsense=1"]}, "jsp2pd has no option --nonsense"),
        ({"extra_args": ["-muxer=yamux"]}, "jsp2pd has no option -muxer"),
        ({"dht": "client"}, "jsp2pd has no option for a DHT client .-dhtClient"),
        ({"relay": False}, "jsp2pd has no option for switching the relay off .-relay=false"),
    ],
)
async def test_options_that_jsp2pd_would_ignore_are_refused(
    tmp_path: Path, options: dict[str, Any], flag: str
) -> None:
    with pytest.raises(ValueError, match=flag):
        await Daemon(script(tmp_path / "jsp2pd", "exit 1"), **options).start()


async def test_jsp2pd_is_ready_once_it_reports_it(tmp_path: Path) -> None:
    body = """
        import socket, sys
        path = next(a for a in sys.argv if a.startswith("--listen=")).partition("/unix")[2]
        assert sys.argv[2:] == ["--hostAddrs=/ip4/127.0.0.1/tcp/0", "--dht=true", "--nat"]
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path)
            server.listen()
            print("daemon has started", flush=True)
            while True:
                connection, _ = server.accept()
                connection.recv(100)
                identify = b"\\x0a\\x22\\x12\\x20" + bytes(32)
                answer = b"\\x08\\x00\\x22" + bytes([len(identify)]) + identify
                connection.send(bytes([len(answer)]) + answer)
    """
    fake = script(tmp_path / "jsp2pd", body, sys.executable)
    async with Daemon(fake, dht="server", extra_args=["--nat"]) as daemon:
        assert daemon.logs == ["daemon has started"]
        assert daemon.peer_id == PeerID(b"\x12\x20" + bytes(32))


async def test_unknown_flag_is_named() -> None:
    with pytest.raises(DaemonStartError, match="status 2 .*no option -nonsense") as caught:
        await Daemon(extra_args=["-nonsense"]).start()
    assert caught.value.cause == "this daemon has no option -nonsense"
    assert caught.value.logs == ["flag provided but not defined: -nonsense"]


@pytest.mark.parametrize("where", ["control_maddr", "host_addrs"])
async def test_port_in_use_is_named(where: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        host, port = server.getsockname()
        address = f"/ip4/{host}/tcp/{port}"
        options: dict[str, Any] = {where: address if where == "control_maddr" else [address]}
        with pytest.raises(DaemonStartError) as caught:
            await Daemon(**options).start()
    assert caught.value.cause == f"{host}:{port} is already in use"
    assert "port 0" in (caught.value.hint or "")


@pytest.mark.parametrize("kind", ["file", "directory"])
async def test_socket_path_in_use_is_named(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "c.sock"
    path.touch() if kind == "file" else path.mkdir()
    with pytest.raises(DaemonStartError) as caught:
        await Daemon(control_maddr=f"/unix{path}").start()
    assert caught.value.cause == f"{path} is already in use"
    assert path.is_file() if kind == "file" else path.is_dir()


async def test_missing_directory_of_the_socket_is_named(tmp_path: Path) -> None:
    path = tmp_path / "missing/c.sock"
    with pytest.raises(DaemonStartError) as caught:
        await Daemon(control_maddr=f"/unix{path}").start()
    assert caught.value.cause == f"the directory of {path} does not exist"


@pytest.mark.parametrize("kind", ["unix", "tcp"])
async def test_another_daemon_at_the_control_address_is_detected(kind: str, tmp_path: Path) -> None:
    wanted = f"/unix{tmp_path}/c.sock" if kind == "unix" else "/ip4/127.0.0.1/tcp/0"
    async with Daemon(control_maddr=wanted) as first:
        second = Daemon(control_maddr=first.control_maddr)
        with pytest.raises(DaemonStartError, match="already in use"):
            await second.start()
        async with first.client() as client:
            assert (await client.identify()).peer_id == first.peer_id


async def test_reply_of_another_peer_is_detected(tmp_path: Path, p2pd: Path) -> None:
    body = f'echo "Peer ID: 12D3KooWother"\nexec {p2pd} -q "$@"'
    daemon = Daemon(script(tmp_path / "p2pd", body), start_timeout=3)
    with pytest.raises(DaemonStartError, match="another daemon, 12D3.*, answers in its place"):
        await daemon.start()


async def test_unreachable_bootstrap_peers_are_named_with_the_reason() -> None:
    daemon = Daemon(bootstrap_peers=[UNREACHABLE])
    with pytest.raises(DaemonStartError, match="status 1 before it was ready") as caught:
        await daemon.start()
    cause = caught.value.cause or ""
    assert cause.startswith(f"no bootstrap peer could be reached: {UNREACHABLE} (")
    assert "connection refused" in cause and "\n" not in cause


async def test_bootstrap_peer_with_another_id_is_named() -> None:
    async with Daemon() as other:
        peer = f"{other.addrs[0]}/p2p/{PeerID(UNREACHABLE.rpartition('/')[2])}"
        with pytest.raises(DaemonStartError) as caught:
            await Daemon(bootstrap_peers=[peer]).start()
        cause = caught.value.cause or ""
        assert cause.startswith(f"no bootstrap peer could be reached: {peer} (")
        assert f"remote key matches {other.peer_id}" in cause


async def test_one_unreachable_bootstrap_peer_is_not_fatal() -> None:
    async with Daemon() as other:
        peer = f"{other.addrs[0]}/p2p/{other.peer_id}"
        async with Daemon(bootstrap_peers=[UNREACHABLE, peer]) as daemon, daemon.client() as client:
            assert other.peer_id in [info.peer_id for info in await client.list_peers()]


async def test_daemon_is_not_ready_before_a_bootstrap_peer_is_reached(tmp_path: Path) -> None:
    # Upstream's daemon answers first, then tries to bootstrap, and exits.
    body = """
        import socket, sys
        path = next(a for a in sys.argv if a.startswith("-listen=")).partition("/unix")[2]
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path)
            server.listen()
            for _ in range(2):
                connection, _ = server.accept()
                connection.recv(100)
                identify = b"\\x0a\\x22\\x12\\x20" + bytes(32)
                answer = b"\\x08\\x00\\x22" + bytes([len(identify)]) + identify
                connection.send(bytes([len(answer)]) + answer)
        sys.exit("2026/01/02 03:04:05 failed to connect to bootstrap peers")
    """
    fake = script(tmp_path / "p2pd", body, sys.executable)
    with pytest.raises(DaemonStartError, match="status 1 .*no bootstrap peer") as caught:
        await Daemon(fake, bootstrap_peers=[UNREACHABLE]).start()
    assert caught.value.returncode == 1


async def test_read_only_identity_file_is_accepted(tmp_path: Path) -> None:
    key = write_key(tmp_path / "key")
    key.chmod(0o400)
    tmp_path.chmod(0o500)
    before = key.read_bytes()
    try:
        async with Daemon(identity=key) as one, Daemon(identity=key, restart=True) as other:
            assert one.peer_id == other.peer_id
    finally:
        tmp_path.chmod(0o700)
    assert key.read_bytes() == before


async def test_identity_that_is_a_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(DaemonStartError) as caught:
        await Daemon(identity=tmp_path).start()
    assert caught.value.cause == f"cannot read the identity file {tmp_path}: is a directory"


@pytest.mark.parametrize(
    ("content", "cause"),
    [(None, "cannot read the identity file"), (b"secret", "holds no private key of libp2p")],
)
async def test_invalid_identity_is_named(tmp_path: Path, content: bytes | None, cause: str) -> None:
    key = tmp_path / "key"
    if content is not None:
        key.write_bytes(content)
    with pytest.raises(DaemonStartError, match=cause) as caught:
        await Daemon(identity=key).start()
    assert str(key) in str(caught.value.cause)


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (b"\x7fELF of another machine", "not for this machine"),
        (b"#!/no/such/interpreter\n", "No such file or directory"),
    ],
)
async def test_binary_that_cannot_run_is_explained(
    tmp_path: Path, content: bytes, cause: str
) -> None:
    fake = tmp_path / "p2pd"
    fake.write_bytes(content)
    fake.chmod(0o755)
    daemon = Daemon(fake)
    with pytest.raises(DaemonStartError, match=cause) as caught:
        await daemon.start()
    assert isinstance(caught.value.__cause__, OSError)
    assert not daemon.running


# --- errors of the operating system ---


@pytest.mark.parametrize(
    ("parent", "builtin", "message"),
    [
        ("/no/such/directory", FileNotFoundError, "No such file or directory"),
        ("/dev/null", NotADirectoryError, "Not a directory"),
        ("/sys", PermissionError, "Operation not permitted|Permission denied"),
    ],
)
async def test_missing_temporary_directory_is_named(
    parent: str, builtin: type[OSError], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", parent)
    daemon = Daemon()
    with pytest.raises(DaemonStartError, match=message) as caught:
        await daemon.start()
    error = caught.value
    assert isinstance(error, builtin) and error.errno
    assert (error.cause or "").startswith(f"cannot create the directory {parent}/p2pd-")
    assert str(error).startswith("the daemon's start could not be prepared: cannot create the ")
    assert "TMPDIR" in (error.hint or "") and str(error).endswith(f"\n  hint: {error.hint}")
    assert isinstance(error.__cause__, builtin)
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error) and vars(copy) == vars(error) and str(copy) == str(error)
    assert not daemon.running and daemon.pid is None


async def test_lack_of_any_temporary_directory_is_a_start_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse() -> str:
        raise FileNotFoundError(2, "No usable temporary directory found in ['/a', '/b']")

    monkeypatch.setattr(tempfile, "gettempdir", refuse)
    with pytest.raises(DaemonStartError, match=r"found in \['/a', '/b'\]") as caught:
        await Daemon().start()
    assert isinstance(caught.value, FileNotFoundError) and caught.value.errno == 2
    assert "TMPDIR" in str(caught.value)


async def test_binary_that_vanishes_after_discovery_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    gone = tmp_path / "p2pd"
    monkeypatch.setattr(p2pclient_rs.daemon, "_find_binary", lambda wanted: gone)
    with pytest.raises(FileNotFoundError) as caught:
        await Daemon().start()
    error = caught.value
    assert isinstance(error, DaemonStartError) and error.errno == 2
    assert error.cause == f"cannot execute {gone}: No such file or directory"


def test_log_that_cannot_be_created_is_named(tmp_path: Path) -> None:
    fake = script(tmp_path / "p2pd", "exit 1")
    process = DaemonProcess(fake, Daemon()._options, str(tempfile.tempdir))
    Path(process.log).mkdir()
    with pytest.raises(IsADirectoryError) as caught:
        process.spawn()
    error = caught.value
    assert isinstance(error, DaemonStartError)
    assert error.cause == f"cannot create {process.log}: Is a directory"
    process.destroy()


async def test_missing_interpreter_is_not_reported_as_a_missing_binary(tmp_path: Path) -> None:
    fake = script(tmp_path / "p2pd", "", "/no/such/interpreter")
    with pytest.raises(DaemonStartError) as caught:
        await Daemon(fake).start()
    cause = caught.value.cause or ""
    assert cause.startswith(f"cannot execute {fake} as its interpreter or loader is missing: ")
    assert "statically linked" in (caught.value.hint or "")


#: Starts a daemon under a resource limit and reports the outcome as JSON.
LIMITED = """
import json, os, resource, sys, tempfile
import anyio, anyio._backends._asyncio, concurrent.futures.thread, importlib.util
from p2pclient_rs.daemon import Daemon
from p2pclient_rs.exceptions import DaemonStartError

def report(**values):
    print(json.dumps(values), flush=True)

async def start(**options):
    daemon = Daemon(**options)
    try:
        await daemon.start()
    except DaemonStartError as error:
        kind = [base.__name__ for base in type(error).__mro__]
        report(errno=error.errno, cause=error.cause, hint=error.hint, kind=kind, text=str(error))
    else:
        await daemon.stop()
        report(errno=0, logs=daemon.logs[-3:])

{body}
"""


def limited(body: str, **environment: str) -> list[dict[str, Any]]:
    code = LIMITED.format(body=textwrap.dedent(body))
    env = {**os.environ, "TMPDIR": str(tempfile.tempdir), **environment}
    command = [sys.executable, "-c", code]
    out = subprocess.run(command, stdout=subprocess.PIPE, timeout=120, check=True, env=env)
    return [json.loads(line) for line in out.stdout.splitlines()]


def test_lack_of_descriptors_is_named_at_every_step() -> None:
    reports = limited("""
        async def main():
            await start()
            used = max(map(int, os.listdir("/proc/self/fd"))) + 1
            for limit in range(used, used + 16):
                resource.setrlimit(resource.RLIMIT_NOFILE, (limit, 4096))
                await start(start_timeout=2)

        anyio.run(main)
    """)
    assert reports.pop(0)["errno"] == 0 and len(reports) == 16
    refused = [report for report in reports if report["errno"] == 24]
    assert len(refused) > 3
    for report in refused:
        assert report["cause"].startswith("cannot ") and "Too many open files" in report["cause"]
        assert "ulimit -n" in report["hint"] and "OSError" in report["kind"]
    # After the daemon was spawned, the client's connection also needs a descriptor.
    others = [report for report in reports if report["errno"] not in (0, 24)]
    assert all("open files" in report["text"] for report in others)


def test_lack_of_descriptors_is_not_reported_as_a_missing_temporary_directory() -> None:
    (report,) = limited("""
        async def main():
            assert tempfile.tempdir is None
            resource.setrlimit(resource.RLIMIT_NOFILE, (64, 4096))
            taken = []
            try:
                while True:
                    taken.append(os.open("/", os.O_RDONLY))
            except OSError:
                pass
            await start()

        anyio.run(main)
    """)
    assert report["errno"] == 24 and "OSError" in report["kind"]
    assert report["cause"] == "cannot look for a temporary directory: Too many open files"
    assert "ulimit -n" in report["hint"]


def test_failed_fork_is_named(tmp_path: Path) -> None:
    fake = script(tmp_path / "p2pd", "exit 1")
    tmp_path.chmod(0o755)
    home = Path(str(tempfile.tempdir)) / "home"
    home.mkdir()
    home.chmod(0o777)
    home.parent.chmod(0o755)
    (report,) = limited(
        f"""
        binary = {str(fake)!r}
        import p2pclient_rs.daemon
        p2pclient_rs.daemon._find_binary = lambda wanted: binary
        async def main():
            if os.geteuid() == 0:
                os.setuid(65534)  # the limit does not apply to root
            resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
            await start()

        anyio.run(main)
        """,
        TMPDIR=str(home),
    )
    assert report["errno"] == 11 and "BlockingIOError" in report["kind"]
    assert report["cause"].startswith("cannot start another process: ")
    assert "ulimit -u" in report["hint"]
    home.rmdir()


def test_identity_file_that_cannot_be_written_is_named() -> None:
    (report,) = limited("""
        async def main():
            tempfile.gettempdir()
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
            await start(restart=True)  # needs an identity file

        anyio.run(main)
    """)
    assert report["errno"] == 27
    assert report["cause"].startswith(f"cannot write the identity file {tempfile.tempdir}/p2pd-")


def test_log_that_cannot_be_written_does_not_block_the_daemon(tmp_path: Path) -> None:
    body = "head -c 3000000 /dev/zero | tr '\\0' x; exit 3"
    fake = script(tmp_path / "p2pd", body)
    (report,) = limited(f"""
        async def main():
            tempfile.gettempdir()
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
            await start(binary={str(fake)!r})

        anyio.run(main)
    """)
    assert "exited with status 3" in report["text"]
    assert "[3000000 bytes of output could not be stored: File too large" in report["text"]


# --- the log is bounded ---

#: Two log files of 1 MiB each; nothing else in the directory is large.
BOUND = (2 << 20) + 4096


class PeakSize:
    """Measures the peak size of all private directories while the block runs."""

    def __init__(self) -> None:
        self.largest = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> PeakSize:
        self._thread.start()
        return self

    def __exit__(self, *details: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.001):
            size = 0
            for path in Path(str(tempfile.tempdir)).glob("p2pd-*/*"):
                with suppress(FileNotFoundError):
                    size += path.lstat().st_size
            self.largest = max(self.largest, size)


SHORT_LINES = "yes 'a short line' | head -c 104857600; echo"
ENDLESS_LINE = "head -c 104857600 /dev/zero | tr '\\0' x; echo"


@pytest.mark.parametrize("noise", [SHORT_LINES, ENDLESS_LINE], ids=["lines", "line"])
async def test_log_of_100_mib_of_output_stays_within_the_bound(
    noise: str, tmp_path: Path, p2pd: Path
) -> None:
    end = "for i in $(seq 100); do echo last $i; done"
    fake = script(tmp_path / "p2pd", f'{noise}\n{end}\nexec {p2pd} "$@"')
    with PeakSize() as watched:
        async with Daemon(fake, start_timeout=60) as daemon:
            logs = daemon.logs
    assert 1 << 20 < watched.largest <= BOUND
    last = logs.index("last 1")
    assert logs[last : last + 100] == [f"last {i}" for i in range(1, 101)]
    assert sum(len(line) + 1 for line in daemon.logs) <= (1 << 20) + 1


async def test_log_stays_within_the_bound_over_restarts(tmp_path: Path, p2pd: Path) -> None:
    noise = "yes 'a short line' | head -c 1500000; echo"
    fake = script(tmp_path / "p2pd", f'{noise}; echo "run $$"\nexec {p2pd} "$@"')
    with PeakSize() as watched:
        async with Daemon(fake, restart=True) as daemon:
            for _ in range(4):
                pid = daemon.pid
                os.kill(pid or 0, signal.SIGKILL)
                await wait_for_restart(daemon, pid)
                assert f"run {daemon.pid}" in daemon.logs
    assert 1 << 20 < watched.largest <= BOUND


async def test_blocked_event_loop_does_not_block_the_daemons_output(
    tmp_path: Path, p2pd: Path
) -> None:
    flag = tmp_path / "flag"
    noise = "yes 'a short line' | head -c 10000000"
    fake = script(tmp_path / "p2pd", f'({noise}; touch {flag}) &\nexec {p2pd} "$@"')
    libc_holding_the_gil = ctypes.PyDLL(None)
    async with Daemon(fake) as daemon:
        deadline = time.monotonic() + 20
        while not flag.exists():
            assert time.monotonic() < deadline
            libc_holding_the_gil.usleep(20_000)
        assert daemon.running


async def test_log_is_complete_when_the_daemon_dies(tmp_path: Path) -> None:
    body = "seq 100000\necho the last line\nkill -KILL $$"
    daemon = Daemon(script(tmp_path / "p2pd", body))
    with pytest.raises(DaemonStartError, match="killed by SIGKILL") as caught:
        await daemon.start()
    assert caught.value.logs[-2:] == ["100000", "the last line"]
    assert daemon.logs == [str(i) for i in range(1, 100001)] + ["the last line"]


def test_forked_child_can_read_the_log(anyio_backend: Backend) -> None:
    then = """
    if (pid := os.fork()) == 0:
        found = [line for line in daemon.logs if line == f"Peer ID: {daemon.peer_id}"]
        os._exit(0 if found else 1)
    print(os.waitpid(pid, 0)[1])
    await daemon.stop()
    """
    program = Program(anyio_backend, then)
    assert program.end()[1].split() == ["0"]
    assert not program.left()


def test_fork_while_another_thread_uses_the_daemon_does_not_hang(anyio_backend: Backend) -> None:
    then = """
    import threading
    over = threading.Event()
    def use():
        while not over.is_set():
            daemon.logs, daemon.running, daemon.returncode
    threads = [threading.Thread(target=use) for _ in range(2)]
    for thread in threads:
        thread.start()
    statuses = []
    for _ in range(50):
        if (pid := os.fork()) == 0:
            signal.alarm(20)
            os._exit(0 if daemon.running and daemon.logs and daemon.returncode is None else 1)
        statuses.append(os.waitpid(pid, 0)[1])
    over.set()
    for thread in threads:
        thread.join()
    print(set(statuses))
    await daemon.stop()
    """
    program = Program(anyio_backend, then)
    assert program.end()[1].strip() == "{0}"
    assert not program.left()


def test_log_thread_is_stopped_during_a_fork(anyio_backend: Backend, tmp_path: Path) -> None:
    # Since 3.12, CPython warns about forking with threads. Fork hooks run in reverse order.
    first = """
seen = []
os.register_at_fork(before=lambda: seen.append(len(os.listdir("/proc/self/task"))))
"""
    then = """
    before = len(os.listdir("/proc/self/task"))
    if (pid := os.fork()) == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    print(before, *seen)
    open(FLAG, "w").close()
    while "after the fork" not in daemon.logs:
        await anyio.sleep(0.01)
    await daemon.stop()
    """.replace("FLAG", repr(str(tmp_path / "flag")))
    body = f"""
        (while ! [ -e {tmp_path}/flag ]; do sleep 0.01; done; echo after the fork) &
        exec {os.environ["P2PD_PATH"]} "$@"
    """
    fake = script(tmp_path / "p2pd", body)
    program = Program(anyio_backend, then, f", binary={str(fake)!r}", first=first)
    before, seen = map(int, program.end()[1].split())
    assert seen == before - 1
    assert not program.left()


def test_daemon_collected_during_a_fork_does_not_hang_it(anyio_backend: Backend) -> None:
    # Fork hooks run in reverse order.
    first = "import gc\nos.register_at_fork(before=gc.collect)\n"
    then = """
    gc.disable()
    other = await Daemon().start()
    other.itself, pid = other, other.pid
    del other
    if (child := os.fork()) == 0:
        os._exit(0)
    os.waitpid(child, 0)
    print(os.path.exists(f"/proc/{pid}"), daemon.running)
    await daemon.stop()
    """
    program = Program(anyio_backend, then, first=first)
    assert program.end()[1].split() == ["False", "True"]
    assert not program.left()


def test_module_imported_during_a_fork_can_be_used(anyio_backend: Backend) -> None:
    first = """
def import_it():
    import p2pclient_rs.daemon
os.register_at_fork(before=import_it)
if (child := os.fork()) == 0:
    os._exit(0)
os.waitpid(child, 0)
"""
    program = Program(anyio_backend, "await daemon.stop()", first=first)
    program.end()
    assert not program.left()


def test_interrupted_fork_leaves_the_daemon_usable(anyio_backend: Backend) -> None:
    then = """
    class Interrupted(Exception):
        pass
    def interrupt(number, frame):
        raise Interrupted
    signal.signal(signal.SIGALRM, interrupt)
    interrupted = 0
    for number in range(500):
        child = None
        try:
            try:
                signal.setitimer(signal.ITIMER_REAL, 20e-6 * (number % 50 + 1))
                if (child := os.fork()) == 0:
                    os._exit(0)
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
        except Interrupted:
            interrupted += 1
    tasks = os.listdir("/proc/self/task")
    threads = [open(f"/proc/self/task/{task}/comm").read().strip() for task in tasks]
    print(interrupted > 0, daemon.running, "p2pd-log" in threads)
    await daemon.stop()
    """
    program = Program(anyio_backend, then)
    assert program.end()[1].split() == ["True", "True", "True"]
    assert not program.left()


async def test_cancelling_the_start_kills_the_daemon(tmp_path: Path) -> None:
    daemon = Daemon(script(tmp_path / "p2pd", "exec sleep 1000"))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(daemon.start)
        while daemon.pid is None:
            await anyio.lowlevel.checkpoint()
        pid = daemon.pid
        assert is_alive(pid)
        tasks.cancel_scope.cancel()
    assert not is_alive(pid)
    assert daemon.returncode == -signal.SIGKILL
    assert not directory_of(daemon).exists()


async def test_failed_start_can_be_repeated(tmp_path: Path, p2pd: Path) -> None:
    flag = tmp_path / "flag"
    body = f'[ -e {flag} ] || exit 1\nexec {p2pd} "$@"'
    daemon = Daemon(script(tmp_path / "p2pd", body))
    with pytest.raises(DaemonStartError):
        await daemon.start()
    flag.touch()
    async with daemon:
        assert daemon.running


# --- finding the binary ---


async def test_missing_binary_argument_is_not_replaced_by_a_search() -> None:
    with pytest.raises(DaemonNotFound) as caught:
        await Daemon("/no/such/p2pd").start()
    assert caught.value.looked_at == ["argument: /no/such/p2pd does not exist"]
    assert "/no/such/p2pd does not exist" in str(caught.value)
    assert caught.value.errno == 2
    assert str(caught.value).endswith(f"\n  hint: {caught.value.hint}")
    assert "correct the path" in (caught.value.hint or "")


async def test_file_that_is_not_executable_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "p2pd").write_text("")
    monkeypatch.setenv("P2PD_PATH", str(tmp_path / "p2pd"))
    with pytest.raises(DaemonNotFound) as caught:
        await Daemon().start()
    assert caught.value.looked_at == [f"P2PD_PATH: {tmp_path}/p2pd is not executable"]


@pytest.fixture
def hivemind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed hivemind without its binary, in an environment with no other p2pd."""
    (tmp_path / "hivemind/hivemind_cli").mkdir(parents=True)
    (tmp_path / "hivemind/__init__.py").write_text("raise AssertionError('imported')")
    (tmp_path / "bin").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.delenv("P2PD_PATH")
    return tmp_path / "hivemind/hivemind_cli/p2pd"


async def test_every_place_searched_is_listed(hivemind: Path, tmp_path: Path) -> None:
    with pytest.raises(DaemonNotFound) as caught:
        await Daemon().start()
    assert caught.value.looked_at == [
        "P2PD_PATH: not set",
        f"PATH: no p2pd in {tmp_path}/bin",
        f"hivemind: {hivemind} does not exist",
    ]
    hint = caught.value.hint or ""
    assert "P2PD_PATH" in hint and "pip install hivemind" in hint


async def test_failed_search_for_hivemind_is_reported(
    hivemind: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(name: str) -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr("importlib.util.find_spec", refuse)
    with pytest.raises(DaemonNotFound) as caught:
        await Daemon().start()
    last = caught.value.looked_at[-1]
    assert last.startswith("hivemind: the search failed: ") and "open files" in last


async def test_hiveminds_binary_is_found_without_importing_hivemind(
    hivemind: Path, p2pd: Path
) -> None:
    hivemind.symlink_to(p2pd)
    async with Daemon() as daemon:
        assert daemon.command[0] == str(hivemind)
    assert "hivemind" not in sys.modules


async def test_path_comes_before_hivemind(hivemind: Path, p2pd: Path, tmp_path: Path) -> None:
    hivemind.symlink_to(p2pd)
    (tmp_path / "bin/p2pd").symlink_to(p2pd)
    async with Daemon() as daemon:
        assert daemon.command[0] == str(tmp_path / "bin/p2pd")


# --- stopping ---


@pytest.fixture
def stubborn(tmp_path: Path, p2pd: Path) -> Path:
    """A wrapper of p2pd that ignores SIGTERM, and so outlives p2pd."""
    body = f'trap : TERM\n{p2pd} "$@" &\necho $! > {tmp_path}/pid\nwhile :; do sleep 1; done'
    return script(tmp_path / "p2pd", body)


async def test_daemon_that_ignores_sigterm_is_killed(stubborn: Path) -> None:
    async with Daemon(stubborn, stop_timeout=0.2) as daemon:
        pid = daemon.pid
        assert pid is not None
    assert daemon.returncode == -signal.SIGKILL
    assert not is_alive(pid)


async def test_wrapped_daemon_ends_with_its_wrapper(tmp_path: Path, p2pd: Path) -> None:
    body = f'{p2pd} "$@" &\necho $! > {tmp_path}/pid\nwait'
    async with Daemon(script(tmp_path / "p2pd", body)) as daemon:
        wrapped = int((tmp_path / "pid").read_text())
        assert is_alive(wrapped) and wrapped != daemon.pid
        os.kill(daemon.pid or 0, signal.SIGKILL)
        while daemon.running:
            await anyio.lowlevel.checkpoint()
        eventually(lambda: not is_alive(wrapped))


async def test_cancellation_does_not_interrupt_stop() -> None:
    daemon = await Daemon(stop_timeout=60).start()
    with anyio.CancelScope() as scope:
        scope.cancel()
        await daemon.stop()
    assert daemon.returncode in EXITED_BY_ITSELF
    assert not directory_of(daemon).exists()


class Stalls:
    """Records the longest time for which the event loop was blocked, in seconds."""

    def __init__(self) -> None:
        self.longest = 0.0

    async def watch(self) -> None:
        before = time.monotonic()
        while True:
            await anyio.sleep(0.001)
            now = time.monotonic()
            self.longest = max(self.longest, now - before)
            before = now


@pytest.fixture
def leaves_a_process(tmp_path: Path) -> Iterator[Path]:
    """A daemon that ignores SIGTERM.

    It leaves behind a process that serves its control socket, and one in its process group that is
    never reaped. It does not answer while the file `mute` exists.
    """
    body = f"""
        import contextlib, os, signal, socket, sys, time
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        path = next(a for a in sys.argv if a.startswith("-listen=")).partition("/unix")[2]
        server = socket.socket(socket.AF_UNIX)
        server.bind(path)
        server.listen()
        if os.fork() == 0:
            if os.fork() == 0:
                while True:
                    time.sleep(1)
            os.setsid()
            os.close(1)
            os.close(2)
            with open("{tmp_path}/left", "w") as file:
                file.write(str(os.getpid()))
            kept = []
            while True:
                connection, _ = server.accept()
                kept.append(connection)
                connection.recv(100)
                identify = b"\\x0a\\x22\\x12\\x20" + bytes(32)
                answer = b"\\x08\\x00\\x22" + bytes([len(identify)]) + identify
                if not os.path.exists("{tmp_path}/mute"):
                    with contextlib.suppress(OSError):
                        connection.send(bytes([len(answer)]) + answer)
        print("daemon has started", flush=True)
        while True:
            time.sleep(1)
    """
    yield script(tmp_path / "p2pd", body, sys.executable)
    left = int((tmp_path / "left").read_text())
    os.kill(left, signal.SIGKILL)


async def test_stop_does_not_block_the_event_loop(leaves_a_process: Path, tmp_path: Path) -> None:
    stalls = Stalls()
    daemon = Daemon(leaves_a_process, control_maddr=f"/unix{tmp_path}/c.sock", stop_timeout=0.2)
    await daemon.start()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(stalls.watch)
        begun = time.monotonic()
        await daemon.stop()
        assert time.monotonic() - begun > 0.6  # stop waited for the remaining process
        await anyio.sleep(0.01)
        tasks.cancel_scope.cancel()
    assert stalls.longest < 0.25
    assert daemon.returncode == -signal.SIGKILL


async def test_failed_start_does_not_block_the_event_loop(
    leaves_a_process: Path, tmp_path: Path
) -> None:
    (tmp_path / "mute").touch()
    stalls = Stalls()
    daemon = Daemon(leaves_a_process, control_maddr=f"/unix{tmp_path}/c.sock", start_timeout=2.0)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(stalls.watch)
        begun = time.monotonic()
        with pytest.raises(DaemonStartError, match="not ready"):
            await daemon.start()
        assert time.monotonic() - begun > 2.4
        await anyio.sleep(0.01)
        tasks.cancel_scope.cancel()
    assert stalls.longest < 0.25


async def test_large_output_of_a_failed_start_does_not_block_the_event_loop(tmp_path: Path) -> None:
    fake = script(tmp_path / "p2pd", "yes | head -c 1000000; exit 3")
    longest: list[float] = []
    for _ in range(5):  # repeat, as other processes can also delay the loop
        stalls = Stalls()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(stalls.watch)
            with pytest.raises(DaemonStartError, match="exited with status 3"):
                await Daemon(fake).start()
            await anyio.sleep(0.01)
            tasks.cancel_scope.cancel()
        longest.append(stalls.longest)
    assert min(longest) < 0.05, longest


async def test_every_concurrent_stop_waits_for_the_end(
    leaves_a_process: Path, tmp_path: Path
) -> None:
    daemon = Daemon(leaves_a_process, control_maddr=f"/unix{tmp_path}/c.sock", stop_timeout=0)
    await daemon.start()
    watchdog = daemon._process.watchdog_pid  # type: ignore[union-attr]
    ended: list[bool] = []

    async def stop(later: float) -> None:
        await anyio.sleep(later)
        await daemon.stop()
        ended.append(not is_alive(watchdog))

    async with anyio.create_task_group() as tasks:
        for later in (0, 0.1, 0.2):
            tasks.start_soon(stop, later)
        await anyio.sleep(0.3)
        with pytest.raises(RuntimeError, match="already"):
            await daemon.start()
    assert ended == [True, True, True]


def test_waiting_for_a_lock_lets_other_threads_run(tmp_path: Path) -> None:
    fake = script(tmp_path / "p2pd", "exec sleep 1000")
    process = DaemonProcess(fake, Daemon()._options, str(tempfile.tempdir))
    process.spawn()
    directory = Path(process.log).parent
    # Make removing the directory slow.
    for number in range(20_000):
        (directory / str(number)).touch()
    ending = threading.Thread(target=process.destroy)
    outcomes: list[tuple[str | None, float]] = []

    def spawn() -> None:
        while not process.ended:
            pass
        begun = time.monotonic()
        try:
            process.spawn()
        except DaemonStartError as error:
            outcomes.append((error.cause, time.monotonic() - begun))

    spawning = threading.Thread(target=spawn)
    ending.start()
    spawning.start()
    longest, before = 0.0, time.monotonic()
    while spawning.is_alive() or ending.is_alive():
        time.sleep(0.0005)
        now = time.monotonic()
        longest, before = max(longest, now - before), now
    ((cause, waited),) = outcomes
    assert cause == "it was stopped"
    assert longest < max(0.05, waited / 2)


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_repeatedly_cancelled_stop_still_kills_the_daemon(
    leaves_a_process: Path, tmp_path: Path
) -> None:
    import asyncio

    daemon = Daemon(leaves_a_process, control_maddr=f"/unix{tmp_path}/c.sock", stop_timeout=60)
    await daemon.start()
    stopping = asyncio.ensure_future(daemon.stop())
    while not stopping.done():
        await asyncio.sleep(0.01)
        stopping.cancel()
    with pytest.raises(asyncio.CancelledError):
        await stopping
    assert daemon.returncode == -signal.SIGKILL
    assert not Path(daemon._process.log).parent.exists()  # type: ignore[union-attr]


async def test_abandoned_stop_still_kills_the_daemon(stubborn: Path) -> None:
    daemon = await Daemon(stubborn, stop_timeout=60).start()
    stopping = daemon.stop()
    stopping.send(None)
    stopping.close()
    assert daemon.returncode == -signal.SIGKILL
    assert not directory_of(daemon).exists()


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_asyncio_cancellation_of_stop_kills_the_daemon(stubborn: Path) -> None:
    import asyncio

    daemon = await Daemon(stubborn, stop_timeout=60).start()
    stopping = asyncio.ensure_future(daemon.stop())
    await asyncio.sleep(0)
    stopping.cancel()
    with pytest.raises(asyncio.CancelledError):
        await stopping
    assert daemon.returncode == -signal.SIGKILL
    assert not directory_of(daemon).exists()


async def test_death_of_the_daemon_is_noticed_and_cleaned_up() -> None:
    async with Daemon() as daemon:
        pid = daemon.pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        while daemon.running:
            await anyio.lowlevel.checkpoint()
        assert daemon.pid is None and daemon.returncode == -signal.SIGKILL
    assert not directory_of(daemon).exists()


async def until(condition: Callable[[], bool]) -> None:
    with anyio.fail_after(20):
        while not condition():
            await anyio.sleep(0.01)


async def test_suspended_daemon_is_killed() -> None:
    async with Daemon(stop_timeout=0.2) as daemon:
        await suspend(daemon.pid or 0)
    assert daemon.returncode == -signal.SIGKILL


async def test_death_of_the_daemon_fails_calls_in_flight_and_ends_wait() -> None:
    failures: list[Exception] = []
    statuses: list[int] = []

    async def call(client: Client) -> None:
        # The client retries requests that the daemon had not read, and then finds no daemon.
        with pytest.raises((ConnectionLost, DaemonUnreachable)) as caught:
            await client.identify()
        failures.append(caught.value)

    async def wait() -> None:
        statuses.append(await daemon.wait())

    async with Daemon() as daemon, daemon.client() as client:
        pid = daemon.pid or 0
        await suspend(pid)  # keeps the daemon from answering
        with anyio.fail_after(15):
            async with anyio.create_task_group() as tasks:
                for _ in range(3):
                    tasks.start_soon(call, client)
                    tasks.start_soon(wait)
                for _ in range(100):
                    await anyio.lowlevel.checkpoint()
                assert daemon.running and not failures and not statuses
                os.kill(pid, signal.SIGKILL)
        assert len(failures) == 3 and statuses == 3 * [-signal.SIGKILL]
        assert await daemon.wait() == -signal.SIGKILL


async def test_wait_requires_a_start_and_returns_after_stop() -> None:
    daemon = Daemon(stop_timeout=60)
    with pytest.raises(RuntimeError, match="not been started"):
        await daemon.wait()
    await daemon.start()
    with anyio.move_on_after(0.01) as patience:
        await daemon.wait()
    assert patience.cancelled_caught
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(daemon.stop)
        assert await daemon.wait() in EXITED_BY_ITSELF
    assert await daemon.wait() == daemon.returncode


async def test_wait_works_without_pidfds(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(pid: int) -> int:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(os, "pidfd_open", refuse)
    async with Daemon() as daemon:
        os.kill(daemon.pid or 0, signal.SIGKILL)
        assert await daemon.wait() == -signal.SIGKILL


async def test_two_tasks_may_stop_the_daemon() -> None:
    daemon = await Daemon(stop_timeout=60).start()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(daemon.stop)
        tasks.start_soon(daemon.stop)
    assert daemon.returncode in EXITED_BY_ITSELF


async def test_garbage_collected_daemon_is_killed_with_a_warning() -> None:
    daemon = await Daemon().start()
    pid, directory = daemon.pid, directory_of(daemon)
    assert pid is not None
    with pytest.warns(ResourceWarning, match=f"daemon {pid} was not stopped"):
        del daemon
        gc.collect()
    assert not is_alive(pid) and not directory.exists()


# --- restarting ---


async def wait_for_restart(daemon: Daemon, pid: int | None) -> None:
    """Waits until a process other than ``pid`` answers."""
    with anyio.fail_after(20):
        while True:
            if daemon.pid not in (None, pid):
                with suppress(p2pclient_rs.ControlFailure):
                    async with Client(daemon.control_maddr) as client:
                        await client.identify()
                        return
            await anyio.sleep(0.01)


async def test_daemon_is_not_restarted_by_default(caplog: pytest.LogCaptureFixture) -> None:
    async with Daemon() as daemon:
        os.kill(daemon.pid or 0, signal.SIGKILL)
        await daemon.wait()
        assert not daemon.running and daemon.failure is None
    assert caplog.messages == []


@pytest.mark.parametrize("identity", ["temporary", "file"])
async def test_daemon_is_restarted_as_the_same_peer(
    identity: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "p2pclient_rs.daemon")
    key = write_key(tmp_path / "key") if identity == "file" else None
    async with Daemon(restart=True, identity=key) as daemon, daemon.client() as client:
        before = await client.identify()
        (directory,) = {directory_of(daemon)}
        pid, command, statuses = daemon.pid, daemon.command, []

        async def wait() -> None:
            statuses.append(await daemon.wait())

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(wait)
            os.kill(pid or 0, signal.SIGKILL)
            await wait_for_restart(daemon, pid)
            # The same client reaches the same peer at the same addresses.
            assert await client.identify() == before == (daemon.peer_id, daemon.addrs)
            assert daemon.command == command and directory_of(daemon) == directory
            assert daemon.running and daemon.returncode is None and not statuses
            await until(lambda: len(caplog.messages) == 2)
            await daemon.stop()
        assert statuses == [daemon.returncode] and daemon.failure is None
    assert "killed by SIGKILL" in caplog.messages[0] and "again in 0.1 s" in caplog.messages[0]
    assert caplog.messages[1].startswith("restarted the daemon as process ")
    assert len([line for line in daemon.logs if line.startswith("Peer ID: ")]) == 2


async def test_temporary_identity_is_private_and_removed_with_the_daemon() -> None:
    async with Daemon(restart=True) as daemon:
        (key,) = directory_of(daemon).glob("*.key")
        assert stat.S_IMODE(key.stat().st_mode) == 0o600
        peer_id = daemon.peer_id
    async with daemon:
        assert daemon.peer_id != peer_id


async def test_restart_replaces_the_control_socket_left_behind(tmp_path: Path) -> None:
    control = f"/unix{tmp_path}/c.sock"
    async with Daemon(restart=True, control_maddr=control) as daemon:
        pid = daemon.pid
        os.kill(pid or 0, signal.SIGKILL)
        await wait_for_restart(daemon, pid)
    assert not (tmp_path / "c.sock").exists()


async def test_timeout_of_registering_again_is_logged_with_its_length(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def no_answer() -> None:
        await anyio.sleep_forever()

    half: Any = SimpleNamespace(register_again=no_answer)
    client: Any = SimpleNamespace(control=half, unary=half)
    monkeypatch.setattr(supervisor, "Supervision", SimpleNamespace(REGISTER_TIMEOUT=0.01))
    await supervisor._register(client)
    assert len(caplog.messages) == 2
    assert all(
        line.endswith("not registered again: no answer within 0.01 s") for line in caplog.messages
    )


@pytest.mark.needs("unary")
async def test_handlers_are_registered_again_after_a_restart() -> None:
    async def greet(info: StreamInfo, stream: Stream) -> None:
        await stream.send(b"hello")
        await stream.aclose()

    async def echo(data: bytes, peer: PeerID) -> bytes:
        return data

    async with (
        Daemon(restart=True) as daemon,
        Daemon() as other,
        daemon.client() as server,
        other.client() as caller,
        server.listen(),
    ):
        await server.stream_handler("/greet", greet)
        await server.stream_handler("/balanced", greet, balanced=True)
        await server.add_unary_handler("echo", echo)
        pid = daemon.pid
        os.kill(pid or 0, signal.SIGKILL)
        await wait_for_restart(daemon, pid)
        await caller.connect(daemon.peer_id, daemon.addrs)

        # The server makes no call of its own, which would reconnect it.
        async def greeted(protocol: str) -> bool:
            try:
                _, stream = await caller.stream_open(daemon.peer_id, [protocol])
                return await stream.receive() == b"hello"
            except (p2pclient_rs.DaemonRefused, anyio.EndOfStream, anyio.BrokenResourceError):
                return False

        async def echoed() -> bool:
            try:
                return await caller.call_unary(daemon.peer_id, "echo", b"data") == b"data"
            except (p2pclient_rs.DaemonRefused, p2pclient_rs.P2PHandlerError):
                return False

        with anyio.fail_after(20):
            while not await greeted("/greet") or not await greeted("/balanced"):
                await anyio.sleep(0.02)
            while not await echoed():
                await anyio.sleep(0.02)


@pytest.fixture
def mortal(tmp_path: Path, p2pd: Path) -> Path:
    """A p2pd that fails to start once the file `broken` exists, and records its starts."""
    body = f"""
        echo run >> {tmp_path}/runs
        if [ -e {tmp_path}/broken ]; then echo too bad; exit 3; fi
        exec {p2pd} "$@"
    """
    return script(tmp_path / "p2pd", body)


async def test_supervisor_gives_up_after_repeated_quick_deaths(
    mortal: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with Daemon(mortal, restart=3) as daemon:
        (tmp_path / "broken").touch()
        os.kill(daemon.pid or 0, signal.SIGKILL)
        with anyio.fail_after(20):
            assert await daemon.wait() == 3
        assert not daemon.running and daemon.returncode == 3
        failure = daemon.failure
        assert failure is not None and failure.returncode == 3 and failure.logs == ["too bad"]
        assert "exited with status 3 before it was ready" in str(failure)
    assert (tmp_path / "runs").read_text() == 3 * "run\n"
    assert caplog.messages[-1].startswith(
        "the daemon has died 3 times in a row and will not be restarted: "
    )
    assert len(caplog.messages) == 3
    (tmp_path / "broken").unlink()
    async with daemon:
        assert daemon.failure is None


async def test_restart_that_hangs_counts_as_a_death(tmp_path: Path, p2pd: Path) -> None:
    body = f'[ -e {tmp_path}/hang ] && exec sleep 1000\nexec {p2pd} "$@"'
    daemon = Daemon(script(tmp_path / "p2pd", body), restart=2, start_timeout=10)
    async with daemon:
        (tmp_path / "hang").touch()
        daemon._supervisor._start_timeout = 0.2  # type: ignore[union-attr]
        os.kill(daemon.pid or 0, signal.SIGKILL)
        with anyio.fail_after(20):
            assert await daemon.wait() == -signal.SIGKILL
        assert "not ready in 0.2 seconds and printed nothing" in str(daemon.failure)


async def test_failed_first_start_is_not_retried(mortal: Path, tmp_path: Path) -> None:
    (tmp_path / "broken").touch()
    daemon = Daemon(mortal, restart=True)
    with pytest.raises(DaemonStartError, match="status 3"):
        await daemon.start()
    assert (tmp_path / "runs").read_text() == "run\n"


async def test_daemon_can_be_stopped_during_restarts(mortal: Path, tmp_path: Path) -> None:
    async with Daemon(mortal, restart=100) as daemon:
        (tmp_path / "broken").touch()
        os.kill(daemon.pid or 0, signal.SIGKILL)
        runs = tmp_path / "runs"
        await until(lambda: len(runs.read_text().splitlines()) == 3)
        begun = time.monotonic()
        await daemon.stop()
        assert time.monotonic() - begun < 3
        count = len(runs.read_text().splitlines())
        await anyio.sleep(1)  # long enough for another restart
        assert len(runs.read_text().splitlines()) == count
    assert daemon.failure is None


async def test_garbage_collected_daemon_is_not_restarted() -> None:
    daemon = await Daemon(restart=True).start()
    pid, directory = daemon.pid, directory_of(daemon)
    with pytest.warns(ResourceWarning, match=f"daemon {pid} was not stopped"):
        del daemon
        gc.collect()
    assert not is_alive(pid or 0) and not directory.exists()
    await anyio.sleep(0.5)
    assert children() == []


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_stop_leaves_no_supervisor_tasks() -> None:
    import asyncio

    before = asyncio.all_tasks()
    async with Daemon(restart=True, bootstrap_peers=[UNREACHABLE], bootstrap="background"):
        assert asyncio.all_tasks() > before
    assert asyncio.all_tasks() == before


# --- bootstrap peers in the background ---


async def test_daemon_starts_without_its_bootstrap_peers_and_logs_the_reason(
    caplog: pytest.LogCaptureFixture,
) -> None:
    daemon = Daemon(bootstrap_peers=[UNREACHABLE], bootstrap="background")
    async with daemon, daemon.client() as client:
        assert "-b" not in daemon.command
        assert await client.list_peers() == ()
        await until(lambda: len(caplog.messages) == 1)
        message = f"cannot connect to the bootstrap peer {UNREACHABLE}: "
        assert caplog.messages[0].startswith(message)
        assert "connection refused" in caplog.messages[0]


class Hasty:
    """A supervision whose clock runs 1000 times faster."""

    def __init__(self, supervision: Supervision) -> None:
        self._supervision = supervision

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._supervision, name)
        if name == "deadline" and attribute is not None:
            return attribute / 1000
        if name in {"poll", "finished", "deadline"}:
            return attribute
        return lambda *args: attribute(*args[:-1], 1000 * args[-1])


async def wait_connected(client: Client, peer_id: PeerID) -> None:
    with anyio.fail_after(25):
        while peer_id not in [info.peer_id for info in await client.list_peers()]:
            await anyio.sleep(0.01)


async def test_lost_bootstrap_peers_are_reconnected(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    start = Supervisor.__init__

    def start_hasty(self: Supervisor, process: Any, supervision: Any, *args: Any) -> None:
        start(self, process, cast("Supervision", Hasty(supervision)), *args)

    monkeypatch.setattr(Supervisor, "__init__", start_hasty)
    async with Daemon() as other:
        peer = f"{other.addrs[0]}/p2p/{other.peer_id}"
        options: dict[str, Any] = {"bootstrap": "background", "restart": True}
        async with Daemon(bootstrap_peers=[UNREACHABLE, peer], **options) as daemon:
            async with daemon.client() as client:
                await wait_connected(client, other.peer_id)
                await client.disconnect(other.peer_id)
                await wait_connected(client, other.peer_id)
                # And again after a restart of the daemon.
                pid = daemon.pid
                os.kill(pid or 0, signal.SIGKILL)
                await wait_for_restart(daemon, pid)
                await wait_connected(client, other.peer_id)
    assert not [m for m in caplog.messages if peer in m]


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_bootstrap_peer_that_starts_later_is_connected(tmp_path: Path) -> None:
    port = unused_tcp_port()
    options: dict[str, Any] = {
        "identity": write_key(tmp_path / "key"),
        "host_addrs": [f"/ip4/127.0.0.1/tcp/{port}"],
    }
    async with Daemon(**options) as other:
        peer = f"{other.addrs[0]}/p2p/{other.peer_id}"
    daemon = Daemon(bootstrap_peers=[peer], bootstrap="background")
    async with daemon, daemon.client() as client, Daemon(**options):
        await wait_connected(client, other.peer_id)


# --- the parent process ends ---

PROGRAM = """
import atexit, gc, json, os, signal, sys, warnings
warnings.simplefilter("ignore")
{first}
# Background jobs of a shell, and so tests started there, ignore this signal.
signal.signal(signal.SIGINT, signal.default_int_handler)
import anyio
from p2pclient_rs.daemon import Daemon
{setup}

async def main():
    daemon = await Daemon(stop_timeout=60{options}).start()
    {before}
    watchdog = daemon._process.watchdog_pid
    print(json.dumps([daemon.pid, watchdog, str(daemon.control_maddr)]), flush=True)
    sys.stdin.readline()
    {then}

anyio.run(main, backend={backend[0]!r}, backend_options={backend[1]!r})
"""
FOREVER = "await anyio.sleep_forever()"


class Program:
    """A Python process that starts a daemon."""

    def __init__(
        self,
        backend: Backend,
        then: str,
        options: str = "",
        before: str = "pass",
        first: str = "",
        setup: str = "",
        root: Path | None = None,
    ) -> None:
        code = PROGRAM.format(
            backend=backend, then=then, options=options, before=before, first=first, setup=setup
        )
        home = {**os.environ, "TMPDIR": "/tmp" if root else str(tempfile.tempdir)}
        self.process = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=home
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        line = self.process.stdout.readline()
        self.daemon, self.watchdog, control = json.loads(line)
        self.directory = Path(f"{root or ''}{control.removeprefix('/unix')}").parent
        assert is_alive(self.daemon) and is_alive(self.watchdog) and self.directory.is_dir()
        self.process.stdin.write(b"\n")
        self.process.stdin.flush()

    def end(self, number: signal.Signals | None = None) -> tuple[int, str]:
        """Sends the signal, or lets the process finish; returns its status and output."""
        if number is not None:
            self.process.send_signal(number)
        try:
            out, _ = self.process.communicate(timeout=30)
        finally:
            self.process.kill()
        return self.process.returncode, out.decode()

    def left(self) -> bool:
        alive = is_alive(self.daemon) or is_alive(self.watchdog)
        return alive or self.directory.exists()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_killed_parent_leaves_no_orphan(anyio_backend: Backend, number: signal.Signals) -> None:
    program = Program(anyio_backend, FOREVER)
    status, _ = program.end(number)
    assert status == -number
    eventually(lambda: not program.left(), 5)


#: Kills the daemon and waits for its restart.
DIE = """
    first = daemon.pid
    os.kill(first, signal.SIGKILL)
    while daemon.pid in (None, first):
        await anyio.sleep(0.01)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_killed_parent_leaves_no_orphan_after_a_restart(
    anyio_backend: Backend, number: signal.Signals
) -> None:
    program = Program(anyio_backend, FOREVER, options=", restart=True", before=DIE)
    program.end(number)
    eventually(lambda: not program.left(), 5)


# --- without a shell ---

#: Forces the kind of watchdog that is used if there is no shell.
FORKED = """
import functools, p2pclient_rs.daemon
p2pclient_rs.daemon.DaemonProcess = functools.partial(
    p2pclient_rs.daemon.DaemonProcess, watchdog="forked"
)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_forked_watchdog_cleans_up_after_a_killed_parent(
    anyio_backend: Backend, number: signal.Signals
) -> None:
    program = Program(anyio_backend, FOREVER, setup=FORKED)
    command = Path(f"/proc/{program.watchdog}/cmdline").read_bytes()
    assert b"/bin/sh" not in command
    program.end(number)
    eventually(lambda: not program.left(), 5)


def test_forked_watchdog_cleans_up_after_a_restart(anyio_backend: Backend) -> None:
    program = Program(anyio_backend, FOREVER, ", restart=True", DIE, setup=FORKED)
    program.end(signal.SIGKILL)
    eventually(lambda: not program.left(), 5)


def test_forked_watchdog_kills_the_group_and_removes_subdirectories(
    anyio_backend: Backend, stubborn: Path
) -> None:
    make = """
    directory = os.path.dirname(daemon._process.log)
    os.makedirs(directory + "/a/b/c")
    open(directory + "/a/b/file", "w").close()
    os.symlink("/tmp", directory + "/a/link")
    """
    program = Program(anyio_backend, FOREVER, f", binary={str(stubborn)!r}", make, setup=FORKED)
    program.end(signal.SIGKILL)
    eventually(lambda: not program.left(), 15)
    assert Path("/tmp").is_dir()


def test_forked_watchdog_releases_its_parents_memory(anyio_backend: Backend) -> None:
    # Once the child has unmapped the parent's pages, they are no longer shared.
    setup = FORKED + "\nmemory = bytearray(os.urandom(1 << 20) * 100)\n"
    program = Program(anyio_backend, FOREVER, setup=setup)
    statm = Path(f"/proc/{program.watchdog}/statm")
    page = os.sysconf("SC_PAGE_SIZE")
    eventually(lambda: int(statm.read_text().split()[1]) * page < 32 << 20, 5)
    program.end(signal.SIGKILL)
    eventually(lambda: not program.left(), 5)


def test_forked_watchdog_keeps_only_its_pipe_open(anyio_backend: Backend) -> None:
    program = Program(anyio_backend, FOREVER, setup=FORKED)
    eventually(lambda: len(links(program.watchdog)) == 1)
    assert links(program.watchdog)[0].startswith("pipe:")
    program.end(signal.SIGTERM)
    eventually(lambda: not program.left(), 5)


# jsp2pd would need a whole node installation.
@pytest.mark.daemons("hivemind", "go")
@pytest.mark.skipif(os.geteuid() != 0, reason="chroot requires root")
@pytest.mark.parametrize("has", ["nothing", "shell"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_daemon_starts_and_stops_in_a_container_without(
    anyio_backend: Backend, number: signal.Signals, has: str, p2pd: Path
) -> None:
    """The container has only p2pd, its libraries, /dev/null and perhaps a shell, but no `rm`."""
    root = Path(str(tempfile.tempdir)) / "root"
    for name in ("dev", "tmp", "bin", "proc/self"):
        (root / name).mkdir(parents=True)
    # hivemind's p2pd is a packed executable, which unpacks itself from /proc/self/exe.
    (root / "proc/self/exe").symlink_to("/bin/p2pd")
    os.mknod(root / "dev/null", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    shutil.copy(p2pd, root / "bin/p2pd")
    if has == "shell":
        shutil.copy("/bin/sh", root / "bin/sh")
    for file in (root / "bin").iterdir():
        # ldd fails for a statically linked program.
        libraries = subprocess.run(["ldd", str(file)], capture_output=True, text=True)
        for word in libraries.stdout.split():
            if word.startswith("/"):
                (root / word[1:]).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(word, root / word[1:])
    # Import everything first, since the container has no modules.
    setup = f"""
import asyncio, concurrent.futures.thread, encodings.idna, ipaddress, stringprep, tempfile
import importlib.util, uvloop, trio, anyio._backends._asyncio, anyio._backends._trio
from anyio._core import _eventloop
os.chroot({str(root)!r})
os.chdir("/")
os.environ["P2PD_PATH"] = "/bin/p2pd"
"""
    try:
        program = Program(anyio_backend, FOREVER, setup=setup, root=root)
        assert b"/bin/sh" not in Path(f"/proc/{program.watchdog}/cmdline").read_bytes()
        program.end(number)
        eventually(lambda: not program.left(), 10)
        assert list((root / "tmp").iterdir()) == []
    finally:
        shutil.rmtree(root)


def test_parent_stops_the_daemon_on_ctrl_c(anyio_backend: Backend) -> None:
    program = Program(anyio_backend, FOREVER)
    assert program.end(signal.SIGINT)[0] != 0
    assert not program.left()


@pytest.mark.parametrize("then", ["return", "sys.exit(3)", "1 / 0"])
def test_daemon_is_killed_at_interpreter_exit(anyio_backend: Backend, then: str) -> None:
    program = Program(anyio_backend, f"globals()['kept'] = daemon; {then}")
    program.end()
    assert not program.left()


def test_forked_child_leaves_the_daemon_alone(anyio_backend: Backend) -> None:
    then = """
    if (pid := os.fork()) == 0:
        try:
            daemon.stop().send(None)
        except StopIteration:
            pass
        state = daemon.running, daemon.returncode
        del daemon
        gc.collect()
        os._exit(0 if state == (True, None) else 1)
    status = os.waitpid(pid, 0)[1]
    async with daemon.client() as client:
        print(status, (await client.identify()).peer_id == daemon.peer_id)
    await daemon.stop()
    print(daemon.returncode)
    """
    program = Program(anyio_backend, then)
    status, out = program.end()
    assert status == 0
    child, answered, returncode = out.split()
    assert (child, answered) == ("0", "True") and int(returncode) in EXITED_BY_ITSELF
    assert not program.left()


def test_exit_handlers_in_a_forked_child_leave_the_daemon_alone(anyio_backend: Backend) -> None:
    # Does not use sys.exit(), which would unwind trio's loop in the child and break the parent's.
    then = """
    if (pid := os.fork()) == 0:
        atexit._run_exitfuncs()
        os._exit(0)
    os.waitpid(pid, 0)
    print(daemon.running)
    await daemon.stop()
    """
    program = Program(anyio_backend, then)
    assert program.end()[1].split() == ["True"]
    assert not program.left()


def test_forked_child_does_not_keep_the_daemon_alive(anyio_backend: Backend) -> None:
    then = """
    ready, written = os.pipe()
    if os.fork() == 0:
        os.write(written, b"x")
        sys.stdout.close()
        os.close(1)
        sys.stdin.read()
        os._exit(0)
    os.read(ready, 1)
    print("forked", flush=True)
    await anyio.sleep_forever()
    """
    program = Program(anyio_backend, then)
    assert program.process.stdout is not None and program.process.stdin is not None
    assert program.process.stdout.readline() == b"forked\n"
    program.process.kill()
    program.process.wait()
    # The child keeps running until its standard input is closed.
    eventually(lambda: not program.left())
    program.process.stdin.close()
    program.process.stdout.close()


def test_unused_port_is_below_the_ephemeral_range() -> None:
    ports = {unused_tcp_port(host) for host in ("127.0.0.1", "::1") for _ in range(50)}
    assert len(ports) > 90
    assert all(20_000 <= port < 32_000 for port in ports)
    with pytest.raises(OSError):
        unused_tcp_port("192.0.2.1")  # not a local address


def test_unused_port_accepts_a_host_name() -> None:
    assert 20_000 <= unused_tcp_port("localhost") < 32_000
    assert 20_000 <= unused_tcp_port(host="localhost") < 32_000
