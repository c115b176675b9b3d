"""Keeps a busy neighbour from stopping torch's threads: how they wait for each other depends on whether the cores are free.

After every parallel region OpenMP's threads wait for the next one. GNU's library, which torch's wheels bring along, lets them
spin for about 3 ms before they sleep: the fastest way where every thread has a core, and the slowest where another process wants
one too, since a thread that spins keeps the core from the one it waits for. Two cores of a Xeon, a small ViT in training: spinning
1.00 alone and 0.11 beside one busy process; never spinning (GOMP_SPINCOUNT=0) 0.77 and 0.50; one thread 0.59 and 0.57.

The library reads its variables once, when it loads, but looks at one thing whenever a thread waits: while it manages more threads
than there are cores, it spins only a hundred times. So `SpinLimit` watches what other processes use, and while they leave too few
cores, it keeps threads of OpenMP's that do nothing. Neither the number of threads that compute nor any result changes.
"""

from __future__ import annotations

import contextlib
import math
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

INTERVAL = 0.5  # seconds between two looks at the machine
MARGIN = 0.3  # cores that may be missing before it matters
QUIET = 2  # intervals without a neighbour after which threads spin again
SIZE = 2**19  # elements of an operation that OpenMP certainly divides
VARIABLES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME")  # who sets one of these has decided
STAT = Path("/proc/stat")


class SpinLimit:
    """A context around training and evaluation on the CPU: limits spinning while other processes use the cores.

    used: seconds of the cores' time that all processes used so far, this one's included; None where the system does not say.
    """

    def __init__(self, interval: float = INTERVAL, used: Callable[[], float | None] | None = None) -> None:
        self.cores = (
            sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
        )
        self.interval, self.used = interval, used or (lambda: core_seconds(self.cores))
        self.seconds = self.crowded_seconds = 0.0
        self.is_crowded, self.unwatched = False, ""  # the latter: why nothing is watched
        self._ended = threading.Event()
        self._watcher: threading.Thread | None = None
        self._idle = IdleThreads(len(self.cores))

    @property
    def decided(self) -> dict[str, str]:
        """The variables by which the user has decided how threads wait: then nothing is done here."""
        return {name: os.environ[name] for name in VARIABLES if name in os.environ}

    def __enter__(self) -> SpinLimit:
        self.seconds = self.crowded_seconds = 0.0
        self.unwatched = (
            "one thread"
            if torch.get_num_threads() < 2
            else ""
            if self.used() is not None
            else "the system does not say"
        )
        if not self.decided and not self.unwatched:
            self._ended.clear()
            self._watcher = threading.Thread(target=self._watch, name="spin-limit", daemon=True)
            self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._watcher is not None:
            self._ended.set()
            self._watcher.join()
            self._watcher = None

    def facts(self) -> dict[str, Any]:
        """For a record: by what rule threads waited, and for which share of the time others used the cores."""
        if self.decided:
            return {"rule": "as set", **self.decided}
        if self.unwatched:
            return {"rule": f"not watched: {self.unwatched}"}
        share = self.crowded_seconds / self.seconds if self.seconds else 0.0
        return {"rule": "short spins while others use the cores", "crowded_share": round(share, 4)}

    def _watch(self) -> None:
        quiet, before = 0, self._look()
        try:
            while not self._ended.wait(self.interval):
                now = self._look()
                others, passed = others_cores(before, now), now[0] - before[0]
                before, self.seconds = now, self.seconds + passed
                self.crowded_seconds += passed if self.is_crowded else 0.0
                quiet = 0 if others + torch.get_num_threads() > len(self.cores) + MARGIN else quiet + 1
                self._set(quiet < QUIET if self.is_crowded else quiet == 0)
        finally:
            self._set(False)

    def _look(self) -> tuple[float, float, float]:
        """Seconds: by the clock, of the cores used by all, and of this process."""
        return time.perf_counter(), self.used() or 0.0, time.process_time()

    def _set(self, crowded: bool) -> None:
        if crowded and not self.is_crowded:
            self._idle.start()
        elif not crowded and self.is_crowded:
            self._idle.end()
        self.is_crowded = crowded


class IdleThreads:
    """OpenMP threads that sleep: as many as it takes for the library to manage more of them than there are cores."""

    def __init__(self, cores: int) -> None:
        self.cores = cores
        self._threads: list[threading.Thread] = []
        self._ended = threading.Event()

    def start(self) -> None:
        """Starts Python threads, each of which gets a pool of OpenMP's with its first operation and keeps it."""
        threads = torch.get_num_threads()
        wanted = math.ceil((self.cores + 1 - threads) / max(threads - 1, 1))
        self._ended.clear()
        for _ in range(max(wanted, 1)):
            thread = threading.Thread(target=self._hold, name="spin-limit-idle", daemon=True)
            thread.start()
            self._threads.append(thread)

    def end(self) -> None:
        """Their pools end with the threads."""
        self._ended.set()
        for thread in self._threads:
            thread.join()
        self._threads.clear()

    def _hold(self) -> None:
        torch.ones(SIZE, dtype=torch.uint8).add_(1)
        self._ended.wait()


def others_cores(before: tuple[float, float, float], after: tuple[float, float, float]) -> float:
    """How many cores other processes used between two looks (seconds by the clock, of all processes, of this one)."""
    clock, used, own = (b - a for a, b in zip(before, after, strict=True))
    return max(used - own, 0.0) / max(clock, 1e-9)


def core_seconds(cores: list[int]) -> float | None:
    """Seconds that these cores were not idle, what a hypervisor took included; None where /proc/stat does not say."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        wanted, ticks = {f"cpu{number}" for number in cores}, os.sysconf("SC_CLK_TCK")
        lines = [line.split() for line in STAT.read_text(encoding="ascii").splitlines()]
        found = [line for line in lines if line and line[0] in wanted]
        # user, nice, system, (idle, waiting for disks), interrupts of two kinds, stolen
        return sum(int(line[i]) for line in found for i in (1, 2, 3, 6, 7, 8)) / ticks if found else None
    return None
