"""Relabelling tokens head by head, so that the columns that many queries attend to come first ("polarisation")."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Reordered:
    """One head's mask after relabelling. kept: bool [N, N]; label: the new number of each token, int64 [N]; global_tokens: how many columns
    in front are counted as dense; dense_kept, all_kept: kept entries inside of these columns, and altogether."""

    kept: Tensor
    label: Tensor
    global_tokens: int
    dense_kept: int
    all_kept: int


def global_columns(kept: Tensor, threshold: int | None = None) -> Tensor:
    """The columns of a mask [N, N] with more than `threshold` kept entries: the authors' 50, which is for 197 tokens, or as much of others."""
    return (kept.sum(dim=0) > (len(kept) * 50 // 197 if threshold is None else threshold)).nonzero().flatten()


def reorder(kept: Tensor, threshold: int | None = None) -> Reordered:
    """kept: bool [N, N] of a head. Its global columns are exchanged, in order, with those in front; rows go with them."""
    place = list(range(len(kept)))  # place[i]: the token that stands at i
    at = list(range(len(kept)))  # at[t]: where token t stands
    found = global_columns(kept, threshold).tolist()
    for front, token in enumerate(found):
        other, here = place[front], at[token]
        place[front], place[here] = token, other
        at[token], at[other] = front, here
    order = torch.tensor(place)
    moved = kept.cpu()[order][:, order]
    return Reordered(moved, torch.tensor(at), len(found), int(moved[:, : len(found)].sum()), int(moved.sum()))
