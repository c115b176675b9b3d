"""How torch's threads wait while other processes use the cores."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from harness.device.spinning import MARGIN, SpinLimit, core_seconds, others_cores

needs_stat = pytest.mark.skipif(core_seconds([0]) is None, reason="needs Linux's /proc/stat")


@pytest.fixture
def two_threads(monkeypatch):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME"):
        monkeypatch.delenv(name, raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


class Machine:
    """A pretended machine: others keep `others` cores busy, on top of what this process uses."""

    def __init__(self) -> None:
        self.others, self._used, self._last = 0.0, 0.0, time.perf_counter()

    def used(self) -> float:
        now = time.perf_counter()
        self._used, self._last = self._used + self.others * (now - self._last), now
        return self._used + time.process_time()


def os_threads() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


def until(condition, seconds: float = 10.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end and not condition():
        time.sleep(0.01)
    return condition()


@needs_stat
def test_idle_threads_come_with_a_neighbour_and_go_with_it(two_threads):
    torch.ones(2**20).add_(1)  # this thread's own pool is there
    machine, before = Machine(), os_threads()
    with SpinLimit(interval=0.02, used=machine.used) as limit:
        watching = os_threads()
        assert watching == before + 1
        time.sleep(0.1)
        assert not limit.is_crowded  # alone: threads may spin
        machine.others = len(limit.cores)
        assert until(lambda: limit.is_crowded)
        # libgomp must manage more threads than there are cores: its own and ours, each holder's pool without the holder
        assert os_threads() > watching + max(len(limit.cores) - 2, 0)
        machine.others = 0.0
        assert until(lambda: not limit.is_crowded)
        assert until(lambda: os_threads() == watching)
        machine.others = len(limit.cores)
        assert until(lambda: limit.is_crowded)
    assert until(lambda: os_threads() == before)
    assert 0 < limit.facts()["crowded_share"] < 1


@needs_stat
def test_who_has_decided_is_left_alone(two_threads, monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    before = os_threads()
    with SpinLimit(interval=0.01) as limit:
        assert os_threads() == before
    assert limit.facts() == {"rule": "as set", "OMP_WAIT_POLICY": "ACTIVE"}


@given(others=st.floats(0, 64), own=st.floats(0, 64), seconds=st.floats(0.1, 10), start=st.floats(0, 1e6))
def test_what_others_use_is_what_all_use_without_this_process(others, own, seconds, start):
    before = (start, 2 * start, 3 * start)
    after = (start + seconds, 2 * start + (others + own) * seconds, 3 * start + own * seconds)
    assert others_cores(before, after) == pytest.approx(others, abs=1e-6 * max(start, 1))


@needs_stat
def test_a_busy_process_is_seen(two_threads):
    cores = sorted(os.sched_getaffinity(0))
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        time.sleep(0.2)
        before = (time.perf_counter(), core_seconds(cores), time.process_time())
        time.sleep(0.5)
        after = (time.perf_counter(), core_seconds(cores), time.process_time())
    finally:
        busy.kill()
        busy.wait()
    assert others_cores(before, after) > MARGIN


def test_what_is_not_watched_is_recorded_as_such(two_threads):
    with SpinLimit(used=lambda: None) as limit:
        assert limit.facts() == {"rule": "not watched: the system does not say"}
    torch.set_num_threads(1)
    with SpinLimit() as limit:
        assert limit.facts() == {"rule": "not watched: one thread"}
