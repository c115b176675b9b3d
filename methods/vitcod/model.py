"""ViTCoD's network: queries and keys through the auto-encoder, scores under a fixed mask."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from timm.layers import Attention
from timm.models import VisionTransformer
from torch import Tensor
from torch.nn import functional as F

from methods.core.vit import embed, replace_attention, specialise
from methods.vitcod.autoencoder import HeadCoder, hidden_heads

EVERYTHING, MADE_UP, DECIDED = range(
    3
)  # what the masks are: all entries, a pattern for timing without training, or the method's
CODED = {"mix_head_fc_qk": "qk", "mix_head_fc_q": "q", "mix_head_fc_k": "k", "none": ""}


class CodedAttention(Attention):
    """Modifies timm's Attention: before the scores, queries and keys (those in `coded`) are encoded to fewer heads and decoded again; scores of
    entries that are not in `kept` (bool [H, N, N], a buffer) are minus infinity. While it trains, it notes in `distances` how far the decoded ones are
    from the originals: a squared sum for each of them. average: the attention maps [H, N, N] that the masks were made from (zeros before).

    encodes, masks: whether it does so now; phases that look at what was before turn them off.
    """

    coded: str
    kept: Tensor
    average: Tensor
    encodes: bool = True
    masks: bool = True

    def queries_keys_values(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, H, N, d] each, before the auto-encoder."""
        qkv = self.qkv(x).reshape(*x.shape[:2], 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        return self.q_norm(q), self.k_norm(k), v

    def decoded(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys as the scores use them."""
        if self.encodes and "q" in self.coded:
            q = self.decoder_q(self.encoder_q(q))
        if self.encodes and "k" in self.coded:
            k = self.decoder_k(self.encoder_k(k))
        return q, k

    def attention(self, q: Tensor, k: Tensor) -> Tensor:
        """The softmax over keys [B, H, N, N]."""
        scores = (q * self.scale) @ k.transpose(-2, -1)
        if self.masks:
            scores = scores.masked_fill(~self.kept, -torch.inf)
        return scores.softmax(dim=-1)

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        q, k, v = self.queries_keys_values(x)
        q_hat, k_hat = self.decoded(q, k)
        if self.training and self.coded:
            pairs = {"q": (q_hat, q), "k": (k_hat, k)}
            self.distances = torch.stack([_squared(*pairs[which]) for which in self.coded])
        dropout = self.attn_drop.p if self.training else 0.0
        if self.fused_attn:
            x = F.scaled_dot_product_attention(
                q_hat, k_hat, v, attn_mask=self.kept if self.masks else None, dropout_p=dropout
            )
        else:
            x = self.attn_drop(self.attention(q_hat, k_hat)) @ v
        x = self.norm(x.transpose(1, 2).flatten(2))
        return self.proj_drop(self.proj(x))


def _squared(decoded: Tensor, original: Tensor) -> Tensor:
    return (decoded.float() - original.float()).square().sum()


class ViTCoDViT(VisionTransformer):
    """Modifies timm's VisionTransformer: all attention is CodedAttention."""

    @property
    def attentions(self) -> list[CodedAttention]:
        return [block.attn for block in self.blocks]

    def take_distances(self) -> Tensor | None:
        """What the last forward in training noted, [L, 1 or 2]; they hold its graph, so they are not kept. None where there is nothing."""
        found = [attention.__dict__.pop("distances", None) for attention in self.attentions]
        return None if None in found else torch.stack(found)

    @contextmanager
    def looking_back(self, with_codes: bool) -> Iterator[None]:
        """Turns the masks off for a while, and the auto-encoders, too, unless with_codes."""
        for attention in self.attentions:
            attention.encodes, attention.masks = with_codes, False
        try:
            yield
        finally:
            for attention in self.attentions:
                attention.encodes = attention.masks = True

    def walk(self, images: Tensor) -> Iterator[tuple[int, CodedAttention, Tensor]]:
        """Block by block: its number, its attention, and that attention's input [B, N, C]."""
        x = embed(self, images)
        for index, block in enumerate(self.blocks):
            yield index, block.attn, block.norm1(x)
            x = block(x)

    @property
    def tokens(self) -> int:
        return self.patch_embed.num_patches + self.num_prefix_tokens


def make_coded(vit: VisionTransformer, svd_type: str) -> ViTCoDViT:
    """A copy of `vit` with auto-encoders and masks that keep everything."""
    sparse = specialise(vit, ViTCoDViT)
    replace_attention(sparse, CodedAttention)
    for attention in sparse.attentions:
        attention.coded = CODED[svd_type]
        heads, hidden = attention.num_heads, hidden_heads(attention.num_heads)
        for which in attention.coded:
            setattr(attention, f"encoder_{which}", HeadCoder(heads, hidden))
            setattr(attention, f"decoder_{which}", HeadCoder(hidden, heads))
        attention.register_buffer("kept", torch.ones(heads, sparse.tokens, sparse.tokens, dtype=torch.bool))
        attention.register_buffer("average", torch.zeros(heads, sparse.tokens, sparse.tokens))
    sparse.register_buffer("masks_are", torch.tensor(EVERYTHING))
    return sparse
