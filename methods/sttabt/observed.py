"""A vision transformer that is looked into: the tokens at each block's input, and its scores before the softmax."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from timm.layers import Attention
from timm.models import VisionTransformer
from torch import Tensor
from torch.nn import functional as F

from methods.core.precision import wide
from methods.core.vit import embed, heads_width


class ObservedAttention(Attention):
    """Modifies timm's Attention: its steps can be taken one by one. Called as usual it is timm's."""

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [B, H, N, d] of tokens [B, N, C]."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.q_norm(q), self.k_norm(k), v

    def projected(self, queries: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [..., m, H, d] of some tokens [..., m, C], and keys and values [..., n, H, d] of all x [..., n, C]."""
        width, shape = heads_width(self), (self.num_heads, self.head_dim)
        weight, bias = self.qkv.weight, self.qkv.bias
        of_queries, of_others = (None, None) if bias is None else (bias[:width], bias[width:])
        q = F.linear(queries, weight[:width], of_queries).unflatten(-1, shape)
        k, v = F.linear(x, weight[width:], of_others).unflatten(-1, (2, *shape)).unbind(-3)
        return self.q_norm(q), self.k_norm(k), v

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        """Before the softmax, [B, H, Q, N] float32 under any autocast: standardising them in less would be noise."""
        with torch.autocast(q.device.type, enabled=False):
            return (wide(q) * self.scale) @ wide(k).transpose(-2, -1)

    def attend(self, scores: Tensor, v: Tensor) -> Tensor:
        """The output [B, Q, C] from scores and values."""
        out = scores.softmax(dim=-1).to(v.dtype) @ v
        return self.proj(self.norm(out.transpose(1, 2).flatten(2)))


@dataclass(frozen=True)
class Step:
    """hidden [B, N, C]: the tokens at a block's input; scores [B, H, N, N]; values [B, H, N, d]."""

    hidden: Tensor
    scores: Tensor
    values: Tensor


def steps(vit: VisionTransformer, images: Tensor) -> Iterator[Step]:
    """Block by block, all tokens kept, without dropout. What comes after the last block's scores is left to `finished`."""
    x = embed(vit, images)
    for block in vit.blocks:
        q, k, v = block.attn.heads(block.norm1(x))
        step = Step(x, block.attn.scores(q, k), v)
        yield step
        if block is not vit.blocks[-1]:
            x = _after(block, step)


def finished(vit: VisionTransformer, last: Step) -> Tensor:
    """The logits [B, classes], from the last of `steps`."""
    return vit.forward_head(vit.norm(_after(vit.blocks[-1], last)))


def _after(block: torch.nn.Module, step: Step) -> Tensor:
    x = step.hidden + block.ls1(block.attn.attend(step.scores, step.values))
    return x + block.ls2(block.mlp(block.norm2(x)))
