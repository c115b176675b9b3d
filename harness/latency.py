"""Latency of deployed models against the best dense one: interleaved rounds, raw samples kept.

The machines are shared, so a number alone says little: every round times all models one after the other, and the
speed-up is the median over rounds of the ratio within a round.
"""

from __future__ import annotations

import copy
import statistics
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from harness import device as devices

WARM_UP_LIMIT = 30.0  # seconds
STABLE = 0.02  # warmed up when the medians of successive windows differ by less
WINDOW = 5  # forwards per warm-up window
MIN_ROUNDS = 15


@dataclass
class Timing:
    """seconds: one forward of a whole batch per round. kernel: the attention kernel that was the faster one."""

    kernel: str
    seconds: list[float] = field(default_factory=list)
    warm: bool = True
    peak_memory: int | None = None

    def summary(self) -> dict[str, Any]:
        """Milliseconds per batch: p50 always, p90 from 100 samples, p99 from 1,000; and the raw samples."""
        ordered = sorted(self.seconds)
        row: dict[str, Any] = {"kernel": self.kernel, "warm": self.warm, "samples": len(ordered)}
        for percent, least in ((50, 1), (90, 100), (99, 1000)):
            if len(ordered) >= least:
                row[f"p{percent}_ms"] = _milliseconds(_quantile(ordered, percent / 100))
        row["peak_memory"] = self.peak_memory
        row["raw_ms"] = [_milliseconds(value) for value in self.seconds]
        return row


@torch.inference_mode()
def compare(dense: nn.Module, deployed: nn.Module, images: Tensor, dtype: str, seconds: float) -> dict[str, Any]:
    """Times both on images [B, 3, H, W] for at least `seconds` each: a row for each, and the median of the rounds'
    ratios (dense over deployed)."""
    kind, device = devices.DTYPES[dtype], images.device
    images = images.to(kind)
    models = [_fastest(model, images, kind) for model in (dense, deployed)]
    timings = [timing for _, timing in models]
    rounds = 0
    while rounds < MIN_ROUNDS or min(sum(timing.seconds) for timing in timings) < seconds:
        # The order alternates, so that neither always runs on the caches that the other left.
        for model, timing in models if rounds % 2 == 0 else reversed(models):
            timing.seconds.append(_forward_seconds(model, images))
        rounds += 1
    for model, timing in models:
        devices.reset_peak_memory(device)
        model(images)
        timing.peak_memory = devices.peak_memory(device)
    ratios = [a / b for a, b in zip(timings[0].seconds, timings[1].seconds, strict=True)]
    return {
        "batch": len(images), "dtype": dtype, "mode": "eager",
        "dense": timings[0].summary(), "deployed": timings[1].summary(), "speed_up": round(statistics.median(ratios), 4),
    }  # fmt: skip


def _fastest(model: nn.Module, images: Tensor, dtype: torch.dtype) -> tuple[nn.Module, Timing]:
    """A copy of the model in that dtype with the attention kernel, plain or fused, that is faster on these images."""
    candidates = []
    for kernel in ("plain", "fused"):
        candidate = copy.deepcopy(model).to(images.device, dtype).eval()
        devices.set_attention(candidate, kernel == "fused")
        candidates.append((candidate, Timing(kernel, warm=_warm_up(candidate, images))))
    samples: list[list[float]] = [[], []]
    for _ in range(WINDOW):
        for (candidate, _timing), times in zip(candidates, samples, strict=True):
            times.append(_forward_seconds(candidate, images))
    best = min(range(2), key=lambda index: statistics.median(samples[index]))
    return candidates[best]


def _warm_up(model: nn.Module, images: Tensor) -> bool:
    """Runs the model until the medians of successive windows agree; False where they did not within the limit."""
    started, last = devices.clock(images.device), None
    while devices.clock(images.device) - started < WARM_UP_LIMIT:
        median = statistics.median(_forward_seconds(model, images) for _ in range(WINDOW))
        if last is not None and abs(median - last) < STABLE * last:
            return True
        last = median
    return False


def _forward_seconds(model: nn.Module, images: Tensor) -> float:
    started = devices.clock(images.device)
    model(images)
    return devices.clock(images.device) - started


def _quantile(ordered: list[float], share: float) -> float:
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)] if share != 0.5 else statistics.median(ordered)


def _milliseconds(seconds: float) -> float:
    return round(seconds * 1e3, 4)
