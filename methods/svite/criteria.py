"""Which connections die, and which grow in their place. The rules are the same for weights, heads and neurons: a score per unit, a
mask of those that are active, and the share of them to drop."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def survivors(score: Tensor, mask: Tensor, count: int) -> Tensor:
    """The active units without the `count` lowest of them: bool, the mask's shape. Whatever ties with the highest of those dropped is
    dropped too."""
    if count == 0:
        return mask.clone()
    threshold = score[mask].kthvalue(count).values
    return mask & (score > threshold)


def by_magnitude(weight: Tensor, mask: Tensor, rate: float) -> Tensor:
    """Who survives when the ceil(rate x active) weights of smallest magnitude die."""
    return survivors(weight.abs(), mask, math.ceil(rate * int(mask.sum())))


def by_sign(weight: Tensor, mask: Tensor, rate: float) -> Tensor:
    """SET (Mocanu et al., 2018): half of the deaths are the smallest positive weights, half the negative ones nearest to zero. (The
    official code keeps the few most negative ones instead of dropping those nearest to zero.)"""
    half = math.ceil(rate * int(mask.sum()) / 2)
    alive = torch.zeros_like(mask)
    for side in (weight > 0, weight < 0):
        active = mask & side
        alive |= survivors(weight.abs(), active, min(half, int(active.sum())))
    return alive  # weights of exactly zero are on neither side, and die


DEATH: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {"magnitude": by_magnitude, "SET": by_sign}


def grow(score: Tensor, alive: Tensor, count: int) -> Tensor:
    """The units alive and the `count` highest of all others: bool, the mask's shape. Those that died in the same update are candidates,
    too. Exactly `count` are added (the official code fills up from active units where gradients are zero, and loses some)."""
    candidates = (~alive).flatten().nonzero().squeeze(1)
    chosen = candidates[score.flatten()[candidates].topk(count, sorted=False).indices]
    return alive.flatten().index_fill(0, chosen, True).view(alive.shape)


class Growth:
    """Scores connections that may grow. kind: "gradient" (magnitude of the last step's gradient), "random", or "momentum" (of a running
    mean of gradients)."""

    BETA = 0.9  # of the running mean, as Adam's

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._means: dict[str, Tensor] = {}

    def watch(self, layers: Mapping[str, nn.Module]) -> None:
        """After every step."""
        if self.kind != "momentum":
            return
        for name, layer in layers.items():
            if layer.weight.grad is not None:
                mean = self._means.setdefault(name, torch.zeros_like(layer.weight, dtype=torch.float32))
                if mean.device != layer.weight.device:  # the state came from a file
                    mean = self._means[name] = mean.to(layer.weight.device)
                mean.lerp_(layer.weight.grad.float(), 1 - self.BETA)

    def of_weight(self, name: str, weight: Tensor) -> Tensor:
        """A score per element of the weight."""
        if self.kind == "random":
            return torch.rand(weight.shape).to(weight.device)  # the CPU's generator, whatever the device
        source = weight.grad if self.kind == "gradient" else self._means.get(name)
        return torch.zeros_like(weight) if source is None else source.abs()

    def state_dict(self) -> dict[str, Any]:
        return dict(self._means)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._means = dict(state)
