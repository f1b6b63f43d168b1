"""``install(reconnect=True)`` reconnects a P2P to its bootstrap peer."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PROGRAM = str(Path(__file__).with_name("reconnecting.py"))

#: The programs. The peer runs in the program's own process, in a forked one, or in a DHT's. Some
#: programs run below ``python -m p2pclient_rs run --reconnect``, and some do not reconnect.
RUNS = {
    "p2p": [PROGRAM, "on", "p2p"],
    "forked": [PROGRAM, "on", "forked"],
    "dht": [PROGRAM, "on", "dht"],
    "run": ["-m", "p2pclient_rs", "run", "--reconnect", PROGRAM, "on", "p2p"],
    "off": [PROGRAM, "off", "p2p"],
}


@pytest.fixture(scope="module")
def programs(replaced: bool) -> Iterator[dict[str, subprocess.Popen[str]]]:
    """Runs all programs at once, since each waits most of the time."""
    if not replaced:
        pytest.skip("needs install()")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    programs = {
        name: subprocess.Popen([sys.executable, *arguments], **pipes)  # type: ignore[call-overload]
        for name, arguments in RUNS.items()
    }
    yield programs
    for program in programs.values():
        program.kill()
        program.communicate()


def printed(program: subprocess.Popen[str]) -> list[str]:
    """Returns the lines that a program prints until it ends."""
    output, errors = program.communicate(timeout=85)
    assert program.returncode == 0, errors
    assert "destroyed" not in errors
    return output.splitlines()


@pytest.mark.parametrize("name", [name for name in RUNS if name != "off"])
def test_isolated_peer_reconnects_to_its_bootstrap_peer(
    programs: dict[str, subprocess.Popen[str]], name: str
) -> None:
    lost, failed, reconnected, result = printed(programs[name])
    assert "has lost all of its peers" in lost
    assert "cannot connect to its bootstrap peers: /ip4/127.0.0.1/tcp/" in failed
    assert "connection refused" in failed
    assert "is reconnected to /ip4/127.0.0.1/tcp/" in reconnected
    assert result == "connected"


def test_isolated_peer_stays_isolated_without_the_option(
    programs: dict[str, subprocess.Popen[str]],
) -> None:
    assert printed(programs["off"]) == ["isolated"]
