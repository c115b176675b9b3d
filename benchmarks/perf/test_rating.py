"""Attention that also says how much each query wants each key, at the size of DeiT-S's approximation network: the kernel of our own, torch's operations one by one, and
compiled; and the walk back through twelve blocks' ratings. `attention alone` shows what rating costs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from methods.core import native
from methods.core.operators import scored_attention
from methods.sttabt.approxnet import rated
from methods.sttabt.backtracking import concrete_masks, concrete_sets

from . import BATCHES, HEADS, PATCHES

pytestmark = pytest.mark.usefixtures("inference")
HEAD_WIDTH = 16
TOKENS = PATCHES + 1


def plain(qkv: Tensor) -> tuple[Tensor, Tensor]:
    q, k, v = qkv.unflatten(-1, (3, HEADS, HEAD_WIDTH)).permute(2, 0, 3, 1, 4).unbind(0)
    scores = (q * HEAD_WIDTH**-0.5) @ k.transpose(-2, -1)
    return (scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(2), rated(scores, "uniform")


def alone(qkv: Tensor) -> Tensor:
    q, k, v = qkv.unflatten(-1, (3, HEADS, HEAD_WIDTH)).permute(2, 0, 3, 1, 4).unbind(0)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def rating(qkv: Tensor) -> tuple[Tensor, Tensor]:
    return scored_attention(qkv, HEADS, True)


WAYS = {"ours": rating, "plain": plain, "compiled": torch.compile(plain, dynamic=False), "attention alone": alone}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("batch", BATCHES)
def test_rated_attention(timed, device, batch, way):
    if device.type != "cpu" and way == "ours":
        pytest.skip("for the CPU")
    qkv = torch.randn(batch, TOKENS, 3 * HEADS * HEAD_WIDTH, device=device)
    found = timed(f"rated attention of one block, batch {batch}", WAYS[way], qkv)
    expected = plain(qkv)
    if way == "attention alone":
        found, expected = (found,), expected[:1]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def plain_walk(ratings: list[Tensor], logits: Tensor, outputs: int) -> Tensor:
    return concrete_masks(ratings, logits, outputs).kept


@pytest.mark.parametrize("way", ["ours", "plain"])
@pytest.mark.parametrize("batch", BATCHES)
def test_walk_back(timed, device, batch, way):
    if device.type != "cpu" and way == "ours":
        pytest.skip("for the CPU")
    ratings = [torch.rand(batch, TOKENS, TOKENS, device=device) for _ in range(11)]
    ratings.append(torch.rand(batch, 1, TOKENS, device=device))
    if way == "ours":
        native.walk_back()  # without it torch would be timed
    walk = concrete_sets if way == "ours" else plain_walk
    logits = torch.zeros(12, device=device)
    found = timed(f"walk back through 12 blocks, batch {batch}", walk, ratings, logits, 1)
    assert bool((found == plain_walk(ratings, logits, 1)).all())
