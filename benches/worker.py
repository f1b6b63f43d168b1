"""A contender's process, controlled over a pipe; see contender.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

from scenarios import Contender, name

HERE = Path(__file__).parent
TARGET = Path(os.environ.get("CARGO_TARGET_DIR", HERE.parent / "target"))
#: Folder of the mock daemon; the blocking client is in its folder `examples`.
RELEASE = TARGET / "release"


class Worker:
    """Runs a contender in its own process.

    Args:
        contender: Kind and event loop.
        control: Control address of its daemon.
        peer: Peer to which its calls and streams go.
    """

    def __init__(self, contender: Contender, control: str, peer: str) -> None:
        kind, loop = contender
        self.name = name(contender)
        program = [sys.executable, str(HERE / "contender.py"), kind, loop]
        if kind == "floor":
            program = [str(RELEASE / "examples" / "floor")]
        self.process = subprocess.Popen(
            [*program, control, peer], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._answer()

    def send(self, *command: object) -> str:
        """Sends a command; returns the reply."""
        assert self.process.stdin is not None
        print(*command, file=self.process.stdin, flush=True)
        return self._answer()

    def round(self, *command: object) -> dict[str, float]:
        """Runs a round; returns its results."""
        result: dict[str, float] = json.loads(self.send(*command))
        return result

    def _answer(self) -> str:
        assert self.process.stdout is not None
        answer: str = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"{self.name}: its process ended: {self.process.wait()}")
        return answer.strip()

    def stop(self) -> None:
        """Ends the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()
