"""STTABT's network as it trains: soft masks on keys, queries and MLPs, and no token is gone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from timm.models import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from methods.core.vit import embed
from methods.sttabt.approxnet import rated
from methods.sttabt.backtracking import Masks, concrete_masks, concrete_sets, topk_sets
from methods.sttabt.observed import ObservedAttention, steps

SMALLEST = 1e-30  # of a mask whose logarithm is taken


class MaskedAttention(ObservedAttention):
    """Modifies ObservedAttention: `masked` scales queries, keys and values by masks of the tokens, and weighs attention by the keys' masks."""

    def masked(self, x: Tensor, reads: Tensor, writes: Tensor) -> Tensor:
        """x [B, N, C] with the masks of what is read (keys, values) and written (queries, projection), [B, N] each, to the output [B, N, C].

        The softmax times the mask, normalised again, is the softmax of scores plus the mask's logarithm."""
        reads, writes = (mask.to(x.dtype)[:, None, :, None] for mask in (reads, writes))
        q, k, v = self.heads(x)
        q, k, v = q * writes, k * reads, v * reads
        bias = reads.clamp(min=SMALLEST).log().transpose(-2, -1)
        if self.fused_attn:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype))
        else:
            out = ((q * self.scale) @ k.transpose(-2, -1) + bias).softmax(dim=-1).to(v.dtype) @ v
        out = self.norm(out.transpose(1, 2).flatten(2))
        return self.proj_drop(self.proj(out)) * writes.squeeze(1)


def masked_block(block: nn.Module, x: Tensor, reads: Tensor, writes: Tensor) -> Tensor:
    """A timm Block under masks [B, N]: what it does not write passes through unchanged."""
    x = x + block.drop_path1(block.ls1(block.attn.masked(block.norm1(x), reads, writes)))
    mlp, written = block.mlp, writes.to(x.dtype).unsqueeze(-1)
    hidden = mlp.norm(mlp.drop1(mlp.act(mlp.fc1(block.norm2(x)) * written)))
    return x + block.drop_path2(block.ls2(mlp.drop2(mlp.fc2(hidden)) * written))


class BackTrackedViT(VisionTransformer):
    """Modifies timm's VisionTransformer: before it runs, tokens are chosen for every block, walking back from the output.

    approx: the approximation network (None where the network's own attention is asked, by a dense pass); transfer: maps for its distillation; p_logit [L]:
    the thresholds of concrete masks. keep: shares of tokens for top-k, per block; None: concrete masks. outputs: tokens that the classifiers read.
    """

    keep: Sequence[float] | None
    outputs: int

    def ratings(self, images: Tensor) -> list[Tensor]:
        """Of every block, see `methods.sttabt.approxnet.rated`."""
        if self.approx is not None:
            return self.approx.ratings(images, self.outputs)
        found = []
        for step in steps(self, images):
            rows = self.outputs if len(found) == len(self.blocks) - 1 else None
            found.append(rated(step.scores[:, :, :rows], "probabilities"))
        return found

    def choose(self, images: Tensor) -> Tensor:
        """What is kept of images [B, 3, H, W]: bool [L + 1, B, N], see `methods.sttabt.backtracking`."""
        ratings = self.ratings(images)
        if self.keep is not None:
            return topk_sets(ratings, self.keep, self.outputs)[0]
        return concrete_sets(ratings, self.p_logit, self.outputs)

    def masks(self, images: Tensor) -> Masks:
        """The concrete masks, with gradients into the approximation network."""
        ratings = []
        for step in steps(self.approx, images):
            rows = self.outputs if len(ratings) == len(self.blocks) - 1 else None
            with torch.autocast(images.device.type, enabled=False):
                ratings.append(rated(step.scores[:, :, :rows], "uniform"))
        return concrete_masks(ratings, self.p_logit, self.outputs)

    def masked_features(self, images: Tensor, masks: Tensor) -> Tensor:
        """All tokens after the final norm [B, N, C], under masks [L + 1, B, N]."""
        x = embed(self, images)
        for index, block in enumerate(self.blocks):
            x = masked_block(block, x, masks[index], masks[index + 1])
        return self.norm(x)

    def forward_features(self, x: Tensor, *args, **kwargs) -> Tensor:
        return self.masked_features(x, self.choose(x))

    def dense_logits(self, images: Tensor) -> Tensor:
        """With all tokens kept."""
        return self.forward_head(VisionTransformer.forward_features(self, images))
