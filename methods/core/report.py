"""What a model kept: the one form in which every method tells it.

Counting, plots and checks read only this, so they never need to know which method made the model. Tensors hold one
value per image ([B]); B is 1 where the count is the same for every image.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class FixedAttention:
    """A pattern of attention that is the same for all images.

    kept: bool [H, N, N] (head, query, key): the entries that are computed, as the paper counts them. average: the attention maps that it was made
        from, float [H, N, N], or None. label: the number that each token has after the head's reordering, int64 [H, N], and global_tokens: how
        many columns in front are dense then, int64 [H]; None where a method does not reorder.
    """

    kept: Tensor
    average: Tensor | None = None
    label: Tensor | None = None
    global_tokens: Tensor | None = None


@dataclass(frozen=True)
class BlockReport:
    """What one transformer block worked on.

    keys, queries, mlp: number of tokens, prefix tokens (CLS, registers) included, int64 [B] each. They differ where
        a method reduces tokens inside a block, or computes fewer queries than keys.
    kept: patch numbers (0..N-1, prefix tokens excluded) that entered the block, int64 [B, n], -1 where an image has
        fewer; None: all of them.
    merged: for methods that merge: the slot that each original patch went to, int64 [B, N]; None otherwise.
    active_heads: bool [H]; None: all. The others are not computed, nor their columns of the projection.
    attention_density: share of the query x key entries that are kept, float [B or 1, H]; None: all. A head that is dead while its
        columns of the projection are counted (S2ViTE) has 0 here, and is not named in active_heads.
    active_neurons: of the MLP, bool [hidden]; None: all. For plots: what they cost follows from the densities of its weights.
    attention: for plots and files: the entries behind `attention_density`, where they are the same for all images.
    """

    keys: Tensor
    queries: Tensor
    mlp: Tensor
    kept: Tensor | None = None
    merged: Tensor | None = None
    active_heads: Tensor | None = None
    attention_density: Tensor | None = None
    active_neurons: Tensor | None = None
    attention: FixedAttention | None = None


@dataclass(frozen=True)
class Overhead:
    """A module that the dense network does not have (predictor, approximation network, auto-encoder).

    macs: multiply-adds per image as the paper has it, float64 [B]. block: index of the block it runs before, or None.
    """

    name: str
    macs: Tensor
    block: int | None = None


@dataclass(frozen=True)
class Estimate:
    """What a model of hardware says, which nobody measured here. name: of the column, with whose model it is; cycles per image, and the clock in
    MHz that they become microseconds by; note: what a reader must know of it, in a line."""

    name: str
    cycles: float
    megahertz: float
    note: str

    @property
    def microseconds(self) -> float:
        return self.cycles / self.megahertz


@dataclass(frozen=True)
class AuthorsCount:
    """Multiply-adds as the authors' own counter has them, for comparing with their figures. parts: by name, float64 [B or 1]; note: how they count, in a
    line."""

    parts: dict[str, Tensor]
    note: str

    @property
    def macs(self) -> Tensor:
        """Of all parts, [B]."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Report:
    """One entry per block, in order; the density of parameters, by name (others are dense), as the paper counts it (from the mask;
    from zeros only for imported checkpoints that have no mask); and the overhead. remarks: what a reader of the row must know of this
    model, a line each. fixed_shapes: every image takes the same work although the counts differ (tokens are zeros, and not gone).
    estimates: of hardware that is not here; columns of their own, never mixed with what was measured. numbers: what else a paper reports of its model (an
    occupancy), by name, float [B]. authors: the authors' own count, where it is not the one here."""

    blocks: tuple[BlockReport, ...]
    weight_density: dict[str, float] = field(default_factory=dict)
    overhead: tuple[Overhead, ...] = ()
    remarks: tuple[str, ...] = ()
    fixed_shapes: bool = False
    estimates: tuple[Estimate, ...] = ()
    numbers: dict[str, Tensor] = field(default_factory=dict)
    authors: AuthorsCount | None = None
