"""Multiply-adds that training executes, counted by torch as it runs: methods differ in what their training costs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch.utils.flop_counter import FlopCounterMode


@contextlib.contextmanager
def counted(macs: list[float] | None) -> Iterator[None]:
    """Appends to `macs` what is executed inside; None: does nothing. torch counts a multiply-add as two operations, and compiled
    code hides its operations, so it does not run here."""
    if macs is None:
        yield
        return
    with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
        yield
    macs.append(counter.get_total_flops() / 2)
