"""The paper's forward baseline ("manual top-k"): each block's own attention says which tokens go on, from the input to the output."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from timm.models import VisionTransformer
from torch import Tensor

from methods.core.pruning import take_tokens
from methods.core.report import BlockReport
from methods.core.vit import embed
from methods.sttabt.observed import ObservedAttention


def manual_schedule(occupancy: float, depth: int) -> list[float]:
    """Shares of the tokens that the blocks leave, falling, so that their mean is about `occupancy`; the authors' line for 12 blocks."""
    places = [11 * index / max(depth - 1, 1) for index in range(depth)]
    if occupancy <= 0.666:
        return [0.5 * occupancy + (1 - x / 10) * occupancy for x in places]
    return [(1 - x / 10) * (2 - 2 * occupancy) + (2 * occupancy - 1) for x in places]


class LeavingAttention(ObservedAttention):
    """Modifies ObservedAttention: also says which tokens its queries look at."""

    def forward(self, x: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Tokens x [B, n, C] to the output [B, n, C], and the `count` of them that are attended to most, ascending [B, count]."""
        q, k, v = self.heads(x)
        weights = self.scores(q, k).softmax(dim=-1)
        best = weights.mean(dim=(1, 2)).topk(count, dim=1).indices.sort(dim=1).values
        return self.proj(self.norm((weights.to(v.dtype) @ v).transpose(1, 2).flatten(2))), best


class AskedAttention(ObservedAttention):
    """Modifies ObservedAttention: the tokens that ask are not those that are looked at."""

    def forward(self, queries: Tensor, x: Tensor) -> Tensor:
        """The output for other tokens [B, m, C], which look at x [B, n, C]."""
        q, k, v = (part.transpose(1, 2) for part in self.projected(queries, x))
        return self.attend(self.scores(q, k), v)


class ManualViT(VisionTransformer):
    """Modifies timm's VisionTransformer: block i leaves `counts[i]` tokens. As in the official code CLS may go, too; what the classifiers read then stays
    as it was, and asks the last block's tokens.

    counts: of the blocks but the last, which leaves the `outputs` tokens of the classifiers.
    """

    counts: Sequence[int]
    outputs: int

    def forward_features(self, x: Tensor, *args, **kwargs) -> Tensor:
        return self.pruned(x)[0]

    def pruned(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The output's tokens after the final norm [B, outputs, C], and the tokens that each block reads [B, n]."""
        x = embed(self, images)
        ids = torch.arange(x.shape[1], device=x.device).expand(len(x), -1)
        output, read = x[:, : self.outputs], [ids]
        for block, count in zip(self.blocks[:-1], self.counts, strict=True):
            y, best = block.attn(block.norm1(x), count)
            x, ids = take_tokens(x + block.ls1(y), best), ids.gather(1, best)
            x = x + block.ls2(block.mlp(block.norm2(x)))
            output = _updated(output, x, ids)
            read.append(ids)
        last = self.blocks[-1]
        output = output + last.ls1(last.attn(last.norm1(output), last.norm1(x)))
        return self.norm(output + last.ls2(last.mlp(last.norm2(output)))), read

    @torch.no_grad()
    def block_reports(self, images: Tensor) -> tuple[BlockReport, ...]:
        """All that a block reads look, since what they look at decides; those that leave it take its MLP."""
        read, blocks = self.pruned(images)[1], []
        leaves = [*self.counts, self.outputs]
        for index, ids in enumerate(read):
            keys, mlp = torch.tensor([ids.shape[1]]), torch.tensor([leaves[index]])
            queries = mlp if index == len(read) - 1 else keys
            patches = (ids - self.num_prefix_tokens).clamp(min=-1)
            blocks.append(BlockReport(keys=keys, queries=queries, mlp=mlp, kept=patches))
        return tuple(blocks)


def _updated(output: Tensor, x: Tensor, ids: Tensor) -> Tensor:
    """The output's tokens [B, outputs, C] with what became of those that are still among x [B, n, C], whose numbers are ids."""
    places = torch.arange(output.shape[1], device=ids.device)
    found = (ids.unsqueeze(1) == places[:, None]).to(x.dtype)  # [B, outputs, n]
    return output * (1 - found.sum(dim=2, keepdim=True)) + (found.unsqueeze(-1) * x.unsqueeze(1)).sum(dim=2)
