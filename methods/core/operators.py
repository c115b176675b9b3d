"""Operators around kernels that a trace cannot see into, each with the rule by which its multiply-adds are counted.

A method that calls such a kernel (variable-length or block-sparse attention, sparse products) wraps it in a
`torch.library.custom_op` that carries what the count depends on as plain numbers, and registers a rule with `counted`;
without one, counting is an error that names the operator.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from methods.core import native

Macs = Callable[..., float]
RULES: dict[str, Macs] = {}  # by the operator's full name, "namespace::name"
FREE: set[str] = set()  # the full names of those that have no products


def counted(macs: Macs) -> Callable[[Any], Any]:
    """Decorator above `torch.library.custom_op`: macs gets all the operator's arguments in order, tensors as their shapes,
    and returns the multiply-adds of the whole call. For somebody else's operator: `counted(macs)("namespace::name")`."""

    def register(operator: Any) -> Any:
        RULES[_full_name(operator)] = macs
        return operator

    return register


def free(operator: Any) -> Any:
    """Decorator like `counted`, for an operator without matrix products and convolutions: it costs nothing."""
    FREE.add(_full_name(operator))
    return operator


def _full_name(operator: Any) -> str:
    return operator if isinstance(operator, str) else operator._qualname


def _packed_macs(
    q: tuple[int, ...],
    k: Any,
    v: tuple[int, ...],
    q_starts: Any,
    k_starts: Any,
    q_lengths: list[int],
    k_lengths: list[int],
) -> float:
    pairs = sum(n * m for n, m in zip(q_lengths, k_lengths, strict=True))
    return float(pairs * q[1] * (q[2] + v[2]))


@counted(_packed_macs)
@torch.library.custom_op("sparse_vit_bench::packed_attention", mutates_args=())
def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, q_starts: Tensor, k_starts: Tensor, q_lengths: list[int], k_lengths: list[int]
) -> Tensor:
    """Attention of several images whose tokens lie one after the other, each among its own: no padding.

    q [sum of q_lengths, H, d]; k, v [sum of k_lengths, H, d]; starts: int32 [B + 1] on the device, the lengths summed up from 0;
    lengths: the same as numbers, one per image, so that nothing waits for the device. Returns [sum of q_lengths, H, d].
    bfloat16 and float16 on a GPU run one variable-length kernel of torch's; float32 on the CPU one of our own, where there is a C++ compiler; all others
    go image by image.
    """
    if q.device.type == "cuda" and q.dtype in (torch.bfloat16, torch.float16):
        from torch.nn.attention.varlen import varlen_attn

        return varlen_attn(q, k, v, q_starts, k_starts, max(q_lengths), max(k_lengths))
    if q.device.type == "cpu" and q.dtype == torch.float32:
        with contextlib.suppress(native.NoKernel):
            return _packed_natively(q, k, v, q_starts, k_starts)
    images = zip(q.split(q_lengths), k.split(k_lengths), v.split(k_lengths), strict=True)
    heads_first = [[x.transpose(0, 1)[None] for x in image] for image in images]
    return torch.cat([F.scaled_dot_product_attention(*image)[0].transpose(0, 1) for image in heads_first])


def _packed_natively(q: Tensor, k: Tensor, v: Tensor, q_starts: Tensor, k_starts: Tensor) -> Tensor:
    for what, tensor, dtype in (
        ("k", k, q.dtype),
        ("v", v, q.dtype),
        ("q_starts", q_starts, torch.int32),
        ("k_starts", k_starts, torch.int32),
    ):
        if tensor.dtype != dtype or tensor.device.type != "cpu":
            raise ValueError(f"{what} must be {dtype} on the CPU, not {tensor.dtype} on {tensor.device}")
    q_starts, k_starts = q_starts.contiguous(), k_starts.contiguous()
    if len(q_starts) != len(k_starts) or int(q_starts[-1]) > len(q) or int(k_starts[-1]) > min(len(k), len(v)):
        raise ValueError(f"starts do not fit {len(q)} queries and {len(k)} keys")
    kernel, width = native.packed_attention(), q.shape[2]
    q, k, v = (x if x.stride()[1:] == (width, 1) else x.contiguous() for x in (q, k, v))
    if k.stride(0) != v.stride(0):
        k, v = k.contiguous(), v.contiguous()
    out = q.new_empty(q.shape)
    pointers = (tensor.data_ptr() for tensor in (q, k, v, out, q_starts, k_starts))
    sizes = len(q_starts) - 1, q.shape[1], width, q.stride(0), k.stride(0)
    answer = kernel(*pointers, *sizes, width**-0.5, torch.get_num_threads())
    if answer == 2:
        raise ValueError(
            f"starts {q_starts.tolist()} and {k_starts.tolist()} must begin at 0 and not fall, and queries need keys"
        )
    if answer:
        raise native.NoKernel(f"heads of {width} numbers are too wide for it")
    return out


@packed_attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, q_starts: Tensor, k_starts: Tensor, q_lengths: list[int], k_lengths: list[int]
) -> Tensor:
    return torch.empty_like(q)


def _listed_macs(qkv: tuple[int, ...], starts: Any, keys: tuple[int, ...], heads: int) -> float:
    return float(qkv[0] * keys[0] * 2 * (qkv[2] // 3 // heads))


@counted(_listed_macs)
@torch.library.custom_op("sparse_vit_bench::listed_attention", mutates_args=())
def listed_attention(qkv: Tensor, starts: Tensor, keys: Tensor, heads: int) -> Tensor:
    """Attention in which each query of each head attends to keys of its own, and computes no other: float32, on the CPU.

    qkv [B, N, 3 H d], as the projection makes it; starts int32 [H N + 1]: where the list of each head's queries begins in `keys`, int32, whose
    entries must be tokens, which is not looked at (see `methods.core.tiling.listed`); an empty list gives zeros. Returns [B, N, H d]. NoKernel without a C++ compiler.
    """
    images, tokens, channels = qkv.shape
    width = channels // 3 // heads
    for what, tensor, dtype in (
        ("qkv", qkv, torch.float32),
        ("starts", starts, torch.int32),
        ("keys", keys, torch.int32),
    ):
        if tensor.dtype != dtype or tensor.device.type != "cpu":
            raise native.NoKernel(f"{what} must be {dtype} on the CPU, not {tensor.dtype} on {tensor.device}")
    if channels != 3 * heads * width or starts.shape != (heads * tokens + 1,):
        raise ValueError(f"lists for {len(starts) - 1} queries of {heads} heads do not fit qkv {list(qkv.shape)}")
    qkv, starts, keys = qkv.contiguous(), starts.contiguous(), keys.contiguous()
    out = qkv.new_empty(images, tokens, channels // 3)
    pointers = (tensor.data_ptr() for tensor in (qkv, starts, keys, out))
    if native.listed_attention()(*pointers, images, tokens, heads, width, width**-0.5, torch.get_num_threads()):
        raise native.NoKernel(f"heads of {width} numbers are too wide for it")
    return out


@listed_attention.register_fake
def _(qkv: Tensor, starts: Tensor, keys: Tensor, heads: int) -> Tensor:
    return qkv.new_empty(qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3)


def _scored_macs(qkv: tuple[int, ...], heads: int, standardised: bool) -> float:
    return float(qkv[0] * qkv[1] ** 2 * 2 * (qkv[2] // 3))


@counted(_scored_macs)
@torch.library.custom_op("sparse_vit_bench::scored_attention", mutates_args=())
def scored_attention(qkv: Tensor, heads: int, standardised: bool) -> tuple[Tensor, Tensor]:
    """Attention that also says how much each query wants each key, and writes no map of a head to memory: float32, on the CPU.

    qkv [B, N, 3 H d], as the projection makes it. Returns [B, N, H d], and [B, N, N]: the mean over heads of the attention or, standardised, of the scores
    before the softmax, each row's mean taken off and divided by its deviation, through the normal distribution function (to 3e-7). NoKernel
    without a C++ compiler.
    """
    images, tokens, channels = qkv.shape
    width = channels // 3 // heads
    if qkv.dtype != torch.float32 or qkv.device.type != "cpu":
        raise native.NoKernel(f"qkv must be float32 on the CPU, not {qkv.dtype} on {qkv.device}")
    if channels != 3 * heads * width:
        raise ValueError(f"{channels} channels are not queries, keys and values of {heads} heads")
    qkv = qkv.contiguous()
    out, rating = qkv.new_empty(images, tokens, channels // 3), qkv.new_empty(images, tokens, tokens)
    pointers = (tensor.data_ptr() for tensor in (qkv, out, rating))
    kernel = native.scored_attention()
    if kernel(*pointers, images, tokens, heads, width, width**-0.5, standardised, torch.get_num_threads()):
        raise native.NoKernel(f"heads of {width} numbers are too wide for it")
    return out, rating


@scored_attention.register_fake
def _(qkv: Tensor, heads: int, standardised: bool) -> tuple[Tensor, Tensor]:
    images, tokens, channels = qkv.shape
    return qkv.new_empty(images, tokens, channels // 3), qkv.new_empty(images, tokens, tokens)


def _tiled_macs(
    q: tuple[int, ...], k: Any, v: tuple[int, ...], bias: Any, counts: Any, indices: Any, size: int, tiles: int
) -> float:
    return float(q[0] * tiles * size**2 * (q[3] + v[3]))


@counted(_tiled_macs)
@torch.library.custom_op("sparse_vit_bench::tiled_attention", mutates_args=())
def tiled_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, counts: Tensor, indices: Tensor, size: int, tiles: int
) -> Tensor:
    """Attention [B, H, N, d] that computes some tiles of `size` x `size` entries, and the others not.

    q, k, v: in the orders of a `methods.core.tiling.Tiling`, whose counts [H, R] and indices [H, R, C] say which tiles are computed, `tiles` of all
    heads together. bias [H, N, N], in the same orders and q's dtype: 0 for entries that are kept, minus infinity for the others. Runs torch's flex
    attention, compiled: without a compiler for the device it raises what torch.compile raises.
    """
    return _compiled_flex(q, k, v, bias, counts, indices, size)


@tiled_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, counts: Tensor, indices: Tensor, size: int, tiles: int) -> Tensor:
    return torch.empty_like(q)


def _flex(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, counts: Tensor, indices: Tensor, size: int) -> Tensor:
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    none = dict.fromkeys((
        "full_kv_num_blocks", "full_kv_indices", "q_num_blocks", "q_indices", "full_q_num_blocks", "full_q_indices",
    ))  # fmt: skip
    mask = BlockMask(
        seq_lengths=(q.shape[2], k.shape[2]), kv_num_blocks=counts[None], kv_indices=indices[None], BLOCK_SIZE=(size, size),
        mask_mod=lambda image, head, query, key: query >= 0, **none,
    )  # fmt: skip
    options = {"BLOCK_M": size, "BLOCK_N": size} if q.is_cuda else None  # larger ones than the tiles are refused
    return flex_attention(
        q,
        k,
        v,
        lambda score, image, head, query, key: score + bias[head, query, key],
        block_mask=mask,
        kernel_options=options,
    )


_compiled: dict[tuple[Any, ...], Callable[..., Tensor]] = {}


def _compiled_flex(q: Tensor, *others: Any) -> Tensor:
    """`_flex` compiled for these shapes, once in a process: each has code of its own, since torch stops compiling after a few shapes of one."""
    key = (q.device, q.dtype, *q.shape, *others[-1:])
    if key not in _compiled:
        own = types.FunctionType(_flex.__code__.replace(co_name=f"flex_{len(_compiled)}"), _flex.__globals__)
        _compiled[key] = torch.compile(own, dynamic=False, fullgraph=True)
    return _compiled[key](q, *others)
