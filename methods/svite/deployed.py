"""S2ViTE's deployed network: heads and neurons that died are gone, and layers are smaller.

Which ones died, a state dict says as well (`heads_kept`, `neurons_kept`). How many it were may differ between networks
of the same settings (in imported checkpoints, which are taken as they are), so layers take the sizes of what they load.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import Attention, Mlp
from torch import Tensor, nn
from torch.nn import functional as F


class CutLinear(nn.Linear):
    """Modifies nn.Linear: takes as many outputs (or inputs) as the weights have that it loads, on the side that was
    cut."""

    cut: int  # the weight's dimension: 0 outputs, 1 inputs

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
        weight = state.get(f"{prefix}weight")
        if weight is not None and weight.ndim == 2:
            self._resize(weight.shape[self.cut])
        super()._load_from_state_dict(state, prefix, *args)

    def _resize(self, size: int) -> None:
        if size == self.weight.shape[self.cut]:
            return
        shape = [size if place == self.cut else length for place, length in enumerate(self.weight.shape)]
        self.weight = nn.Parameter(self.weight.new_empty(shape), requires_grad=self.weight.requires_grad)
        if self.cut == 0 and self.bias is not None:
            self.bias = nn.Parameter(self.bias.new_empty(size), requires_grad=self.bias.requires_grad)
        self.out_features, self.in_features = shape


class NarrowAttention(Attention):
    """Modifies timm's Attention: the heads together may be narrower than the tokens, which not every release of timm
    allows for. heads_kept: bool [H], of the heads that there were."""

    heads_kept: Tensor

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state, prefix, *args)
        self.num_heads = int(self.heads_kept.sum())

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.fused_attn:
            x = F.scaled_dot_product_attention(q, k, v)
        else:
            x = ((q * self.scale) @ k.transpose(-2, -1)).softmax(dim=-1) @ v
        return self.proj(x.transpose(1, 2).flatten(2))


@torch.no_grad()
def remove_heads(attention: Attention, heads: Tensor) -> None:
    """Takes the rows of all but the active `heads` [H] out of qkv, and their columns out of proj. What the dead still
    put out, the bias of their values, is constant, since attention sums to one: it goes through the projection into its
    bias."""
    columns = heads.repeat_interleave(attention.head_dim)
    qkv, proj = attention.qkv, attention.proj
    if qkv.bias is not None and not bool(columns.all()):
        constant = proj.weight[:, ~columns] @ qkv.bias[2 * len(columns) :][~columns]
        proj.bias = nn.Parameter(constant if proj.bias is None else proj.bias + constant, requires_grad=False)
    attention.qkv, attention.proj = _part(qkv, columns.repeat(3), cut=0), _part(proj, columns, cut=1)
    attention.num_heads = int(heads.sum())
    attention.__class__ = NarrowAttention
    attention.register_buffer("heads_kept", heads)


@torch.no_grad()
def remove_neurons(mlp: Mlp, neurons: Tensor) -> None:
    """Takes all but the active `neurons` [hidden] out of both layers."""
    mlp.fc1, mlp.fc2 = _part(mlp.fc1, neurons, cut=0), _part(mlp.fc2, neurons, cut=1)
    mlp.register_buffer("neurons_kept", neurons)


def _part(layer: nn.Linear, kept: Tensor, cut: int) -> CutLinear:
    """The layer with some of its outputs (cut 0, rows of the weight) or inputs (cut 1, columns)."""
    weight, bias = layer.weight[kept] if cut == 0 else layer.weight[:, kept], layer.bias
    part = CutLinear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    part.weight, part.cut = nn.Parameter(weight.contiguous().clone(), requires_grad=False), cut
    if bias is not None:
        part.bias = nn.Parameter((bias[kept] if cut == 0 else bias).clone(), requires_grad=False)
    return part
