"""How dense each layer is: shapes of weights by name, and an overall density, to the density of each weight."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase

from methods.core.contract import Unsupported

Shapes = Mapping[str, Sequence[int]]


def uniform(shapes: Shapes, density: float) -> dict[str, float]:
    """The same density everywhere."""
    return dict.fromkeys(shapes, density)


def fixed_erk(shapes: Shapes, density: float) -> dict[str, float]:
    """Erdos-Renyi kernel (Evci et al., RigL, section 3; power 1): density proportional to (sum of a weight's dimensions) /
    (their product), but at most 1. Layers that would be denser are dense, and the others share what is left, so that the overall
    expected density is `density`."""
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    sums = {name: sum(shape) for name, shape in shapes.items()}
    raw = {name: sums[name] / sizes[name] for name in shapes}
    dense: set[str] = set()
    while len(dense) < len(shapes):
        others = [name for name in shapes if name not in dense]
        wanted = density * sum(sizes[name] for name in others) - (1 - density) * sum(sizes[name] for name in dense)
        scale = wanted / sum(sums[name] for name in others)
        highest = max(raw[name] for name in others)
        if scale * highest <= 1:
            return {name: 1.0 if name in dense else scale * raw[name] for name in shapes}
        dense |= {name for name in others if raw[name] == highest}
    return dict.fromkeys(shapes, 1.0)


def custom(shapes: Shapes, densities: Mapping[str, float]) -> dict[str, float]:
    """Densities by pattern of name ("blocks.*.attn.qkv.weight"), the first that matches; 1 where none does. Unsupported for a
    pattern that no weight has."""
    unused = next((p for p in densities if not any(fnmatchcase(name, p) for name in shapes)), None)
    if unused is not None:
        raise Unsupported(f"densities: no weight is called {unused!r}; the first is {next(iter(shapes), None)!r}")
    return {
        name: next((density for pattern, density in densities.items() if fnmatchcase(name, pattern)), 1.0)
        for name in shapes
    }


SPREADS: dict[str, Callable[[Shapes, float], dict[str, float]]] = {"fixed_ERK": fixed_erk, "uniform": uniform}
