"""The authors' model of their accelerator: cycles from masks and sizes. An estimate, and a simple one.

Attention and the linear layers are modelled apart, with numbers of multipliers that do not go together (4,096 and 512), loads and products overlap
perfectly, and softmax, norms, the stem and the classifier cost nothing. The published speed-ups cannot be computed from it: it has no dense
baseline. What is divided by zero there (no global column, a mask without a sparse part) is guarded here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from methods.vitcod.reorder import global_columns

MEGAHERTZ = 500.0
BYTES_PER_CYCLE = 76.8 * 2**30 / (MEGAHERTZ * 1e6)  # of DRAM; a number is a byte
LINES, LANES = 64, 8  # PE_width, PE_height


@dataclass(frozen=True)
class Cycles:
    """Per image. attention: the longer of its loads and its products (of the decoder, too); linear: projections and MLP."""

    loads: float
    decoder: float
    products: float
    linear: float

    @property
    def attention(self) -> float:
        return max(self.loads, self.decoder + self.products)

    @property
    def total(self) -> float:
        return self.attention + self.linear


@dataclass(frozen=True)
class _Sizes:
    """tokens, heads, numbers of a head, width of the network; rho: hidden heads of the auto-encoder, of all."""

    tokens: int
    heads: int
    width: int
    rho: float

    @property
    def channels(self) -> int:
        return self.heads * self.width


def simulate(kept: Sequence[Tensor], width: int, rho: float, heads: Literal["first", "all"] = "first") -> Cycles:
    """kept: a mask [H, N, N] for each block, True where an entry stays; width: numbers of a head; rho: share of heads that the auto-encoder
    keeps, 1 without one.

    heads: "first" takes the first head's mask for all, as the authors' script; "all" (ours) lets the heads, which work side by side, wait for
    the slowest one, and takes the mean of their loads.
    """
    loads = decoder = products = linear = 0.0
    for mask in kept:
        sizes = _Sizes(mask.shape[-1], len(mask), width, rho)
        found = [_attention(sizes, *_split(one)) for one in (mask[:1] if heads == "first" else mask)]
        loads += sum(one[0] for one in found) / len(found)
        decoder += max(one[1] for one in found)
        products += max(one[2] for one in found)
        linear += _linear(sizes)
    return Cycles(loads, decoder, products, linear)


def _split(kept: Tensor) -> tuple[int, int]:
    """Global columns, and kept entries outside of them."""
    columns = global_columns(kept)
    return len(columns), int(kept.sum()) - int(kept[:, columns].sum())


def _attention(sizes: _Sizes, columns: int, rest: int) -> tuple[float, float, float]:
    """Loads, decoder and products of a layer whose heads all have so many global columns, and so many entries outside of them."""
    tokens, heads, width = sizes.tokens, sizes.heads, sizes.width
    code = _load(heads * sizes.rho * width)
    weights = _load(heads * sizes.rho, 1 / heads)
    loads = tokens * _load(heads * width)  # values
    loads += columns * code + weights + tokens * code + weights if columns else tokens * code * rest / tokens + weights
    loads += (tokens - columns) * code + weights
    decode = math.ceil(heads * sizes.rho * width / (LINES * LINES // heads)) if sizes.rho < 1 else 0
    decoder = ((columns + tokens) + (tokens - columns)) * decode

    dense_lines = LINES * columns * tokens // (columns * tokens + rest) if columns * tokens + rest else 0
    dense_lines = min(
        max(dense_lines, 1 if columns else 0), LINES - 1 if rest else LINES
    )  # an engine with work has a line
    sparse_lines = LINES - dense_lines
    passes = math.ceil(width / (LINES / heads))
    scores = values = 0
    if columns:
        scores = columns * math.ceil(tokens / dense_lines) * passes
        values = math.ceil(tokens * width * columns / max(dense_lines * LINES // heads, 1))
    if rest:
        scores = max(scores, math.ceil(rest / sparse_lines) * passes)
        values = max(values, math.ceil(rest * width / max(sparse_lines * LINES // heads, 1)))
    return loads, decoder, scores + values


def _linear(sizes: _Sizes) -> float:
    """Projections and MLP of a layer; masks play no part."""
    tokens, heads, width, channels = sizes.tokens, sizes.heads, sizes.width, sizes.channels
    of_head, of_all = LINES * LANES // heads, LINES * LANES
    products = 3 * tokens * (channels * width // of_head) + tokens * channels * width // of_head
    code = 1 / (heads * sizes.rho)
    loads = 3 * width * _load(heads * channels) + 2 * (_load(heads, code) + tokens * _load(width, code))
    loads += tokens * _load(width, 1 / heads) + tokens // of_head * channels * _load(width, 1 / heads)
    return max(products, loads) + 2 * (4 * tokens * channels * channels // of_all)


def _load(numbers: float, share: float = 1.0) -> int:
    """Cycles that so many bytes take at that share of the bandwidth."""
    return math.ceil(numbers / (BYTES_PER_CYCLE * share))
