"""The process of a contender, told what to do over a pipe; see contender.py."""

import subprocess
import sys
from pathlib import Path


class Worker:
    """A contender's process."""

    def __init__(self, kind: str, loop: str, control: str, peer: str) -> None:
        program = str(Path(__file__).with_name("contender.py"))
        command = [sys.executable, program, kind, loop]
        self.process = subprocess.Popen(
            [*command, control, peer], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        if self._answer() != "ready":
            raise SystemExit(f"{kind} on {loop} did not start")

    def tell(self, *words: object) -> str:
        """What it answers to a line."""
        assert self.process.stdin is not None
        print(*words, file=self.process.stdin, flush=True)
        return self._answer()

    def round(self, scenario: str, count: int, *arguments: object) -> tuple[float, float]:
        """The wall and CPU time of one of so many operations, in seconds."""
        wall, cpu = self.tell(scenario, count, *arguments).split()
        return float(wall) / count, float(cpu) / count

    def _answer(self) -> str:
        assert self.process.stdout is not None
        answer: str = self.process.stdout.readline()
        return answer.strip()

    def stop(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()
