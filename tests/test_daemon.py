"""The daemon manager: against the real p2pd, and against scripts that misbehave.

The binary comes from the variable P2PD_PATH, which must be set.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeAlias

import anyio
import anyio.lowlevel
import pytest

from p2pclient_rs import Multiaddr, PeerID
from p2pclient_rs.daemon import Daemon, unused_tcp_port
from p2pclient_rs.exceptions import DaemonNotFound, DaemonStartError

# What the Go daemons print and take.
pytestmark = [pytest.mark.anyio, pytest.mark.daemons("hivemind", "go")]

Backend: TypeAlias = tuple[str, dict[str, Any]]

# p2pd's own end on SIGTERM races with that of its signal handler.
ENDED_ITSELF = (0, 128 + signal.SIGTERM)
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
def nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, p2pd: Path) -> Iterator[None]:
    """Has the private directories made in one place, and looks after each test what is left."""
    # Not in tmp_path, whose own path is long.
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
    """The command lines of this process's children that are alive or unreaped."""
    pids = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return [Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ") for pid in pids]


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"  # an orphan's zombie is for init to reap


def eventually(condition: Callable[[], bool], seconds: float = 15) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come true"
        time.sleep(0.01)


def links(pid: int | None) -> list[str]:
    """What the file descriptors of a process are."""
    found = []
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            found.append(os.readlink(fd))
    return found


def script(path: Path, body: str, interpreter: str = "/bin/sh") -> Path:
    path.write_text(f"#!{interpreter}\n{textwrap.dedent(body)}")
    path.chmod(0o755)
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


# --- a daemon that starts ---


async def test_it_starts_answers_and_leaves_nothing(p2pd: Path) -> None:
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
    assert not daemon.running and daemon.pid is None and daemon.returncode in ENDED_ITSELF
    assert f"Peer ID: {daemon.peer_id}" in daemon.logs


async def test_only_its_user_can_reach_it() -> None:
    async with Daemon() as daemon:
        directory = directory_of(daemon)
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
        assert (directory / "control.sock").stat().st_mode & 0o077 == 0


async def test_stop_can_be_repeated_and_start_too() -> None:
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


async def test_no_file_descriptor_is_left(tmp_path: Path) -> None:
    silent = Daemon(script(tmp_path / "p2pd", "exit 1"))
    counts = []
    for _ in range(3):
        async with Daemon():
            pass
        with pytest.raises(DaemonStartError):
            await silent.start()
        counts.append(len(os.listdir("/proc/self/fd")))
    assert counts[1] == counts[2]


async def test_what_needs_a_start_says_so() -> None:
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


async def test_each_client_listens_on_a_socket_of_its_own() -> None:
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


async def test_a_control_socket_of_ones_own_is_removed_too(tmp_path: Path) -> None:
    path = tmp_path / "c.sock"
    async with Daemon(control_maddr=Multiaddr(f"/unix{path}")) as daemon:
        assert path.is_socket()
        pid = daemon.pid
        assert pid is not None
        # It cannot remove it itself then.
        os.kill(pid, signal.SIGKILL)
    assert not path.exists()


async def test_its_end_leaves_the_socket_of_its_successor(tmp_path: Path) -> None:
    control = f"/unix{tmp_path}/c.sock"
    first = await Daemon(control_maddr=control).start()
    os.kill(first.pid or 0, signal.SIGKILL)
    while first.running:
        await anyio.lowlevel.checkpoint()
    async with Daemon(control_maddr=control) as second:
        await first.stop()
        async with second.client() as client:
            assert (await client.identify()).peer_id == second.peer_id


async def test_a_socket_left_behind_does_not_keep_it_out(tmp_path: Path) -> None:
    path = tmp_path / "c.sock"
    with socket.socket(socket.AF_UNIX) as old:
        old.bind(str(path))
        old.listen()
    assert path.is_socket()
    async with Daemon(control_maddr=f"/unix{path}") as daemon:
        assert daemon.running


async def test_a_long_temporary_directory_is_avoided(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / ("x" * 100)))
    async with Daemon() as daemon, daemon.client().listen():
        assert directory_of(daemon).parent == Path("/tmp")
    assert not directory_of(daemon).exists()


async def test_identity_file(tmp_path: Path) -> None:
    # The first key pair of RFC 8032, in libp2p's encoding.
    private = "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60"
    public = "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"
    key = tmp_path / "key"
    key.write_bytes(b"\x08\x01\x12\x40" + bytes.fromhex(private + public))
    async with Daemon(identity=key) as daemon:
        assert daemon.peer_id == PeerID(b"\x00\x24\x08\x01\x12\x20" + bytes.fromhex(public))


async def test_bootstrap_peers_are_connected() -> None:
    async with Daemon(dht="server") as first:
        peer = f"{first.addrs[0]}/p2p/{first.peer_id}"
        # One that cannot be reached does no harm.
        async with Daemon(dht="server", bootstrap_peers=[UNREACHABLE, peer]) as second:
            async with first.client() as one, second.client() as other:
                assert [p.peer_id for p in await other.list_peers()] == [first.peer_id]
                assert [p.peer_id for p in await one.list_peers()] == [second.peer_id]


async def test_nobody_is_contacted_unasked() -> None:
    async with Daemon(dht="server", relay=True, pubsub=True, connmgr=True) as daemon:
        assert "-b" not in daemon.command
        async with daemon.client() as client:
            assert await client.list_peers() == ()
        inodes = {link[8:-1] for link in links(daemon.pid) if link.startswith("socket:")}
        table = Path(f"/proc/{daemon.pid}/net/tcp").read_text().splitlines()[1:]
        remotes = [row.split()[2] for row in table if row.split()[9] in inodes]
        assert set(remotes) == {"00000000:0000"}  # it listens, and that is all


async def test_options_reach_the_daemon() -> None:
    options: dict[str, Any] = {
        "dht": "client",
        "relay": False,
        "pubsub": "floodsub",
        "connmgr": (1, 2, 1.5),
        # The second is an address of this machine on Linux only, unless it was given it.
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


async def test_a_quiet_daemon_is_ready_when_it_answers() -> None:
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
    ],
)
def test_wrong_options_are_refused_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Daemon(**options)


@pytest.mark.parametrize("option", ["start_timeout", "stop_timeout"])
def test_a_timeout_is_a_number(option: str) -> None:
    options: dict[str, Any] = {option: None}
    with pytest.raises(TypeError, match=f"{option} is a number of seconds, not None"):
        Daemon(**options)


async def test_a_single_address_is_not_taken_for_letters() -> None:
    async with Daemon(host_addrs="/ip4/127.0.0.1/tcp/0") as daemon:
        assert "-hostAddrs=/ip4/127.0.0.1/tcp/0" in daemon.command


# --- a daemon that does not ---


async def test_an_exit_is_told_at_once_with_status_and_last_lines(tmp_path: Path) -> None:
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


async def test_a_signal_is_named(tmp_path: Path) -> None:
    with pytest.raises(DaemonStartError, match="killed by SIGSEGV .* printed nothing") as caught:
        await Daemon(script(tmp_path / "p2pd", "kill -SEGV $$")).start()
    assert caught.value.returncode == -signal.SIGSEGV


async def test_silence_ends_in_a_timeout(tmp_path: Path) -> None:
    daemon = Daemon(script(tmp_path / "p2pd", "exec sleep 1000"), start_timeout=0.2)
    with pytest.raises(DaemonStartError, match=r"not ready in 0\.2 seconds and printed") as caught:
        await daemon.start()
    assert caught.value.returncode is None
    assert caught.value.cause is not None and "no connection" in caught.value.cause
    assert not daemon.running


async def test_a_wrong_flag_is_named() -> None:
    with pytest.raises(DaemonStartError, match="status 2 .*no option -nonsense") as caught:
        await Daemon(extra_args=["-nonsense"]).start()
    assert caught.value.cause == "this daemon has no option -nonsense"
    assert caught.value.logs == ["flag provided but not defined: -nonsense"]


@pytest.mark.parametrize("where", ["control_maddr", "host_addrs"])
async def test_a_port_taken_is_named(where: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        host, port = server.getsockname()
        address = f"/ip4/{host}/tcp/{port}"
        options: dict[str, Any] = {where: address if where == "control_maddr" else [address]}
        with pytest.raises(DaemonStartError) as caught:
            await Daemon(**options).start()
    assert caught.value.cause == f"{host}:{port} is already in use"


@pytest.mark.parametrize("kind", ["unix", "tcp"])
async def test_another_daemon_at_the_address_is_not_taken_for_it(kind: str, tmp_path: Path) -> None:
    wanted = f"/unix{tmp_path}/c.sock" if kind == "unix" else "/ip4/127.0.0.1/tcp/0"
    async with Daemon(control_maddr=wanted) as first:
        second = Daemon(control_maddr=first.control_maddr)
        with pytest.raises(DaemonStartError, match="already in use"):
            await second.start()
        async with first.client() as client:
            assert (await client.identify()).peer_id == first.peer_id


async def test_the_answer_of_another_peer_is_not_believed(tmp_path: Path, p2pd: Path) -> None:
    body = f'echo "Peer ID: 12D3KooWother"\nexec {p2pd} -q "$@"'
    daemon = Daemon(script(tmp_path / "p2pd", body), start_timeout=1)
    with pytest.raises(DaemonStartError, match="another daemon, 12D3.*, answers in its place"):
        await daemon.start()


async def test_unreachable_bootstrap_peers_are_named() -> None:
    with pytest.raises(DaemonStartError) as caught:
        await Daemon(bootstrap_peers=[UNREACHABLE]).start()
    assert caught.value.cause == f"no bootstrap peer could be reached: {UNREACHABLE}"


async def test_an_unreachable_bootstrap_peer_among_others_is_not_fatal() -> None:
    async with Daemon() as other:
        peer = f"{other.addrs[0]}/p2p/{other.peer_id}"
        async with Daemon(bootstrap_peers=[UNREACHABLE, peer]) as daemon, daemon.client() as client:
            assert other.peer_id in [info.peer_id for info in await client.list_peers()]


async def test_it_is_not_ready_before_its_bootstrap_peers_are_reached(tmp_path: Path) -> None:
    # As upstream's daemon does: it answers, tries to bootstrap, and gives up.
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


@pytest.mark.parametrize(
    ("content", "cause"),
    [(None, "cannot read the identity file"), (b"secret", "holds no private key of libp2p")],
)
async def test_a_bad_identity_is_named(tmp_path: Path, content: bytes | None, cause: str) -> None:
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
async def test_a_binary_that_cannot_run_is_explained(
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


async def test_cancelling_the_start_kills_it(tmp_path: Path) -> None:
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


async def test_a_start_can_be_tried_again(tmp_path: Path, p2pd: Path) -> None:
    flag = tmp_path / "flag"
    body = f'[ -e {flag} ] || exit 1\nexec {p2pd} "$@"'
    daemon = Daemon(script(tmp_path / "p2pd", body))
    with pytest.raises(DaemonStartError):
        await daemon.start()
    flag.touch()
    async with daemon:
        assert daemon.running


# --- which binary ---


async def test_an_argument_that_is_missing_is_not_replaced() -> None:
    with pytest.raises(DaemonNotFound) as caught:
        await Daemon("/no/such/p2pd").start()
    assert caught.value.looked_at == ["argument: /no/such/p2pd does not exist"]
    assert "/no/such/p2pd does not exist" in str(caught.value)


async def test_not_executable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "p2pd").write_text("")
    monkeypatch.setenv("P2PD_PATH", str(tmp_path / "p2pd"))
    with pytest.raises(DaemonNotFound) as caught:
        await Daemon().start()
    assert caught.value.looked_at == [f"P2PD_PATH: {tmp_path}/p2pd is not executable"]


@pytest.fixture
def hivemind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed hivemind without its binary, and no other place to find one."""
    (tmp_path / "hivemind/hivemind_cli").mkdir(parents=True)
    (tmp_path / "hivemind/__init__.py").write_text("raise AssertionError('imported')")
    (tmp_path / "bin").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.delenv("P2PD_PATH")
    return tmp_path / "hivemind/hivemind_cli/p2pd"


async def test_everything_looked_at_is_told(hivemind: Path, tmp_path: Path) -> None:
    with pytest.raises(DaemonNotFound) as caught:
        await Daemon().start()
    assert caught.value.looked_at == [
        "P2PD_PATH: not set",
        f"PATH: no p2pd in {tmp_path}/bin",
        f"hivemind: {hivemind} does not exist",
    ]


async def test_the_binary_of_hivemind_is_found_without_importing_it(
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


# --- the end of it ---


@pytest.fixture
def stubborn(tmp_path: Path, p2pd: Path) -> Path:
    """A wrapper that survives SIGTERM, and so is there still when its p2pd has ended."""
    body = f'trap : TERM\n{p2pd} "$@" &\necho $! > {tmp_path}/pid\nwhile :; do sleep 1; done'
    return script(tmp_path / "p2pd", body)


async def test_what_does_not_end_is_killed(stubborn: Path) -> None:
    async with Daemon(stubborn, stop_timeout=0.2) as daemon:
        pid = daemon.pid
        assert pid is not None
    assert daemon.returncode == -signal.SIGKILL
    assert not is_alive(pid)


async def test_a_wrapped_daemon_ends_with_its_wrapper(tmp_path: Path, p2pd: Path) -> None:
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
    assert daemon.returncode in ENDED_ITSELF
    assert not directory_of(daemon).exists()


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_asyncios_own_cancellation_kills_instead(stubborn: Path) -> None:
    import asyncio

    daemon = await Daemon(stubborn, stop_timeout=60).start()
    stopping = asyncio.ensure_future(daemon.stop())
    await asyncio.sleep(0)
    stopping.cancel()
    with pytest.raises(asyncio.CancelledError):
        await stopping
    assert daemon.returncode == -signal.SIGKILL
    assert not directory_of(daemon).exists()


async def test_a_daemon_that_dies_is_noticed_and_cleared_up() -> None:
    async with Daemon() as daemon:
        pid = daemon.pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        while daemon.running:
            await anyio.lowlevel.checkpoint()
        assert daemon.pid is None and daemon.returncode == -signal.SIGKILL
    assert not directory_of(daemon).exists()


async def test_two_tasks_may_stop_it() -> None:
    daemon = await Daemon(stop_timeout=60).start()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(daemon.stop)
        tasks.start_soon(daemon.stop)
    assert daemon.returncode in ENDED_ITSELF


async def test_a_forgotten_daemon_is_killed_with_a_warning() -> None:
    daemon = await Daemon().start()
    pid, directory = daemon.pid, directory_of(daemon)
    assert pid is not None
    with pytest.warns(ResourceWarning, match=f"daemon {pid} was not stopped"):
        del daemon
        gc.collect()
    assert not is_alive(pid) and not directory.exists()


# --- the end of the process that started it ---

PROGRAM = """
import atexit, gc, json, os, signal, sys, warnings
warnings.simplefilter("ignore")
import anyio
from p2pclient_rs.daemon import Daemon

async def main():
    daemon = await Daemon(stop_timeout=60).start()
    janitor = daemon._process.janitor_pid
    print(json.dumps([daemon.pid, janitor, str(daemon.control_maddr)]), flush=True)
    sys.stdin.readline()
    {then}

anyio.run(main, backend={backend[0]!r}, backend_options={backend[1]!r})
"""
FOREVER = "await anyio.sleep_forever()"


class Program:
    """A Python process that starts a daemon."""

    def __init__(self, backend: Backend, then: str) -> None:
        code = PROGRAM.format(backend=backend, then=then)
        home = {**os.environ, "TMPDIR": str(tempfile.tempdir)}
        self.process = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=home
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        line = self.process.stdout.readline()
        self.daemon, self.janitor, control = json.loads(line)
        self.directory = Path(control.removeprefix("/unix")).parent
        assert is_alive(self.daemon) and is_alive(self.janitor) and self.directory.is_dir()
        self.process.stdin.write(b"\n")
        self.process.stdin.flush()

    def end(self, number: signal.Signals | None = None) -> tuple[int, str]:
        """Signals it, or lets it end; returns its status and what it printed."""
        if number is not None:
            self.process.send_signal(number)
        try:
            out, _ = self.process.communicate(timeout=30)
        finally:
            self.process.kill()
        return self.process.returncode, out.decode()

    def left(self) -> bool:
        alive = is_alive(self.daemon) or is_alive(self.janitor)
        return alive or self.directory.exists()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_parent_leaves_no_orphan(anyio_backend: Backend, number: signal.Signals) -> None:
    program = Program(anyio_backend, FOREVER)
    status, _ = program.end(number)
    assert status == -number
    eventually(lambda: not program.left())


def test_ctrl_c_reaches_the_parent_which_stops_it(anyio_backend: Backend) -> None:
    program = Program(anyio_backend, FOREVER)
    assert program.end(signal.SIGINT)[0] != 0
    assert not program.left()


@pytest.mark.parametrize("then", ["return", "sys.exit(3)", "1 / 0"])
def test_at_the_interpreters_end_it_is_killed(anyio_backend: Backend, then: str) -> None:
    program = Program(anyio_backend, f"globals()['kept'] = daemon; {then}")
    program.end()
    assert not program.left()


def test_a_forked_child_leaves_it_alone(anyio_backend: Backend) -> None:
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
    assert (child, answered) == ("0", "True") and int(returncode) in ENDED_ITSELF
    assert not program.left()


def test_finalizers_at_the_end_of_a_forked_child_leave_it_alone(anyio_backend: Backend) -> None:
    # Not with sys.exit(): a child that unwinds trio's loop breaks its parent's.
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


def test_a_forked_child_does_not_keep_it_alive(anyio_backend: Backend) -> None:
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
    # The child is alive until its standard input ends.
    eventually(lambda: not program.left())
    program.process.stdin.close()
    program.process.stdout.close()


def test_an_unused_port_is_none_that_the_system_gives_away() -> None:
    ports = {unused_tcp_port(host) for host in ("127.0.0.1", "::1") for _ in range(50)}
    assert len(ports) > 90
    assert all(20_000 <= port < 32_000 for port in ports)
    with pytest.raises(OSError):
        unused_tcp_port("192.0.2.1")  # not of this machine


def test_an_unused_port_of_a_name() -> None:
    assert 20_000 <= unused_tcp_port("localhost") < 32_000
    assert 20_000 <= unused_tcp_port(host="localhost") < 32_000
