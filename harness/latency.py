"""Latency of a deployed model against the best dense one: interleaved rounds, raw samples kept.

The machines are shared, so a number alone says little. In every round each model has a turn: a call that is not timed,
so that a model finds its own weights in the caches as it would when it is served, and then timed calls, which go
through all batches in turn. How the speed-up follows from the rounds: `harness.speedup`. `torch.utils.benchmark` is not
used because it cannot interleave; like it, the clock starts and stops on an idle device.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from harness.contender import Contender
from harness.device import DTYPES, sensors
from harness.device.execution import NotAvailable, cold_inputs, is_out_of_memory, peak_of, precision, timed, use
from harness.device.observe import Observer
from harness.executed import counters, executed
from harness.modes import has_own_kernels, prepare
from harness.speedup import Turns, speed_up

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
TURN_SECONDS = 0.1  # timed calls of one turn last so long, at most, unless they have to be more


@dataclass(frozen=True)
class Conditions:
    """How a model is run. seconds: timed time per model, at least; energy: also measure joules where the device can."""

    batch: int
    dtype: str
    mode: str = "eager"
    seconds: float = 10.0
    energy: bool = False


@torch.inference_mode()
def compare(
    dense: nn.Module,
    deployed: nn.Module,
    images: Tensor,
    conditions: Conditions,
    others: Sequence[Tensor] = (),
    varies: bool = False,
) -> dict[str, Any]:
    """Times both on images [B, 3, H, W] and as often on each of the other batches of as many: a row for each model, and
    the speed-up with an interval: 95 % for a fixed number of rounds; stopping once it is narrow left 89 to 97 % in
    simulations. varies: whether images differ in the work they take; then times and multiply-adds are means over all of
    them. {"unavailable": reason} where the conditions cannot be."""
    use(images.device)
    batches = [batch.to(DTYPES[conditions.dtype]) for batch in (images, *others)]
    try:
        with precision(images.device, conditions.dtype), sensors.Watch(images.device) as watch:
            row = _compare((dense, deployed), batches, conditions, varies, watch)
    except NotAvailable as error:
        return {"batch": len(images), "unavailable": str(error)}
    return row | {"conditions": watch.conditions}


def _compare(
    models: tuple[nn.Module, nn.Module],
    batches: list[Tensor],
    conditions: Conditions,
    varies: bool,
    watch: sensors.Watch,
) -> dict[str, Any]:
    if conditions.mode == "compile":
        torch.compiler.reset()  # what an earlier call compiled would count towards the limit of versions
    size, device = len(batches[0]), batches[0].device
    meter, energy = _meter(device) if conditions.energy else (None, {})
    dense, deployed = contenders = [_contender(model, batches, conditions, varies) for model in models]
    _warm_up(contenders, min(WARM_UP_LIMIT, WARM_UP_SHARE * conditions.seconds))
    _rounds(contenders, conditions.seconds)
    watch.look()
    for contender in contenders:
        contender.facts |= _facts(contender) | (_energy(contender, meter, size) if meter else {})
    ratio, interval = speed_up(dense.turns, deployed.turns)
    return {
        "batch": size, "seconds": conditions.seconds, "rounds": len(dense.turns), "inputs": len(batches),
        "varies": varies, "speed_up": round(ratio, 4), "speed_up_interval": [round(value, 4) for value in interval], **energy,
        "dense": dense.summary(size), "deployed": deployed.summary(size),
    }  # fmt: skip


def _rounds(contenders: list[Contender], seconds: float) -> None:
    """Turns of both in alternating order, so that neither is always the one that comes after the other."""
    turn, started, required = min(TURN_SECONDS, seconds / ROUNDS), time.perf_counter(), None
    for number in itertools.count():
        for contender in contenders if number % 2 == 0 else reversed(contenders):
            contender.turn(turn)
        if number + 1 < ROUNDS or min(sum(contender.wall) for contender in contenders) < seconds:
            continue
        required = required or time.perf_counter() - started
        is_late = time.perf_counter() - started > required + min(PATIENCE * seconds, LONGEST)
        if is_late or _is_precise(contenders[0].turns, contenders[1].turns):
            return


def _is_precise(dense: Turns, deployed: Turns) -> bool:
    ratio, (low, high) = speed_up(dense, deployed)
    return high - low < 2 * PRECISE * ratio


def _contender(model: nn.Module, batches: list[Tensor], conditions: Conditions, varies: bool) -> Contender:
    prepared = prepare(model, batches[0], conditions.dtype, conditions.mode)
    inputs = cold_inputs([prepared.inputs(batch) for batch in batches])
    return Contender(prepared, inputs, len(batches), batches[0].device, varies)


def _warm_up(contenders: list[Contender], limit: float) -> None:
    """Runs both in turns until each one's medians of successive windows have agreed; not `warm` where that took longer
    than `limit` seconds."""
    last: dict[int, list[float]] = {}
    calls, started, passes = float(WINDOW_CALLS), time.perf_counter(), 0
    numbers = [itertools.count() for _ in contenders]
    while passes < 2 or (not all(c.warm for c in contenders) and time.perf_counter() - started < limit):
        for index, contender in enumerate(contenders):
            window = _window(contender, calls, numbers[index])
            contender.warm |= index in last and is_stable(last[index], window)
            last[index] = window
        calls, passes = min(calls * GROWTH, LONGEST_WINDOW), passes + 1


def _window(contender: Contender, calls: float, numbers: Iterator[int]) -> list[float]:
    """Seconds of that many calls at least, as many of each kind, or windows would differ by what is in them."""
    window: list[float] = []
    while len(window) < calls or len(window) % contender.kinds or sum(window) < WINDOW_SECONDS:
        images = contender.input(next(numbers))
        window.append(timed(contender.device, lambda images=images: contender.prepared.forward(images))[0])
    return window


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


def _facts(contender: Contender) -> dict[str, Any]:
    """Bytes of weights and what an eager forward needs with them at most (None where it does not fit); how many
    operations it is, and how often the host has to wait. Eager in every mode: a graph's memory is its own and shows in
    no call."""
    model, inputs = contender.prepared.model, contender.inputs[: contender.kinds]
    facts: dict[str, Any] = {"weights_bytes": sum(x.nbytes for x in (*model.parameters(), *model.buffers()))}
    try:
        with Observer() as seen:
            model(inputs[0])
        peak = max(peak_of(contender.device, lambda images=images: model(images)) for images in inputs)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return facts | {"peak_bytes": None, "operations": None, "waits": None}
    if has_own_kernels(model):  # what it executes is known only now
        run = executed(model, torch.cat(inputs) if contender.varies else inputs[0][:1])
        facts |= {"macs_executed": run.count.total, "parts_executed": run.count.parts, **counters(run.only)}
    if has_own_kernels(model) or contender.prepared.refused:
        facts["kernels_refused"] = contender.prepared.refused
    facts["peak_bytes"] = facts["weights_bytes"] + peak
    return facts | {"operations": seen.operations, "waits": len(seen.waits)}


def _meter(device: torch.device) -> tuple[sensors.EnergyMeter | None, dict[str, Any]]:
    """The device's meter, and its idle power before anything runs; or the reason why there is none."""
    try:
        meter = sensors.EnergyMeter(device)
    except RuntimeError as error:
        return None, {"energy": f"n/a: {error}"}
    return meter, {"idle_watts": round(meter.idle_watts(), 1)}


def _energy(contender: Contender, meter: sensors.EnergyMeter, batch: int) -> dict[str, Any]:
    """Joules per image in a window of its own, over as many calls with each batch."""
    inputs = itertools.cycle(contender.inputs)

    def go_through_all() -> None:
        for images in itertools.islice(inputs, contender.batches):
            contender.prepared.forward(images)

    joules, passes = meter.per_call(go_through_all)
    return {
        "joules_per_image": round(joules / contender.batches / batch, 6),
        "energy_calls": passes * contender.batches,
    }
