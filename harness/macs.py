"""Multiply-adds of one image, by part of the network and by block: the form in which formula and trace both answer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

PARTS = ("embedding", "projections", "attention", "mlp", "head", "norms", "overhead")
Parts = dict[str, float | Tensor]  # by the names of PARTS; a tensor [B] or [1] where images differ


@dataclass(frozen=True)
class Count:
    """Multiply-adds per image, means over the images that were looked at; spread: the standard deviation of the total.

    parts: by the names of PARTS. overhead is what the dense network does not have. blocks: the same for each block.
    """

    total: float
    spread: float
    parts: dict[str, float]
    blocks: list[dict[str, float]]

    @classmethod
    def of(cls, outside: Parts, blocks: list[Parts]) -> Count:
        """From the values of each image."""
        everything = [value for place in (outside, *blocks) for value in place.values()]
        images = max((value.numel() for value in everything if isinstance(value, Tensor)), default=1)
        each = torch.zeros(images, dtype=torch.float64)
        for value in everything:
            each = each + value
        means = [
            {key: float(torch.as_tensor(value).mean()) for key, value in place.items()} for place in (outside, *blocks)
        ]
        parts = {
            key: sum(place.get(key, 0.0) for place in means) for key in PARTS if any(key in place for place in means)
        }
        return cls(float(each.mean()), float(each.std(correction=0)), parts, means[1:])
