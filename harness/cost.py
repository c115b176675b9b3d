"""Multiply-adds per image, three ways: of the dense backbone, by formula from the report, and traced while executing.

Convention: one multiply-add is 1; matrix products and convolutions count, nothing else does (as in the papers' formulas;
fvcore's own default adds LayerNorm at 5 per element).
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from methods import Method, Report

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # fvcore scripts functions at import, which torch calls deprecated
    from fvcore.nn import FlopCountAnalysis
    from fvcore.nn.jit_handles import get_shape

# Operations that move, compare or scale elements: they have no multiply-adds of a matrix product. Any other operation
# without a handler is an error, so that no product is ever missed silently.
FREE_OPS = frozenset("aten::" + op for op in """
    __and__ __or__ __rshift__ __xor__ abs add add_ amax amin argmax argmin argsort bernoulli bitwise_and
    bitwise_or bitwise_xor broadcast_tensors ceil clamp_min concat cos cumsum div div_ dropout_ embedding eq erf
    exp expand_as eye fill_ floor_divide ge gelu gt hardtanh index_fill index_select is_floating_point isnan le
    lerp linalg_vector_norm log log_softmax logical_and logical_not logical_or lt masked_fill_ masked_select
    maximum mean meshgrid min minimum movedim mul mul_ ne neg new_ones norm one_hot ones_like pad pow prod rand
    rand_like randn reciprocal repeat repeat_interleave roll round rsqrt rsub scatter scatter_ scatter_add
    scatter_add_ scatter_reduce sigmoid sign silu sin softmax sort split_with_sizes sqrt square stack std sub sub_
    sum swapaxes swapdims take_along_dim tanh tensor_split topk tril triu type_as unsqueeze_ var view_as where
    zero_ zeros_like
""".split())  # fmt: skip


class UncountedOperation(RuntimeError):
    """The model executes an operation whose multiply-adds nobody has said how to count."""


@dataclass(frozen=True)
class Costs:
    """Per image: multiply-adds of the untouched backbone, by formula, and executed by the deployed model; parameters of
    the deployed model, and those of them that no mask has set to zero."""

    macs_dense: float
    macs_theoretical: float
    macs_executed: float
    params: int
    params_nonzero: int


def count(method: Method, vit: nn.Module, sparse: nn.Module, deployed: nn.Module, images: Tensor) -> Costs:
    """All costs of a method on a backbone; the report and the trace see `images` [B, 3, H, W], a mean over which is taken
    where they differ."""
    sparse = sparse.eval()
    report = method.report(sparse, images)
    varies = _varies(report)
    one = images if varies else images[:1]
    return Costs(
        macs_dense=traced_macs(vit, images[:1]),
        macs_theoretical=theoretical_macs(vit, report, images.shape[-2:]),
        macs_executed=sum(traced_macs(deployed, image[None]) for image in one) / len(one),
        params=sum(p.numel() for p in deployed.parameters()),
        params_nonzero=round(
            sum(p.numel() * report.weight_density.get(name, 1.0) for name, p in deployed.named_parameters())
        ),
    )


def _varies(report: Report) -> bool:
    """Whether images differ in what they cost."""
    per_image = [tensor for block in report.blocks for tensor in (block.keys, block.queries, block.mlp)]
    per_image += [extra.macs for extra in report.overhead]
    per_image += [block.attention_density for block in report.blocks if block.attention_density is not None]
    return any(bool((tensor != tensor[:1]).any()) for tensor in per_image)


def traced_macs(model: nn.Module, images: Tensor) -> float:
    """Multiply-adds that `model` executes on images [B, 3, H, W], per image. UncountedOperation names what it cannot count
    and where."""
    model.eval()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        analysis = FlopCountAnalysis(model, images)
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        analysis.set_op_handle(**_handlers())
        total = analysis.total()
        missing = {op: n for op, n in analysis.unsupported_ops().items() if op not in FREE_OPS}
        if missing:
            op = sorted(missing)[0]
            inside = [name for name in analysis.by_module() if name and op in analysis.unsupported_ops(name)]
            where = max(inside, key=lambda name: name.count("."), default="") or type(model).__name__
            raise UncountedOperation(f"{op} in {where} has no rule for counting multiply-adds")
    return total / len(images)


def _handlers() -> dict[str, Callable | None]:
    return {
        "aten::scaled_dot_product_attention": _attention_macs,
        "aten::_scaled_dot_product_flash_attention": _attention_macs,
        "aten::_scaled_dot_product_efficient_attention": _attention_macs,
        "aten::baddbmm": _batched_product_macs,
        "aten::mv": _vector_product_macs,
        "aten::dot": _vector_product_macs,
        "aten::layer_norm": _nothing,
        "aten::batch_norm": _nothing,
        "aten::group_norm": _nothing,
        "aten::instance_norm": _nothing,
        "aten::adaptive_avg_pool2d": _nothing,
        "aten::upsample_bilinear2d": _nothing,
        "aten::upsample_nearest2d": _nothing,
        "aten::grid_sampler": _nothing,
    }


def _nothing(inputs: list[Any], outputs: list[Any]) -> Counter:
    return Counter()


def _attention_macs(inputs: list[Any], outputs: list[Any]) -> Counter:
    """Q K^T and the product with V: [..., n, d], [..., m, d], [..., m, e] make n * m * (d + e) for every head and image."""
    query, key, value = (get_shape(x) for x in inputs[:3])
    rows = 1
    for size in query[:-1]:
        rows *= size
    return Counter({"attention": rows * key[-2] * (query[-1] + value[-1])})


def _batched_product_macs(inputs: list[Any], outputs: list[Any]) -> Counter:
    batch, rows, inner = get_shape(inputs[1])
    return Counter({"baddbmm": batch * rows * inner * get_shape(inputs[2])[-1]})


def _vector_product_macs(inputs: list[Any], outputs: list[Any]) -> Counter:
    size = 1
    for part in get_shape(inputs[0]):
        size *= part
    return Counter({"mv": size})


def theoretical_macs(vit: nn.Module, report: Report, image_size: tuple[int, int]) -> float:
    """What the paper would print: the dense backbone's dimensions with the report's tokens, heads, attention entries and
    weight densities, plus all overhead; mean over the report's images."""
    if len(report.blocks) != len(vit.blocks):
        raise ValueError(f"the report has {len(report.blocks)} blocks, the backbone {len(vit.blocks)}")
    total = _outside_blocks(vit, report, image_size)
    for index, block in enumerate(vit.blocks):
        total = total + sum(block_macs(block, report, index).values())
    for extra in report.overhead:
        total = total + extra.macs.double().mean()
    return float(total)


def block_macs(block: nn.Module, report: Report, index: int) -> dict[str, Tensor]:
    """One block's multiply-adds, mean over images: projections (qkv, proj), attention, mlp."""
    entry, attention = report.blocks[index], block.attn
    keys, queries, mlp = (x.double() for x in (entry.keys, entry.queries, entry.mlp))
    heads, width = attention.num_heads, attention.head_dim * attention.num_heads
    alive = 1.0 if entry.active_heads is None else float(entry.active_heads.double().mean())
    if entry.attention_density is None:
        density = torch.tensor(alive, dtype=torch.float64)
    else:
        per_head = entry.attention_density.double()
        active = torch.ones(heads, dtype=torch.float64) if entry.active_heads is None else entry.active_heads.double()
        density = (per_head * active).sum(dim=-1) / heads
    name = f"blocks.{index}."
    qkv = _dense_weight(report, name + "attn.qkv.weight", attention.qkv) * alive / 3
    proj = _dense_weight(report, name + "attn.proj.weight", attention.proj) * alive
    inside = sum(
        _dense_weight(report, f"{name}mlp.{key}.weight", layer)
        for key, layer in block.mlp.named_modules() if isinstance(layer, nn.Linear)
    )  # fmt: skip
    return {
        "projections": (queries * (qkv + proj) + keys * 2 * qkv).mean(),
        "attention": (queries * keys * 2 * width * density).mean(),
        "mlp": (mlp * inside).mean(),
    }


def _outside_blocks(vit: nn.Module, report: Report, image_size: tuple[int, int]) -> float:
    """Patch embedding and classifier heads."""
    conv = vit.patch_embed.proj
    patches = (image_size[0] // conv.stride[0]) * (image_size[1] // conv.stride[1])
    total = patches * _dense_weight(report, "patch_embed.proj.weight", conv)
    for name in ("head", "head_dist"):
        layer = getattr(vit, name, None)
        if isinstance(layer, nn.Linear):
            total += _dense_weight(report, f"{name}.weight", layer)
    return total


def _dense_weight(report: Report, name: str, layer: nn.Module) -> float:
    return layer.weight.numel() * report.weight_density.get(name, 1.0)


def dense_formula_holds(vit: nn.Module, images: Tensor, tolerance: float = 1e-3) -> tuple[bool, float, float]:
    """Whether the formula, for a model that keeps everything, agrees with the trace: (agrees, formula, traced). Where it
    does not, the backbone has parts that the formula does not know, and theoretical counts would be wrong."""
    from methods.core.vit import dense_report

    formula, traced = theoretical_macs(vit, dense_report(vit), images.shape[-2:]), traced_macs(vit, images[:1])
    return abs(formula - traced) <= tolerance * traced, formula, traced
