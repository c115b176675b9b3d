"""The second counter: fvcore on torch's jit trace. It shares nothing with the first but the rules of our own operators.

torch has deprecated such traces, and from Python 3.14 on there are none; under one, sizes are tensors, which not every
model stands. So what cannot be traced is counted by the dispatcher alone (`harness.executed`).
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from harness.operations import ALSO
from harness.words import first_line
from methods.core.operators import FREE as OWN_FREE
from methods.core.operators import RULES as OWN_RULES

if TYPE_CHECKING:
    from fvcore.nn import FlopCountAnalysis

# Operations of a trace, which shows them as they were written, that move, compare or scale elements: they have no
# products. With any other that has no handler, fvcore does not count. The list is not made from the dispatcher's, so that
# one may find what is wrong in the other.
FREE_OPS = frozenset("aten::" + op for op in """
    __and__ __or__ __rshift__ __xor__ abs add add_ adjoint all amax amin any argmax argmin argsort atan2 bernoulli
    bincount bitwise_and bitwise_or bitwise_xor broadcast_tensors bucketize ceil clamp_max clamp_min concat cos
    cross_entropy_loss cumprod cumsum diagonal div div_ dropout_ elu embedding eq erf erfinv exp exp_ expand_as
    expm1 eye fill_ flip floor_ floor_divide fmax fmin fmod frac ge gelu gelu_ gt hardsigmoid hardswish hardtanh
    index_fill index_select is_floating_point isfinite isnan le leaky_relu lerp lift_fresh linalg_vector_norm log
    log1p log_softmax logical_and logical_not logical_or logit logsumexp lt mH mT masked_fill masked_fill_
    masked_scatter masked_select maximum mean meshgrid min minimum mish movedim mul mul_ nan_to_num nansum ne neg
    new_ones nonzero_numpy norm numpy_T one_hot ones_like pad pow prod rand rand_like randn reciprocal relu6 repeat
    repeat_interleave rms_norm roll round round_ rsqrt rsub scatter scatter_ scatter_add scatter_add_ scatter_reduce
    searchsorted sigmoid sigmoid_ sign silu silu_ sin softmax softplus sort special_ndtr split_with_sizes sqrt sqrt_
    square square_ stack std std_mean sub sub_ sum swapaxes swapdims take_along_dim tanh tensor_split tile topk tril
    triu trunc type_as unflatten unfold unsqueeze_ var var_mean view_as where zero_ zeros_like
""".split())  # fmt: skip

# What fvcore counts by default and this project does not.
FVCORE_COUNTS = """
    batch_norm group_norm instance_norm adaptive_avg_pool2d upsample_bilinear2d upsample_nearest2d grid_sampler
""".split()


class NotTraced(RuntimeError):
    """fvcore cannot count this model here; the message is the reason, for people."""


def traced(model: nn.Module, images: Tensor, also: frozenset[str] = frozenset()) -> dict[str, float]:
    """Multiply-adds of `model` on images [B, 3, H, W] at once by the names of its modules, each without its children's.
    `also`: names of `harness.operations.ALSO`. NotTraced where there is no trace, or something in it that has no rule."""
    analysis = analyse(model, images, handlers(also))
    missing = sorted(op for op in analysis.unsupported_ops() if op not in FREE_OPS and op not in OWN_FREE)
    if missing:
        raise NotTraced(f"fvcore has no rule for {missing[0]}")
    by_module = analysis.by_module()
    own = {name: float(macs) for name, macs in by_module.items()}
    for name, macs in by_module.items():
        if name:
            own[name.rpartition(".")[0]] -= macs
    return own


def analyse(
    model: nn.Module, images: Tensor, rules: Mapping[str, Callable | None] = MappingProxyType({})
) -> FlopCountAnalysis:
    """fvcore's analysis of a model, with its own rules where `rules` has no others. NotTraced where there is none."""
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            from fvcore.nn import FlopCountAnalysis  # it scripts functions at import, which torch calls deprecated

            analysis = FlopCountAnalysis(model.eval(), images)
            analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
            analysis.set_op_handle(**rules)
            analysis.total()
    except Exception as error:  # whatever a model's code, or a rule, raises where sizes are tensors
        raise NotTraced(f"{type(error).__name__}: {first_line(error)}") from error
    return analysis


def handlers(also: frozenset[str] = frozenset()) -> dict[str, Callable | None]:
    """This project's rules for fvcore, by the names of a trace's operations."""
    extra = {name: per_element if name in also else 0 for name, per_element in ALSO.items()}
    attention = _attention_counter(extra["softmax"])
    rules: dict[str, Callable | None] = {
        "aten::scaled_dot_product_attention": attention,
        **{f"aten::_scaled_dot_product_{kind}": attention for kind in (
            "flash_attention", "flash_attention_for_cpu", "efficient_attention", "cudnn_attention", "attention_math",
        )},
        "aten::linear": _linear_macs,
        "aten::baddbmm": _batched_product_macs,
        "aten::matmul": _product_macs,
        "aten::einsum": _einsum_macs,
        "aten::mv": _vector_product_macs,
        "aten::dot": _vector_product_macs,
        **{f"aten::{op}": _elements_counter(op, extra[name]) for op, name in (
            ("layer_norm", "layernorm"), ("softmax", "softmax"), ("gelu", "gelu"),
        )},
    }  # fmt: skip
    rules |= {f"aten::{op}": _nothing for op in FVCORE_COUNTS}
    return rules | {name: _own(name, macs) for name, macs in OWN_RULES.items()}


def _own(name: str, macs: Callable[..., float]) -> Callable:
    """The rule of an operator that `methods.core.operators.counted` knows: it gets shapes for tensors and values for the rest."""

    def count(inputs: list[Any], outputs: list[Any]) -> Counter:
        return Counter({name: macs(*map(_plain, inputs))})

    return count


def _shape(value: Any) -> list[int]:
    return value.type().sizes()


def _plain(value: Any) -> Any:
    """What a value of the trace is known to be: a tensor's shape, a constant, or a list of these."""
    if value.isCompleteTensor():
        return tuple(_shape(value))
    if value.node().kind() in ("prim::ListConstruct", "prim::TupleConstruct"):
        return [_plain(part) for part in value.node().inputs()]
    return value.toIValue()


def _elements_counter(op: str, per_element: int) -> Callable:
    """LayerNorm without an affine part has one operation per element less."""

    def count(inputs: list[Any], outputs: list[Any]) -> Counter:
        less = op == "layer_norm" and not inputs[2].isCompleteTensor()
        return Counter({op: math.prod(_shape(outputs[0])) * max(per_element - less, 0)})

    return count


def _nothing(inputs: list[Any], outputs: list[Any]) -> Counter:
    return Counter()


def _attention_counter(softmax: int) -> Callable:
    """Q K^T and the product with V: [..., n, d], [..., m, d], [..., m, e] make n * m * (d + e) for every head and image;
    the softmax between them n * m * `softmax`. Masks and causality save nothing: the kernels compute all entries."""

    def count(inputs: list[Any], outputs: list[Any]) -> Counter:
        query, key, value = (_shape(x) for x in inputs[:3])
        per_entry = query[-1] + value[-1] + softmax
        return Counter({"scaled_dot_product_attention": math.prod(query[:-1]) * key[-2] * per_entry})

    return count


def _product_macs(inputs: list[Any], outputs: list[Any]) -> Counter:
    """fvcore's rule forgets what a smaller left side is repeated for."""
    return Counter({"matmul": math.prod(_shape(outputs[0])) * _shape(inputs[0])[-1]})


def _linear_macs(inputs: list[Any], outputs: list[Any]) -> Counter:
    """A weight [out, in], or [in] for one output."""
    weight = _shape(inputs[1])
    return Counter({"linear": math.prod(_shape(inputs[0])) * (weight[0] if len(weight) == 2 else 1)})


def _einsum_macs(inputs: list[Any], outputs: list[Any]) -> Counter:
    """Of one tensor, or two: all sizes multiplied, where something is summed over that both have; a size that only one
    of them has, and not the result, is summed over before. fvcore's rule counts half of what has no sum."""
    left, arrow, result = inputs[0].toIValue().replace(" ", "").partition("->")
    terms = left.split(",")
    if "." in left or not arrow or len(terms) > 2:
        raise ValueError(f"fvcore has no rule for einsum {left}")
    shapes = [_shape(value) for value in inputs[1].node().inputs()]
    sizes: dict[str, int] = {}
    own: list[set[str]] = []
    for term, shape in zip(terms, shapes, strict=True):
        longer = {name: size for name, size in zip(term, shape, strict=True) if size > 1}  # a 1 is only repeated
        own.append(set(longer))
        sizes |= longer
    shared = own[0] & own[-1]
    if len(terms) == 1 or not shared - set(result):
        return Counter()
    return Counter({"einsum": math.prod(size for name, size in sizes.items() if name in shared or name in result)})


def _batched_product_macs(inputs: list[Any], outputs: list[Any]) -> Counter:
    batch, rows, inner = _shape(inputs[1])
    return Counter({"baddbmm": batch * rows * inner * _shape(inputs[2])[-1]})


def _vector_product_macs(inputs: list[Any], outputs: list[Any]) -> Counter:
    return Counter({"mv": math.prod(_shape(inputs[0]))})
