"""Magnitude pruning: the smallest weights of the trained dense network are set to zero at once, and the rest is fine-tuned."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

import methods
from methods.core.distribution import SPREADS
from methods.core.masking import apply_masks, bake, mask_densities, mask_layer, maskable
from methods.core.objective import Classification
from methods.core.vit import dense_report, require_plain_vit


class Settings(methods.Settings):
    """density: 1 - sparsity, of all weights of linear layers and convolutions. sparse_init: how dense each layer is: fixed_ERK (SViTE's
    default, so that the two cost the same), uniform, or global (one threshold for all layers)."""

    density: Annotated[float, Field(gt=0, le=1)] = 0.5
    sparse_init: Literal["fixed_ERK", "uniform", "global"] = "fixed_ERK"


@methods.register
class Magnitude(methods.Method):
    """Magnitude pruning: the smallest weights of the trained dense network are set to zero at once, and the rest is fine-tuned.

    The baseline that a method of sparse training must beat (Han et al., NeurIPS 2015, with one round). It starts from the trained dense
    weights, and its masks do not change.
    """

    name = "magnitude"
    work_varies = False
    Settings = Settings

    def sparsify(self, vit: nn.Module) -> nn.Module:
        require_plain_vit(vit, self.name)
        sparse = copy.deepcopy(vit)
        layers = maskable(sparse)
        sizes = {name: layer.weight.detach().abs() for name, layer in layers.items()}
        if self.settings.sparse_init == "global":
            masks = _largest(sizes, self.settings.density)
        else:
            densities = SPREADS[self.settings.sparse_init](
                {name: tuple(size.shape) for name, size in sizes.items()}, self.settings.density
            )
            masks = {name: _largest({name: size}, densities[name])[name] for name, size in sizes.items()}
        for name, layer in layers.items():
            mask_layer(layer, masks[name])
        return sparse

    def deploy(self, sparse: nn.Module) -> nn.Module:
        """Zeros in dense weights: no kernel skips them."""
        deployed = super().deploy(sparse)
        bake(deployed)
        return deployed

    def report(self, module: nn.Module, images: Tensor) -> methods.Report:
        return methods.Report(dense_report(module).blocks, mask_densities(module))

    def phases(
        self, sparse: nn.Module, criterion: nn.Module, teacher: nn.Module | None = None
    ) -> Sequence[methods.TrainPhase]:
        objective = Classification(sparse, criterion, teacher)
        return [
            methods.TrainPhase(name="finetune", objective=objective, after_step=lambda step, steps: apply_masks(sparse))
        ]


def _largest(sizes: dict[str, Tensor], density: float) -> dict[str, Tensor]:
    """Masks of the round(density x all) largest of all elements together."""
    flat = torch.cat([size.flatten() for size in sizes.values()])
    mask = torch.zeros_like(flat, dtype=torch.bool)
    mask[flat.topk(max(math.floor(density * len(flat) + 0.5), 1), sorted=False).indices] = True
    parts = mask.split([size.numel() for size in sizes.values()])
    return {name: part.view(size.shape).clone() for (name, size), part in zip(sizes.items(), parts, strict=True)}
