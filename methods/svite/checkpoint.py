"""The authors' checkpoints as state dicts of our models."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from methods.svite.unstructured import is_weight


def converted(content: dict[str, Any], is_structured: bool) -> dict[str, Tensor]:
    """Weights under timm's names with a mask for each sparse one. content: what the training script saved, or its "model" alone. Masks come
    from `mask` (keys: parameter and a running number, or parameter and "_mask"), and where that says nothing, from the weights: what is not
    zero is active. The averaged weights (`model_ema`) were never masked, and are not used. Names that the model does not have stay, so that
    loading tells of them."""
    weights = {name.removeprefix("module."): value for name, value in content.get("model", content).items()}
    saved = {_parameter(key): value for key, value in (content.get("mask") or {}).items()}
    masks = {}
    for name, weight in weights.items():
        wanted = (
            bool(re.search(r"blocks\.\d+\.(attn\.qkv|mlp\.fc[12])\.weight$", name))
            if is_structured
            else weight.ndim in (2, 4)
        )
        if wanted and name.endswith(".weight") and is_weight(name):
            mask = saved.get(name, weight).cpu() != 0
            masks[name + "_mask"] = _units(name, mask) if is_structured else mask
    masked = {name: weight * _mask_of(name, masks, weight) for name, weight in weights.items()}
    return masked | masks | {"updates": torch.tensor(-1)}


def _parameter(key: str) -> str:
    """The parameter that a mask belongs to."""
    return re.sub(r"_(\d+|mask)$", "", key.removeprefix("module."))


def _units(name: str, mask: Tensor) -> Tensor:
    """Rows of qkv and fc1, columns of fc2."""
    return mask.any(dim=0, keepdim=True) if "fc2" in name else mask.any(dim=1, keepdim=True)


def _mask_of(name: str, masks: dict[str, Tensor], weight: Tensor) -> Tensor:
    mask = masks.get(name + "_mask")
    return torch.ones((), dtype=weight.dtype) if mask is None else mask.to(weight.dtype)
