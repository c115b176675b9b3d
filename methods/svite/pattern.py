"""What a pattern of sparsity (single weights, or heads and neurons) has to offer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from methods.svite.criteria import Growth


@dataclass(frozen=True)
class Moved:
    """What an update did: connections (or units) dropped, and how many of them grew back in the same update."""

    dropped: int
    regrown: int


@dataclass(frozen=True)
class Units:
    """The active heads (bool [H]) and neurons (bool [hidden]) of a block; None: all."""

    heads: Tensor | None = None
    neurons: Tensor | None = None


class Pattern(Protocol):
    """Masks are buffers of the layers (`methods.core.masking`), so a model says by itself which they are."""

    def mask(self, model: nn.Module) -> None:
        """Draws the initial masks."""

    def renew(self, model: nn.Module, rate: float, growth: Growth, head_scores: list[Tensor] | None) -> Moved:
        """One update: `rate` of what is active dies, and as much grows. head_scores: [2, H] per block, of the last step."""

    def density(self, model: nn.Module) -> dict[str, float]:
        """Of every parameter that is not dense, as papers count it."""

    def units(self, model: nn.Module) -> list[Units]:
        """Per block."""

    def deploy(self, model: nn.Module) -> nn.Module:
        """A copy with plain layers that predicts the same."""
