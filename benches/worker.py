"""The process of a contender, told what to do over a pipe; see contender.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

from scenarios import Contender, name

HERE = Path(__file__).parent
TARGET = Path(os.environ.get("CARGO_TARGET_DIR", HERE.parent / "target"))
#: Where the mock daemon and the blocking client are.
EXAMPLES = TARGET / "release" / "examples"


class Worker:
    """A contender's process.

    Args:
        contender: Which it is.
        control: The control address of its daemon.
        peer: The peer that its calls and streams go to.
    """

    def __init__(self, contender: Contender, control: str, peer: str) -> None:
        kind, loop = contender
        self.name = name(contender)
        program = [sys.executable, str(HERE / "contender.py"), kind, loop]
        if kind == "floor":
            program = [str(EXAMPLES / "floor")]
        self.process = subprocess.Popen(
            [*program, control, peer], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._answer()

    def tell(self, *words: object) -> str:
        """What it answers to a line."""
        assert self.process.stdin is not None
        print(*words, file=self.process.stdin, flush=True)
        return self._answer()

    def round(self, *words: object) -> dict[str, float]:
        """What a round comes to."""
        result: dict[str, float] = json.loads(self.tell(*words))
        return result

    def _answer(self) -> str:
        assert self.process.stdout is not None
        answer: str = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"{self.name}: its process ended: {self.process.wait()}")
        return answer.strip()

    def stop(self) -> None:
        """Ends it."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()
