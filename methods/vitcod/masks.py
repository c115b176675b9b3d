"""Fixed attention masks from averaged attention maps: which entries each head keeps, the same for all images.

Masks are bool [L, H, N, N] (block, head, query, key), True where an entry is kept, as torch's attention takes them; the authors' files have
True where it is pruned (`read_masks`; `bench.py masks` writes them).
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

NOTHING_PRUNED = 2.0  # a cut that no row reaches


def info_masks(attention: Tensor, cut: float, prefix: int = 1) -> Tensor:
    """Keeps, of every row, the largest entries until their sum reaches `cut`, and one more, as the official code does (section 3 of the paper;
    its arithmetic). attention: averaged [L, H, N, N], rows sum to 1; prefix: tokens (CLS) whose rows and columns are kept whole.

    The sums are taken in float64; of equal entries the one of lower index goes first.
    """
    values, order = attention.double().sort(dim=-1, stable=True)  # ascending
    reached = values.flip(-1).cumsum(dim=-1) >= cut
    tokens = attention.shape[-1]
    needed = torch.where(reached.any(-1), reached.to(torch.uint8).argmax(-1) + 1, tokens)
    needed = torch.zeros_like(needed) if cut <= 0 else needed
    kept = (needed + 1).clamp(max=tokens)
    return _with_prefix(_highest(order, kept), prefix)


def ratio_masks(attention: Tensor, sparsity: float, prefix: int = 1) -> Tensor:
    """Prunes the lowest entries of every row: those of ascending rank below sparsity x N."""
    tokens = attention.shape[-1]
    order = attention.double().argsort(dim=-1, stable=True)
    pruned = int(np.ceil(sparsity * tokens))  # ranks 0, 1, ... below sparsity x N
    kept = torch.full(attention.shape[:-1], tokens - pruned)
    return _with_prefix(_highest(order, kept.to(attention.device)), prefix)


def std_masks(attention: Tensor, factor: float) -> Tensor:
    """Prunes what is below the row's mean + factor x its standard deviation (of the population). Nothing is protected, as in the official
    code, but the largest entry of a row, which would be empty otherwise."""
    values = attention.double()
    limit = values.mean(-1, keepdim=True) + factor * values.std(-1, correction=0, keepdim=True)
    return (values >= limit) | torch.zeros_like(values, dtype=torch.bool).scatter(
        -1, values.argmax(-1, keepdim=True), True
    )


def random_masks(shape: tuple[int, ...], sparsity: float, prefix: int = 1) -> Tensor:
    """Prunes that share of each head's entries, drawn by torch's generator; prefix rows and columns, and the diagonal, stay (an empty row has no
    softmax). The official code prunes 1 - sparsity, protects nothing and is not seeded."""
    tokens = shape[-1]
    fixed = _with_prefix(torch.eye(tokens, dtype=torch.bool), prefix).flatten()
    order = torch.rand(*shape[:-2], tokens**2).masked_fill(fixed, -1.0).argsort(dim=-1)
    kept = max(round((1 - sparsity) * tokens**2), int(fixed.sum()))
    return torch.zeros(order.shape, dtype=torch.bool).scatter(-1, order[..., :kept], True).view(shape)


def patterned_mask(tokens: int, heads: int, sparsity: float, prefix: int = 1) -> Tensor:
    """A mask [H, N, N] like a learned one, for timing without training: columns that every query attends to (24 of 577, at most half of what is kept),
    spread out and shifted from head to head, and a band along the diagonal that fills up to the sparsity. prefix as in `info_masks`."""
    wanted = round((1 - sparsity) * tokens**2)
    query, key = torch.meshgrid(torch.arange(tokens), torch.arange(tokens), indexing="ij")
    distance = (query - key).abs().flatten()
    columns = min(round(24 / 577 * tokens), wanted // (2 * tokens))
    masks = []
    for head in range(heads):
        kept = _with_prefix(torch.eye(tokens, dtype=torch.bool), prefix)
        kept[:, (torch.arange(columns) * tokens // max(columns, 1) + head) % tokens] = True
        nearest = distance.masked_fill(kept.flatten(), tokens).argsort(stable=True)
        kept.view(-1)[nearest[: max(wanted - int(kept.sum()), 0)]] = True
        masks.append(kept)
    return torch.stack(masks)


def sparsity_of(kept: Tensor) -> float:
    """The share of pruned entries, of all."""
    return 1.0 - float(kept.double().mean())


def cut_for(attention: Tensor, sparsity: float, prefix: int = 1) -> float:
    """The `cut` of `info_masks` whose masks come nearest to that sparsity, by bisection: sparsity falls as the cut grows. A row of few tokens, or one
    that attends to one token alone, loses or keeps much at once: how near it came is in the report."""
    low, high, found = 0.0, 1.0, {NOTHING_PRUNED: 0.0, 0.0: sparsity_of(info_masks(attention, 0.0, prefix))}
    for _ in range(40):
        middle = (low + high) / 2
        found[middle] = sparsity_of(info_masks(attention, middle, prefix))
        if abs(found[middle] - sparsity) <= 1e-5:
            break
        low, high = (middle, high) if found[middle] > sparsity else (low, middle)
    return min(found, key=lambda cut: abs(found[cut] - sparsity))


def read_masks(path: Path, shape: tuple[int, int, int, int]) -> Tensor:
    """The authors' .npy file (True: pruned) as kept entries. ValueError in a line for what is no mask, has another shape, or an empty row."""
    try:
        pruned: Any = np.load(io.BytesIO(path.read_bytes()), allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"mask_path {path}: not a .npy file of a mask ({error})") from None
    if not isinstance(pruned, np.ndarray) or not set(np.unique(pruned).tolist()) <= {0, 1}:
        raise ValueError(
            f"mask_path {path}: a mask has ones where an entry is pruned and zeros elsewhere, and nothing else"
        )
    if pruned.shape != shape:
        raise ValueError(f"mask_path {path}: masks of shape {list(pruned.shape)}; this network wants {list(shape)} "
                         "(blocks, heads, tokens, tokens)")  # fmt: skip
    kept = torch.from_numpy(pruned == 0)
    check_rows(kept, f"mask_path {path}")
    return kept


def read_average(path: Path, shape: tuple[int, int, int, int]) -> Tensor:
    """The authors' .npy file of averaged attention (rows sum to 1). ValueError in a line for other files."""
    try:
        found: Any = np.load(io.BytesIO(path.read_bytes()), allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"average_path {path}: not a .npy file of attention maps ({error})") from None
    if not isinstance(found, np.ndarray) or found.shape != shape:
        raise ValueError(f"average_path {path}: maps of shape {list(np.shape(found))}; this network wants {list(shape)} "
                         "(blocks, heads, tokens, tokens)")  # fmt: skip
    if found.dtype.kind != "f" or not (found >= 0).all() or abs(found.sum(axis=-1) - 1).max() > 1e-3:
        raise ValueError(f"average_path {path}: no averaged attention: rows of numbers from 0 to 1 must sum to 1")
    return torch.from_numpy(found.astype(np.float32))


def check_rows(kept: Tensor, what: str) -> None:
    """ValueError where a query keeps no key at all."""
    empty = (~kept.any(dim=-1)).nonzero()
    if len(empty):
        block, head, row = empty[0].tolist()
        raise ValueError(
            f"{what}: block {block}, head {head}: row {row} keeps no entry, and {len(empty) - 1} more do not"
        )


def _highest(order: Tensor, kept: Tensor) -> Tensor:
    """True for the last `kept` [...] of every row of places in ascending order [..., N]."""
    tokens = order.shape[-1]
    is_kept = torch.arange(tokens, device=order.device) >= (tokens - kept).unsqueeze(-1)
    return torch.zeros_like(order, dtype=torch.bool).scatter(-1, order, is_kept)


def _with_prefix(kept: Tensor, prefix: int) -> Tensor:
    kept[..., :prefix, :] = True
    kept[..., :, :prefix] = True
    return kept
