"""Multiply-adds per image, three ways: of the dense backbone, by formula from the report, and counted while executing.

Convention: one multiply-add is 1; matrix products and convolutions count, nothing else does (as in the papers' formulas;
fvcore's own default adds LayerNorm at 5 per element).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from harness.executed import counters, executed, executed_macs
from harness.formula import theoretical, theoretical_macs
from harness.macs import Count
from harness.records import COUNT_REVISION
from methods import Method, Report
from methods.core.vit import dense_report


@dataclass(frozen=True)
class Costs:
    """Per image: of the untouched backbone, by formula (None where more than products is counted: a report says nothing of
    norms), and executed by the deployed model, means over the images that each was counted on. theory_of_run: by formula of
    the images that were run, where theoretical is of others (only these two can be compared to the unit). params: of the deployed model; params_nonzero:
    those of them that no mask has set to zero; params_theoretical: of the form that trains, what is masked left out, as papers count."""

    dense: Count
    theoretical: Count | None
    executed: Count
    params: int
    params_nonzero: int
    params_theoretical: int
    theory_of_run: Count | None = None
    only: str = ""  # why what is executed was counted by the dispatcher alone; empty where fvcore has confirmed it

    def record(self) -> dict[str, Any]:
        """Whole numbers where it is about one image; parts and blocks beside the totals. macs_images: how many images the means are over, 1 where none
        differs; macs_error: standard errors of the means."""
        counts = {"dense": self.dense, "theoretical": self.theoretical, "executed": self.executed}
        there = {name: count for name, count in counts.items() if count is not None}
        of_images = {name: count for name, count in there.items() if name != "dense"}
        return {
            **{f"macs_{name}": count.total if count is not None else None for name, count in counts.items()},
            "macs_spread": {name: round(count.spread) for name, count in there.items()},
            "macs_error": {name: round(self._error(count)) for name, count in of_images.items()},
            "macs_images": {name: count.images if count.spread else 1 for name, count in of_images.items()},
            "count_revision": COUNT_REVISION,
            **_same(self.theory_of_run),
            "parts": {name: _rounded(count.parts) for name, count in there.items()},
            "blocks": {name: [_rounded(block) for block in count.blocks] for name, count in there.items()},
            **counters(self.only),
            "params": self.params, "params_nonzero": self.params_nonzero, "params_theoretical": self.params_theoretical,
        }  # fmt: skip

    def _error(self, count: Count) -> float:
        """Its standard error. One image tells nothing of others, but theory of a whole split knows how far they differ."""
        return self.theoretical.spread if count.images == 1 and self.theory_of_run is not None else count.error


def _same(count: Count | None) -> dict[str, Any]:
    return {"theory_of_run": {"macs": count.total, "parts": _rounded(count.parts)}} if count is not None else {}


def _rounded(parts: dict[str, float]) -> dict[str, int]:
    return {name: round(macs) for name, macs in parts.items()}


def count(
    method: Method,
    vit: nn.Module,
    sparse: nn.Module,
    deployed: nn.Module,
    images: Tensor,
    also: Iterable[str] = (),
    theory: Count | None = None,
) -> Costs:
    """All costs of a method on a backbone; the report and the counters see `images` [B, 3, H, W], a mean over which is
    taken where they differ. `also`: what is counted besides products in what is executed (`harness.operations.ALSO`).
    theory: by formula of a whole split, where that was collected (see `harness.tally`)."""
    sparse = sparse.eval()
    report = method.report(sparse, images)
    of_these = theoretical(vit, report, images.shape[-2:])
    theory_of_run, theory = (None, of_these) if theory is None else (of_these, theory)
    looked_at = images if varies(report) else images[:1]
    shapes = {name: p.shape for name, p in sparse.named_parameters()}
    whole = {
        name for name, p in deployed.named_parameters() if p.shape == shapes.get(name)
    }  # a smaller one has lost what is masked
    overhead = {extra.name: extra.block for extra in report.overhead if extra.block is not None}
    dense, run = executed(vit, images[:1], also), executed(deployed, looked_at, also, overhead)
    return Costs(
        dense=dense.count,
        theoretical=None if also else theory,
        executed=run.count,
        params=sum(p.numel() for p in deployed.parameters()),
        params_nonzero=_kept(deployed, {name: share for name, share in report.weight_density.items() if name in whole}),
        params_theoretical=_kept(sparse, report.weight_density),
        theory_of_run=theory_of_run,
        only=run.only or dense.only,
    )


def _kept(model: nn.Module, density: dict[str, float]) -> int:
    return round(sum(p.numel() * density.get(name, 1.0) for name, p in model.named_parameters()))


def varies(report: Report) -> bool:
    """Whether images differ in what they cost."""
    others = [extra.macs for extra in report.overhead]
    others += [block.attention_density for block in report.blocks if block.attention_density is not None]
    return _differ([*_counts(report), *others])


def shapes_vary(report: Report) -> bool:
    """Whether images differ in the number of tokens that are computed."""
    return not report.fixed_shapes and _differ(_counts(report))


def _counts(report: Report) -> list[Tensor]:
    return [tensor for block in report.blocks for tensor in (block.keys, block.queries, block.mlp)]


def _differ(per_image: list[Tensor]) -> bool:
    return any(bool((tensor != tensor[:1]).any()) for tensor in per_image)


def dense_formula_holds(vit: nn.Module, images: Tensor, tolerance: float = 1e-3) -> tuple[bool, float, float]:
    """Whether the formula, for a model that keeps everything, agrees with what is executed: (agrees, formula, executed).
    Where it does not, the backbone has parts that the formula does not know, and theoretical counts would be wrong."""
    formula, run = theoretical_macs(vit, dense_report(vit), images.shape[-2:]), executed_macs(vit, images[:1])
    return abs(formula - run) <= tolerance * run, formula, run
