"""What a model keeps of the images that it is evaluated on, collected batch by batch: means over the whole split, with standard errors."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from harness.cluster import Cluster
from harness.formula import theoretical
from harness.macs import Count, standard_error
from methods import Method, Report

KINDS = ("keys", "queries", "mlp", "attention_density")


@dataclass(frozen=True)
class Totals:
    """theory: multiply-adds by formula. means: over all images, of what a report says of each, by place (see `values`), [1] or [1, H].
    errors: standard errors of the means of numbers and of the authors' count, by place."""

    theory: Count
    means: dict[str, Tensor]
    errors: dict[str, float]

    def in_place_of(self, report: Report) -> Report:
        """The report with these means where it has values of its own images. Which tokens were kept stays as it is."""
        means, authors = self.means, report.authors
        blocks = tuple(
            replace(block, **{kind: means[f"{kind}.{i}"] for kind in KINDS if f"{kind}.{i}" in means})
            for i, block in enumerate(report.blocks)
        )
        overhead = tuple(replace(extra, macs=means[f"overhead.{i}"]) for i, extra in enumerate(report.overhead))
        numbers = {name: means[f"numbers.{name}"] for name in report.numbers}
        if authors is not None:
            authors = replace(authors, parts={name: means[f"authors.{name}"] for name in authors.parts})
        return replace(report, blocks=blocks, overhead=overhead, numbers=numbers, authors=authors)


class Tally:
    """Adds up what `method` reports of a split's images. Kept are sums, and a number per image where there is to be a standard error; no
    report, which may hold the tokens that each image kept."""

    def __init__(self, method: Method, vit: nn.Module, image_size: tuple[int, int]) -> None:
        self.method, self.vit, self.image_size = method, vit, image_size
        self._counts: list[Count] = []
        self._sums: dict[str, Tensor] = {}
        self._each: dict[str, list[Tensor]] = {}

    def add(self, report: Report, images: int) -> None:
        """A report of `images` images, which may have one value for them all."""
        self._counts.append(theoretical(self.vit, report, self.image_size, images))
        for place, value in values(report).items():
            self._sums[place] = self._sums.get(place, 0) + value.sum(dim=0, keepdim=True) * (images / len(value))
        for place, value in scattered(report).items():
            self._each.setdefault(place, []).append(value.expand(images))

    def whole(self, cluster: Cluster) -> Totals:
        """Of the images of all processes, which call it together; some may have had none."""
        shares = [share for share in cluster.gather((self._counts, self._sums, self._each)) if share[0]]
        counts, sums, each = zip(*shares, strict=True)
        theory = Count.together([count for own in counts for count in own])
        means = {place: sum(own[place] for own in sums) / theory.images for place in sums[0]}
        parts = {place: [part for own in each for part in own[place]] for place in each[0]}
        return Totals(theory, means, {place: standard_error(torch.cat(found)) for place, found in parts.items()})


def values(report: Report) -> dict[str, Tensor]:
    """All that a report says of each image, float64 [B or 1] or [B or 1, H], by place; on the CPU."""
    found = {f"overhead.{i}": extra.macs for i, extra in enumerate(report.overhead)}
    for i, block in enumerate(report.blocks):
        found |= {f"{kind}.{i}": getattr(block, kind) for kind in KINDS if getattr(block, kind) is not None}
    found |= {f"numbers.{name}": value for name, value in report.numbers.items()}
    if report.authors is not None:
        found |= {f"authors.{name}": value for name, value in report.authors.parts.items()}
    return {place: value.double().cpu() for place, value in found.items()}


def scattered(report: Report) -> dict[str, Tensor]:
    """What gets a standard error, float64 [B or 1] by place: the report's numbers, and all parts of the authors' count together."""
    found = {f"numbers.{name}": value for name, value in report.numbers.items()}
    found |= {"authors": report.authors.macs} if report.authors is not None else {}
    return {place: value.double().cpu() for place, value in found.items()}
