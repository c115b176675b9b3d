"""Token removal in stages: before some blocks, a score decides which patch tokens stay. Shared by the methods that do it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.models import VisionTransformer
from torch import Tensor

from methods.core.contract import Unsupported
from methods.core.report import BlockReport
from methods.core.vit import embed


def stage_counts(patches: int, keep_rate: float, stages: int) -> tuple[int, ...]:
    """Kept patches per stage: int(N0 * rho^s), of the original count N0 (DynamicViT, section 3.3). Unsupported at 0."""
    counts = tuple(int(patches * keep_rate**stage) for stage in range(1, stages + 1))
    if min(counts, default=1) < 1:
        raise Unsupported(
            f"keep_rate {keep_rate} leaves no token of {patches} at stage {counts.index(0) + 1}; raise keep_rate"
        )
    return counts


def take_tokens(x: Tensor, ids: Tensor) -> Tensor:
    """The tokens ids [B, k] of x [B, n, C]: [B, k, C]. Copies whole rows, which is quicker than an elementwise gather."""
    first = torch.arange(len(x), device=x.device).unsqueeze(1) * x.shape[1]
    rows = (first + ids).flatten()
    return x.reshape(-1, x.shape[-1]).index_select(0, rows).view(*ids.shape, x.shape[-1])


def after_prefix(ids: Tensor, prefix: int) -> Tensor:
    """Patch numbers ids [B, k] as places in the sequence, with the prefix tokens before them: [B, prefix + k]."""
    always = torch.arange(prefix, device=ids.device).expand(len(ids), -1)
    return torch.cat([always, ids + prefix], dim=1)


class StagedPruning(VisionTransformer):
    """Modifies timm's VisionTransformer: evaluation drops patch tokens before the blocks `pruning_loc` and runs the rest
    of the network on the survivors. Prefix tokens (CLS, distillation, registers) always stay.

    pruning_loc: indices of the blocks, ascending; kept_counts: patch tokens that stay at each.
    """

    pruning_loc: tuple[int, ...]
    kept_counts: tuple[int, ...]

    def plan_pruning(self, keep_rate: float, pruning_loc: Sequence[int] | None) -> None:
        """Fixes where tokens go and how many stay. Places default to quarters of the depth (3, 6, 9 of 12), fewer where
        that is less than three blocks. Unsupported where they do not fit the depth."""
        depth = len(self.blocks)
        quarters = sorted({depth * quarter // 4 for quarter in (1, 2, 3)} - {0})
        places = tuple(quarters if pruning_loc is None else pruning_loc)
        if not places or list(places) != sorted(set(places)) or not all(0 < place < depth for place in places):
            raise Unsupported(f"pruning_loc {list(places)} must be ascending block numbers from 1 to {depth - 1}")
        self.pruning_loc = places
        self.kept_counts = stage_counts(self.patch_embed.num_patches, keep_rate, len(places))

    def look(self, images: Tensor) -> Any:
        """What `keep_scores` wants to know of the images [B, 3, H, W] themselves, found once per forward."""
        return None

    def keep_scores(self, stage: int, patches: Tensor, seen: Any) -> Tensor:
        """The higher, the more a token should stay: [B, n] for the surviving patches [B, n, C]; seen: from `look`."""
        raise NotImplementedError

    def pruned_features(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The survivors after the final norm [B, prefix + m, C], and each stage's kept ids [B, m_s], in score order,
        as places among the patch tokens that were alive before it."""
        prefix = self.num_prefix_tokens
        x, seen = embed(self, images), self.look(images)
        kept: list[Tensor] = []
        for index, block in enumerate(self.blocks):
            if index in self.pruning_loc:
                stage = len(kept)
                scores = self.keep_scores(stage, x[:, prefix:], seen)
                kept.append(scores.topk(self.kept_counts[stage], dim=1).indices)
                x = take_tokens(x, after_prefix(kept[-1], prefix))
            x = block(x)
        return self.norm(x), kept

    def forward_features(self, x: Tensor, *args, **kwargs) -> Tensor:
        return self.pruned_features(x)[0]

    @torch.no_grad()
    def kept_patches(self, images: Tensor) -> list[Tensor]:
        """Each stage's survivors as original patch numbers, int64 [B, m_s], in score order."""
        alive = torch.arange(self.patch_embed.num_patches, device=images.device).expand(len(images), -1)
        stages = []
        for local in self.pruned_features(images)[1]:
            alive = alive.gather(1, local)
            stages.append(alive)
        return stages

    def block_reports(self, images: Tensor) -> tuple[BlockReport, ...]:
        """One BlockReport per block: the counts, and which patches enter it."""
        stages = dict(zip(self.pruning_loc, self.kept_patches(images), strict=True))
        patches, kept, blocks = self.patch_embed.num_patches, None, []
        for index in range(len(self.blocks)):
            kept = stages.get(index, kept)
            count = torch.full((len(images),), self.num_prefix_tokens + (patches if kept is None else kept.shape[1]))
            blocks.append(BlockReport(keys=count, queries=count, mlp=count, kept=kept))
        return tuple(blocks)
