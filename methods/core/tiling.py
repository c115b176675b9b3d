"""Fixed attention masks in the forms that kernels want: lists of keys, or tiles, and the orders of tokens that make tiles few."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

ROUNDS = 6  # of ordering keys by queries and queries by keys; the best is taken


@dataclass(frozen=True)
class Tiling:
    """A mask of all heads, cut into tiles of `size` x `size` entries.

    queries, keys: int64 [H, N], the token at each place of each head's order. kept: bool [H, N, N], the mask in these orders. counts [H, R] and
    indices [H, R, C], int32: how many tiles of a row of tiles have something to compute, and which ones come first. tiles: their number.
    """

    size: int
    queries: Tensor
    keys: Tensor
    kept: Tensor
    counts: Tensor
    indices: Tensor
    tiles: int

    @property
    def share(self) -> float:
        """Of the dense computation's entries, those that are computed; above 1 where the rim's tiles are mostly padding."""
        return self.tiles * self.size**2 / self.kept.numel()


def tiled(kept: Tensor, size: int) -> Tiling:
    """The tiling of a mask [H, N, N] (head, query, key), True where an entry is kept."""
    masks = kept.cpu().numpy()
    orders = [ordered(mask, size) for mask in masks]
    queries, keys = (np.stack([order[side] for order in orders]) for side in (0, 1))
    moved = np.stack([mask[rows][:, columns] for mask, (rows, columns) in zip(masks, orders, strict=True)])
    used = torch.from_numpy(np.stack([_tiles(mask, size) for mask in moved]))
    return Tiling(
        size, torch.from_numpy(queries), torch.from_numpy(keys), torch.from_numpy(moved), used.sum(dim=-1).int(),
        used.int().argsort(dim=-1, descending=True, stable=True).int(), int(used.sum()),
    )  # fmt: skip


def listed(kept: Tensor) -> tuple[Tensor, Tensor]:
    """A mask [H, N, N] as lists of keys: where each query's begins, int32 [H N + 1], and the keys, int32, for a kernel that computes entries one by
    one."""
    ends = kept.sum(dim=-1).flatten().cumsum(dim=0)
    return torch.cat([ends.new_zeros(1), ends]).int(), kept.nonzero()[:, 2].int()


def ordered(kept: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Orders of the queries and of the keys of a mask [N, N] with few tiles that are not empty. Tokens that are needed by the same tiles go
    together; the two sides take turns, since each is grouped by the other's groups. A heuristic: what is optimal is hard to find."""
    rows = _packed(kept, size)
    best, found = len(kept) ** 2, (rows, rows)
    for _ in range(ROUNDS):
        columns = _packed(_by_group(kept, rows, size).T, size)
        rows_again = _packed(_by_group(kept.T, columns, size).T, size)
        for candidate in ((rows, columns), (rows_again, columns)):
            tiles = int(_tiles(kept[candidate[0]][:, candidate[1]], size).sum())
            if tiles < best:
                best, found = tiles, candidate
        rows = rows_again
    return found


def _by_group(kept: np.ndarray, order: np.ndarray, size: int) -> np.ndarray:
    """[groups, N]: which columns each group of `size` rows, in that order, needs."""
    return np.logical_or.reduceat(kept[order], np.arange(0, len(order), size), axis=0)


def _packed(needs: np.ndarray, size: int) -> np.ndarray:
    """An order of the rows of `needs` [N, M] in groups of `size`: each begins with the row that needs most, and goes on with those that add
    least to what the group needs, of these with the one that shares most."""
    left, needs = np.ones(len(needs), dtype=bool), needs.astype(np.float32)
    counts, order = needs.sum(axis=1), []
    for place in range(len(needs)):
        if place % size == 0:
            chosen = np.where(left, counts, -1).argmax()
            group = needs[chosen]
        else:
            shared = needs @ group
            chosen = np.where(left, (counts - shared) * needs.shape[1] - shared, np.inf).argmin()
            group = np.maximum(group, needs[chosen])
        left[chosen] = False
        order.append(chosen)
    return np.array(order)


def _tiles(kept: np.ndarray, size: int) -> np.ndarray:
    """[R, C]: which tiles of a mask [N, N] have an entry."""
    edges = np.arange(0, len(kept), size)
    return np.logical_or.reduceat(np.logical_or.reduceat(kept, edges, axis=0), edges, axis=1)
