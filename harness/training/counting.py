"""Multiply-adds that training executes, counted as it runs: methods differ in what their training costs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from harness.data.dataset import Batch
from harness.device import Plan
from harness.dispatched import Products
from methods.core.noise import Noise
from methods.core.pooled import value_of

COUNTED_IMAGES = 2


def training_macs(objective: torch.nn.Module, batch: Batch, plan: Plan, most: int | None = None) -> float:
    """Of a step per image: forward and backward, with the teacher, by a few images (`most` at most) that leave nothing behind."""
    part, macs = batch.split(min(COUNTED_IMAGES, most or COUNTED_IMAGES))[0], []
    buffers = [buffer.clone() for buffer in objective.buffers()]  # of batch norms, say
    with counted(objective, macs):
        with plan.autocast():
            terms = objective(part.images, part.targets, Noise(0, 0, part.keys))
        sum(map(value_of, terms.values())).backward()
    objective.zero_grad(set_to_none=True)
    with torch.no_grad():
        for buffer, before in zip(objective.buffers(), buffers, strict=True):
            buffer.copy_(before)
    return macs[-1] / len(part.images)


@contextlib.contextmanager
def counted(model: torch.nn.Module, macs: list[float] | None) -> Iterator[None]:
    """Appends to `macs` what is executed inside, of `model`, which errors name; None: does nothing."""
    if macs is None:
        yield
        return
    with Products(model) as products:
        yield
    macs.append(products.total)
