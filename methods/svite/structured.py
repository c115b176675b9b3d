"""Attention heads and MLP neurons as units: S2ViTE."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import Attention, Mlp
from torch import Tensor, nn

from methods.core.contract import Unsupported
from methods.core.masking import bake, mask_layer
from methods.core.precision import wide
from methods.svite.criteria import Growth, grow, survivors
from methods.svite.deployed import NarrowAttention, remove_heads, remove_neurons
from methods.svite.pattern import Moved, Units


class _Scores(torch.autograd.Function):
    """The identity; on the way back the "gradient" of the second input becomes the heads' scores, summed over images: so they add up over
    micro-batches, and start at zero in every step, as gradients do."""

    @staticmethod
    def forward(context: Any, outputs: Tensor, tap: Tensor) -> Tensor:
        context.save_for_backward(outputs)
        context.heads = tap.shape[1]
        return outputs.view_as(outputs)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        (outputs,) = context.saved_tensors
        return gradient, score_heads(_by_head(outputs, context.heads), _by_head(gradient, context.heads))


def _by_head(x: Tensor, heads: int) -> Tensor:
    return wide(x).unflatten(-1, (heads, -1))


def score_heads(outputs: Tensor, gradients: Tensor) -> Tensor:
    """Scores of the heads from their outputs A and the loss's gradients dL/dA, both [B, N, H, d]: [2, H], summed over images. Row 0,
    by which heads die: |sum over tokens and channels of A x dL/dA|, the first-order change of the loss without the head. Row 1, by which
    they grow: the sum of |dL/dA|."""
    return torch.stack([
        (outputs * gradients).sum(dim=(1, 3)).abs().sum(dim=0),
        gradients.abs().sum(dim=(0, 1, 3)),
    ])  # fmt: skip


class HeadTap(nn.Identity):
    """Stands in the place of the attention's norm, where the outputs of all heads lie side by side [B, N, H x d], and scores the heads in
    a backward pass while `tap` is there."""

    tap: nn.Parameter | None = None

    def forward(self, x: Tensor) -> Tensor:
        return x if self.tap is None or not self.training else _Scores.apply(x, self.tap)


@dataclass(frozen=True)
class Structured:
    """atten_density, other_density: shares of heads and neurons that stay in every block; projections, embedding, classifier and biases
    are dense."""

    atten_density: float
    other_density: float

    def mask(self, model: nn.Module) -> None:
        """Initial masks: the same numbers of heads and neurons in every block, which ones by torch's generator. Unsupported where a
        block has parts that the masks do not know, or would keep nothing."""
        for index, block in enumerate(model.blocks):
            _require_plain(block, index)
            block.attn.norm = HeadTap()
            heads = _some(
                block.attn.num_heads, self.atten_density, f"atten_density {self.atten_density}: block {index}: no head"
            )
            neurons = _some(
                block.mlp.fc1.out_features,
                self.other_density,
                f"other_density {self.other_density}: block {index}: no neuron",
            )
            mask_layer(block.attn.qkv, _qkv_rows(block.attn, heads))
            mask_layer(block.mlp.fc1, neurons[:, None].clone())
            mask_layer(block.mlp.fc2, neurons[None, :].clone())

    def renew(self, model: nn.Module, rate: float, growth: Growth, head_scores: list[Tensor] | None) -> Moved:
        """One update of all blocks. head_scores: [2, H] per block (see `score_heads`), over all images of the last step."""
        moved = []
        for block, of_heads in zip(model.blocks, head_scores, strict=True):
            mlp, is_random = block.mlp, growth.kind == "random"
            heads, neurons = heads_of(block.attn), neurons_of(mlp)
            grown_by = torch.rand(len(heads)).to(of_heads.device) if is_random else of_heads[1]
            moved.append(_renewed(heads, of_heads[0], grown_by, rate))
            block.attn.qkv.weight_mask.copy_(_qkv_rows(block.attn, heads))
            size = neuron_scores(mlp.fc1.weight.detach(), mlp.fc2.weight.detach())
            grown_by = (
                torch.rand(len(neurons)).to(size.device)
                if is_random
                else neuron_scores(mlp.fc1.weight.grad, mlp.fc2.weight.grad)
            )
            moved.append(_renewed(neurons, size, grown_by, rate))
            mlp.fc1.weight_mask.copy_(neurons[:, None])
            mlp.fc2.weight_mask.copy_(neurons[None, :])
        return Moved(sum(m.dropped for m in moved), sum(m.regrown for m in moved))

    def density(self, model: nn.Module) -> dict[str, float]:
        """Of all parameters that the paper's compact networks have fewer of: they keep the projection whole, but not the biases of what
        is gone."""
        found = {}
        for index, block in enumerate(model.blocks):
            heads, neurons = (float(x.double().mean()) for x in (heads_of(block.attn), neurons_of(block.mlp)))
            densities = {
                "attn.qkv.weight": heads,
                "attn.qkv.bias": heads,
                "mlp.fc1.weight": neurons,
                "mlp.fc1.bias": neurons,
            }
            densities["mlp.fc2.weight"] = neurons
            there = dict(block.named_parameters())
            found |= {f"blocks.{index}.{name}": share for name, share in densities.items() if name in there}
        return found

    def units(self, model: nn.Module) -> list[Units]:
        return [Units(heads=heads_of(block.attn), neurons=neurons_of(block.mlp)) for block in model.blocks]

    def deploy(self, model: nn.Module) -> nn.Module:
        """Without the dead heads and neurons: the shapes are smaller, the logits the same."""
        deployed = copy.deepcopy(model)
        kept = self.units(deployed)
        bake(deployed)
        for block, units in zip(deployed.blocks, kept, strict=True):
            block.attn.norm = nn.Identity()
            remove_heads(block.attn, units.heads)
            remove_neurons(block.mlp, units.neurons)
        return deployed


def heads_of(attention: Attention) -> Tensor:
    """The active heads, bool [H]: those with any row, of queries, keys or values; of all there were, where the others
    are gone."""
    if isinstance(attention, NarrowAttention):
        return attention.heads_kept
    return attention.qkv.weight_mask.view(3, attention.num_heads, -1).any(dim=2).any(dim=0)


def neurons_of(mlp: Mlp) -> Tensor:
    """The active neurons, bool [hidden]; of all there were, where the others are gone."""
    if hasattr(mlp, "neurons_kept"):
        return mlp.neurons_kept
    return mlp.fc1.weight_mask[:, 0].clone()


def neuron_scores(rows: Tensor, columns: Tensor) -> Tensor:
    """L1 norm of what belongs to each neuron: its row of fc1 [hidden, C] and its column of fc2 [C, hidden]: [hidden]."""
    return rows.abs().sum(dim=1) + columns.abs().sum(dim=0)


def _some(count: int, density: float, otherwise: str) -> Tensor:
    """bool [count] with floor(count x density) ones at random places."""
    kept = math.floor(count * density + 1e-9)
    if kept == 0:
        raise Unsupported(f"{otherwise} of {count} would stay")
    return torch.zeros(count, dtype=torch.bool).index_fill_(0, torch.randperm(count)[:kept], True)


def _qkv_rows(attention: Attention, heads: Tensor) -> Tensor:
    """The mask [3 H d, 1] of the weight's rows: every head has some in each of the three slabs."""
    return heads.repeat_interleave(attention.head_dim).repeat(3)[:, None]


def _renewed(active: Tensor, death: Tensor, growth: Tensor, rate: float) -> Moved:
    """Exchanges units in place: at least one dies (ceil), and as many grow."""
    if bool(active.all()):
        return Moved(0, 0)
    alive = survivors(death, active, math.ceil(rate * int(active.sum())))
    count = int(active.sum() - alive.sum())
    renewed = grow(growth, alive, count)
    regrown = int((renewed & active & ~alive).sum())
    active.copy_(renewed)
    return Moved(count, regrown)


def _require_plain(block: nn.Module, index: int) -> None:
    if type(block.mlp) is not Mlp or not isinstance(block.mlp.norm, nn.Identity):
        raise Unsupported(
            f"svite, structured: block {index} has an unusual MLP; only timm's Mlp without a norm is supported"
        )
    if not isinstance(block.attn.norm, nn.Identity):
        raise Unsupported(
            f"svite, structured: block {index} normalises its heads together, so dead ones cannot be taken out"
        )
