"""Operators around kernels that a trace cannot see into, each with the rule by which its multiply-adds are counted.

A method that calls such a kernel (variable-length or block-sparse attention, sparse products) wraps it in a
`torch.library.custom_op` that carries what the count depends on as plain numbers, and registers a rule with `counted`;
without one, counting is an error that names the operator.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Macs = Callable[..., float]
RULES: dict[str, Macs] = {}  # by the operator's full name, "namespace::name"


def counted(macs: Macs) -> Callable[[Any], Any]:
    """Decorator above `torch.library.custom_op`: macs gets the operator's arguments, tensors as their shapes, and returns
    the multiply-adds of the whole call."""

    def register(operator: Any) -> Any:
        RULES[operator._qualname] = macs
        return operator

    return register


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
    bfloat16 and float16 on a GPU run one variable-length kernel; elsewhere, where torch has none, image by image.
    """
    if q.device.type == "cuda" and q.dtype in (torch.bfloat16, torch.float16):
        from torch.nn.attention.varlen import varlen_attn

        return varlen_attn(q, k, v, q_starts, k_starts, max(q_lengths), max(k_lengths))
    images = zip(q.split(q_lengths), k.split(k_lengths), v.split(k_lengths), strict=True)
    parts = [F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in image)).transpose(0, 1) for image in images]
    return torch.cat(parts)


@packed_attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, q_starts: Tensor, k_starts: Tensor, q_lengths: list[int], k_lengths: list[int]
) -> Tensor:
    return torch.empty_like(q)
