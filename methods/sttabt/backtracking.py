"""Walks back from the network's output: which tokens does each block need?

Tokens of the output (CLS; with a distilled network the second one, too) come first. Sets are stacked from the input on, [L + 1, B, N]: entry i is what
block i reads (its keys and values), entry i + 1 what it writes (its queries, projection and MLP); the last one is the output's. Each holds the next.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from methods.core import native
from methods.core.operators import counted
from methods.core.precision import wide

EPS = 1e-7
TEMPERATURE = 0.1  # of the concrete masks
PROPAGATED = 0.1  # how much a query's own score weighs in what it passes on
FLOOR = 0.01  # of a score
THRESHOLD = 0.5  # a mask of at least this keeps its token


@dataclass(frozen=True)
class Masks:
    """soft [L + 1, B, N]: in [0, 1], differentiable; scores [L, B, N]: of each block's input tokens, in (0, 1]."""

    soft: Tensor
    scores: Tensor

    @property
    def kept(self) -> Tensor:
        """bool [L + 1, B, N]: what evaluation keeps. All of an image whose scores are no numbers, so that these reach the logits."""
        return ~(self.soft < THRESHOLD)


def _start(rating: Tensor, outputs: int) -> Tensor:
    """Ones for the tokens of the output, [B, N], of the rating's type."""
    return (torch.arange(rating.shape[-1], device=rating.device) < outputs).to(rating.dtype).expand(len(rating), -1)


def logit(p: Tensor) -> Tensor:
    """Of numbers in [0, 1], and finite there."""
    return (p + EPS).log() - (1 - p + EPS).log()


def concrete_mask(score: Tensor, logit_p: Tensor) -> Tensor:
    """Scores r in (0, 1] to soft masks: sigmoid((logit p + logit r) / 0.1), p = sigmoid(p_logit). At least 0.5 where r >= 1 - p: no noise is drawn."""
    return ((logit_p + logit(score)) / TEMPERATURE).sigmoid()


def received(rating: Tensor, mask: Tensor, score: Tensor) -> Tensor:
    """Each token's score [B, N] from the queries that survive, weighted by their soft masks [B, N] and, a little, by their scores.

    rating [B, Q, N], of the first Q queries; the masks of others must be zero."""
    rows = rating.shape[1]
    weight = mask[:, :rows]
    wanted = weight * (1 - PROPAGATED + PROPAGATED * score[:, :rows])
    mean = (wanted.unsqueeze(1) @ rating).squeeze(1) / (weight.sum(dim=1, keepdim=True) + EPS)
    relative = mean / (mean.amax(dim=1, keepdim=True) + EPS)
    return FLOOR + (1 - FLOOR) * relative


def concrete_masks(ratings: Sequence[Tensor], p_logit: Tensor, outputs: int) -> Masks:
    """ratings: of each block, float32 [B, N, N], of the last one [B, outputs, N]; p_logit [L]: the larger, the more a block keeps."""
    with torch.autocast(ratings[0].device.type, enabled=False):
        mask = score = _start(ratings[-1], outputs)
        soft, scores = [mask], []
        logits = logit(wide(p_logit).sigmoid()).unbind()  # at once: small operations take the time here
        for rating, logit_p in zip(reversed(ratings), reversed(logits), strict=True):
            score = received(rating, mask, score)
            mask = torch.maximum(concrete_mask(score, logit_p), mask)  # what a deeper block needs stays
            soft.append(mask)
            scores.append(score)
    return Masks(torch.stack(soft[::-1]), torch.stack(scores[::-1]))


def concrete_sets(ratings: Sequence[Tensor], p_logit: Tensor, outputs: int) -> Tensor:
    """What `concrete_masks` keeps, bool [L + 1, B, N], and no gradients: on the CPU by a kernel, where there is a C++ compiler."""
    if all(tensor.device.type == "cpu" and tensor.dtype == torch.float32 for tensor in (*ratings, p_logit)):
        return _walked_back(list(ratings), p_logit, outputs)
    return concrete_masks(ratings, p_logit, outputs).kept


def _walk_macs(ratings: list[tuple[int, ...]], p_logit: object, outputs: int) -> float:
    return float(sum(images * queries * tokens for images, queries, tokens in ratings))


@counted(_walk_macs)
@torch.library.custom_op("sparse_vit_bench::walk_back", mutates_args=())
def _walked_back(ratings: list[Tensor], p_logit: Tensor, outputs: int) -> Tensor:
    images, _, tokens = ratings[-1].shape
    shapes = [(images, tokens, tokens)] * (len(ratings) - 1) + [(images, outputs, tokens)]
    sizes = [tuple(rating.shape) for rating in ratings]
    if sizes != shapes or len(p_logit) != len(ratings) or outputs > tokens:
        raise ValueError(f"ratings {sizes}, {len(p_logit)} thresholds and {outputs} outputs do not fit together")
    for tensor in (*ratings, p_logit):
        if tensor.dtype != torch.float32 or tensor.device.type != "cpu":
            raise ValueError(
                f"ratings and thresholds must be torch.float32 on the CPU, not {tensor.dtype} on {tensor.device}"
            )
    with contextlib.suppress(native.NoKernel):
        kernel, like = native.walk_back(), ratings[-1]
        ratings = [rating.contiguous() for rating in ratings]
        places = like.new_tensor([rating.data_ptr() for rating in ratings], dtype=torch.int64)
        odds = (-logit(p_logit.sigmoid())).exp().contiguous()  # against p
        constants = like.new_tensor([EPS, PROPAGATED, FLOOR, THRESHOLD])
        kept = like.new_empty(len(ratings) + 1, images, tokens, dtype=torch.bool)
        pointers = (tensor.data_ptr() for tensor in (places, odds, constants, kept))
        kernel(*pointers, len(ratings), images, tokens, outputs, torch.get_num_threads())
        return kept
    return concrete_masks(ratings, p_logit, outputs).kept


@_walked_back.register_fake
def _(ratings: list[Tensor], p_logit: Tensor, outputs: int) -> Tensor:
    images, _, tokens = ratings[-1].shape
    return ratings[-1].new_empty(len(ratings) + 1, images, tokens, dtype=torch.bool)


def token_count(keep: float, tokens: int) -> int:
    """How many of so many tokens: a share, rounded up; from 1 on a number."""
    return min(int(keep) if keep >= 1 else math.ceil(keep * tokens), tokens)


def topk_sets(ratings: Sequence[Tensor], keep: Sequence[float], outputs: int) -> tuple[Tensor, Tensor]:
    """The best keep[i] of the tokens for block i, and what the block after it needs: bool [L + 1, B, N], and their impacts [L, B, N], shares of 1.

    ratings: attention, as in `concrete_masks`."""
    with torch.autocast(ratings[0].device.type, enabled=False):
        impact = _start(ratings[-1], outputs)
        kept = impact.bool()
        sets, impacts = [kept], []
        for rating, share in zip(reversed(ratings), reversed(keep), strict=True):
            rows = rating.shape[1]
            weight = kept[:, :rows].to(rating.dtype)
            wanted = weight * (1 - PROPAGATED + PROPAGATED * impact[:, :rows])
            mean = (wanted.unsqueeze(1) @ rating).squeeze(1) / weight.sum(dim=1, keepdim=True)
            best = mean.topk(token_count(share, int(mean.shape[1])), dim=1).indices
            kept = kept | torch.zeros_like(mean).scatter(1, best, 1.0).bool() | mean.isnan()
            on_kept = mean * kept
            impact = on_kept / (on_kept.sum(dim=1, keepdim=True) + 1e-8)
            sets.append(kept)
            impacts.append(impact)
    return torch.stack(sets[::-1]), torch.stack(impacts[::-1])


def occupancy(kept: Tensor) -> Tensor:
    """Each image's mean over the L + 1 sets [L + 1, B, N] of the share of tokens kept, [B]: as the paper reports it."""
    return kept.double().mean(dim=(0, 2))
