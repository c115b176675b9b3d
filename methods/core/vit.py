"""Helpers around timm's VisionTransformer: making a specialised copy, saying what is supported, reporting."""

from __future__ import annotations

import copy

import torch
from timm.layers import Attention
from timm.models import VisionTransformer
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from methods.core.contract import Unsupported
from methods.core.report import BlockReport, Report


def specialise(vit: VisionTransformer, behaviour: type) -> VisionTransformer:
    """A deep copy of `vit` whose class also inherits from `behaviour`, a subclass of VisionTransformer that overrides
    methods only. Parameters, their names and the original's own specialities (a distilled DeiT's two heads) stay."""
    sparse = copy.deepcopy(vit)
    base = type(vit)
    sparse.__class__ = behaviour if base is VisionTransformer else type(behaviour.__name__, (behaviour, base), {})
    return sparse


def replace_attention(vit: VisionTransformer, attention: type[Attention], blocks: range | None = None) -> None:
    """Gives the attention of the named blocks (all by default) the class `attention`, which overrides methods only."""
    for index in blocks if blocks is not None else range(len(vit.blocks)):
        vit.blocks[index].attn.__class__ = attention


def heads_width(attention: Attention) -> int:
    """Of all heads side by side. It may differ from the tokens' width; newer releases of timm call it `attn_dim`, 1.0.22 has no such thing."""
    return attention.num_heads * attention.head_dim


def embed(vit: VisionTransformer, images: Tensor) -> Tensor:
    """Images [B, 3, H, W] to the tokens that enter the first block [B, prefix + N, C]."""
    return vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(images))))


def require_plain_vit(vit: nn.Module, method: str, pools: tuple[str, ...] = ("token", "avg")) -> None:
    """Unsupported, with the reason, unless `vit` is a timm VisionTransformer of ordinary blocks and attention."""
    if not isinstance(vit, VisionTransformer):
        raise Unsupported(f"{method} needs a timm VisionTransformer, not {type(vit).__name__}")
    if vit.global_pool not in pools:
        raise Unsupported(f"{method} supports pooling by {' or '.join(pools)}, not {vit.global_pool!r}")
    for index, block in enumerate(vit.blocks):
        if type(block) is not Block:
            raise Unsupported(f"{method}: block {index} is a {type(block).__name__}; only timm's Block is supported")
        if type(block.attn) is not Attention or getattr(block.attn, "gate", None) is not None:
            raise Unsupported(
                f"{method}: block {index} has an unusual attention; only timm's plain Attention is supported"
            )


def dense_report(vit: VisionTransformer) -> Report:
    """The report of a model that keeps everything."""
    tokens = torch.tensor([vit.patch_embed.num_patches + vit.num_prefix_tokens])
    return Report(tuple(BlockReport(keys=tokens, queries=tokens, mlp=tokens) for _ in vit.blocks))
