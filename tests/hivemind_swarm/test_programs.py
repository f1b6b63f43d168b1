"""Separate programs: one that calls install() late, and hivemind's commands under ``run``."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from hivemind import DHT
from hivemind.utils import get_dht_time


def test_install_after_importing_hivemind_replaces_its_clients(replaced: bool) -> None:
    program = str(Path(__file__).with_name("install_after_import.py"))
    result = subprocess.run(
        [sys.executable, program, "on" if replaced else "off"],
        stdout=subprocess.PIPE,
        text=True,
        timeout=60,
    )
    bindings = "p2pclient_rs" if replaced else "hivemind"
    assert result.stdout.split() == [bindings, "144", "value"]
    assert result.returncode == 0


def test_hiveminds_run_dht_serves_a_node(replaced: bool) -> None:
    run = ["-m", "p2pclient_rs", "run"] if replaced else []
    script = str(Path(__file__).with_name("run_dht_naming_clients.py"))
    program = [script, "--host_maddrs", "/ip4/127.0.0.1/tcp/0"]
    process = subprocess.Popen(
        [sys.executable, *run, *program],
        stderr=subprocess.STDOUT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    with process:
        try:
            output = ""
            while not (found := re.search(r"(/ip4/127\.0\.0\.1/tcp/\d+/p2p/\w+)\s", output)):
                line = process.stdout.readline()
                assert line, f"it ended with the output:\n{output}"
                output += line
            module = re.search(r"^clients of (\S+)$", output, re.MULTILINE)
            assert module, output
            assert module[1].startswith("p2pclient_rs") == replaced
            dht = DHT(initial_peers=[found[1]], start=True)
            try:
                expiration = get_dht_time() + 60
                assert dht.store("key", "value", expiration)
                assert dht.get("key", latest=True) == ("value", expiration)
            finally:
                dht.shutdown()
        finally:
            process.terminate()
            process.stdout.read()
    assert process.returncode == 0
