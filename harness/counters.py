"""What common counters say of the same model, and which operations make the difference: users' first question."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from harness.executed import counted
from harness.operations import name_of
from harness.trace import NotTraced, analyse, handlers

OURS = "this benchmark"
TORCHS = "torch's FlopCounterMode, halved"
FVCORES = "fvcore's FlopCountAnalysis"
Operations = Mapping[str, float]  # multiply-adds by the operation's name


def compare_counters(model: nn.Module, images: Tensor) -> list[dict[str, Any]]:
    """A row per counter, ours first: its name, multiply-adds per image (None where it cannot count, with the reason), and
    for each operation where it differs what it counts and what we do. fvcore sees operations as they are written, the
    others as they are dispatched."""
    ours = _mean(lambda image: counted(model, image).by(1), images)
    rows = [_row(OURS, ours, ours), _row(TORCHS, _mean(lambda image: _torchs(model, image), images), ours)]
    return [*rows, _fvcores(model, images, sum(ours.values()))]


def reasons(row: Mapping[str, Any]) -> list[str]:
    """Why a counter's number is another one, in lines for people."""
    if row["macs"] is None:
        return [f"cannot count it: {row['reason']}"]
    return [_reason(operation, **both) for operation, both in row["differs"].items()]


def _reason(operation: str, theirs: float, ours: float) -> str:
    if not theirs:
        return f"has no formula for {operation}: {ours / 1e9:.4f} missing"
    if not ours:
        return f"counts {operation}, which is no matrix product: {theirs / 1e9:.4f} more"
    return f"has another formula for {operation}: {theirs / 1e9:.4f} and not {ours / 1e9:.4f}"


def _row(name: str, theirs: Operations, ours: Operations) -> dict[str, Any]:
    both = {key: {"theirs": theirs.get(key, 0.0), "ours": ours.get(key, 0.0)} for key in [*ours, *theirs]}
    differs = {key: pair for key, pair in both.items() if pair["theirs"] != pair["ours"]}
    return {"name": name, "macs": round(sum(theirs.values())), "differs": differs}


def _fvcores(model: nn.Module, images: Tensor, ours: float) -> dict[str, Any]:
    """fvcore's row: its own rules beside ours for the same trace; what no rule of either is for makes the rest."""
    try:
        by_default = _mean(lambda image: analyse(model, image).by_operator(), images)
    except NotTraced as reason:
        return {"name": FVCORES, "macs": None, "reason": str(reason), "differs": {}}
    known = by_default
    with contextlib.suppress(NotTraced):
        known = _mean(lambda image: analyse(model, image, handlers()).by_operator(), images)
    rest = ours - sum(known.values())
    return _row(FVCORES, by_default, known | ({"what its trace does not show": rest} if rest else {}))


def _mean(count: Callable[[Tensor], Operations], images: Tensor) -> dict[str, float]:
    """Over images, each counted by itself."""
    sums: Counter[str] = Counter()
    for image in images.split(1):
        sums.update(count(image))
    return {name: float(macs) / len(images) for name, macs in sums.items() if macs}


@torch.no_grad()
def _torchs(model: nn.Module, image: Tensor) -> dict[str, float]:
    with FlopCounterMode(display=False) as counter:
        model.eval()(image)
    of_all = counter.get_flop_counts().get("Global", {})
    return {name_of(target): flops / 2 for target, flops in of_all.items()}
