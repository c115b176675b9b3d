"""Single weights as units: SViTE."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from methods.core.masking import bake, mask_densities, mask_layer, maskable, masked_layers
from methods.svite.criteria import DEATH, Growth, grow
from methods.svite.pattern import Moved, Units


def is_weight(name: str) -> bool:
    """Which weights are sparse: all of linear layers and convolutions, patch embedding and classifier included, but the token
    scorer's. (The official code: every parameter of two or four dimensions.)"""
    return not name.startswith("gumbel.")


@dataclass(frozen=True)
class Unstructured:
    """densities: shapes of weights by name to the density of each. death: a name in DEATH."""

    densities: Callable[[Mapping[str, tuple[int, ...]]], dict[str, float]]
    death: str = "magnitude"

    def mask(self, model: nn.Module) -> None:
        """Initial masks: each weight stays with the probability that is its layer's density, by torch's generator."""
        layers = maskable(model, is_weight)
        densities = self.densities({name: tuple(layer.weight.shape) for name, layer in layers.items()})
        for name, layer in layers.items():
            mask_layer(layer, torch.rand(layer.weight.shape).to(layer.weight.device) < densities[name])

    def renew(self, model: nn.Module, rate: float, growth: Growth, head_scores: list[Tensor] | None) -> Moved:
        """One update of all masks. Weights that are on are as the last step left them, others zero; new connections start at zero,
        those that come straight back keep their value; the optimizer's moments are not touched."""
        dropped = regrown = 0
        for name, layer in masked_layers(model).items():
            mask, weight = layer.weight_mask, layer.weight.detach()
            active = int(mask.sum())
            if active == mask.numel():
                continue  # a dense layer stays as it is
            alive = DEATH[self.death](weight, mask, rate)
            count = active - int(alive.sum())
            renewed = grow(growth.of_weight(name, layer.weight), alive, count)
            dropped, regrown = dropped + count, regrown + int((renewed & mask & ~alive).sum())
            mask.copy_(renewed)
        return Moved(dropped, regrown)

    def density(self, model: nn.Module) -> dict[str, float]:
        return mask_densities(model)

    def units(self, model: nn.Module) -> list[Units]:
        return [Units() for _ in model.blocks]

    def deploy(self, model: nn.Module) -> nn.Module:
        """Zeros in dense weights: no kernel skips them."""
        deployed = copy.deepcopy(model)
        bake(deployed)
        return deployed
