"""The form that ships: the auto-encoder folded away, and attention that can leave out what the mask leaves out."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from timm.layers import Attention
from torch import Tensor, nn
from torch.nn import functional as F

from methods.core.operators import listed_attention, tiled_attention
from methods.core.tiling import Tiling, listed, tiled
from methods.vitcod.autoencoder import combined
from methods.vitcod.model import CodedAttention

TILE = 32  # entries to a side
WORTH_A_TRY = {"listed": 0.7, "tiles": 0.8}  # kernels that compute more than this share of the entries are never faster


class FixedMaskAttention(Attention):
    """Modifies timm's Attention: entries outside of the mask `kept` [H, N, N] do not count; where it keeps all, there
    is none.

    "fused" and "plain" attention compute all entries and add minus infinity to those that are not kept. "listed" (CPU, float32) computes kept entries
    alone; "tiles" (GPU) computes tiles in which something is kept, with the tokens in orders of their own for each head. Which is fastest is found
    by measuring (see `harness.modes`), by way of `kernels` and `use_kernel`.
    """

    kept: Tensor  # bool, a buffer: it is all that is saved of the mask, the others are made of it
    average: Tensor | None  # of the maps that the masks were made from, for pictures; not saved
    kernel: str  # the one in use
    skipping: str | None  # "listed" or "tiles"; None: all entries are computed

    def set_mask(self, kept: Tensor, average: Tensor | None = None) -> None:
        """Begins with fused attention."""
        self.register_buffer("kept", kept)
        self.average = average
        self.use_kernel("fused", self.qkv.weight.device)

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
        """What the kernel in use needs is made again of the mask that is loaded."""
        super()._load_from_state_dict(state, prefix, *args)
        self.average = None
        self.use_kernel(self.kernel if self.kernel in self.kernels(self.kept.device) else "fused", self.kept.device)

    @property
    def keeps_all(self) -> bool:
        """Whether there is no mask."""
        return bool(self.kept.all())

    def kernels(self, device: torch.device) -> tuple[str, ...]:
        """What can be tried on this device; the usual choice first."""
        usual = ("fused", "plain")
        if self.keeps_all:
            return usual
        if device.type == "cpu" and self.qkv.weight.dtype == torch.float32 and isinstance(self.q_norm, nn.Identity):
            return (*usual, "listed") if float(self.kept.double().mean()) < WORTH_A_TRY["listed"] else usual
        if device.type == "cuda":
            return (*usual, "tiles") if self.tiling().share < WORTH_A_TRY["tiles"] else usual
        return usual

    def use_kernel(self, kernel: str, device: torch.device) -> None:
        """Goes on with one of `kernels`."""
        self.kernel, self.skipping, self.fused_attn = (
            kernel,
            kernel if kernel in WORTH_A_TRY else None,
            kernel == "fused",
        )
        dtype, kept = self.qkv.weight.dtype, self.kept.cpu()
        for name in self._buffers.keys() - {"kept"}:
            del self._buffers[name]  # of the kernel before
        buffers: dict[str, Tensor | None] = {}
        if self.skipping is None:
            self.register_buffer("bias", None)
            if not bool(kept.all()):
                buffers["bias"] = torch.zeros(kept.shape, dtype=dtype).masked_fill(~kept, -torch.inf)
        elif kernel == "listed":
            buffers["starts"], buffers["listed"] = listed(kept)
        elif kernel == "tiles":
            found, head = self.tiling(), torch.arange(self.num_heads)[:, None]
            buffers["tile_bias"] = torch.zeros(found.kept.shape, dtype=dtype).masked_fill(~found.kept, -torch.inf)
            # Where queries, keys and values come from in [N, 3, H], and the outputs' tokens in [H, N].
            orders = (found.queries, found.keys, found.keys)
            buffers["rows"] = torch.stack(
                [(order * 3 + slab) * self.num_heads + head for slab, order in enumerate(orders)]
            )
            buffers["back"] = (found.queries.argsort(dim=-1) + head * found.kept.shape[-1]).T
            buffers |= {"counts": found.counts, "indices": found.indices}
            self.tiles = found.tiles
        for name, value in buffers.items():
            self.register_buffer(name, value.contiguous().to(device), persistent=False)

    def tiling(self) -> Tiling:
        """The mask in tiles."""
        kept = self.kept.cpu().numpy()
        return _tiling(np.packbits(kept).tobytes(), kept.shape)

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        qkv = self.qkv(x)
        if self.skipping == "listed":
            x = listed_attention(qkv, self.starts, self.listed, self.num_heads)
        else:
            x = self._tiled(qkv) if self.skipping == "tiles" else self._dense(qkv)
        return self.proj(self.norm(x))

    def _tiled(self, qkv: Tensor) -> Tensor:
        images, tokens, _ = qkv.shape
        rows = qkv.view(images, -1, self.head_dim).index_select(1, self.rows.flatten())
        q, k, v = rows.view(images, 3, self.num_heads, tokens, -1).unbind(1)
        q, k = self.q_norm(q), self.k_norm(k)
        x = tiled_attention(q, k, v, self.tile_bias, self.counts, self.indices, TILE, self.tiles)
        return x.reshape(images, -1, self.head_dim).index_select(1, self.back.flatten()).view(images, tokens, -1)

    def _dense(self, qkv: Tensor) -> Tensor:
        q, k, v = qkv.view(*qkv.shape[:2], 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.fused_attn:
            x = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias)
        else:
            scores = (q * self.scale) @ k.transpose(-2, -1)
            x = (scores if self.bias is None else scores + self.bias).softmax(dim=-1) @ v
        return x.transpose(1, 2).flatten(2)


@lru_cache(maxsize=512)  # copies of a model, one for each way to run it, have the same masks
def _tiling(packed: bytes, shape: tuple[int, ...]) -> Tiling:
    kept = np.unpackbits(np.frombuffer(packed, np.uint8), count=math.prod(shape)).reshape(shape)
    return tiled(torch.from_numpy(kept.astype(bool)), TILE)


@torch.no_grad()
def deploy_attention(attention: CodedAttention) -> None:
    """Turns the trained form into the one that ships, in place."""
    fold(attention)
    kept, average = attention.kept.clone(), attention.average.cpu() if bool(attention.average.any()) else None
    attention._buffers.clear()
    attention.__class__ = FixedMaskAttention
    attention.set_mask(kept, average)


@torch.no_grad()
def fold(attention: CodedAttention) -> None:
    """Puts the auto-encoder into the weight and bias of qkv: it is affine over heads, and so are they."""
    heads, width = attention.num_heads, attention.head_dim
    weight, bias = attention.qkv.weight.clone(), attention.qkv.bias
    bias = weight.new_zeros(len(weight)) if bias is None else bias.clone()
    for slab, which in enumerate("qk"):
        if which not in attention.coded:
            continue
        matrix, offset = combined(getattr(attention, f"encoder_{which}"), getattr(attention, f"decoder_{which}"))
        rows = slice(slab * heads * width, (slab + 1) * heads * width)
        weight[rows] = torch.einsum("gh,hdc->gdc", matrix, weight[rows].view(heads, width, -1)).flatten(0, 1)
        bias[rows] = (matrix @ bias[rows].view(heads, width) + offset[:, None]).flatten()
        delattr(attention, f"encoder_{which}")
        delattr(attention, f"decoder_{which}")
    attention.qkv.weight, attention.qkv.bias = nn.Parameter(weight), nn.Parameter(bias)
    attention.coded = ""
