"""The authors' own count of multiply-adds, by the closed form of their counter, so that their figures can be compared."""

from __future__ import annotations

import itertools

import torch
from timm.models import VisionTransformer
from torch import Tensor

from methods.core.report import AuthorsCount
from methods.sttabt.model import BackTrackedViT

AUTHORS_TOKENS = 192  # what their code has for a network of 197 tokens
NOTE = (
    "as the authors count: {tokens} tokens, a patch embedding of one colour and of kept tokens alone, LayerNorm at 5 per element, the whole approximation "
    "network, no classifier"
)


def network_macs(shares: Tensor, tokens: int, width: int, hidden: int, heads: int, patch: int) -> Tensor:
    """Of one network, float64 [B]: shares [L + 1, B], what is kept of `tokens` at each block's input, and at the output."""
    counts = tokens * shares.double()
    total = counts[0] * width * (patch**2 + 1 + 5)
    for read, written in itertools.pairwise(counts):
        total = total + (2 * read + written) * width**2 + 2 * read * written * width + heads * read * written
        total = total + written * (width**2 + width) + written * (width * hidden + hidden)
        total = total + written * (hidden * width + 2 * width) + 5 * read * width + 6 * written * width
    return total + 5 * width


def update_macs(shares: Tensor, tokens: int, heads: int) -> Tensor:
    """Of the scores and masks of all blocks, float64 [B]."""
    written, blocks = tokens * shares[1:].double(), len(shares) - 1
    each = [(9 * heads + 6) * written[i] * tokens + 8 * tokens + tokens * (blocks - i) for i in range(blocks)]
    return torch.stack(each).sum(dim=0)


def authors_macs(module: BackTrackedViT, kept: Tensor) -> AuthorsCount:
    """kept [L + 1, B, N]. Their code has 192 for 197 tokens; for other networks here it is their number."""
    tokens = AUTHORS_TOKENS if kept.shape[2] == 197 else kept.shape[2]
    shares, heads = kept.double().mean(dim=2), module.blocks[0].attn.num_heads
    all_kept = torch.ones_like(shares)
    factor = module.embed_dim // module.approx.embed_dim
    patch = module.patch_embed.proj.kernel_size[0]
    parts = {
        "network": network_macs(shares, tokens, *_widths(module), heads, patch),
        "approximation": network_macs(all_kept, tokens, *(width // factor for width in _widths(module)), heads, patch),
        "masks": update_macs(shares, tokens, heads),
    }
    return AuthorsCount(parts, NOTE.format(tokens=tokens))


def _widths(net: VisionTransformer) -> tuple[int, int]:
    return net.embed_dim, net.blocks[0].mlp.fc1.out_features
