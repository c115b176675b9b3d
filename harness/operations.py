"""What an operation of torch's dispatcher costs: a formula for each that has products, a list of those that have none.

The formulas are those of torch.utils.flop_counter, which counts a multiply-add as two. What that lacks, or has only in
some versions, is here: fused attention on the CPU and on other devices, products with vectors, variable-length attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import flop_registry

from harness.errors import UserError
from methods.core.operators import FREE as OWN_FREE
from methods.core.operators import RULES as OWN_RULES
from methods.core.registry import unknown

Shape = tuple[int, ...]

# What may be counted besides products, in operations per element. LayerNorm: fvcore's rule (4 without an affine part).
# Softmax and GELU: as ELECTRA's counter has them (Clark et al., 2020), since fvcore gives them 0.
ALSO = {"layernorm": 5, "softmax": 5, "gelu": 8}

# Operations without products, by name and without the underscore of those in place. Views and what torch itself
# tags as pointwise are not listed. Any other operation without a formula is an error, so that no product is missed.
FREE = frozenset("aten::" + name for name in """
    arange empty empty_like empty_permuted empty_strided eye full full_like linspace logspace new_empty
    new_empty_strided new_full new_ones new_zeros ones ones_like range scalar_tensor tril_indices triu_indices zero
    zeros zeros_like

    bernoulli cauchy exponential geometric log_normal multinomial native_dropout normal poisson rand rand_like
    randint randint_like randn randn_like random randperm uniform

    _assert_async _chunk_cat _efficientzerotensor _fused_sdp_choice _local_scalar_dense _reshape_alias_copy
    _reshape_copy _to_copy _unsafe_index _unsafe_index_put _unsafe_masked_index _unsafe_masked_index_put_accumulate
    _unsafe_view alias_copy as_strided_copy as_strided_scatter block_diag cat channel_shuffle col2im complex
    constant_pad_nd copy copysign diag_embed diagonal_copy diagonal_scatter embedding expand_copy fill flip gather
    im2col index index_add index_copy index_fill index_put index_reduce index_select lift lift_fresh_copy
    masked_fill masked_scatter masked_select narrow_copy permute_copy pixel_shuffle pixel_unshuffle polar put
    reflection_pad1d reflection_pad2d reflection_pad3d repeat repeat_interleave replication_pad1d replication_pad2d
    replication_pad3d resize resize_as roll rot90 scatter scatter_add scatter_reduce select_copy select_scatter set
    slice_copy slice_scatter split_copy split_with_sizes_copy squeeze_copy stack t_copy take transpose_copy tril
    triu unbind_copy unfold_copy unsafe_split unsafe_split_with_sizes unsqueeze_copy view_copy

    _aminmax _unique _unique2 all allclose amax amin aminmax any argmax argmin bincount bucketize count_nonzero
    cummax cummin cumprod cumsum dist equal hash_tensor histc histogram isin kthvalue linalg_vector_norm
    logcumsumexp logsumexp max mean median min mode nanmedian nansum nonzero nonzero_static norm prod searchsorted
    segment_reduce sort std std_mean sum topk trace unique_consecutive unique_dim var var_mean

    _batch_norm_no_update _batch_norm_with_update _fused_rms_norm _log_softmax _masked_softmax
    _native_batch_norm_legit _native_batch_norm_legit_no_training _safe_softmax _softmax _weight_norm_interface
    cudnn_batch_norm native_batch_norm native_group_norm native_layer_norm renorm

    _adaptive_avg_pool2d _adaptive_avg_pool3d _upsample_bicubic2d_aa _upsample_bilinear2d_aa
    _upsample_nearest_exact1d _upsample_nearest_exact2d adaptive_max_pool2d adaptive_max_pool3d
    affine_grid_generator avg_pool2d avg_pool3d fractional_max_pool2d fractional_max_pool3d grid_sampler_2d
    grid_sampler_3d max_pool2d_with_indices max_pool3d_with_indices max_unpool2d max_unpool3d upsample_bicubic2d
    upsample_bilinear2d upsample_linear1d upsample_nearest1d upsample_nearest2d upsample_nearest3d
    upsample_trilinear3d

    _prelu_kernel addr binary_cross_entropy binary_cross_entropy_with_logits floor_divide glu hardswish huber_loss
    linalg_cross log_sigmoid_forward mse_loss multi_margin_loss multilabel_margin_loss_forward nll_loss2d_forward
    nll_loss_forward rrelu_with_noise rsub smooth_l1_loss soft_margin_loss special_ndtr

    _adaptive_avg_pool2d_backward _adaptive_avg_pool3d_backward _fused_rms_norm_backward _log_softmax_backward_data
    _masked_softmax_backward _prelu_kernel_backward _softmax_backward_data
    _upsample_bicubic2d_aa_backward _upsample_bilinear2d_aa_backward _upsample_nearest_exact1d_backward
    _upsample_nearest_exact2d_backward _weight_norm_interface_backward adaptive_max_pool2d_backward
    adaptive_max_pool3d_backward avg_pool2d_backward avg_pool3d_backward batch_norm_backward
    binary_cross_entropy_backward cudnn_batch_norm_backward diagonal_backward elu_backward embedding_dense_backward
    glu_backward grid_sampler_2d_backward grid_sampler_3d_backward hardshrink_backward hardsigmoid_backward
    hardswish_backward hardtanh_backward huber_loss_backward index_select_backward leaky_relu_backward
    log_sigmoid_backward masked_scatter_backward max_pool2d_with_indices_backward max_pool3d_with_indices_backward
    mse_loss_backward multi_margin_loss_backward multilabel_margin_loss_backward native_batch_norm_backward
    native_group_norm_backward native_layer_norm_backward nll_loss2d_backward nll_loss_backward
    reflection_pad1d_backward reflection_pad2d_backward reflection_pad3d_backward replication_pad1d_backward
    replication_pad2d_backward replication_pad3d_backward rrelu_with_noise_backward select_backward slice_backward
    smooth_l1_loss_backward soft_margin_loss_backward softplus_backward softshrink_backward unfold_backward
    upsample_bicubic2d_backward upsample_bilinear2d_backward upsample_linear1d_backward upsample_nearest1d_backward
    upsample_nearest2d_backward upsample_nearest3d_backward upsample_trilinear3d_backward
    value_selecting_reduction_backward
""".split())  # fmt: skip


class UncountedOperation(RuntimeError):
    """An operation was executed whose multiply-adds nobody has said how to count."""


def check_names(also: Iterable[str]) -> frozenset[str]:
    """UserError for what cannot be counted besides products."""
    wrong = next((name for name in also if name not in ALSO), None)
    if wrong is not None:
        raise UserError(f"--also: {unknown('operation', wrong, ALSO)}")
    return frozenset(also)


def name_of(operator: Any) -> str:
    """An operator's name without its overload: "aten::mm"; torch's own in place have the name of the others, "aten::add"."""
    schema = getattr(operator, "_schema", None)
    name = getattr(operator, "_qualified_op_name", str(operator)) if schema is None else schema.name
    return name.removesuffix("_") if name.startswith("aten::") else name


def is_free(operator: torch._ops.OpOverload) -> bool:
    """Whether an operator is known to have no products: listed, by a method's author, too, a view, or pointwise."""
    name = name_of(operator)
    return name in FREE or name in OWN_FREE or _moves_or_scales(operator)


@cache
def _moves_or_scales(operator: torch._ops.OpOverload) -> bool:
    """By torch's own description. Of those in place few are described, so their twins are asked, too."""
    namespace, _, name = name_of(operator).partition("::")
    twin = getattr(getattr(getattr(torch.ops, namespace), name, None), operator._overloadname, operator)
    return any(each.is_view or torch.Tag.pointwise in each.tags for each in (operator, twin))


def macs_of(operator: Any, args: tuple, kwargs: dict[str, Any], result: Any, also: frozenset[str]) -> float:
    """Multiply-adds of a call of an operator that `has_formula` or `is_free`, with what `also` adds. UncountedOperation
    where a formula does not hold."""
    name = name_of(operator)
    if name in OWN_RULES or name in FORMULAS:
        shapes = _bound(operator, args, kwargs)
        softmax = ALSO["softmax"] * prod(shapes[0][:-1]) * shapes[1][-2] if "softmax" in also and name in _FUSED else 0
        return float((OWN_RULES.get(name) or FORMULAS[name])(*shapes) + softmax)
    if name in _torchs():
        _require_strided(name, args)
        return _torchs()[name](*args, **kwargs, out_val=result) / 2
    extra = next((what for what in also if name in _ELEMENTS[what]), None)
    return 0.0 if extra is None else _elements_macs(extra, args)


def has_formula(operator: Any) -> bool:
    """Whether somebody has said how many multiply-adds an operator has."""
    name = name_of(operator)
    return any(name in known for known in (OWN_RULES, FORMULAS, _torchs()))


@cache
def _torchs() -> dict[str, Callable[..., int]]:
    """torch's formulas by the operators' names. Not those of operators that run other functions: flex attention's counts
    tiles that it leaves out."""
    packets = (target for target in flop_registry if isinstance(target, torch._ops.OpOverloadPacket))
    return {name_of(target): flop_registry[target] for target in packets}


def _require_strided(name: str, args: tuple) -> None:
    odd = next((x for x in args if isinstance(x, Tensor) and (x.layout is not torch.strided or x.is_nested)), None)
    if odd is not None:
        kind = "nested" if odd.is_nested else str(odd.layout).removeprefix("torch.")
        raise UncountedOperation(f"{name} of a {kind} tensor")


def _bound(operator: torch._ops.OpOverload, args: tuple, kwargs: dict[str, Any]) -> list[Any]:
    """All arguments in the schema's order, defaults filled in, tensors as their shapes; where images of different lengths
    begin, as these lengths."""
    _require_strided(name_of(operator), args)
    values = []
    for index, argument in enumerate(operator._schema.arguments):
        value = args[index] if index < len(args) else kwargs.get(argument.name, argument.default_value)
        if argument.name in ("cu_seq_q", "cu_seq_k") and isinstance(value, Tensor):
            value = _lengths(name_of(operator), value)
        values.append(tree_map(lambda x: tuple(x.shape) if isinstance(x, Tensor) else x, value))
    return values


def _lengths(name: str, starts: Tensor) -> list[int]:
    if starts.is_meta or isinstance(starts, torch._subclasses.FakeTensor):
        raise UncountedOperation(f"{name} of tensors without values, so that lengths are not known,")
    return starts.diff().tolist()


def _elements_macs(what: str, args: tuple) -> float:
    per_element = ALSO[what]
    if what == "layernorm" and args[2] is None:
        per_element -= 1
    return float(per_element * args[0].numel())


# The operators of what may be counted besides products; fused attention has its softmax inside.
_ELEMENTS = {
    "layernorm": {"aten::native_layer_norm"},
    "softmax": {"aten::_softmax", "aten::_safe_softmax"},
    "gelu": {"aten::gelu"},
}


def attention_macs(q: Shape, k: Shape, v: Shape, *others: Any) -> int:
    """Q K^T and the product with V: [..., n, d], [..., m, d], [..., m, e] make n * m * (d + e) for every query's head
    and image. Masks and causality save nothing: the kernels compute all entries."""
    return prod(q[:-1]) * k[-2] * (q[-1] + v[-1])


def _attention_back_macs(grad: Shape, q: Shape, k: Shape, v: Shape, *others: Any) -> int:
    """Five products: the scores again (d), the gradients of queries and keys (d each), of values and map (e each)."""
    return prod(q[:-1]) * k[-2] * (3 * q[-1] + 2 * v[-1])


def _varlen_macs(q: Shape, k: Shape, v: Shape, q_lengths: list[int], k_lengths: list[int] | None, *others: Any) -> int:
    """Of images one after the other, q [sum of n, H, d]: the sum of n * m * (d + e) for every head."""
    if any(isinstance(x, tuple) for x in others):
        raise UncountedOperation("torch_attn::_varlen_attn of keys in pages or used in part")
    pairs = sum(n * m for n, m in zip(q_lengths, k_lengths or q_lengths, strict=True))
    return pairs * q[1] * (q[2] + v[2])


def _varlen_back_macs(grad: Shape, q: Shape, k: Shape, v: Shape, out: Any, lse: Any, *lengths: Any) -> int:
    pairs = sum(n * m for n, m in zip(*lengths[:2], strict=True))
    return pairs * q[1] * (3 * q[2] + 2 * v[2])


def _convolution_back_macs(grad: Shape, x: Shape, weight: Shape, *others: Any) -> int:
    """The gradients of input and weight cost a forward each; torch's formula counts the weight's once per group."""
    transposed, wanted = others[4], others[7]
    return grad[0] * prod(weight) * prod((x if transposed else grad)[2:]) * sum(wanted[:2])


_FUSED = {f"aten::_scaled_dot_product_{kind}" for kind in (
    "flash_attention", "flash_attention_for_cpu", "efficient_attention", "cudnn_attention",
    "fused_attention_overrideable",
)}  # fmt: skip

# By the operator's name, from its arguments, in which tensors are shapes. They come before torch's.
FORMULAS: dict[str, Callable[..., int]] = {
    **dict.fromkeys(_FUSED, attention_macs),
    **{f"{name}_backward": _attention_back_macs for name in _FUSED},
    "torch_attn::_varlen_attn": _varlen_macs,
    "torch_attn::_varlen_attn_out": lambda out, *others: _varlen_macs(*others),
    "torch_attn::_varlen_attn_backward": _varlen_back_macs,
    "aten::convolution_backward": _convolution_back_macs,
    "aten::mv": lambda a, x: prod(a),
    "aten::addmv": lambda y, a, x, *others: prod(a),
    "aten::dot": lambda a, b: prod(a),
    "aten::vdot": lambda a, b: prod(a),
    "aten::addbmm": lambda y, a, b, *others: prod(a) * b[-1],
    "aten::_addmm_activation": lambda y, a, b, *others: prod(a) * b[-1],
    "aten::_int_mm": lambda a, b: prod(a) * b[-1],
}
