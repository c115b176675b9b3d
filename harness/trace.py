"""Multiply-adds by tracing: what a model really executes, counted by fvcore.

fvcore reads torch's jit trace. It has no rule for fused attention and passes over what it does not know; here every
operation either has a rule, or is known to have no multiply-adds, or is an error that names it.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from harness.errors import UserError
from harness.macs import Count
from methods.core.operators import RULES as OWN_RULES
from methods.core.registry import unknown

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # fvcore scripts functions at import, which torch calls deprecated
    from fvcore.nn import FlopCountAnalysis
    from fvcore.nn.jit_handles import elementwise_flop_counter, get_shape, norm_flop_counter

# Operations that move, compare or scale elements: they have no multiply-adds of a matrix product. Any other operation
# without a handler is an error, so that no product is ever missed silently.
FREE_OPS = frozenset("aten::" + op for op in """
    __and__ __or__ __rshift__ __xor__ abs add add_ amax amin argmax argmin argsort bernoulli bitwise_and
    bitwise_or bitwise_xor broadcast_tensors ceil clamp_min concat cos cumsum div div_ dropout_ embedding eq erf
    exp expand_as eye fill_ floor_divide ge gelu gt hardtanh index_fill index_select is_floating_point isnan le lift_fresh
    lerp linalg_vector_norm log log_softmax logical_and logical_not logical_or lt masked_fill_ masked_select
    maximum mean meshgrid min minimum movedim mul mul_ ne neg new_ones norm one_hot ones_like pad pow prod rand
    rand_like randn reciprocal repeat repeat_interleave roll round rsqrt rsub scatter scatter_ scatter_add
    scatter_add_ scatter_reduce sigmoid sign silu sin softmax sort special_ndtr split_with_sizes sqrt square stack std sub sub_
    sum swapaxes swapdims take_along_dim tanh tensor_split topk tril triu type_as unsqueeze_ var view_as where
    unflatten zero_ zeros_like
""".split())  # fmt: skip

# What fvcore counts by default and this project does not.
FVCORE_COUNTS = """
    batch_norm group_norm instance_norm adaptive_avg_pool2d upsample_bilinear2d upsample_nearest2d grid_sampler
""".split()

# What may be counted besides products, in operations per element. LayerNorm: fvcore's rule (4 without an affine part).
# Softmax and GELU: as ELECTRA's counter has them (Clark et al., 2020), since fvcore gives them 0.
ALSO = {"layernorm": 5, "softmax": 5, "gelu": 8}
PROJECTIONS = {"qkv", "proj", "q", "k", "v", "kv", "q_proj", "k_proj", "v_proj"}


class UncountedOperation(RuntimeError):
    """The model executes an operation whose multiply-adds nobody has said how to count."""


def traced(
    model: nn.Module, images: Tensor, also: Iterable[str] = (), overhead: Mapping[str, int] | None = None
) -> Count:
    """What `model` executes on images [B, 3, H, W], each traced by itself. `also`: names of ALSO to be counted too.
    `overhead`: the block to which a module outside the blocks belongs, by its name. UncountedOperation names what cannot
    be counted and where."""
    each = [_trace(model, image[None], frozenset(also), overhead or {}) for image in images]
    places = [
        {
            key: torch.tensor([place.get(key, 0.0) for place in same], dtype=torch.float64)
            for place in same
            for key in place
        }
        for same in zip(*each, strict=True)
    ]
    return Count.of(places[0], places[1:])


def traced_macs(model: nn.Module, images: Tensor) -> float:
    """Multiply-adds that `model` executes on images [B, 3, H, W] at once, per image."""
    return sum(sum(place.values()) for place in _trace(model, images, frozenset(), {})) / len(images)


def check_names(also: Iterable[str]) -> frozenset[str]:
    """UserError for what cannot be counted besides products."""
    wrong = next((name for name in also if name not in ALSO), None)
    if wrong is not None:
        raise UserError(f"--also: {unknown('operation', wrong, ALSO)}")
    return frozenset(also)


def _trace(
    model: nn.Module, images: Tensor, also: frozenset[str], overhead: Mapping[str, int]
) -> list[dict[str, float]]:
    """Multiply-adds by part for all images together: outside the blocks, and then of each block."""
    model.eval()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        analysis = FlopCountAnalysis(model, images)
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        analysis.set_op_handle(**_handlers(also))
        by_module = analysis.by_module()
        _refuse_uncounted(model, analysis)
    return _by_place(model, by_module, overhead)


def _refuse_uncounted(model: nn.Module, analysis: FlopCountAnalysis) -> None:
    missing = sorted(op for op in analysis.unsupported_ops() if op not in FREE_OPS)
    if missing:
        inside = [name for name in analysis.by_module() if name and missing[0] in analysis.unsupported_ops(name)]
        where = max(inside, key=lambda name: name.count("."), default="") or type(model).__name__
        raise UncountedOperation(f"{missing[0]} in {where} has no rule for counting multiply-adds")


def _by_place(model: nn.Module, by_module: dict[str, float], overhead: Mapping[str, int]) -> list[dict[str, float]]:
    """Sorts each module's own multiply-adds, its children's left out, by block and part."""
    own = dict(by_module)
    for name, macs in by_module.items():
        if name:
            own[name.rpartition(".")[0]] -= macs
    places: list[dict[str, float]] = [{} for _ in range(1 + len(getattr(model, "blocks", ())))]
    for name, macs in own.items():
        if macs:
            block, part = _place(name, overhead)
            place = places[block + 1]
            place[part] = place.get(part, 0.0) + float(macs)
    return places


def _place(name: str, overhead: Mapping[str, int]) -> tuple[int, str]:
    """The block (-1: none) and the part that a module belongs to, by timm's names."""
    inside = re.match(r"blocks\.(\d+)(?:\.|$)", name)
    if inside:
        return int(inside[1]), _part_of_block(name[inside.end() :])
    known = next((block for module, block in overhead.items() if f"{name}.".startswith(f"{module}.")), None)
    if known is not None:
        return known, "norms" if _is_norm(name) else "overhead"
    first = name.split(".")[0]
    outside = {"patch_embed": "embedding", "head": "head", "head_dist": "head"}
    return -1, "norms" if _is_norm(first) else outside.get(first, "overhead")


def _part_of_block(name: str) -> str:
    if _is_norm(name):
        return "norms"
    first, *rest = name.split(".")
    if first == "attn":
        return "attention" if not rest else "projections" if rest[0] in PROJECTIONS else "overhead"
    return "mlp" if first == "mlp" else "overhead"


def _is_norm(name: str) -> bool:
    return "norm" in name.rpartition(".")[2]


def _handlers(also: frozenset[str]) -> dict[str, Callable | None]:
    softmax = ALSO["softmax"] if "softmax" in also else 0
    attention = _attention_counter(softmax)
    rules: dict[str, Callable | None] = {
        "aten::scaled_dot_product_attention": attention,
        **{f"aten::_scaled_dot_product_{kind}": attention for kind in (
            "flash_attention", "flash_attention_for_cpu", "efficient_attention", "cudnn_attention", "attention_math",
        )},
        "aten::baddbmm": _batched_product_macs,
        "aten::mv": _vector_product_macs,
        "aten::dot": _vector_product_macs,
        "aten::layer_norm": norm_flop_counter(2) if "layernorm" in also else _nothing,
        "aten::softmax": elementwise_flop_counter(0, softmax),
        "aten::gelu": elementwise_flop_counter(0, ALSO["gelu"] if "gelu" in also else 0),
    }  # fmt: skip
    rules |= {f"aten::{op}": _nothing for op in FVCORE_COUNTS}
    return rules | {name: _own(macs) for name, macs in OWN_RULES.items()}


def _own(macs: Callable[..., float]) -> Callable:
    """The rule of an operator that `methods.core.operators.counted` knows: it gets shapes for tensors and values for the rest."""

    def count(inputs: list[Any], outputs: list[Any]) -> Counter:
        return Counter({"own": macs(*map(_plain, inputs))})

    return count


def _plain(value: Any) -> Any:
    """What a value of the trace is known to be: a tensor's shape, a constant, or a list of these."""
    if value.isCompleteTensor():
        return tuple(get_shape(value))
    if value.node().kind() in ("prim::ListConstruct", "prim::TupleConstruct"):
        return [_plain(part) for part in value.node().inputs()]
    return value.toIValue()


def _nothing(inputs: list[Any], outputs: list[Any]) -> Counter:
    return Counter()


def _attention_counter(softmax: int) -> Callable:
    """Q K^T and the product with V: [..., n, d], [..., m, d], [..., m, e] make n * m * (d + e) for every head and image;
    the softmax between them n * m * `softmax`. Masks and causality save nothing: the kernels compute all entries."""

    def count(inputs: list[Any], outputs: list[Any]) -> Counter:
        query, key, value = (get_shape(x) for x in inputs[:3])
        rows = 1
        for size in query[:-1]:
            rows *= size
        return Counter({"attention": rows * key[-2] * (query[-1] + value[-1] + softmax)})

    return count


def _batched_product_macs(inputs: list[Any], outputs: list[Any]) -> Counter:
    batch, rows, inner = get_shape(inputs[1])
    return Counter({"baddbmm": batch * rows * inner * get_shape(inputs[2])[-1]})


def _vector_product_macs(inputs: list[Any], outputs: list[Any]) -> Counter:
    size = 1
    for part in get_shape(inputs[0]):
        size *= part
    return Counter({"mv": size})
