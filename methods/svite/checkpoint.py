"""The authors' checkpoints as state dicts of our models."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from methods.svite.unstructured import is_weight

SAVED = ("mask", "other_mask", "atten_mask")  # of all weights; structured: of neurons; of heads
UNITS = re.compile(r"(blocks\.\d+)\.(attn\.qkv|mlp\.fc1|mlp\.fc2)\.weight$")


def converted(content: dict[str, Any], is_structured: bool) -> dict[str, Tensor]:
    """Weights under timm's names, as they are, with a mask for each sparse one. content: what the training script saved, or its "model" alone.

    A saved mask (keys: a parameter and a running number, or a parameter and "_mask") counts where the weights are zero outside of it. The code
    that trained the released SViTE+ checkpoints made masks and never applied them: such weights are dense, and are taken for what they are.
    Without a mask that fits, what is not zero is active. The averaged weights (`model_ema`) were never masked, and are not used. Names that the
    model does not have stay, so that loading tells of them.
    """
    weights = {name.removeprefix("module."): value for name, value in content.get("model", content).items()}
    if any(name.endswith(".weight_mask") for name in weights):
        return weights  # one of our own
    saved = {_parameter(key): value for part in SAVED for key, value in (content.get(part) or {}).items()}
    masks = {}
    for name, weight in weights.items():
        is_sparse = (
            UNITS.match(name)
            if is_structured
            else weight.ndim in (2, 4) and name.endswith(".weight") and is_weight(name)
        )
        if is_sparse:
            mask, active = saved.get(name, weight).cpu() != 0, weight.cpu() != 0
            masks[name] = mask if mask.shape == active.shape and not (active & ~mask).any() else active
    if is_structured:
        masks = _units(masks)
    return weights | {f"{name}_mask": mask for name, mask in masks.items()} | {"updates": torch.tensor(-1)}


def _parameter(key: str) -> str:
    """The parameter that a mask belongs to."""
    return re.sub(r"_(\d+|mask)$", "", key.removeprefix("module."))


def _units(masks: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rows of qkv and fc1, columns of fc2. A unit is active if any of its weights is: a neuron in fc1 or in fc2, a head in any of its slabs."""
    found = {}
    for name, mask in masks.items():
        block, layer = UNITS.match(name).groups()
        if layer == "attn.qkv":
            found[name] = mask.any(dim=1, keepdim=True)
        elif layer == "mlp.fc1":
            active = mask.any(dim=1) | masks[f"{block}.mlp.fc2.weight"].any(dim=0)
            found[name], found[f"{block}.mlp.fc2.weight"] = active[:, None].clone(), active[None, :].clone()
    return found
