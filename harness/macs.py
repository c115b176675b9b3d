"""Multiply-adds of one image, by part of the network and by block: the form in which formula and counters answer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

PARTS = ("embedding", "projections", "attention", "mlp", "head", "norms", "overhead")
Parts = dict[str, float | Tensor]  # by the names of PARTS; a tensor [B] or [1] where images differ


@dataclass(frozen=True)
class Count:
    """Multiply-adds per image.

    each: of every image that was looked at, float64 [N]. parts: means over them by the names of PARTS; overhead is what the dense network
    does not have. blocks: the same for each block.
    """

    each: Tensor = field(repr=False, compare=False)
    parts: dict[str, float]
    blocks: list[dict[str, float]]

    @property
    def images(self) -> int:
        return len(self.each)

    @property
    def total(self) -> float:
        """The mean over the images; exact where they do not differ."""
        return float(self.each[0] + _from_first(self.each).mean())

    @property
    def spread(self) -> float:
        """The standard deviation of the images."""
        return float(_from_first(self.each).std(correction=0))

    @property
    def error(self) -> float:
        """The standard error of the total."""
        return standard_error(self.each)

    @classmethod
    def of(cls, outside: Parts, blocks: list[Parts], images: int | None = None) -> Count:
        """From the values of each image. images: how many there are; None: as many as there are values."""
        everything = [value for place in (outside, *blocks) for value in place.values()]
        images = images or max((value.numel() for value in everything if isinstance(value, Tensor)), default=1)
        each = torch.zeros(images, dtype=torch.float64)
        for value in everything:
            each = each + value
        means = [
            {key: float(torch.as_tensor(value).mean()) for key, value in place.items()} for place in (outside, *blocks)
        ]
        parts = {
            key: sum(place.get(key, 0.0) for place in means) for key in PARTS if any(key in place for place in means)
        }
        return cls(each, parts, means[1:])

    @classmethod
    def together(cls, counts: Sequence[Count]) -> Count:
        """Of all images of several counts of one model."""
        images = sum(count.images for count in counts)

        def mean(places: Sequence[dict[str, float]]) -> dict[str, float]:
            weighted = [(place, count.images) for place, count in zip(places, counts, strict=True)]
            keys = dict.fromkeys(key for place in places for key in place)
            return {key: sum(place.get(key, 0.0) * n for place, n in weighted) / images for key in keys}

        blocks = [mean(same) for same in zip(*(count.blocks for count in counts), strict=True)]
        return cls(torch.cat([count.each for count in counts]), mean([count.parts for count in counts]), blocks)


def standard_error(each: Tensor) -> float:
    """Of the mean over images, from their values [N]; 0 where there is one, which tells nothing of others."""
    return float(_from_first(each.double()).std(correction=0)) / math.sqrt(max(len(each) - 1, 1))


def _from_first(each: Tensor) -> Tensor:
    """Distances from the first value: exactly zero where values are equal, which their sum divided by their number need not be."""
    return each - each[0]
