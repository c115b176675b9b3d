"""What float32 can give: our numbers and the authors', both held to a float64 run of the same rule.

Two machines that round differently (other vector widths, other orders of sums) get numbers that differ by as much as the problem is sensitive, so one limit
for all numbers is too wide for some and too narrow for others. Here the limit is measured: parameters are moved by at most half a unit in their last
place, which is what storing them in float32 may have done to them, and the float64 run is repeated. What moves by x then cannot be known better than to
x in float32, by anybody. A float32 run rounds its activations, too, at a few places for every weight: hence MARGIN times that.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

HALF_UNIT = 2.0**-24  # of float32's last place, relative
MARGIN = 4.0
SAMPLES = 6  # a spread is the largest of so many: one alone may be ten times too small


@dataclass(frozen=True)
class Exact:
    """value: of the float64 run; spread: the largest distance of any entry to it when parameters move by half a unit in the last place."""

    value: Tensor
    spread: float


def exactly(run: Callable[[nn.Module], dict[str, Tensor]], model: nn.Module) -> dict[str, Exact]:
    """What `run` gives for a float64 copy of `model`, by name, with its spread. `run` must be the rule that is tested, in float64 throughout."""
    values = run(_copied(model))
    assert all(value.dtype == torch.float64 for value in values.values()), "not a float64 run"
    assert all(bool(value.isfinite().all()) for value in values.values()), (
        "a float64 run without numbers holds to nothing"
    )
    moved = [run(_copied(model, seed)) for seed in range(SAMPLES)]
    exact = {name: Exact(value, max(distance(other[name], value) for other in moved)) for name, value in values.items()}
    assert all(math.isfinite(one.spread) for one in exact.values()), "a run that a rounding breaks holds to nothing"
    return exact


def _copied(model: nn.Module, seed: int | None = None) -> nn.Module:
    """In float64; with a seed, all parameters moved by up to half a unit in float32's last place."""
    other = copy.deepcopy(model).double()
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in other.parameters():
                step = torch.rand(parameter.shape, generator=generator, dtype=torch.float64) * 2 - 1
                parameter.mul_(1 + HALF_UNIT * step)
    return other


def distance(found: Tensor, expected: Tensor) -> float:
    """The largest over all entries; infinite where one of them is no number."""
    gap = (found.double() - expected.double()).abs()
    return float("inf") if gap.isnan().any() else float(gap.max())


def as_near_as_the_authors(ours: Tensor, theirs: Tensor, exact: Exact, stated: float, what: str = "") -> None:
    """Both within `stated`, or MARGIN spreads where that is more, of the float64 run. The authors' own distance is checked, too: it would be large if our
    rule (and with it our float64 run) were another one."""
    limit = max(stated, MARGIN * exact.spread)
    for name, found in (("ours", ours), ("the authors'", theirs)):
        assert found.shape == exact.value.shape, f"{what}: {name} has shape {tuple(found.shape)}"
        gap = distance(found, exact.value)
        assert gap <= limit, (
            f"{what}: {name} is {gap:.2e} from float64, allowed {limit:.2e} (spread {exact.spread:.2e})"
        )
