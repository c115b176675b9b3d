"""One of the two models of a latency measurement: its calls in turn, and what the samples say."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from harness.device.execution import timed
from harness.modes import Prepared

TURN_CALLS = 2  # timed calls in one turn, at least
KEPT = 2000  # raw samples in a record


@dataclass
class Contender:
    """One of the two models, and what was measured of it.

    inputs: what it is called with, in turn; the first `batches` of them differ, those after them are copies. varies:
    whether the batches differ in their work. wall, inside: seconds of each timed call, by the wall clock and between
    events on the device; call i is of batch i % batches. turns: of each round, the median of each batch, or of all
    together where they do not differ in their work.
    """

    prepared: Prepared
    inputs: list[Tensor]
    batches: int
    device: torch.device
    varies: bool = False
    wall: list[float] = field(default_factory=list)
    inside: list[float] = field(default_factory=list)
    turns: list[list[float]] = field(default_factory=list)
    warm: bool = False
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def kinds(self) -> int:
        """How many batches are told apart."""
        return self.batches if self.varies else 1

    def input(self, number: int) -> Tensor:
        """The one of call `number`."""
        return self.inputs[number % len(self.inputs)]

    def timed_call(self) -> float:
        images = self.input(len(self.wall))
        wall, inside = timed(self.device, lambda: self.prepared.forward(images))
        self.wall.append(wall)
        if inside is not None:
            self.inside.append(inside)
        return wall

    def turn(self, seconds: float) -> None:
        """A call that does not count, and timed calls for about that long: as many of each kind."""
        # The input that was timed last: it takes nothing from the others, and leaves the next one out of the caches.
        self.prepared.forward(self.input(len(self.wall) - 1))
        times: list[float] = []
        while len(times) < TURN_CALLS or len(times) % self.kinds or sum(times) + times[-1] < seconds:
            times.append(self.timed_call())
        self.turns.append(_medians(times, self.kinds))

    def summary(self, batch: int) -> dict[str, Any]:
        """Milliseconds per batch: p50 of all calls always, p90 from 100 samples, p99 from 1,000; input_ms: the median
        of each batch; mean_ms, by which images_per_second goes: the mean of these where the batches differ in their
        work, and p50 where they do not; and the raw samples. noise: the 90th percentile over the median, of calls with
        the same work."""
        same, inputs = _medians(self.wall, self.kinds), _medians(self.wall, self.batches)
        scatter = [seconds / same[call % self.kinds] for call, seconds in enumerate(self.wall)]
        row: dict[str, Any] = {
            "kernels": self.prepared.kernels, "channels_last": self.prepared.channels_last, "warm": self.warm,
            "samples": len(self.wall), "noise": round(quantile(scatter, 0.9), 4),
        }  # fmt: skip
        for percent, least in ((50, 1), (90, 100), (99, 1000)):
            if len(self.wall) >= least:
                row[f"p{percent}_ms"] = _milliseconds(quantile(self.wall, percent / 100))
        if self.inside:
            row["device_p50_ms"] = _milliseconds(statistics.median(self.inside))
        mean, every = statistics.mean(same), _thinning(len(self.wall), self.batches)
        return row | {
            "mean_ms": _milliseconds(mean), "input_ms": [_milliseconds(value) for value in inputs],
            "images_per_second": round(batch / mean, 2), **self.facts,
            "raw_every": every, "raw_ms": [_milliseconds(value) for value in self.wall[::every]],
        }  # fmt: skip


def _medians(times: list[float], kinds: int) -> list[float]:
    """Of each kind, where the calls go through them in turn."""
    return [statistics.median(times[kind::kinds]) for kind in range(kinds)]


def _thinning(samples: int, batches: int) -> int:
    """Keeping every so many-th sample leaves KEPT at most, and some of every batch."""
    every = math.ceil(samples / KEPT)
    while math.gcd(every, batches) > 1:
        every += 1
    return every


def quantile(values: list[float], share: float) -> float:
    """The value below which that share lies; the middle of the two for the median."""
    ordered = sorted(values)
    return statistics.median(ordered) if share == 0.5 else ordered[min(int(share * len(ordered)), len(ordered) - 1)]


def _milliseconds(seconds: float) -> float:
    return round(seconds * 1e3, 4)
