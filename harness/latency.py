"""Latency of a deployed model against the best dense one: interleaved rounds, raw samples kept.

The machines are shared, so a number alone says little. In every round each model has a turn: a call that is not timed, so that
a model finds its own weights in the caches as it would when it is served, and then timed calls. The speed-up is the median
over rounds of the ratio within a round. `torch.utils.benchmark` is not used because it cannot interleave; like it, the clock
starts and stops on an idle device.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from harness.device import DTYPES, sensors
from harness.device.execution import NotAvailable, cold_inputs, is_out_of_memory, peak_of, precision, timed, use
from harness.device.observe import Observer
from harness.modes import Prepared, has_own_kernels, prepare
from harness.trace import traced

WARM_UP_LIMIT = 30.0  # seconds for both models together ...
WARM_UP_SHARE = (
    100.0  # ... and so many times the seconds asked for: who measures for an instant does not wait for half a minute
)
STABLE = 0.01  # warmed up when the medians of successive windows differ by less ...
SCATTER = (
    0.02  # ... or by less than one standard error, where windows so long that this is below 2 % still scatter more
)
GROWTH, LONGEST_WINDOW = 1.6, 20  # a window has so many times the calls of the one before, up to so many
WINDOW_CALLS, WINDOW_SECONDS = 5, 0.1  # a warm-up window has at least so many calls and lasts so long
ROUNDS = 15  # at least
PRECISE = 0.015  # rounds go on until the speed-up's interval is this share of it to either side ...
PATIENCE = 6.0  # ... or have lasted so many times the seconds asked for beyond what had to be,
LONGEST = 15.0  # and at most so many seconds
TURN_CALLS, TURN_SECONDS = 2, 0.1  # timed calls in one turn, at least; beyond that for so many seconds, at most
KEPT = 2000  # raw samples in a record


@dataclass(frozen=True)
class Conditions:
    """How a model is run. seconds: timed time per model, at least; energy: also measure joules where the device can."""

    batch: int
    dtype: str
    mode: str = "eager"
    seconds: float = 10.0
    energy: bool = False


@dataclass
class Contender:
    """One of the two models, and what was measured of it. wall, inside: seconds of each timed call, by the wall clock and
    between events on the device; turns: the median of each round's turn."""

    prepared: Prepared
    images: Iterator[Tensor]
    device: torch.device
    wall: list[float] = field(default_factory=list)
    inside: list[float] = field(default_factory=list)
    turns: list[float] = field(default_factory=list)
    warm: bool = False
    facts: dict[str, Any] = field(default_factory=dict)

    def call(self) -> None:
        self.prepared.forward(next(self.images))

    def timed_call(self) -> float:
        wall, inside = timed(self.device, self.call)
        self.wall.append(wall)
        if inside is not None:
            self.inside.append(inside)
        return wall

    def turn(self, seconds: float) -> None:
        """A call that does not count, and timed calls for about that long."""
        self.call()
        times: list[float] = []
        while len(times) < TURN_CALLS or sum(times) + times[-1] < seconds:
            times.append(self.timed_call())
        self.turns.append(statistics.median(times))

    def summary(self, batch: int) -> dict[str, Any]:
        """Milliseconds per batch: p50 always, p90 from 100 samples, p99 from 1,000; and the raw samples."""
        every = math.ceil(len(self.wall) / KEPT)
        row: dict[str, Any] = {
            "kernels": self.prepared.kernels, "channels_last": self.prepared.channels_last, "warm": self.warm,
            "samples": len(self.wall), "noise": round(quantile(self.wall, 0.9) / quantile(self.wall, 0.5), 4),
        }  # fmt: skip
        for percent, least in ((50, 1), (90, 100), (99, 1000)):
            if len(self.wall) >= least:
                row[f"p{percent}_ms"] = _milliseconds(quantile(self.wall, percent / 100))
        if self.inside:
            row["device_p50_ms"] = _milliseconds(statistics.median(self.inside))
        row["images_per_second"] = round(batch / statistics.median(self.wall), 2)
        return row | self.facts | {"raw_every": every, "raw_ms": [_milliseconds(value) for value in self.wall[::every]]}


@torch.inference_mode()
def compare(
    dense: nn.Module, deployed: nn.Module, images: Tensor, conditions: Conditions, others: Sequence[Tensor] = ()
) -> dict[str, Any]:
    """Times both on images [B, 3, H, W], and in turn on other batches of as many, since images may differ in what they take: a row for each, and the median of the rounds' ratios (dense over deployed) with an
    interval for it (95 % for a fixed number of rounds; stopping once it is narrow costs some of that). {"unavailable": reason}
    where the conditions cannot be."""
    use(images.device)
    try:
        with precision(images.device, conditions.dtype), sensors.Watch(images.device) as watch:
            row = _compare(dense, deployed, images, conditions, watch, others)
    except NotAvailable as error:
        return {"batch": len(images), "unavailable": str(error)}
    return row | {"conditions": watch.conditions}


def _compare(
    dense: nn.Module,
    deployed: nn.Module,
    images: Tensor,
    conditions: Conditions,
    watch: sensors.Watch,
    others: Sequence[Tensor],
) -> dict[str, Any]:
    if conditions.mode == "compile":
        torch.compiler.reset()  # what an earlier call compiled would count towards the limit of versions
    images, *others = (batch.to(DTYPES[conditions.dtype]) for batch in (images, *others))
    names = ("dense", "deployed")
    meter, energy = _meter(images.device) if conditions.energy else (None, {})
    contenders = [_contender(model, images, others, conditions) for model in (dense, deployed)]
    _warm_up(contenders, min(WARM_UP_LIMIT, WARM_UP_SHARE * conditions.seconds))
    ratios = _rounds(contenders, conditions.seconds)
    watch.look()
    for contender in contenders:
        contender.facts |= _facts(contender, images) | (_energy(contender, meter, len(images)) if meter else {})
    return {
        "batch": len(images), "seconds": conditions.seconds, "rounds": len(ratios), "speed_up": round(statistics.median(ratios), 4),
        "speed_up_interval": [round(value, 4) for value in median_interval(ratios)], **energy,
        **{name: contender.summary(len(images)) for name, contender in zip(names, contenders, strict=True)},
    }  # fmt: skip


def _rounds(contenders: list[Contender], seconds: float) -> list[float]:
    """Turns of both in alternating order, so that neither is always the one that comes after the other; the rounds' ratios."""
    turn, started, required = min(TURN_SECONDS, seconds / ROUNDS), time.perf_counter(), None
    ratios: list[float] = []
    while True:
        for contender in contenders if len(ratios) % 2 == 0 else reversed(contenders):
            contender.turn(turn)
        ratios.append(contenders[0].turns[-1] / contenders[1].turns[-1])
        if len(ratios) < ROUNDS or min(sum(contender.wall) for contender in contenders) < seconds:
            continue
        required = required or time.perf_counter() - started
        low, high = median_interval(ratios)
        is_precise = high - low < 2 * PRECISE * statistics.median(ratios)
        if is_precise or time.perf_counter() - started > required + min(PATIENCE * seconds, LONGEST):
            return ratios


def _contender(model: nn.Module, images: Tensor, others: Sequence[Tensor], conditions: Conditions) -> Contender:
    prepared = prepare(model, images, conditions.dtype, conditions.mode)
    inputs = [*cold_inputs(prepared.inputs(images)), *map(prepared.inputs, others)]
    return Contender(prepared, itertools.cycle(inputs), images.device)


def _warm_up(contenders: list[Contender], limit: float) -> None:
    """Runs both in turns until each one's medians of successive windows have agreed; not `warm` where that took longer than `limit` seconds."""
    last: dict[int, list[float]] = {}
    calls, started, passes = float(WINDOW_CALLS), time.perf_counter(), 0
    while passes < 2 or (not all(c.warm for c in contenders) and time.perf_counter() - started < limit):
        for index, contender in enumerate(contenders):
            window: list[float] = []
            while len(window) < calls or sum(window) < WINDOW_SECONDS:
                window.append(timed(contender.device, contender.call)[0])
            contender.warm |= index in last and is_stable(last[index], window)
            last[index] = window
        calls, passes = min(calls * GROWTH, LONGEST_WINDOW), passes + 1


def is_stable(before: list[float], after: list[float]) -> bool:
    """Whether two windows' medians differ by less than STABLE, or by less than a standard error of their difference that is
    itself below SCATTER: on a machine that noisy, warming further would show nothing."""
    one, other = statistics.median(before), statistics.median(after)
    error = math.hypot(_error_of_median(before), _error_of_median(after))
    return abs(one - other) < max(STABLE * one, error if error < SCATTER * one else 0.0)


def _error_of_median(values: list[float]) -> float:
    """From the quartiles, as for a normal distribution: outliers, which noise is made of, do not count."""
    low, _, high = statistics.quantiles(values, n=4)
    return 1.253 * (high - low) / 1.349 / math.sqrt(len(values))


def _facts(contender: Contender, images: Tensor) -> dict[str, Any]:
    """Bytes of weights and what an eager forward needs with them (None where it does not fit); how many operations it is, and
    how often the host has to wait. Eager in every mode: a graph's memory is its own and shows in no call."""
    inputs, model = contender.prepared.inputs(images), contender.prepared.model
    facts: dict[str, Any] = {"weights_bytes": sum(x.nbytes for x in (*model.parameters(), *model.buffers()))}
    try:
        with Observer() as seen:
            model(inputs)
        peak = facts["weights_bytes"] + peak_of(contender.device, lambda: model(inputs))
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return facts | {"peak_bytes": None, "operations": None, "waits": None}
    if has_own_kernels(model):  # what it executes is known only now
        count = traced(model, inputs[:1])
        facts |= {
            "macs_executed": count.total,
            "parts_executed": count.parts,
        }
    if has_own_kernels(model) or contender.prepared.refused:
        facts["kernels_refused"] = contender.prepared.refused
    return facts | {"peak_bytes": peak, "operations": seen.operations, "waits": len(seen.waits)}


def _meter(device: torch.device) -> tuple[sensors.EnergyMeter | None, dict[str, Any]]:
    """The device's meter, and its idle power before anything runs; or the reason why there is none."""
    try:
        meter = sensors.EnergyMeter(device)
    except RuntimeError as error:
        return None, {"energy": f"n/a: {error}"}
    return meter, {"idle_watts": round(meter.idle_watts(), 1)}


def _energy(contender: Contender, meter: sensors.EnergyMeter, batch: int) -> dict[str, Any]:
    """Joules per image in a window of its own."""
    joules, calls = meter.per_call(contender.call)
    return {"joules_per_image": round(joules / batch, 6), "energy_calls": calls}


def median_interval(values: list[float]) -> tuple[float, float]:
    """Order statistics between which the median lies with 95 % at least, by the binomial distribution of ranks; the smallest
    and the largest where there are too few for that."""
    ordered, n = sorted(values), len(values)
    outside, low = 0.0, 0
    while outside + math.comb(n, low) / 2**n <= 0.025 and low < (n - 1) // 2:
        outside += math.comb(n, low) / 2**n
        low += 1
    low = max(low - 1, 0) if outside else 0
    return ordered[low], ordered[n - 1 - low]


def quantile(values: list[float], share: float) -> float:
    """The value below which that share lies; the middle of the two for the median."""
    ordered = sorted(values)
    return statistics.median(ordered) if share == 0.5 else ordered[min(int(share * len(ordered)), len(ordered) - 1)]


def _milliseconds(seconds: float) -> float:
    return round(seconds * 1e3, 4)
