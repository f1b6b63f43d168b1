"""Measures a process while it works: memory, descriptors, CPU time, event loop stalls."""

from __future__ import annotations

import os
import resource
import time
from dataclasses import asdict, dataclass
from typing import Any

import anyio

MIB = 1 << 20
_PAGE = resource.getpagesize()
_BEAT = 0.02
_SAMPLING = 0.25
_MAX_SAMPLES = 4096


def resident(pid: int) -> float:
    """Returns the resident memory of a process, in MiB."""
    with open(f"/proc/{pid}/statm") as statm:
        return int(statm.read().split()[1]) * _PAGE / MIB


def descriptors() -> int:
    """Returns the number of open descriptors of this process."""
    return len(os.listdir("/proc/self/fd")) - 1  # without the one that listdir opens


class _Thread:
    """Kernel statistics of this thread and process. The files stay open, since there may be times
    without a free descriptor."""

    def __init__(self) -> None:
        self._statm = os.open("/proc/self/statm", os.O_RDONLY)
        self._schedstat = os.open("/proc/thread-self/schedstat", os.O_RDONLY)

    def resident(self) -> float:
        return int(os.pread(self._statm, 200, 0).split()[1]) * _PAGE / MIB

    def waited_for_cpu(self) -> float:
        """Returns for how long the thread was runnable but had no CPU, in seconds."""
        return int(os.pread(self._schedstat, 200, 0).split()[1]) / 1e9

    def close(self) -> None:
        os.close(self._statm)
        os.close(self._schedstat)


@dataclass
class Measured:
    """Measurements of a process, from the start of its work to the end."""

    operations: int
    seconds: float
    #: CPU time per operation, in microseconds.
    cpu_us: float
    descriptors_before: int
    descriptors_after: int
    #: Resident memory in MiB: before, after a tenth of the operations, at the end, and the peak.
    rss_before: float
    rss_tenth: float
    rss_end: float
    rss_peak: float
    #: Growth after that tenth in MiB per minute: the slope of a regression line.
    rss_slope: float
    #: Longest delay of the event loop in milliseconds, and the longest one after deducting the time
    #: in which the thread had no CPU.
    stall_ms: float
    own_stall_ms: float

    @property
    def growth(self) -> float:
        return self.rss_end - self.rss_tenth

    def asdict(self) -> dict[str, Any]:
        return {
            key: round(value, 2) if isinstance(value, float) else value
            for key, value in asdict(self).items()
        }


class Meter:
    """Measures this process while ``run`` runs in a task."""

    def __init__(self) -> None:
        self.operations = 0
        self.peak = 0.0
        self._began = time.monotonic()
        self._cpu = time.process_time()
        self._descriptors = descriptors()
        self._thread = _Thread()
        self._rss = self._thread.resident()
        self._samples: list[tuple[float, int, float]] = []
        self._stall = self._own_stall = 0.0

    async def run(self) -> None:
        every, next_sample, waited = _SAMPLING, 0.0, self._thread.waited_for_cpu
        while True:
            due, before = time.monotonic() + _BEAT, waited()
            await anyio.sleep(_BEAT)
            now = time.monotonic()
            late = now - due
            self._stall = max(self._stall, late)
            if late > self._own_stall:
                self._own_stall = max(self._own_stall, late - (waited() - before))
            if now >= next_sample:
                self.sample()
                next_sample = now + every
                if len(self._samples) >= _MAX_SAMPLES:
                    del self._samples[1::2]
                    every *= 2

    def sample(self) -> float:
        """Records the current resident memory, and returns it."""
        rss = self._thread.resident()
        self.peak = max(self.peak, rss)
        self._samples.append((time.monotonic(), self.operations, rss))
        return rss

    def result(self, end: float) -> Measured:
        """Returns the measurements, once everything is closed.

        Args:
            end: Resident memory at the end of the work.
        """
        self._thread.close()
        seconds = time.monotonic() - self._began
        operations = max(self.operations, 1)
        later = [s for s in self._samples if s[1] >= self.operations / 10] or self._samples[-1:]
        return Measured(
            operations=self.operations,
            seconds=seconds,
            cpu_us=(time.process_time() - self._cpu) / operations * 1e6,
            descriptors_before=self._descriptors,
            descriptors_after=descriptors(),
            rss_before=self._rss,
            rss_tenth=later[0][2] if later else end,
            rss_end=end,
            rss_peak=max(self.peak, end),
            rss_slope=_slope([(at, rss) for at, _, rss in later]) * 60,
            stall_ms=self._stall * 1e3,
            own_stall_ms=max(self._own_stall, 0.0) * 1e3,
        )


def _slope(points: list[tuple[float, float]]) -> float:
    """Returns the slope of the regression line."""
    if len(points) < 2:
        return 0.0
    mean_x = sum(x for x, _ in points) / len(points)
    mean_y = sum(y for _, y in points) / len(points)
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / spread if spread else 0.0
