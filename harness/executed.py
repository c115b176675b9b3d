"""What a model executes, by part and block: counted as it runs by torch's dispatcher, and again by fvcore where it can.

The two have formulas of their own and must agree in every place to the last unit.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from harness.dispatched import Products
from harness.macs import Count
from harness.trace import NotTraced, traced

PROJECTIONS = {"qkv", "proj", "q", "k", "v", "kv", "q_proj", "k_proj", "v_proj"}
DIGITS = 3  # behind the point, where a method's rule gives fractions: sums of these differ by their order
Places = list[dict[str, float]]  # multiply-adds by part: outside the blocks, and then of each block


class CountersDisagree(RuntimeError):
    """The two counters give different numbers: one of them is wrong about an operation."""


@dataclass(frozen=True)
class Executed:
    """only: why the dispatcher is the one counter of this number; empty where fvcore has confirmed it."""

    count: Count
    only: str


def counters(only: str) -> dict[str, Any]:
    """For a record: which counters have found a number, and where it is one, why. only: see `Executed`."""
    return {"counters": ["dispatcher"], "only_one": only} if only else {"counters": ["dispatcher", "fvcore"]}


def executed(
    model: nn.Module, images: Tensor, also: Iterable[str] = (), overhead: Mapping[str, int] | None = None
) -> Executed:
    """What `model` executes on images [B, 3, H, W], each by itself. `also`: names of `harness.operations.ALSO` to be
    counted too. `overhead`: the block to which a module outside the blocks belongs, by its name. UncountedOperation names
    what cannot be counted and where; CountersDisagree says both numbers."""
    named, doubts = frozenset(also), ""
    each = []
    for image in images.split(1):
        places = _by_place(model, counted(model, image, named).by(0), overhead or {})
        try:
            _require_same(places, _by_place(model, traced(model, image, named), overhead or {}))
        except NotTraced as reason:
            doubts = str(reason)
        each.append(places)
    outside, *blocks = (_columns(same) for same in zip(*each, strict=True))
    return Executed(Count.of(outside, blocks), doubts)


def executed_macs(model: nn.Module, images: Tensor) -> float:
    """Multiply-adds that `model` executes on images [B, 3, H, W] at once, per image, by the dispatcher alone."""
    return counted(model, images).total / len(images)


@torch.no_grad()
def counted(model: nn.Module, images: Tensor, also: frozenset[str] = frozenset()) -> Products:
    """A forward in evaluation mode, counted by the dispatcher."""
    model.eval()
    with Products(model, also) as products:
        model(images)
    return products


def _columns(same: tuple[dict[str, float], ...]) -> dict[str, Tensor]:
    """One place's parts, of each image."""
    names = dict.fromkeys(name for place in same for name in place)
    return {name: torch.tensor([place.get(name, 0.0) for place in same], dtype=torch.float64) for name in names}


def _require_same(dispatched: Places, by_fvcore: Places) -> None:
    if dispatched == by_fvcore:
        return
    sums = [sum(sum(place.values()) for place in places) for places in (dispatched, by_fvcore)]
    first = next(i for i, (one, other) in enumerate(zip(dispatched, by_fvcore, strict=True)) if one != other)
    where = f"in block {first - 1}" if first else "outside the blocks"
    raise CountersDisagree(
        f"the dispatcher counts {sums[0]:,.0f} multiply-adds and fvcore's trace {sums[1]:,.0f}; they differ first "
        f"{where}: {dispatched[first]} and {by_fvcore[first]}; a rule of harness/trace.py or a method's `counted` is wrong"
    )


def _by_place(model: nn.Module, by_module: Mapping[str, float], overhead: Mapping[str, int]) -> Places:
    """Sorts each module's own multiply-adds by block and part."""
    places: Places = [{} for _ in range(1 + len(getattr(model, "blocks", ())))]
    for name, exact in by_module.items():
        macs = round(float(exact), DIGITS)
        if macs:
            block, part = _place(name.removeprefix("_orig_mod."), overhead)  # torch.compile wraps a model in another
            place = places[block + 1]
            place[part] = round(place.get(part, 0.0) + macs, DIGITS)
    return places


def _place(name: str, overhead: Mapping[str, int]) -> tuple[int, str]:
    """The block (-1: none) and the part that a module belongs to, by timm's names."""
    inside = re.match(r"blocks\.(\d+)(?:\.|$)", name)
    if inside:
        return int(inside[1]), _part_of_block(name[inside.end() :])
    known = next((block for module, block in overhead.items() if f"{name}.".startswith(f"{module}.")), None)
    if known is not None:
        return known, "norms" if _is_norm(name) else "overhead"
    first = name.split(".")[0]
    outside = {"patch_embed": "embedding", "head": "head", "head_dist": "head"}
    return -1, "norms" if _is_norm(first) else outside.get(first, "overhead")


def _part_of_block(name: str) -> str:
    if _is_norm(name):
        return "norms"
    first, *rest = name.split(".")
    if first == "attn":
        return "attention" if not rest else "projections" if rest[0] in PROJECTIONS else "overhead"
    return "mlp" if first == "mlp" else "overhead"


def _is_norm(name: str) -> bool:
    return "norm" in name.rpartition(".")[2]
