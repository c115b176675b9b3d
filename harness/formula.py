"""Multiply-adds by formula: the dense backbone's dimensions with what a method's report says it kept."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from harness.macs import Count, Parts
from methods import Report


def theoretical(vit: nn.Module, report: Report, image_size: tuple[int, int], images: int | None = None) -> Count:
    """What the paper would print: kept tokens, heads, attention entries and weights, plus all overhead. images: how many the report is about, where a report
    of [1] stands for them all; None: as many as it has values for."""
    if len(report.blocks) != len(vit.blocks):
        raise ValueError(f"the report has {len(report.blocks)} blocks, the backbone {len(vit.blocks)}")
    blocks: list[Parts] = [block_macs(block, report, index) for index, block in enumerate(vit.blocks)]
    outside = _outside_blocks(vit, report, image_size)
    for extra in report.overhead:
        place = outside if extra.block is None else blocks[extra.block]
        place["overhead"] = place.get("overhead", 0.0) + extra.macs.double().cpu()
    return Count.of(outside, blocks, images)


def theoretical_macs(vit: nn.Module, report: Report, image_size: tuple[int, int]) -> float:
    """The mean of `theoretical` over the report's images."""
    return theoretical(vit, report, image_size).total


def block_macs(block: nn.Module, report: Report, index: int) -> Parts:
    """One block's multiply-adds for each image: projections (qkv, proj), attention (Q K^T and the product with V), mlp."""
    entry, attention = report.blocks[index], block.attn
    keys, queries, mlp = (x.double().cpu() for x in (entry.keys, entry.queries, entry.mlp))
    heads, width = attention.num_heads, attention.head_dim * attention.num_heads
    alive = 1.0 if entry.active_heads is None else float(entry.active_heads.double().mean())
    if entry.attention_density is None:
        density: float | Tensor = alive
    else:
        per_head = entry.attention_density.double().cpu()
        active = (
            torch.ones(heads, dtype=torch.float64) if entry.active_heads is None else entry.active_heads.double().cpu()
        )
        density = (per_head * active).sum(dim=-1) / heads
    name = f"blocks.{index}."
    qkv = _dense_weight(report, name + "attn.qkv.weight", attention.qkv) * alive / 3
    proj = _dense_weight(report, name + "attn.proj.weight", attention.proj) * alive
    inside = sum(
        _dense_weight(report, f"{name}mlp.{key}.weight", layer)
        for key, layer in block.mlp.named_modules() if isinstance(layer, nn.Linear)
    )  # fmt: skip
    return {
        "projections": queries * (qkv + proj) + keys * 2 * qkv,
        "attention": queries * keys * 2 * width * density,
        "mlp": mlp * inside,
    }


def _outside_blocks(vit: nn.Module, report: Report, image_size: tuple[int, int]) -> Parts:
    conv = vit.patch_embed.proj
    patches = (image_size[0] // conv.stride[0]) * (image_size[1] // conv.stride[1])
    heads = [(name, getattr(vit, name, None)) for name in ("head", "head_dist")]
    return {
        "embedding": patches * _dense_weight(report, "patch_embed.proj.weight", conv),
        "head": sum(_dense_weight(report, f"{name}.weight", x) for name, x in heads if isinstance(x, nn.Linear)),
    }


def _dense_weight(report: Report, name: str, layer: nn.Module) -> float:
    return layer.weight.numel() * report.weight_density.get(name, 1.0)
