"""STTABT's deployed network: tokens are chosen for all blocks first, and each block then runs on its own alone.

Images keep different numbers of tokens. Those of a batch lie one after the other, without padding; since each set holds the next, an image's tokens are
sorted by how deep they are needed, and a block's are the first ones. The host waits for the device once, for all counts.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from methods.core.operators import packed_attention
from methods.core.vit import embed, heads_width
from methods.sttabt.model import BackTrackedViT, MaskedAttention


class PackedAttention(MaskedAttention):
    """Modifies MaskedAttention: computes queries of fewer tokens than keys, for images of different lengths. Queries have a layer of their own (`q`), and
    keys and values another (`kv`), made of `qkv`."""

    def split(self) -> None:
        """Makes the two layers."""
        width, has_bias = heads_width(self), self.qkv.bias is not None
        for name, rows in (("q", slice(width)), ("kv", slice(width, None))):
            layer = nn.Linear(1, 1, bias=has_bias)
            layer.weight = nn.Parameter(self.qkv.weight[rows].detach().clone(), requires_grad=False)
            layer.bias = nn.Parameter(self.qkv.bias[rows].detach().clone(), requires_grad=False) if has_bias else None
            layer.out_features, layer.in_features = layer.weight.shape
            setattr(self, name, layer)
        del self.qkv

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        shape = (self.num_heads, self.head_dim)
        q = self.q(x).unflatten(-1, shape)
        k, v = self.kv(x).unflatten(-1, (2, *shape)).unbind(2)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        return self.q_norm(q), self.k_norm(k), v

    def forward(
        self, x: Tensor, written: Tensor | slice, starts: tuple[Tensor, Tensor], lengths: tuple[list[int], list[int]]
    ) -> Tensor:
        """x: tokens that are read, of all images [n, C]; written: the rows among them that are written, m of them; starts, lengths: of each image's
        queries, and of its keys, see `packed_attention`. Returns [m, C]."""
        shape = (self.num_heads, self.head_dim)
        q = self.q_norm(self.q(rows_of(x, written)).unflatten(-1, shape))
        k, v = self.kv(x).unflatten(-1, (2, *shape)).unbind(1)
        out = packed_attention(q, self.k_norm(k), v, starts[0], starts[1], lengths[0], lengths[1])
        return self.proj(self.norm(out.flatten(1)))


class PackedViT(BackTrackedViT):
    """Modifies BackTrackedViT: tokens that a block does not need are not there. The thresholds are a buffer that stays
    where it is, float32 on the CPU, whatever the network becomes."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedViT:
        thresholds = self._buffers.pop("p_logit", None)
        super()._apply(fn, recurse)
        if thresholds is not None:
            self.register_buffer("p_logit", thresholds)
        return self

    def forward_features(self, x: Tensor, *args, **kwargs) -> Tensor:
        """Images to the output's tokens after the final norm, [B, outputs, C]."""
        kept = self.choose(x)
        tokens = embed(self, x)
        depth = kept.sum(dim=0)  # in how many sets a token is
        order = depth.argsort(dim=1, descending=True, stable=True)
        counts = kept.sum(dim=2).cpu()  # the only wait
        plan = Plan(counts.numpy(), int(kept.shape[2]), tokens.device)
        x = tokens.flatten(0, 1).index_select(0, (order + plan.firsts).flatten().index_select(0, plan.entering))
        for index, block in enumerate(self.blocks):
            x = packed_block(block, x, plan, index)
        return self.norm(x).unflatten(0, (-1, self.outputs))


def packed_block(block: nn.Module, x: Tensor, plan: Plan, index: int) -> Tensor:
    """A timm Block on the tokens that block `index` reads [n, C], to those that it writes [m, C]."""
    written = plan.written[index]
    y = block.attn(
        block.norm1(x),
        written,
        (plan.starts[index + 1], plan.starts[index]),
        (plan.lengths[index + 1], plan.lengths[index]),
    )
    x = rows_of(x, written) + block.ls1(y)
    return x + block.ls2(block.mlp(block.norm2(x)))


def rows_of(x: Tensor, rows: Tensor | slice) -> Tensor:
    """Rows of x [n, C]; by a slice nothing is copied."""
    return x[rows] if isinstance(rows, slice) else x.index_select(0, rows)


class Plan:
    """Where the tokens of a batch lie, for all blocks: made on the host, and sent to the device as one tensor.

    firsts [B, 1]: the number of each image's first token among all N B. entering: the rows of block 0 among these, each image's sorted. written[i]: rows of
    block i's tokens that the next one reads; a slice where they are the first ones, as those of a single image are. starts[i] int32 [B + 1], lengths[i]: of
    the images' parts in block i; the last are the output's.
    """

    def __init__(self, counts: np.ndarray, tokens: int, device: torch.device) -> None:
        """counts int64 [L + 1, B], not growing; tokens: N, of an image."""
        places, firsts = np.arange(tokens), np.arange(counts.shape[1]) * tokens
        starts = np.concatenate([np.zeros((len(counts), 1), dtype=np.int64), counts.cumsum(axis=1)], axis=1)
        entering = (firsts[:, None] + places)[places < counts[0, :, None]]
        written = (starts[:-1, :-1, None] + places)[places < counts[1:, :, None]]
        parts = (firsts, entering, *starts, written)
        together = torch.from_numpy(np.concatenate(parts)).to(device, non_blocking=True)
        own, self.entering, *starts_there, rows = together.split([part.size for part in parts])
        self.firsts, self.starts = own.unsqueeze(1), [part.int() for part in starts_there]
        self.lengths: list[list[int]] = counts.tolist()
        are_first = (counts[1:, :-1] == counts[:-1, :-1]).all(axis=1)  # only the last image loses tokens
        sizes = counts[1:].sum(axis=1).tolist()
        self.written: list[Tensor | slice] = [
            slice(sizes[index]) if are_first[index] else part for index, part in enumerate(rows.split(sizes))
        ]
